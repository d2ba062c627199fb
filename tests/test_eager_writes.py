"""The fallback's regions that write back: what was written reaches the provider, once, and nothing else does."""

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uffd
from support import fallback
from support.native import compile_library
from support.pattern import pattern
from uffd import providers

TESTS = Path(__file__).resolve().parent
BLOCK = 65536
NBYTES = 20 * BLOCK + 777


@pytest.fixture(autouse=True)
def no_userfaultfd(monkeypatch):
    yield from fallback.ask_for_it(monkeypatch)


class Store(uffd.Provider):
    """Over an array that all copies of the instance share."""

    def __init__(self, nbytes=NBYTES, concurrency=1):
        self.held, self.calls, self.failures = pattern(0, nbytes).copy(), [], []
        self.nbytes, self.concurrency = nbytes, concurrency

    def open(self):
        self.calls.append("open")

    def read(self, offset, out):
        out[:] = self.held[offset:offset + len(out)]

    def write(self, offset, data):
        assert data.dtype == np.uint8
        assert not data.flags.writeable
        assert data.ctypes.data % 4096 == 0
        if self.failures:
            raise self.failures.pop()
        self.calls.append((offset // BLOCK, -(-len(data) // BLOCK)))
        self.held[offset:offset + len(data)] = data

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


class StoreMany(Store):
    def read_many(self, requests):
        for offset, out in requests:
            self.read(offset, out)

    def write_many(self, requests):
        self.calls.append(len(requests))
        for offset, data in requests:
            self.write(offset, data)


def file_of(folder, direct=False):
    path = folder / "file"
    path.write_bytes(pattern(0, NBYTES).tobytes())
    try:
        return path, providers.File(path, writable=True, direct=direct)
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")


def written_calls(provider):
    return [call for call in provider.calls if isinstance(call, tuple)]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come in 20 s"
        time.sleep(0.01)


# What reaches the provider


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_is_written_back(tmp_path, direct):
    """Goal: the bytes written reach the file, the rest of it stays, and its size; also at its ragged end."""
    path, provider = file_of(tmp_path, direct)
    expected = pattern(0, NBYTES).copy()
    with uffd.Region(None, provider) as region:
        assert region.mode == "r+"
        array = region.array()
        for where in (slice(0, 3), slice(5 * BLOCK - 1, 5 * BLOCK + 1), slice(NBYTES - 5, NBYTES)):
            array[where] = expected[where] = 200
        assert np.flatnonzero(region.dirty()).tolist() == [0, 4, 5, 20]
        region.flush()
        assert path.read_bytes() == expected.tobytes()
        assert not region.dirty().any()
        stats = region.stats()
        assert (stats.written_back, stats.bytes_written, stats.write_errors) == (4, 3 * BLOCK + 777, 0)
        assert stats.bytes_stored == stats.bytes_written
        del array
    assert path.read_bytes() == expected.tobytes()


NATIVE = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>
int take_out(void *held, uint64_t offset, void *block, size_t nbytes)
{
    memcpy(block, (char *)held + offset, nbytes);
    return 0;
}
int put_in(void *held, uint64_t offset, const void *block, size_t nbytes)
{
    memcpy((char *)held + offset, block, nbytes);
    return 0;
}
"""


def test_a_native_provider_is_written_back(tmp_path):
    (tmp_path / "store.c").write_text(NATIVE)
    library, held = ctypes.CDLL(str(compile_library(tmp_path / "store.c"))), np.zeros(NBYTES, np.uint8)
    provider = providers.Native(library.take_out, held, write=library.put_in)
    with uffd.Region(NBYTES, provider) as region:
        region.array()[BLOCK:BLOCK + 5] = 9
        region.evict()
        assert np.flatnonzero(held).tolist() == list(range(BLOCK, BLOCK + 5))


def test_a_provider_in_python_is_written_back():
    """Goal: only blocks that differ, neighbours in one call; a flush after them; the same bytes written again are no
    change; opened once, closed at the end."""
    provider = Store()
    with uffd.Region(None, provider) as region:
        array = region.array()
        array[3 * BLOCK:5 * BLOCK] += 1
        array[9 * BLOCK] += 1
        array[7 * BLOCK] = array[7 * BLOCK]
        region.flush()
        assert provider.calls == ["open", (3, 2), (9, 1), "flush"]
        np.testing.assert_array_equal(provider.held, array)
        array[9 * BLOCK] += 1
        array[9 * BLOCK] -= 1
        region.flush()
        assert provider.calls[4:] == ["flush"]
        array[2 * BLOCK] += 1
        array[11 * BLOCK] += 1
        assert region.evict((10 * BLOCK, 12 * BLOCK)) == 0
        assert provider.calls[5:] == [(11, 1)]
        del array
    assert provider.calls[6:] == [(2, 1), "flush", "close"]


def test_writes_go_together():
    provider = StoreMany()
    with uffd.Region(None, provider) as region:
        region.array()[::2 * BLOCK] += 1
    assert provider.calls[1] == 11
    assert (provider.held[::2 * BLOCK] == pattern(0, NBYTES)[::2 * BLOCK] + np.uint8(1)).all()


def test_modes_that_write_nothing_back(tmp_path):
    """Goal: a provider that can write is not written to in mode c, r, or volatile; r+ is refused where none can."""
    path, provider = file_of(tmp_path)
    before = path.read_bytes()
    for options in ({"mode": "c"}, {"mode": "r"}, {"volatile": True}):
        with uffd.Region(None, provider, **options) as region:
            if options.get("mode") != "r":
                region.array()[:] = 0
            region.flush()
            region.evict()
            assert region.mode == options.get("mode", "c")
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="no mode 'r\\+'"):
        uffd.Region(None, provider, mode="r+", volatile=True)
    with pytest.raises(ValueError, match="can't"):
        uffd.Region(None, providers.File(path), mode="r+")


def test_zeros_and_no_provider():
    array = uffd.zeros((100, 1000), "i4", order="F")
    assert array.flags.f_contiguous
    assert not array.any()
    array += 1
    region = uffd.region_of(array)
    assert region.mode == "c"
    region.discard()
    assert not array.any()


# Discarded


def test_discarded_blocks_are_read_again(tmp_path):
    """Goal: of the blocks named alone, whether written or not, in each mode that has writes."""
    for mode in ("c", "r+"):
        path, provider = file_of(tmp_path)
        with uffd.Region(None, provider, mode=mode) as region:
            array = region.array()
            array[:] = 7
            path.write_bytes(b"\x05" * NBYTES)
            region.discard((2 * BLOCK, 3 * BLOCK + 1))
            assert (array[2 * BLOCK:4 * BLOCK] == 5).all()
            assert (array[:2 * BLOCK] == 7).all()
            assert (array[4 * BLOCK:] == 7).all()
            if mode == "r+":
                assert np.flatnonzero(~region.dirty()).tolist() == [2, 3]
            region.discard()
            assert (array == 5).all()
            del array
        assert path.read_bytes() == b"\x05" * NBYTES


def test_pinned_blocks_are_not_discarded():
    with uffd.Region(NBYTES, providers.Zero()) as region:
        array = region.array()
        array[:] = 3
        with uffd.pinned(array[4 * BLOCK:5 * BLOCK]), pytest.raises(ValueError, match=f"offset {4 * BLOCK} is pinned"):
            region.discard()
        assert (array[:4 * BLOCK] == 0).all()
        assert (array[4 * BLOCK:] == 3).all()
        region.discard()
        assert not array.any()
        del array


def test_a_discard_that_fails_loses_nothing(tmp_path):
    path, provider = file_of(tmp_path)
    with uffd.Region(None, provider, mode="c", retries=0) as region:
        array = region.array()
        array[:] = 7
        os.truncate(path, 3 * BLOCK + 5)
        with pytest.raises(uffd.ProviderError) as info:
            region.discard((3 * BLOCK, 4 * BLOCK))
        assert (info.value.errno, info.value.offset) == (errno.ENODATA, 3 * BLOCK)
        assert (array == 7).all()
        del array


# What fails


def test_a_write_that_fails_is_told_and_tried_again():
    """Goal: which blocks, how often; they stay dirty, and the next flush has them; other blocks are written."""
    provider = Store()
    with uffd.Region(None, provider, retries=1) as region:
        array = region.array()
        array[:2 * BLOCK] += 1
        array[6 * BLOCK] += 1
        provider.failures[:] = [OSError(errno.ENOSPC, "the store is full")] * 2
        with pytest.raises(uffd.ProviderError, match="2 blocks could not be written.*the store is full") as info:
            region.flush()
        assert (info.value.errno, info.value.offset, info.value.tries) == (errno.ENOSPC, 0, 2)
        assert info.value.failed == [(0, BLOCK, errno.ENOSPC), (BLOCK, BLOCK, errno.ENOSPC)]
        assert "the store is full" in info.value.provider_traceback
        assert np.flatnonzero(region.dirty()).tolist() == [0, 1]
        assert region.stats().write_errors == 2
        region.flush()
        np.testing.assert_array_equal(provider.held, array)
        del array


def test_a_write_that_answers_wrongly():
    class Short(Store):
        def write(self, offset, data):
            super().write(offset, data)
            return len(data) - 1

    provider = Short()
    with pytest.raises(uffd.ProviderError, match=r"short write: write\(\) says that it stored"):
        with uffd.Region(None, provider, retries=0) as region:
            region.array()[0] += 1


def test_a_flush_that_fails():
    class Fails(Store):
        no_disk = [OSError(errno.EIO, "no disk")]

        def flush(self):
            super().flush()
            if self.no_disk:
                raise self.no_disk.pop()

    provider = Fails()
    with uffd.Region(None, provider, retries=0) as region:
        region.array()[0] += 1
        with pytest.raises(uffd.ProviderError, match="could not make durable what was written: .*no disk") as info:
            region.flush()
        assert "no disk" in info.value.provider_traceback
    assert provider.calls.count("flush") == 2


def test_a_failed_sync_is_not_forgotten(tmp_path, monkeypatch):
    """Goal: after a failed fdatasync, which the kernel tells of once, the same blocks are written again, whatever the
    file holds by then; before that no flush succeeds."""
    path, answers = tmp_path / "data", [OSError(errno.EIO, "no disk")]
    pattern(0, 4 * BLOCK).tofile(path)
    real = os.fdatasync

    def sync(fd):
        if answers:
            raise answers.pop()
        real(fd)

    monkeypatch.setattr(os, "fdatasync", sync)
    with uffd.Region(None, providers.File(path, writable=True), retries=2, block_bytes=BLOCK) as region:
        region.array()[BLOCK] = 7
        with pytest.raises(uffd.ProviderError, match="could not make durable"):
            region.flush()
        assert np.flatnonzero(region.dirty()).tolist() == [1]
        pattern(0, 4 * BLOCK).tofile(path)       # what the kernel could not write is gone
        region.flush()
        assert np.fromfile(path, "u1")[BLOCK] == 7 and not region.dirty().any()


def test_a_close_that_fails_leaves_it_open():
    provider = Store()
    region = uffd.Region(None, provider, retries=0)
    region.array()[0] += 1
    provider.failures[:] = [OSError(errno.EIO, "no")]
    with pytest.raises(uffd.ProviderError):
        region.close()
    assert not region.closed
    region.close()
    assert provider.held[0] == pattern(0, 1)[0] + 1
    assert provider.calls[-1] == "close"


def test_a_flush_has_its_time():
    class Slow(Store):
        def write(self, offset, data):
            time.sleep(0.2)
            super().write(offset, data)

    provider = Slow()
    with uffd.Region(None, provider) as region:
        region.array()[::2 * BLOCK] += 1
        with pytest.raises(TimeoutError, match="blocks are left"):
            region.flush(timeout_s=0.3)
        assert 0 < len(written_calls(provider)) < 11
    assert len(written_calls(provider)) == 11


# Life


def test_written_by_the_last_array():
    """Goal: what was written after the region was left, or dropped, is flushed when its last array dies; by another
    thread, and then the provider is closed."""
    for leave in (True, False):
        provider = Store()
        region = uffd.Region(None, provider)
        array = region.array()
        if leave:
            region.__exit__(None, None, None)
            assert region.closed
        del region
        array[4 * BLOCK] += 1
        del array
        wait_for(lambda provider=provider: provider.calls[-1] == "close")
        assert written_calls(provider) == [(4, 1)]
        assert provider.calls[-2] == "flush"


def test_a_failure_then_is_unraisable(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    provider = Store()
    array = uffd.Region(None, provider, name="late", retries=0).array()
    array[0] += 1
    provider.failures[:] = [OSError(errno.EIO, "gone")] * 2
    del array
    wait_for(lambda: told and provider.calls[-1] == "close")
    assert "late" in told[0].err_msg
    assert isinstance(told[0].exc_value, uffd.ProviderError)


def test_threads_write_while_it_is_flushed(tmp_path):
    """Goal: what was written before a flush began is in the store after it, whatever other threads write meanwhile."""
    path, provider = file_of(tmp_path)
    with uffd.Region(None, provider) as region:
        array, over = region.array(), threading.Event()

        def work():
            while not over.is_set():
                array[8 * BLOCK:] += 1

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for i in range(5):
                array[:BLOCK] = i
                region.flush()
                assert path.read_bytes()[:BLOCK] == bytes([i]) * BLOCK
        finally:
            over.set()
            thread.join()
        region.flush()
        assert path.read_bytes() == array.tobytes()
        del array


def test_a_forked_child_writes_nothing_back(tmp_path):
    """Goal: flush, evict, close and the end of a child leave the store alone; discard reads it with a source of its
    own; no call of it hangs."""
    provider = Store()
    with uffd.Region(None, provider) as region:
        array = region.array()
        array[0] += 1
        calls = len(provider.calls)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                array[BLOCK:] = 0
                region.flush()
                region.discard((BLOCK, 2 * BLOCK))
                good = (array[BLOCK:2 * BLOCK] == pattern(BLOCK, BLOCK)).all()
                del array
                region.close()
                status = 0 if good and "flush" not in provider.calls and not written_calls(provider) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(provider.calls) == calls
        del array
    assert written_calls(provider) == [(0, 1)]


AT_EXIT = """
import sys, uffd
uffd._core.mode = lambda: ("none", 1)
path, how = sys.argv[1:]
region = uffd.Region(None, uffd.providers.File(path, writable=True))
array = region.array()
array[:5] = 9
if how == "left":
    region.__exit__(None, None, None)
    array[3:8] = 9
elif how == "dropped":
    del region
"""


@pytest.mark.parametrize("how", ["open", "left", "dropped"])
def test_a_normal_exit_flushes(tmp_path, how):
    """Goal: regions that are open, or only kept by arrays, are written back at exit."""
    path, _ = file_of(tmp_path)
    env = {**os.environ, "UFFD_FALLBACK": "eager",
           "PYTHONPATH": os.pathsep.join([str(Path(uffd.__file__).parent.parent), str(TESTS)])}
    done = subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", AT_EXIT, path, how], env=env, timeout=60,
                          capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert path.read_bytes()[:8] == (b"\x09" * 8 if how == "left" else b"\x09" * 5 + pattern(5, 3).tobytes())


def test_engines_flush():
    """Goal: Engine.flush and leaving an engine write back all regions; the first failure is raised, after all."""
    stores = [Store(), Store()]
    with uffd.Engine() as engine:
        regions = [uffd.Region(None, store, engine=engine, retries=0) for store in stores]
        for region in regions:
            region.array()[3 * BLOCK] += 1
        stores[0].failures[:] = [OSError(errno.EIO, "no")]
        with pytest.raises(uffd.ProviderError, match="written back"):
            engine.flush()
        assert (3, 1) in stores[1].calls
    assert (3, 1) in stores[0].calls
    assert all(region.closed for region in regions)
