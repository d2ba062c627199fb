"""pinned() and chunks(): memory that any syscall may use, an array in pieces that fit."""

import errno
import os
import threading

import numpy as np
import pytest
import uffd
from support.native import controlled
from support.pattern import pattern
from support.scripts import run_script

PAGE = uffd._core.PAGE_BYTES
BLOCK = 65536


def test_pinned_populates_what_it_names(make):
    region = make(16 * BLOCK, controlled()[0], readahead_bytes=0)
    array = region.array()
    with uffd.pinned(array[2 * BLOCK + 1:4 * BLOCK]):
        assert np.flatnonzero(region.resident()).tolist() == [2, 3]
    with region.pinned((8 * BLOCK, 8 * BLOCK + 1)):
        assert np.flatnonzero(region.resident()).tolist() == [2, 3, 8]
    with region.pinned():
        assert region.resident().all()
    assert region.stats().blocks_demand == 0
    del array


def test_pinned_is_safe_in_syscalls(make, tmp_path):
    """Goal: write(2) from, and readinto of, a pinned view work in each delivery."""
    region = make(16 * BLOCK, controlled()[0])
    array = region.array()
    path = tmp_path / "out"
    with uffd.pinned(array), open(path, "wb", 0) as file:
        assert file.write(array) == 16 * BLOCK
    assert path.read_bytes() == pattern(0, 16 * BLOCK).tobytes()
    path.write_bytes(b"x" * BLOCK)
    with uffd.pinned(array[BLOCK:2 * BLOCK]) as view, open(path, "rb", 0) as file:
        assert view is None or np.shares_memory(view, array)
        assert file.readinto(array[BLOCK:2 * BLOCK]) == BLOCK
    assert (array[BLOCK:2 * BLOCK] == ord("x")).all()
    assert region.dirty()[1]
    del array, view


def test_pinned_in_user_mode_readinto(where):
    """Goal: without privilege, too, a pinned view takes a readinto, and the blocks count as dirty then."""
    run_script("""
        import os
        provider, control = controlled()
        r = region(16 * BLOCK, provider, readahead_bytes=0)
        a = r.array()
        with open("data", "wb") as file:
            file.write(b"x" * (3 * BLOCK))
        with uffd.pinned(a[BLOCK:4 * BLOCK]), open("data", "rb", 0) as file:
            assert file.readinto(a[BLOCK:4 * BLOCK]) == 3 * BLOCK
        assert (a[BLOCK:4 * BLOCK] == ord("x")).all()
        assert r.dirty()[1:4].all() and not r.dirty()[4:].any()
        assert checked(r.address + 4 * BLOCK, 4 * BLOCK, 12 * BLOCK) is None
    """, where=where, user_mode=True).check()


def test_nested_and_concurrent_pins(make):
    array = make(8 * BLOCK, controlled()[0]).array()

    def pin_often():
        for start in range(0, 7 * BLOCK, BLOCK // 2):
            with uffd.pinned(array[start:start + BLOCK]):
                pass

    threads = [threading.Thread(target=pin_often) for _ in range(4)]
    with uffd.pinned(array), uffd.pinned(array[5:10]), uffd.pinned(array):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(array, pattern(0, 8 * BLOCK))
    del array


def test_pinned_raises_what_the_provider_answers(make):
    provider, control = controlled()
    control.fail(2 * BLOCK, 3 * BLOCK, errno.EIO)
    array = make(8 * BLOCK, provider, retries=1, readahead_bytes=0).array()
    with pytest.raises(uffd.ProviderError) as caught:
        with uffd.pinned(array):
            pytest.fail("entered with a block that could not be filled")
    assert caught.value.errno == errno.EIO and caught.value.offset == 2 * BLOCK
    with uffd.pinned(array[:2 * BLOCK]):
        pass
    del array


def test_pinned_refuses_foreign_memory():
    with pytest.raises(ValueError):
        with uffd.pinned(np.zeros(4)):
            pass


def test_pinned_keeps_the_programs_exception(make):
    array = make(BLOCK, controlled()[0]).array()
    with pytest.raises(KeyError):
        with uffd.pinned(array):
            raise KeyError("mine")
    del array


@pytest.mark.parametrize("nbytes", [None, 1, 3 * BLOCK, 64 * BLOCK, 1 << 40])
def test_chunks_cover_the_array(make, nbytes):
    """Goal: pieces along axis 0, in order, no copy, whole array; each is resident while it is worked on."""
    region = make(32 * BLOCK, controlled()[0], readahead_bytes=0)
    array = region.array("<u8", (32 * BLOCK // 512, 64))
    start = 0
    for piece in uffd.chunks(array, nbytes):
        assert piece.shape[1:] == (64,) and len(piece) >= 1
        assert np.shares_memory(piece, array)
        assert piece.ctypes.data == array[start:].ctypes.data
        if nbytes is not None:
            assert piece.nbytes <= max(nbytes, 512)
        first, last = start * 512 // BLOCK, ((start + len(piece)) * 512 - 1) // BLOCK
        assert region.resident()[first:last + 1].all()
        start += len(piece)
        if nbytes == 1 and start > 200:
            break
    else:
        assert start == len(array)
    del array, piece


def test_chunks_prefetches_the_next_piece(make):
    """Goal: while one piece is worked on, the next one is on its way, not more than that."""
    region = make(64 * BLOCK, controlled()[0], readahead_bytes=0)
    array = region.array("u1", (64, BLOCK))
    pieces = uffd.chunks(array, 4 * BLOCK)
    next(pieces)
    deadline = threading.Event()
    for _ in range(500):
        if region.resident()[4:8].all():
            break
        deadline.wait(0.01)
    assert np.flatnonzero(region.resident()).tolist() == list(range(8))
    pieces.close()
    assert region.stats().blocks_demand == 0
    del array, pieces


def test_chunks_can_be_written(make):
    array = make(16 * BLOCK, controlled()[0]).array("<u8")
    right = pattern(0, 16 * BLOCK).view("<u8") + np.uint64(1)
    for piece in uffd.chunks(array, 3 * BLOCK):
        piece += np.uint64(1)
    np.testing.assert_array_equal(array, right)
    del array, piece


def test_chunks_of_odd_arrays(make):
    region = make(16 * BLOCK, controlled()[0])
    assert [len(piece) for piece in uffd.chunks(region.array("u1", (0, 5)))] in ([], [0])
    assert [piece.shape for piece in uffd.chunks(region.array("u1", ()))] == [()]
    with pytest.raises(ValueError):
        list(uffd.chunks(np.zeros(5)))
    for nbytes in (0, -1):
        with pytest.raises(ValueError):
            list(uffd.chunks(region.array(), nbytes))
    view = region.array("u1", (256, 16 * BLOCK // 256))[10:200:3]
    np.testing.assert_array_equal(np.concatenate(list(uffd.chunks(view, 3 * BLOCK))), view)
    del view


def test_chunks_error_is_raised_at_its_piece(make):
    provider, control = controlled()
    control.fail(9 * BLOCK, 10 * BLOCK, errno.EIO)
    array = make(16 * BLOCK, provider, retries=0, readahead_bytes=0).array()
    seen = 0
    with pytest.raises(uffd.ProviderError):
        for piece in uffd.chunks(array, 4 * BLOCK):
            np.testing.assert_array_equal(piece, pattern(seen, len(piece)))
            seen += len(piece)
    assert seen == 8 * BLOCK
    del array, piece


def test_pinned_memory_in_a_pipe(make):
    """Goal: a syscall that blocks half-way on a pinned view goes on where it stopped."""
    array = make(32 * BLOCK, controlled()[0]).array()
    reader, writer = os.pipe()
    received = bytearray()

    def drain():
        while piece := os.read(reader, 100000):
            received.extend(piece)

    thread = threading.Thread(target=drain)
    thread.start()
    with uffd.pinned(array):
        view, done = memoryview(array), 0
        while done < len(view):
            done += os.write(writer, view[done:])
        view.release()
    os.close(writer)
    thread.join()
    os.close(reader)
    assert bytes(received) == pattern(0, 32 * BLOCK).tobytes()
    del array, view


def test_pinned_marks_no_other_block_as_written(make):
    """Goal: where pinning for the kernel's writes means un-protecting, only the view's own blocks are."""
    region = make(64 * BLOCK, controlled()[0])
    array = region.array()
    region.populate()
    with uffd.pinned(array[2 * BLOCK:5 * BLOCK]):
        assert set(np.flatnonzero(region.dirty())) <= {2, 3, 4}
    del array
