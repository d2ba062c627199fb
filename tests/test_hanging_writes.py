"""A native store that hangs in a write: flush ends within its time and by Ctrl-C, other regions are written back, and
the block on its way stays in memory, dirty, with no second write of it before the first has come back."""

import errno
import signal

import pytest
from support import matrix
from support.scripts import finish_script, run_script, start_script, wait_for_line

pytestmark = [pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing is written back"),
              pytest.mark.deadline(60)]

# Block 1 hangs: it is written alone, its neighbours are clean.
HANGS = """
SIZE, BLOCKS = 4 * PAGE, 16
provider, store = stored(BLOCKS * SIZE)
counts = store.count_blocks(SIZE)
r = region(None, provider, block_bytes=SIZE, readahead_bytes=0, timeout_s={timeout_s})
a = r.array()
store.close_gate(SIZE, 2 * SIZE)
a[SIZE] = 7
right = store.held.copy()
right[SIZE] = 7
def healed():
    store.open_gate()
    r.flush(timeout_s=20)
    assert (store.held == right).all() and (a == right).all() and not r.dirty().any()
    assert store.overlaps == 0
"""


def test_flush_ends_in_its_time(where):
    """Goal: flush(timeout_s) raises ETIMEDOUT with the block in `failed`; the block stays resident and dirty, what is
    written to it meanwhile stays, too, and is written only after the first write has come back; evict leaves it."""
    run_script(HANGS.format(timeout_s=1) + f"""
def in_vain(call, least, most):
    began = time.monotonic()
    try:
        call()
        raise AssertionError("in time")
    except uffd.ProviderError as error:
        took = time.monotonic() - began
        assert least <= took < most and isinstance(error, TimeoutError), (took, error)
        assert error.errno == {errno.ETIMEDOUT} and (SIZE, SIZE, {errno.ETIMEDOUT}) in error.failed, error.failed
in_vain(lambda: r.flush(timeout_s=0.2), 0.2, 1.2)
assert r.resident()[1] and r.dirty().nonzero()[0].tolist() == [1]
a[SIZE + 1] = right[SIZE + 1] = 8           # written again, behind the write that hangs
a[9 * SIZE] = right[9 * SIZE] = 9
in_vain(lambda: r.flush(timeout_s=0.2), 0.2, 1.2)
in_vain(lambda: r.flush(), 1.0, 4.0)        # the region's own time
in_vain(lambda: r.evict((SIZE, 2 * SIZE)), 1.0, 4.0)
assert r.resident()[1] and r.dirty()[1] and a[SIZE] == 7 and a[SIZE + 1] == 8
assert counts[1] == 1 and store.gate_waiters == 1, (counts[1], store.gate_waiters)
healed()
assert counts[1] == 2
""", 45, where=where).check()


def test_ctrl_c_ends_a_flush_that_hangs():
    """Goal: Ctrl-C, while the store hangs, within a second; nothing is lost."""
    process = start_script(HANGS.format(timeout_s=30) + """
def hangs():
    wait_until(lambda: store.gate_waiters == 1, "the write")
    say("ready")
threading.Thread(target=hangs, daemon=True).start()
try:
    r.flush()
    say("not interrupted")
except KeyboardInterrupt:
    began = time.monotonic()
    say("interrupted")
assert store.gate_waiters == 1 and r.dirty()[1]
healed()
say("healed")
""")
    wait_for_line(process, "ready")
    process.send_signal(signal.SIGINT)
    result = finish_script(process, 10).check()
    assert "interrupted\nhealed" in result.stdout, result.describe()


@pytest.mark.parametrize("backing", ["anon", "shared"])
def test_the_writer_hangs(backing):
    """Goal: a background write that hangs does not keep other regions' dirty blocks in memory: another writer goes on,
    which the user is told; more flushes that hang than there are threads to write still end in their time."""
    result = run_script(HANGS.format(timeout_s=0.5) + f"""
engine = uffd.Engine(workers=2, budget_bytes=4 << 20)
bad_provider, bad = stored(32 * BLOCK)
bad.close_gate()
b = uffd.Region(None, bad_provider, engine=engine, backing={backing!r}, timeout_s=0.5, name="bad")
x = b.array()
x[:16 * BLOCK] = 5                          # a megabyte that its store takes for ever to write
other = uffd.Region(16 << 20, None, engine=engine, backing={backing!r}, name="other", timeout_s=20)
y = other.array()
for start in range(0, other.nbytes, BLOCK):
    y[start:start + BLOCK] = start >> 16 & 255
assert (y[::BLOCK] == np.arange(256) % 256).all()
assert (x[:16 * BLOCK] == 5).all() and engine.resident_bytes <= 4 << 20
regions = [b] + [uffd.Region(None, bad_provider, engine=engine, timeout_s=0.5) for _ in range(9)]
arrays = [one.array() for one in regions]
for one, array in zip(regions, arrays):
    array[20 * BLOCK] = 6
    began = time.monotonic()
    try:
        one.flush(timeout_s=0.1)
    except TimeoutError:
        pass
    assert time.monotonic() - began < 2
bad.open_gate()
for one in regions:
    one.flush(timeout_s=20)
    assert not one.dirty().any()
assert (bad.held[:16 * BLOCK] == 5).all() and bad.held[20 * BLOCK] == 6
""", 45).check()
    assert "region 'bad': block at offset" in result.stderr and "is being written since" in result.stderr, result.stderr


def test_a_region_with_a_hanging_write_is_not_torn_down():
    """Goal: the last array of a region dies while its store hangs: its memory stays until the write has come back, the
    engine serves others, and the process ends."""
    run_script(HANGS.format(timeout_s=0.3) + """
try:
    r.flush(timeout_s=0.1)
except TimeoutError:
    pass
del a, r
gc.collect()
other_provider, other = stored(BLOCKS * SIZE)
o = region(None, other_provider, block_bytes=SIZE)
c = o.array()
c[:] = 4
o.flush(timeout_s=10)
assert (other.held == 4).all()
store.open_gate()
wait_until(lambda: store.held[SIZE] == 7, "the late write")
assert store.overlaps == 0
""", 30).check()
