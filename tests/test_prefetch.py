"""Bringing blocks in before the touch: which blocks come, that nothing is copied or faulted, waiting and cancelling."""

import threading
import time

import numpy as np
import pytest
import uffd
from support.blocks import wait_until
from support.native import controlled
from support.pattern import pattern, seeded

PAGE = uffd._core.PAGE_BYTES
BLOCK = 65536
ROWS, ROW_NBYTES = 64, BLOCK  # one row a block


@pytest.fixture
def table(make):
    """A region of 64 rows of one block each, without read-ahead."""
    return make(ROWS * ROW_NBYTES, controlled()[0], readahead_bytes=0)


def rows_of(region):
    return region.array("<u8", (ROWS, ROW_NBYTES // 8))


def assert_no_demand(region):
    stats = region.stats()
    assert stats.blocks_demand == 0 and stats.faults_read == stats.faults_write == 0


KEYS = {
    "row": 5, "last row": -1, "slice": slice(3, 9), "steps": slice(2, 40, 7), "backward": slice(40, 2, -5),
    "ellipsis": ..., "ids": np.array([7, 3, 3, 60]), "negative ids": np.array([-1, -64, 5]), "list": [1, 2, 50],
    "empty ids": np.array([], int), "mask": np.arange(ROWS) % 9 == 4, "tuple": (slice(4, 6), slice(0, 3)),
    "ids and columns": (np.array([1, 9]), slice(None)), "pairs": (np.array([1, 9]), np.array([0, 8191])),
    "element": (11, 17), "new axis": (None, slice(0, 2)), "int32 ids": np.array([2, 4], np.int32),
    "uint8 ids": np.array([2, 250 - 200], np.uint8), "2-d ids": np.array([[1, 2], [30, 31]]),
    "grid": np.ix_([3, 20], [0, 5]), "empty slice": slice(9, 9), "full mask": np.zeros((ROWS, ROW_NBYTES // 8), bool),
    "columns": (slice(None), 5), "numpy int": np.int64(12),
}


def rows_touched(key):
    """Rows that array[key] reads. Method: numpy itself indexes an array of row numbers."""
    numbers = np.broadcast_to(np.arange(ROWS)[:, None], (ROWS, ROW_NBYTES // 8))
    return np.unique(numbers[key]).tolist()


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
@pytest.mark.parametrize("call", ["populate", "prefetch"])
def test_keys(table, call, key):
    """Goal: exactly the blocks that array[key] would touch come in, without a fault."""
    array = rows_of(table)
    if call == "populate":
        uffd.populate(array, key)
    else:
        uffd.prefetch(array, key).wait(10)
    assert np.flatnonzero(table.resident()).tolist() == rows_touched(key)
    assert_no_demand(table)
    assert table.stats().blocks_prefetch == len(rows_touched(key))
    del array


@pytest.mark.parametrize("key", [64, -65, np.array([64]), np.ones(3, bool), "name", 1.5, (0, 0, 0),
                                 (slice(None), 1 << 40)], ids=str)
@pytest.mark.parametrize("call", [uffd.populate, uffd.prefetch], ids=["populate", "prefetch"])
def test_bad_keys(table, call, key):
    """Goal: what array[key] refuses is refused, before any block is filled."""
    array = rows_of(table)
    with pytest.raises((IndexError, TypeError, ValueError)):
        call(array, key)
    assert not table.resident().any()
    del array


def test_views_and_orders(make):
    """Goal: a key of a view means the view's elements, transposed and reversed ones, too."""
    provider, _ = controlled()
    region = make(ROWS * ROW_NBYTES, provider, readahead_bytes=0)
    array = rows_of(region)
    uffd.populate(array.T, (slice(None), 3))
    uffd.populate(array[10:30][::-1], 0)
    uffd.populate(array[::2][20:], [0])
    assert np.flatnonzero(region.resident()).tolist() == [3, 29, 40]
    uffd.populate(array[50:52])
    assert np.flatnonzero(region.resident()).tolist() == [3, 29, 40, 50, 51]
    assert_no_demand(region)
    del array


def test_ranges_and_views_as_where(table):
    table.populate((BLOCK + 1, BLOCK + 2))
    table.populate((5 * BLOCK - 1, 5 * BLOCK + 1))
    assert np.flatnonzero(table.resident()).tolist() == [1, 4, 5]
    array = rows_of(table)
    table.populate(array[7, 5:6])
    table.prefetch(array[9:11]).wait(10)
    assert np.flatnonzero(table.resident()).tolist() == [1, 4, 5, 7, 9, 10]
    table.populate((3, 3))
    table.populate()
    assert table.resident().all()
    assert_no_demand(table)
    np.testing.assert_array_equal(array.view("u1").reshape(-1), pattern(0, ROWS * ROW_NBYTES))
    del array


@pytest.mark.parametrize("where_", [(-1, 5), (5, 1), (0, ROWS * ROW_NBYTES + 1), (1.5, 2), "all", np.zeros(3), 7,
                                    (1, 2, 3)], ids=str)
def test_bad_where(table, where_):
    for method in (table.populate, table.prefetch):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            method(where_)
    assert not table.resident().any()


def test_view_of_another_region_is_refused(make):
    first, second = make(PAGE, controlled()[0]), make(PAGE, controlled()[0])
    array = second.array()
    with pytest.raises(ValueError):
        first.populate(array)
    with pytest.raises(ValueError):
        uffd.populate(np.zeros(5))
    del array


def test_populate_again_asks_nobody(make):
    provider, control = controlled()
    region = make(8 * BLOCK, provider)
    region.populate()
    calls = control.calls
    region.populate()
    region.prefetch().wait(5)
    assert control.calls == calls
    assert region.stats().blocks_prefetch == 8


def test_populate_leaves_what_was_written(make):
    """Goal: populate and prefetch never overwrite."""
    provider, _ = controlled()
    region = make(8 * BLOCK, provider)
    array = region.array()
    array[3 * BLOCK + 5] = 42
    region.populate()
    region.prefetch().wait(5)
    right = pattern(0, 8 * BLOCK).copy()
    right[3 * BLOCK + 5] = 42
    np.testing.assert_array_equal(array, right)
    del array


def test_populated_blocks_are_clean(make):
    provider, _ = controlled()
    region = make(8 * BLOCK, provider)
    region.populate()
    assert region.resident().all() and not region.dirty().any()


def test_prefetch_returns_at_once_and_waits(make):
    """Goal: prefetch does not wait for the provider; wait(timeout_s) raises TimeoutError, then succeeds."""
    provider, control = controlled()
    control.close_gate(0, 8 * BLOCK)
    region = make(8 * BLOCK, provider)
    prefetch = region.prefetch()
    assert not prefetch.done()
    with pytest.raises(TimeoutError):
        prefetch.wait(0.1)
    control.open_gate()
    prefetch.wait(10)
    assert prefetch.done()
    prefetch.wait()
    assert region.resident().all()


def test_a_prefetch_of_what_another_one_fetches(make):
    """Goal: who waits for a prefetch has all of it, also what another one is fetching at this moment."""
    provider, control = controlled()
    control.close_gate(2 * BLOCK, 3 * BLOCK)
    region = make(8 * BLOCK, provider, readahead_bytes=0)
    first = region.prefetch((2 * BLOCK, 3 * BLOCK))
    wait_until(lambda: control.calls, "the provider was not asked")
    second = region.prefetch()
    with pytest.raises(TimeoutError):
        second.wait(0.3)
    wait_until(lambda: region.resident().sum() == 7, "what nobody else fetches does not come")
    assert not region.resident()[2]
    control.open_gate()
    second.wait(10)
    assert region.resident().all()
    first.wait(10)


def test_populate_timeout(make):
    provider, control = controlled()
    control.close_gate(0, 8 * BLOCK)
    region = make(8 * BLOCK, provider)
    with pytest.raises(TimeoutError):
        region.populate(timeout_s=0.1)
    control.open_gate()
    region.populate(timeout_s=10)
    array = region.array()
    np.testing.assert_array_equal(array, pattern(0, 8 * BLOCK))
    del array


def test_cancel(make):
    """Goal: after cancel no more blocks come than were under way; a later touch still gets its bytes."""
    provider, control = controlled()
    control.delay_us = 2000
    region = make(500 * BLOCK, provider, readahead_bytes=0)
    prefetch = region.prefetch()
    prefetch.cancel()
    prefetch.cancel()
    time.sleep(0.1)
    resident = int(region.resident().sum())
    time.sleep(0.1)
    assert int(region.resident().sum()) == resident < 400
    array = region.array()
    assert array[499 * BLOCK] == pattern(499 * BLOCK, 1)[0]
    del array


def test_prefetch_dropped_or_cancelled_by_close(make):
    """Goal: closing a region with a prefetch under way is no wait for all of it and no crash."""
    provider, control = controlled()
    control.delay_us = 1000
    region = make(2000 * BLOCK, provider)
    prefetch = region.prefetch()
    region.prefetch((0, BLOCK))  # nobody keeps this one
    region.close()
    assert prefetch.done()
    assert control.calls < 1900


@pytest.mark.parametrize("workers", [1, 2])
def test_demand_before_prefetch(where, workers):
    """Goal: a touch is served before the prefetch that was asked for first."""
    provider, control = controlled()
    control.delay_us = 3000
    with uffd.Engine(workers=workers) as engine:
        region = uffd.Region(400 * BLOCK, provider, engine=engine, readahead_bytes=0, **where.options)
        array = region.array()
        prefetch = region.prefetch((0, 300 * BLOCK))
        deadline = time.monotonic() + 10
        while control.calls < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert array[399 * BLOCK] == pattern(399 * BLOCK, 1)[0]
        assert control.arrivals().index(399 * BLOCK) < 150
        prefetch.cancel()
        del array
        region.close()


def test_touch_of_a_block_under_prefetch_is_filled_once(make):
    provider, control = controlled()
    counts = control.count_blocks(64 * BLOCK, BLOCK)
    control.delay_us = 300
    region = make(64 * BLOCK, provider, readahead_bytes=0)
    array = region.array()
    prefetch = region.prefetch()
    for block in seeded("touch under prefetch").sample(range(64), 64):
        assert array[block * BLOCK] == pattern(block * BLOCK, 1)[0]
    prefetch.wait(10)
    assert counts.tolist() == [1] * 64
    del array


def test_many_threads_populate(make):
    provider, control = controlled()
    counts = control.count_blocks(64 * BLOCK, BLOCK)
    region = make(64 * BLOCK, provider)
    errors = []

    def populate():
        try:
            region.populate(timeout_s=20)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=populate) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and region.resident().all()
    assert counts.tolist() == [1] * 64


def test_large_key_makes_no_copy(make):
    """Goal: prefetch of many ids takes memory by the id, not by the row. Method: 8 MiB of ids over a 1 TiB region."""
    from support import leaks

    provider, _ = controlled()
    region = make(1 << 40, provider, readahead_bytes=0)
    array = region.array("u1", (1 << 20, 1 << 20))
    ids = np.arange(0, 1 << 20, 1 << 14)
    before = leaks.rss_bytes()
    uffd.populate(array, (ids, slice(0, 10)))
    assert int(region.stats().blocks_prefetch) == len(ids)
    assert leaks.rss_bytes() - before < 64 << 20
    del array
