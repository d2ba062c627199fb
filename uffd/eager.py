"""Where no userfaultfd can be had and the user asked for this: regions that are filled whole when they are made.

A library can then depend on this package and still work everywhere: the same names, the same bytes, the same errors;
what is lost is laziness, and memory. Nothing here needs the extension. How each provider is read: _plain.py.
"""

from __future__ import annotations

import errno
import inspect
import mmap
import operator
import os
import sys
import threading
import time
import warnings
import weakref
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np

from . import _plain, keys
from ._coreless import core as _core
from ._coreless import reason as _no_core
from ._machine import Machine
from .engine import Engine, fills_whole
from .errors import BudgetError, DegradedWarning, ProviderError, RegionClosed
from .region import (
    Prefetch, Region, Where, _check_choice, _checked_block, _checked_engine, _checked_shape, _checked_size, _served,
    _title, is_hosted,
)
from .stats import LatencyHistogram, Stats

__all__ = ["EagerEngine", "EagerRegion", "region_at"]

_RUN_BYTES = 512 << 10              # what is read at once, where a block is smaller
_SHARE = 0.6                        # of the memory that is available; the rest is the program's own
_PAUSES_S = (0.001, 1.0)            # before a second try, times four for each further one, at most
_BUCKETS = 40                       # of a histogram, as the core's
_regions: weakref.WeakValueDictionary[int, EagerRegion] = weakref.WeakValueDictionary()  # by address
_lock = threading.RLock()           # of leases and counts: a lease can die while this very thread has it
_shared: Engine | None = None
_told = False


class EagerEngine(Engine):
    """No threads: what `Engine(fallback="eager")` is where no userfaultfd can be had. All else as Engine."""

    fills_whole = True

    def __init__(self, *args: Any, **options: Any) -> None:
        asked = inspect.signature(Engine.__init__).bind(self, *args, **options).arguments
        _tell_once()
        self._threads = cast(Any, self)          # not None: open
        self._regions = weakref.WeakSet()
        self._ended = Stats()                    # of regions that are closed
        self._budget = asked.get("budget_bytes", "auto")
        self.workers = 0
        self.hosts = asked.get("hosts", 1)

    def stats(self) -> Stats:
        """The sum over all regions, those included that are closed."""
        total = self._ended
        for region in list(self._regions):
            counted = region._stats_or_none()
            total = total if counted is None else total + counted
        return total

    def close(self) -> None:
        """Closes all regions; idempotent. BufferError, with nothing done, while arrays live."""
        if self._threads is None:
            return
        using = [region.name for region in list(self._regions) if region.exports]
        if using:
            raise BufferError(f"arrays of {len(using)} regions are in use (the first: {using[0]!r}); drop them first, "
                              "or leave the engine as a context manager, which waits for them")
        self._leave()

    def _leave(self) -> None:
        self._end_monitors()
        self._threads = None
        for region in list(self._regions):
            region._shut_when_unused()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(list(self.regions))} regions"
        return f"<uffd.Engine: no userfaultfd, regions are filled whole, {state}>"


class EagerRegion(Region):
    """What `Region` is in such an engine: all blocks are read in the constructor, in this thread, and stay.

    Blocks until then. ProviderError for a block that could not be filled after `retries` more tries; BudgetError where
    memory lacks. backing, delivery, readahead_bytes and on_error are checked and have no effect, timeout_s bounds the
    tries of a block, but ends none that hangs. All other methods return at once. A provider in Python runs here, under
    the interpreter lock: open, read of all blocks, close.
    """

    def __init__(self, nbytes: int | None, provider: Any, *, engine: Engine | None = None, name: str | None = None,
                 mode: str | None = None, block_bytes: int = 65536, backing: str = "anon", delivery: str = "auto",
                 readahead_bytes: int | None = None, on_error: str = "poison", retries: int = 3,
                 timeout_s: float = 30.0) -> None:
        options: dict[str, Any] = {"name": name, "mode": mode, "block_bytes": block_bytes, "backing": backing,
                                   "delivery": delivery, "readahead_bytes": readahead_bytes, "on_error": on_error,
                                   "retries": retries, "timeout_s": timeout_s}
        _check_options(provider, **options)
        engine = _checked_engine(engine)
        self.block_bytes, self.name, self.mode = int(block_bytes), _title(provider) if name is None else str(name), \
            mode or "c"
        self.backing, self.delivery = backing, "thread" if delivery == "auto" else delivery
        self.engine, self.provider, self._options = engine, provider, options
        self._retries, self._timeout_s = operator.index(retries), float(timeout_s)
        self._leases, self._leaving = 0, False
        self._tried: dict[str, Any] = {"retries": 0, "errors": 0}
        self._fill_times = [0] * _BUCKETS
        self._memory: mmap.mmap | None = None
        self._present: np.ndarray = np.zeros(0, bool)
        source = _plain.source_of(_served(provider))
        try:
            self._fill(source, nbytes)
        except BaseException:
            self._free()
            raise
        finally:
            source.close()
        engine._regions.add(self)
        _regions[self._address] = self

    # ---- filling ----

    nbytes: int

    def _fill(self, source: _plain.Source, nbytes: int | None) -> None:
        source.begin(self._offered)
        if nbytes is None and source.nbytes is None:
            self._attempt(source.open, 0, 0, self._retries)      # a provider may know its size only now
        self.nbytes = _checked_size(nbytes, source.nbytes, self.provider)
        _check_budget(self)
        self._memory = _memory_of(self.nbytes, self.name)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._address = self._bytes.__array_interface__["data"][0]
        self._present = np.zeros(-(-self.nbytes // self.block_bytes), bool)
        if not source.is_zero:
            self._attempt(source.open, 0, min(self.block_bytes, self.nbytes), self._retries)
            for batch in _batches(self._runs_missing(), source.batch):
                self._fill_batch(source, batch)
        self._present[:] = True

    def _runs_missing(self) -> Any:
        """(offset, stop) in bytes, ascending; looked up as they are taken, since a provider may offer blocks."""
        at, per_run = 0, max(1, _RUN_BYTES // self.block_bytes)
        while at < len(self._present):
            if self._present[at]:
                at += 1
                continue
            stop = at + 1
            while stop < min(at + per_run, len(self._present)) and not self._present[stop]:
                stop += 1
            yield at * self.block_bytes, min(stop * self.block_bytes, self.nbytes)
            at = stop

    def _fill_batch(self, source: _plain.Source, batch: list[tuple[int, int]]) -> None:
        """In one call; where that fails, block by block, so that one that fails is named, and tried again."""
        began = time.perf_counter_ns()
        try:
            source.read([(offset, self._bytes[offset:stop]) for offset, stop in batch])
        except Exception:
            self._count("errors")
            for offset, stop in batch:
                for at in range(offset, stop, self.block_bytes):
                    out = self._bytes[at:min(at + self.block_bytes, stop)]
                    self._attempt(lambda at=at, out=out: source.read([(at, out)]), at, len(out), self._retries)
        for offset, stop in batch:
            self._present[offset // self.block_bytes:-(-stop // self.block_bytes)] = True
        took_ns = max(1, time.perf_counter_ns() - began)
        self._fill_times[min(took_ns.bit_length() - 1, _BUCKETS - 1)] += 1

    def _attempt(self, call: Any, offset: int, nbytes: int, retries: int) -> None:
        deadline, pause_s = time.monotonic() + self._timeout_s, _PAUSES_S[0]
        for tries in range(1, retries + 2):
            try:
                call()
                return
            except Exception as error:
                self._count("errors")
                late = time.monotonic() + pause_s > deadline
                if tries > retries or late:
                    raise self._failure(error, offset, nbytes, tries) from error
            self._count("retries")
            time.sleep(pause_s)
            pause_s = min(4 * pause_s, _PAUSES_S[1])

    def _failure(self, error: Exception, offset: int, nbytes: int, tries: int) -> ProviderError:
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        message = (f"region {self.name!r}: block at offset {offset} ({nbytes} bytes) could not be filled from "
                   f"{_title(self.provider)} after {tries} tries: {_plain.words_of(error, number)}")
        return ProviderError(number, message, region=self.name, offset=offset, nbytes=nbytes, tries=tries,
                             provider_traceback=_plain.traceback_of(error, self.provider))

    def _offered(self, offset: int, data: np.ndarray) -> bool:
        """A provider hands over bytes that nobody asked for yet: blocks that they cover whole are taken."""
        if self._memory is None:                 # in open, before the size is known
            return False
        first = -(-offset // self.block_bytes)
        stop = min(offset + len(data), self.nbytes)
        last = len(self._present) if stop == self.nbytes else stop // self.block_bytes
        taken = False
        for block in range(max(first, 0), last):
            if not self._present[block]:
                at = block * self.block_bytes
                end = min(at + self.block_bytes, self.nbytes)
                self._bytes[at:end] = data[at - offset:end - offset]
                self._present[block] = taken = True
        return taken

    def _count(self, name: str) -> None:
        with _lock:
            self._tried[name] += 1

    # ---- arrays ----

    def array(self, dtype: Any = "u1", shape: Any = None, *, offset: int = 0,
              order: Literal["C", "F"] = "C") -> np.ndarray:
        """As Region.array."""
        dtype = np.dtype(dtype)
        if dtype.hasobject:
            raise TypeError(f"dtype {dtype} holds Python objects, which can't live in externalized memory")
        self._check_open()
        offset = operator.index(offset)
        if not 0 <= offset <= self.nbytes:
            raise ValueError(f"offset {offset} is outside the region of {self.nbytes} bytes")
        if shape is None:
            shape = ((self.nbytes - offset) // dtype.itemsize if dtype.itemsize else 0,)
        with _lock:
            self._check_open()
            flat = np.asarray(_Lease(self))
        return np.ndarray(_checked_shape(shape), dtype, buffer=flat, offset=offset, order=order)

    # ---- what is there ----

    def populate(self, where: Where = None, *, timeout_s: float | None = None) -> None:
        """Returns at once: all is resident."""
        self._runs(where)

    @contextmanager
    def pinned(self, where: Where = None) -> Any:
        """A context in which nothing changes: all is resident, and stays so."""
        self._runs(where)
        yield self

    @contextmanager
    def _pin(self, runs: np.ndarray, writable: bool) -> Any:
        self._check_open()
        yield

    def _populate(self, runs: np.ndarray, timeout_s: float | None) -> None:
        self._check_open()

    def _prefetch(self, runs: np.ndarray) -> Prefetch:
        self._check_open()
        return Prefetch(self, runs, None)

    def _runs(self, where: Where) -> np.ndarray:
        self._check_open()
        return keys.byte_run(where, self._address, self.nbytes, self.block_bytes)

    def resident(self) -> np.ndarray:
        """True for each block."""
        self._check_open()
        return np.ones(self.block_count, bool)

    def dirty(self) -> np.ndarray:
        """Bool, one per block: of a writable region all of them, since nobody sees writes here."""
        self._check_open()
        return np.full(self.block_count, self.mode != "r")

    def stats(self) -> Stats:
        """What reading the provider took: blocks_prefetch, bytes_filled, retries, errors and the latencies `fill`."""
        self._check_open()
        return self._stats()

    def _stats(self) -> Stats:
        return Stats(blocks_prefetch=self.block_count, bytes_filled=self.nbytes, **self._tried,
                     fill=LatencyHistogram(tuple(self._fill_times)))

    def _stats_or_none(self) -> Stats | None:
        return None if self._memory is None else self._stats()

    @property
    def address(self) -> int:
        return self._address

    @property
    def block_count(self) -> int:
        return len(self._present)

    @property
    def tracked(self) -> bool:
        return False

    @property
    def exports(self) -> int:
        return self._leases

    @property
    def closed(self) -> bool:
        return self._memory is None or self._leaving

    # ---- life ----

    def close(self) -> None:
        """Frees the memory; idempotent. BufferError while arrays of it live."""
        with _lock:
            if self._leases:
                raise BufferError(f"region {self.name!r}: {self._leases} arrays are in use")
            self._free()

    def _shut_when_unused(self) -> None:
        with _lock:
            if self._leases:
                self._leaving = True
            else:
                self._free()

    def _lease_ended(self) -> None:
        with _lock:
            self._leases -= 1
            if self._leaving and not self._leases:
                self._free()

    def _free(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            self.engine._ended = self.engine._ended + self._stats()
            self.engine._regions.discard(self)
            _regions.pop(getattr(self, "_address", -1), None)
            del self._bytes                      # the mapping can't be closed while this looks at it
            try:
                memory.close()
            except BufferError:                  # a traceback still holds a view of it, and frees it when it goes
                pass

    def _check_open(self) -> None:
        if self.closed:
            raise RegionClosed(f"region {self.name!r} is closed")

    def __reduce__(self) -> Any:
        """The recipe, as Region's. Where it is opened there is a userfaultfd, or the fallback is taken again."""
        provider = self.provider
        if is_hosted(_served(provider)):
            from ._hosting import Portable

            provider = Portable(provider)
        return _remade, (self.nbytes, provider, self._options)


class _Lease:
    """At the base of each array: keeps the region, and tells it when the array and all views of it are gone."""

    def __init__(self, region: EagerRegion) -> None:
        self.region = region
        self.__array_interface__ = {"version": 3, "shape": (region.nbytes,), "typestr": "|u1",
                                    "data": (region._address, region.mode == "r")}
        region._leases += 1

    def __del__(self) -> None:
        self.region._lease_ended()


def region_at(address: int) -> EagerRegion | None:
    """The region whose memory has this address, or None."""
    for start, region in list(_regions.items()):
        if start <= address < start + region.nbytes:
            return region
    return None


def _remade(nbytes: int, provider: Any, options: dict[str, Any]) -> Region:
    """Who made the recipe had asked for the fallback, be it in his own engine: so it holds here, too."""
    global _shared
    if fills_whole(None) or _core.mode()[0] != "none":
        return Region(nbytes, provider, **options)
    with _lock:
        if _shared is None or _shared.closed:
            _shared = Engine(fallback="eager")
    return Region(nbytes, provider, engine=_shared, **options)


# ---- checks -----------------------------------------------------------------------------------------------------


def _check_options(provider: Any, *, mode: str | None, block_bytes: int, backing: str, delivery: str,
                   readahead_bytes: int | None, on_error: str, retries: int, timeout_s: float, name: Any) -> None:
    _check_choice("mode", mode, (None, "r", "c", "r+"))
    _check_choice("backing", backing, ("anon", "shared"))
    _check_choice("delivery", delivery, ("auto", "thread", "inline"))
    _check_choice("on_error", on_error, ("poison", "wait"))
    if mode == "r+":
        raise ValueError(f"mode 'r+' needs a provider that can write, and {_title(provider)} can't; use 'c'")
    _checked_block(block_bytes)
    if operator.index(retries) < 0 or not timeout_s > 0:
        raise ValueError(f"retries must be >= 0 and timeout_s > 0, not {retries} and {timeout_s}")
    if readahead_bytes is not None and operator.index(readahead_bytes) < 0:
        raise ValueError(f"readahead_bytes must be >= 0, not {readahead_bytes}")


def _tell_once() -> None:
    global _told
    if not _told:
        _told = True
        why = _no_core or f"no userfaultfd can be had ({os.strerror(_core.mode()[1])})"
        warnings.warn(f"fallback 'eager': {why}, so regions are filled whole when they are made, and must fit into "
                      "memory. `python -m uffd probe` names the cure", DegradedWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """For a warning in the function that calls this: the first caller outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "uffd":
        level, frame = level + 1, frame.f_back
    return level


# ---- memory -----------------------------------------------------------------------------------------------------


def _batches(runs: Any, count: int) -> Any:
    batch = []
    for run in runs:
        batch.append(run)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


def _memory_of(nbytes: int, name: str) -> mmap.mmap:
    """Zeros, page-aligned, private to this process also after a fork."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        return mmap.mmap(-1, nbytes, **private)
    except (OSError, MemoryError, OverflowError) as error:
        raise BudgetError(f"region {name!r}: {nbytes} bytes could not be had: {error}; without a userfaultfd a region "
                          "must fit into memory") from error


def _check_budget(region: EagerRegion) -> None:
    limit, held = _limit_bytes(region.engine), sum(other.nbytes for other in list(_regions.values()))
    room, whence = (limit - held, "the budget") if limit is not None else (_available_bytes(), "memory")
    if room is not None and region.nbytes > room:
        raise BudgetError(f"region {region.name!r} of {region.nbytes} bytes: {whence} has room for {max(0, room)} "
                          f"(60 % of what is available, or UFFD_BUDGET_BYTES; regions hold {held}). Without a "
                          "userfaultfd a region must fit into memory: take less of the data, or see "
                          "`python -m uffd probe`")


def _limit_bytes(engine: Engine) -> int | None:
    """What all regions of this kind may hold, where the user said so."""
    asked: Any = getattr(engine, "_budget", "auto")
    text = os.environ.get("UFFD_BUDGET_BYTES") if asked == "auto" else None
    if text:
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"UFFD_BUDGET_BYTES must be a number of bytes, not {text!r}") from None
    return None if asked == "auto" else 1 << 62 if asked is None else operator.index(asked)


def _available_bytes() -> int | None:
    """60 % of what the machine and each of our cgroups have left; None where nobody tells."""
    machine = Machine()
    known: list[int | None] = [machine.available_bytes(), *_cgroup_rooms_bytes(machine)]
    if known[0] is None and hasattr(os, "sysconf"):
        name = next((name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in os.sysconf_names), None)
        known[0] = os.sysconf(name) * _core.PAGE_BYTES if name else None
    found = [room for room in known if room is not None and room >= 0]
    return int(_SHARE * min(found)) if found else None


def _cgroup_rooms_bytes(machine: Machine) -> list[int]:
    """Limit less use, of our cgroups and those above them; file pages that nobody uses now are room."""
    rooms = []
    for line in (machine.read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, use, idle = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                   "total_inactive_file") if controllers else \
                                  ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
        parts = [part for part in path.split("/") if part]
        for folder in [mount] + [f"{mount}/{'/'.join(parts[:n])}" for n in range(1, len(parts) + 1)]:
            numbers = [machine.read(f"{folder}/{name}") or "" for name in (limit, use)]
            if all(number.isdigit() for number in numbers):
                words = (machine.read(f"{folder}/memory.stat") or "").split()
                unused = int(words[words.index(idle) + 1]) if idle in words else 0
                rooms.append(max(0, int(numbers[0]) - int(numbers[1]) + unused))
    return rooms
