"""Memory that is not ours: which addresses an array has, what is mapped there, and what can be done with it."""

from __future__ import annotations

import bisect
import errno
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._coreless import core as _core
from .errors import SnapshotError, Unavailable

__all__ = ["Memory", "imaged_shared", "memory_of", "refusal", "refuse_unmapped", "span_of", "widened"]

_SHARED_MEMORY = ("/dev/shm/", "/memfd:", "/dev/zero (deleted)", "/SYSV")


@dataclass(frozen=True)
class Memory:
    """A piece of the address space, as /proc/self/maps tells of it."""

    start: int
    end: int
    readable: bool
    writable: bool
    shared: bool
    path: str                                    # "" or "[heap]": no file is behind it

    @property
    def anonymous(self) -> bool:
        """Private memory that no file is behind."""
        return not self.shared and not self.path.startswith("/")

    @property
    def is_shared_memory(self) -> bool:
        return self.shared and self.path.startswith(_SHARED_MEMORY)


def memory_of(start: int, end: int) -> list[Memory]:
    """What is mapped in [start, end), in order."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            fields = line.split(maxsplit=5)
            low, high = (int(part, 16) for part in fields[0].split("-"))
            if low < end and start < high:
                flags = fields[1]
                found.append(Memory(low, high, flags[0] == "r", flags[1] == "w", flags[3] == "s",
                                    fields[5].rstrip("\n") if len(fields) > 5 else ""))
    return found


def span_of(x: Any) -> tuple[Any, int, int]:
    """(the array that x is, its first address, the address behind its last byte). TypeError for what has no memory of
    its own, or holds Python objects; ValueError for what nobody can write to, or is empty."""
    array = x if isinstance(x, np.ndarray) else np.asarray(x if _numpy_takes(x) else memoryview(x))
    if array.dtype.hasobject:
        raise TypeError(f"dtype {array.dtype} holds Python objects: their addresses lie in the array, they do not")
    if not array.flags.writeable:
        raise ValueError("the array is read-only: nobody writes to it through this array")
    byte_bounds = getattr(np, "byte_bounds", None) or np.lib.array_utils.byte_bounds    # numpy 1, numpy 2
    start, end = byte_bounds(array)
    if array.size == 0 or start >= end:
        raise ValueError("the array is empty: it has no memory")
    return array, int(start), int(end)


def _numpy_takes(x: Any) -> bool:
    """Whether numpy sees the memory of x itself; of other things it would make an array of its own."""
    return hasattr(x, "__array_interface__") or hasattr(x, "__dlpack__")


def widened(start: int, end: int) -> tuple[int, int]:
    """To whole pages: what else lies on the pages at the edges is in it, too."""
    page = _core.PAGE_BYTES
    return start // page * page, -(-end // page) * page


def refuse_unmapped(pieces: list[Memory], start: int, end: int) -> None:
    """ValueError unless all of [start, end) is mapped, and can be read and written."""
    at = start
    for piece in pieces:
        if piece.start > at:
            break
        if not piece.writable or not piece.readable:
            raise ValueError(f"{_where(start, end)}: {piece.path or 'its memory'} is mapped without leave to "
                             f"{'write' if piece.readable else 'read'}")
        at = piece.end
    if at < end:
        raise ValueError(f"{_where(start, end)}: nothing is mapped at {at:#x}")


def refusal(number: int, start: int, end: int, what: str) -> Exception:
    """Why the kernel does not watch memory, as an exception with the cure."""
    where = f"{_where(start, end)} can't be {what}: "
    if number == errno.EBUSY:
        return ValueError(where + "another userfaultfd has a part of it: a snapshot of it that is under way (wait for "
                          "its end), a tracker (close it first), or another program's")
    if number in (errno.ENOENT, errno.EFAULT):
        return SnapshotError(f"tracking lost: {where}a part of it was freed, moved or mapped anew")
    if number in (errno.EINVAL, errno.ENOTTY):
        return Unavailable(errno.ENOTSUP, where + "this kernel has no write protection for memory of that kind "
                           f"({', '.join(sorted({p.path or 'private' for p in memory_of(start, end)}))})")
    if number in (errno.ENOTSUP, errno.EPERM, errno.ENOSYS, errno.EACCES):
        return Unavailable(number, where + f"{os.strerror(number)}; `python -m uffd probe` says what this machine "
                           "grants, and the cures")
    if number == errno.ENOMEM:
        return MemoryError(where + os.strerror(number))
    return OSError(number, where + os.strerror(number))


def _where(start: int, end: int) -> str:
    return f"memory of {end - start} bytes at {start:#x}"


def imaged_shared(pieces: list[Memory], start: int, end: int) -> bool:
    """Whether whole pages of memory that is to be imaged are shared memory. pieces: of `memory_of`, all of [start, end)
    among them. ValueError for what can't be imaged."""
    at = max(0, bisect.bisect_right(pieces, start, key=lambda piece: piece.start) - 1)
    found = []
    while at < len(pieces) and pieces[at].start < end:
        if start < pieces[at].end:
            found.append(pieces[at])
        at += 1
    refuse_unmapped(found, start, end)
    for piece in found:
        if not piece.anonymous and not piece.is_shared_memory:
            raise ValueError(f"{_where(start, end)} is mapped from {piece.path}: a file mapping can be tracked, not "
                             "imaged (the kernel can't stop writes to it); copy it, or take the snapshot by fork")
    return any(piece.shared for piece in found)
