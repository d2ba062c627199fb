"""Regions: memory that an engine serves, and what can be done with it."""

from __future__ import annotations

import errno
import operator
import os
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np

from . import _budget, _unwritten, keys
from ._coreless import core as _core
from .engine import Engine, default_engine, fills_whole, require_userfaultfd, shows_its_arguments
from .errors import BudgetError, DegradedWarning, ProviderError, RegionClosed, Unavailable
from .stats import Stats

__all__ = ["Prefetch", "Region", "chunks", "from_provider", "pinned", "populate", "prefetch", "region_of", "zeros"]

Where = None | tuple[int, int] | np.ndarray

_READAHEAD_BYTES = 8 << 20          # the largest window, unless the user says otherwise
_FOR_CHILDREN = " (with shared backing so is what was dirty at a fork: a forked child reads it there)"
_RESIDENT = tuple(_core.STATES[name] for name in (
    "clean", "unprotecting", "dirty", "pooled", "pooled_dirty", "evicting", "copying"))
_BUSY = tuple(_core.STATES[name] for name in ("filling", "evicting", "copying"))
_WRITTEN = tuple(_core.STATES[name] for name in ("unprotecting", "dirty", "pooled_dirty", "copying"))
_HOST_CAUSES = {
    errno.ETIMEDOUT: "read() did not return in time (timeout_s), and its provider host was stopped",
    errno.ECONNRESET: "its provider host died each time; what it printed, and the signal, stand on stderr",
    errno.ECHILD: "no provider host can be started; what it printed stands on stderr"}
_by_base: weakref.WeakValueDictionary[int, Region] = weakref.WeakValueDictionary()


@shows_its_arguments
class Region(_core.Region):
    """`nbytes` of memory whose blocks come from `provider` at the first touch.

    nbytes: None takes the provider's own size. provider: None is `Scratch()`. name: for messages. mode: "r" (read-only
    memory: a write is SIGSEGV, as with np.memmap), "r+" (what was written goes back to the provider, which must be able
    to write; the default then) or "c" (private: the provider is never changed; the default else).
    block_bytes: a power of two of pages, the unit of fill. backing: "anon", or "shared" (a memfd: providers write
    straight into the page, no copy). delivery: "thread" (a worker serves; system calls on missing pages work where the
    machine grants a full userfaultfd), "inline" (the touching thread serves itself in a SIGBUS handler: several times
    faster, but a system call on a missing page answers EFAULT or writes short, see `pinned`), or "auto": thread where
    the machine grants a full userfaultfd, else inline. readahead_bytes: the largest window of read-ahead, None adapts
    up to 8 MiB, 0 is off. on_error: at a touch whose fill fails for good, "poison" (SIGBUS, with a message on stderr)
    or "wait" (tried for ever, with a message). retries: after the first try of a block. timeout_s: for one fill, the
    retries included; a native fill that hangs by then loses its worker for ever, which is replaced; with inline
    delivery a hanging native fill can't be ended. volatile: what was written may be dropped instead of written back
    when memory is short, and is made again by the provider at the next touch: for what can be computed anew.

    Blocks leave memory when the engine's budget asks for it, the coldest first; where they go is the mode's matter, and
    they come back at the next touch. A touch that finds no room for timeout_s (all is pinned, or can't be written back)
    fails like one whose fill fails.

    A region is a context manager; leaving it flushes and closes it, now or when its last array dies. All methods are
    thread-safe, release the interpreter lock while they wait, and may be used while arrays are in use. In a forked
    child the region is a private copy that serves itself; with "shared" backing, what the parent had written by then is
    read from the parent's memory at the child's first touch.
    """

    nbytes: int
    _options: dict[str, Any]
    _memfd = -1                                  # the file of its pages, where another process made it

    def __new__(cls, *args: Any, engine: Engine | None = None, **options: Any) -> Region:
        if cls is Region and fills_whole(engine):
            from .eager import EagerRegion

            return super().__new__(EagerRegion)
        return super().__new__(cls)

    def __init__(self, nbytes: int | None, provider: Any = None, *, engine: Engine | None = None,
                 name: str | None = None, mode: str | None = None, block_bytes: int = 65536, backing: str = "anon",
                 delivery: str = "auto", readahead_bytes: int | None = None, volatile: bool = False,
                 on_error: str = "poison", retries: int = 3, timeout_s: float = 30.0) -> None:
        provider = _or_scratch(provider)
        served = provider if hasattr(provider, "_filler") else _hosted(provider)
        if not is_hosted(served) or nbytes is not None or served.nbytes is not None:
            nbytes = _checked_size(nbytes, served.nbytes, provider)
        _check_choice("mode", mode, (None, "r", "c", "r+"))
        _check_choice("backing", backing, ("anon", "shared"))
        _check_choice("delivery", delivery, ("auto", "thread", "inline"))
        _check_choice("on_error", on_error, ("poison", "wait"))
        block_bytes = _checked_block(block_bytes)
        retries = operator.index(retries)
        if retries < 0 or not timeout_s > 0:
            raise ValueError(f"retries must be >= 0 and timeout_s > 0, not {retries} and {timeout_s}")
        full = require_userfaultfd() == "full"
        engine = _checked_engine(engine)
        if not is_hosted(served):
            _refuse_own_memory(provider, engine)
        readahead_bytes = _READAHEAD_BYTES if readahead_bytes is None else operator.index(readahead_bytes)
        if readahead_bytes < 0:
            raise ValueError(f"readahead_bytes must be >= 0, not {readahead_bytes}")
        delivery = ("thread" if full else "inline") if delivery == "auto" else delivery
        _require_features(backing, delivery)
        self._pid = os.getpid()
        self.nbytes = cast(int, nbytes)          # of a hosted provider, None until that has said it
        self.block_bytes = block_bytes
        self.name = str(name) if name is not None else _title(provider)
        self.backing = backing
        self.delivery = delivery
        self.engine = engine
        self.provider = provider
        self._options = {"name": name, "mode": mode, "block_bytes": block_bytes, "backing": backing,
                         "delivery": delivery, "readahead_bytes": readahead_bytes, "volatile": volatile,
                         "on_error": on_error, "retries": retries, "timeout_s": timeout_s}
        _budget.refuse_small(engine, engine.budget_bytes, block_bytes)
        self._make(served)
        engine._regions.add(self)
        _by_base[self.address] = self

    def _make(self, served: Any) -> None:
        """Has the core make the memory, over the provider's Filler; whatever fails undoes all before it."""
        asked = self._options
        filler, writes = self._filler_of(served)
        try:
            self.mode = _checked_mode(asked["mode"], writes, asked["volatile"], self.provider)
            self._open(self.engine._threads, filler, self.nbytes, self.block_bytes, name=self.name,
                       provider=_title(self.provider), shared=self.backing == "shared",
                       is_inline=self.delivery == "inline", writable=self.mode != "r",
                       readahead_bytes=min(asked["readahead_bytes"], 1 << 40),
                       wait_for_ever=asked["on_error"] == "wait", retries=min(asked["retries"], 1 << 30),
                       timeout_ns=int(min(float(asked["timeout_s"]), 1e9) * 1e9), writes_back=self.mode == "r+",
                       volatile_pages=bool(asked["volatile"]), spill_folder=_spill_folder(), memfd=self._memfd)
        except BaseException:
            if is_hosted(served) and self.engine._threads is not None:
                self.engine._threads.end_session(filler)
            raise

    def _filler_of(self, served: Any) -> tuple[Any, bool]:
        """The core's side of the provider, and whether it can write; one in Python is opened in a host, which knows its
        size then."""
        if not is_hosted(served):
            filler = served._filler(self.engine)
            return filler, filler.writes
        from . import _hosting

        filler, nbytes, writes = _hosting.begin(self.engine, served, name=self.name, block_bytes=self.block_bytes,
                                                retries=self._options["retries"], timeout_s=self._options["timeout_s"])
        try:
            self.nbytes = _checked_size(self.nbytes, served.nbytes if nbytes is None else nbytes, self.provider)
        except BaseException:
            threads = self.engine._threads
            if threads is not None:
                threads.end_session(filler)
            raise
        return filler, writes

    # ---- arrays ----

    def array(self, dtype: Any = "u1", shape: Any = None, *, offset: int = 0,
              order: Literal["C", "F"] = "C") -> np.ndarray:
        """A plain ndarray over the region's memory; nothing is read. It keeps region and engine alive.

        shape None: one axis, as many whole items as fit behind `offset` (bytes). TypeError for object dtypes.
        """
        dtype = np.dtype(dtype)
        if dtype.hasobject:
            raise TypeError(f"dtype {dtype} holds Python objects, which can't live in externalized memory")
        self._check_open()
        offset = operator.index(offset)
        if not 0 <= offset <= self.nbytes:
            raise ValueError(f"offset {offset} is outside the region of {self.nbytes} bytes")
        if shape is None:
            shape = ((self.nbytes - offset) // dtype.itemsize if dtype.itemsize else 0,)
        shape = _checked_shape(shape)
        # frombuffer keeps a memoryview, whose release tells when the last array died; ndarray(buffer=) would not
        flat = np.frombuffer(cast(Any, self), np.uint8)
        return np.ndarray(shape, dtype, buffer=flat, offset=offset, order=order)

    # ---- bringing blocks in ----

    def populate(self, where: Where = None, *, timeout_s: float | None = None) -> None:
        """Has all blocks of `where` resident; blocks until they are. Poisoned blocks are tried again (repair).

        where: None (all), (start, stop) in bytes, or a view; widened to blocks. ProviderError for the first block that
        can't be filled; BudgetError for more than the budget has room for; TimeoutError when timeout_s is over first.
        Ctrl-C interrupts it. Afterwards the blocks may leave memory again, see `pinned`.
        """
        self._populate(self._runs(where), timeout_s)

    def prefetch(self, where: Where = None) -> Prefetch:
        """Has the blocks of `where` filled in the background, behind all demand; returns at once."""
        return self._prefetch(self._runs(where))

    @contextmanager
    def pinned(self, where: Where = None) -> Iterator[Region]:
        """A context in which `where` is resident and stays so: any system call on it works, in every mode, and a device
        may have it. BudgetError where the budget has no room for it.

        Where the kernel's own accesses to missing or protected pages are not served (inline delivery, user mode), its
        blocks count as written from here on, unless `where` is a read-only view.
        """
        with self._pin(self._runs(where), not isinstance(where, np.ndarray) or where.flags.writeable):
            yield self

    @contextmanager
    def _pin(self, runs: np.ndarray, writable: bool) -> Iterator[None]:
        with self._kept(runs) as kept:
            self._bring_in(kept, None)
            if writable and self.mode != "r" and (self.delivery == "inline" or require_userfaultfd() != "full"):
                self._make_writable(kept)
            yield

    @contextmanager
    def _kept(self, runs: np.ndarray) -> Iterator[np.ndarray]:
        """A context in which no block of runs that is in memory leaves it. BudgetError if that is more than there is
        room for."""
        runs = np.ascontiguousarray(runs, np.int64)
        if len(runs):
            lacks = _core.pin(self, runs)
            if lacks:
                self._refuse_pins(runs, lacks)
        try:
            yield runs
        finally:
            if len(runs):
                _core.unpin(self, runs)

    def _refuse_pins(self, runs: np.ndarray, lacks: int) -> None:
        limit, _, pinned, least = _core.budget(self)
        nbytes = int((runs[:, 1] - runs[:, 0]).sum()) * self.block_bytes
        raise BudgetError(f"region {self.name!r}: {nbytes} bytes ({_budget.size(nbytes)}) can't be in memory at once: "
                          f"the budget is {limit}, {pinned} are pinned, {least - pinned} are needed for fills, and "
                          f"{lacks} more would be needed; take less at a time (uffd.chunks), or a larger budget_bytes")

    def _runs(self, where: Where) -> np.ndarray:
        self._check_open()
        return keys.byte_run(where, self.address, self.nbytes, self.block_bytes)

    def _prefetch(self, runs: np.ndarray) -> Prefetch:
        self._check_open()
        runs = np.ascontiguousarray(runs, np.int64)
        return Prefetch(self, runs, self._post(runs, _core.JOB_PREFETCH) if len(runs) else None)

    def _populate(self, runs: np.ndarray, timeout_s: float | None) -> None:
        with self._kept(runs) as kept:           # what it has brought stays until it has brought all
            self._bring_in(kept, timeout_s)

    def _bring_in(self, runs: np.ndarray, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while len(runs):
            self._check_open()
            job = self._post(runs, _core.JOB_POPULATE)
            try:
                if not job.wait(_left_ns(deadline)):
                    raise TimeoutError(errno.ETIMEDOUT, f"region {self.name!r}: not populated within {timeout_s} s")
            finally:
                job.cancel()
            if job.error is not None:
                raise self._error(*job.error)
            runs = self._still_absent(runs, deadline)

    def _still_absent(self, runs: np.ndarray, deadline: float | None) -> np.ndarray:
        """Waits for blocks that somebody else is filling; what is left of the runs, from the first absent block on."""
        while True:
            self._check_open()
            found = self._absent(runs)
            if found is None:
                return runs[:0]
            block, state = found
            if state == _core.STATES["poisoned"]:
                number, tries, dead = self._poison_of(block)
                if dead:                         # a hung fill may still write there: it can't be repaired
                    raise self._error(number, block, tries)
            if state not in _BUSY:
                runs = runs[runs[:, 1] > block].copy()
                runs[0, 0] = max(runs[0, 0], block)
                return runs
            left_ns = _left_ns(deadline)
            if left_ns == 0:
                raise TimeoutError(errno.ETIMEDOUT, f"region {self.name!r}: block {block} is still being filled")
            self._wait_block(block, min(10**8, 10**8 if left_ns is None else left_ns))

    def _error(self, number: int, block: int, tries: int) -> ProviderError:
        offset = block * self.block_bytes
        nbytes = min(self.block_bytes, self.nbytes - offset)
        text = None if self.closed else self._text_of(block)
        why = getattr(self.provider, "causes", {}).get(number) or os.strerror(number)
        if text:
            why = text.strip().splitlines()[-1]
        elif number in _HOST_CAUSES and is_hosted(_served(self.provider)):
            why = _HOST_CAUSES[number]
        message = (f"region {self.name!r}: block at offset {offset} ({nbytes} bytes) could not be filled from "
                   f"{_title(self.provider)} after {tries} tries: {why}")
        return ProviderError(number, message, region=self.name, offset=offset, nbytes=nbytes, tries=tries,
                             provider_traceback=text)

    # ---- out of memory, and back to the store ----

    def evict(self, where: Where = None) -> int:
        """Bytes that left memory: the blocks of `where` that are not pinned, after what was written to them was written
        back. Blocks until then, and up to 0.1 s more for what can't leave at once; what is being filled stays, and
        read-ahead that was asked for before may bring blocks back. ProviderError as `flush`, for what could not be
        written: it stays."""
        runs = np.ascontiguousarray(self._runs(where), np.int64)
        if not len(runs):
            return 0
        if self.mode != "r" and not self._options["volatile"]:
            self._write_back(runs, None)
        return _core.evict(self, runs)

    def discard(self, where: Where = None) -> None:
        """Drops the blocks of `where`, and what was written to them and not written back: the next touch has them as
        the provider does. Blocks while one is busy. ValueError for a block that is pinned or (shared
        backing) was dirty when the program forked, for a child reads it there; those before it are gone."""
        for start, end in np.asarray(self._runs(where), np.int64).tolist():
            at = start
            while at < end:
                self._check_open()
                at = _core.discard(self, at, end)
                if at < end and _core.is_pinned(self, at):
                    raise ValueError(f"region {self.name!r}: the block at offset {at * self.block_bytes} is pinned, "
                                     "and can't be discarded" + _FOR_CHILDREN * (self.backing == "shared"))

    def flush(self, timeout_s: float | None = None) -> None:
        """Writes back all that was written, and has the provider make it durable; blocks until it is.

        Regions whose mode is not "r+" have nothing to write back. ProviderError for what could not be written: it stays
        in memory, dirty, and is tried again (`failed` has [(offset, nbytes, errno), ...]); one that is a TimeoutError,
        too, when timeout_s is over first, or when a native store does not answer for the region's timeout_s (a write
        that hangs can't be ended: its block is written again only after it has come back). Ctrl-C interrupts it. What
        other threads write meanwhile may or may not be in it.
        """
        self._check_open()
        self._flush(timeout_s)

    def _flush(self, timeout_s: float | None) -> None:
        if self.mode != "r+" or os.getpid() != self._pid:
            return
        blocks = -(-self.nbytes // self.block_bytes)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        runs = np.array([[0, blocks]], np.int64)
        self._write_back(runs, timeout_s)
        answer, number = _core.sync(self, _left_ns(deadline))
        if answer:
            raise _unwritten.late(self, answer, runs.tolist(), timeout_s, "written, but not made durable")
        if number:
            raise _unwritten.sync_error(self, number)

    def _write_back(self, runs: np.ndarray, timeout_s: float | None) -> None:
        timeout_ns = None if timeout_s is None else max(0, int(timeout_s * 1e9))
        since = _core.write_failures(self)
        answer = _core.write_back(self, runs, timeout_ns)
        if answer:
            raise _unwritten.late(self, answer, runs.tolist(), timeout_s, "not written back")
        failed = [entry for first, end in runs.tolist() for entry in _core.write_errors(self, first, end, since)]
        if failed:
            raise _unwritten.write_error(self, failed, _title(
                self.provider) if self.mode == "r+" else f"a file in {os.fsdecode(_spill_folder())}")

    def _flush_at_exit(self) -> None:
        if not self.gone:                        # closed ones, too, that arrays still use
            self._flush(self._options["timeout_s"])

    # ---- what is there ----

    def resident(self) -> np.ndarray:
        """Which blocks are in memory: bool, one per block. A snapshot; touches no managed page."""
        return np.isin(self._state_array(), _RESIDENT)

    def dirty(self) -> np.ndarray:
        """Which blocks were written since they were filled or written back: bool, one per block; exact (kernel 5.7,
        "shared": 5.19)."""
        return np.isin(self._state_array(), _WRITTEN)

    def stats(self) -> Stats:
        """Counters and latencies since the region was made. Stops no worker, touches no managed page."""
        self._check_open()
        return Stats.of(self._counts())

    def _stats_or_none(self) -> Stats | None:
        try:
            return Stats.of(self._counts())
        except ValueError:
            return None                          # closed by another thread meanwhile: counted by the engine

    def _state_array(self) -> np.ndarray:
        self._check_open()
        return np.frombuffer(self._states(), np.uint8)

    # ---- life ----

    def close(self) -> None:
        """Flushes the region, takes it out of service and frees its memory; idempotent. BufferError while arrays of it
        live, ProviderError when it can't be flushed: it stays open then (`discard` what is to be given up).

        Waits at most a second for fills under way; a longer one keeps the region's memory until it ends.
        """
        if not self.closed and not self.exports:
            self.flush()
        self._close(10**9)

    def _check_open(self) -> None:
        if self.closed:
            raise RegionClosed(f"region {self.name!r} is closed")
        if _core.sigbus_check():
            warnings.warn("somebody installed a SIGBUS handler after uffd; uffd put its own back in front and passes "
                          "on what is not its own", DegradedWarning, stacklevel=3)

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if not self.closed:
                self.flush()
        finally:
            self._shut_when_unused()

    def __reduce__(self) -> Any:
        """The recipe: provider and options, never bytes, and never what was written. TypeError from the provider if
        it can't be had in another process. The engine is the default one there."""
        provider = self.provider
        if is_hosted(_served(provider)):
            from ._hosting import Portable

            provider = Portable(provider)
        return _remade, (self.nbytes, provider, self._options)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.nbytes} bytes from {_title(self.provider)}"
        return f"<uffd.Region {self.name!r}: {state}>"


class Prefetch:
    """Blocks on their way. Dropping it does not stop them; `cancel` does."""

    def __init__(self, region: Region, runs: np.ndarray, job: _core.Job | None) -> None:
        self._region = region
        self._runs = runs
        self._job = job

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until all is there, or was cancelled. ProviderError for the first block that failed (it is tried
        again at its touch); TimeoutError. Ctrl-C interrupts it."""
        if self._job is None:
            return
        if not self._job.wait(None if timeout_s is None else max(0, int(timeout_s * 1e9))):
            raise TimeoutError(errno.ETIMEDOUT, f"region {self._region.name!r}: not fetched within {timeout_s} s")
        if self._job.error is not None:
            raise self._region._error(*self._job.error)

    def done(self) -> bool:
        """Whether nothing more is under way: filled, failed or cancelled."""
        return self._job is None or self._job.done()

    def cancel(self) -> None:
        """What was not begun is left where it is; idempotent."""
        if self._job is not None:
            self._job.cancel()


# ---- by array ---------------------------------------------------------------------------------------------------


def region_of(array: Any) -> Region:
    """The region whose memory an array lies in, found by address: any view, whatever its `base`, also a torch tensor
    or anything else that numpy takes for an array. ValueError if it is not ours."""
    address = np.asarray(array).__array_interface__["data"][0]
    base = _core.base_at(address)
    region = _filled_whole_at(address) if base is None else _by_base.get(base)
    if region is None:
        raise ValueError("the array's memory is not in an open uffd region")
    return region


def _filled_whole_at(address: int) -> Region | None:
    from .eager import region_at

    return region_at(address)


def from_provider(provider: Any, shape: Any, dtype: Any, *, offset: int = 0, order: Literal["C", "F"] = "C",
                  **region_options: Any) -> np.ndarray:
    """An array of that shape whose bytes are the provider's from `offset` on; region_options go to Region."""
    dtype = np.dtype(dtype)
    if dtype.hasobject:
        raise TypeError(f"dtype {dtype} holds Python objects, which can't live in externalized memory")
    shape = _checked_shape(shape)
    nbytes = offset + dtype.itemsize * int(np.prod(shape, dtype=object))
    if nbytes == offset:
        return np.empty(shape, dtype, order)
    return Region(nbytes, provider, **region_options).array(dtype, shape, offset=offset, order=order)


def populate(array: np.ndarray, key: Any = ...) -> None:
    """Has the blocks resident that array[key] lies in; nothing is copied and nothing faults. As Region.populate."""
    region = region_of(array)
    region._populate(_key_runs(region, array, key), None)


def prefetch(array: np.ndarray, key: Any = ...) -> Prefetch:
    """Has the blocks filled in the background that array[key] lies in, key being whatever array[key] takes, integer
    and boolean arrays too; nothing is copied and nothing faults. As Region.prefetch."""
    region = region_of(array)
    return region._prefetch(_key_runs(region, array, key))


@contextmanager
def pinned(view: np.ndarray) -> Iterator[np.ndarray]:
    """A context in which `view` is resident and stays so: safe in any system call, in every mode. See Region.pinned."""
    region = region_of(view)
    with region._pin(_key_runs(region, view, ...), view.flags.writeable):
        yield view


def zeros(shape: Any, dtype: Any = float, *, order: Literal["C", "F"] = "C", **region_options: Any) -> np.ndarray:
    """An array of zeros that may be larger than memory: what was written and is cold goes to a file without a name
    (`providers.Scratch`), gone with the array. Nothing is stored before it is written. region_options go to Region."""
    return from_provider(region_options.pop("provider", None), shape, dtype, order=order, **region_options)


def chunks(array: np.ndarray, nbytes: int | None = None) -> Iterator[np.ndarray]:
    """The array in pieces along axis 0, each pinned while it is yielded, the next one prefetched meanwhile.

    nbytes: of a piece (at least one row), None: 64 MiB. A 0-d array comes as it is.
    """
    region = region_of(array)
    nbytes = 64 << 20 if nbytes is None else operator.index(nbytes)
    if nbytes < 1:
        raise ValueError(f"nbytes must be positive, not {nbytes}")
    if array.ndim == 0:
        with pinned(array):
            yield array
        return
    rows = max(1, nbytes // max(1, array.itemsize * int(np.prod(array.shape[1:], dtype=object))))
    ahead = None
    try:
        for start in range(0, len(array), rows):
            piece = array[start:start + rows]
            with pinned(piece):
                if start + rows < len(array):
                    ahead = region.prefetch(array[start + rows:start + 2 * rows])
                yield piece
    finally:
        if ahead is not None:
            ahead.cancel()


def _key_runs(region: Region, array: np.ndarray, key: Any) -> np.ndarray:
    region._check_open()
    return keys.block_runs(np.asarray(array), key, region.address, region.nbytes, region.block_bytes)


def _remade(nbytes: int, provider: Any, options: dict[str, Any]) -> Region:
    return Region(nbytes, provider, **options)


# ---- checks -----------------------------------------------------------------------------------------------------


def _or_scratch(provider: Any) -> Any:
    if provider is not None:
        return provider
    from .providers import Scratch

    return Scratch()


def _checked_mode(mode: str | None, writes: bool, volatile: bool, provider: Any) -> str:
    if mode == "r+" and not writes:
        raise ValueError(f"mode 'r+' needs a provider that can write, and {_title(provider)} can't; use 'c'")
    if volatile and mode == "r+":
        raise ValueError("volatile: what was written may be dropped, so there is no mode 'r+' of it; use 'c'")
    return mode or ("r+" if writes and not volatile else "c")


def _spill_folder() -> bytes:
    """Where private memory goes that is cold: TMPDIR, else /var/tmp, since /tmp may be memory itself."""
    return os.fsencode(os.environ.get("TMPDIR") or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir()))


def _title(provider: Any) -> str:
    return getattr(provider, "title", None) or getattr(provider, "__name__", None) or type(provider).__name__


def _check_choice(what: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def is_hosted(served: Any) -> bool:
    """Whether the provider runs in a provider host."""
    return not hasattr(served, "_filler")


def _hosted(provider: Any) -> Any:
    """The Provider that an object is or stands for. TypeError for what is none."""
    from .providers.hosted import as_provider

    served = as_provider(provider)
    if served is None:
        raise TypeError(f"{type(provider).__name__} is no provider: give one of uffd.providers, a subclass of "
                        "uffd.Provider, or a function f(offset, out)")
    return served


def _served(provider: Any) -> Any:
    return provider if hasattr(provider, "_filler") else _hosted(provider)


def _checked_size(nbytes: Any, size: int | None, provider: Any) -> int:
    """The region's size, of a provider that has `size` bytes (None: as many as one likes)."""
    if nbytes is None:
        if size is None:
            raise ValueError(f"{_title(provider)} has no size of its own: nbytes is needed")
        nbytes = size
    nbytes = operator.index(nbytes)
    if nbytes <= 0 or nbytes > 1 << 46:
        raise ValueError(f"nbytes must be 1 to 2**46, not {nbytes}")
    if size is not None and nbytes > size:
        raise ValueError(f"{_title(provider)} holds {size} bytes, fewer than the {nbytes} asked for")
    return nbytes


def _checked_shape(shape: Any) -> tuple[int, ...]:
    shape = tuple(operator.index(n) for n in (shape if np.iterable(shape) else (shape,)))
    if any(n < 0 for n in shape):
        raise ValueError(f"negative dimensions are not allowed: {shape}")
    return shape


def _checked_engine(engine: Engine | None) -> Engine:
    engine = default_engine() if engine is None else engine
    if not isinstance(engine, Engine):
        raise TypeError(f"engine must be a uffd.Engine, not {type(engine).__name__}")
    if engine.closed:
        raise ValueError("the engine is closed")
    return engine


def _checked_block(block_bytes: int) -> int:
    block_bytes = operator.index(block_bytes)
    page = _core.PAGE_BYTES
    if block_bytes < page or block_bytes & (block_bytes - 1) or block_bytes > _core.MAX_BLOCK:
        raise ValueError(f"block_bytes must be a power of two, {page} to {_core.MAX_BLOCK}, not {block_bytes}")
    return block_bytes


def _refuse_own_memory(provider: Any, engine: Engine) -> None:
    """Memory of a region of the same engine: its workers would wait for themselves."""
    span = provider._filler(engine).span
    if span is None:
        return
    for region in engine.regions:
        if region.address < span[1] and span[0] < region.address + region.nbytes:
            raise ValueError(f"the memory belongs to region {region.name!r} of the same engine; give one of them an "
                             "engine of its own")


def _require_features(backing: str, delivery: str) -> None:
    needs = ((backing == "shared", "MISSING_SHMEM", "4.11", "shared backing"),
             (delivery == "inline", "SIGBUS", "4.14", "inline delivery"))
    for wanted, feature, kernel, what in needs:
        if wanted and not _core.supports(feature):
            raise Unavailable(errno.ENOTSUP, f"{what} needs the userfaultfd feature {feature} (Linux {kernel}), which "
                              "this kernel lacks")


def _left_ns(deadline: float | None) -> int | None:
    return None if deadline is None else max(0, int((deadline - time.monotonic()) * 1e9))
