"""uffd/_blosc2.h, compiled by itself: what python-blosc2 writes is read back, whatever part is asked for.

Goal: every kind of frame gives the bytes that python-blosc2 gives for it; what we don't read is refused; a damaged or
shortened file gives an error or, where only payload was hit, other bytes, and nothing is written outside the target.
Method: the header is compiled with gcc into a library for ctypes and, with sanitizers, into a program
(blosc2_harness.c) that changes every byte of small frames in turn. The frames are a table of functions.
"""

import ctypes
import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS / "blosc2_harness.c"
INCLUDE = TESTS.parent / "uffd"
CFLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{INCLUDE}"]
SEED = int(os.environ.get("UFFD_SEED", random.SystemRandom().randrange(1 << 32)))

if shutil.which("gcc") is None:
    pytest.skip("gcc is not installed: the C harness cannot be built", allow_module_level=True)
if not (INCLUDE / "_blosc2.h").exists():
    pytest.skip("the source tree is not here: uffd/_blosc2.h is compiled by itself", allow_module_level=True)
blosc2 = pytest.importorskip("blosc2", reason="the blosc2 wheel, which carries the C library, is not installed")
Codec, Filter = blosc2.Codec, blosc2.Filter
blosc2.set_nthreads(1)  # arrays that await collection would keep its threads, which the leak check counts


def library_path():
    """The C library inside the installed wheel, found without importing the package."""
    for root in find_spec("blosc2").submodule_search_locations or ():
        for found in sorted(Path(root).glob("lib*/libblosc2.so*"), key=lambda path: len(path.name)):
            return str(found)
    return None


if library_path() is None:
    pytest.skip("this blosc2 wheel ships no libblosc2.so", allow_module_level=True)


class Info(ctypes.Structure):
    _fields_ = [("nbytes", ctypes.c_uint64), ("chunks", ctypes.c_uint64), ("chunk_bytes", ctypes.c_uint64),
                ("block_bytes", ctypes.c_uint64), ("typesize", ctypes.c_int32), ("ndim", ctypes.c_int32),
                ("shape", ctypes.c_int64 * 16), ("linear", ctypes.c_bool)]


def compile_harness(target, *flags):
    subprocess.run(["gcc", *CFLAGS, *flags, str(SOURCE), "-o", str(target), "-ldl"], check=True, capture_output=True)
    return target


def bind(path):
    c = ctypes.CDLL(str(path))
    c.b2_test_version.restype = ctypes.c_char_p
    c.b2_test_info_bytes.restype = ctypes.c_size_t
    c.b2_test_load.argtypes = [ctypes.c_char_p]
    c.b2_test_close.argtypes = [ctypes.c_void_p]
    c.b2_test_open.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint32,
                               ctypes.POINTER(Info)]
    c.b2_test_fill.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t]
    assert c.b2_test_info_bytes() == ctypes.sizeof(Info)
    return c


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    """The library for ctypes, with the codec library loaded."""
    path = compile_harness(tmp_path_factory.mktemp("b2") / "harness.so", "-O2", "-shared", "-fPIC")
    c = bind(path)
    c.path = path
    assert c.b2_test_load(library_path().encode()) == 0
    return c


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The program, under the address and undefined-behaviour sanitizers."""
    target = tmp_path_factory.mktemp("b2") / "harness"
    try:
        return compile_harness(target, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"gcc cannot build with sanitizers here: {error.stderr.decode()[-200:]}")


class Frame:
    """An open frame: fill() gives bytes, or raises OSError with the C code's errno."""

    def __init__(self, c, path, offset=0, slots=2):
        self.c, self.info, self.handle = c, Info(), ctypes.c_void_p()
        rc = c.b2_test_open(ctypes.byref(self.handle), os.fsencode(path), offset, slots, ctypes.byref(self.info))
        if rc:
            raise OSError(-rc, os.strerror(-rc))

    def fill(self, offset, nbytes, slot=0):
        """The bytes, after a look that none was left alone and none next to them was touched."""
        answers = []
        for before in (0xA5, 0x5A):
            target = np.full(nbytes + 32, before, "u1")
            rc = self.c.b2_test_fill(self.handle, slot, offset, target.ctypes.data + 16, nbytes)
            assert (target[:16] == before).all() and (target[16 + nbytes:] == before).all()
            if rc:
                raise OSError(-rc, os.strerror(-rc))
            answers.append(target[16:16 + nbytes])
        assert np.array_equal(*answers), "bytes of the target were not written"
        return answers[0]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.c.b2_test_close(self.handle)


def check_all(frame, right, rng, requests=40):
    """All of it at once, in order in pieces, at random and across chunks, in two slots."""
    right = np.frombuffer(right, "u1")
    assert frame.info.nbytes == right.size
    assert np.array_equal(frame.fill(0, right.size), right)
    piece = max(1, right.size // 23)
    got = [frame.fill(at, min(piece, right.size - at), 1) for at in range(0, right.size, piece)]
    assert np.array_equal(np.concatenate(got) if got else right[:0], right)
    for _ in range(requests if right.size else 0):
        start = rng.randrange(right.size)
        nbytes = min(rng.choice([1, 7, 100, 5000, 65536, right.size]), right.size - start)
        assert np.array_equal(frame.fill(start, nbytes, rng.randrange(2)), right[start:start + nbytes]), (start, nbytes)


# ---- frames ---------------------------------------------------------------------------------------------------------

def smooth(count, dtype="i4"):
    """Data that compresses."""
    return (np.arange(count) // 3 % 1000).astype(dtype)


def noise(nbytes, seed=1):
    return np.random.default_rng(seed).integers(0, 256, nbytes, "u1").tobytes()


def schunk(path, data, chunksize, **cparams):
    """A super-chunk; what it reads as."""
    cparams.setdefault("nthreads", 1)
    made = blosc2.SChunk(chunksize=chunksize, data=data, urlpath=str(path), mode="w", contiguous=True, cparams=cparams)
    return made[:]


def array(path, values, chunks, blocks, **cparams):
    cparams.setdefault("nthreads", 1)
    made = blosc2.asarray(values, chunks=chunks, blocks=blocks, urlpath=str(path), mode="w", cparams=cparams)
    return np.ascontiguousarray(made[...]).tobytes()


def replaced_chunks(path, chunk_bytes=20000):
    """Chunks that were replaced, put in and taken out: offsets out of order, holes."""
    made = blosc2.SChunk(chunksize=chunk_bytes, data=smooth(chunk_bytes // 4 * 10).tobytes(), urlpath=str(path),
                         mode="w", contiguous=True, cparams={"typesize": 4, "nthreads": 1})
    made.update_data(3, noise(chunk_bytes), copy=True)
    made.update_data(1, smooth(chunk_bytes // 4).tobytes(), copy=True)
    made.insert_data(2, bytes(chunk_bytes), copy=True)
    made.delete_chunk(5)
    return made[:]


def mixed_specials(path):
    made = blosc2.SChunk(chunksize=8000, urlpath=str(path), mode="w", contiguous=True,
                         cparams={"typesize": 8, "nthreads": 1})
    for values in (np.zeros(1000), smooth(1000, "f8"), np.full(1000, 2.5), np.full(1000, np.nan), np.arange(700.)):
        made.append_data(values)
    return made[:]


def filled(path, value, typesize, nitems=100000, chunksize=80000):
    made = blosc2.SChunk(chunksize=chunksize // typesize * typesize, urlpath=str(path), mode="w", contiguous=True,
                         cparams={"typesize": typesize, "nthreads": 1})
    made.fill_special(nitems, value[0], *value[1:])
    return made[:]


def uninitialised(path):
    """Never written: its bytes may be anything, and are zeros here."""
    made = blosc2.SChunk(chunksize=8000, urlpath=str(path), mode="w", contiguous=True,
                         cparams={"typesize": 8, "nthreads": 1})
    made.fill_special(5000, blosc2.SpecialValue.UNINIT)
    return bytes(40000)


def by_threads(path):
    """Blocks in the order in which threads finished them; in another process, since the library may keep them."""
    right = smooth(2_000_000).tobytes()
    code = ("import blosc2, sys; blosc2.SChunk(chunksize=4_000_000, data=sys.stdin.buffer.read(), urlpath=sys.argv[1], "
            "mode='w', contiguous=True, cparams={'typesize': 4, 'nthreads': 4, 'blocksize': 64000})")
    subprocess.run([sys.executable, "-P", "-c", code, str(path)], input=right, check=True, timeout=50)
    return right


def appended(path):
    """A chunk at a time, the last one short and with a block size of its own."""
    made = blosc2.SChunk(chunksize=1 << 20, urlpath=str(path), mode="w", contiguous=True,
                         cparams={"typesize": 4, "nthreads": 1})
    for _ in range(3):
        made.append_data(smooth(1 << 18))
    made.append_data(smooth(12345))
    return made[:]


FRAMES = {
    f"{codec.name}-{name}": lambda path, codec=codec, filters=filters: schunk(
        path, smooth(100003).tobytes(), 60000, typesize=4, codec=codec, filters=filters,
        filters_meta=[0] * len(filters))
    for codec in (Codec.BLOSCLZ, Codec.LZ4, Codec.LZ4HC, Codec.ZLIB, Codec.ZSTD)
    for name, filters in {"none": [Filter.NOFILTER], "shuffle": [Filter.SHUFFLE], "bitshuffle": [Filter.BITSHUFFLE],
                          "delta": [Filter.DELTA, Filter.SHUFFLE]}.items()
}
FRAMES |= {
    f"typesize-{size}": lambda path, size=size: schunk(
        path, np.repeat(smooth(3000, "u1"), size).tobytes(), 500 * size, typesize=size, blocksize=100 * size)
    for size in (1, 2, 3, 8, 12, 16, 255, 256, 300, 1000)
}
FRAMES |= {
    "bytedelta": lambda path: schunk(path, smooth(100003).tobytes(), 60000, typesize=4, filters_meta=[0, 4],
                                     filters=[Filter.SHUFFLE, Filter.BYTEDELTA]),
    "trunc-prec": lambda path: schunk(path, np.linspace(0, 1, 50000, dtype="f4").tobytes(), 60000, typesize=4,
                                      filters=[Filter.TRUNC_PREC, Filter.SHUFFLE], filters_meta=[8, 0]),
    "noise": lambda path: schunk(path, noise(300001), 70000, typesize=1),
    "noise-delta": lambda path: schunk(path, noise(300000), 70000, typesize=4, filters=[Filter.DELTA, Filter.SHUFFLE],
                                       filters_meta=[0, 0]),
    "level-0": lambda path: schunk(path, smooth(100003).tobytes(), 60000, typesize=4, clevel=0),
    "dictionary": lambda path: schunk(path, smooth(400000).tobytes(), 1 << 20, typesize=4, codec=Codec.ZSTD,
                                      use_dict=True, blocksize=32768),
    "threads": by_threads,
    "tiny-blocks": lambda path: schunk(path, smooth(100003).tobytes(), 60000, typesize=4, blocksize=256),
    "odd-end": lambda path: schunk(path, smooth(100003).tobytes()[:-3], 60000, typesize=1),
    "one-byte": lambda path: schunk(path, b"x", 1000, typesize=1),
    "no-bytes": lambda path: schunk(path, b"", 1000, typesize=1),
    "replaced": replaced_chunks,
    "mixed-specials": mixed_specials,
    "appended": appended,
    "uninitialised": uninitialised,
    "zeros": lambda path: filled(path, [blosc2.SpecialValue.ZERO], 8),
    "nan4": lambda path: filled(path, [blosc2.SpecialValue.NAN], 4),
    "nan8": lambda path: filled(path, [blosc2.SpecialValue.NAN], 8),
    "value": lambda path: filled(path, [blosc2.SpecialValue.VALUE, 7.25], 8),
    "value-7": lambda path: filled(path, [blosc2.SpecialValue.VALUE, b"abcdefg"], 7),
    "value-300": lambda path: filled(path, [blosc2.SpecialValue.VALUE, bytes(range(250)) + bytes(50)], 300, 5000),
}


def cube(shape, dtype="f4"):
    return np.random.default_rng(2).integers(0, 50, shape).astype(dtype)


# name -> (array, chunks, blocks, is it linear)
ARRAYS = {
    "1d": (smooth(100003), (20000,), (4000,), True),
    "1d-padded-blocks": (smooth(100003), (20001,), (3000,), True),
    "1d-struct": (np.ones(5000, "i4,u1,f8"), (700,), (100,), True),
    "2d-rows": (cube((1000, 100)), (100, 100), (10, 100), True),
    "2d-rows-padded": (cube((1003, 100)), (100, 100), (33, 100), True),
    "2d-part-of-rows": (cube((100, 1000)), (1, 250), (1, 50), True),
    "2d-part-of-rows-padded": (cube((100, 1000)), (1, 300), (1, 50), False),
    "2d": (cube((300, 500)), (100, 100), (20, 50), False),
    "2d-padded": (cube((301, 507)), (100, 130), (30, 47), False),
    "2d-blocks-across": (cube((1000, 100)), (100, 100), (10, 50), False),
    "2d-struct": (np.ones((77, 55), "i4,u1,f8"), (20, 30), (7, 11), False),
    "2d-S300": (np.full((40, 30), b"ab" * 150, "S300"), (20, 13), (5, 7), False),
    "3d-planes": (cube((30, 40, 50)), (7, 40, 50), (1, 40, 50), True),
    "3d": (cube((31, 43, 57)), (10, 20, 30), (3, 7, 8), False),
    "3d-inner-whole": (cube((31, 43, 57)), (10, 20, 57), (3, 7, 57), False),
    "5d": (cube((5, 6, 7, 8, 9), "i2"), (2, 3, 4, 5, 6), (1, 2, 3, 2, 4), False),
    "8d": (cube((3,) * 8, "u1"), (2,) * 8, (1, 2) * 4, False),
    "column": (cube((500, 1)), (100, 1), (30, 1), True),
    "row": (cube((1, 5000)), (1, 700), (1, 100), True),
    "scalar": (np.array(3.5), (), (), True),
    "empty": (np.zeros((0, 5)), (1, 5), (1, 5), True),
    "zeros": (np.zeros((301, 507)), (100, 130), (30, 47), False),
    "noise": (np.frombuffer(noise(301 * 507), "u1").reshape(301, 507), (100, 130), (30, 47), False),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames(harness, tmp_path, name):
    path = tmp_path / "a.b2frame"
    right = FRAMES[name](path)
    print("UFFD_SEED", SEED)
    with Frame(harness, path) as frame:
        assert frame.info.linear
        check_all(frame, right, random.Random(SEED))


@pytest.mark.parametrize("filters", [[Filter.SHUFFLE], [Filter.DELTA, Filter.SHUFFLE]], ids=["shuffle", "delta"])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(harness, tmp_path, name, filters):
    path = tmp_path / "a.b2nd"
    values, chunks, blocks, linear = ARRAYS[name]
    array(path, values, chunks, blocks, filters=filters, filters_meta=[0] * len(filters))
    right = values.tobytes()  # and not what blosc2 slices: 4.14 gets arrays of several dimensions with DELTA wrong
    print("UFFD_SEED", SEED)
    with Frame(harness, path) as frame:
        assert frame.info.linear == linear
        assert tuple(frame.info.shape[:frame.info.ndim]) == values.shape
        check_all(frame, right, random.Random(SEED))


@pytest.mark.parametrize("codec,meta", [("NDLZ", 4), ("ZFP_RATE", 50), ("ZFP_PREC", 20)])
def test_plugin_codecs(harness, tmp_path, codec, meta):
    """Codecs that need the array's shape, which the library finds in a handle of its own."""
    path = tmp_path / "a.b2nd"
    values = cube((64, 96), "u1" if codec == "NDLZ" else "f4")
    right = array(path, values, (32, 48), (16, 16), codec=Codec[codec], codec_meta=meta, filters=[Filter.NOFILTER],
                  filters_meta=[0], splitmode=blosc2.SplitMode.NEVER_SPLIT)
    with Frame(harness, path) as frame:
        check_all(frame, right, random.Random(1))


@pytest.mark.parametrize("name", ["2d-padded", "1d-padded-blocks"])
def test_frame_within_a_file(harness, tmp_path, name):
    """A stored member of a zip file: the frame starts at some byte, and the file goes on after it."""
    right = array(tmp_path / "a.b2nd", *ARRAYS[name][:3])
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as zipped:
        zipped.writestr("before", noise(777))
        zipped.write(tmp_path / "a.b2nd", "a.b2nd")
        zipped.writestr("after", noise(999))
        at = zipped.getinfo("a.b2nd").header_offset
    raw = (tmp_path / "a.zip").read_bytes()
    start = raw.index((tmp_path / "a.b2nd").read_bytes()[:16], at)
    with Frame(harness, tmp_path / "a.zip", start) as frame:
        check_all(frame, right, random.Random(1))


def test_slots_are_for_threads(harness, tmp_path):
    """Eight threads, a slot each, over the same frames at once."""
    rights = [appended(tmp_path / "linear"), array(tmp_path / "grid", *ARRAYS["3d"][:3])]
    wrong = []
    with Frame(harness, tmp_path / "linear", 0, 8) as linear, Frame(harness, tmp_path / "grid", 0, 8) as grid:
        def work(slot):
            rng = random.Random(slot)
            for turn in range(150):
                frame, right = (linear, grid)[turn % 2], rights[turn % 2]
                start = rng.randrange(len(right))
                nbytes = min(rng.randrange(1, 100000), len(right) - start)
                if frame.fill(start, nbytes, slot).tobytes() != right[start:start + nbytes]:
                    wrong.append((slot, start, nbytes))

        threads = [threading.Thread(target=work, args=(slot,)) for slot in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# ---- what is refused ------------------------------------------------------------------------------------------------

def expect(code, call, *args):
    with pytest.raises(OSError) as caught:
        call(*args)
    assert errno.errorcode[caught.value.errno] == errno.errorcode[code]


def test_library(harness, tmp_path):
    assert harness.b2_test_version().decode().startswith(blosc2.blosclib_version.split(" ")[0])
    fresh = bind(shutil.copy(harness.path, tmp_path / "other.so"))  # with statics of its own
    info, handle = Info(), ctypes.c_void_p()
    assert fresh.b2_test_version() == b""
    assert fresh.b2_test_open(ctypes.byref(handle), b"x", 0, 1, ctypes.byref(info)) == -errno.ENOSYS
    assert fresh.b2_test_load(os.fsencode(tmp_path / "missing.so")) == -errno.ENOENT
    assert fresh.b2_test_load(os.fsencode(harness.path)) == -errno.ENOSYS, "a library without the symbols"
    impostor = tmp_path / "impostor.c"
    names = ("init", "create_dctx", "free_ctx", "decompress_ctx", "getitem_ctx", "schunk_open_offset", "schunk_free")
    impostor.write_text("const char *blosc2_get_version_string(void) { return \"4.0.0\"; }\n"
                        + "".join(f"void blosc2_{name}(void) {{}}\n" for name in names))
    subprocess.run(["gcc", "-shared", "-fPIC", impostor, "-o", tmp_path / "impostor.so"], check=True)
    assert fresh.b2_test_load(os.fsencode(tmp_path / "impostor.so")) == -errno.ENOSYS, "a version we don't know"
    assert fresh.b2_test_load(library_path().encode()) == 0
    assert fresh.b2_test_load(b"anything, now that one is loaded") == 0


def test_requests_out_of_range(harness, tmp_path):
    array(tmp_path / "a", *ARRAYS["2d"][:3])
    with Frame(harness, tmp_path / "a", slots=1) as frame:
        size = frame.info.nbytes
        expect(errno.EINVAL, frame.fill, 0, 10, 1)
        expect(errno.EINVAL, frame.fill, size, 1)
        expect(errno.EINVAL, frame.fill, size - 1, 2)
        expect(errno.EINVAL, frame.fill, (1 << 64) - 1, 2)
        assert frame.fill(size, 0).size == 0


def test_what_is_no_frame(harness, tmp_path):
    (tmp_path / "noise").write_bytes(noise(5000))
    (tmp_path / "short").write_bytes(b"\x9e\xa8b2frame\0")
    schunk(tmp_path / "a", smooth(5000).tobytes(), 4000, typesize=4)
    expect(errno.ENOENT, Frame, harness, tmp_path / "missing")
    expect(errno.EBADMSG, Frame, harness, tmp_path / "noise")
    expect(errno.EIO, Frame, harness, tmp_path / "short")
    expect(errno.EBADMSG, Frame, harness, tmp_path / "a", 1)
    expect(errno.EIO, Frame, harness, tmp_path / "a", 1 << 40)
    expect(errno.EINVAL, Frame, harness, tmp_path / "a", 0, 0)


def test_what_we_do_not_read(harness, tmp_path):
    blosc2.SChunk(chunksize=4000, data=bytes(8000), urlpath=str(tmp_path / "sparse"), mode="w", contiguous=False)
    expect(errno.ENOTSUP, Frame, harness, tmp_path / "sparse")
    expect(errno.ENOTSUP, Frame, harness, tmp_path / "sparse" / "chunks.b2frame")
    a = blosc2.asarray(smooth(1000), urlpath=str(tmp_path / "a"), mode="w")
    (a + 1).save(urlpath=str(tmp_path / "lazy"), mode="w")
    expect(errno.ENOTSUP, Frame, harness, tmp_path / "lazy")
    blosc2.Proxy(a, urlpath=str(tmp_path / "proxy"), mode="w")
    expect(errno.ENOTSUP, Frame, harness, tmp_path / "proxy")
    raw = bytearray((tmp_path / "a").read_bytes())
    raw[25] = raw[25] & 0xF0 | 9
    (tmp_path / "newer").write_bytes(raw)
    expect(errno.ENOTSUP, Frame, harness, tmp_path / "newer")


def test_a_file_that_ends_early(harness, tmp_path):
    path = tmp_path / "a"
    right = np.frombuffer(schunk(path, noise(300000), 30000, typesize=4), "u1")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    expect(errno.EIO, Frame, harness, path)
    path.write_bytes(whole)
    with Frame(harness, path) as frame:
        os.truncate(path, 100000)
        assert np.array_equal(frame.fill(0, 90000), right[:90000]), "what is still there"
        expect(errno.EIO, frame.fill, 90000, 30000)
        expect(errno.EIO, frame.fill, 290000, 100)
        path.write_bytes(whole)
        assert np.array_equal(frame.fill(0, 300000), right), "an error leaves nothing behind"


# ---- damage ---------------------------------------------------------------------------------------------------------

DAMAGED = {
    "linear": lambda path: schunk(path, smooth(6000).tobytes(), 10000, typesize=4, blocksize=2048),
    "zstd-small": lambda path: schunk(path, noise(300) * 20, 4000, typesize=1, codec=Codec.ZSTD),
    "blosclz": lambda path: schunk(path, smooth(3000, "i2").tobytes(), 4000, typesize=2, codec=Codec.BLOSCLZ,
                                   filters=[Filter.BITSHUFFLE], filters_meta=[0]),
    "lz4-delta": lambda path: schunk(path, smooth(3000).tobytes(), 4000, typesize=4, codec=Codec.LZ4,
                                     filters=[Filter.DELTA, Filter.SHUFFLE], filters_meta=[0, 0]),
    "stored": lambda path: schunk(path, noise(1000), 400, typesize=1),
    "specials": mixed_specials,
    "replaced": lambda path: replaced_chunks(path, 2000),
    "grid": lambda path: array(path, cube((31, 27), "u1"), (10, 13), (3, 7)),
}


def run(program, *args, timeout_s=50, **environment):
    done = subprocess.run([program, library_path(), *map(str, args)], capture_output=True, text=True, timeout=timeout_s,
                          env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.parametrize("name", DAMAGED)
def test_every_byte_changed(program, tmp_path, name):
    """No crash, no overrun; and nearly all of what the header says matters."""
    DAMAGED[name](tmp_path / "a")
    counts = run(program, "flip", tmp_path / "a", 1)
    counts = dict(zip(counts[::2], map(int, counts[1::2]), strict=True))
    print(counts)
    assert counts["open-failed"] > 50
    assert counts["fill-failed"] > 0


@pytest.mark.parametrize("name", DAMAGED)
def test_cut_anywhere(program, tmp_path, name):
    """Never a frame that ends early and opens; what was open reads only what is still there."""
    DAMAGED[name](tmp_path / "a")
    counts = run(program, "cut", tmp_path / "a", 1)
    counts = dict(zip(counts[::2], map(int, counts[1::2]), strict=True))
    print(counts)
    assert counts["other"] == 0, "wrong bytes out of a file that ends early"
    assert counts["open-failed"] == (tmp_path / "a").stat().st_size


def test_no_threads_whatever_the_environment_says(program, tmp_path):
    """BLOSC_NTHREADS overrides every context of the library; the program looks at its threads after each read."""
    schunk(tmp_path / "a", smooth(500000).tobytes(), 1 << 20, typesize=4, blocksize=1 << 15)
    run(program, "flip", tmp_path / "a", 1 << 30, BLOSC_NTHREADS="4")


# ---- what it costs --------------------------------------------------------------------------------------------------

def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_piece_of_a_chunk_reads_a_piece(harness, tmp_path):
    """64 KiB at random out of 1 MiB: its blocks are read and no others; in sequence, each chunk is read once."""
    values = np.random.default_rng(3).integers(0, 1 << 20, 1 << 22).astype("i4")
    right = schunk(tmp_path / "a", values.tobytes(), 1 << 20, typesize=4, codec=Codec.LZ4, blocksize=1 << 16)
    file_bytes = (tmp_path / "a").stat().st_size
    with Frame(harness, tmp_path / "a") as frame:
        target = np.empty(1 << 16, "u1")

        def fill(block):
            assert harness.b2_test_fill(frame.handle, 0, block << 16, target.ctypes.data, 1 << 16) == 0
            assert target.tobytes() == right[block << 16:block + 1 << 16]

        fill(37)
        before = bytes_read()
        for block in (200, 100, 250, 3, 160, 50):
            fill(block)
        assert bytes_read() - before < 6 * 1.2 * file_bytes / 256 + 2000
        before = bytes_read()
        for block in range(256):
            fill(block)
        assert bytes_read() - before < 1.02 * file_bytes + 2000


@pytest.mark.skipif("sanitize" in os.environ.get("LD_PRELOAD", ""), reason="times mean nothing under a sanitizer")
def test_cost_of_a_piece(tmp_path):
    """Blocks, not chunks, are decoded: 64 KiB at random out of 1 MiB costs far less than the chunk (about 1/16)."""
    schunk(tmp_path / "a", smooth(1 << 22, "f4").tobytes(), 1 << 20, typesize=4, codec=Codec.ZSTD, blocksize=1 << 16)
    program = compile_harness(tmp_path / "timing", "-O2")
    plain, fills, chunk, random_piece = map(float, run(program, "time", tmp_path / "a", 1 << 16))
    print(f"in order {plain / fills:.2f} x a plain loop; a piece costs 1/{chunk / random_piece:.1f} of a chunk")
    assert random_piece < chunk / 6
    assert fills < plain / 0.7


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
