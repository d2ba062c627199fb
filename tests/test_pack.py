"""uffd.pack: what comes out of open(pack(x)) is x, bit for bit; nothing half-written ever has the final name."""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.arrayfiles import (
    DTYPES,
    ML_CODES,
    PLAIN_CODES,
    SHAPES,
    assert_same_bits,
    settled_bytes_filled,
    some_array,
    write_raw_safetensors,
    write_safetensors,
    write_sharded,
)

import uffd
from uffd.formats import packing

blosc2 = pytest.importorskip("blosc2", reason="packing needs the package blosc2")

CODECS = ("zstd", "lz4", "lz4hc", "blosclz", "zlib")
BLOCK_BYTES = 1 << 16
CHUNK_BYTES = 1 << 20
HAVE_ML_DTYPES = importlib.util.find_spec("ml_dtypes") is not None


@pytest.fixture(scope="module", autouse=True)
def warm_blosc2(tmp_path_factory):
    """What the library makes once per process is made before anything is counted.

    Its threads are left out: it keeps those of the object used last, at its own discretion, which looks like a leak.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_compression_threads", lambda: 1)
        before = blosc2.set_nthreads(1)
        directory = tmp_path_factory.mktemp("warm")
        uffd.pack(save(directory / "a.npy", smooth(4 * CHUNK_BYTES)), directory / "a.b2frame")
        uffd.open(directory / "a.b2frame").sum()
        yield
        blosc2.set_nthreads(before)


def smooth(nbytes):
    """Compressible numbers, like weights: the high bytes repeat, the low ones do not."""
    return np.random.default_rng(0).normal(size=nbytes // 4).astype("<f4")


def save(path, array):
    np.save(path, array)
    return path


def left_over(directory):
    return sorted(name for name in os.listdir(directory) if name.endswith(".tmp"))


# ---- round trips


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("level", [0, 1, 5, 9])
def test_npy_by_every_codec_and_level(tmp_path, codec, level):
    src, dst = save(tmp_path / "a.npy", smooth(2_500_000).reshape(-1, 25)), tmp_path / "a.b2frame"
    assert uffd.pack(src, dst, codec=codec, level=level) is None
    assert_same_bits(uffd.open(dst), np.load(src))
    if codec != "blosclz" and level >= 5:
        assert dst.stat().st_size < 0.95 * src.stat().st_size
    assert {blosc2.open(str(dst), mode="r").cparams.codec.name} == {codec.upper()}


@pytest.mark.parametrize("dtype", [*DTYPES, "S300", "V70000"], ids=str)
def test_npy_of_every_type(tmp_path, dtype):
    for number, shape in enumerate(SHAPES):
        if np.dtype(dtype).itemsize * np.prod(shape) > 10_000_000:
            continue
        for order in "CF":
            src, dst = tmp_path / f"{number}{order}.npy", tmp_path / f"{number}{order}"
            np.save(src, some_array(dtype, shape, order=order))
            uffd.pack(src, dst, level=1)
            assert_same_bits(uffd.open(dst), np.load(src))
            assert uffd.open(dst, mode="r").flags.writeable is False


@pytest.mark.parametrize("nbytes", [BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, CHUNK_BYTES - 1, CHUNK_BYTES,
                                    CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7])
def test_sizes_around_blocks_and_chunks(tmp_path, nbytes):
    src, dst = save(tmp_path / "a.npy", some_array("u1", (nbytes,))), tmp_path / "a.b2frame"
    uffd.pack(src, dst, codec="lz4")
    assert_same_bits(uffd.open(dst), np.load(src))


def mixed_arrays():
    """Widths in an order that no writer sorted, sizes from nothing to several chunks."""
    sizes = {"U8": (1, 70_000), "F64": (3, 200_000), "F32": (0, 400_000, 5), "F16": (77_777,), "BOOL": (9,),
             "I64": (1,), "C64": (8_193,)}
    return {f"{code}/{n}": (code, some_array(PLAIN_CODES[code], (n,), n)) for code, ns in sizes.items() for n in ns}


@pytest.mark.parametrize("codec", CODECS)
def test_safetensors_by_every_codec(tmp_path, codec):
    arrays = mixed_arrays()
    src, dst = write_safetensors(tmp_path / "m.safetensors", arrays, {"ü": "ß"}), tmp_path / "m.b2frame"
    uffd.pack(src, dst, codec=codec)
    packed = uffd.open(dst)
    assert list(packed) == list(arrays) and packed.metadata == {"ü": "ß"}
    for name, (_, array) in arrays.items():
        assert_same_bits(packed[name], array)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(sorted(PLAIN_CODES)),
                          st.sampled_from([0, 1, 7, 63, 64, 65, 8191, 8193, 140_000])), max_size=7))
def test_safetensors_of_any_mixture(tmp_path, entries):
    arrays = {str(number): (code, some_array(PLAIN_CODES[code], (count,), number))
              for number, (code, count) in enumerate(entries)}
    dst = tmp_path / "m.b2frame"
    uffd.pack(write_safetensors(tmp_path / "m.safetensors", arrays), dst, codec="lz4", level=1)
    packed = uffd.open(dst)
    assert list(packed) == list(arrays)
    for name, (_, array) in arrays.items():
        assert_same_bits(packed[name], array)


def test_every_packed_tensor_is_aligned(tmp_path):
    """However it lay in the source; large ones share no block with another."""
    arrays = mixed_arrays()
    src, dst = write_safetensors(tmp_path / "m.safetensors", arrays), tmp_path / "m.b2frame"
    assert not all(array.flags.aligned for array in uffd.open(src).values())
    uffd.pack(src, dst, level=1)
    packed = uffd.open(dst)
    region = uffd.region_of(packed["F64/200000"])
    taken = {}
    for array in packed.values():
        if array.size:
            assert uffd.region_of(array) is region
            offset = array.__array_interface__["data"][0] - region.address
            assert offset % (BLOCK_BYTES if array.nbytes >= BLOCK_BYTES else 64) == 0
            for chunk in range(offset // CHUNK_BYTES, (offset + array.nbytes - 1) // CHUNK_BYTES + 1):
                assert taken.setdefault(chunk, array.itemsize) == array.itemsize


def test_shards_become_one_file(tmp_path):
    shards = [{"a": ("F32", some_array("<f4", (1000, 30))), "b": ("I8", some_array("i1", (5,), 1))},
              {"c": ("F32", some_array("<f4", (70, 7), 2))}]
    index = write_sharded(tmp_path, shards, {"total_size": 121965})
    for number, src in enumerate((index, tmp_path)):
        dst = tmp_path / f"{number}.b2frame"
        uffd.pack(src, dst)
        packed = uffd.open(dst)
        assert sorted(packed) == ["a", "b", "c"] and packed.metadata == {"total_size": "121965"}
        for arrays in shards:
            for name, (_, array) in arrays.items():
                assert_same_bits(packed[name], array)


@pytest.mark.skipif(not HAVE_ML_DTYPES, reason="ml_dtypes is not installed")
def test_types_of_ml_dtypes_survive(tmp_path):
    import ml_dtypes

    arrays = {code: (code, some_array("u1", (300, 64), 5).view(getattr(ml_dtypes, name)))
              for code, name in ML_CODES.items() if hasattr(ml_dtypes, name)}
    uffd.pack(write_safetensors(tmp_path / "m.safetensors", arrays), tmp_path / "m.b2frame")
    packed = uffd.open(tmp_path / "m.b2frame")
    for code, (_, array) in arrays.items():
        assert_same_bits(packed[code], array)


def test_types_without_a_dtype_are_kept_as_they_are(tmp_path):
    header = {"f4": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]},
              "u": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]}}
    src = write_raw_safetensors(tmp_path / "m.safetensors", header, b"abcde")
    uffd.pack(src, tmp_path / "m.b2frame")
    packed = uffd.open(tmp_path / "m.b2frame")
    assert packed["u"].tobytes() == b"de"
    with pytest.raises(TypeError, match="F4"):
        packed["f4"]


@pytest.mark.parametrize("arrays", [{}, {"a": ("F32", np.empty((0, 3), "<f4"))}], ids=["none", "empty"])
def test_models_without_bytes(tmp_path, arrays):
    uffd.pack(write_safetensors(tmp_path / "m.safetensors", arrays), tmp_path / "m.b2frame")
    packed = uffd.open(tmp_path / "m.b2frame")
    assert {name: array.shape for name, array in packed.items()} == {name: a.shape for name, (_, a) in arrays.items()}


@pytest.mark.keeps("Blosc2 keeps threads for the next object that wants as many")
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(tmp_path, monkeypatch, threads):
    src = save(tmp_path / "a.npy", smooth(5 * CHUNK_BYTES + 40))
    uffd.pack(src, tmp_path / "1.b2frame")
    monkeypatch.setattr(packing, "_compression_threads", lambda: threads)
    uffd.pack(src, tmp_path / "n.b2frame")
    assert_same_bits(uffd.open(tmp_path / "n.b2frame"), np.load(src))
    assert (tmp_path / "n.b2frame").stat().st_size == (tmp_path / "1.b2frame").stat().st_size


# ---- what others see, and what is filled


def test_blosc2_itself_reads_what_was_packed(tmp_path):
    array = some_array(">f8", (500, 300), order="F")
    uffd.pack(save(tmp_path / "a.npy", array), tmp_path / "a.b2frame")
    schunk = blosc2.open(str(tmp_path / "a.b2frame"), mode="r")
    assert schunk.nbytes == array.nbytes and schunk[:] == array.tobytes("A")
    assert (schunk.blocksize, schunk.chunksize, schunk.typesize) == (BLOCK_BYTES, CHUNK_BYTES, 8)
    assert schunk.vlmeta["uffd_npy_header"] == (tmp_path / "a.npy").read_bytes()[:-array.nbytes]

    arrays = mixed_arrays()
    uffd.pack(write_safetensors(tmp_path / "m.safetensors", arrays), tmp_path / "m.b2frame")
    schunk = blosc2.open(str(tmp_path / "m.b2frame"), mode="r")
    header = json.loads(schunk.vlmeta["uffd_safetensors_header"])
    for name, (code, array) in arrays.items():
        begin, end = header[name]["data_offsets"]
        assert header[name]["dtype"] == code and header[name]["shape"] == list(array.shape)
        if begin < end:
            stop = -(-end // schunk.typesize)
            assert schunk[begin // schunk.typesize : stop][: end - begin] == array.tobytes()


def test_a_touch_fills_one_block(tmp_path):
    array = smooth(16 * CHUNK_BYTES)
    uffd.pack(save(tmp_path / "a.npy", array), tmp_path / "a.b2frame", level=1)
    opened = uffd.open(tmp_path / "a.b2frame", readahead_bytes=0)
    region = uffd.region_of(opened)
    assert region.block_bytes == BLOCK_BYTES
    assert opened[2_000_000] == array[2_000_000]
    assert settled_bytes_filled(region) == BLOCK_BYTES


# ---- refusals


@pytest.mark.parametrize("options, match", [
    ({"codec": "snappy"}, "codec 'snappy'"), ({"codec": None}, "codec"), ({"level": 10}, "level"),
    ({"level": -1}, "level"), ({"level": 2.5}, "level"), ({"level": True}, "level"),
])
def test_bad_options(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        uffd.pack(save(tmp_path / "a.npy", np.arange(9)), tmp_path / "a.b2frame", **options)
    assert os.listdir(tmp_path) == ["a.npy"]


def test_bad_places(tmp_path):
    src = save(tmp_path / "a.npy", np.arange(9))
    os.link(src, tmp_path / "same.npy")
    (tmp_path / "sub").mkdir()
    for path, dst, error, match in (
        (src, src, ValueError, "source itself"),
        (src, tmp_path / "same.npy", ValueError, "source itself"),
        (src, tmp_path / "sub", IsADirectoryError, "directory"),
        (src, tmp_path / "none" / "a", FileNotFoundError, "no directory"),
        (tmp_path / "none.npy", tmp_path / "a", FileNotFoundError, "none"),
        ("http://example.org/a.npy", tmp_path / "a", ValueError, "only local"),
        (src, "http://example.org/a", ValueError, "only local"),
        (tmp_path / "sub", tmp_path / "a", ValueError, "none"),
    ):
        with pytest.raises(error, match=match):
            uffd.pack(path, dst)
    uffd.pack(src, tmp_path / "a.b2frame")
    with pytest.raises(ValueError, match="already"):
        uffd.pack(tmp_path / "a.b2frame", tmp_path / "b.b2frame")
    np.save(tmp_path / "o.npy", np.array([None]), allow_pickle=True)
    with pytest.raises(TypeError, match="Python objects"):
        uffd.pack(tmp_path / "o.npy", tmp_path / "o")
    assert left_over(tmp_path) == []


def test_a_shard_is_not_overwritten(tmp_path):
    index = write_sharded(tmp_path, [{"a": ("U8", some_array("u1", (5,)))}])
    with pytest.raises(ValueError, match="source itself"):
        uffd.pack(index, tmp_path / "model-00001-of-00001.safetensors")


def test_without_blosc2_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(ImportError, match=r'pip install "pyuffd\[blosc2\]"'):
        uffd.pack(save(tmp_path / "a.npy", np.arange(9)), tmp_path / "a.b2frame")


@pytest.mark.parametrize("header, match", [
    (b"{\"a\": {}}", "exactly the keys"),
    ({"a": {"dtype": "U8", "shape": [9], "data_offsets": [60, 69]}}, "holds 64"),
    ({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]},
      "b": {"dtype": "U8", "shape": [9], "data_offsets": [8, 17]}}, "inside"),
])
def test_a_packed_header_that_lies(tmp_path, header, match):
    dst = tmp_path / "m.b2frame"
    uffd.pack(write_safetensors(tmp_path / "m.safetensors", {"a": ("U8", some_array("u1", (9,)))}), dst)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    schunk = blosc2.open(str(dst), mode="a")
    schunk.vlmeta["uffd_safetensors_header"] = text
    with pytest.raises(ValueError, match=match):
        uffd.open(dst)


# ---- nothing half-written


def test_a_source_that_ends_early_leaves_the_old_file(tmp_path, monkeypatch):
    src, dst = save(tmp_path / "a.npy", smooth(3 * CHUNK_BYTES)), tmp_path / "a.b2frame"
    dst.write_bytes(b"old")

    def cut(stage, done_bytes, total_bytes):
        os.truncate(src, 2 * CHUNK_BYTES)

    with pytest.raises(OSError, match="ends at byte"):
        packing.pack_file(src, dst, progress=cut)
    assert dst.read_bytes() == b"old" and left_over(tmp_path) == []


def test_a_write_that_does_not_read_back_is_thrown_away(tmp_path, monkeypatch):
    """One byte in the middle of the frame changes behind our back, as after a write that was lost."""
    src, dst = save(tmp_path / "a.npy", smooth(3 * CHUNK_BYTES)), tmp_path / "a.b2frame"
    write_frame = packing._write_frame

    def write_and_damage(blosc2, plan, path, **options):
        checksums = write_frame(blosc2, plan, path, **options)
        with open(path, "r+b") as file:
            file.seek(CHUNK_BYTES)
            file.write(bytes(100))
        return checksums

    monkeypatch.setattr(packing, "_write_frame", write_and_damage)
    with pytest.raises(OSError, match="read back"):
        uffd.pack(src, dst)
    assert os.listdir(tmp_path) == ["a.npy"]


@pytest.mark.keeps("Blosc2 keeps the descriptor of a frame that it could not create")
@pytest.mark.parametrize("limit", [1, CHUNK_BYTES, 3 * CHUNK_BYTES + 17])
def test_a_full_disk(tmp_path, limit):
    src, dst = save(tmp_path / "a.npy", smooth(8 * CHUNK_BYTES)), tmp_path / "a.b2frame"
    dst.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="a.b2frame"):
            uffd.pack(src, dst, codec="lz4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert dst.read_bytes() == b"old" and left_over(tmp_path) == []


def test_an_interrupt_cleans_up(tmp_path):
    src, dst = save(tmp_path / "a.npy", smooth(3 * CHUNK_BYTES)), tmp_path / "a.b2frame"

    def interrupt(stage, done_bytes, total_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packing.pack_file(src, dst, progress=interrupt)
    assert os.listdir(tmp_path) == ["a.npy"]


@pytest.mark.parametrize("stage", ["compress", "verify"])
def test_killed_in_the_middle(tmp_path, stage):
    """SIGKILL while a child packs: the final name holds what it held."""
    src, dst = save(tmp_path / "a.npy", smooth(4 * CHUNK_BYTES)), tmp_path / "a.b2frame"
    dst.write_bytes(b"old")
    program = (
        "import sys, time\nfrom uffd.formats import packing\n"
        "def wait(stage, done_bytes, total_bytes):\n"
        "    if stage == sys.argv[3]: print('here', flush=True); time.sleep(60)\n"
        "packing.pack_file(sys.argv[1], sys.argv[2], progress=wait)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, src, dst, stage], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"here\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdout.close()
    assert dst.read_bytes() == b"old"
    uffd.pack(src, dst, level=1)  # what the child left is in nobody's way
    assert_same_bits(uffd.open(dst), np.load(src))


# ---- means


def test_progress_is_told(tmp_path):
    src, told = save(tmp_path / "a.npy", smooth(3 * CHUNK_BYTES + 400)), []
    packing.pack_file(src, tmp_path / "a.b2frame", progress=lambda *event: told.append(event))
    for stage in ("compress", "verify"):
        done = [done_bytes for name, done_bytes, _ in told if name == stage]
        assert done == sorted(done) and len(done) == 4 and done[-1] == 3 * CHUNK_BYTES + 400
    assert {total_bytes for _, _, total_bytes in told} == {3 * CHUNK_BYTES + 400}


@pytest.mark.deadline(120)
def test_memory_is_bounded(tmp_path):
    """A sparse source of 512 MiB is packed by a child whose peak grows by a few chunks, not by the source."""
    src = tmp_path / "a.npy"
    np.lib.format.open_memmap(src, mode="w+", dtype="<f4", shape=(1 << 27,))[::1 << 20] = 1
    program = (
        "import resource, sys, blosc2, uffd\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "uffd.pack(sys.argv[3], sys.argv[2] + '0')\n"
        "before = peak()\nuffd.pack(sys.argv[1], sys.argv[2])\nprint(peak() - before)\n"
    )
    small = save(tmp_path / "small.npy", smooth(4 * CHUNK_BYTES))
    started = time.monotonic()
    run = subprocess.run([sys.executable, "-c", program, src, tmp_path / "out", small],
                         capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 32 << 10, f"{run.stdout} KiB in {time.monotonic() - started:.1f} s"
    opened = uffd.open(tmp_path / "out")
    assert opened[5 << 20] == 1 and opened[(5 << 20) + 1] == 0


def test_chunks_grow_with_the_file():
    """Appending rewrites the table of chunks, so their number stays bounded."""
    gib = 1 << 30
    assert packing._chunk_bytes(0) == packing._chunk_bytes(32 * gib) == CHUNK_BYTES
    assert packing._chunk_bytes(33 * gib) == 2 * CHUNK_BYTES
    assert packing._chunk_bytes(1 << 50) == 16 * CHUNK_BYTES
