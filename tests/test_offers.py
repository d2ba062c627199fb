"""Bytes that a provider in Python offers unasked never take the place of what the program wrote."""

import threading
import time

import numpy as np
import pytest

from support.hosted import BLOCK, Offers, lines
from support.hosted_writers import OffersOld
from support.pattern import pattern
from support.scripts import deadline_scale, run_script
from uffd import _core

pytestmark = pytest.mark.skipif(_core.mode()[0] == "none", reason="no userfaultfd: nothing is offered")

SIZE = 16 * BLOCK


def test_what_was_spilled_is_not_offered_over(make):
    """Goal: a private block that was written and left memory comes back as written. Method: a touch of its neighbour
    has the provider offer it."""
    region = make(SIZE, Offers(), readahead_bytes=0)
    array, right = region.array(), pattern(0, SIZE).copy()
    for block in (1, 5, 6):
        array[block * BLOCK:(block + 1) * BLOCK] = 7
        right[block * BLOCK:(block + 1) * BLOCK] = 7
    assert region.evict() == 8 * BLOCK and not region.resident().any()
    assert array[0] == right[0]
    assert region.resident()[:8].tolist() == [True, False, True, True, True, False, False, True]
    assert np.array_equal(array, right)
    del array


def test_what_the_parent_wrote_is_not_offered_over(where):
    """Goal: in a forked child, blocks that the parent had written are those, whatever the provider offers."""
    run_script("""
from support.hosted import Offers
r = region(16 * BLOCK, Offers(), readahead_bytes=0)
a, right = r.array(), pattern(0, 16 * BLOCK).copy()
for block in (5, 9):
    a[block * BLOCK:(block + 1) * BLOCK] = 7
    right[block * BLOCK:(block + 1) * BLOCK] = 7
r.evict(a[9 * BLOCK:10 * BLOCK])
pid = os.fork()
if pid == 0:
    a[0], a[8 * BLOCK]
    os._exit(0 if (a == right).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert (a == right).all()
""", where=where).check()


def test_what_was_written_back_is_not_offered_over(make, tmp_path):
    """Goal: a provider that writes and offers what it had read before the write changes nothing. Method: its read of
    block 0 copies the file and waits; meanwhile block 3 is written, stored and dropped; then the copy is offered."""
    path, log = tmp_path / "store", tmp_path / "log"
    pattern(0, SIZE).tofile(path)
    region = make(SIZE, OffersOld(str(path), SIZE, str(log), 4), readahead_bytes=0)
    assert region.mode == "r+"
    array, right = region.array(), pattern(0, SIZE).copy()
    reading = threading.Thread(target=region.populate, args=((0, BLOCK),))
    reading.start()
    deadline = time.monotonic() + 20 * deadline_scale()
    while "copied" not in lines(log):
        assert time.monotonic() < deadline, "the first block is not read"
        time.sleep(0.002)
    piece = slice(3 * BLOCK, 4 * BLOCK)
    region.populate((3 * BLOCK, 4 * BLOCK))
    array[piece] = right[piece] = 7
    assert region.evict(array[piece]) == BLOCK
    (tmp_path / "store.open").touch()
    reading.join()
    assert lines(log)[-1].startswith("offered") and not region.resident()[3]
    assert np.array_equal(array, right)
    region.flush()
    assert np.array_equal(np.fromfile(path, np.uint8), right)
    del array


def test_a_provider_that_writes_may_still_offer(make, tmp_path):
    """Goal: after a write, what a later call offers is taken."""
    path, log = tmp_path / "store", tmp_path / "log"
    pattern(0, SIZE).tofile(path)
    (tmp_path / "store.open").touch()
    region = make(SIZE, OffersOld(str(path), SIZE, str(log), 4), readahead_bytes=0)
    array = region.array()
    array[3 * BLOCK:4 * BLOCK] = 7
    region.flush()
    region.evict()
    assert array[0] == pattern(0, 1)[0]
    assert "offered True" in lines(log) and region.resident().all()
    assert (array[3 * BLOCK:4 * BLOCK] == 7).all()
    del array
