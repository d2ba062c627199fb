"""Providers in Python for bench_hosted.py: the provider host imports them from here."""
from __future__ import annotations

import os
import zlib
from typing import Any

import numpy as np

import uffd

PIECE_BYTES = 64 << 10


def seven(offset: int, out: np.ndarray) -> None:
    out[:] = 7


class OwnArray(uffd.Provider):
    """Copies from an array of its own."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def open(self) -> None:
        self.array = np.random.default_rng(3).integers(0, 255, self.nbytes, dtype=np.uint8)

    def read(self, offset: int, out: np.ndarray) -> None:
        out[:] = self.array[offset:offset + out.size]


class Zlib(uffd.Provider):
    """Decompresses each piece of 64 KiB; computes all the time."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def open(self) -> None:
        values = np.random.default_rng(4).integers(1, 40, PIECE_BYTES // 2, dtype=np.uint16)
        self.packed = zlib.compress(values.tobytes(), 6)

    def read(self, offset: int, out: np.ndarray) -> None:
        for start in range(0, out.size, PIECE_BYTES):
            out[start:start + PIECE_BYTES] = np.frombuffer(zlib.decompress(self.packed), np.uint8)


class CountedZarr(uffd.providers.Zarr):
    """Writes the index of each chunk that it decodes into a file."""

    log = ""

    def _decode(self, live: Any, claimed: Any) -> None:
        fd = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, "".join(f"{index}\n" for index in claimed).encode())
        os.close(fd)
        super()._decode(live, claimed)
