"""Pages that the kernel has swapped out are there: a flush, an eviction, an image, a migration take them as they are.
mincore says of them what it says of pages that the program dropped."""

import pytest
from support import matrix, swap
from support.scripts import run_script

pytestmark = [pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: regions are ordinary memory"),
              pytest.mark.skipif(bool(swap.why_not()), reason=str(swap.why_not())), pytest.mark.deadline(90)]

BEGIN = """
from support.swap import page_out, swapped
SIZE, BLOCKS = 4 * PAGE, 16
provider, store = stored(BLOCKS * SIZE)
source = pattern(0, BLOCKS * SIZE)
def written(mode, **options):
    "A region over the store, some blocks read, some written, all of them swapped out where they can be; what it holds."
    r = region(None, provider, **{"mode": mode, "block_bytes": SIZE, "readahead_bytes": 0, **options})
    a = r.array()
    right = source.copy()
    assert (a[:8 * SIZE] == right[:8 * SIZE]).all()
    a[4 * SIZE:12 * SIZE] = right[4 * SIZE:12 * SIZE] = 77
    out = page_out(a)
    assert out or WHERE.backing == "shared", "nothing was swapped out"
    return r, a, right
"""


@pytest.mark.parametrize("mode", ["r+", "c"])
def test_swapped_blocks_are_stored(where, mode):
    """Goal: blocks that were swapped out are flushed (r+) and evicted (c) like any other: nothing is read from the
    provider once more, nothing waits for what will not come, and every byte is as it was written."""
    run_script(BEGIN + f"""
r, a, right = written({mode!r}, timeout_s=60)
fills = r.stats().bytes_filled
if r.mode == "r+":
    r.flush(timeout_s=20)
    assert (store.held == right).all() and not r.dirty().any()
    a[4 * SIZE:6 * SIZE] = right[4 * SIZE:6 * SIZE] = 78
    page_out(a)
assert r.evict() >= 12 * SIZE and not r.resident().any()
stats = r.stats()
assert stats.repaired == 0 and stats.bytes_filled == fills and stats.errors == 0, stats
assert (a == right).all()
""", 60, where=where).check()


def test_swapped_blocks_are_touched(where):
    """Goal: a read, and a first write, of blocks that were swapped out are the kernel's matter: nothing is filled
    again, nothing is lost, and a write to a clean one is seen as such."""
    run_script(BEGIN + """
r, a, right = written("r+")
filled = r.stats().bytes_filled
assert (a[:12 * SIZE] == right[:12 * SIZE]).all()
page_out(a)
a[:12 * SIZE:PAGE] = right[:12 * SIZE:PAGE] = 5
assert r.dirty()[:12].all() and r.stats().bytes_filled == filled and r.stats().repaired == 0
page_out(a)
assert (a == right).all()
r.flush(timeout_s=20)
assert (store.held == right).all()
""", 60, where=where).check()


def test_dropped_pages_beside_swapped_ones(where):
    """Goal: of a block that was swapped out in part, and in part dropped by the program, what was dropped comes back
    from the provider, and the rest is what was written."""
    run_script(BEGIN + """
r, a, right = written("r+")
how = 9 if WHERE.backing == "shared" else mmap.MADV_DONTNEED        # MADV_REMOVE
for b in (5, 9):
    at = b * SIZE + PAGE
    assert ctypes.CDLL(None).madvise(ctypes.c_void_p(a.ctypes.data + at), ctypes.c_size_t(PAGE), how) == 0
    right[at:at + PAGE] = source[at:at + PAGE]
r.flush(timeout_s=20)
assert (store.held == right).all() and not r.dirty().any() and r.stats().repaired == 2, r.stats()
assert (a == right).all()
""", 60, where=where).check()


def test_images_and_trackers(where):
    """Goal: an image of memory that was swapped out, ours and others', has all of it; the pages that are written
    afterwards are those that a tracker tells."""
    if not matrix.full_mode():
        pytest.skip("images of protected memory need a full userfaultfd")
    run_script(BEGIN + """
import tempfile
if WHERE.delivery == "inline":
    raise SystemExit(0)         # a region that is served inline is imaged by fork: nothing is protected
r, a, right = written("c")
mapping = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
other = np.frombuffer(mapping, np.uint8)
other[:] = copy = np.arange(other.size) % 251
assert page_out(other) == 64
with tempfile.TemporaryDirectory() as folder, uffd.track(a) as mine, uffd.track(other) as theirs:
    page_out(a)
    page_out(other)
    assert not mine.ranges() and not theirs.ranges()
    a[5 * SIZE] = right[5 * SIZE] = 1
    other[3 * PAGE] = 9
    assert mine.ranges() == [(5 * SIZE, 5 * SIZE + PAGE)] and theirs.ranges() == [(3 * PAGE, 4 * PAGE)]
copy[3 * PAGE] = 9
page_out(a)
page_out(other)
with tempfile.TemporaryDirectory() as folder:
    taken = uffd.snapshot.take({"a": a, "other": other}, folder + "/image", method="protect")
    a[:] = 3
    other[:] = 4
    taken.wait(60)
    image = uffd.snapshot.load(folder + "/image")
    assert (image["a"] == right).all() and (image["other"] == copy).all()
    del image
""", 60, where=where).check()


def test_swapped_blocks_migrate():
    """Goal: memory that was swapped out at its source arrives."""
    if not matrix.full_mode():
        pytest.skip("memory that is not ours is protected by a full userfaultfd alone")
    run_script(BEGIN + """
r, a, right = written("c")
mapping = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
other = np.frombuffer(mapping, np.uint8)
other[:] = copy = (np.arange(other.size) % 251).astype(np.uint8)
assert page_out(other) == 64
with uffd.migrate.listen("tcp://127.0.0.1:0") as incoming:
    found = {}
    def there():
        with incoming.accept(timeout_s=30) as arrival:
            arrival.wait(30)
            found.update({name: np.array(array) for name, array in arrival.arrays.items()})
    thread = threading.Thread(target=there)
    thread.start()
    with uffd.migrate.connect(incoming.url, {"a": a, "other": other}) as outgoing:
        outgoing.precopy(rounds=1)
        page_out(other)
        outgoing.switchover()
        outgoing.wait(30)
    thread.join(30)
assert (found["a"] == right).all() and (found["other"] == copy).all()
""", 60, where=matrix.EVERY[0]).check()
