"""Providers in Python that write: requests to store and to flush, from the engine's channel to the provider and back.

Write-back itself (which blocks, when) is not here: what is driven is host_store and host_sync, by _core._host_store."""

import errno
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import uffd
from support.fakehost import BLOCK_BYTES, FLUSH, WRITE, FakeEngine, Failed
from support.hosted import BLOCK, Pattern, fill_pattern, lines
from support.hosted_writers import BadWriter, Buffered, KeepsData, Store, StoresMany, WaitsToStore
from support.pattern import pattern
from uffd import _core

pytestmark = pytest.mark.skipif(_core.mode()[0] == "none", reason="no userfaultfd: nothing is written through a host")


def store(region, offset, data):
    return _core._host_store(region, offset, bytes(data))


def flush(region):
    return _core._host_sync(region)


def stored(path, nbytes):
    with open(path, "rb") as file:
        return np.frombuffer(file.read(nbytes), np.uint8)


def words(log):
    return [line.split()[0] for line in lines(log)]


def wait_until(condition, what, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "store")


# ---- from end to end


def test_round_trip(make, path, tmp_path):
    """Goal: bytes of all sizes that are written are where they belong, the odd end included, and are read from there.
    Method: a page, a block, 512 KiB, the last 777 bytes, in an order of their own; then what a touch reads."""
    size, log = 20 * BLOCK + 777, str(tmp_path / "log")
    region = make(size, Store(path, size, log))
    right = np.zeros(size, np.uint8)
    pieces = [(20 * BLOCK, 777), (0, BLOCK), (8 * BLOCK, 8 * BLOCK), (5 * BLOCK, 4096)]
    for number, (offset, nbytes) in enumerate(pieces):
        right[offset:offset + nbytes] = pattern(offset + number, nbytes)
        assert store(region, offset, right[offset:offset + nbytes]) == (0, 1, None)
    assert flush(region) == (0, 1, None)
    assert words(log) == ["open", "write", "write", "write", "write", "flush"]
    found = np.zeros(size, np.uint8)
    raw = stored(path, size + 1)
    found[:len(raw)] = raw
    assert np.array_equal(found, right)
    array = region.array()
    assert np.array_equal(array, right)
    del array


def test_large_blocks(make, path):
    """Goal: one block of 16 MiB, the whole page buffer, is one write."""
    size = 16 << 20
    region = make(size, Store(path, size), block_bytes=size)
    data = pattern(3, size)
    assert store(region, 0, data)[0] == 0
    assert np.array_equal(stored(path, size), data)


def test_reads_and_writes_go_on_together(make, path):
    """Goal: with several threads in the provider, writes and touches of different blocks do not disturb each other.
    Method: four threads write the even blocks, twice with other bytes, while this one touches the odd ones."""
    blocks = 64
    with open(path, "wb") as file:
        file.write(pattern(0, blocks * BLOCK))
    region = make(blocks * BLOCK, Store(path, blocks * BLOCK, concurrency=4), readahead_bytes=0)
    array = region.array()
    def twice(b):
        return [store(region, b * BLOCK, pattern(b + number, BLOCK)) for number in (1, 2)]

    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(twice, range(0, blocks, 2))
        for b in range(1, blocks, 2):
            assert np.array_equal(array[b * BLOCK:(b + 1) * BLOCK], pattern(b * BLOCK, BLOCK))
        assert list(answers) == [[(0, 1, None)] * 2] * (blocks // 2)
    for b in range(0, blocks, 2):
        assert np.array_equal(array[b * BLOCK:(b + 1) * BLOCK], pattern(b + 2, BLOCK))
    del array


@pytest.mark.parametrize(("how", "number", "text"), [
    ("write_raises", errno.EIO, "KeyError: 'no room here'"),
    ("write_raises_errno", errno.ENOSPC, "OSError: [Errno 28] the disk is full"),
    ("write_is_short", errno.EIO, "short write: write() says that it stored 65535 of the 65536 bytes of `data`"),
    ("write_is_long", errno.EIO, "wrong size: write() says that it stored 65537 bytes, and `data` has 65536"),
    ("write_returns_true", errno.EIO, "wrong type: write() returned bool. It must store all of `data`"),
    ("write_changes", errno.EIO, "ValueError: assignment destination is read-only"),
    ("write_changes_the_buffer", errno.EIO, "TypeError: cannot modify read-only memory"),
    ("flush_raises_errno", errno.EIO, "OSError: [Errno 5] the tape is torn"),
    ("flush_returns", errno.EIO, "wrong type: flush() returned bool"),
], ids=lambda value: value if isinstance(value, str) and " " not in value else "")
def test_failures_have_their_own_words(make, path, how, number, text):
    """Goal: what a provider raises or returns has errno and text told after all retries; others go on."""
    region = make(4 * BLOCK, BadWriter(how, path, 4 * BLOCK), retries=2, mode="c")
    found, tries, told = store(region, BLOCK, bytes(BLOCK)) if how.startswith("write") else flush(region)
    assert (found, tries) == (number, 3) and text in told
    assert "_host.py" not in told
    assert store(region, 0, bytes(BLOCK)) == (0, 1, None)


@pytest.mark.parametrize("how", ["write_raises", "write_dies", "flush_raises_errno", "flush_dies"])
def test_what_fails_is_asked_again(make, path, tmp_path, how):
    """Goal: a write or flush that failed, or whose host died with it, is given again with the same bytes."""
    log = str(tmp_path / "log")
    region = make(4 * BLOCK, BadWriter(how, path, 4 * BLOCK, log, at_most=2), retries=3, mode="c")
    data = pattern(9, BLOCK)
    assert store(region, BLOCK, data)[:2] == (0, 3 if how.startswith("write") else 1)
    assert flush(region)[:2] == (0, 1 if how.startswith("write") else 3)
    assert np.array_equal(stored(path, 2 * BLOCK)[BLOCK:], data)
    assert words(log).count("open") == (3 if how.endswith("dies") else 1)


@pytest.mark.parametrize("how", ["write_dies", "flush_dies"])
def test_a_host_that_dies_each_time(make, path, how):
    """Goal: it ends after the retries, and says that the connection was lost."""
    region = make(4 * BLOCK, BadWriter(how, path, 4 * BLOCK), retries=1, mode="c")
    found, tries, _ = store(region, BLOCK, bytes(BLOCK)) if how == "write_dies" else flush(region)
    assert (found, tries) == (errno.ECONNRESET, 2)


@pytest.mark.parametrize("how", ["write_hangs", "flush_hangs"])
def test_time_out(make, engine, path, tmp_path, how):
    """Goal: what hangs ends within the region's time; its host is another one afterwards, and works."""
    make(4 * BLOCK, Store(path, 4 * BLOCK))          # its host is started: that is no part of half a second
    region = make(4 * BLOCK, BadWriter(how, path, 4 * BLOCK, at_most=1), timeout_s=1, mode="c")
    before = engine._threads.host_pids()
    begin = time.monotonic()
    found, tries, _ = store(region, BLOCK, bytes(BLOCK)) if how == "write_hangs" else flush(region)
    assert (found, tries) == (errno.ETIMEDOUT, 1)
    assert time.monotonic() - begin < 10
    while (again := store(region, BLOCK, pattern(1, BLOCK)))[0] == errno.ETIMEDOUT and time.monotonic() < begin + 20:
        pass  # a new host may take longer than a region's second to start on a busy machine
    assert again == (0, 1, None) and flush(region) == (0, 1, None)
    assert engine._threads.host_pids() != before
    assert np.array_equal(stored(path, 2 * BLOCK)[BLOCK:], pattern(1, BLOCK))


def test_killed_host_loses_no_acknowledged_write(make, engine, path):
    """Goal: hosts that are killed again and again under writes: each that was acknowledged is in the store, whole.
    Method: two threads write numbered contents, one kills; then the store is compared with the last acknowledged."""
    blocks = 16
    region = make(blocks * BLOCK, Store(path, blocks * BLOCK, concurrency=2), retries=20)
    last, stop = {}, threading.Event()

    def write(first):
        number = 0
        while not stop.is_set():
            for b in range(first, blocks, 2):
                number += 1
                found, _, text = store(region, b * BLOCK, pattern(number + b, BLOCK))
                assert found == 0, text
                last[b] = number + b

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, first) for first in (0, 1)]
        try:
            for _ in range(8):
                wait_until(engine._threads.host_pids, "no host")
                for pid in engine._threads.host_pids():
                    with suppress(ProcessLookupError):  # the last one killed may still be in the list
                        os.kill(pid, signal.SIGKILL)
                count = len(last)
                wait_until(lambda count=count: len(last) > min(count, blocks - 1), "no progress")
        finally:
            stop.set()
        for writer in writers:
            writer.result(60)
    assert flush(region)[0] == 0
    raw = stored(path, blocks * BLOCK)
    for b in range(blocks):
        assert np.array_equal(raw[b * BLOCK:(b + 1) * BLOCK], pattern(last[b], BLOCK)), b


def test_kept_data_is_a_copy(make, path, capfd):
    """Goal: a provider that keeps `data` has what was given to it, though the buffer is used again; it is told."""
    region = make(8 * BLOCK, KeepsData(path, 8 * BLOCK))
    for b in range(8):
        assert store(region, b * BLOCK, pattern(b, BLOCK))[0] == 0
    os.truncate(path, 0)
    assert flush(region) == (0, 1, None)
    raw = stored(path, 8 * BLOCK)
    for b in range(8):
        assert np.array_equal(raw[b * BLOCK:(b + 1) * BLOCK], pattern(b, BLOCK))
    assert capfd.readouterr().err.count("kept `data`") == 1


def test_neighbours_come_together(make, path, tmp_path):
    """Goal: writes that wait are given together to a provider that takes them, sorted; each is acknowledged.
    Method: the first stops in the provider until the others are posted."""
    log = str(tmp_path / "log")
    region = make(8 * BLOCK, StoresMany(path, 8 * BLOCK, log))
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(store, region, 0, pattern(0, BLOCK))]
        wait_until(lambda: "write" in words(log), "no write")
        answers += [pool.submit(store, region, b * BLOCK, pattern(b, BLOCK)) for b in (5, 2, 4)]
        time.sleep(0.5)
        open(f"{path}.open", "w").close()
        assert [answer.result(20) for answer in answers] == [(0, 1, None)] * 4
    assert lines(log)[2:] == [f"many {2 * BLOCK} {4 * BLOCK} {5 * BLOCK}"]
    raw = stored(path, 6 * BLOCK)
    for b in (0, 2, 4, 5):
        assert np.array_equal(raw[b * BLOCK:(b + 1) * BLOCK], pattern(b, BLOCK))


def test_two_hosts_read_what_was_written(path):
    """Goal: what an instance has acknowledged is read by whoever reads, also with two hosts, and one flush is for all.
    Method: an instance that keeps acknowledged bytes to itself until it is flushed; regions enough for both hosts."""
    with uffd.Engine(hosts=2) as engine:
        regions = [uffd.Region(16 * BLOCK, Buffered(f"{path}{n}", 16 * BLOCK), engine=engine, readahead_bytes=0)
                   for n in range(4)]
        for region in regions:
            for b in range(16):
                assert store(region, b * BLOCK, pattern(b, BLOCK))[0] == 0
            array = region.array()
            for b in range(16):
                assert np.array_equal(array[b * BLOCK:(b + 1) * BLOCK], pattern(b, BLOCK)), b
            del array
            assert flush(region)[0] == 0
        assert len(engine._threads.host_pids()) == 2
        for n in range(4):
            raw = stored(f"{path}{n}", 16 * BLOCK)
            assert all(np.array_equal(raw[b * BLOCK:(b + 1) * BLOCK], pattern(b, BLOCK)) for b in range(16))


def test_writes_leave_requests_to_touches(make, path):
    """Goal: writes that wait in the provider do not use up the host: another region is touched meanwhile."""
    region = make(64 * BLOCK, WaitsToStore(path, 64 * BLOCK, concurrency=4))
    other = make(4 * BLOCK, fill_pattern).array()
    with ThreadPoolExecutor(40) as pool:
        answers = [pool.submit(store, region, b * BLOCK, bytes(BLOCK)) for b in range(40)]
        time.sleep(0.3)
        begin = time.monotonic()
        assert np.array_equal(other, pattern(0, 4 * BLOCK))
        assert time.monotonic() - begin < 10 and not any(answer.done() for answer in answers)
        open(f"{path}.open", "w").close()
        assert all(answer.result(20) == (0, 1, None) for answer in answers)
    del other


def test_the_engine_knows_who_writes(engine, path):
    """Goal: open_session tells whether the class overrides write (or write_many)."""
    from uffd import _hosting

    class OnlyMany(Store):
        write = uffd.Provider.write

        def write_many(self, requests):
            for offset, data in requests:
                self.put(offset, data)

    for provider, expected in ((Store(path, BLOCK), True), (OnlyMany(path, BLOCK), True), (Pattern(BLOCK), False)):
        filler, nbytes, writes = _hosting.begin(engine, provider, name="r", block_bytes=BLOCK, retries=0, timeout_s=20)
        engine._threads.end_session(filler)
        assert (nbytes, writes) == (BLOCK, expected)


def test_write_many_alone_is_enough(make, path):
    """Goal: a provider with write_many and no write takes single writes, too."""
    class OnlyMany(Store):
        write = uffd.Provider.write

        def write_many(self, requests):
            for offset, data in requests:
                self.put(offset, data)

    region = make(BLOCK, OnlyMany(path, BLOCK))
    assert store(region, 0, pattern(0, BLOCK)) == (0, 1, None)
    assert np.array_equal(stored(path, BLOCK), pattern(0, BLOCK))


def test_a_provider_that_can_not_write(make):
    """Goal: a write that should never have been asked for fails with a reason."""
    found, _, text = store(make(BLOCK, Pattern(BLOCK), retries=0), 0, bytes(BLOCK))
    assert found == errno.EIO and "can't write: it has no write(offset, data)" in text


@pytest.mark.parametrize("name", ["write", "write_many", "flush"])
def test_async_methods_are_refused(name):
    """Goal: a coroutine that nobody awaits acknowledges nothing."""
    async def later(self, *arguments):
        pass

    with pytest.raises(TypeError, match="async def"):
        uffd.Region(BLOCK, type("Later", (Store,), {name: later})("x"))


# ---- the host's Python alone


def test_the_hosts_python(tmp_path):
    """Goal: OPEN tells who writes, together or alone; a write opens by itself; a failed batch fails each of it."""
    path, log = str(tmp_path / "store"), str(tmp_path / "log")
    with FakeEngine() as engine:
        assert engine.open(engine.session(Store(path, BLOCK_BYTES)))[3:] == (True, False)
        session = engine.session(StoresMany(path, None, log))
        first = engine.post(session, 0, BLOCK_BYTES, WRITE, bytes(pattern(0, BLOCK_BYTES)))
        assert engine.wait("answer", -1, "opened", session)[0].write_many
        wait_until(lambda: "write" in words(log), "no write")
        open(f"{path}.fail", "w").close()
        rest = [engine.post(session, b * BLOCK_BYTES, BLOCK_BYTES, WRITE, bytes(BLOCK_BYTES)) for b in (2, 1)]
        last = engine.post(session, 0, 0, FLUSH)
        engine.tell("close", 1 << 40)
        engine.wait("freed", 1 << 40)
        open(f"{path}.open", "w").close()
        engine.answer(first)
        for one in rest:
            with pytest.raises(Failed, match="ValueError: all of them"):
                engine.answer(one)
        engine.answer(last)
        assert words(log) == ["open", "write", "many", "flush"]
        assert np.array_equal(stored(path, BLOCK_BYTES), pattern(0, BLOCK_BYTES))
