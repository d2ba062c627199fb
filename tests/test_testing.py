"""uffd.testing: the check that users run on their providers, and the provider that fails on purpose."""

import threading
import time

import numpy as np
import pytest
import uffd
from support.fakehost import BLOCK_BYTES, FakeEngine, Failed
from support.fakeproviders import Answers, OnlyHere, Scaled
from support.hosted import Pattern, fill_pattern
from support.pattern import pattern
from uffd.testing import FaultyProvider, check_provider

PAGE = uffd._core.PAGE_BYTES
SIZES = (0, 1, 7, PAGE, PAGE + 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 5, 5 << 20, (1 << 40) + 3)


def check(provider, nbytes=None, **options):
    """Without a second process, which takes most of the time."""
    return check_provider(provider, nbytes, **{"other_process": False, **options})


def refused(provider, words, nbytes=1 << 20):
    with pytest.raises(AssertionError, match=words):
        check(provider, nbytes)


# ---- the check: what is right


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_right_provider_passes(nbytes):
    """Goal: a provider that keeps to its contract passes at each size, and the report says what was done."""
    report = check(Pattern(nbytes))
    assert report.nbytes == nbytes and report.concurrency == 1 and report.pickle_bytes > 0
    assert (report.read_bytes >= 2 * min(nbytes, 6 << 20)) and (report.reads > 48 or not nbytes)


def test_what_travels_to_a_host_is_tried_there():
    """Goal: by default the provider is loaded in another process; one that can't be is refused with the reason."""
    check_provider(Pattern(BLOCK_BYTES))
    with pytest.raises(AssertionError, match="can't be unpickled in the provider host: ValueError: only here"):
        check_provider(OnlyHere())


class Everything(Pattern):
    """Two threads at once, several requests at once, offers."""

    def __init__(self, nbytes=3 << 20, **faults):
        super().__init__(nbytes, concurrency=4)
        self.faults = faults
        self.several = 0

    def open(self):
        self.inside, self.together, self.lock = 0, 0, threading.Lock()

    def read(self, offset, out):
        with self.lock:
            self.inside += 1
        if self.inside > 1 and "threads" in self.faults:
            out[:] = 0
        else:
            out[:] = pattern(offset, len(out))
        time.sleep(0)
        if offset == 0:
            self.offer(BLOCK_BYTES + 3, pattern(BLOCK_BYTES + self.faults.get("offers", 3), 1000))
        if "beyond" in self.faults:
            self.offer(self.nbytes - 5, b"123456")
        with self.lock:
            self.inside -= 1

    def read_many(self, requests):
        assert requests == sorted(requests, key=lambda request: request[0])
        for offset, out in requests:
            out[:] = pattern(offset + self.faults.get("many", 0), len(out))
        self.together = max(self.together, len(requests))
        if "keeps" in self.faults:
            self.kept = requests[0]


def test_all_that_a_provider_may_do_passes():
    """Goal: threads, read_many and offers are tried, and counted."""
    report = check(Everything())
    assert report.concurrency == 4 and report.offered_bytes >= 1000


class Stubborn(Pattern):
    """Its instances share what they should not."""

    shared = []

    def open(self):
        self.shared.append(1)

    def read(self, offset, out):
        assert self.shared, "closed by another one"
        out[:] = pattern(offset, len(out))

    def close(self):
        self.shared.clear()


class ByCall(Pattern):
    """The bytes of a block depend on how much is asked for."""

    def read(self, offset, out):
        out[:] = len(out) % 251


class Sometimes(Pattern):
    def read(self, offset, out):
        out[:] = pattern(offset, len(out))
        self.count = getattr(self, "count", 0) + 1
        out[5] = self.count


class Keeps(Pattern):
    def read(self, offset, out):
        out[:] = 1
        self.kept = out[3:]


class LeavesTheEnd(Pattern):
    def read(self, offset, out):
        out[:-1] = 1


class Claims(Pattern):
    def open(self):
        self.concurrency = "two"


class Unclosed(Pattern):
    def close(self):
        raise ValueError("stuck")


WRONG = [
    (LeavesTheEnd(), r"read\(offset 0, 65536 bytes\) did not write byte 65535 of `out` \(1 bytes in all\)"),
    (Sometimes(), "other bytes the second time, from byte 5 on"),
    (ByCall(), "gave other bytes than read"),
    (Keeps(), "`out` is still in use"),
    (Stubborn(), "closed by another one"),
    (Claims(), "concurrency an int >= 1"),
    (Unclosed(), r"close\(\) raised ValueError: stuck"),
    (Everything(threads=True), "with 4 threads at once"),
    (Everything(many=1), "read_many, of its"),
    (Everything(keeps=True), r"read_many\(.* is still in use"),
    (Everything(offers=4), r"offer\(offset 65539, 1000 bytes\) gave other bytes"),
    (Everything(beyond=True), "which ends beyond the 3145728 bytes"),
    (Answers("too_little"), "returned 100: it must fill all 65536 bytes"),
    (Answers("data"), r"returned bytes: it must fill `out` in place"),
    (Answers("true"), "returned bool"),
    (Answers("key_error"), "raised ValueError: outer"),
    (lambda offset, out: None, "did not write byte 0"),
]


@pytest.mark.parametrize(("provider", "words"), WRONG, ids=[words for _, words in WRONG])
def test_wrong_providers_are_found(provider, words):
    """Goal: each way not to keep to the contract is found, and told in words of its own."""
    pytest.importorskip("cloudpickle")
    refused(provider, words)


def test_what_is_no_provider():
    """Goal: native providers and other things are a TypeError."""
    with pytest.raises(TypeError, match="is no provider in Python"):
        check_provider(uffd.providers.Zero())


def test_the_check_leaves_nothing_running():
    """Goal: the provider's instances are closed, and no thread is left."""
    before = threading.active_count()
    check(Everything())
    assert threading.active_count() == before


# ---- the faulty provider


def outcomes(provider, calls):
    """For each call (an offset): its bytes, or the error."""
    provider.open()
    found = []
    for offset in calls:
        out = np.full(BLOCK_BYTES, 0x5A, np.uint8)
        try:
            found.append((provider.read(offset, out), out.tobytes()))
        except OSError as error:
            found.append(str(error))
    return found


CALLS = [offset * BLOCK_BYTES for offset in (0, 1, 2, 1, 0, 0, 3, 4, 5, 6, 7) * 4]
CHANCES = {"errors": 0.3, "short_fills": 0.3, "bit_flips": 0.3}


def test_faults_follow_from_seed_offset_and_try():
    """Goal: the same calls fail in the same way, whatever else is called between; another seed fails otherwise."""
    first = outcomes(FaultyProvider(fill_pattern, seed=5, **CHANCES), CALLS)
    assert first == outcomes(FaultyProvider(fill_pattern, seed=5, **CHANCES), CALLS)
    order = sorted(range(len(CALLS)), key=lambda at: CALLS[at])      # the tries of each offset stay in order
    other = outcomes(FaultyProvider(fill_pattern, seed=5, **CHANCES), [CALLS[at] for at in order])
    assert [first[at] for at in order] == other
    assert first != outcomes(FaultyProvider(fill_pattern, seed=6, **CHANCES), CALLS)


def test_open_begins_to_count_again():
    """Goal: an instance that was opened again, as by a host that was started again, does the same again."""
    provider = FaultyProvider(fill_pattern, seed=5, **CHANCES)
    assert outcomes(provider, CALLS) == outcomes(provider, CALLS)


@pytest.mark.parametrize("nbytes", [1, 7, 8, PAGE, PAGE + 3, BLOCK_BYTES])
def test_short_fills_are_short(nbytes):
    """Goal: a short fill leaves the end alone: it says so, or the last bytes of a page are as they were."""
    provider = FaultyProvider(bytes(BLOCK_BYTES), seed=1, short_fills=1.0)
    provider.open()
    kinds = set()
    for _ in range(50):
        out = np.full(nbytes, 0x5A, np.uint8)
        answer = provider.read(0, out)
        kinds.add(answer is None)
        unfilled = np.flatnonzero(out)
        assert len(unfilled) and np.array_equal(unfilled, np.arange(unfilled[0], nbytes))
        if answer is None:
            ends = [end for end in (*range(PAGE, nbytes, PAGE), nbytes) if end - (end - 1) // PAGE * PAGE >= 8]
            assert any(out[end - 8:end].all() for end in ends)
        else:
            assert answer == unfilled[0]
    assert kinds == ({False} if nbytes < 8 else {False, True})


def test_bit_flips_change_one_bit():
    """Goal: exactly one bit is wrong."""
    provider = FaultyProvider(fill_pattern, seed=1, bit_flips=1.0)
    (_, raw), = outcomes(provider, [0])
    assert np.unpackbits(np.frombuffer(raw, np.uint8) ^ pattern(0, BLOCK_BYTES)).sum() == 1


def test_delays(monkeypatch):
    """Goal: the chosen calls wait for delay_s, and are right."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    found = outcomes(FaultyProvider(fill_pattern, seed=1, delays=0.5, delay_s=3.5), CALLS)
    assert set(slept) == {3.5} and 0 < len(slept) < len(CALLS)
    assert found == outcomes(FaultyProvider(fill_pattern, seed=1), CALLS)


def test_chances_are_kept():
    """Goal: as many calls fail as were asked for, roughly."""
    found = outcomes(FaultyProvider(bytes(BLOCK_BYTES), seed=1, errors=0.25), [0] * 1000)
    assert 180 < sum(isinstance(one, str) for one in found) < 320


def test_what_it_wraps():
    """Goal: size, threads, offers and life are those of the provider inside; bytes and functions are taken."""
    inner = Everything()
    outer = FaultyProvider(inner, seed=1)
    assert (outer.nbytes, outer.concurrency) == (3 << 20, 4)
    assert check(outer).offered_bytes >= 1000
    data = np.arange(1000, dtype="<u4")
    assert FaultyProvider(data, seed=1).nbytes == 4000
    assert outcomes(FaultyProvider(data.tobytes() * 20, seed=1), [0])[0][1][:4000] == data.tobytes()


@pytest.mark.parametrize("options", [{"errors": 1.5}, {"delays": -1}, {"bit_flips": float("nan")}, {"delay_s": -1}],
                         ids=str)
def test_wrong_options_are_refused(options):
    """Goal: a chance that is none is a ValueError."""
    with pytest.raises(ValueError, match="must be"):
        FaultyProvider(b"abc", seed=1, **options)


@pytest.mark.parametrize("kind", ["errors", "short_fills", "bit_flips"])
def test_the_check_finds_each_fault(kind):
    """Goal: check_provider fails over a provider with any of the faults, and passes without."""
    check(FaultyProvider(Scaled(3), seed=1), 1 << 20)
    for seed in range(5):
        with pytest.raises(AssertionError):
            check(FaultyProvider(Scaled(3), seed=seed, **{kind: 0.2}), 1 << 20)


def test_it_runs_in_a_host():
    """Goal: it travels with what it wraps; its errors and short fills are told as any provider's, bytes are right or
    the request fails."""
    with FakeEngine() as engine:
        session = engine.session(FaultyProvider(fill_pattern, seed=3, errors=0.3, short_fills=0.3))
        engine.open(session)
        told = set()
        for at in range(60):
            try:
                assert np.array_equal(engine.read(session, at * BLOCK_BYTES), pattern(at * BLOCK_BYTES, BLOCK_BYTES))
                told.add("right")
            except Failed as error:
                told |= {words for words in ("an error on purpose", "short fill", "not filled whole")
                         if words in error.text}
        assert told == {"right", "an error on purpose", "short fill", "not filled whole"}
