"""The fallback's regions, which are filled whole when they are made: their bytes, their life, their errors.

The core answers that no userfaultfd can be had, in this process; who gets the fallback is tested in test_fallback.py.
`make test` also runs other files in this mode.
"""

import errno
import io
import os
import threading

import numpy as np
import pytest
import uffd
from support import fallback, leaks
from support.native import controlled
from support.pattern import pattern
from uffd import providers

BLOCK = 65536
PAGE = uffd._core.PAGE_BYTES
NBYTES = 20 * BLOCK + 777


@pytest.fixture(autouse=True)
def no_userfaultfd(monkeypatch):
    yield from fallback.ask_for_it(monkeypatch)


# What providers give


def made_memory(tmp_path, data):
    return providers.Memory(data)


def made_file(tmp_path, data):
    (tmp_path / "file").write_bytes(b"x" * 13 + data.tobytes())
    return providers.File(tmp_path / "file", 13)


def made_direct_file(tmp_path, data):
    (tmp_path / "file").write_bytes(data.tobytes())
    try:
        return providers.File(tmp_path / "file", direct=True)
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")


def made_frame(tmp_path, data):
    import blosc2

    path = tmp_path / "frame.b2frame"
    schunk = blosc2.SChunk(chunksize=3 * BLOCK, data=data, contiguous=True, urlpath=str(path), cparams={"typesize": 1})
    assert schunk.nbytes == len(data)
    return providers.Blosc2File(path)


def made_native(tmp_path, data):
    return controlled()[0]


MAKERS = [made_memory, made_file, made_direct_file, made_frame, made_native]


@pytest.mark.keeps("the blosc2 package keeps threads of its own")
@pytest.mark.parametrize("nbytes", [NBYTES, 3 * BLOCK, 100])
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__[5:])
def test_every_provider_gives_its_bytes(tmp_path, maker, nbytes):
    """Goal: the same bytes as by faults, whatever the provider, also where its end is no multiple of anything."""
    if maker is made_frame:
        pytest.importorskip("blosc2")
    with uffd.Region(nbytes, maker(tmp_path, pattern(0, NBYTES).copy())) as region:
        np.testing.assert_array_equal(region.array(), pattern(0, nbytes))
        assert region.nbytes == nbytes


def test_zeros():
    with uffd.Region(NBYTES, providers.Zero()) as region:
        assert not region.array().any()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["f8", "M8[s]", "c16", [("a", "u1"), ("b", ">i4")]])
def test_memory_of_any_dtype_and_order(dtype, order):
    source = np.array(pattern(0, 960).view(np.uint8)).view("u1")
    source = np.frombuffer(source.tobytes()[:np.dtype(dtype).itemsize * 12], dtype).reshape(3, 4).copy(order)
    array = uffd.from_provider(providers.Memory(source), (3, 4), dtype, order=order)
    assert array.tobytes() == source.tobytes()


@pytest.mark.keeps("the blosc2 package keeps threads of its own")
@pytest.mark.parametrize("shape, chunks", [((1000,), (300,)), ((70, 90), (32, 40)), ((7, 8, 9), (3, 8, 4)), ((), None)])
def test_b2nd_arrays_of_any_shape(tmp_path, shape, chunks):
    """Goal: chunks that are no rows come out in C order, and `open` gives the array."""
    blosc2 = pytest.importorskip("blosc2")
    source = np.arange(int(np.prod(shape)), dtype="i4").reshape(shape) + 1
    path = tmp_path / "a.b2nd"
    blosc2.asarray(source, urlpath=str(path), mode="w", **({"chunks": chunks} if chunks else {}))
    array = uffd.open(path)
    np.testing.assert_array_equal(array, source)
    assert isinstance(uffd.region_of(array), uffd.Region)


@pytest.mark.keeps("the blosc2 package keeps threads of its own")
def test_open_and_pack(tmp_path):
    pytest.importorskip("blosc2")
    source = np.arange(200_000, dtype="f8").reshape(400, 500)
    np.save(tmp_path / "a.npy", source)
    uffd.pack(tmp_path / "a.npy", tmp_path / "a.b2frame")
    for name in ("a.npy", "a.b2frame"):
        np.testing.assert_array_equal(uffd.open(tmp_path / name, mode="r"), source)


# Arrays


def test_writes_are_private():
    """Goal: mode c; neither the source nor another region sees a write, nor the parent that of a forked child."""
    source = pattern(0, NBYTES).copy()
    provider = providers.Memory(source)
    with uffd.Region(None, provider) as one, uffd.Region(None, provider) as other:
        array = one.array()
        array[:BLOCK] = 1
        np.testing.assert_array_equal(other.array(), pattern(0, NBYTES))
        np.testing.assert_array_equal(source, pattern(0, NBYTES))
        pid = os.fork()
        if not pid:
            array[:] = 9
            os._exit(0)
        os.waitpid(pid, 0)
        assert array[0] == 1
        assert one.dirty().all()
        del array


def test_read_only_mode():
    with uffd.Region(NBYTES, providers.Zero(), mode="r") as region:
        array = region.array()
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError):
            array.flags.writeable = True
        assert not region.dirty().any()
        del array


def test_arrays_and_their_region():
    with uffd.Region(NBYTES, providers.Memory(pattern(0, NBYTES).copy()), name="here") as region:
        array = region.array("<u4", (8, 100), offset=40, order="F")
        expected = np.ndarray((8, 100), "<u4", buffer=pattern(0, NBYTES).tobytes(), offset=40, order="F")
        np.testing.assert_array_equal(array, expected)
        assert type(array) is np.ndarray
        assert array.flags.f_contiguous
        assert region.address % PAGE == 0
        for view in (array, array[2:], array.T[3], memoryview(array)):
            assert uffd.region_of(view) is region
        for shape, offset in (((NBYTES,), 1), ((-1,), 0)):
            with pytest.raises((ValueError, TypeError)):
                region.array("u1", shape, offset=offset)
        with pytest.raises(TypeError, match="objects"):
            region.array(object)
        del array, view
    with pytest.raises(ValueError, match="not in an open"):
        uffd.region_of(np.zeros(3))


def test_what_names_blocks_is_checked_and_does_nothing(tmp_path):
    """Goal: populate, prefetch, pinned and chunks return at once, with numpy's own errors for keys."""
    with uffd.Region(NBYTES, providers.Memory(pattern(0, NBYTES).copy())) as region:
        array = region.array("u1", (20, BLOCK))
        for call in (uffd.populate, uffd.prefetch):
            call(array), call(array, [3, 1]), call(array, (..., 5))
            with pytest.raises(IndexError):
                call(array, 20)
        uffd.prefetch(array).wait(0)
        assert uffd.prefetch(array, 3).done()
        region.populate((0, 5), timeout_s=0)
        region.prefetch().cancel()
        with pytest.raises(ValueError):
            region.populate((0, NBYTES + 1))
        with uffd.pinned(array[3:]) as view, region.pinned((5, 6)), open(tmp_path / "f", "wb") as file:
            file.write(view)
        assert (tmp_path / "f").stat().st_size == 17 * BLOCK
        assert region.resident().tolist() == [True] * 21
        pieces = [piece.copy() for piece in uffd.chunks(array, 3 * BLOCK)]
        np.testing.assert_array_equal(np.concatenate(pieces), array)
        del array, view


# Life


def test_close_and_arrays_in_use():
    region = uffd.Region(NBYTES, providers.Zero(), name="held")
    array = region.array()[5:]
    for close in (region.close, region.engine.close):
        with pytest.raises(BufferError, match=r"held|in use"):
            close()
    assert (region.exports, region.closed) == (1, False)
    address = region.address
    del array
    region.close()
    region.close()
    assert leaks.mapping_of(address) is None
    for call in (region.array, region.populate, region.resident, region.stats):
        with pytest.raises(uffd.RegionClosed, match="held"):
            call()
    region.engine.close()
    region.engine.close()
    assert region.engine.closed


def test_leaving_waits_for_the_last_array():
    """Goal: the block's own exception is never hidden; the memory goes with the last view, by whatever name."""
    with pytest.raises(ZeroDivisionError):
        with uffd.Region(NBYTES, providers.Memory(pattern(0, NBYTES).copy())) as region:
            view = region.array("u1", (3, 5))[1:].T
            raise ZeroDivisionError
    assert region.closed
    with pytest.raises(uffd.RegionClosed):
        region.array()
    address = region.address
    assert view[0, 0] == pattern(0, NBYTES)[5]
    assert leaks.mapping_of(address)
    del view
    assert leaks.mapping_of(address) is None


def test_an_array_keeps_region_and_engine():
    engine = uffd.Engine()
    array = uffd.from_provider(providers.Memory(pattern(0, NBYTES).copy()), NBYTES, "u1", engine=engine)
    address = array.ctypes.data
    with engine:
        del engine
    np.testing.assert_array_equal(array, pattern(0, NBYTES))
    del array
    assert leaks.mapping_of(address) is None


def test_many_threads_make_and_drop_arrays():
    """Goal: the count of arrays is right whoever drops them. Method: threads; the region is left in the middle."""
    region = uffd.Region(NBYTES, providers.Zero())
    address, start = region.address, threading.Barrier(5)

    def work():
        held = [region.array() for _ in range(50)]
        start.wait()
        while held:
            held.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    start.wait()
    region.__exit__()
    for thread in threads:
        thread.join()
    assert region.exports == 0
    assert leaks.mapping_of(address) is None


def test_stats():
    provider, control = controlled()
    control.fail(BLOCK, BLOCK + 1, errno.EIO, times=3)  # the first run, then two tries of the block
    with uffd.Engine() as engine:
        with uffd.Region(NBYTES, provider, engine=engine) as region:
            stats = region.stats()
            assert (stats.blocks_prefetch, stats.bytes_filled) == (21, NBYTES)
            assert (stats.errors, stats.retries) == (3, 2)
            assert stats.fill.n > 0
            assert stats.as_dict()["fill"]["n"] == stats.fill.n
            assert engine.stats() == stats
        assert engine.stats() == stats


# Errors


def test_a_block_that_fails_is_named():
    """Goal: ProviderError for the first block that can't be had, when the region is made; nothing is left of it."""
    provider, control = controlled()
    control.fail(5 * BLOCK + 1, 5 * BLOCK + 2, errno.ENOSPC)
    with pytest.raises(uffd.ProviderError, match="after 3 tries: No space left") as info:
        uffd.Region(NBYTES, provider, name="bad", retries=2)
    error = info.value
    assert (error.errno, error.region, error.offset, error.nbytes, error.tries, error.provider_traceback) == \
        (errno.ENOSPC, "bad", 5 * BLOCK, BLOCK, 3, None)


def test_tries_end_with_the_time():
    provider, control = controlled()
    control.fail(0, NBYTES, errno.EIO)
    with pytest.raises(uffd.ProviderError) as info:
        uffd.Region(NBYTES, provider, retries=1000, timeout_s=0.2)
    assert 1 < info.value.tries < 20


def test_a_file_that_has_become_shorter(tmp_path):
    provider = made_file(tmp_path, pattern(0, NBYTES))
    os.truncate(tmp_path / "file", NBYTES // 2)
    with pytest.raises(uffd.ProviderError) as info:
        uffd.Region(None, provider, retries=0)
    assert info.value.errno == errno.ENODATA


@pytest.mark.keeps("the blosc2 package keeps threads of its own")
def test_a_damaged_frame(tmp_path):
    pytest.importorskip("blosc2")
    provider = made_frame(tmp_path, np.random.default_rng(1).integers(0, 255, NBYTES, dtype="u1"))
    path = tmp_path / "frame.b2frame"
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(b"\xff" * (path.stat().st_size // 3))
    with pytest.raises((uffd.ProviderError, OSError)):
        uffd.Region(None, provider, retries=0)


# Providers in Python


def fill_pattern(offset, out):
    out[:] = pattern(offset, len(out))


class Pattern(uffd.Provider):
    nbytes = NBYTES

    def __init__(self):
        self.calls = []  # the copy that is opened shares it

    def open(self):
        self.file = io.BytesIO()
        self.calls.append("open")

    def read(self, offset, out):
        assert not self.file.closed
        assert out.flags.writeable
        assert out.flags.c_contiguous
        assert out.ctypes.data % PAGE == 0
        assert offset + len(out) <= NBYTES
        self.calls.append((offset, len(out)))
        out[:] = pattern(offset, len(out))

    def close(self):
        self.file.close()
        self.calls.append("close")


def test_a_function_is_a_provider():
    assert (uffd.from_provider(lambda offset, out: out.fill(7), (100, 1000), "u1") == 7).all()
    np.testing.assert_array_equal(uffd.from_provider(fill_pattern, NBYTES, "u1"), pattern(0, NBYTES))


def test_a_provider_is_opened_read_and_closed():
    """Goal: open once, all bytes once, close; the instance stays as it was, so that its region pickles."""
    provider = Pattern()
    with uffd.Region(None, provider) as region:
        np.testing.assert_array_equal(region.array(), pattern(0, NBYTES))
        first, *reads, last = provider.calls
        assert (first, last) == ("open", "close")
        assert sum(nbytes for _, nbytes in reads) == NBYTES
        assert not hasattr(provider, "file")


def test_a_size_known_after_open_and_close_after_a_failure():
    class Sized(Pattern):
        nbytes = None

        def open(self):
            super().open()
            self.nbytes = NBYTES - 5

    with uffd.Region(None, Sized()) as region:
        assert region.nbytes == NBYTES - 5

    class Fails(Pattern):
        def read(self, offset, out):
            raise OSError(errno.ENOTCONN, "the server is away")

    provider = Fails()
    with pytest.raises(uffd.ProviderError, match="the server is away") as info:
        uffd.Region(None, provider, retries=1)
    assert info.value.errno == errno.ENOTCONN
    assert "in read" in info.value.provider_traceback
    assert provider.calls[-1] == "close"


def short(offset, out):
    return len(out) - 1


def long(offset, out):
    out[:] = 1
    return len(out) + 1


def returns_data(offset, out):
    return b"data"


def leaves_half(offset, out):
    out[:len(out) // 2] = 1


def raises(offset, out):
    raise KeyError("no such row")


@pytest.mark.parametrize("function, word", [(short, "short fill"), (long, "wrong size"), (returns_data, "wrong type"),
                                            (leaves_half, "not filled whole"), (raises, "KeyError: 'no such row'")])
def test_each_mistake_has_its_message(function, word):
    with pytest.raises(uffd.ProviderError, match=word) as info:
        uffd.Region(NBYTES, function, retries=0)
    assert info.value.errno == errno.EIO
    assert info.value.offset == 0
    assert (info.value.provider_traceback is not None) == (function is raises)


def test_what_fails_once_is_tried_again():
    failures = [RuntimeError("once"), ValueError("twice")]

    def flaky(offset, out):
        if failures and offset >= 3 * BLOCK:
            raise failures.pop()
        out[:] = pattern(offset, len(out))

    with uffd.Region(NBYTES, flaky) as region:
        np.testing.assert_array_equal(region.array(), pattern(0, NBYTES))
        assert region.stats().errors == 2


def test_out_is_dead_after_the_call():
    """Goal: a provider that keeps `out` and writes into it later changes nothing."""
    kept = []

    def keeps(offset, out):
        out[:] = pattern(offset, len(out))
        kept.append(out[3:])

    with uffd.Region(NBYTES, keeps) as region:
        for view in kept:
            view[:] = 0
        np.testing.assert_array_equal(region.array(), pattern(0, NBYTES))
        kept.clear()
        del view


class Offers(Pattern):
    def read(self, offset, out):
        super().read(offset, out)
        if offset == 0:
            self.calls.append(self.offer(8 * BLOCK, pattern(8 * BLOCK, NBYTES - 8 * BLOCK)))


def test_what_is_offered_is_not_asked_for():
    provider = Offers()
    with uffd.Region(None, provider) as region:
        np.testing.assert_array_equal(region.array(), pattern(0, NBYTES))
    assert True in provider.calls
    assert max(call[0] for call in provider.calls if isinstance(call, tuple)) < 8 * BLOCK


class Many(uffd.Provider):
    nbytes = NBYTES

    def read_many(self, requests):
        for offset, out in requests:
            out[:] = pattern(offset, len(out))


class Concurrent(uffd.Provider):
    nbytes, concurrency = 40 * BLOCK * 8, 3

    def __init__(self):
        self.together = threading.Barrier(2)  # a single thread would wait for ever

    def __copy__(self):
        return self

    def read(self, offset, out):
        if offset == 0 or offset == 8 * BLOCK:
            self.together.wait(20)
        out[:] = pattern(offset, len(out))


@pytest.mark.parametrize("kind", [Many, Concurrent])
def test_requests_come_together(kind):
    with uffd.Region(None, kind()) as region:
        np.testing.assert_array_equal(region.array(), pattern(0, kind.nbytes))
