"""The C helpers of native.c for Python: compiled once per run, loaded with ctypes."""

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ORDER_MAX = 16384
FOR_EVER = -1


class Control(ctypes.Structure):
    """What fill_control does: struct control of native.c, field for field."""

    _fields_ = [
        ("seed", ctypes.c_uint64), ("nbytes_max", ctypes.c_uint64),
        ("calls", ctypes.c_uint64), ("delay_us", ctypes.c_uint64),
        ("fail_start", ctypes.c_uint64), ("fail_stop", ctypes.c_uint64),
        ("fail_errno", ctypes.c_int64), ("fail_times", ctypes.c_int64),
        ("gate_start", ctypes.c_uint64), ("gate_stop", ctypes.c_uint64),
        ("gate_closed", ctypes.c_uint32), ("gate_waiters", ctypes.c_uint32),
        ("end_start", ctypes.c_uint64), ("end_stop", ctypes.c_uint64),
        ("end_how", ctypes.c_uint32), ("overlaps", ctypes.c_uint32),
        ("count_block_bytes", ctypes.c_uint64),
        ("counts", ctypes.c_void_p), ("running", ctypes.c_void_p),
        ("order_n", ctypes.c_uint64), ("order", ctypes.c_uint64 * ORDER_MAX),
    ]

    def count_blocks(self, nbytes, block_bytes):
        """Count the fills of each block; returns the live uint32 array of counts."""
        blocks = -(-nbytes // block_bytes)
        self._count_arrays = np.zeros(blocks, np.uint32), np.zeros(blocks, np.uint32)
        self.count_block_bytes = block_bytes
        self.counts, self.running = (array.ctypes.data for array in self._count_arrays)
        return self._count_arrays[0]

    def fail(self, start, stop, errno, times=FOR_EVER):
        self.fail_start, self.fail_stop, self.fail_errno, self.fail_times = start, stop, errno, times

    def close_gate(self, start, stop):
        self.gate_start, self.gate_stop, self.gate_closed = start, stop, 1

    def open_gate(self):
        self.gate_closed = 0

    def arrivals(self):
        """Offsets of the fills, in order of arrival."""
        return list(self.order[: min(self.order_n, ORDER_MAX)])


class BounceResult(ctypes.Structure):
    _fields_ = [("operations", ctypes.c_uint64), ("wrong", ctypes.c_uint64)]


def compiler():
    return shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")


@functools.lru_cache(maxsize=None)
def build_directory():
    directory = tempfile.mkdtemp(prefix="uffd-tests-")
    os.chmod(directory, 0o755)  # scripts that drop their privileges load from here
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(directory, ignore_errors=True))
    return Path(directory)


def compile_library(source, *flags):
    """Path of a shared library made of one C file; skips the test where there is no compiler."""
    if compiler() is None:
        import pytest

        pytest.skip("no C compiler (gcc, cc or $CC)")
    target = build_directory() / (Path(source).stem + ".so")
    command = [compiler(), "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", target, source,
               "-pthread", "-ldl", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    if done.returncode:
        raise RuntimeError(f"{source} does not compile:\n{done.stderr}")
    return target


def library_path():
    """The compiled native.c; scripts in subprocesses find their parent's in UFFD_TEST_NATIVE."""
    if "UFFD_TEST_NATIVE" not in os.environ:
        os.environ["UFFD_TEST_NATIVE"] = str(compile_library(HERE / "native.c"))
    return os.environ["UFFD_TEST_NATIVE"]


@functools.lru_cache(maxsize=None)
def library():
    lib = ctypes.CDLL(library_path(), use_errno=True)
    pointer, size, u64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
    signatures = {
        "fill_control": (ctypes.c_int, pointer, u64, pointer, size),
        "fill_pattern": (ctypes.c_int, pointer, u64, pointer, size),
        "touch_sum": (u64, pointer, size, size),
        "check_pattern": (u64, pointer, u64, size, u64),
        "touch_keeps_errno": (ctypes.c_int, pointer),
        "touch_guarded": (ctypes.c_int, pointer),
        "touch_in_pthread": (u64, pointer, size, size, size),
        "touch_detached": (ctypes.c_int, pointer, size, size),
        "install_handler": (ctypes.c_int, ctypes.c_int, ctypes.c_int),
        "handler_count": (u64,),
        "handler_last_address": (pointer,),
        "storm_start": (pointer, ctypes.c_int, ctypes.c_uint),
        "storm_stop": (u64, pointer),
        "store_read": (ctypes.c_int, pointer, u64, pointer, size),
        "store_write": (ctypes.c_int, pointer, u64, pointer, size),
        "oracle_write": (None, pointer, size, size),
        "oracle_visit": (ctypes.c_int, pointer, size, size, u64, u64, pointer, pointer),
        "oracle_check": (u64, pointer, size, size, pointer),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def controlled(control=None, **native_options):
    """(uffd.providers.Native over fill_control, its Control)."""
    import uffd

    control = Control() if control is None else control
    native_options.setdefault("inline_safe", True)
    provider = uffd.providers.Native(library().fill_control, ctypes.addressof(control), **native_options)
    keep_for_ever(control)
    return provider, control


def keep_for_ever(thing):
    """Its address was given away as an integer, to C that may use it until the process is gone: after the interpreter
    has freed all that modules hold, too."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def checked(address, offset, nbytes, seed=0):
    """None if the memory at address holds the pattern from offset on, else the first wrong offset. Drops the GIL."""
    first_wrong = library().check_pattern(address, offset, nbytes, seed)
    return None if first_wrong == 0 else offset + first_wrong - 1
