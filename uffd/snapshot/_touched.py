"""The working set of an image, beside it: which blocks are touched first, in their order, and a copy of their bytes in
the order in which they will be asked for, so that a cold start reads one piece of the disk from beginning to end."""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._coreless import core as _core
from . import _files, _layout
from ._target import Target

SUFFIX = ".touched"
_HEAD = struct.Struct("<8s32sQQQ")             # magic, the image's number, block bytes, blocks, those with bytes
_MAGIC = b"uffdtch2"
_DIGEST_BYTES = 16
_FIRST_WINDOW, _LAST_WINDOW = 16, 1024         # blocks that are brought in one sweep
_GROUP = 16                                    # blocks that are written at once


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """What such a file says. sums: 64 bits for each block whose bytes it has, all of them or none."""

    path: str
    block_bytes: int
    blocks: np.ndarray                         # uint32, in the order of their first touches
    sums: bytes
    seed: int

    @property
    def data_offset(self) -> int:
        head = _HEAD.size + 4 * len(self.blocks) + len(self.sums) + _DIGEST_BYTES
        return _layout.round_up(head, _layout.ALIGN_BYTES)

    @property
    def data_bytes(self) -> int:
        return len(self.sums) // 8 * self.block_bytes

    def runs(self) -> np.ndarray:
        """Rows [from, to) of blocks, in the order in which they are to be brought in: sorted within windows that grow,
        so that the first come first and the rest in large pieces."""
        out, at, window = [], 0, _FIRST_WINDOW
        blocks = self.blocks.astype(np.int64)
        while at < len(blocks):
            piece = np.sort(blocks[at:at + window])
            edges = np.flatnonzero(np.diff(piece, prepend=-2) != 1)
            ends = np.append(edges[1:], len(piece))
            out.append(np.stack([piece[edges], piece[ends - 1] + 1], 1))
            at, window = at + window, min(window * 2, _LAST_WINDOW)
        return np.concatenate(out) if out else np.zeros((0, 2), np.int64)

    def extents(self, nbytes: int, file: int) -> np.ndarray:
        """Where its bytes lie in an image of so many bytes, as rows of _imagefile.h, sorted."""
        runs = self.runs()
        sizes = (runs[:, 1] - runs[:, 0]) * self.block_bytes
        out = np.zeros((len(runs), 4), np.uint64)
        out[:, 0] = runs[:, 0] * self.block_bytes
        out[:, 1] = np.minimum(sizes, nbytes - runs[:, 0] * self.block_bytes)
        out[:, 2] = file
        out[1:, 3] = np.cumsum(sizes[:-1])
        return out[np.argsort(out[:, 0])]


def save(path: str, image_id: str, block_bytes: int, blocks: np.ndarray, chain: Any) -> None:
    """Writes the file of an image at `path`: with the bytes, unless they were half of the image or more, or it has no
    chain. OSError; ValueError where the image is damaged."""
    seed = int(image_id[16:], 16) if chain is not None else 0
    copies = chain is not None and block_bytes == _files.UNIT_BYTES and 2 * len(blocks) * block_bytes <= \
        chain.layout.nbytes
    found = WorkingSet(path + SUFFIX, block_bytes, blocks, bytes(8 * len(blocks) if copies else 0), seed)
    order = np.concatenate([np.arange(*run) for run in found.runs()]) if copies and len(blocks) else blocks[:0]
    sums = np.zeros(len(order), "<u8")
    with Target(found.path) as target:
        for first in range(0, len(order), _GROUP):
            data = np.zeros((len(order[first:first + _GROUP]), block_bytes), np.uint8)
            for number, block in enumerate(order[first:first + _GROUP].tolist()):
                chain.read(block * block_bytes, data[number, :chain.layout.nbytes - block * block_bytes])
                sums[first + number] = _core.image_sum(data[number], seed, first + number)
            _files.write_all(target.fd, data, found.data_offset + first * block_bytes)
        text = _HEAD.pack(_MAGIC, image_id.encode(), block_bytes, len(blocks), len(order)) + \
            blocks.astype("<u4").tobytes() + sums.tobytes()
        _files.write_all(target.fd, text + hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest(), 0)
        target.publish()


def read(path: str, image_id: str) -> WorkingSet | None:
    """None where there is none, or it is damaged or of another image: it is a hint."""
    try:
        with open(path + SUFFIX, "rb") as file:
            head = file.read(_HEAD.size)
            nbytes = os.fstat(file.fileno()).st_size
            if len(head) < _HEAD.size:
                return None
            magic, number, block_bytes, count, copies = _HEAD.unpack(head)
            rest = file.read(4 * count + 8 * copies + _DIGEST_BYTES) if max(count, copies) <= nbytes // 4 else b""
    except OSError:
        return None
    text, digest = head + rest[:-_DIGEST_BYTES], rest[-_DIGEST_BYTES:]
    if hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest() != digest or copies not in (0, count):
        return None
    if magic != _MAGIC or number != image_id.encode() or len(rest) != 4 * count + 8 * copies + _DIGEST_BYTES:
        return None
    blocks = np.frombuffer(rest[:4 * count], "<u4")
    found = WorkingSet(path + SUFFIX, block_bytes, blocks, rest[4 * count:-_DIGEST_BYTES],
                       int(image_id[16:], 16) if copies else 0)
    return found if not copies or nbytes == found.data_offset + found.data_bytes else None
