"""Tracking of writes: each page that was written is told, no other is, and what can't be known is an error.

The oracle is a copy: whoever takes the written pages and copies those must end with the array, and between two looks
the pages that differ are exactly those that are told.
"""

import ctypes
import json
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import uffd
from support import matrix
from support.pattern import pattern
from support.scripts import run_everywhere, run_script

PAGE = uffd._core.PAGE_BYTES
SIZE = 4 * PAGE                 # of a block of regions here
FEATURES = uffd._core.FEATURES

pytestmark = pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing is tracked")
KERNELS = {"this kernel": (), "6.6": ("WP_ASYNC",), "6.3": ("WP_ASYNC", "WP_UNPOPULATED")}


@pytest.fixture(params=KERNELS)
def kernel(request):
    """Linux before 6.7 protects synchronously, before 6.4 no holes."""
    for name in KERNELS[request.param] or ("WP_ASYNC",):
        if matrix.missing_feature(name):
            pytest.skip(f"the kernel lacks {name}")
    if KERNELS[request.param] and not matrix.full_mode():
        pytest.skip("synchronous protection needs a full userfaultfd")
    uffd._core.mask(sum(FEATURES[name] for name in KERNELS[request.param]))
    yield request.param
    uffd._core.mask(0)


def pages_of(flags):
    return np.flatnonzero(flags).tolist()


def page_tables_kib():
    return int(Path("/proc/self/status").read_text().partition("VmPTE:")[2].split()[0])


def anonymous(nbytes):
    """Page-aligned private memory of the kernel's own, and what unmaps it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    address = libc.mmap(None, nbytes, 3, 0x22, -1, 0)
    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), np.uint8), libc, address


KINDS = ("zeros", "populated", "heap", "shared memory", "file", "private file")


def memory(kind, folder):
    """A writable array that is none of ours, and is all zeros or all ones."""
    if kind == "zeros":
        return np.zeros(64 * PAGE, np.uint8)
    if kind == "populated":
        return np.ones(700 * PAGE, np.uint8)
    if kind == "heap":
        return np.ones(2 * PAGE + 100, np.uint8)
    if kind == "shared memory":
        fd = os.memfd_create("shared")
        os.truncate(fd, 64 * PAGE)
        shared = mmap.mmap(fd, 64 * PAGE)
        os.close(fd)
        return np.frombuffer(shared, np.uint8)
    (folder / "data").write_bytes(bytes(64 * PAGE))
    return np.memmap(folder / "data", np.uint8, mode="r+" if kind == "file" else "c")


# ---- memory that is not ours


def test_pages_that_came_with_a_huge_page_are_told():
    """Goal: what docs/tracking.md says of large arrays: of a first write no more than its huge page is told, and from
    then on pages. The ranges are plain numbers."""
    huge = 2 << 20
    array = np.frombuffer(mmap.mmap(-1, 4 * huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    at = -array.__array_interface__["data"][0] % huge + huge + 3 * PAGE
    with uffd.track(array) as tracker:
        array[at] = 1
        told = tracker.ranges()
        assert json.loads(json.dumps(told)) == [list(pair) for pair in told]
        (start, stop), = told
        assert at - 3 * PAGE <= start <= at < stop <= at - 3 * PAGE + huge
        for page in (7, 3, 511):
            array[at + (page - 3) * PAGE] += 1
            assert tracker.ranges() == [(at + (page - 3) * PAGE, at + (page - 2) * PAGE)]


@pytest.mark.parametrize("kind", KINDS)
def test_pages_of_any_memory_that_are_written_are_told_and_no_others(kind, kernel, tmp_path):
    array = memory(kind, tmp_path)
    if kernel != "this kernel" and kind.endswith("file"):
        with pytest.raises(uffd.Unavailable, match="no write protection for memory of that kind"):
            uffd.track(array)
        return
    lead = array.__array_interface__["data"][0] % PAGE
    with uffd.track(array) as tracker:
        assert kind == "heap" or not tracker.written().any()
        assert array[::PAGE].sum() >= 0                 # a read is no write
        if kind != "heap":                              # what else lies on its pages is the program's, and is written
            assert not tracker.written().any()
        array[PAGE] = 7
        array[-1] = 8
        expected = sorted({(lead + PAGE) // PAGE, (lead + len(array) - 1) // PAGE})
        assert set(pages_of(tracker.written(reset=False))) >= set(expected)
        got = tracker.written()
        assert set(pages_of(got)) == set(expected) or (kind == "heap" and set(pages_of(got)) >= set(expected))
        assert tracker.page_bytes == PAGE
        assert len(got) == -(-(lead + len(array)) // PAGE)
        if kind != "heap":
            assert not tracker.written().any()
        array[:] = 3
        assert tracker.written().all()
        array[PAGE * 2] = 4
        start, stop = next(row for row in tracker.ranges() if row[0] <= 2 * PAGE < row[1])
        assert 0 <= start <= 2 * PAGE < stop <= len(array)


def test_what_was_dropped_counts_as_written_and_holes_cost_nothing(kernel):
    array, libc, address = anonymous(1 << 30)
    with uffd.track(array) as tracker:
        before = page_tables_kib()
        assert not tracker.written().any()
        assert array[5 * PAGE] == 0                     # the kernel's page of zeros
        assert pages_of(tracker.written()) == []
        array[5 * PAGE] = 1
        array[900 * PAGE] = 1
        assert pages_of(tracker.written()) == [5, 900]
        libc.madvise(address + 900 * PAGE, PAGE, 4)     # MADV_DONTNEED
        assert pages_of(tracker.written(reset=False)) == [900]
        assert array[900 * PAGE] == 0
        assert pages_of(tracker.written()) == [900]
        assert pages_of(tracker.written()) == []
        after = page_tables_kib()
        if kernel == "this kernel":
            assert after - before < 256                 # KiB; with a mark in each hole it were 2,048
        array[:512 * PAGE] = 1
        tracker.written()
    with uffd.track(array[:512 * PAGE]) as tracker:     # all of it is there
        libc.madvise(address, 512 * PAGE, 4)
        assert tracker.written().all()
        assert pages_of(tracker.written()) == []
    libc.munmap(address, 1 << 30)


@pytest.mark.parametrize("how", ["unmapped", "mapped anew", "resized"])
def test_memory_that_went_is_an_error_and_never_clean(how, kernel):
    if how == "resized":
        array = np.zeros(64 * PAGE, np.uint8)
        tracker = uffd.track(array)
        tracker.written()
        array.resize(4096 * PAGE, refcheck=False)
    else:
        array, libc, address = anonymous(64 * PAGE)
        array[:] = 1
        tracker = uffd.track(array)
        tracker.written()
        libc.munmap(address + 8 * PAGE, 4 * PAGE)
        if how == "mapped anew":
            assert libc.mmap(address + 8 * PAGE, 4 * PAGE, 3, 0x100022, -1, 0) == address + 8 * PAGE
    for _ in range(2):
        with pytest.raises(uffd.SnapshotError, match=r"tracking lost: \d+ bytes at 0x.*track it anew"):
            tracker.written()
    tracker.close()


def test_trackers_that_overlap_each_hear_of_all(kernel):
    array = np.zeros(64 * PAGE + PAGE, np.uint8)
    array = array[-array.__array_interface__["data"][0] % PAGE:][:64 * PAGE]
    with uffd.track(array) as whole, uffd.track(array[:32 * PAGE]) as left:
        array[10 * PAGE] = 1
        array[40 * PAGE] = 1
        assert pages_of(left.written()) == [10]
        with uffd.track(array[8 * PAGE:48 * PAGE]) as middle:
            assert pages_of(whole.written()) == [10, 40]
            array[12 * PAGE] = 2
            assert pages_of(middle.written()) == [4]
        assert pages_of(whole.written()) == [12]
        array[13 * PAGE] = 1
        assert pages_of(left.written()) == [12, 13]
    with uffd.track(array) as again:
        array[1 * PAGE] = 1
        assert pages_of(again.written()) == [1]


def test_what_cannot_be_tracked_is_refused_by_name(make):
    for error, thing, words in (
            (TypeError, np.array([{}]), "Python objects"),
            (ValueError, np.frombuffer(b"abc" * 9999, np.uint8), "read-only"),
            (ValueError, np.empty(0), "empty"),
            (TypeError, 5, "memoryview")):
        with pytest.raises(error, match=words):
            uffd.track(thing)
    with pytest.raises(ValueError, match="read-only"):
        uffd.track(make(SIZE, mode="r"))
    region = make(4 * SIZE)
    trackers = [uffd.track(region) for _ in range(8)]
    with pytest.raises(ValueError, match="as many trackers"):
        uffd.track(region)
    for tracker in trackers:
        tracker.close()
        tracker.close()
    with pytest.raises(ValueError, match="closed"):
        trackers[0].written()
    libc_array, libc, address = anonymous(4 * PAGE)
    way = matrix.opened()[0]
    fd, _, _ = uffd._core.try_open(way, True)
    register = np.array([address, 4 * PAGE, 1, 0], np.uint64)
    assert libc.ioctl(fd, ctypes.c_ulong(uffd._core.IOCTLS["REGISTER"]), ctypes.c_void_p(register.ctypes.data)) == 0
    with pytest.raises(ValueError, match="another userfaultfd"):
        uffd.track(libc_array)
    ctypes.CDLL(None).close(fd)
    libc.munmap(address, 4 * PAGE)


# ---- regions


@pytest.fixture
def region(make, engine):
    engine.budget_bytes = None
    provider = uffd.providers.Memory(pattern(0, 64 * SIZE))
    return make(None, provider, mode="c", block_bytes=SIZE, readahead_bytes=0)


def test_regions_are_exact_to_the_page_whatever_state_a_block_is_in(region):
    array = region.array()
    array[:8 * SIZE:PAGE].sum()                         # clean
    array[SIZE] = 1                                     # dirty, all its pages writable
    array[8 * SIZE:10 * SIZE] += 1
    region.evict((8 * SIZE, 10 * SIZE))                 # spilled, out
    array[10 * SIZE] += 1
    with uffd.track(region) as tracker, uffd.track(array[SIZE + 5:SIZE + 2 * PAGE]) as part:
        assert not tracker.written().any()
        writes = [0, SIZE + PAGE + 1, 8 * SIZE + 3 * PAGE, 10 * SIZE + PAGE, 30 * SIZE + 2 * PAGE]
        for at in writes:
            array[at] += 1
        assert pages_of(tracker.written()) == [at // PAGE for at in writes]
        assert part.ranges() == [(PAGE - 5, 2 * PAGE - 5)]
        assert not tracker.written().any()
        assert not part.written().any()
        array[SIZE + PAGE + 1] += 1                     # once more, after the reset
        array[20 * SIZE + 7]                            # a read of a missing block
        assert tracker.ranges() == [(SIZE + PAGE, SIZE + 2 * PAGE)]
        array[30 * SIZE + 2 * PAGE] += 1
        region.evict()                                  # its mark stays while it is out, and when it is back
        assert array[30 * SIZE + PAGE] == pattern(30 * SIZE + PAGE, 1)[0]
        assert pages_of(tracker.written()) == [(30 * SIZE + 2 * PAGE) // PAGE]
        region.discard((30 * SIZE, 31 * SIZE))          # reverts: its bytes are others now
        region.discard((20 * SIZE, 21 * SIZE))          # was clean: the same bytes
        assert pages_of(tracker.written()) == list(range(30 * SIZE // PAGE, 31 * SIZE // PAGE))
    array[SIZE] = 9
    assert region.dirty()[1]


def test_a_copy_kept_by_the_told_pages_is_the_array_after_random_work(region, engine):
    rng = np.random.default_rng(11)
    array = region.array()
    copy = pattern(0, 64 * SIZE).copy()
    engine.budget_bytes = uffd._core.least_budget(engine._threads) + 24 * SIZE
    with uffd.track(region) as tracker:
        for _ in range(60):
            before = array.copy()
            for _ in range(rng.integers(1, 12)):
                at, action = int(rng.integers(0, 64 * SIZE)), rng.integers(0, 8)
                if action < 5:
                    array[at:at + int(rng.integers(1, 2 * PAGE))] += 1
                elif action == 5:
                    region.evict((at, min(64 * SIZE, at + SIZE)))
                elif action == 6:
                    region.discard((at, at + 1))
                else:
                    array[at]
            told = tracker.written()
            differs = (array != before).reshape(-1, PAGE).any(1)
            assert not (differs & ~told).any()
            copy.reshape(-1, PAGE)[told] = array.reshape(-1, PAGE)[told]
            assert (copy == array).all()


def test_nothing_is_lost_to_a_taker_beside_writers(region, engine, kernel):
    """The invariant of every copy that is made in rounds: after the last round it is the array."""
    engine.budget_bytes = uffd._core.least_budget(engine._threads) + 40 * SIZE
    array = region.array("<u8")
    foreign = np.zeros(64 * SIZE // 8, "<u8")
    stop = threading.Event()

    def write(of, seed):
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            at = int(rng.integers(0, len(of) - 1000))
            np.add(of[at:at + 1000], 1, out=of[at:at + 1000])

    arrays = [array, foreign]
    trackers = [uffd.track(of) for of in arrays]
    copies = [of.copy() for of in arrays]
    for tracker, of, copy in zip(trackers, arrays, copies):
        for start, stop_at in tracker.ranges():
            copy.view("u1")[start:stop_at] = of.view("u1")[start:stop_at]
    threads = [threading.Thread(target=write, args=(of, k)) for of in arrays for k in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        if turn == 59:
            stop.set()
            for thread in threads:
                thread.join()
        for tracker, of, copy in zip(trackers, arrays, copies):
            for start, end in tracker.ranges():
                copy.view("u1")[start:end] = of.view("u1")[start:end]
    for of, copy, tracker in zip(arrays, copies, trackers):
        assert (of == copy).all()
        tracker.close()


def test_closed_regions_end_their_trackers(make):
    region = make(4 * SIZE, uffd.providers.Zero(), mode="c")
    tracker = uffd.track(region)
    tracker._array = None
    region.close()
    with pytest.raises(uffd.RegionClosed, match="tracker has ended"):
        tracker.written()
    tracker.close()


FORK = """
import itertools
where = itertools.count()
uffd._core.mode()
uffd._core.mask(sum(uffd._core.FEATURES[name] for name in sys.argv[1:]))
r = region(16 * BLOCK, providers.Memory(pattern(0, 16 * BLOCK)), mode="c")
array = r.array()
array[:4 * BLOCK] += 1
heap = np.zeros(16 * PAGE, "u1")
trackers = [uffd.track(r)]
if uffd._core.supports("WP_ASYNC") or uffd._core.mode()[0] == "full" and uffd._core.supports("EXACT_ADDRESS"):
    trackers.append(uffd.track(heap))
array[PAGE] += 1
def child():
    array[0] += 1
    array[9 * BLOCK] += 1
    assert np.flatnonzero(trackers[0].written()).tolist() == [0, 1, 9 * BLOCK // PAGE]
    array[BLOCK] += 1
    assert np.flatnonzero(trackers[0].written()).tolist() == [BLOCK // PAGE]
    for tracker in trackers[1:]:
        try:
            tracker.written()
        except uffd.SnapshotError as error:
            assert "forked child" in str(error)
        else:
            raise AssertionError("clean, in a child that tracks nothing")
        tracker.close()
    if len(trackers) > 1:
        with uffd.track(heap) as again:
            heap[0] = 2
            assert again.written().any()
    trackers[0].close()
    array[3 * BLOCK] += 1
assert in_child(child) == 0
array[2 * BLOCK + PAGE] += 1
assert np.flatnonzero(trackers[0].written()).tolist() == [1, 2 * BLOCK // PAGE + 1]
for tracker in trackers[1:]:
    tracker.written()
    heap[5 * PAGE] = 1
    assert tracker.written().any()
"""


@pytest.mark.parametrize("lacking", KERNELS.values(), ids=KERNELS)
def test_a_forked_child_tracks_its_copy_of_a_region_and_nothing_else(lacking):
    run_script(FORK, argv=lacking).check()


PINNED = """
r = region(16 * BLOCK, providers.Memory(pattern(0, 16 * BLOCK)), mode="c")
array = r.array()
array[:4 * BLOCK] += 1
with uffd.track(r) as tracker:
    path = tempfile.TemporaryFile()
    path.write(bytes(BLOCK))
    with r.pinned((BLOCK, 3 * BLOCK)):
        for _ in range(3):
            path.seek(0)
            assert path.readinto(array[BLOCK + PAGE:BLOCK + 3 * PAGE].data) == 2 * PAGE
            told = tracker.written()
            assert told[BLOCK // PAGE + 1:BLOCK // PAGE + 3].all()
            assert not told[:BLOCK // PAGE].any() and not told[3 * BLOCK // PAGE:].any()
    tracker.written()
    assert not tracker.written().any()
    array[BLOCK] += 1
    assert np.flatnonzero(tracker.written()).tolist() == [BLOCK // PAGE]
if uffd._core.supports("WP_ASYNC"):
    heap = np.zeros(64 * PAGE, "u1")
    with uffd.track(heap) as tracker:
        path.seek(0)
        assert path.readinto(heap[:4 * PAGE].data) == 4 * PAGE      # the kernel writes there, as ever
        assert tracker.written()[:4].all()
"""


def test_the_kernels_own_writes_are_seen_and_work_in_every_mode():
    for result in run_everywhere(PINNED) + run_everywhere(PINNED, user_mode=True):
        result.check()
