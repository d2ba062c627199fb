"""For the tests of programs that write providers in Python: a check that a provider keeps to its contract, and a
provider that fails on purpose."""

from __future__ import annotations

import errno
import itertools
import mmap
import operator
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from .providers import hosted
from .providers.hosted import Provider

__all__ = ["FaultyProvider", "Report", "check_provider"]

_PAGE = mmap.PAGESIZE
_WINDOW_BYTES = 2 << 20                          # what is looked at, at the beginning, in the middle and at the end
_OFFERS_BYTES_MAX = 8 << 20
_THREADS_MAX = 8
_LOAD_TIMEOUT_S = 60.0


class FaultyProvider(Provider):
    """Another provider (an instance, a function f(offset, out), or bytes) with faults: errors, delays, fills that stop
    short, and bits that are wrong. It pickles if the other one does, runs in the host as any provider, and can write if
    the other one can.

    errors, delays, short_fills, bit_flips: how likely each is for one call, 0 to 1. An error is an OSError (EIO)
    before anything is filled; a delay lasts delay_s; a short fill leaves the end of `out` alone, and says so or returns
    None; a flip changes one bit, and nothing tells. write_errors, short_writes, flush_errors: the same for calls that
    store. Of the errors of write, one half comes before anything is stored, the other when all of it is; a short write
    stores the beginning and says so. Delays are in all of them.

    Which call has which fault follows from `seed`, the offset and how often that offset was read (or written) since
    open(), and from nothing else: not from threads, nor from time. A host that is started again begins to count again.
    """

    def __new__(cls, provider: Any = None, **options: Any) -> FaultyProvider:
        """With a `write` if the other provider has one: by that a region knows who can."""
        writes = isinstance(provider, Provider) and hosted.writes(provider)
        return super().__new__(_FaultyWriter if writes and cls is FaultyProvider else cls)

    def __init__(self, provider: Any, *, seed: int, errors: float = 0.0, delays: float = 0.0, delay_s: float = 0.05,
                 short_fills: float = 0.0, bit_flips: float = 0.0, write_errors: float = 0.0,
                 short_writes: float = 0.0, flush_errors: float = 0.0) -> None:
        chances = {"errors": errors, "delays": delays, "short_fills": short_fills, "bit_flips": bit_flips,
                   "write_errors": write_errors, "short_writes": short_writes, "flush_errors": flush_errors}
        for name, chance in chances.items():
            if not 0 <= chance <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {chance}")
        if not delay_s >= 0:
            raise ValueError(f"delay_s must be >= 0, not {delay_s}")
        inner = hosted.as_provider(provider)
        if (write_errors or short_writes or flush_errors) and (inner is None or not hosted.writes(inner)):
            raise ValueError("faults of writes need a provider that can write")
        self.inner = _Bytes(provider) if inner is None else inner
        self.nbytes, self.concurrency = self.inner.nbytes, self.inner.concurrency
        self.seed = operator.index(seed)
        self.delay_s = delay_s
        self.chances = chances

    @property
    def title(self) -> str:
        return f"FaultyProvider({hosted.title(self.inner)})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_session", "_counts")}

    def open(self) -> None:
        self.inner._session = self._session
        self.inner.open()
        self.nbytes, self.concurrency = self.inner.nbytes, self.inner.concurrency
        self._counts: dict[Any, Iterator[int]] = {}

    def read(self, offset: int, out: np.ndarray) -> int | None:
        count = next(self._counts.setdefault(offset, itertools.count()))
        dice = random.Random(f"{self.seed} {offset} {count}")
        error, delay, short, flip = (dice.random() < self.chances[name]
                                     for name in ("errors", "delays", "short_fills", "bit_flips"))
        if delay:
            time.sleep(self.delay_s)
        if error:
            raise OSError(errno.EIO, f"FaultyProvider: an error on purpose, offset {offset}, try {count}")
        if short and len(out):
            return self._fill_short(offset, out, dice)
        answer: Any = self.inner.read(offset, out)
        if flip and len(out):
            at = dice.randrange(8 * len(out))
            out[at // 8] ^= 1 << at % 8
        return answer

    def _fill_short(self, offset: int, out: np.ndarray, dice: random.Random) -> int | None:
        whole = np.empty(len(out), np.uint8)
        self.inner.read(offset, whole)
        cut = dice.randrange(len(out))
        tail = len(out) % _PAGE
        seen = len(out) - (tail if tail < 8 else 0)          # an end of fewer bytes may be right by chance
        if dice.random() < 0.5 and seen:
            cut = min(cut, seen - 1) // _PAGE * _PAGE
            out[:cut] = whole[:cut]
            return None
        out[:cut] = whole[:cut]
        return cut

    def close(self) -> None:
        self.inner.close()


class _FaultyWriter(FaultyProvider):
    """One over a provider that can write."""

    def write(self, offset: int, data: np.ndarray) -> int | None:
        count, dice = self._begin("write", offset)
        error, short = (dice.random() < self.chances[name] for name in ("write_errors", "short_writes"))
        late = dice.random() < 0.5
        if short and len(data):
            cut = dice.randrange(len(data))
            if cut // _PAGE:
                self.inner.write(offset, data[:cut // _PAGE * _PAGE])
            return cut // _PAGE * _PAGE
        answer: Any = self.inner.write(offset, data) if late or not error else None
        if error:
            raise OSError(errno.EIO, f"FaultyProvider: an error on purpose, write at {offset}, try {count}")
        return answer

    def flush(self) -> None:
        count, dice = self._begin("flush", 0)
        if dice.random() < self.chances["flush_errors"]:
            raise OSError(errno.EIO, f"FaultyProvider: an error on purpose, flush {count}")
        self.inner.flush()

    def _begin(self, what: str, offset: int) -> tuple[int, random.Random]:
        count = next(self._counts.setdefault((what, offset), itertools.count()))
        dice = random.Random(f"{self.seed} {what} {offset} {count}")
        if dice.random() < self.chances["delays"]:
            time.sleep(self.delay_s)
        return count, dice


class _Bytes(Provider):
    """Bytes that travel with the provider."""

    concurrency = _THREADS_MAX

    def __init__(self, data: Any) -> None:
        self.data = bytes(memoryview(data).cast("B"))
        self.nbytes: int | None = len(self.data)
        self.title = f"{self.nbytes} bytes"

    def read(self, offset: int, out: np.ndarray) -> None:
        out[:] = np.frombuffer(self.data, np.uint8, len(out), offset)


@dataclass(frozen=True)
class Report:
    """What check_provider found and did. nbytes: of the provider, None if it has no size. reads: calls of read and
    read_many. read_bytes: what they filled. offered_bytes: what the provider offered of its own accord and was right.
    pickle_bytes: what travels to a host. writes, written_bytes: calls of write and write_many, and what they stored."""

    nbytes: int | None
    concurrency: int
    reads: int
    read_bytes: int
    offered_bytes: int
    pickle_bytes: int
    writes: int = 0
    written_bytes: int = 0


def check_provider(provider: Any, nbytes: int | None = None, *, reads: int = 48, seed: int = 0,
                   other_process: bool = True) -> Report:
    """Does what an engine may do with a provider in Python; AssertionError that says what, where it does not hold.

    It must pickle (else TypeError or ValueError, as from Region), and load in another process (other_process: one is
    started for that). Two instances are opened at once, and one goes on after the other was closed. Each fill writes
    all of `out`, gives the same bytes for the same range whatever the offset and the size of the request, from
    `concurrency` threads as from one, by read_many as by read, lets go of `out`, and returns None or the number of
    bytes. What it offers is what it reads.

    One that can write is written to: give it a store of its own (the bytes that were there are put back at the end, as
    far as that can be done). Of such a provider only one instance is used at a time. What was written, of all sizes,
    from `concurrency` threads and by write_many, the end of the provider included, is read back, and nothing beside
    it has changed; `data` is let go of; flush() returns None. And what was acknowledged and not flushed is read by an
    instance that is opened next, while this one is left as it is: so it is when a host is killed.

    provider: an instance or a function f(offset, out). nbytes: for one that has no size of its own (1 MiB if None).
    reads: random requests per check; of a large provider the first, the middle and the last 2 MiB are looked at. The
    provider's methods run in this process; nothing here needs a userfaultfd. Blocks until done.
    """
    served = hosted.as_provider(provider)
    if served is None:
        raise TypeError(f"{type(provider).__name__} is no provider in Python: give an instance of a class derived from "
                        "uffd.Provider, or a function f(offset, out)")
    data = hosted.pickled(served)
    if other_process and sys.platform.startswith("linux"):
        _check_that_it_loads(data)
    dice = random.Random(seed)
    writes = hosted.writes(served)
    with ExitStack() as opened:
        first = opened.enter_context(closing(_Checked(data)))
        second = first if writes else opened.enter_context(closing(_Checked(data)))
        size = first.nbytes if first.nbytes is not None else 1 << 20 if nbytes is None else operator.index(nbytes)
        expected = {start: _reference(first, start, stop) for start, stop in _windows(size, dice)}
        requests = [request for start, whole in expected.items()
                    for request in _random_requests(start, whole, reads, dice)]
        for request in requests:
            first.expect(*request)
        _in_threads(first, requests)
        _by_read_many(first, requests, dice)
        for request in requests[:1]:
            second.expect(*request)
        if writes:
            offered = first.check_offers(first, size)
            second = opened.enter_context(closing(_Checked(data, opened=False)))
            with _put_back(data, expected):
                _check_writes(first, second, expected, reads, dice)
        else:
            first.close()
            for request in requests[-1:]:
                second.expect(*request)
            offered = first.check_offers(second, size) + second.check_offers(second, size)
    return Report(first.nbytes, first.concurrency, first.reads + second.reads, first.read_bytes + second.read_bytes,
                  offered, len(data), first.writes + second.writes, first.written_bytes + second.written_bytes)


Request = tuple[int, np.ndarray]                 # an offset, and the bytes that belong there


class _Checked:
    """One instance of the provider, opened; what it does is looked at."""

    block_bytes = 65536                          # it is the provider's `_session`, too: it takes down what is offered

    def __init__(self, data: bytes, *, opened: bool = True) -> None:
        self.provider: Provider = pickle.loads(hosted.unpacked(data)[1])
        self.provider._session = self
        self.offers: list[tuple[int, bytes]] = []
        self.reads = self.read_bytes = self.writes = self.written_bytes = 0
        self.is_open = False
        self._count_lock = threading.Lock()
        if opened:
            self.open()

    def open(self) -> None:
        self._call("open()", self.provider.open)
        self.is_open = True
        try:
            self.nbytes = None if self.provider.nbytes is None else operator.index(self.provider.nbytes)
            self.concurrency = operator.index(self.provider.concurrency)
        except TypeError:
            self.nbytes, self.concurrency = -1, 0
        if self.concurrency < 1 or (self.nbytes or 0) < 0:
            raise AssertionError("nbytes must be None or an int >= 0, and concurrency an int >= 1, not "
                                 f"{self.provider.nbytes!r} and {self.provider.concurrency!r}")

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._call("close()", self.provider.close)

    @staticmethod
    def _call(what: str, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except Exception as error:
            raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error

    def fill(self, ranges: Sequence[tuple[int, int]], preset: int, many: bool = False) -> list[np.ndarray]:
        """The bytes that the provider writes for ranges of (offset, nbytes), into buffers that hold something else."""
        method = "read_many" if many else "read"
        what = f"{method}(" + ", ".join(f"offset {offset}, {nbytes} bytes" for offset, nbytes in ranges) + ")"
        buffers = [mmap.mmap(-1, nbytes) for _, nbytes in ranges]
        outs = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
        for out in outs:
            out[:] = _preset(len(out), preset)
        if many:
            requests = [(offset, out) for (offset, _), out in zip(ranges, outs, strict=True)]
            answer = self._call(what, self.provider.read_many, requests)
            requests.clear()
        else:
            answer = self._call(what, self.provider.read, ranges[0][0], outs[0])
        filled = [out.copy() for out in outs]
        total = sum(nbytes for _, nbytes in ranges)
        _check_answer(what, answer, total)
        with self._count_lock:
            self.reads += 1
            self.read_bytes += total
        del answer
        outs.clear()
        del out
        for buffer in buffers:
            _let_go(what, "out", buffer)
        return filled

    def store(self, requests: Sequence[Request], many: bool = False) -> None:
        """Has the provider store bytes, from buffers that it can't change and must not keep."""
        method = "write_many" if many else "write"
        what = f"{method}(" + ", ".join(f"offset {offset}, {len(data)} bytes" for offset, data in requests) + ")"
        buffers = [mmap.mmap(-1, len(data)) for _, data in requests]
        given = []
        for buffer, (offset, data) in zip(buffers, requests, strict=True):
            buffer[:] = data.tobytes()
            given.append((offset, np.frombuffer(memoryview(buffer).toreadonly(), np.uint8)))
        if many:
            answer = self._call(what, self.provider.write_many, given)
            given.clear()
        else:
            answer = self._call(what, self.provider.write, *given.pop())
        total = sum(len(data) for _, data in requests)
        _check_answer(what, answer, total, "store all of `data`")
        with self._count_lock:
            self.writes += 1
            self.written_bytes += total
        del answer
        for buffer in buffers:
            _let_go(what, "data", buffer)

    def flush(self) -> None:
        answer = self._call("flush()", self.provider.flush)
        if answer is not None:
            raise AssertionError(f"flush() returned {type(answer).__name__}: it must return None when all is durable, "
                                 "or raise")

    def expect(self, offset: int, expected: np.ndarray) -> None:
        filled = self.fill([(offset, len(expected))], preset=1)[0]
        _compare(f"read(offset {offset}, {len(expected)} bytes)", offset, filled, expected)

    # ---- as the engine's end ----

    def offer(self, offset: int, data: Any) -> bool:
        if sum(len(known) for _, known in self.offers) < _OFFERS_BYTES_MAX:
            raw = data.tobytes() if isinstance(data, np.ndarray) else bytes(data)
            self.offers.append((operator.index(offset), raw))
        return False

    def offer_rows(self, offset: int, step: int, rows: np.ndarray) -> bool:
        for at, row in enumerate(rows):
            self.offer(offset + at * step, row)
        return False

    def check_offers(self, reader: _Checked, size: int) -> int:
        """Offered bytes are those that read() gives; how many were compared."""
        offers, self.offers = self.offers, []
        for offset, raw in offers:
            if offset < 0 or offset + len(raw) > size:
                raise AssertionError(f"offered {len(raw)} bytes at {offset}, which ends beyond the {size} bytes of the "
                                     "provider")
            start = offset // _PAGE * _PAGE
            stop = min(size, -(-(offset + len(raw)) // _PAGE) * _PAGE)
            if raw:
                expected = reader.fill([(start, stop - start)], preset=0)[0][offset - start:][:len(raw)]
                _compare(f"offer(offset {offset}, {len(raw)} bytes)", offset, np.frombuffer(raw, np.uint8), expected)
        return sum(len(raw) for _, raw in offers)


def _check_that_it_loads(data: bytes) -> None:
    from ._hosting import command

    argv, environment = command()
    environ = dict(entry.split(b"=", 1) for entry in environment)
    done = subprocess.run([*argv[:-2], b"--load"], input=data, env=environ, capture_output=True, check=False,
                          timeout=_LOAD_TIMEOUT_S)
    if done.returncode:
        raise AssertionError(done.stderr.decode("utf-8", "replace").strip() or
                             f"a provider host that was to load the provider ended with status {done.returncode}")


def _check_answer(what: str, answer: Any, nbytes: int, must: str = "fill `out` in place (out[:] = ...)") -> None:
    if answer is None:
        return
    if isinstance(answer, bool) or not isinstance(answer, (int, np.integer)):
        raise AssertionError(f"{what} returned {type(answer).__name__}: it must {must} and return None, or the number "
                             f"of bytes it {'filled' if must.startswith('fill') else 'stored'}")
    if answer != nbytes:
        raise AssertionError(f"{what} returned {answer}: it must {must.partition(' ')[0]} all {nbytes} bytes, or raise")


def _let_go(what: str, name: str, buffer: mmap.mmap) -> None:
    try:
        buffer.close()
    except BufferError:
        raise AssertionError(f"{what} returned, and `{name}` is still in use: a reference to it is kept (or lies in a "
                             "cycle). It is dead after the call: copy what you want to keep") from None


def _preset(nbytes: int, which: int) -> np.ndarray:
    """Two contents that differ in each byte, so that a byte which follows the preset was not written."""
    one = np.arange(nbytes, dtype=np.uint32).view(np.uint8)[::4] ^ 0x5A
    return ~one if which else one


def _windows(size: int, dice: random.Random) -> list[tuple[int, int]]:
    """Parts of the provider to look at: page-aligned beginnings, each ending on a page or with the provider."""
    if size <= 3 * _WINDOW_BYTES:
        return [(0, size)] if size else []
    last = (size - 1) // _PAGE * _PAGE - _WINDOW_BYTES + _PAGE
    middle = dice.randrange(_WINDOW_BYTES // _PAGE, last // _PAGE - _WINDOW_BYTES // _PAGE + 1) * _PAGE
    return [(0, _WINDOW_BYTES), (middle, middle + _WINDOW_BYTES), (last, size)]


def _reference(checked: _Checked, start: int, stop: int) -> np.ndarray:
    """The window's bytes, read block by block; that each was written, and the second time the same."""
    whole = np.empty(stop - start, np.uint8)
    for offset in range(start, stop, checked.block_bytes):
        nbytes = min(checked.block_bytes, stop - offset)
        once, twice = (checked.fill([(offset, nbytes)], preset)[0] for preset in (0, 1))
        differ = np.flatnonzero(once != twice)
        if len(differ):
            at = differ[0]
            what = f"read(offset {offset}, {nbytes} bytes)"
            if any(np.array_equal(filled[differ], _preset(nbytes, preset)[differ])
                   for preset, filled in enumerate((once, twice))):
                raise AssertionError(f"{what} did not write byte {at} of `out` ({len(differ)} bytes in all): it must "
                                     "fill all of it, or raise")
            raise AssertionError(f"{what} gave other bytes the second time, from byte {at} on ({once[at]}, then "
                                 f"{twice[at]}): the same range must always be the same bytes")
        whole[offset - start:offset - start + nbytes] = once
    return whole


def _random_requests(start: int, whole: np.ndarray, reads: int, dice: random.Random) -> Iterator[Request]:
    """Ranges as an engine asks for them: from a page on, to a page or to the end of the provider."""
    pages = -(-len(whole) // _PAGE)
    sizes = (1, 1, 2, 3, 16, 17, 128, pages)
    for number in range(reads):
        size = min(pages, dice.choice(sizes))
        first = pages - size if number == 0 else dice.randrange(pages - size + 1)     # the first ends with the window
        yield start + first * _PAGE, whole[first * _PAGE:(first + size) * _PAGE]


def _check_writes(first: _Checked, second: _Checked, original: dict[int, np.ndarray], writes: int,
                  dice: random.Random) -> None:
    """`first` writes all over the windows, and flushes. It writes again, and is left alone; `second` goes on."""
    windows = {start: whole.copy() for start, whole in original.items()}
    for flushed in (True, False):
        for start, whole in windows.items():        # some of it last of all, whose neighbours stay as they are
            requests = [(offset, _others(len(old), dice)) for offset, old in
                        _random_requests(start, whole, writes, dice)]
            for offset, data in requests:
                whole[offset - start:offset - start + len(data)] = data
                first.store([(offset, data)])
                filled = first.fill([(offset, len(data))], preset=0)[0]
                _compare(f"read(offset {offset}, {len(data)} bytes) after a write there", offset, filled, data,
                         "than were written")
            pages = range(0, len(whole), _PAGE)
            apart = [(start + at, _others(min(_PAGE, len(whole) - at), dice))
                     for at in sorted(dice.sample(pages, min(64, -(-len(pages) // 2))))]
            for offset, data in apart:
                whole[offset - start:offset - start + len(data)] = data
            _store_in_threads(first, apart)
        _expect_windows(first, windows, "after the writes")
        if flushed:
            first.flush()
            _expect_windows(first, windows, "after a flush")
    second.open()
    _expect_windows(second, windows, "in an instance opened after another had acknowledged writes, not flushed")
    second.flush()
    for start, whole in original.items():
        for at in range(0, len(whole), second.block_bytes):
            second.store([(start + at, whole[at:at + second.block_bytes])])
    second.flush()
    _expect_windows(second, original, "after the last flush")


def _others(nbytes: int, dice: random.Random) -> np.ndarray:
    return np.frombuffer(dice.randbytes(nbytes), np.uint8)


def _expect_windows(checked: _Checked, windows: dict[int, np.ndarray], when: str) -> None:
    for start, whole in windows.items():
        for at in range(0, len(whole), checked.block_bytes):
            expected = whole[at:at + checked.block_bytes]
            filled = checked.fill([(start + at, len(expected))], preset=1)[0]
            _compare(f"{when}, read(offset {start + at}, {len(expected)} bytes)", start + at, filled, expected,
                     "than were written")


@contextmanager
def _put_back(data: bytes, windows: dict[int, np.ndarray]) -> Iterator[None]:
    """After a check that failed in the middle: an instance of its own puts back what was there, if it can."""
    try:
        yield
    except BaseException:
        with suppress(Exception), closing(_Checked(data)) as last:
            for start, whole in windows.items():
                for at in range(0, len(whole), last.block_bytes):
                    last.store([(start + at, whole[at:at + last.block_bytes])])
            last.flush()
        raise


def _store_in_threads(checked: _Checked, requests: Sequence[Request]) -> None:
    """Requests that do not overlap, from several threads at once, then some of them together."""
    if checked.concurrency > 1:
        _by_threads(checked, requests, lambda request: checked.store([request]))
    elif not hosted.overrides(checked.provider, "write_many"):
        for request in requests:
            checked.store([request])
    if hosted.overrides(checked.provider, "write_many"):
        for at in range(0, len(requests), 8):
            checked.store(requests[at:at + 8], many=True)


def _in_threads(checked: _Checked, requests: Sequence[Request]) -> None:
    if checked.concurrency > 1:
        _by_threads(checked, requests, lambda request: checked.expect(*request))


def _by_threads(checked: _Checked, requests: Sequence[Request], what: Callable[[Request], None]) -> None:
    count = min(checked.concurrency, _THREADS_MAX)
    failures: list[BaseException] = []
    begin = threading.Barrier(count)

    def run(mine: Sequence[Request]) -> None:
        try:
            begin.wait()
            for request in mine:
                what(request)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(requests[at::count],), daemon=True) for at in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise AssertionError(f"with {count} threads at once (concurrency is {checked.concurrency}): {failures[0]}") \
            from failures[0]


def _by_read_many(checked: _Checked, requests: Sequence[Request], dice: random.Random) -> None:
    """Neighbours and others, none twice, sorted by offset."""
    if not hosted.overrides(checked.provider, "read_many"):
        return
    left = list(requests)
    while left:
        chosen: dict[int, np.ndarray] = dict(left.pop() for _ in range(min(len(left), dice.randrange(1, 9))))
        for offset, expected in sorted(chosen.items()):      # halves of one are neighbours
            half = len(expected) // 2 // _PAGE * _PAGE
            if half:
                chosen[offset], chosen[offset + half] = expected[:half], expected[half:]
        together = sorted(chosen.items())
        filled = checked.fill([(offset, len(expected)) for offset, expected in together], preset=0, many=True)
        for (offset, expected), found in zip(together, filled, strict=True):
            _compare(f"read_many, of its {len(together)} requests (offset {offset}, {len(expected)} bytes)", offset,
                     found, expected)


def _compare(what: str, offset: int, found: np.ndarray, expected: np.ndarray,
             than: str = "than read() in blocks did") -> None:
    differ = np.flatnonzero(found != expected)
    if len(differ):
        at = differ[0]
        raise AssertionError(f"{what} gave other bytes {than}, {len(differ)} of them, the first at offset "
                             f"{offset + at}: {found[at]}, not {expected[at]}")
