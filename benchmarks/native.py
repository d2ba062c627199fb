"""floor.c and placement.c, compiled on first use and called through ctypes (which gives the GIL back for each call)."""
from __future__ import annotations

import ctypes as ct
import functools
import mmap
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SOURCES = ("floor.c", "placement.c", "evict.c", "migrate.c", "track.c")
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")

THREAD, INLINE, INLINE_SHARED = range(3)
(ONE_FREE, ONE_PINNED, PER_CPU, EXCLUSIVE, SPIN, ONE_SPIN, ONE_CHASES, FOLLOW, READ) = range(9)
PAGE_BYTES = os.sysconf("SC_PAGESIZE")
CPUS = os.cpu_count() or 1


class Range(ct.Structure):
    _fields_ = [("base", ct.c_void_p), ("second", ct.c_void_p), ("source", ct.c_void_p), ("nbytes", ct.c_size_t),
                ("source_nbytes", ct.c_size_t), ("block_bytes", ct.c_size_t), ("uffd", ct.c_int), ("memfd", ct.c_int)]


class Touch(ct.Structure):
    _fields_ = [("base", ct.c_void_p), ("offsets", ct.c_void_p), ("count", ct.c_size_t), ("wait_ns", ct.c_void_p),
                ("cpus", ct.c_void_p), ("threads", ct.c_int), ("cpu", ct.c_int)]


class ServeOptions(ct.Structure):
    _fields_ = [("placement", ct.c_int), ("workers", ct.c_int), ("cpu", ct.c_int), ("sample_every", ct.c_int),
                ("spin_ns", ct.c_uint64), ("deep_faults", ct.c_int), ("policy", ct.c_int)]


class ServeCounts(ct.Structure):
    _fields_ = [(name, ct.c_uint64) for name in
                ("served", "wakeups", "armed", "disarmed", "armed_at_end", "sampled", "sample_ns")]


@functools.cache
def library() -> ct.CDLL:
    """The C side, compiled into a directory that only we can write; a source that warns is an error."""
    with tempfile.TemporaryDirectory(prefix="uffd-floor-") as folder:
        target = Path(folder) / "floor.so"
        subprocess.run([os.environ.get("CC", "cc"), *FLAGS, *(str(HERE / name) for name in SOURCES), "-o",
                        str(target)], check=True)
        loaded = ct.CDLL(str(target), use_errno=True)
    loaded.serve_start.restype = ct.c_void_p
    loaded.serve_start.argtypes = [ct.c_void_p, ct.c_void_p]
    loaded.serve_stop.argtypes = [ct.c_void_p, ct.c_void_p]
    loaded.range_open.argtypes = [ct.c_void_p, ct.c_size_t, ct.c_size_t, ct.c_void_p, ct.c_size_t, ct.c_int]
    loaded.fill_bulk.restype = loaded.fill_from_file.restype = loaded.touch_sequential.restype = ct.c_int64
    loaded.evict_cycle.restype = ct.c_int64
    loaded.evict_cycle.argtypes = [ct.c_void_p, ct.c_size_t, ct.c_size_t, ct.c_void_p, ct.c_size_t]
    loaded.scan_written.restype = loaded.protect_range.restype = loaded.fork_pause.restype = ct.c_int64
    loaded.scan_written.argtypes = [ct.c_void_p, ct.c_size_t, ct.c_void_p, ct.c_size_t]
    loaded.protect_range.argtypes = [ct.c_void_p, ct.c_size_t]
    loaded.fill_from_file.argtypes = [ct.c_void_p, ct.c_int, ct.c_size_t, ct.c_int]
    loaded.fill_bulk.argtypes = [ct.c_void_p, ct.c_size_t]
    loaded.touch_sequential.argtypes = [ct.c_void_p, ct.c_size_t, ct.c_size_t]
    assert loaded.range_struct_bytes() == ct.sizeof(Range), "floor.h and native.py disagree"
    return loaded


def check(result: int) -> int:
    """A result of the C side, or OSError for its -errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


@contextmanager
def open_range(nbytes: int, block_bytes: int, source: np.ndarray, delivery: int) -> Iterator[Range]:
    """A registered range whose blocks are filled from `source` by plain C."""
    opened = Range()
    check(library().range_open(ct.byref(opened), nbytes, block_bytes, source.ctypes.data, source.nbytes, delivery))
    try:
        yield opened
    finally:
        library().range_close(ct.byref(opened))


@contextmanager
def serving(served: Range, placement: int, workers: int = 1, *, cpu: int = 0, sample_every: int = 64,
            spin_ns: int = 0, deep_faults: int = 0, policy: int = os.SCHED_OTHER,
            counts: ServeCounts | None = None) -> Iterator[None]:
    """Threads of plain C serve the faults of `served` until the block is left."""
    options = ServeOptions(placement, workers, cpu, sample_every, spin_ns, deep_faults, policy)
    serve = library().serve_start(ct.byref(served), ct.byref(options))
    if not serve:
        raise OSError(ct.get_errno(), "serve_start failed")
    try:
        yield
    finally:
        check(library().serve_stop(serve, ct.byref(counts) if counts is not None else None))


@contextmanager
def serving_inline(served: Range) -> Iterator[None]:
    """Faults of `served` are filled by a SIGBUS handler of plain C until the block is left."""
    check(library().inline_install(ct.byref(served)))
    try:
        yield
    finally:
        check(library().inline_remove())


def fill_bulk(filled: Range, piece_bytes: int) -> float:
    """Seconds to fill the whole range in pieces of that many bytes."""
    return check(library().fill_bulk(ct.byref(filled), piece_bytes)) / 1e9


def fill_from_file(filled: Range, fd: int, piece_bytes: int, threads: int) -> float:
    """Seconds to fill the whole range from a file, by threads pinned to a CPU each: pread, then UFFDIO_COPY."""
    return check(library().fill_from_file(ct.byref(filled), fd, piece_bytes, threads)) / 1e9


def evict_cycle(source: np.ndarray, block_bytes: int, offsets: np.ndarray) -> float:
    """Seconds to fill each of these blocks and take it out again, in recycled pages, without a fault."""
    offsets = np.ascontiguousarray(offsets, dtype=np.uint64)
    return check(library().evict_cycle(source.ctypes.data, source.nbytes, block_bytes, offsets.ctypes.data,
                                       offsets.size)) / 1e9


def scan_written(array: np.ndarray, offsets: np.ndarray) -> float:
    """Seconds of the scan that finds and protects the pages at these offsets, written after the array was armed."""
    return check(library().scan_written(array.ctypes.data, array.nbytes, offsets.ctypes.data, offsets.size)) / 1e9


def protect_range(array: np.ndarray) -> float:
    """Seconds to write-protect the whole array."""
    return check(library().protect_range(array.ctypes.data, array.nbytes)) / 1e9


def fork_pause() -> float:
    """Seconds for which fork() stops its caller."""
    return check(library().fork_pause()) / 1e9


def touch_sequential(base: int, nbytes: int, step_bytes: int = PAGE_BYTES) -> float:
    """Seconds to read one byte of every `step_bytes`, in order, in this thread and without the GIL."""
    return check(library().touch_sequential(base, nbytes, step_bytes)) / 1e9


def touch(base: int, offsets: np.ndarray, threads: int = 1, cpu: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Nanoseconds of each touch, and the CPU that each ended on. The touches run in threads of C, without the GIL."""
    offsets = np.ascontiguousarray(offsets, dtype=np.uint64)
    wait_ns = np.zeros(offsets.size, dtype=np.uint32)
    cpus = np.zeros(offsets.size, dtype=np.int16)
    job = Touch(base, offsets.ctypes.data, offsets.size, wait_ns.ctypes.data, cpus.ctypes.data, threads, cpu)
    check(library().touch(ct.byref(job)))
    return wait_ns, cpus


def warm(nbytes: int) -> None:
    """Touch that much memory in small pages and give it back: free memory that lay idle is slow to touch again."""
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as scratch:
        scratch.madvise(mmap.MADV_NOHUGEPAGE)
        view = np.frombuffer(scratch, dtype=np.uint8)
        view[::PAGE_BYTES] = 1
        del view
