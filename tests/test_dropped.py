"""Pages that the program drops (madvise) of blocks that it has written: what is left of them is stored, with the
provider's bytes in the place of what was dropped; no zeros that nobody wrote, no block that can't leave memory."""

import errno

import pytest
from support import matrix
from support.scripts import run_script

pytestmark = [pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing is written back"),
              pytest.mark.deadline(60)]

BEGIN = """
SIZE, BLOCKS = 4 * PAGE, 16
MADV_REMOVE = 9
source = pattern(0, BLOCKS * SIZE)
def advise(array, start, nbytes):
    how = MADV_REMOVE if WHERE.backing == "shared" else mmap.MADV_DONTNEED
    assert ctypes.CDLL(None).madvise(ctypes.c_void_p(array.ctypes.data + start), ctypes.c_size_t(nbytes), how) == 0
def tear(array, blocks):
    "Writes to all of each block, then drops its second page; what the region has to hold now."
    right = source.copy()
    for b in blocks:
        array[b * SIZE:(b + 1) * SIZE] = right[b * SIZE:(b + 1) * SIZE] = 200 + b
        advise(array, b * SIZE + PAGE, PAGE)
        right[b * SIZE + PAGE:b * SIZE + 2 * PAGE] = source[b * SIZE + PAGE:b * SIZE + 2 * PAGE]
    return right
"""


@pytest.mark.parametrize("mode", ["r+", "c"])
def test_torn_blocks_are_stored(where, mode):
    """Goal: flush (r+) or evict (c) of dirty blocks that lack pages stores what was written, with the provider's bytes
    in the place of the dropped ones, and touches none of them to do so; what comes back is the same."""
    run_script(BEGIN + f"""
provider, store = stored(BLOCKS * SIZE)
r = region(None, provider, mode={mode!r}, block_bytes=SIZE, readahead_bytes=0)
a = r.array()
right = tear(a, [0, 1, 5, BLOCKS - 1])
if r.mode == "r+":
    r.flush(timeout_s=20)
    assert (store.held == right).all() and not r.dirty().any()
assert r.evict() >= 4 * SIZE and not r.resident().any()
assert (a == right).all()
assert r.stats().repaired >= 4, r.stats()
""", 45, where=where).check()


def test_provider_that_fails_meanwhile(where):
    """Goal: where the dropped page can't be had again flush raises that provider's error, and what was written stays,
    dirty; with a provider that is well again the next flush stores all."""
    result = run_script(BEGIN + f"""
provider, store = stored(BLOCKS * SIZE)
r = region(None, provider, block_bytes=SIZE, readahead_bytes=0, retries=1, timeout_s=5)
a = r.array()
right = tear(a, [2])
a[:SIZE] = right[:SIZE] = 9
store.fail_reads = 1
try:
    r.flush(timeout_s=20)
    say("in vain")
except uffd.ProviderError as error:
    assert error.errno == {errno.EIO} and [f[0] for f in error.failed] == [2 * SIZE], (error, error.failed)
assert (store.held[:SIZE] == 9).all() and (store.held[SIZE:] == source[SIZE:]).all()
assert r.dirty().nonzero()[0].tolist() == [2] and (a[2 * SIZE:2 * SIZE + PAGE] == 202).all()
store.fail_reads = 0
r.flush(timeout_s=20)
assert (store.held == right).all() and (a == right).all() and not r.dirty().any()
""", 45, where=where).check()
    assert "in vain" not in result.stdout


def test_torn_blocks_leave_memory_under_pressure(where):
    """Goal: blocks that lack pages do not stay in memory for good, whatever the budget: others are read until
    they are gone, and they come back right."""
    run_script(BEGIN + """
engine = uffd.Engine(workers=2, budget_bytes=4 << 20)
SIZE, BLOCKS = 65536, 128
source = pattern(0, BLOCKS * SIZE)
provider, store = stored(BLOCKS * SIZE)
r = region(None, provider, engine=engine, mode="c", block_bytes=SIZE, readahead_bytes=0)
a = r.array()
right = tear(a, range(12))
stay, deadline = np.ones(12, bool), time.monotonic() + 20
while stay.any():
    assert time.monotonic() < deadline, f"they stay: {stay.nonzero()[0]}"
    for b in range(12, BLOCKS):
        assert a[b * SIZE] == right[b * SIZE]
    stay &= r.resident()[:12]
assert engine.resident_bytes <= 4 << 20
assert (a == right).all()
""", 45, where=where).check()


@pytest.mark.parametrize("backing", ["anon", "shared"])
def test_torn_blocks_of_a_hosted_provider(backing, tmp_path):
    """Goal: the same with a provider in Python."""
    where = next(where for where in matrix.EVERY if str(where) == f"thread-{backing}")
    run_script(BEGIN + f"""
from support.hosted_writers import Store as Hosted
source.tofile({str(tmp_path / "store")!r})
r = region(len(source), Hosted({str(tmp_path / "store")!r}, len(source)), block_bytes=SIZE, readahead_bytes=0)
a = r.array()
right = tear(a, [3, 4])
r.flush(timeout_s=30)
assert (np.fromfile({str(tmp_path / "store")!r}, np.uint8) == right).all()
assert (a == right).all() and not r.dirty().any()
""", 45, where=where).check()


@pytest.mark.parametrize("repaired", [False, True])
def test_a_child_never_takes_a_torn_block_for_the_providers(where, repaired):
    """Goal: shared backing: a block that is poisoned at a fork, since a page that was dropped could not be had again,
    has its other pages' writes in the child, too, once the parent has it whole again, and is an error there before."""
    if where.backing != "shared":
        pytest.skip("private memory is the kernel's matter")
    run_script(BEGIN + f"""
spare = np.zeros(PAGE, "u1")
assert LIB.touch_guarded(spare.ctypes.data) == 0    # installs the handler
provider, store = stored(BLOCKS * SIZE)
r = region(None, provider, mode="c", block_bytes=SIZE, readahead_bytes=0, retries=0)
a = r.array()
right = tear(a, [2])
store.fail_reads = 1
assert LIB.touch_guarded(r.address + 2 * SIZE + PAGE) == -signal.SIGBUS
go = os.pipe()
pid = os.fork()
if not pid:
    os.read(go[0], 1)
    store.fail_reads = 0
    if {repaired}:
        os._exit(0 if (a == right).all() else 1)
    os._exit(0 if LIB.touch_guarded(r.address + 2 * SIZE) == -signal.SIGBUS and (a[3 * SIZE:] == right[3 * SIZE:]).all()
             else 2)
store.fail_reads = 0
if {repaired}:
    r.populate((2 * SIZE, 3 * SIZE))
    assert (a == right).all()
    r.evict()
os.write(go[1], b"x")
assert wait_for_child(pid, 20) == 0
r.populate()
assert (a == right).all()
""", 45, where=where).check()
