"""providers.Fsspec and uffd.open of URLs: the right bytes, or an error that names the file; never other bytes.

Method: the provider's own methods, called in this process with numpy buffers, against a loopback server that
misbehaves on purpose. What goes through the engine has its server in another process.
"""

import errno
import pickle
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import rangeserver
from support.arrayfiles import assert_same_bits, some_array, write_safetensors, write_sharded

import uffd

fsspec = pytest.importorskip("fsspec", reason="remote files need fsspec")
pytest.importorskip("aiohttp", reason="files over HTTP need aiohttp")

from uffd.providers.remote import Fsspec  # noqa: E402

DATA = np.random.default_rng(5).bytes(300_001)


@pytest.fixture(scope="module")
def shared_server():
    with rangeserver.in_thread(files={"a.bin": DATA, "empty": b"", "byte": b"x"}) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def warm_fsspec(shared_server):
    """fsspec and zarr start their threads at the first request, once per process."""
    read(Fsspec(shared_server.url("a.bin")), 0, 10)
    with pytest.raises(FileNotFoundError):
        uffd.open(shared_server.url("none"))


@pytest.fixture
def server(shared_server):
    """The server as it was at the beginning."""
    shared_server.files = {"a.bin": DATA, "empty": b"", "byte": b"x"}
    shared_server.etag = "first"
    shared_server.requests.clear()
    return shared_server


def read(provider, offset, nbytes):
    """The bytes by one `read`, in an opened provider."""
    out = np.full(nbytes, 0xAA, np.uint8)
    provider.open()
    try:
        assert provider.read(offset, out) is None
    finally:
        provider.close()
    return out.tobytes()


# ---- right bytes


@pytest.mark.parametrize("offset, nbytes", [(0, 1), (0, len(DATA)), (299_999, 2), (4096 * 3, 65536), (7, 100_000)])
def test_ranges_over_http(server, offset, nbytes):
    assert read(Fsspec(server.url("a.bin")), offset, nbytes) == DATA[offset:offset + nbytes]


def test_the_size_is_known_at_once_and_nothing_else_is_read(server):
    provider = Fsspec(server.url("a.bin"), offset=1)
    assert provider.nbytes == len(DATA) - 1
    assert read(provider, 0, 5) == DATA[1:6]
    assert {asked for _, asked in server.requests} == {"bytes=0-0", "bytes=1-5"}


def test_a_whole_body_is_right_where_all_was_asked_for(server):
    """A server may answer 200 to a range that spans the file."""
    assert read(Fsspec(server.url("a.bin", "whole-later")), 0, len(DATA)) == DATA
    assert read(Fsspec(server.url("byte")), 0, 1) == b"x"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 8)), min_size=1, max_size=12))
def test_read_many_fills_each_buffer(shared_server, requests):
    """Any requests, neighbours and overlaps among them, in any order."""
    provider = Fsspec(shared_server.url("a.bin"))
    provider.open()
    wanted = [(block * 4096, np.zeros(min(blocks * 4096, len(DATA) - block * 4096), np.uint8))
              for block, blocks in requests]
    provider.read_many(wanted)
    provider.close()
    for offset, out in wanted:
        assert out.tobytes() == DATA[offset:offset + len(out)]


def test_neighbours_are_one_request(server):
    provider = Fsspec(server.url("a.bin"))
    provider.open()
    server.requests.clear()
    blocks = [(number * 4096, np.zeros(4096, np.uint8)) for number in (49, 0, 1, 3, 2, 50, 7)]
    provider.read_many(blocks)
    provider.close()
    assert sorted(asked for _, asked in server.requests) == ["bytes=0-32767", "bytes=200704-208895"]
    assert all(out.tobytes() == DATA[offset:offset + 4096] for offset, out in blocks)


def test_several_threads_read_at_once(server):
    """As the host does: `concurrency` threads in one provider."""
    provider, failed = Fsspec(server.url("a.bin", "slow")), []
    provider.open()

    def work(seed):
        rng = np.random.default_rng(seed)
        for offset in rng.integers(0, len(DATA) - 5000, 5):
            out = np.zeros(5000, np.uint8)
            provider.read(int(offset), out)
            if out.tobytes() != DATA[offset:offset + 5000]:
                failed.append(int(offset))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(provider.concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    provider.close()
    assert not failed


def test_the_recipe_is_what_is_pickled(server):
    provider = Fsspec(server.url("a.bin"), {"headers": {"X-Who": "me"}}, offset=3)
    provider.open()
    server.requests.clear()
    again = pickle.loads(pickle.dumps(provider, protocol=5))
    assert server.requests == [], "a recipe is made again without asking anybody"
    provider.close()
    assert (again.url, again.storage_options, again.offset, again.nbytes) == (
        provider.url, {"headers": {"X-Who": "me"}}, 3, len(DATA) - 3)
    assert read(again, 0, 10) == DATA[3:13]


def test_messages_show_no_secrets():
    from uffd.providers.urls import shown
    assert shown("https://me:secret@host:80/a.npy?signature=secret") == "https://host:80/a.npy"


# ---- errors with names


@pytest.mark.parametrize("way, number, match", [
    ("short", errno.ENODATA, "short answer: 995 of the 1000 bytes from 2000"),
    ("cut", errno.EIO, "2000"),
    ("whole-later", errno.EOPNOTSUPP, "byte ranges"),
    ("error", errno.EIO, "503"),
    ("gzip", errno.EOPNOTSUPP, "gzip"),
    ("shifted", errno.EIO, "bytes 2001-"),
])
def test_answers_that_are_not_what_was_asked_for(server, way, number, match):
    with pytest.raises(OSError, match=match) as caught:
        read(Fsspec(server.url("a.bin", way)), 2000, 1000)
    assert caught.value.errno == number
    assert caught.value.filename == server.url("a.bin", way)


@pytest.mark.parametrize("way, name, number, match", [
    ("good", "none.bin", errno.ENOENT, "404"), ("denied", "a.bin", errno.EACCES, "403"),
    ("whole", "a.bin", errno.EOPNOTSUPP, "byte ranges"), ("unsized", "a.bin", errno.EOPNOTSUPP, "size"),
])
def test_what_cannot_be_opened(server, way, name, number, match):
    with pytest.raises(OSError, match=match) as caught:
        Fsspec(server.url(name, way))
    assert caught.value.errno == number


def test_nobody_listens():
    with pytest.raises(OSError) as caught:
        Fsspec("http://127.0.0.1:9/a.bin")
    assert caught.value.errno == errno.ECONNREFUSED


def test_a_server_that_says_nothing_is_timed_out(server, monkeypatch):
    monkeypatch.setattr("uffd.providers.remote._SILENCE_TIMEOUT_S", 0.05)
    server.delay_s = 0.5
    with pytest.raises(TimeoutError) as caught:
        Fsspec(server.url("a.bin", "slow"))
    server.delay_s = 0.05
    assert caught.value.errno == errno.ETIMEDOUT and "a.bin" in str(caught.value)


def change_etag(server):
    server.etag = "second"


def change_size(server):
    server.files["a.bin"] = DATA + b"more"


def make_shorter(server):
    server.files["a.bin"] = DATA[:1500]


@pytest.mark.parametrize("change", [change_etag, change_size, make_shorter])
@pytest.mark.parametrize("when", ["before the open", "before the read"])
def test_a_file_that_changes_is_stale(server, change, when):
    """In either place it is an error: a host that is started again must not mix two versions."""
    provider = Fsspec(server.url("a.bin"))
    if when == "before the read":
        provider.open()
    change(server)
    with pytest.raises(OSError, match="has changed") as caught:
        if when == "before the open":
            provider.open()
        else:
            provider.read(2000, np.zeros(1000, np.uint8))
    provider.close()
    assert caught.value.errno == errno.ESTALE


def test_a_failure_leaves_no_writer_behind(server):
    """After an error in one of many ranges nothing is written any more: the buffers are somebody else's by then."""
    provider = Fsspec(server.url("a.bin", "slow"))
    provider.open()
    requests = [(number * 8192, np.zeros(4096, np.uint8)) for number in range(20)]
    server.files["a.bin"] = DATA[:100_000]
    with pytest.raises(OSError, match="has changed"):
        provider.read_many(requests)
    before = [out.tobytes() for _, out in requests]
    threading.Event().wait(0.3)
    assert [out.tobytes() for _, out in requests] == before
    provider.close()


def test_without_fsspec_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r'pip install "pyuffd\[fsspec\]"'):
        Fsspec("https://example.org/a.bin")


# ---- other file systems


@pytest.fixture
def memory_file():
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/uffd-test/a.bin", DATA)
    yield fs
    fs.rm("/uffd-test", recursive=True)


def test_memory_files(memory_file):
    provider = Fsspec("memory://uffd-test/a.bin", offset=10)
    assert provider.nbytes == len(DATA) - 10
    assert read(provider, 5, 70_000) == DATA[15:70_015]
    with pytest.raises(FileNotFoundError) as caught:
        Fsspec("memory://uffd-test/none")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(IsADirectoryError):
        Fsspec("memory://uffd-test")


def test_a_memory_file_that_changes_is_stale(memory_file):
    provider = Fsspec("memory://uffd-test/a.bin")
    provider.open()
    memory_file.pipe_file("/uffd-test/a.bin", DATA[::-1])
    with pytest.raises(OSError, match="has changed") as caught:
        provider.read(0, np.zeros(100, np.uint8))
    assert caught.value.errno == errno.ESTALE
    memory_file.pipe_file("/uffd-test/a.bin", DATA[:50])
    with pytest.raises(OSError, match="has changed"):
        provider.read(0, np.zeros(100, np.uint8))


@pytest.mark.parametrize("url", ["file://{}", "simplecache::file://{}"])
def test_local_files_through_fsspec(tmp_path, url):
    (tmp_path / "a.bin").write_bytes(DATA)
    provider = Fsspec(url.format(tmp_path / "a.bin"))
    assert read(provider, 1000, 200_000) == DATA[1000:201_000]


# ---- uffd.open


def test_headers_are_read_and_no_more(server):
    """The header of a large array costs its first bytes."""
    from uffd.formats.sources import RemoteSource
    with RemoteSource(server.url("a.bin"), {}).open() as file:
        assert file.read(8) == DATA[:8] and file.tell() == 8
    assert {asked for _, asked in server.requests} == {"bytes=0-0", "bytes=0-65535"}


@pytest.mark.parametrize("content, match", [
    (b"hello, world", "not a .npy"), (b"\x9e\xa8b2frame\x00" + bytes(99), "local"), (b"PK\x03\x04" + bytes(99), "zip"),
    (b"", "0 bytes"),
])
def test_a_url_of_something_else_is_refused(server, content, match):
    server.files["x"] = content
    with pytest.raises(ValueError, match=match):
        uffd.open(server.url("x"))


def test_a_url_of_nothing(server):
    with pytest.raises(FileNotFoundError):
        uffd.open(server.url("none.npy"))


@pytest.fixture
def folder_url(tmp_path):
    with rangeserver.in_child(tmp_path) as url:
        yield url


def test_open_npy_over_http(tmp_path, folder_url, engine):
    for order in "CF":
        array = some_array("<f8", (500, 300), order=order)
        np.save(tmp_path / "a.npy", array)
        found = uffd.open(f"{folder_url}/a.npy", engine=engine, storage_options={"headers": {"X-Who": "me"}})
        assert uffd.region_of(found).name == f"{folder_url}/a.npy"
        assert found[499, 299] == array[499, 299] or np.isnan(array[499, 299])
        assert_same_bits(found, array)
        del found


def test_open_safetensors_over_http(tmp_path, folder_url, engine):
    arrays = {"a": ("F32", some_array("<f4", (1000, 40))), "b": ("I64", some_array("<i8", (3, 5), 1))}
    write_safetensors(tmp_path / "m.safetensors", arrays, {"format": "np"})
    opened = uffd.open(f"{folder_url}/m.safetensors", engine=engine)
    assert opened.metadata == {"format": "np"}
    for name, (_, array) in arrays.items():
        assert_same_bits(opened[name], array)


def test_open_shards_over_http(tmp_path, folder_url, engine):
    shards = [{"a": ("F32", some_array("<f4", (100, 30)))}, {"c": ("F64", some_array("<f8", (2, 2), 2))}]
    index = write_sharded(tmp_path, shards)
    opened = uffd.open(f"{folder_url}/{index.name}", engine=engine)
    for arrays in shards:
        for name, (_, array) in arrays.items():
            assert_same_bits(opened[name], array)
