"""Tracking of writes beside a bare PAGEMAP_SCAN, and the pause of an image beside write protection and fork(), in C."""
from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import native
import numpy as np
import pytest
from harness import MIB, compare, scaled

import uffd
from uffd import _core

NBYTES = scaled(1024 * MIB)
PAGE = native.PAGE_BYTES


def populated(huge: bool) -> np.ndarray:
    memory = mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    array[::PAGE] = 1
    return array


@pytest.mark.parametrize("percent", [1, 100])
def test_written(benchmark: Any, percent: int) -> None:
    array = populated(False)
    pages = np.random.default_rng(3).permutation(NBYTES // PAGE)[:NBYTES // PAGE * percent // 100]
    offsets = np.sort(pages).astype(np.uint64) * PAGE

    @contextmanager
    def ours() -> Iterator[Callable[[], float]]:
        with uffd.track(array) as tracker:
            array[offsets] += 1

            def look() -> float:
                start_s = time.perf_counter()
                written = tracker.written()
                taken_s = time.perf_counter() - start_s
                assert written.sum() == len(offsets)
                return taken_s * 1e3
            yield look

    @contextmanager
    def scan() -> Iterator[Callable[[], float]]:
        yield lambda: native.scan_written(array, offsets) * 1e3

    compare(benchmark, f"track-{percent}", ours, {"PAGEMAP_SCAN": scan}, warm_nbytes=4 * MIB)


@contextmanager
def image(array: np.ndarray, previous: Any = None) -> Iterator[Any]:
    with tempfile.TemporaryFile() as file:
        os.truncate(file.fileno(), NBYTES)
        imager = _core.Imager([(array, 0)], file.fileno(), memory_limit_bytes=8 * MIB, keep=True, previous=previous)
        try:
            imager.start()
            yield imager
        finally:
            imager.close()


@pytest.mark.parametrize("kind", ["small", "huge"])
@pytest.mark.parametrize("beside", ["protect", "fork"])
def test_first_pause(benchmark: Any, kind: str, beside: str) -> None:
    array = populated(kind == "huge")

    @contextmanager
    def ours() -> Iterator[Callable[[], float]]:
        with image(array) as imager:
            yield lambda: float(imager.pause_ns) / 1e6
            imager.abort()

    @contextmanager
    def floor() -> Iterator[Callable[[], float]]:
        yield lambda: (native.protect_range(array) if beside == "protect" else native.fork_pause()) * 1e3

    compare(benchmark, f"image-{beside}-{kind}", ours, {beside: floor}, warm_nbytes=4 * MIB)


def test_next_pause(benchmark: Any) -> None:
    array = populated(False)
    writes = np.random.default_rng(4)

    @contextmanager
    def first() -> Iterator[Callable[[], float]]:
        with image(array) as imager:
            yield lambda: float(imager.pause_ns) / 1e6
            imager.abort()

    @contextmanager
    def following() -> Iterator[Callable[[], float]]:
        with image(array) as before:
            before.wait()
            at = int(writes.integers(0, NBYTES - NBYTES // 100))
            array[at:at + NBYTES // 100] += 1
            with image(array, before) as imager:
                yield lambda: float(imager.pause_ns) / 1e6

    compare(benchmark, "image-next", following, {"the first": first}, warm_nbytes=4 * MIB, rounds=5)
