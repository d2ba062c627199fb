"""Counters: what they count, that they add up, that reading them touches nothing and stops nobody."""

import json
import threading
import time

import numpy as np
import pytest
import uffd
from support.native import controlled, library
from support.pattern import pattern
from uffd import providers

PAGE = uffd._core.PAGE_BYTES
BLOCK = 65536
COUNTERS = ("faults_read", "faults_write", "faults_wp", "blocks_demand", "blocks_readahead", "blocks_prefetch",
            "bytes_filled", "duplicates", "retries", "errors", "poisoned", "readahead_wasted")
STAGES = ("queue", "fill", "resolve")


@pytest.fixture
def region(make):
    return make(16 * BLOCK, controlled()[0], readahead_bytes=0)


def test_all_names_and_as_dict(region, engine):
    """Goal: every counter and stage is there, on regions and engines, and as_dict is plain data."""
    for owner in (region, engine):
        stats = owner.stats()
        for name in COUNTERS:
            assert isinstance(getattr(stats, name), int) and getattr(stats, name) == 0, name
        for name in STAGES:
            histogram = getattr(stats, name)
            assert histogram.n == 0 and sum(histogram.counts) == 0
        plain = json.loads(json.dumps(stats.as_dict()))
        assert set(COUNTERS) <= set(plain) and set(STAGES) <= set(plain)


def test_demand(region, where):
    for block in (0, 3, 3, 5):
        library().touch_sum(region.address + block * BLOCK, 2 * PAGE, PAGE)
    stats = region.stats()
    assert stats.blocks_demand == 3 and stats.faults_read == 3 and stats.faults_write == 0
    assert stats.bytes_filled == 3 * BLOCK
    assert stats.blocks_readahead == stats.blocks_prefetch == stats.errors == stats.retries == 0
    assert stats.fill.n == stats.resolve.n == 3
    assert stats.queue.n == (3 if where.delivery == "thread" else 0)  # inline, a fault waits in no queue


def test_writes(region):
    array = region.array()
    array[0] = 1  # write as first touch
    assert region.stats().faults_write == 1 and region.stats().faults_wp == 0
    array[BLOCK]
    array[BLOCK] = 1  # write after read
    stats = region.stats()
    assert stats.faults_wp == 1 and stats.blocks_demand == 2
    array[BLOCK + 1] = 1
    array[1] = 1
    assert region.stats().faults_wp == 1
    del array


def test_populate_counts_as_prefetch(region):
    region.populate((0, 4 * BLOCK))
    region.prefetch((4 * BLOCK, 6 * BLOCK)).wait(5)
    stats = region.stats()
    assert stats.blocks_prefetch == 6 and stats.bytes_filled == 6 * BLOCK and stats.blocks_demand == 0


def test_bytes_of_a_ragged_end(make):
    region = make(2 * BLOCK + 5, controlled()[0])
    region.populate()
    assert 2 * BLOCK + 5 <= region.stats().bytes_filled <= 3 * BLOCK
    assert region.stats().blocks_prefetch == 3


def test_errors_and_retries(make):
    provider, control = controlled()
    control.fail(BLOCK, 2 * BLOCK, 5)
    region = make(16 * BLOCK, provider, retries=2, readahead_bytes=0)
    with pytest.raises(uffd.ProviderError):
        region.populate((0, 2 * BLOCK))
    stats = region.stats()
    assert stats.retries == 2 and stats.errors >= 1


def test_readahead_counts(make):
    region = make(512 * BLOCK, controlled()[0])
    for block in range(512):
        library().touch_sum(region.address + block * BLOCK, BLOCK, PAGE)
        time.sleep(0.0002)  # without a pause a touch may be faster than what reads ahead of it
    stats = region.stats()
    assert stats.blocks_demand + stats.blocks_readahead == 512 and stats.blocks_readahead > 0


def test_wasted_readahead(make):
    """Goal: blocks read ahead and never touched are told as wasted once the region is done with, and no others."""
    region = make(512 * BLOCK, controlled()[0], block_bytes=BLOCK)
    library().touch_sum(region.address, 64 * BLOCK, PAGE)
    stats = region.stats()
    resident = int(region.resident().sum())
    assert 0 <= stats.readahead_wasted <= resident - 64 + 8


def test_engine_adds_up_its_regions(engine, make):
    regions = [make(8 * BLOCK, controlled()[0], readahead_bytes=0) for _ in range(3)]
    for number, region in enumerate(regions):
        library().touch_sum(region.address, (number + 1) * BLOCK, BLOCK)
    assert engine.stats().blocks_demand == 6
    regions[0].close()
    assert engine.stats().blocks_demand == 6  # what a closed region did is not forgotten


def test_histograms(make):
    """Goal: percentiles tell a slow provider from a quick one, and log2 buckets hold every fill."""
    provider, control = controlled()
    region = make(128 * BLOCK, provider, readahead_bytes=0)
    library().touch_sum(region.address, 64 * BLOCK, BLOCK)
    quick = region.stats()
    control.delay_us = 3000
    library().touch_sum(region.address + 64 * BLOCK, 64 * BLOCK, BLOCK)
    both = region.stats()
    assert quick.fill.n == 64 and both.fill.n == 128
    assert sum(both.fill.counts) == 128 and 0 < both.fill.p50_ns <= both.fill.p99_ns
    assert both.fill.p99_ns >= 2_000_000
    assert sum(both.fill.counts[:21]) <= 128 - 60  # 2^21 ns is 2.1 ms: the slow ones are above


def test_stats_are_a_snapshot(region):
    before = region.stats()
    library().touch_sum(region.address, 1, 1)
    assert before.blocks_demand == 0 and region.stats().blocks_demand == 1


def test_reading_touches_nothing(region):
    for _ in range(5):
        region.stats()
        region.engine.stats()
        repr(region)
    assert not region.resident().any() and region.stats().faults_read == 0


def test_reading_while_a_fill_hangs(make):
    """Goal: stats, resident, dirty and repr answer while every worker is in a fill."""
    provider, control = controlled()
    control.close_gate(0, 16 * BLOCK)
    region = make(16 * BLOCK, provider, readahead_bytes=0)
    prefetch = region.prefetch()
    for _ in range(10):
        region.stats()
        region.engine.stats()
        region.resident()
        region.dirty()
        repr(region)
    assert not prefetch.done()
    control.open_gate()
    prefetch.wait(10)


def test_reading_against_touching(make):
    """Goal: counters never go back while they are read in a race, and are exact at its end."""
    region = make(1024 * BLOCK, providers.Memory(pattern(0, 1024 * BLOCK)), readahead_bytes=0)
    threads = [threading.Thread(target=library().touch_sum, args=(region.address + n * 256 * BLOCK, 256 * BLOCK, BLOCK))
               for n in range(4)]
    for thread in threads:
        thread.start()
    last = 0
    while any(thread.is_alive() for thread in threads):
        now = region.stats().blocks_demand
        assert now >= last
        last = now
    for thread in threads:
        thread.join()
    assert region.stats().blocks_demand == 1024
    assert region.stats().bytes_filled == 1024 * BLOCK


def test_stats_of_a_closed_region(region):
    library().touch_sum(region.address, 1, 1)
    region.close()
    try:
        assert region.stats().blocks_demand == 1
    except uffd.RegionClosed:
        pass


def test_duplicates_are_not_fills(make):
    provider, control = controlled()
    control.delay_us = 500
    region = make(64 * BLOCK, provider, readahead_bytes=0)
    threads = [threading.Thread(target=library().touch_sum, args=(region.address, 64 * BLOCK, BLOCK)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = region.stats()
    assert stats.blocks_demand == 64 and stats.bytes_filled == 64 * BLOCK
    array = region.array()
    np.testing.assert_array_equal(array, pattern(0, 64 * BLOCK))
    del array
