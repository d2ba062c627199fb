"""Read-ahead: it recognises sequential and strided touches and stops when it is wrong. Judged by counts, not time."""

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
