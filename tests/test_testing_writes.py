"""uffd.testing on providers that write."""

import os
import threading

import numpy as np
import pytest
import uffd
from support.fakehost import BLOCK_BYTES, FakeEngine, Failed
from support.hosted_writers import Buffered, KeepsData, Store
from support.pattern import pattern
from uffd.testing import FaultyProvider, check_provider

PAGE = uffd._core.PAGE_BYTES
SIZES = (0, 1, PAGE, PAGE + 1, 3 * BLOCK_BYTES + 5, 7 << 20)


class Sloppy(Store):
    """Right but for what its `how` says."""

    def __init__(self, path, how="", nbytes=3 * BLOCK_BYTES + 5, concurrency=1):
        super().__init__(path, nbytes, concurrency=concurrency)
        self.how = how

    def open(self):
        super().open()
        self.inside, self.writes, self.lock = 0, 0, threading.Lock()

    def write(self, offset, data):
        with self.lock:
            self.inside += 1
            self.writes += 1
            crowded, number = self.inside > 1, self.writes
        try:
            return self.do(offset, data, crowded, number)
        finally:
            with self.lock:
                self.inside -= 1

    def do(self, offset, data, crowded, number):
        if self.how == "loses the last bytes" and len(data) % PAGE:
            data = data[:-1]
        elif self.how == "rounds up to pages" and len(data) < BLOCK_BYTES:
            data = np.resize(data, -(-len(data) // BLOCK_BYTES) * BLOCK_BYTES)
        elif self.how == "threads" and crowded:
            data = data[::-1].copy()
        elif self.how == "forgets" and number == 30:
            return None
        elif self.how == "raises":
            raise ValueError("no")
        os.pwrite(self.fd, data, offset)
        return {"short": len(data) // 2, "returns data": data}.get(self.how)

    def flush(self):
        return 5 if self.how == "answers flush" else super().flush()


class TakesMany(Sloppy):
    def write_many(self, requests):
        for offset, data in requests[self.how == "drops one" and len(requests) > 4:]:
            os.pwrite(self.fd, data, offset)


def check(provider, **options):
    return check_provider(provider, **{"other_process": False, "reads": 12, **options})


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "store"
    path.write_bytes(pattern(0, 3 * BLOCK_BYTES + 5))
    return str(path)


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_right_one_passes(path, nbytes):
    """Goal: one that keeps to its contract passes at each size, and has its bytes back afterwards."""
    with open(path, "wb") as file:
        file.write(pattern(1, nbytes))
    report = check(Store(path, nbytes, concurrency=2))
    assert report.nbytes == nbytes and report.written_bytes >= 3 * min(nbytes, 6 << 20)
    assert (report.writes > 24) == (nbytes > 0)
    with open(path, "rb") as file:
        assert file.read() == bytes(pattern(1, nbytes))


@pytest.mark.parametrize("provider", [TakesMany, Sloppy], ids=["many", "one"])
def test_threads_and_several_at_once_pass(path, provider):
    """Goal: what may be done in parallel, or together, passes."""
    assert check(provider(path, concurrency=4)).writes


def test_it_is_loaded_in_another_process(path):
    """Goal: the default does that, too."""
    check_provider(Store(path, 3 * BLOCK_BYTES + 5), reads=2)


def test_readers_are_not_written_to(path):
    """Goal: a provider without write has no write tried."""
    class Reader(Store):
        write = uffd.Provider.write

    assert check(Reader(path, BLOCK_BYTES)).writes == 0


WRONG = [
    (Sloppy, "loses the last bytes", "gave other bytes"),
    (Sloppy, "rounds up to pages", "gave other bytes"),
    (Sloppy, "forgets", "gave other bytes"),
    (Sloppy, "raises", r"write\(offset .* raised ValueError: no"),
    (Sloppy, "short", "it must store all"),
    (Sloppy, "returns data", "returned ndarray: it must store all of `data`"),
    (Sloppy, "answers flush", r"flush\(\) returned int: it must return None"),
    (TakesMany, "drops one", "gave other bytes than were written"),
]


@pytest.mark.parametrize(("kind", "how", "words"), WRONG, ids=[how for _, how, _ in WRONG])
def test_wrong_ones_are_found(path, kind, how, words):
    """Goal: each is found, told in words of its own, and the bytes are put back as far as it lets them."""
    with pytest.raises(AssertionError, match=words):
        check(kind(path, how))


def test_threads_that_disturb_each_other_are_found(path):
    """Goal: writes from `concurrency` threads are made, and what goes wrong between them is found."""
    class Slow(Sloppy):
        def do(self, *arguments):
            super().do(*arguments)
            threading.Event().wait(0.002)

    with pytest.raises(AssertionError, match="gave other bytes"):
        check(Slow(path, "threads", concurrency=4))


def test_a_buffer_of_its_own_is_found(path):
    """Goal: what is acknowledged and lies in the instance only is lost with its host: found."""
    with pytest.raises(AssertionError, match="in an instance opened after another had acknowledged writes"):
        check(Buffered(path, 3 * BLOCK_BYTES + 5))


def test_kept_data_is_found(path):
    """Goal: `data` that is kept is told."""
    with pytest.raises(AssertionError, match="`data` is still in use"):
        check(KeepsData(path, BLOCK_BYTES))


def test_bytes_are_put_back_after_a_failure(path):
    """Goal: a check that fails in the middle leaves the store as it was."""
    with pytest.raises(AssertionError):
        check(Sloppy(path, "answers flush"))
    with open(path, "rb") as file:
        assert file.read() == bytes(pattern(0, 3 * BLOCK_BYTES + 5))


# ---- faults


class Unaligned(Store):
    """For calls from here."""

    def put(self, offset, data):
        os.pwrite(self.fd, data, offset)


def answers(provider, calls):
    provider.open()
    found = []
    for offset in calls:
        try:
            found.append(provider.write(offset, pattern(offset, BLOCK_BYTES)))
        except OSError as error:
            found.append(str(error))
    provider.close()
    return found


CALLS = [b * BLOCK_BYTES for b in (0, 1, 2, 1, 0, 0) * 8]


def test_write_faults_follow_from_seed_offset_and_try(path):
    """Goal: the same calls fail in the same way, in another order between offsets, too; another seed, otherwise."""
    chances = {"write_errors": 0.3, "short_writes": 0.3}
    first = answers(FaultyProvider(Unaligned(path), seed=5, **chances), CALLS)
    order = sorted(range(len(CALLS)), key=lambda at: CALLS[at])
    assert [first[at] for at in order] == answers(FaultyProvider(Unaligned(path), seed=5, **chances),
                                                  [CALLS[at] for at in order])
    assert first != answers(FaultyProvider(Unaligned(path), seed=6, **chances), CALLS)
    kinds = {type(answer) for answer in first}
    assert kinds == {type(None), int, str} and all(answer < BLOCK_BYTES for answer in first if type(answer) is int)


def test_errors_come_before_and_after_the_bytes_are_stored(path):
    """Goal: a write that failed may have been done, or not: both happen."""
    seen = set()
    provider = FaultyProvider(Unaligned(path), seed=2, write_errors=1)
    provider.open()
    for number in range(20):
        os.truncate(path, 0)
        with pytest.raises(OSError, match="an error on purpose, write at 0"):
            provider.write(0, pattern(number, BLOCK_BYTES))
        seen.add(os.path.getsize(path))
    provider.close()
    assert seen == {0, BLOCK_BYTES}


@pytest.mark.parametrize("kind", ["write_errors", "short_writes", "flush_errors"])
def test_the_check_finds_each_fault(path, kind):
    """Goal: check_provider fails over each of them, and passes over none."""
    check(FaultyProvider(Store(path, BLOCK_BYTES), seed=1))
    for seed in range(3):
        with pytest.raises(AssertionError):
            check(FaultyProvider(Store(path, BLOCK_BYTES), seed=seed, **{kind: 0.9}))


def test_only_writers_have_faults_of_writes():
    """Goal: over bytes or a function they are refused, and such a provider has no write."""
    with pytest.raises(ValueError, match="need a provider that can write"):
        FaultyProvider(b"abc", seed=1, write_errors=0.5)
    assert not uffd.providers.hosted.writes(FaultyProvider(b"abc", seed=1))


def test_it_runs_in_a_host(path):
    """Goal: it pickles as what it is, and its faults are told as any provider's."""
    told = set()
    with FakeEngine() as engine:
        session = engine.session(FaultyProvider(Store(path), seed=3, write_errors=0.3, short_writes=0.3,
                                                flush_errors=0.5))
        assert engine.open(session).writes
        for b in range(60):
            for call in (lambda b=b: engine.write(session, b * BLOCK_BYTES, pattern(b, BLOCK_BYTES)),
                         lambda: engine.flush(session)):
                try:
                    call()
                    told.add("right")
                except Failed as error:
                    told |= {words for words in ("write at", "short write", "purpose, flush") if words in error.text}
    assert told == {"right", "write at", "short write", "purpose, flush"}
