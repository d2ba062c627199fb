"""providers.Zarr: any zarr array is served as the bytes of zarr's own array[...], each chunk decoded once.

Method: arrays written by zarr itself; the provider's own methods, called in this process with numpy buffers and a
session that records what is offered. zarr's eager read of the same array is the oracle.
"""

import errno
import mmap
import os
import pickle
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import rangeserver, zarrfiles
from support.arrayfiles import assert_same_bits, some_array

import uffd

zarr = pytest.importorskip("zarr", reason="zarr arrays need zarr")

pytestmark = pytest.mark.filterwarnings("ignore:The data type:Warning")     # zarr 3, of types without a specification

from uffd.providers import zarrs  # noqa: E402
from uffd.providers.zarrs import Zarr, boxes, suggested_block_bytes  # noqa: E402

PAGE = mmap.PAGESIZE
FORMATS = zarrfiles.formats(zarr)
DTYPES = ("?", "i1", "<i2", ">i4", "<f8", ">f8", "<c16", "<U3", "S5", "<M8[ns]")
GRIDS = {"1-d": ((1000,), (77,)), "2-d": ((100, 70), (30, 20)), "rows": ((64, 50), (7, 50)),
         "columns": ((50, 64), (50, 9)), "3-d": ((9, 10, 11), (4, 10, 3)), "one chunk": ((20, 30), (20, 30)),
         "0-d": ((), ()), "none": ((0, 5), (1, 5)), "chunk too large": ((3, 4), (8, 8))}
SMALL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", autouse=True)
def warm_zarr(tmp_path_factory):
    """zarr 3 and its codecs start threads of their own at the first use, once per process."""
    path = tmp_path_factory.mktemp("warm") / "a"
    for codec in zarrfiles.CODECS:
        zarrfiles.make(zarr, path, np.arange(64.0), (2,), version=FORMATS[-1], codec=codec)
        with Open(Zarr(path)) as provider:
            take(provider, 0, 512)


class Open:
    """A provider between open and close."""

    def __init__(self, provider, session=None):
        self.provider = provider
        if session is not None:
            provider._session = session

    def __enter__(self):
        self.provider.open()
        return self.provider

    def __exit__(self, *exc):
        self.provider.close()


class Session:
    """Takes the place of the engine: notes what is offered, block by block, and places nothing."""

    def __init__(self, block_bytes=PAGE):
        self.block_bytes = block_bytes
        self.blocks = {}
        self.lock = threading.Lock()

    def offer_rows(self, offset, step, rows):
        assert rows.ndim == 2 and rows.dtype == np.uint8 and rows.flags.c_contiguous
        with self.lock:
            for number, row in enumerate(rows):
                at = offset + number * step
                for block in range(-(-at // self.block_bytes), (at + len(row)) // self.block_bytes):
                    begin = block * self.block_bytes - at
                    self.blocks[block] = row[begin:begin + self.block_bytes].tobytes()
        return True


def take(provider, offset, nbytes):
    out = np.full(nbytes, 0xAA, np.uint8)
    assert provider.read(offset, out) is None
    return out.tobytes()


def eager(path, name=None):
    return np.asarray(zarr.open(str(path), mode="r", path=name)[...])


def assert_served(provider, expected, seed=0):
    """dtype, shape and every byte: all at once, and ranges that cut items and chunks anywhere."""
    assert (provider.dtype, provider.shape, provider.nbytes) == (expected.dtype, expected.shape, expected.nbytes)
    whole, rng = np.ascontiguousarray(expected).tobytes(), np.random.default_rng(seed)
    with Open(provider):
        assert take(provider, 0, len(whole)) == whole
        for _ in range(8 if whole else 0):
            offset = int(rng.integers(len(whole)))
            nbytes = int(rng.integers(1, len(whole) - offset + 1))
            assert take(provider, offset, nbytes) == whole[offset:offset + nbytes]


@pytest.fixture
def decoded(monkeypatch):
    """The chunks decoded so far, in order."""
    seen, decode = [], zarrs._Layout.decode

    def noted(layout, array, indices):
        seen.extend(indices)
        return decode(layout, array, indices)

    monkeypatch.setattr(zarrs._Layout, "decode", noted)
    return seen


# ---- the right bytes


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_equals_zarr(tmp_path, dtype, version):
    for name, (shape, chunks) in GRIDS.items():
        try:
            zarrfiles.make(zarr, tmp_path / name, some_array(dtype, shape), chunks, version=version,
                           fill_value=np.zeros((), dtype)[()])
        except (TypeError, ValueError) as error:     # zarr itself does not store it in that version
            pytest.skip(f"zarr {zarr.__version__}, format {version}: {error}")
        assert_served(Zarr(tmp_path / name), eager(tmp_path / name))


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("codec", zarrfiles.CODECS)
def test_every_order_and_codec_equals_zarr(tmp_path, codec, order, version):
    array = some_array("<i4", (61, 47, 5))
    zarrfiles.make(zarr, tmp_path / "a", array, (16, 10, 2), version=version, order=order, codec=codec)
    assert_served(Zarr(tmp_path / "a"), array)


@pytest.mark.skipif(3 not in FORMATS, reason="this zarr has no sharding")
def test_shards(tmp_path):
    """A chunk is the inner one: what zarr reads of a shard is its business."""
    array = some_array("<f4", (100, 90))
    zarrfiles.make(zarr, tmp_path / "a", array, (10, 15), version=3, shards=(50, 30), codec="zstd")
    provider = Zarr(tmp_path / "a")
    assert provider.chunks == (10, 15)
    assert_served(provider, array)


@pytest.mark.parametrize("version", FORMATS)
def test_chunks_that_are_missing_are_the_fill_value(tmp_path, version):
    made = zarrfiles.make(zarr, tmp_path / "a", ((100, 100), "<f4"), (30, 30), version=version, fill_value=np.nan)
    made[40:50, 10:80] = 3
    assert_served(Zarr(tmp_path / "a"), eager(tmp_path / "a"))


@SMALL
@given(st.data())
def test_any_geometry_equals_zarr(tmp_path, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    chunks = tuple(data.draw(st.integers(1, extent + 2)) for extent in shape)
    dtype = data.draw(st.sampled_from(["u1", "<i2", "<f8", "S3"]))
    version = data.draw(st.sampled_from(FORMATS))
    array = some_array(dtype, shape, data.draw(st.integers(0, 99)))
    zarrfiles.make(zarr, tmp_path / "a", array, chunks, version=version, order=data.draw(st.sampled_from("CF")),
                   fill_value=np.zeros((), dtype)[()])
    assert_served(Zarr(tmp_path / "a"), eager(tmp_path / "a"), seed=1)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_boxes_follow_the_stream(shape, data):
    """The boxes of a range, laid one after another, are the range."""
    stream = np.arange(int(np.prod(shape))).reshape(shape)
    start = data.draw(st.integers(0, stream.size))
    stop = data.draw(st.integers(start, stream.size))
    found = [stream[tuple(map(slice, low, high))].ravel() for low, high in boxes(start, stop, tuple(shape))]
    assert np.concatenate([np.arange(0), *found]).tolist() == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


# ---- each chunk once


def test_a_column_of_chunks_costs_one_decode_each_and_the_rest_is_offered(tmp_path, decoded):
    """Rows of chunks are whole blocks: a touch of one row decodes the chunk, and its other rows are offered."""
    rows = PAGE // 8
    array = np.arange(float(64 * 4 * rows)).reshape(64, 4 * rows)
    zarrfiles.make(zarr, tmp_path / "a", array, (16, rows))
    session, whole = Session(), array.tobytes()
    with Open(Zarr(tmp_path / "a"), session) as provider:
        assert provider.suggested_block_bytes() == PAGE
        for row in range(64):                    # the second column of chunks
            offset = (row * 4 + 1) * PAGE
            assert take(provider, offset, PAGE) == whole[offset:offset + PAGE]
    assert sorted(decoded) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert sorted(session.blocks) == [row * 4 + 1 for row in range(64)]
    for block, data in session.blocks.items():
        assert data == whole[block * PAGE:(block + 1) * PAGE]


@SMALL
@given(st.data())
def test_what_is_offered_is_right(tmp_path, data):
    """Any geometry with rows longer than a block of 8 bytes: offered blocks are the array's."""
    shape = tuple(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4)))
    chunks = tuple(data.draw(st.integers(1, extent)) for extent in shape)
    array, session = some_array("<i4", shape), Session(8)
    zarrfiles.make(zarr, tmp_path / "a", array, chunks)
    with Open(Zarr(tmp_path / "a"), session) as provider:
        take(provider, data.draw(st.integers(0, array.nbytes - 1)), 1)
    for block, found in session.blocks.items():
        assert found == array.tobytes()[block * 8:block * 8 + 8]


def test_rows_that_cover_no_block_wait_in_the_cache(tmp_path, decoded):
    """Chunks across the blocks: nothing to offer, and still one decode each."""
    array = some_array("<f8", (200, 150))
    zarrfiles.make(zarr, tmp_path / "a", array, (50, 37))
    session = Session()
    with Open(Zarr(tmp_path / "a"), session) as provider:
        found = b"".join(take(provider, at, min(PAGE, array.nbytes - at)) for at in range(0, array.nbytes, PAGE))
    assert found == array.tobytes() and not session.blocks
    assert sorted(decoded) == sorted({*decoded}) and len(decoded) == 4 * 5


@pytest.mark.parametrize("walk", ["down", "up", "right"])
def test_the_next_chunks_are_decoded_ahead_and_not_offered(tmp_path, decoded, walk):
    """A walk along an axis: still each chunk once, and no block is offered of a chunk that nobody asked for."""
    rows = PAGE // 8
    array = np.arange(float(40 * 20 * rows)).reshape(40, 20 * rows)
    zarrfiles.make(zarr, tmp_path / "a", array, (2, rows))
    session, whole = Session(), array.tobytes()
    chunks = {"down": [(at, 3) for at in range(12)], "up": [(19 - at, 3) for at in range(12)],
              "right": [(3, at) for at in range(12)]}[walk]
    with Open(Zarr(tmp_path / "a"), session) as provider:
        for row, column in chunks:
            offset = (row * 2 * 20 + column) * PAGE
            assert take(provider, offset, PAGE) == whole[offset:offset + PAGE]
    assert len(decoded) == len({*decoded}) and set(chunks) <= {*decoded}
    assert len(decoded) <= len(chunks) + 6
    assert sorted(session.blocks) == sorted((row * 2 + at) * 20 + column for row, column in chunks for at in (0, 1))


def test_without_a_session_nothing_is_offered(tmp_path):
    zarrfiles.make(zarr, tmp_path / "a", np.arange(10 * PAGE, dtype="u1"), (5 * PAGE,))
    with Open(Zarr(tmp_path / "a")) as provider:
        assert take(provider, 0, 10) == bytes(range(10))
    session = Session()
    del session.block_bytes
    with Open(Zarr(tmp_path / "a"), session) as provider:
        assert take(provider, 0, 10) == bytes(range(10))


def test_the_cache_is_bounded(tmp_path, decoded):
    """It keeps one chunk whatever its size, and no more bytes than it may."""
    array = some_array("u1", (10, 1000))
    zarrfiles.make(zarr, tmp_path / "a", array, (1, 1000))
    provider = Zarr(tmp_path / "a")
    provider.cache_bytes = 3000
    with Open(provider):
        for at in (0, 1000, 2000, 0, 3000, 1000):
            take(provider, at, 10)
        assert decoded == [(0, 0), (1, 0), (2, 0), (3, 0), (1, 0)]
        assert provider._live.decoded._kept_bytes == 3000
    provider.cache_bytes = 1
    decoded.clear()
    with Open(provider):
        for at in (0, 10, 1000, 1010, 0):
            take(provider, at, 10)
    assert decoded == [(0, 0), (1, 0), (0, 0)]


def test_threads_that_want_one_chunk_decode_it_once(tmp_path, decoded):
    array = some_array("<f8", (512, 64))
    zarrfiles.make(zarr, tmp_path / "a", array, (128, 16), codec="zlib")
    failed = []
    with Open(Zarr(tmp_path / "a")) as provider:
        def work(seed):
            rng = np.random.default_rng(seed)
            for row in rng.permutation(512):
                if take(provider, int(row) * 512, 512) != array[row].tobytes():
                    failed.append(row)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not failed and len(decoded) == len({*decoded}) == 16


def test_read_many_decodes_each_chunk_once(tmp_path, decoded):
    array = some_array("<f8", (512, 64))
    zarrfiles.make(zarr, tmp_path / "a", array, (128, 16))
    provider = Zarr(tmp_path / "a")
    provider.cache_bytes = 0
    requests = [(row * 512, np.zeros(512, np.uint8)) for row in range(100, 300)]
    with Open(provider):
        provider.read_many(requests)
    assert all(out.tobytes() == array[offset // 512].tobytes() for offset, out in requests)
    assert len(decoded) == len({*decoded}) == 12


@pytest.mark.parametrize("shape, chunks, itemsize, expected", [
    ((8192, 8192), (512, 512), 8, 4096),
    ((8192, 8192), (64, 8192), 8, 1 << 20),      # rows of chunks follow each other
    ((1 << 20,), (1 << 16,), 8, 1 << 19),
    ((100, 4096), (10, 2048), 8, 1 << 14),
    ((1, 100, 4096), (1, 10, 2048), 8, 1 << 14),
    ((8192, 8192), (8192, 8192), 8, 1 << 20),    # one chunk
    ((8192, 8192), (500, 2500), 8, 1 << 14),     # rows of 20,000 bytes: no block fits them
    ((20_000, 64), (1000, 16), 8, 1 << 16),      # a page takes in 8 whole rows
    ((20_000, 64), (20, 16), 8, 8192),
    ((10, 10), (3, 3), 1, 1),
    ((), (), 8, 1),
])
def test_suggested_block_bytes(shape, chunks, itemsize, expected):
    assert suggested_block_bytes(shape, chunks, itemsize) == max(PAGE, expected)


# ---- errors


def test_what_has_pointers_is_refused(tmp_path):
    if FORMATS[-1] == 3:
        zarr.create_array(str(tmp_path / "a"), shape=(3,), dtype=str, chunks=(2,))
    else:
        import numcodecs
        zarr.open_array(str(tmp_path / "a"), mode="w", shape=(3,), dtype=object, object_codec=numcodecs.JSON())
    with pytest.raises(TypeError, match="pointers"):
        Zarr(tmp_path / "a")


def test_what_is_no_array(tmp_path):
    zarr.open_group(str(tmp_path / "g"), mode="w")
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="group"):
        Zarr(tmp_path / "g")
    for path in ("none", "d"):
        with pytest.raises(FileNotFoundError) as caught:
            Zarr(tmp_path / path)
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileNotFoundError):
        Zarr(tmp_path / "g", "none")


def chunk_files(folder):
    """Files that hold no metadata."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in files if path.name[0] != "." and path.suffix != ".json"]


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("codec", ["none", "zlib"])
def test_a_truncated_chunk_is_an_error(tmp_path, codec, version):
    """And a chunk that could be read before stays right."""
    array = some_array("<f8", (40, 10))
    zarrfiles.make(zarr, tmp_path / "a", array, (10, 10), version=version, codec=codec)
    damaged = chunk_files(tmp_path / "a")[-1]
    os.truncate(damaged, damaged.stat().st_size // 2)
    with Open(Zarr(tmp_path / "a")) as provider:
        for _ in range(2):                       # a failure is not kept
            with pytest.raises(Exception, match="."):
                take(provider, 0, array.nbytes)
            assert take(provider, 0, 800) == array[:10].tobytes()


def test_other_metadata_at_the_open_is_stale(tmp_path):
    zarrfiles.make(zarr, tmp_path / "a", some_array("<f8", (40, 10)), (10, 10))
    provider = Zarr(tmp_path / "a")
    zarrfiles.make(zarr, tmp_path / "a", some_array("<f8", (40, 10)), (10, 5))
    with pytest.raises(OSError, match="has changed") as caught:
        provider.open()
    assert caught.value.errno == errno.ESTALE


def test_without_zarr_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=r'pip install "pyuffd\[zarr\]"'):
        Zarr(tmp_path / "a")


# ---- stores


def test_the_recipe_is_what_is_pickled(tmp_path, monkeypatch):
    array = some_array("<i4", (30, 30))
    zarrfiles.make(zarr, tmp_path / "a", array, (10, 10))
    monkeypatch.chdir(tmp_path)
    provider = Zarr("a")
    with Open(provider, Session()):
        take(provider, 0, 100)
        text = pickle.dumps(provider, protocol=5)
    monkeypatch.chdir("/")
    assert len(text) < 2000
    assert_served(pickle.loads(text), array)


def test_zip_stores_and_arrays_of_groups(tmp_path):
    array = some_array("<i4", (30, 30))
    store = zarr.storage.ZipStore(str(tmp_path / "a.zip"), mode="w")
    group = zarr.open_group(store, mode="w")
    group.create_group("deep")
    options = {"data": array, "chunks": (10, 10)}
    group["deep"].create_array("a", **options) if FORMATS[-1] == 3 else group["deep"].create_dataset("a", **options)
    store.close()
    assert_served(Zarr(tmp_path / "a.zip", "deep/a"), array)
    assert_served(Zarr(tmp_path / "a.zip", "/deep/a/"), array)


def test_objects_of_zarr(tmp_path):
    """An array in hand is as good as its path, and pickles with its store."""
    array = some_array("<i4", (30, 30))
    zarrfiles.make(zarr, tmp_path / "g", array, (10, 10), name="a")
    opened = zarr.open(str(tmp_path / "g"), mode="r", path="a")
    for provider in (Zarr(opened), Zarr(opened.store, "a")):
        assert_served(pickle.loads(pickle.dumps(provider)), array)


@pytest.fixture
def http_array(tmp_path):
    pytest.importorskip("aiohttp", reason="zarr over HTTP needs aiohttp")
    array = some_array("<i4", (40, 30))
    zarrfiles.make(zarr, tmp_path / "a.zarr", array, (10, 30))
    with rangeserver.in_thread(tmp_path) as server:
        yield server, array


@pytest.mark.keeps("zarr 3 closes connections of its own when the interpreter ends")
def test_over_http(http_array):
    server, array = http_array
    assert_served(Zarr(server.url("a.zarr")), array)


@pytest.mark.keeps("zarr 3 closes connections of its own when the interpreter ends")
def test_a_chunk_that_the_server_refuses_is_no_fill_value(http_array):
    """zarr 2 takes any OSError for a chunk that is missing, unless it is told otherwise."""
    server, array = http_array
    provider = Zarr(server.url("a.zarr"))
    with Open(provider):
        chunks = [path for path, _ in server.requests]
        assert chunks
        server.refuse = lambda path: not path.endswith((".json", ".zarray", ".zgroup", ".zmetadata", ".zattrs"))
        with pytest.raises(Exception, match="."):
            take(provider, 0, 100)
        server.refuse = None
        assert take(provider, 0, 100) == array.tobytes()[:100]


# ---- uffd.open


def test_open_an_array(tmp_path, engine):
    array = some_array("<f8", (300, 200))
    zarrfiles.make(zarr, tmp_path / "a", array, (70, 60), version=FORMATS[-1], codec="zstd")
    found = uffd.open(tmp_path / "a", engine=engine)
    assert_same_bits(found, array)
    assert not uffd.open(tmp_path / "a", engine=engine, mode="r").flags.writeable


def test_blocks_follow_the_chunks(tmp_path, engine):
    zarrfiles.make(zarr, tmp_path / "a", ((64, PAGE), "<f4"), (8, PAGE // 2))
    assert uffd.region_of(uffd.open(tmp_path / "a", engine=engine)).block_bytes == 2 * PAGE
    assert uffd.region_of(uffd.open(tmp_path / "a", engine=engine, block_bytes=4 * PAGE)).block_bytes == 4 * PAGE


def test_open_a_group(tmp_path, engine):
    """Names of subgroups have a slash; nothing is opened before it is asked for."""
    arrays = {"a": some_array("<f8", (30, 20)), "deep/b": some_array("<i2", (5,), 1), "none": np.empty((0, 3), "<f4")}
    group = zarr.open_group(str(tmp_path / "g"), mode="w")
    group.attrs["who"] = "me"
    for name, array in arrays.items():
        zarrfiles.make(zarr, tmp_path / "g", array, tuple(max(1, n // 2) for n in array.shape), name=name,
                       version=FORMATS[-1])
    opened = uffd.open(tmp_path / "g", engine=engine)
    assert opened.metadata == {"who": "me"} and list(opened) == sorted(arrays) and len(opened) == 3
    assert "deep" not in opened and "deep/b" in opened
    for name, array in arrays.items():
        assert_same_bits(opened[name], array)
    assert uffd.region_of(opened["a"]) is uffd.region_of(opened["a"])
    assert uffd.region_of(opened["a"]).name == f"{tmp_path}/g/a"
    for name in ("deep", "no such", "", 3):
        with pytest.raises(KeyError):
            opened[name]


def test_open_a_zip(tmp_path, engine):
    store = zarr.storage.ZipStore(str(tmp_path / "a.zip"), mode="w")
    zarr.open_group(store, mode="w")
    store.close()
    assert len(uffd.open(tmp_path / "a.zip", engine=engine)) == 0
