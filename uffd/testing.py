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
from contextlib import ExitStack, closing
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
    short, and bits that are wrong. It pickles if the other one does, and runs in the host as any provider.

    errors, delays, short_fills, bit_flips: how likely each is for one call, 0 to 1. An error is an OSError (EIO)
    before anything is filled; a delay lasts delay_s; a short fill leaves the end of `out` alone, and says so or returns
    None; a flip changes one bit, and nothing tells.

    Which call has which fault follows from `seed`, the offset and how often that offset was read since open(), and
    from nothing else: not from threads, nor from time. A host that is started again begins to count again.
    """

    def __init__(self, provider: Any, *, seed: int, errors: float = 0.0, delays: float = 0.0, delay_s: float = 0.05,
                 short_fills: float = 0.0, bit_flips: float = 0.0) -> None:
        chances = {"errors": errors, "delays": delays, "short_fills": short_fills, "bit_flips": bit_flips}
        for name, chance in chances.items():
            if not 0 <= chance <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {chance}")
        if not delay_s >= 0:
            raise ValueError(f"delay_s must be >= 0, not {delay_s}")
        inner = hosted.as_provider(provider)
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
        self._counts: dict[int, Iterator[int]] = {}

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
    pickle_bytes: what travels to a host."""

    nbytes: int | None
    concurrency: int
    reads: int
    read_bytes: int
    offered_bytes: int
    pickle_bytes: int


def check_provider(provider: Any, nbytes: int | None = None, *, reads: int = 48, seed: int = 0,
                   other_process: bool = True) -> Report:
    """Does what an engine may do with a provider in Python; AssertionError that says what, where it does not hold.

    It must pickle (else TypeError or ValueError, as from Region), and load in another process (other_process: one is
    started for that). Two instances are opened at once, and one goes on after the other was closed. Each fill writes
    all of `out`, gives the same bytes for the same range whatever the offset and the size of the request, from
    `concurrency` threads as from one, by read_many as by read, lets go of `out`, and returns None or the number of
    bytes. What it offers is what it reads.

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
    with ExitStack() as opened:
        first = opened.enter_context(closing(_Checked(data)))
        second = opened.enter_context(closing(_Checked(data)))
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
        first.close()
        for request in requests[-1:]:
            second.expect(*request)
        offered = first.check_offers(second, size) + second.check_offers(second, size)
    return Report(first.nbytes, first.concurrency, first.reads + second.reads, first.read_bytes + second.read_bytes,
                  offered, len(data))


Request = tuple[int, np.ndarray]                 # an offset, and the bytes that belong there


class _Checked:
    """One instance of the provider, opened; what it does is looked at."""

    block_bytes = 65536                          # it is the provider's `_session`, too: it takes down what is offered

    def __init__(self, data: bytes) -> None:
        self.provider: Provider = pickle.loads(hosted.unpacked(data)[1])
        self.provider._session = self
        self.offers: list[tuple[int, bytes]] = []
        self.reads = self.read_bytes = 0
        self.is_open = False
        self._count_lock = threading.Lock()
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
            try:
                buffer.close()
            except BufferError:
                raise AssertionError(f"{what} returned, and `out` is still in use: a reference to it is kept (or lies "
                                     "in a cycle). It is dead after the call: copy what you want to keep") from None
        return filled

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


def _check_answer(what: str, answer: Any, nbytes: int) -> None:
    if answer is None:
        return
    if isinstance(answer, bool) or not isinstance(answer, (int, np.integer)):
        raise AssertionError(f"{what} returned {type(answer).__name__}: it must fill `out` in place (out[:] = ...) and "
                             "return None, or the number of bytes it filled")
    if answer != nbytes:
        raise AssertionError(f"{what} returned {answer}: it must fill all {nbytes} bytes, or raise")


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


def _in_threads(checked: _Checked, requests: Sequence[Request]) -> None:
    count = min(checked.concurrency, _THREADS_MAX)
    if count < 2:
        return
    failures: list[BaseException] = []
    begin = threading.Barrier(count)

    def run(mine: Sequence[Request]) -> None:
        try:
            begin.wait()
            for request in mine:
                checked.expect(*request)
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


def _compare(what: str, offset: int, found: np.ndarray, expected: np.ndarray) -> None:
    differ = np.flatnonzero(found != expected)
    if len(differ):
        at = differ[0]
        raise AssertionError(f"{what} gave other bytes than read() in blocks did, {len(differ)} of them, the first at "
                             f"offset {offset + at}: {found[at]}, not {expected[at]}")
