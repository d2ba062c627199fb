"""`core`: the extension, or, where there is none (not Linux, or its file is missing), this module in its place.

What stands in has the names that the package needs to be imported and to fill regions whole (eager.py), and nothing
that serves a fault. Why there is no extension is in `reason`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

reason: str | None = None

PAGE_BYTES = mmap.ALLOCATIONGRANULARITY if os.name == "nt" else mmap.PAGESIZE
MAX_BLOCK = 16 << 20
MAX_WORKERS_BASE = 64
MAX_HOST_COUNT = 8
JOB_PREFETCH, JOB_POPULATE = 2, 3
STATES = {"missing": 0, "filling": 1, "clean": 2, "unprotecting": 3, "dirty": 4, "poisoned": 5,
          "evicting": 6, "pooled": 7, "pooled_dirty": 8, "copying": 9}
COUNTER_NAMES = ("faults_read", "faults_write", "faults_wp", "blocks_demand", "blocks_readahead", "blocks_prefetch",
                 "bytes_filled", "duplicates", "retries", "errors", "poisoned", "readahead_wasted", "repaired",
                 "evicted", "rescued", "written_back", "bytes_written", "write_errors", "evict_waits", "evict_busy",
                 "recycled", "bytes_stored")
STAGE_NAMES = ("queue", "fill", "resolve", "write")


def mode() -> tuple[str, int]:
    return "none", errno.ENOSYS


def supports(feature: str) -> bool:
    return False


def sigbus_check() -> bool:
    return False


def base_at(address: int) -> int | None:
    return None


class Region:
    """The base of uffd.Region; its subclass in eager.py needs none of the extension's."""


class Job:
    """Named in annotations; never made."""


class Engine:
    def __init__(self, *_: object) -> None:
        _refuse()


class Filler:
    """What a provider keeps of its core side: sizes, whether it writes, and a file that it opened."""

    def __init__(self, kind: str, nbytes: int | None, fd: int = -1, kept: object = None, writes: bool = False) -> None:
        self.kind, self.nbytes, self.fd, self.kept, self.writes = kind, nbytes, fd, kept, writes
        self.span = None

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def again(self) -> Filler:
        return self

    def shared(self, writable: bool) -> Filler:
        return self

    @staticmethod
    def zero(packs: bool = False) -> Filler:
        return Filler("zero", None)

    @staticmethod
    def memory(buffer: Any) -> Filler:
        view = memoryview(buffer)
        if not (view.c_contiguous or view.f_contiguous):
            raise BufferError("the buffer is not contiguous")
        return Filler("memory", view.nbytes, kept=view)

    @staticmethod
    def open_file(fd: int, offset: int, nbytes: int, direct: bool, writable: bool = False) -> Filler:
        return Filler("file", nbytes, fd, writes=writable)

    @staticmethod
    def checked_file(fd: int, side: int, offset: int, nbytes: int, writable: bool) -> Filler:
        _refuse()

    @staticmethod
    def native_pointer(function: int, user_data: int, inline_safe: bool, keep: object, write: int = 0) -> Filler:
        return Filler("native", None, kept=keep, writes=write != 0)


def capsule_address(capsule: object) -> tuple[int, int]:
    """Pointer and context of a PyCapsule, whatever its name."""
    api: Any = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = api.PyCapsule_GetContext.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_GetContext.argtypes = [ctypes.py_object]
    name = api.PyCapsule_GetName(capsule)
    return api.PyCapsule_GetPointer(capsule, name) or 0, api.PyCapsule_GetContext(capsule) or 0


def buffer_address(buffer: Any) -> int:
    return np.asarray(buffer).__array_interface__["data"][0]


def wait_for_graves() -> None:
    """Nothing to wait for: no region was ever served."""


def make_checksums(fd: int, side: int, offset: int, nbytes: int, id: int) -> None:
    _refuse()


def _refuse() -> NoReturn:
    raise OSError(errno.ENOSYS, f"the extension uffd._core is not here: {reason}")


if TYPE_CHECKING:
    from . import _core as core
else:
    core = sys.modules[__name__]
    if not sys.platform.startswith("linux"):
        reason = f"userfaultfd is a call of Linux, and this is {sys.platform}"
    else:
        try:
            from . import _core as core  # noqa: F401
        except ImportError as error:
            reason = str(error)
