"""The native providers: the right bytes, or an error that names what went wrong; never zeros in between."""

import ctypes
import errno
import gc
import mmap
import os
import sys
import sysconfig
import subprocess

import numpy as np
import pytest
import uffd
from support import native
from support.native import controlled, library
from support.pattern import pattern
from support.scripts import run_script
from uffd import providers

PAGE = uffd._core.PAGE_BYTES
BLOCK = 65536
NBYTES = 6 * BLOCK


def assert_content(region, right):
    array = region.array()
    np.testing.assert_array_equal(array, np.frombuffer(right, "u1"))
    del array


# ---- Zero ----

def test_zero_over_stale_pages(make):
    """Goal: Zero gives zeros, again and again, in pages that held other things before."""
    for _ in range(3):
        region = make(NBYTES, providers.Zero())
        array = region.array()
        assert not array.any()
        array[:] = 255
        assert array.min() == 255
        del array
        region.close()


def test_zero_needs_a_size(make):
    with pytest.raises((ValueError, TypeError)):
        make(None, providers.Zero())


# ---- Memory ----

@pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "array", "mmap", "odd address"])
def test_memory_over_any_buffer(make, kind):
    content = pattern(0, NBYTES + 5)
    buffer = {
        "bytes": lambda: content.tobytes(),
        "bytearray": lambda: bytearray(content),
        "memoryview": lambda: memoryview(content.tobytes()),
        "array": lambda: content.copy(),
        "mmap": lambda: mmap.mmap(-1, NBYTES + 5),
        "odd address": lambda: np.concatenate([np.zeros(3, "u1"), content])[3:],
    }[kind]()
    if kind == "mmap":
        buffer[:] = content.tobytes()
    region = make(None, providers.Memory(buffer))
    assert region.nbytes == NBYTES + 5
    assert_content(region, content)
    region.close()


def test_memory_of_other_dtypes(make):
    source = np.arange(NBYTES // 8, dtype="f8").reshape(-1, 4)
    region = make(None, providers.Memory(source))
    array = region.array("f8", source.shape)
    np.testing.assert_array_equal(array, source)
    del array


def test_memory_keeps_its_buffer(make):
    source = bytearray(pattern(0, NBYTES))
    region = make(None, providers.Memory(source))
    with pytest.raises(BufferError):
        source.clear()  # exported: can't be resized under the region
    assert_content(region, pattern(0, NBYTES))
    region.close()
    del region
    gc.collect()


@pytest.mark.parametrize("bad", [np.arange(100)[::2], np.zeros((8, 8))[:, ::2]], ids=["stride", "columns"])
def test_memory_refuses_scattered_buffers(bad):
    with pytest.raises((ValueError, BufferError)):
        providers.Memory(bad)


@pytest.mark.parametrize("bad", [None, 5, "text", [1, 2]], ids=str)
def test_memory_refuses_what_is_no_buffer(bad):
    with pytest.raises(TypeError):
        providers.Memory(bad)


@pytest.mark.parametrize("part", ["whole", "view"])
def test_memory_over_a_region_of_the_same_engine_is_refused(make, part):
    """Goal: a worker that would wait for itself is refused when the region is made, by name."""
    array = make(NBYTES, controlled()[0], name="below").array()
    source = array if part == "whole" else array[PAGE:2 * PAGE]
    with pytest.raises(ValueError, match="below|same engine"):
        make(None, providers.Memory(source))
    del array, source


def test_memory_over_a_region_of_another_engine(where):
    """Goal: regions stacked over two engines are refused, or right: a fill may fault in the other engine's region.
    Method: a script, since a wrong answer here is SIGBUS or a hang."""
    run_script("""
provider, control = controlled()
with uffd.Engine(workers=1) as below, uffd.Engine(workers=1) as above:
    source = region(16 * BLOCK, provider, engine=below).array()
    try:
        top = region(None, providers.Memory(source), engine=above)
    except ValueError as error:
        assert "region" in str(error)
        os._exit(0)
    top.populate((0, 4 * BLOCK))
    assert checked(top.address, 0, 16 * BLOCK) is None
    del source
""", where=where).check()


# ---- File ----

@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(pattern(0, NBYTES + 1234).tobytes())
    return path


@pytest.mark.parametrize("as_type", [str, os.fspath, lambda path: path], ids=["str", "fspath", "Path"])
def test_file(make, data_file, as_type):
    region = make(None, providers.File(as_type(data_file)))
    assert region.nbytes == NBYTES + 1234
    assert_content(region, pattern(0, NBYTES + 1234))
    region.close()


@pytest.mark.parametrize("offset", [1, 511, PAGE, PAGE + 1, BLOCK + 7])
def test_file_offset(make, data_file, offset):
    region = make(None, providers.File(data_file, offset))
    assert region.nbytes == NBYTES + 1234 - offset
    assert_content(region, pattern(offset, NBYTES + 1234 - offset))
    region.close()


def test_file_direct(make, tmp_path, data_file):
    """Goal: O_DIRECT gives the same bytes, the ragged end included. Skipped where the file system has none."""
    try:
        os.close(os.open(data_file, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no O_DIRECT on the file system of {tmp_path}: {error}")
    region = make(None, providers.File(data_file, direct=True))
    assert_content(region, pattern(0, NBYTES + 1234))
    region.close()


def test_file_direct_at_an_odd_offset(make, data_file):
    """Goal: an offset that O_DIRECT can't read from is refused, or read right."""
    try:
        region = make(None, providers.File(data_file, 100, direct=True))
    except (ValueError, OSError):
        return
    assert_content(region, pattern(100, NBYTES + 1234 - 100))
    region.close()


def test_file_removed_while_in_use(make, data_file):
    region = make(None, providers.File(data_file))
    data_file.unlink()
    assert_content(region, pattern(0, NBYTES + 1234))
    region.close()


@pytest.mark.parametrize("direct", [False, True])
def test_file_truncated_under_us(make, data_file, direct):
    """Goal: bytes that the file no longer has are an error, not zeros; what it still has is right."""
    try:
        region = make(None, providers.File(data_file, direct=direct), retries=0, readahead_bytes=0)
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")
    os.truncate(data_file, 2 * BLOCK + 100)
    with pytest.raises(uffd.ProviderError) as caught:
        region.populate((3 * BLOCK, 4 * BLOCK))
    assert caught.value.offset == 3 * BLOCK and caught.value.errno
    assert "data.bin" in str(caught.value)
    with pytest.raises(uffd.ProviderError):
        region.populate((2 * BLOCK, 3 * BLOCK))  # begins in the file, ends behind it
    array = region.array()
    np.testing.assert_array_equal(array[:2 * BLOCK], pattern(0, 2 * BLOCK))
    del array
    region.close()


def test_file_grown_again_is_repaired(make, data_file):
    region = make(None, providers.File(data_file), retries=0)
    os.truncate(data_file, BLOCK)
    with pytest.raises(uffd.ProviderError):
        region.populate()
    data_file.write_bytes(pattern(0, NBYTES + 1234).tobytes())
    region.populate()
    assert_content(region, pattern(0, NBYTES + 1234))
    region.close()


def test_file_refusals(make, tmp_path, data_file):
    for path, error in [(tmp_path / "absent", FileNotFoundError), (tmp_path, OSError)]:
        with pytest.raises(error) as caught:
            make(None, providers.File(path))
        assert str(path) in str(caught.value)
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises((ValueError, OSError)):
        make(None, providers.File(empty))
    with pytest.raises((ValueError, OSError)):
        make(None, providers.File(data_file, NBYTES + 5000))
    with pytest.raises((ValueError, OverflowError)):
        make(None, providers.File(data_file, -1))
    with pytest.raises(ValueError):
        make(NBYTES + 1235, providers.File(data_file))


def test_file_on_what_can_not_seek(make, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises((OSError, ValueError)):
        make(PAGE, providers.File(tmp_path / "fifo"))


def test_file_source_is_never_written(make, data_file):
    array = make(None, providers.File(data_file)).array()
    array[:] = 0
    del array
    assert data_file.read_bytes() == pattern(0, NBYTES + 1234).tobytes()


# ---- Blosc2File ----

@pytest.fixture(scope="module")
def blosc2():
    return pytest.importorskip("blosc2", reason="blosc2 is not installed (the extra of the same name)")


def make_frame(blosc2, path, content, **cparams):
    cparams = {"typesize": 8, "nthreads": 1, **cparams}
    schunk = blosc2.SChunk(chunksize=2 * BLOCK, contiguous=True, urlpath=str(path), mode="w", cparams=cparams,
                           dparams={"nthreads": 1})
    for start in range(0, len(content), 2 * BLOCK):
        schunk.append_data(content[start:start + 2 * BLOCK])
    del schunk


def compressible(nbytes):
    return (np.arange(nbytes // 8, dtype="<u8") // 3).view("u1")


@pytest.mark.parametrize("block_bytes", [PAGE, BLOCK, 4 * BLOCK])
@pytest.mark.parametrize("content", ["compressible", "random", "zeros"])
def test_blosc2_frame(make, tmp_path, blosc2, block_bytes, content):
    nbytes = 7 * BLOCK + 8 * 33
    data = {"compressible": compressible(nbytes), "random": pattern(0, nbytes),
            "zeros": np.zeros(nbytes, "u1")}[content]
    make_frame(blosc2, tmp_path / "x.b2frame", data)
    region = make(None, providers.Blosc2File(tmp_path / "x.b2frame"), block_bytes=block_bytes)
    assert region.nbytes == nbytes
    assert_content(region, data)
    region.close()


def test_blosc2_frame_inside_a_file(make, tmp_path, blosc2):
    data = compressible(3 * BLOCK)
    make_frame(blosc2, tmp_path / "x.b2frame", data)
    (tmp_path / "outer").write_bytes(b"head" * 100 + (tmp_path / "x.b2frame").read_bytes() + b"tail" * 10)
    region = make(None, providers.Blosc2File(tmp_path / "outer", offset=400))
    assert_content(region, data)
    region.close()


def test_blosc2_damage_is_an_error(make, tmp_path, blosc2):
    """Goal: a truncated or overwritten frame raises; zeros never come out of it."""
    data = pattern(0, 8 * BLOCK)
    make_frame(blosc2, tmp_path / "x.b2frame", data)
    whole = (tmp_path / "x.b2frame").read_bytes()
    for name, damaged in [("cut", whole[:len(whole) // 2]), ("empty", b""), ("noise", pattern(0, 5000).tobytes()),
                          ("head", whole[:20])]:
        path = tmp_path / name
        path.write_bytes(damaged)
        with pytest.raises((ValueError, OSError, uffd.UffdError)):
            region = make(None, providers.Blosc2File(path), retries=0)
            region.populate()


def test_blosc2_chunk_damaged_under_us(make, tmp_path, blosc2):
    data = pattern(0, 8 * BLOCK)
    path = tmp_path / "x.b2frame"
    make_frame(blosc2, path, data)
    region = make(None, providers.Blosc2File(path), retries=0)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(uffd.ProviderError):
        region.populate((6 * BLOCK, 8 * BLOCK))
    region.close()


# ---- Native ----

def test_native_pattern_without_user_data(make):
    region = make(NBYTES, providers.Native(library().fill_pattern, inline_safe=True))
    assert_content(region, pattern(0, NBYTES))
    region.close()


@pytest.mark.parametrize("form", ["int", "c_void_p", "structure", "byref-able pointer"])
def test_native_user_data_forms(make, form):
    control = native.Control(seed=99)
    address = ctypes.addressof(control)
    user_data = {"int": lambda: address, "c_void_p": lambda: ctypes.c_void_p(address),
                 "structure": lambda: control, "byref-able pointer": lambda: ctypes.pointer(control)}[form]()
    region = make(NBYTES, providers.Native(library().fill_control, user_data, inline_safe=True))
    assert_content(region, pattern(0, NBYTES, 99))
    region.close()


def test_native_keeps_function_and_user_data(make):
    """Goal: the pointer objects live as long as the region. Method: drop ours, collect, touch."""
    pointer = ctypes.pointer(native.Control(seed=5))
    provider = providers.Native(library().fill_control, pointer, inline_safe=True)
    region = make(NBYTES, provider)
    del pointer, provider
    gc.collect()
    np.zeros(1 << 16).sum()
    assert_content(region, pattern(0, NBYTES, 5))
    region.close()


def test_native_that_is_not_inline_safe(make):
    """Goal: a fill of which nobody said that it may run in a signal handler is run by a worker, in every delivery."""
    provider, control = controlled(inline_safe=False)
    region = make(NBYTES, provider)
    assert_content(region, pattern(0, NBYTES))
    region.close()


@pytest.mark.parametrize("what", ["lambda", "ctypes callback", "pyfunc", "none", "number 0", "str"])
def test_native_refuses_python(what):
    """Goal: what runs Python code, which would need the GIL in a worker, is refused by name."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t)
    bad = {"lambda": lambda *_: 0, "ctypes callback": prototype(lambda *_: 0),
           "pyfunc": ctypes.pythonapi.PyErr_Occurred, "none": None, "number 0": 0, "str": "fill"}[what]
    with pytest.raises((TypeError, ValueError)):
        providers.Native(bad)


def test_native_cast_of_a_ctypes_function(make):
    """Goal: a C function reached by a cast pointer works like the function itself."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t)
    address = ctypes.cast(library().fill_pattern, ctypes.c_void_p).value
    region = make(NBYTES, providers.Native(prototype(address), inline_safe=True))
    assert_content(region, pattern(0, NBYTES))
    region.close()


@pytest.fixture(scope="module")
def scipy():
    return pytest.importorskip("scipy", reason="scipy is not installed")


def test_native_from_scipy(make, scipy):
    function = library().fill_control
    control = native.Control(seed=3)
    callable_ = scipy.LowLevelCallable(function, ctypes.cast(ctypes.pointer(control), ctypes.c_void_p))
    region = make(NBYTES, providers.Native(callable_, inline_safe=True))
    assert_content(region, pattern(0, NBYTES, 3))
    region.close()


@pytest.fixture(scope="module")
def numba_fill():
    """Made once: the compiler's threads and mappings stay."""
    numba = pytest.importorskip("numba", reason="numba is not installed")
    types = numba.types

    @numba.cfunc(types.intc(types.voidptr, types.uint64, types.CPointer(types.uint8), types.uintp), nopython=True)
    def fill(self, offset, block, nbytes):
        for index in range(nbytes):
            block[index] = (offset + index) * 7 % 251
        return 0

    return fill


def test_native_from_numba(make, numba_fill):
    """Goal: a Numba @cfunc, which runs without the interpreter, is a provider."""
    region = make(NBYTES, providers.Native(numba_fill, inline_safe=True))
    assert_content(region, (np.arange(NBYTES, dtype="u8") * 7 % 251).astype("u1"))
    region.close()


CYTHON_SOURCE = """
# cython: language_level=3
from libc.stdint cimport uint64_t
cdef api int fill(void *self, uint64_t offset, void *block, size_t nbytes) noexcept nogil:
    cdef size_t i
    for i in range(nbytes):
        (<unsigned char *>block)[i] = <unsigned char>((offset + i) * 11 % 253)
    return 0
"""


@pytest.fixture(scope="module")
def cython_module(tmp_path_factory):
    pytest.importorskip("Cython", reason="Cython is not installed")
    directory = tmp_path_factory.mktemp("cython")
    (directory / "uffd_test_fill.pyx").write_text(CYTHON_SOURCE)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([sys.executable, "-m", "cython", "-3", "uffd_test_fill.pyx"], cwd=directory, timeout=60,
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    include = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(include, "Python.h")):
        pytest.skip(f"no Python.h in {include}")
    done = subprocess.run([native.compiler(), "-O1", "-w", "-shared", "-fPIC", f"-I{include}", "uffd_test_fill.c", "-o",
                           "uffd_test_fill.so"], cwd=directory, timeout=60, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
    sys.path.insert(0, str(directory))
    try:
        import uffd_test_fill
    finally:
        sys.path.remove(str(directory))
    return uffd_test_fill


def test_native_from_a_cython_capsule(make, cython_module):
    capsule = cython_module.__pyx_capi__["fill"]
    region = make(NBYTES, providers.Native(capsule, inline_safe=True))
    assert_content(region, (np.arange(NBYTES, dtype="u8") * 11 % 253).astype("u1"))
    region.close()


def test_native_error_numbers(make):
    """Goal: -errno of the fill is the error's errno; the block is asked for once and retries times more."""
    provider, control = controlled()
    control.fail(BLOCK, 2 * BLOCK, errno.ENOSPC)
    region = make(NBYTES, provider, retries=2, block_bytes=BLOCK, readahead_bytes=0)
    with pytest.raises(uffd.ProviderError) as caught:
        region.populate((BLOCK, 2 * BLOCK))
    assert caught.value.errno == errno.ENOSPC and caught.value.tries == 3 and control.calls == 3
    region.close()


def test_nbytes_attribute(data_file):
    assert providers.Memory(bytes(10)).nbytes == 10
    assert providers.File(data_file).nbytes == NBYTES + 1234
    assert providers.Zero().nbytes is None
    assert providers.Native(library().fill_pattern).nbytes is None
