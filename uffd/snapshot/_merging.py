"""What changed against a base, copied out of the file that both methods write: sparse, and as long as the image."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np

from . import _files, _layout
from ._target import Target

_PIECE_BYTES = 4 << 20
_NO_COPY_RANGE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


def changed(fd: int, runs: list[tuple[int, int]], chain: Any, known: bool, stop: Callable[[], None]) -> np.ndarray:
    """(n, 2) of uint64, at and bytes: the pages that differ from the base, which is read for that. known: all that may
    is in `runs`; else `runs` are what the file has, and all else is zeros."""
    nbytes = chain.layout.nbytes
    page, found = _layout.ALIGN_BYTES, []
    mine, theirs = np.zeros(_PIECE_BYTES, np.uint8), np.zeros(_PIECE_BYTES, np.uint8)
    for start, end in _widened(runs, nbytes) if known else [(0, nbytes)]:
        for at in range(start, end, _PIECE_BYTES):
            stop()
            n = min(_PIECE_BYTES, end - at)
            rows = -(-n // page)
            read_all(fd, mine[:n], at)
            chain.read(at, theirs[:n])
            mine[n:rows * page], theirs[n:rows * page] = 0, 0
            differs = mine[:rows * page].view(np.uint64) != theirs[:rows * page].view(np.uint64)
            edges = np.flatnonzero(np.diff(differs.reshape(rows, -1).any(1), prepend=False, append=False))
            found += [(at + low * page, min(at + high * page, end)) for low, high in edges.reshape(-1, 2).tolist()]
    return _extents(found)


def _widened(runs: list[tuple[int, int]], nbytes: int) -> list[tuple[int, int]]:
    """Sorted, joined where they touch."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        end = min(stop, nbytes)
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        elif end > start:
            out.append((start, end))
    return out


def _extents(runs: list[tuple[int, int]]) -> np.ndarray:
    joined = np.array(_widened(runs, 1 << 62), np.uint64).reshape(-1, 2)
    joined[:, 1] -= joined[:, 0]
    return joined


def pairs(extents: np.ndarray) -> Iterator[tuple[int, int]]:
    for at, nbytes in extents.tolist():
        yield at, at + nbytes


def copied(fd: int, extents: np.ndarray, to: int, offset: int, stop: Callable[[], None]) -> int:
    """Copies the pieces one behind the other; how many bytes they are."""
    done = 0
    for start, end in pairs(extents):
        at = start
        while at < end:
            stop()
            n = _copied_piece(fd, at, to, offset + done, min(end - at, _PIECE_BYTES))
            at, done = at + n, done + n
    return done


def _copied_piece(fd: int, at: int, to: int, offset: int, nbytes: int) -> int:
    try:
        n = os.copy_file_range(fd, to, nbytes, at, offset)
        if n:
            return n
    except OSError as error:
        if error.errno not in _NO_COPY_RANGE:
            raise
    data = os.pread(fd, nbytes, at)
    if not data:
        raise OSError(errno.ENODATA, f"what was written of an image ends at byte {at}")
    _files.write_all(to, data, offset)
    return len(data)


def read_all(fd: int, out: np.ndarray, offset: int) -> None:
    done, view = 0, memoryview(cast(Any, out))
    while done < len(view):
        n = os.preadv(fd, [view[done:]], offset + done)
        if n == 0:
            raise OSError(errno.ENODATA, f"what was written of an image ends at byte {offset + done}")
        done += n


def packed(target: Target, path: str, codec: str) -> None:
    """Compresses what is in `target`, which is given up, to `path`: whole or not at all, as `uffd.pack`."""
    from ..formats import packing

    packing.pack_file(target.as_path, path, codec=codec)
