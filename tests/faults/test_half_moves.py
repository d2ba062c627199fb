"""Blocks that come back from the pool in pieces: the kernel moves some pages and refuses the rest, and the copy,
too."""

import pytest
from support import matrix, shim
from support.scripts import run_script

pytestmark = pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing is moved")


@pytest.mark.parametrize("delivery", ["thread", "inline"])
def test_half_of_a_block_is_never_published(delivery):
    """Goal: a rescue of which a part was moved before move and copy failed is undone: the next one finds the block
    whole in the pool, moves it, and its bytes are right; so is what its store gets.
    Method: the next move is cut after a page, the one after it fails, and so do the next copies."""
    where = next(where for where in matrix.EVERY if str(where) == f"{delivery}-anon")
    if not matrix.full_mode() and delivery == "thread":
        pytest.skip("blocks are moved by a full userfaultfd only")
    run_script("""
from support import shim
engine = uffd.Engine(workers=2, budget_bytes=4 << 20)
r = region(8 << 20, None, engine=engine, block_bytes=BLOCK, readahead_bytes=0)
a = r.array("u1", (128, BLOCK))
for b in range(128):
    a[b] = b
if not uffd._core.supports("MOVE"):
    raise SystemExit(0)
tried = hits = 0
deadline = time.monotonic() + 15
while hits < 5:
    assert time.monotonic() < deadline, (tried, hits)
    time.sleep(0.02)                        # the evictor and the writer have ended
    before = r.stats().rescued
    moves = [shim.Rule("MOVE", 1, 1, errno.EAGAIN, shim.PARTIAL, 1), shim.Rule("MOVE", 1, 1, errno.EBUSY)]
    copies = shim.Rule("COPY", 1, 2, errno.ENOMEM)
    b = tried * 37 % 128
    tried += 1
    a[b, 5] = b                             # a write: what is clean comes back by a move then, too
    assert (a[b] == b).all(), f"block {b}"
    if r.stats().rescued > before and moves[1].fired and copies.fired:
        hits += 1
        assert copies.fired == 1, "it came back in pieces"
    shim.clear()
assert all((a[b] == b).all() for b in range(128)) and engine.resident_bytes <= 4 << 20
r.evict()
assert all((a[b] == b).all() for b in range(128))
""", 40, where=where, preload=shim.path()).check()


@pytest.mark.parametrize("delivery", ["thread", "inline"])
def test_what_could_not_leave_whole_is_whole_again(delivery):
    """Goal: a dirty block of which a part was moved out, and which neither goes on nor can be moved back, is copied
    back, however often that fails at first. Method: the next move is cut after a page, the two after it fail, and so do
    the next two copies; a lowered budget makes the evictor move, while nothing is filled."""
    where = next(where for where in matrix.EVERY if str(where) == f"{delivery}-anon")
    if not matrix.full_mode() and delivery == "thread":
        pytest.skip("blocks are moved by a full userfaultfd only")
    run_script("""
from support import shim
engine = uffd.Engine(workers=2, budget_bytes=4 << 20)
r = region(8 << 20, None, engine=engine, block_bytes=BLOCK, readahead_bytes=0)
a = r.array("u1", (128, BLOCK))
if not uffd._core.supports("MOVE"):
    raise SystemExit(0)
turn = hits = 0
deadline = time.monotonic() + 15
while hits < 3:
    assert time.monotonic() < deadline, (turn, hits)
    turn += 1
    engine.budget_bytes = 8 << 20
    for b in range(96):
        a[b] = (b + turn) % 256
    moves = [shim.Rule("MOVE", 1, 1, errno.EAGAIN, shim.PARTIAL, 1), shim.Rule("MOVE", 1, 2, errno.EBUSY)]
    copies = shim.Rule("COPY", 1, 2, errno.ENOMEM)
    engine.budget_bytes = 4 << 20
    wait_until(lambda: engine.resident_bytes <= 4 << 20, "less in memory")
    hits += moves[1].fired == 2 and copies.fired == 2
    shim.clear()
    assert all((a[b] == (b + turn) % 256).all() for b in range(96)), turn
""", 40, where=where, preload=shim.path()).check()
