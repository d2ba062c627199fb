"""Eviction: what leaves memory and comes back, byte for byte; what counts as dirty; discard, volatile, guards, fork."""

import ctypes
import os
import signal
import threading
import time

import numpy as np
import pytest
import uffd
from support import matrix, shim
from support.blocks import BLOCKS, PAGE, SIZE, rows, wait_until
from support.native import controlled, library
from support.pattern import pattern
from support.scripts import run_script
from support.stores import stored

MODES = ("r", "c", "r+")
FEATURES = uffd._core.FEATURES

pytestmark = pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing is evicted")


def clear(flags):
    return np.flatnonzero(~np.asarray(flags)).tolist()


def set_of(flags):
    return np.flatnonzero(flags).tolist()


@pytest.fixture(params=MODES)
def region_mode(request):
    return request.param


@pytest.fixture
def made(make, engine, region_mode):
    """(region of BLOCKS blocks in that mode, its store), without a limit and without read-ahead."""
    engine.budget_bytes = None
    provider, store = stored(BLOCKS * SIZE)
    return make(None, provider, mode=region_mode, block_bytes=SIZE, readahead_bytes=0), store


# ---- evict


def test_evict_and_come_back(made, engine):
    """Goal: all leaves memory, the answer is its bytes; a touch has what was there, what was written included, and the
    blocks that came back are clean."""
    region, store = made
    array = rows(region)
    model = store.held.reshape(BLOCKS, SIZE).copy()
    for turn in range(3):
        if region.mode != "r":
            array[turn::5] += 1
            model[turn::5] += 1
            assert set_of(region.dirty()) == sorted(range(turn, BLOCKS, 5))
        region.populate()
        assert region.evict() == BLOCKS * SIZE
        assert not region.resident().any() and not region.dirty().any() and engine.resident_bytes == 0
        np.testing.assert_array_equal(array, model)
        assert region.resident().all() and not region.dirty().any()
    right = model if region.mode == "r+" else pattern(0, BLOCKS * SIZE).reshape(BLOCKS, SIZE)
    np.testing.assert_array_equal(store.held.reshape(BLOCKS, SIZE), right)
    assert region.stats().evicted >= 3 * BLOCKS and region.stats().poisoned == 0
    del array


def test_the_first_evictions_of_an_engine_at_once(where):
    """Goal: threads that move blocks out while the engine's pool is being made neither die nor copy into it. Method:
    new engines, and three threads that begin together, in a process of their own."""
    run_script("""
for turn in range(150):
    with uffd.Engine(workers=1) as engine:
        regions = [region(64 * PAGE, uffd.providers.Zero(), engine=engine, block_bytes=PAGE, mode="c")
                   for _ in range(3)]
        arrays = [one.array() for one in regions]
        for one in regions:
            one.populate()
        barrier, runs = threading.Barrier(3), np.array([[0, 64]], np.int64)
        def out(one):
            barrier.wait(20)
            uffd._core.evict(one, runs)
        threads = [threading.Thread(target=out, args=(one,)) for one in regions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(array.any() for array in arrays)
        del arrays
""", 45, where=where).check()


@pytest.mark.parametrize("where_from", ["bytes", "view", "empty"])
def test_evict_takes_what_it_names(made, where_from):
    region, _ = made
    array = rows(region)
    region.populate()
    named = {"bytes": (3 * SIZE + 1, 5 * SIZE + 1), "view": array[3:6, 5:7], "empty": (7 * SIZE, 7 * SIZE)}[where_from]
    freed = region.evict(named)
    gone = [] if where_from == "empty" else [3, 4, 5]
    assert freed == len(gone) * SIZE and clear(region.resident()) == gone
    assert region.evict(named) == 0
    del array, named


def test_evict_leaves_pinned_blocks(made):
    region, _ = made
    array = rows(region)
    region.populate()
    with region.pinned((8 * SIZE, 12 * SIZE)), region.pinned((11 * SIZE, 13 * SIZE)):
        assert region.evict() == (BLOCKS - 5) * SIZE
        assert set_of(region.resident()) == list(range(8, 13))
    assert region.evict() == 5 * SIZE
    np.testing.assert_array_equal(array.ravel(), pattern(0, BLOCKS * SIZE))
    del array


def test_evict_of_blocks_in_use(made):
    """Goal: evict, over and over, beside threads that read and write: nobody sees other bytes than the right ones."""
    region, store = made
    array = rows(region)
    model = store.held.reshape(BLOCKS, SIZE).copy()
    stop, errors = threading.Event(), []

    def use(mine):
        rng = np.random.default_rng(mine)
        while not stop.is_set():
            block = int(rng.integers(0, BLOCKS // 3)) * 3 + mine
            if not np.array_equal(array[block], model[block]):
                errors.append(block)
            if region.mode != "r":
                array[block] += 1
                model[block] += 1

    threads = [threading.Thread(target=use, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    freed, end = 0, time.monotonic() + 0.3
    while time.monotonic() < end:
        freed += region.evict()
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors and freed > 0
    np.testing.assert_array_equal(array, model)
    del array


def test_evict_of_blocks_that_the_kernel_has_in_hand(where):
    """Goal: a block whose pages the kernel does not move at this moment (another CPU has them in a batch) has left all
    the same when evict is back; one that it never moves stays, and does not keep the call for long."""
    run_script("""
from support import shim
if not uffd._core.supports("MOVE") or WHERE.backing == "shared":
    raise SystemExit(0)
engine = uffd.Engine(workers=2, budget_bytes=32 << 20)
r = region(16 * 65536, None, engine=engine, mode="c", block_bytes=65536, readahead_bytes=0)
r.populate()
moves = shim.Rule("MOVE", 3, 4, errno.EBUSY)
assert r.evict() == 16 * 65536 and not r.resident().any() and moves.fired == 4
shim.clear()
r.populate()
moves = shim.Rule("MOVE", 1, -1, errno.EBUSY)
began = time.monotonic()
assert r.evict() == 0 and r.resident().all() and moves.fired >= 16
assert time.monotonic() - began < 10
shim.clear()
assert r.evict() == 16 * 65536
""", 30, where=where, preload=shim.path()).check()


def test_evict_in_a_closed_region(make):
    region = make(SIZE, controlled()[0], block_bytes=SIZE)
    region.close()
    for call in (region.evict, region.discard):
        with pytest.raises(uffd.RegionClosed):
            call()


# ---- discard


def test_discard(made):
    """Goal: what was written and not written back is gone, in memory, waiting or spilled; the provider's bytes are back
    at the next touch."""
    region, store = made
    if region.mode == "r":
        region.populate()
        region.discard((0, 4 * SIZE))
        assert clear(region.resident()) == [0, 1, 2, 3]
        return
    array = rows(region)
    array[:8] = 7
    region.evict((0, 4 * SIZE))
    right = pattern(0, BLOCKS * SIZE).reshape(BLOCKS, SIZE).copy()
    if region.mode == "r+":
        right[:4] = 7  # evict has stored them
    region.discard(array[2:6])
    assert set_of(region.dirty()) == [6, 7] and set_of(region.resident()) == [6, 7]
    assert (array[6:8] == 7).all()
    right[6:8] = 7
    if region.mode == "c":
        right[:2] = 7  # spilled, and not discarded
    np.testing.assert_array_equal(array, right)
    region.discard()
    assert not region.resident().any()
    if region.mode == "r+":
        np.testing.assert_array_equal(store.held.reshape(BLOCKS, SIZE)[:4], right[:4])
        assert store.writes and (store.held.reshape(BLOCKS, SIZE)[6] != 7).any()
    right = store.held.reshape(BLOCKS, SIZE)
    np.testing.assert_array_equal(array, right)
    del array


def test_discard_of_pinned_blocks(made):
    region, _ = made
    region.populate()
    with region.pinned((5 * SIZE, 6 * SIZE)):
        with pytest.raises(ValueError, match=f"{5 * SIZE} is pinned"):
            region.discard((2 * SIZE, 9 * SIZE))
        assert clear(region.resident()) == [2, 3, 4]
    region.discard((2 * SIZE, 9 * SIZE))
    assert clear(region.resident()) == list(range(2, 9))


def test_discard_instead_of_a_flush_that_fails(make):
    """Goal: a region whose store takes nothing any more can be closed, after its writes were given up by name."""
    provider, store = stored(8 * SIZE)
    region = make(None, provider, block_bytes=SIZE, retries=0)
    array = rows(region)
    array[:] = 1
    del array
    store.fail(0, 8 * SIZE, -5)
    with pytest.raises(uffd.ProviderError):
        region.close()
    assert not region.closed
    region.discard()
    region.close()
    assert region.closed
    np.testing.assert_array_equal(store.held, pattern(0, 8 * SIZE))


# ---- under a budget


def test_clean_blocks_are_not_written(make, engine, region_mode):
    """Goal: a workload that only reads writes nothing, to the provider or to a spill file, whatever comes and goes."""
    engine.budget_bytes = BLOCKS * SIZE
    provider, store = stored(4 * BLOCKS * SIZE)
    region = make(None, provider, mode=region_mode, block_bytes=SIZE)
    array = rows(region)
    rng = np.random.default_rng(5)
    right = pattern(0, 4 * BLOCKS * SIZE).reshape(-1, SIZE)
    for _ in range(10):                     # who is slow to take blocks out of the pool brings back more or less
        for block in np.minimum(rng.zipf(1.2, 4000) - 1, 4 * BLOCKS - 1) * 37 % (4 * BLOCKS):
            assert array[block, 5] == right[block, 5]
        np.testing.assert_array_equal(array, right)
        stats = region.stats()
        if stats.rescued:
            break
    assert stats.evicted > BLOCKS and stats.rescued > 0
    assert stats.written_back == 0 and stats.faults_wp == 0 and store.writes == 0
    assert not region.dirty().any()
    del array


def test_rescued_blocks_are_what_they_were(make, engine):
    """Goal: blocks that are touched while they wait for their second chance have their bytes, and are dirty exactly if
    they were written. Method: a store whose writes wait, so that no dirty block becomes clean; what is read goes round
    within the budget's reach, many times."""
    engine.budget_bytes = BLOCKS * SIZE
    provider, store = stored(4 * BLOCKS * SIZE)
    region = make(None, provider, mode="r+", block_bytes=SIZE, readahead_bytes=0)
    array = rows(region)
    model = store.held.reshape(-1, SIZE).copy()
    store.close_gate()
    try:
        written = list(range(0, BLOCKS // 3))
        array[written] += 1
        model[written] += 1
        rng = np.random.default_rng(7)
        for _ in range(12):
            for block in rng.permutation(int(BLOCKS * 1.1)):
                assert array[block, 9] == model[block, 9]
            dirty, resident = region.dirty(), region.resident()
            assert resident[written].all()
            assert set(set_of(dirty)) == set(written)
        assert region.stats().rescued > 10, region.stats()
        assert store.held[9] == pattern(9, 1)[0]
    finally:
        store.open_gate()
    np.testing.assert_array_equal(array, model)
    region.flush()
    np.testing.assert_array_equal(store.held.reshape(-1, SIZE), model)
    del array


def test_dirty_after_evict_and_refill(make, engine):
    """Goal: under pressure, too, the dirty set is what was written and not stored: never less; and the store has every
    byte that is not dirty. Method: writes, then reads that push them out; then each block that is not dirty is compared
    with the store, which the program sees."""
    engine.budget_bytes = BLOCKS * SIZE
    provider, store = stored(4 * BLOCKS * SIZE)
    region = make(None, provider, mode="r+", block_bytes=SIZE)
    array = rows(region)
    model = store.held.reshape(-1, SIZE).copy()
    held = store.held.reshape(-1, SIZE)
    rng = np.random.default_rng(11)
    for _ in range(20):
        for block in rng.integers(0, len(model), 40):
            array[block] += 1
            model[block] += 1
        for block in rng.integers(0, len(model), 60):
            assert array[block, 3] == model[block, 3]
        dirty = region.dirty()
        for block in clear(dirty):
            np.testing.assert_array_equal(held[block], model[block])
    assert region.stats().written_back > 0
    np.testing.assert_array_equal(array, model)
    del array


def test_volatile(make, engine):
    """Goal: what can be computed anew is dropped, not written; a touch has what was written, or the provider's bytes,
    never anything else, and nothing of it is ever stored."""
    engine.budget_bytes = BLOCKS * SIZE
    provider, store = stored(4 * BLOCKS * SIZE)
    region = make(None, provider, block_bytes=SIZE, volatile=True)
    assert region.mode == "c"
    array = rows(region)
    right = pattern(0, 4 * BLOCKS * SIZE).reshape(-1, SIZE)
    array[:] = 7
    kept = {}
    for block in reversed(range(len(array))):  # the last ones are there
        row = array[block].copy()
        kept[block] = bool((row == 7).all())
        assert kept[block] or np.array_equal(row, right[block]), block
    assert 0 < sum(kept.values()) < len(kept)
    stats = region.stats()
    assert stats.evicted > 0 and stats.written_back == 0 and stats.bytes_written == 0 and store.writes == 0
    with pytest.raises(ValueError, match="volatile"):
        make(None, provider, mode="r+", volatile=True)
    del array


def test_volatile_evicted_by_name(make, engine):
    """Goal: evict drops volatile blocks that were written, without writing them anywhere."""
    engine.budget_bytes = None
    provider, _ = stored(BLOCKS * SIZE)
    region = make(None, provider, block_bytes=SIZE, volatile=True, readahead_bytes=0)
    array = rows(region)
    array[:4] = 7
    assert region.evict() == 4 * SIZE
    assert region.stats().written_back == 0
    np.testing.assert_array_equal(array.ravel(), pattern(0, BLOCKS * SIZE))
    del array


# ---- read-only memory


@pytest.mark.parametrize("state", ["missing", "resident", "waiting", "evicted", "in a child"])
def test_a_write_to_read_only_memory(where, state):
    """Goal: mode "r" is read-only memory, as with np.memmap: a write of C code is SIGSEGV, wherever its page is; the
    provider's bytes are never changed."""
    result = run_script("""
state = sys.argv[1]
engine = uffd.Engine(workers=2, budget_bytes=1 << 26)
provider, store = stored(64 * PAGE)
r = region(None, provider, engine=engine, mode="r", block_bytes=PAGE, readahead_bytes=0)
a = r.array()
assert not a.flags.writeable
if state != "missing":
    r.populate()
if state == "waiting":
    engine.budget_bytes = 32 * PAGE
    wait_until(lambda: engine.resident_bytes <= 32 * PAGE, "it does not shrink")
    assert checked(r.address, 0, 64 * PAGE) is None
    block = int(np.flatnonzero(r.resident())[0])
elif state == "evicted":
    assert r.evict() == 64 * PAGE
    assert checked(r.address, 0, 64 * PAGE) is None
    block = 5
else:
    block = 5
def write():
    ctypes.memset(r.address + block * PAGE + 7, 1, 1)
    say("written")
if state == "in a child":
    assert in_child(write) == -signal.SIGSEGV
    assert checked(r.address, 0, 64 * PAGE) is None
    os.kill(os.getpid(), signal.SIGSEGV)
write()
""", 20, where=where, argv=[state])
    assert result.signal == signal.SIGSEGV and "written" not in result.stdout, result.describe()


# ---- older kernels


LACKS = {
    "6.7: no MOVE": ("MOVE",), "6.5: no POISON": ("MOVE", "POISON"), "5.12: no shared MINOR": ("MINOR_SHMEM",),
    "5.18: no shared WP": ("WP_HUGETLBFS_SHMEM",), "5.18 all": ("WP_HUGETLBFS_SHMEM", "MOVE", "POISON"),
    "5.11": ("WP_HUGETLBFS_SHMEM", "MOVE", "POISON", "MINOR_SHMEM"),
}


@pytest.mark.deadline(60)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", LACKS)
def test_older_kernels(where, kernel, mode):
    """Goal: without a feature the bytes are the same, the budget holds and nothing is lost, in memory and in the store;
    dirty is what was written, or more."""
    if where.backing == "shared" and mode != "r" and "MINOR_SHMEM" in LACKS[kernel]:
        pytest.skip("shared pages that were written can't leave memory without CONTINUE (5.14): touches fail")
    bits = 0
    for name in LACKS[kernel]:
        if name not in FEATURES:
            pytest.fail(f"{name} is no feature")
        bits |= FEATURES[name]
    run_script("""
mode = sys.argv[2]
uffd._core.mask(int(sys.argv[1]))
BLOCKS, SIZE = 120, 4 * PAGE
engine = uffd.Engine(workers=2, budget_bytes=40 * SIZE)
provider, store = stored(BLOCKS * SIZE)
r = region(None, provider, engine=engine, mode=mode, block_bytes=SIZE)
a = r.array("u1", (BLOCKS, SIZE))
model = store.held.reshape(BLOCKS, SIZE).copy()
errors, most = [], 0
def work(mine):
    rng = np.random.default_rng(mine)
    for _ in range(150):
        block = int(rng.integers(0, BLOCKS // 3)) * 3 + mine
        if not np.array_equal(a[block], model[block]):
            errors.append(block)
        if mode != "r":
            model[block] += 1
            a[block] += 1
threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(3)]
for thread in threads:
    thread.start()
end = time.monotonic() + 25
while any(thread.is_alive() for thread in threads):
    most = max(most, engine.resident_bytes)
    time.sleep(0.0005)
    assert time.monotonic() < end, f"hangs: {r.stats()}"
assert not errors, errors[:5]
assert most <= 40 * SIZE, most / SIZE
assert r.stats().evicted > 0
assert np.array_equal(a, model)
if mode == "r+":
    r.flush()
    assert np.array_equal(store.held.reshape(BLOCKS, SIZE), model), "flush lies"
    a[3] += 1
    model[3] += 1
    assert r.dirty()[3]
    r.flush()
    assert np.array_equal(store.held.reshape(BLOCKS, SIZE), model), "flush lies"
if mode != "r":
    a[5] += 1
    model[5] += 1
    r.evict()
    assert np.array_equal(a, model)
del a
r.close()
assert mode != "r+" or np.array_equal(store.held.reshape(BLOCKS, SIZE), model)
""", 40, where=where, argv=[bits, mode]).check()


# ---- pages that can't be moved


@pytest.mark.deadline(60)
@pytest.mark.parametrize("mode", MODES)
def test_pages_shared_with_a_child(where, mode):
    """Goal: what a living child shares is evicted, too: the parent keeps within its budget, both have their own bytes,
    and nothing counts as written that was not."""
    run_script("""
mode = sys.argv[1]
BLOCKS, SIZE = 64, 4 * PAGE
engine = uffd.Engine(workers=2, budget_bytes=None)
provider, store = stored(BLOCKS * SIZE)
r = region(None, provider, engine=engine, mode=mode, block_bytes=SIZE, readahead_bytes=0)
a = r.array("u1", (BLOCKS, SIZE))
model = store.held.reshape(BLOCKS, SIZE).copy()
if mode != "r":
    a[:20] += 1
    model[:20] += 1
r.populate()
def child():
    child_model = model.copy()
    assert np.array_equal(a, child_model), "as it was"
    if mode != "r":
        a[10:30] += 3
        child_model[10:30] += 3
    with open("ready", "w"):
        pass
    wait_until(lambda: os.path.exists("done"), "the parent is gone", 25)
    assert np.array_equal(a, child_model), "after the parent's evictions"
pid = os.fork()
if not pid:
    code = 1
    try:
        child()
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(code)
wait_until(lambda: os.path.exists("ready"), "no child")
if mode == "r+":
    r.flush()
engine.budget_bytes = 40 * SIZE
kept = 20 if WHERE.backing == "shared" and mode != "r" else 0   # dirty at the fork: the child reads them from here
try:
    wait_until(lambda: engine.resident_bytes <= 40 * SIZE, "the parent does not shrink")
    for turn in range(3):
        assert np.array_equal(a, model), np.flatnonzero((a != model).any(axis=1))
        if mode != "r":
            a[::7] += 1
            model[::7] += 1
        if turn == 1:
            def gone():                 # the evictor may have some in hand
                r.evict()
                return int(r.resident().sum()) <= kept
            wait_until(gone, f"they stay: {r.stats()}")
finally:
    with open("done", "w"):
        pass
    code = wait_for_child(pid)
assert code == 0, code
assert np.array_equal(a, model)
if mode == "r+":
    r.flush()
    assert np.array_equal(store.held.reshape(BLOCKS, SIZE), model)
""", 45, where=where, argv=[mode]).check()


IO_URING_SETUP, IO_URING_REGISTER = 425, 427


class FixedBuffer:
    """Memory that the kernel holds as a device would: an io_uring's fixed buffer. OSError where there is none."""

    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]

    def __init__(self, address, nbytes):
        self.libc = ctypes.CDLL(None, use_errno=True)
        parameters = ctypes.create_string_buffer(120)
        self.fd = self.libc.syscall(IO_URING_SETUP, 4, parameters)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "io_uring_setup")
        vector = self.Vector(address, nbytes)
        if self.libc.syscall(IO_URING_REGISTER, self.fd, 0, ctypes.byref(vector), 1) < 0:
            number = ctypes.get_errno()
            os.close(self.fd)
            raise OSError(number, "IORING_REGISTER_BUFFERS")

    def close(self):
        self.libc.syscall(IO_URING_REGISTER, self.fd, 1, None, 0)
        os.close(self.fd)


def page_frame(address):
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // PAGE * 8)
        return int.from_bytes(file.read(8), "little") & (1 << 55) - 1


@pytest.mark.parametrize("mode", ["c", "r+"])
@pytest.mark.parametrize("delivery", ["thread", "inline"])
def test_pages_that_a_device_has(engine, mode, delivery):
    """Goal: memory under DMA is not evicted: the program and the device go on using the same page. It is counted, and
    leaves once the device has let go. Method: a fixed buffer of io_uring; the page's frame number (root)."""
    if matrix.missing_feature("MOVE"):
        pytest.skip("the kernel lacks MOVE, which tells of such pages")
    engine.budget_bytes = None
    provider, store = stored(BLOCKS * SIZE)
    with uffd.Region(None, provider, engine=engine, mode=mode, block_bytes=SIZE, delivery=delivery) as region:
        array = rows(region)
        array[:] += 1
        frame = page_frame(region.address + 5 * SIZE)
        try:
            device = FixedBuffer(region.address + 4 * SIZE, 4 * SIZE)
        except OSError as error:
            del array
            pytest.skip(f"no fixed buffers of io_uring: {error}")
        try:
            region.evict()
            engine.budget_bytes = 16 * SIZE
            wait_until(lambda: engine.resident_bytes <= 16 * SIZE, "it does not shrink")
            assert array[::2].sum(dtype="u8") > 0
            assert region.resident()[4:8].all()
            assert page_frame(region.address + 5 * SIZE) == frame
            assert region.stats().evict_busy > 0
            array[5] = 9
        finally:
            device.close()
        assert (array[5] == 9).all()
        region.evict()
        assert not region.resident()[4:8].any()
        assert (array[5] == 9).all()
        right = pattern(0, BLOCKS * SIZE).reshape(BLOCKS, SIZE) + np.uint8(1)
        right[5] = 9
        np.testing.assert_array_equal(array, right)
        del array


# ---- beside failing and slow fills


def test_eviction_beside_fills_that_hang(make, engine):
    """Goal: with a fill that does not come back, all else comes and goes; the hanging one's blocks stay counted."""
    engine.budget_bytes = 32 * SIZE
    provider, control = controlled()
    region = make(128 * SIZE, provider, block_bytes=SIZE, readahead_bytes=0)
    control.close_gate(0, SIZE)
    hanging = threading.Thread(target=library().touch_sum, args=(region.address, 1, 1))
    hanging.start()
    wait_until(lambda: control.gate_waiters, "no fill under way")
    array = rows(region)
    right = pattern(0, 128 * SIZE).reshape(128, SIZE)
    for _ in range(2):
        np.testing.assert_array_equal(array[1:], right[1:])
    assert engine.resident_bytes <= 32 * SIZE
    control.open_gate()
    hanging.join(10)
    assert not hanging.is_alive()
    np.testing.assert_array_equal(array, right)
    del array


def test_poisoned_blocks_are_left_alone(where):
    """Goal: a block whose fill failed is not evicted into a block of zeros: it stays an error until populate repairs
    it."""
    result = run_script("""
engine = uffd.Engine(workers=2, budget_bytes=16 * PAGE)
provider, control = controlled()
control.fail(5 * PAGE, 6 * PAGE, errno.EIO)
r = region(64 * PAGE, provider, engine=engine, block_bytes=PAGE, retries=0, readahead_bytes=0)
assert in_child(lambda: LIB.touch_sum(r.address + 5 * PAGE, 1, 1)) == -signal.SIGBUS
for _ in range(2):
    r.evict()
    assert checked(r.address + 6 * PAGE, 6 * PAGE, 58 * PAGE) is None
control.fail_times = 0
r.populate((5 * PAGE, 6 * PAGE))
assert checked(r.address, 0, 64 * PAGE) is None
control.fail(5 * PAGE, 6 * PAGE, errno.EIO)
r.evict()
say("touch")
LIB.touch_sum(r.address + 5 * PAGE, 1, 1)
say("survived")
""", 20, where=where)
    assert result.signal == signal.SIGBUS and "survived" not in result.stdout, result.describe()
    assert "touch" in result.stdout
