"""Read-ahead: it recognises sequential and strided touches and stops when it is wrong. Judged by counts, not time."""

import ctypes
import mmap
import os
import threading
import time

import numpy as np
import pytest
import uffd
from support.native import controlled, library
from support.pattern import pattern, seeded

PAGE = uffd._core.PAGE_BYTES
BLOCK = 4 * PAGE
BLOCKS = 1024
PAUSE_S = 0.0002
LIBC = ctypes.CDLL(None)
PATIENCE_S = 0.1  # a busy machine lets the worker wait this long for a core


@pytest.fixture
def region(make):
    return make(BLOCKS * BLOCK, controlled()[0], block_bytes=BLOCK)


def comes(region, block, patience_s):
    """Gives what read-ahead asked for that long to come, so that counts are stable however busy the machine is."""
    due = time.monotonic() + patience_s
    while not region.resident()[block] and time.monotonic() < due:
        time.sleep(PAUSE_S)


def touch(region, blocks, patience_s=0.0):
    """One byte of each block in turn, with a pause as a program would compute: workers get to run."""
    for block in blocks:
        if patience_s:
            comes(region, block, patience_s)
        got = library().touch_sum(region.address + block * BLOCK, 1, 1)
        assert got == pattern(block * BLOCK, 1)[0]
        time.sleep(PAUSE_S)


def filled(stats):
    return stats.blocks_demand + stats.blocks_readahead + stats.blocks_prefetch


def test_sequential(region):
    """Goal: of blocks touched one after the other, few wait for a fill of their own."""
    touch(region, range(BLOCKS), PATIENCE_S)
    stats = region.stats()
    assert filled(stats) == BLOCKS
    assert stats.blocks_demand <= 0.1 * BLOCKS
    assert stats.readahead_wasted == 0


def test_sequential_backward(region):
    touch(region, range(BLOCKS - 1, -1, -1), PATIENCE_S)
    stats = region.stats()
    assert filled(stats) == BLOCKS
    assert stats.blocks_demand <= 0.25 * BLOCKS


def test_one_sweep_of_numpy(make):
    region = make(BLOCKS * BLOCK, controlled()[0], block_bytes=BLOCK)
    array = region.array()
    for block in range(0, BLOCKS, 64):
        comes(region, block, PATIENCE_S)  # at full speed, a sweep may outrun it
        part = slice(block * BLOCK, (block + 64) * BLOCK)
        np.testing.assert_array_equal(array[part], pattern(block * BLOCK, 64 * BLOCK))
    assert region.stats().blocks_readahead >= 16
    del array


@pytest.mark.parametrize("stride", [2, 3, 7])
def test_strided(region, stride):
    """Goal: blocks filled <= 1.2 x touched, and 90 % of them ahead of demand."""
    touched = range(0, BLOCKS, stride)
    touch(region, touched, PATIENCE_S)
    stats = region.stats()
    assert filled(stats) <= 1.2 * len(touched)
    assert stats.blocks_demand <= 0.1 * len(touched) + 16
    assert stats.blocks_readahead + stats.blocks_demand == filled(stats)


def test_random(region):
    """Goal: random touches fill <= 1.1 x the blocks touched."""
    rng = seeded("random touches")
    touched = rng.sample(range(BLOCKS), BLOCKS // 3)
    touch(region, touched)
    assert filled(region.stats()) <= 1.1 * len(touched)


def test_random_writes(make):
    array = make(BLOCKS * BLOCK, controlled()[0], block_bytes=BLOCK).array()
    touched = seeded("random writes").sample(range(BLOCKS), BLOCKS // 4)
    for block in touched:
        array[block * BLOCK + 3] = 1
    region = uffd.region_of(array)
    assert filled(region.stats()) <= 1.1 * len(touched)
    assert np.flatnonzero(region.dirty()).tolist() == sorted(touched)
    del array


def mixed(rng):
    """Random touches in the upper half between the steps of a stride through the lower half."""
    stride = list(range(0, BLOCKS // 2, 3))
    scattered = rng.sample(range(BLOCKS // 2, BLOCKS), len(stride))
    return stride, scattered, [block for pair in zip(stride, scattered) for block in pair]


def test_both_patterns_in_one_thread(region):
    """Goal: a stride is recognised between random touches, and these fill nothing beside them."""
    stride, scattered, together = mixed(seeded("both patterns"))
    for block in together:
        touch(region, [block], PATIENCE_S if block in stride else 0)
    stats = region.stats()
    assert filled(stats) <= 1.2 * len(stride) + 1.1 * len(scattered)
    assert stats.blocks_demand <= len(scattered) + 0.1 * len(stride) + 8


def test_both_patterns_in_two_threads(region):
    stride, scattered, _ = mixed(seeded("two threads"))
    threads = [threading.Thread(target=touch, args=(region, blocks)) for blocks in (stride, scattered)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert filled(region.stats()) <= 1.2 * len(stride) + 1.1 * len(scattered) + 8


def test_off(make):
    region = make(BLOCKS * BLOCK, controlled()[0], block_bytes=BLOCK, readahead_bytes=0)
    touch(region, range(BLOCKS))
    stats = region.stats()
    assert stats.blocks_demand == BLOCKS and stats.blocks_readahead == 0


def test_limit(make):
    """Goal: readahead_bytes bounds how far ahead of a touch blocks are filled."""
    region = make(BLOCKS * BLOCK, controlled()[0], block_bytes=BLOCK, readahead_bytes=4 * BLOCK)
    touch(region, range(BLOCKS // 2))
    ahead = np.flatnonzero(region.resident()).max() - (BLOCKS // 2 - 1)
    assert ahead <= 8
    assert region.stats().blocks_readahead > 0


def test_never_past_the_end(make):
    provider, control = controlled()
    nbytes = 100 * BLOCK + 11
    control.nbytes_max = nbytes
    region = make(nbytes, provider, block_bytes=BLOCK)
    touch(region, range(101))
    assert region.stats().errors == 0


def test_a_failing_block_ahead_harms_nobody(make):
    """Goal: an error of a block that nobody touched neither poisons the touch before it nor is lost."""
    provider, control = controlled()
    control.fail(50 * BLOCK, 51 * BLOCK, 5)
    region = make(100 * BLOCK, provider, block_bytes=BLOCK, retries=0)
    touch(region, range(50))
    touch(region, range(51, 100))
    with pytest.raises(uffd.ProviderError):
        region.populate((50 * BLOCK, 51 * BLOCK))
    control.fail_times = 0
    region.populate()
    touch(region, range(100))


def test_readahead_leaves_written_blocks(region):
    array = region.array()
    array[500 * BLOCK:500 * BLOCK + 5] = 9
    touch(region, range(500))
    right = pattern(500 * BLOCK, BLOCK).copy()
    right[:5] = 9
    np.testing.assert_array_equal(array[500 * BLOCK:501 * BLOCK], right)
    del array


# ---- what a file is told


def cached(path):
    """Which blocks of a file the kernel has some page of."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = np.zeros(BLOCKS * BLOCK // PAGE, np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        assert LIBC.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.nbytes),
                                         ctypes.c_void_p(pages.ctypes.data)) == 0
        del view
    return (pages & 1).reshape(BLOCKS, -1).any(axis=1)


def cold(make, tmp_path):
    """(region, path) of a file that is on the disk alone, and of which the kernel reads nothing ahead by itself."""
    path = tmp_path / "cold"
    with open(path, "wb") as file:
        file.write(pattern(0, BLOCKS * BLOCK).tobytes())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path).any():
        pytest.skip("a file system in memory, or one that others read")
    provider = uffd.providers.File(path)
    os.posix_fadvise(provider._fd, 0, 0, os.POSIX_FADV_RANDOM)
    return make(BLOCKS * BLOCK, provider, block_bytes=BLOCK), path


def settled(region):
    """Which blocks are there, once nothing more comes."""
    while True:
        before = region.resident()
        time.sleep(0.3)
        if np.array_equal(before, region.resident()):
            return before


@pytest.mark.parametrize("backward", [False, True])
def test_a_file_is_told_of_what_comes_next(make, tmp_path, backward):
    """Goal: while a sweep goes on, the kernel reads what lies behind the window; of other blocks, nothing."""
    region, path = cold(make, tmp_path)
    order = range(BLOCKS - 1, -1, -1) if backward else range(BLOCKS)
    touch(region, order[:400], PATIENCE_S)
    resident = settled(region)[::-1 if backward else 1]
    reached = int(np.flatnonzero(resident).max())
    due = time.monotonic() + 20
    while not (seen := cached(path)[::-1 if backward else 1])[reached + 1:].any() and time.monotonic() < due:
        time.sleep(0.05)
    assert reached < 600 and seen[reached + 1:].any()
    assert not seen[2 * reached:].any()


def test_a_prefetch_reads_nothing_behind_its_end(make, tmp_path):
    region, path = cold(make, tmp_path)
    region.prefetch((0, BLOCKS // 2 * BLOCK)).wait(20)
    assert region.resident()[:BLOCKS // 2].all()
    assert not cached(path)[BLOCKS // 2:].any()
