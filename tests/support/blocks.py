"""Regions of a few small blocks over a store in memory: for the tests of what leaves memory and what goes back."""

import time

import uffd

PAGE = uffd._core.PAGE_BYTES
SIZE = 4 * PAGE                 # of a block
BLOCKS = 64


def wait_until(condition, what, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def rows(region):
    """The region's bytes, a row per block."""
    return region.array("u1", (region.nbytes // SIZE, SIZE))


def held(store):
    """The store's bytes, a row per block."""
    return store.held.reshape(-1, SIZE)
