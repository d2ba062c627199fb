"""Where no userfaultfd can be had and the user asked for this: regions that are filled whole when they are made.

A library can then depend on this package and still work everywhere: the same names, the same bytes, the same errors;
what is lost is laziness, and memory. Nothing here needs the extension. How each provider is read: _plain.py.
"""

from __future__ import annotations

import atexit
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
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import numpy as np

from . import _budget, _plain, _unwritten, keys
from ._coreless import core as _core
from ._coreless import reason as _no_core
from ._written import Closer, Written
from .engine import Engine, fills_whole
from .errors import BudgetError, DegradedWarning, ProviderError, RegionClosed
from .region import (
    Prefetch, Region, Where, _check_choice, _checked_block, _checked_engine, _checked_mode, _checked_shape,
    _checked_size, _left_ns, _or_scratch, _served, _title, is_hosted,
)
from .stats import LatencyHistogram, Stats

__all__ = ["EagerEngine", "EagerRegion", "region_at"]

_RUN_BYTES = 512 << 10              # what is read at once, where a block is smaller
_PAUSES_S = (0.001, 1.0)            # before a second try, times four for each further one, at most
_BUCKETS = 40                       # of a histogram, as the core's
_regions: weakref.WeakValueDictionary[int, EagerRegion] = weakref.WeakValueDictionary()  # by address
_lock = threading.RLock()           # of leases and counts: a lease can die while this very thread has it
_closer = Closer()
_shared: Engine | None = None
_told = False


class EagerEngine(Engine):
    """No threads: what `Engine(fallback="eager")` is where no userfaultfd can be had. All else as Engine."""

    fills_whole = True

    def __init__(self, *args: Any, **options: Any) -> None:
        asked = inspect.signature(Engine.__init__).bind(self, *args, **options).arguments
        self._asked = _budget.checked(asked.get("budget_bytes", "auto"))
        self.hosts = operator.index(asked.get("hosts", 1))
        if not 1 <= self.hosts <= _core.MAX_HOST_COUNT:
            raise ValueError(f"hosts must be 1 to {_core.MAX_HOST_COUNT}, not {self.hosts}")
        _tell_once()
        self._threads = cast(Any, self)          # not None: open
        self._regions = weakref.WeakSet()
        self._ended = Stats()                    # of regions that are closed
        self.workers = 0

    @property
    def budget_bytes(self) -> int | None:
        """The most that regions may hold now, None: no limit. Set it to a number, None or "auto"; BudgetError for less
        than they hold: nothing can leave memory here."""
        return None if self.closed else _budget.limit(self._asked, self.resident_bytes)

    @budget_bytes.setter
    def budget_bytes(self, asked: int | str | None) -> None:
        if self.closed:
            raise ValueError("the engine is closed")
        asked, held = _budget.checked(asked), self.resident_bytes
        if isinstance(asked, int) and asked < held:
            raise BudgetError(f"a budget of {asked} bytes: regions hold {held}, and without a userfaultfd nothing of "
                              "them can leave memory; close some")
        self._asked = asked

    @property
    def resident_bytes(self) -> int:
        """Bytes of all regions: all are in memory."""
        return sum(region.nbytes for region in cast(Any, list(self._regions)) if region._memory is not None)

    def stats(self) -> Stats:
        """The sum over all regions, those included that are closed."""
        total = self._ended
        for region in list(self._regions):
            counted = region._stats_or_none()
            total = total if counted is None else total + counted
        return total

    def close(self) -> None:
        """Closes all regions, as their `close` does; idempotent. BufferError, with nothing done, while arrays live."""
        if self._threads is None:
            return
        using = [region.name for region in list(self._regions) if region.exports]
        if using:
            raise BufferError(f"arrays of {len(using)} regions are in use (the first: {using[0]!r}); drop them first, "
                              "or leave the engine as a context manager, which waits for them")
        self.flush()
        for region in list(self._regions):
            region.close()
        self._leave()

    def _leave(self) -> None:
        if self._threads is None:
            return
        try:
            self.flush()
        finally:
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
    memory lacks. backing, delivery, readahead_bytes, volatile and on_error are checked and have no effect, timeout_s
    bounds the tries of a block, but ends none that hangs. A provider in Python runs here, under the interpreter lock:
    open, read of all blocks, and close, at once or, in mode "r+", when the region goes. Nobody sees writes: `flush`,
    and `evict` and `dirty` of mode "r+", compare a checksum of each block, which takes about a second for a GiB.
    """

    mode = "c"
    _memory: mmap.mmap | None = None             # of one whose constructor failed, too
    _source: _plain.Source | None = None         # in mode "r+": open, for the process that opened it
    _written: Written | None = None              # the same

    def __init__(self, nbytes: int | None, provider: Any = None, *, engine: Engine | None = None,
                 name: str | None = None, mode: str | None = None, block_bytes: int = 65536, backing: str = "anon",
                 delivery: str = "auto", readahead_bytes: int | None = None, volatile: bool = False,
                 on_error: str = "poison", retries: int = 3, timeout_s: float = 30.0) -> None:
        provider = _or_scratch(provider)
        options: dict[str, Any] = {
            "name": name, "mode": mode, "block_bytes": block_bytes, "backing": backing, "delivery": delivery,
            "readahead_bytes": readahead_bytes, "volatile": volatile, "on_error": on_error, "retries": retries,
            "timeout_s": timeout_s}
        served = _served(provider)
        _check_options(**options)
        engine = _checked_engine(engine)
        self.block_bytes, self.name = int(block_bytes), _title(provider) if name is None else str(name)
        self.backing, self.delivery = backing, "thread" if delivery == "auto" else delivery
        self.engine, self.provider, self._options = engine, provider, options
        self._retries, self._timeout_s = operator.index(retries), float(timeout_s)
        self._leases, self._leaving, self._pid = 0, False, os.getpid()
        self._io = threading.RLock()             # one call of the source at a time
        self._unused_since_flush = False
        self._tried = dict.fromkeys(("retries", "errors", "written_back", "bytes_written", "write_errors"), 0)
        self._fill_times, self._write_times = [0] * _BUCKETS, [0] * _BUCKETS
        self._text: str | None = None            # the traceback of the last write that failed
        self._present: np.ndarray = np.zeros(0, bool)
        self._pins: np.ndarray = np.zeros(0, np.uint32)
        source = _plain.source_of(served)
        try:
            self._fill(source, nbytes)
            if self.mode == "r+":
                self._written = Written(self._bytes, self.block_bytes)
                source.begin(_takes_none)        # else it would keep this region
                self._source = source
        except BaseException:
            self._free()
            raise
        finally:
            if self._source is None:
                source.close()
        engine._regions.add(self)
        _regions[self._address] = self
        if self.mode == "r+":
            _closer.expect(self)

    # ---- filling ----

    nbytes: int

    def _fill(self, source: _plain.Source, nbytes: int | None) -> None:
        source.begin(self._offered)
        if is_hosted(_served(self.provider)):    # one in Python may know its size, and whether it writes, only now
            self._attempt(source.open, 0, 0)
        self.nbytes = _checked_size(nbytes, source.nbytes, self.provider)
        asked: Any = self._options
        self.mode = _checked_mode(asked["mode"], source.writes, asked["volatile"], self.provider)
        _check_budget(self)
        self._memory = _plain.memory_of(self.nbytes, self.name)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._address = self._bytes.__array_interface__["data"][0]
        self._present = np.zeros(-(-self.nbytes // self.block_bytes), bool)
        self._pins = np.zeros(len(self._present), np.uint32)
        if not source.is_zero:
            self._attempt(source.open, 0, min(self.block_bytes, self.nbytes))
            for batch in _plain.batches(self._runs_missing(), source.batch):
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
                    self._attempt(partial(source.read, [(at, out)]), at, len(out))
        for offset, stop in batch:
            self._present[offset // self.block_bytes:-(-stop // self.block_bytes)] = True
        _note_time(self._fill_times, began)

    def _attempt(self, call: Callable[[], Any], offset: int, nbytes: int) -> None:
        error, tries = self._try(call, "errors")
        if error is not None:
            raise self._failure(error, offset, nbytes, tries) from error

    def _try(self, call: Callable[[], Any], counter: str) -> tuple[Exception | None, int]:
        """Calls it up to `retries` more times, within timeout_s: what it raised at last, or None; how many tries."""
        deadline, pause_s, tries = time.monotonic() + self._timeout_s, _PAUSES_S[0], 1
        while True:
            try:
                call()
                return None, tries
            except Exception as error:
                self._count(counter)
                if tries > self._retries or time.monotonic() + pause_s > deadline:
                    return error, tries
            if counter == "errors":
                self._count("retries")
            time.sleep(pause_s)
            pause_s, tries = min(4 * pause_s, _PAUSES_S[1]), tries + 1

    def _failure(self, error: Exception, offset: int, nbytes: int, tries: int) -> ProviderError:
        number = _plain.number_of(error)
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

    def _count(self, name: str, more: int = 1) -> None:
        with _lock:
            self._tried[name] += more

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
            self._unused_since_flush = False
            flat = np.asarray(_Lease(self))
        return np.ndarray(_checked_shape(shape), dtype, buffer=flat, offset=offset, order=order)

    # ---- what is there ----

    def populate(self, where: Where = None, *, timeout_s: float | None = None) -> None:
        """Returns at once: all is resident."""
        self._runs(where)

    @contextmanager
    def pinned(self, where: Where = None) -> Any:
        """A context in which `where` stays as it is: all is resident anyway, and `discard` refuses it."""
        with self._pin(self._runs(where), True):
            yield self

    @contextmanager
    def _pin(self, runs: np.ndarray, writable: bool) -> Any:
        self._check_open()
        pairs = np.asarray(runs, np.int64).reshape(-1, 2).tolist()
        with _lock:
            for first, end in pairs:
                self._pins[first:end] += 1
        try:
            yield
        finally:
            with _lock:
                for first, end in pairs:
                    self._pins[first:end] -= 1

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
        """Bool, one per block: in mode "r+" those whose bytes differ from what was read or written back; in mode "c"
        all of them, since nobody sees writes here."""
        self._check_open()
        written = self._written
        return np.full(self.block_count, self.mode != "r") if written is None else written.dirty()

    def stats(self) -> Stats:
        """What the provider took: blocks_prefetch, bytes_filled, retries, errors, and the latencies `fill`; of writes
        written_back, bytes_written, bytes_stored, write_errors, and the latencies `write`."""
        self._check_open()
        return self._stats()

    def _stats(self) -> Stats:
        tried = {**self._tried, "bytes_stored": self._tried["bytes_written"]}
        return Stats(blocks_prefetch=self.block_count, bytes_filled=self.nbytes, **cast(Any, tried),
                     fill=LatencyHistogram(tuple(self._fill_times)), write=LatencyHistogram(tuple(self._write_times)))

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

    # ---- back to the provider ----

    def evict(self, where: Where = None) -> int:
        """0: nothing can leave memory here. What was written to `where` is written back, in mode "r+"; as `flush`."""
        runs = self._runs(where)
        if self.mode == "r+":
            self._write_back(runs, None)
        return 0

    def discard(self, where: Where = None) -> None:
        """Reads the blocks of `where` again, whatever was written to them and not written back. Blocks until then.
        ValueError for a block that is pinned, ProviderError for one that can't be read: it stays, those before it are
        read."""
        runs = self._runs(where).tolist()
        per_run = max(1, _RUN_BYTES // self.block_bytes)
        with self._reading() as source:
            for first, end in runs:
                for at in range(first, end, per_run):
                    self._refill(source, at, min(at + per_run, end))

    @contextmanager
    def _reading(self) -> Any:
        """The source, open, and nobody else's meanwhile. Of another process it is another's."""
        if self._source is not None and os.getpid() == self._pid:
            with self._io:
                self._check_open()
                yield self._source
            return
        source = _plain.source_of(_served(self.provider))
        source.begin(_takes_none)
        try:
            self._attempt(source.open, 0, 0)
            yield source
        finally:
            source.close()

    def _refill(self, source: _plain.Source, first: int, end: int) -> None:
        held, written = self._bytes, self._written
        offset, stop = first * self.block_bytes, min(end * self.block_bytes, self.nbytes)
        fresh = np.empty(stop - offset, np.uint8)        # in place, a read that fails would leave half of it
        with _lock:
            pinned = np.flatnonzero(self._pins[first:end])
        if len(pinned):
            if pinned[0]:
                self._refill(source, first, first + int(pinned[0]))
            raise ValueError(f"region {self.name!r}: the block at offset {(first + int(pinned[0])) * self.block_bytes} "
                             "is pinned, and can't be discarded")
        began = time.perf_counter_ns()
        self._attempt(lambda: source.read([(offset, fresh)]), offset, len(fresh))
        held[offset:stop] = fresh
        if written is not None:
            written.keep(first, fresh)
        _note_time(self._fill_times, began)

    def flush(self, timeout_s: float | None = None) -> None:
        """As Region.flush. It compares all blocks first; timeout_s ends no call of the provider that hangs."""
        self._check_open()
        self._flush(timeout_s)

    def _flush(self, timeout_s: float | None) -> None:
        if self.mode != "r+" or os.getpid() != self._pid:
            return
        with self._io:
            source, written, unused = self._source, self._written, self._leases == 0
            if source is None or written is None:
                raise RegionClosed(f"region {self.name!r} is closed")
            deadline = None if timeout_s is None else time.monotonic() + timeout_s
            self._unused_since_flush = unused    # if it fails, the caller is told, and who leaves tries it once
            self._write_back(np.array([[0, self.block_count]]), timeout_s)
            error, tries = self._try(source.flush, "write_errors")
            written.synced(error is None)
            if error is not None:
                number = _plain.number_of(error)
                raise ProviderError(number, f"region {self.name!r}: {_title(self.provider)} could not make durable "
                                    f"what was written: {_plain.words_of(error, number)}", region=self.name, offset=0,
                                    nbytes=self.nbytes, tries=tries,
                                    provider_traceback=_plain.traceback_of(error, self.provider)) from error
            if _left_ns(deadline) == 0:
                raise TimeoutError(errno.ETIMEDOUT, f"region {self.name!r}: not made durable in {timeout_s} s")

    def _write_back(self, runs: np.ndarray, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        failed: list[tuple[int, int, int]] = []
        with self._io:
            source, written = self._source, self._written
            if source is None or written is None:
                raise RegionClosed(f"region {self.name!r} is closed")
            for batch in _plain.batches(written.changed(np.asarray(runs).tolist(), _RUN_BYTES), source.batch):
                if _left_ns(deadline) == 0:
                    raise TimeoutError(errno.ETIMEDOUT, f"region {self.name!r}: not written back within {timeout_s} s; "
                                       f"{int(written.dirty().sum())} blocks are left")
                failed += self._write_batch(source, written, batch)
        if failed:
            raise _unwritten.write_error(self, failed, _title(self.provider))

    def _write_batch(self, source: _plain.Source, written: Written,
                     batch: list[tuple[int, bytes]]) -> list[tuple[int, int, int]]:
        """(block, errno, tries) of those that failed."""
        pieces = [(block * self.block_bytes, data) for block, data in batch]
        began = time.perf_counter_ns()
        error, tries = self._try(lambda: source.write(pieces), "write_errors")
        _note_time(self._write_times, began)
        counts = [-(-len(data) // self.block_bytes) for _, data in batch]
        if error is not None:
            number, self._text = _plain.number_of(error), _plain.text_of(error, self.provider)
            return [(block + i, number, tries) for (block, _), n in zip(batch, counts, strict=True) for i in range(n)]
        for block, data in batch:
            written.keep(block, data)
        self._count("written_back", sum(counts))
        self._count("bytes_written", sum(len(data) for _, data in batch))
        return []

    def _text_of(self, block: int) -> str | None:
        return self._text

    def _unflushed(self) -> bool:
        """Whether there may be bytes that the provider lacks, and they are this process's to write."""
        return self.mode == "r+" and self._memory is not None and not self._unused_since_flush \
            and os.getpid() == self._pid

    # ---- life ----

    def close(self) -> None:
        """Flushes the region and frees its memory; idempotent. BufferError while arrays of it live, ProviderError when
        it can't be flushed: it stays open then."""
        with _lock:
            self._refuse_while_used()
        if self.closed:
            return
        try:
            self._flush(None)
        except BaseException:
            self._unused_since_flush = False     # it stays open, and is tried again when it goes
            raise
        with _lock:
            self._refuse_while_used()
            source = self._free()
        if source is not None:
            source.close()

    def _refuse_while_used(self) -> None:
        if self._leases:
            raise BufferError(f"region {self.name!r}: {self._leases} arrays are in use")

    def _shut_when_unused(self) -> None:
        source = None
        with _lock:
            self._leaving = True
            if not self._leases:
                if self._unflushed():
                    _closer.put(self)
                else:
                    source = self._free()
        if source is not None:
            source.close()

    def _lease_ended(self) -> None:
        """Maybe in the garbage collector: a provider is called by another thread."""
        with _lock:
            self._leases -= 1
            if self._leaving and not self._leases:
                if self._source is not None and os.getpid() == self._pid:
                    _closer.put(self)
                else:
                    self._free()

    def __del__(self) -> None:
        if self.mode == "r+" and self._memory is not None and os.getpid() == self._pid:
            _closer.put(self)

    def _end(self) -> None:
        """By the closer, when nobody has it any more."""
        try:
            if self._unflushed():
                self._flush(self._timeout_s)
        finally:
            with _lock:
                source = None if self._leases else self._free()
            if source is not None:
                source.close()

    def _free(self) -> _plain.Source | None:
        """The source, to be closed, if it is open and this process's."""
        memory, self._memory = self._memory, None
        source, self._source, self._written = self._source, None, None
        if memory is not None:
            self.engine._ended = self.engine._ended + self._stats()
            self.engine._regions.discard(self)
            _regions.pop(getattr(self, "_address", -1), None)
            del self._bytes                      # the mapping can't be closed while this looks at it
            try:
                memory.close()
            except BufferError:                  # a traceback still holds a view of it, and frees it when it goes
                pass
        if source is None or os.getpid() != self._pid:
            return None
        _closer.gone()
        return source

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


def _takes_none(offset: int, data: np.ndarray) -> bool:
    return False


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


def _check_options(*, mode: str | None, block_bytes: int, backing: str, delivery: str,
                   readahead_bytes: int | None, on_error: str, retries: int, timeout_s: float, volatile: bool,
                   name: Any) -> None:
    _check_choice("mode", mode, (None, "r", "c", "r+"))
    _check_choice("backing", backing, ("anon", "shared"))
    _check_choice("delivery", delivery, ("auto", "thread", "inline"))
    _check_choice("on_error", on_error, ("poison", "wait"))
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
                      "memory. `python -m uffd probe` names the cure", DegradedWarning,
                      stacklevel=_plain.callers_level())


def _check_budget(region: EagerRegion) -> None:
    held, most = region.engine.resident_bytes, region.engine.budget_bytes
    if most is not None and region.nbytes > most - held:
        raise BudgetError(f"region {region.name!r} of {region.nbytes} bytes: the budget has room for "
                          f"{max(0, most - held)} (budget_bytes, or UFFD_BUDGET_BYTES, else 60 % of what memory there "
                          f"is: {most}; regions hold {held}). Without a userfaultfd a region must fit into memory: "
                          "take less of the data, or see `python -m uffd probe`")


def _note_time(times: list[int], began_ns: int) -> None:
    took_ns = max(1, time.perf_counter_ns() - began_ns)
    times[min(took_ns.bit_length() - 1, _BUCKETS - 1)] += 1


# ---- the end ----------------------------------------------------------------------------------------------------


def _flush_at_exit() -> None:
    """Regions that are open, or left with arrays in use, within their timeout_s; one that fails hides no other."""
    for region in list(_regions.values()):
        if region._unflushed():
            try:
                region._flush(region._timeout_s)
            except Exception:
                sys.excepthook(*sys.exc_info())
        source, region._source = region._source, None
        if source is not None and os.getpid() == region._pid:
            source.close()                       # what is written from here on is lost
    _closer.end()


def _after_fork() -> None:
    """The thread that had the lock is not here; nor is the closer."""
    global _lock, _closer
    _lock, _closer = threading.RLock(), Closer()


atexit.register(_flush_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
