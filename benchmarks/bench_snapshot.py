"""Images of memory beside a forked child that writes the same: what a dense writer has meanwhile; the next image of a
series; a restart from a cold file. (The pause is in bench_track.py.) On pages of 4 KiB and on transparent huge pages
where that matters."""
from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import MIB, SCALE, Side, compare, record, scaled, summary

from uffd import snapshot
from uffd.snapshot._methods import why_not_protect

NBYTES = scaled(1 << 30, 64 * MIB)
ROUNDS_OF_IMAGES = 5 if SCALE >= 1 else 3
PIECE_BYTES = MIB
WRITERS = 2
TOUCHED = max(int(2000 * SCALE), 100)
PAGE = mmap.PAGESIZE
AT_RANDOM = np.random.default_rng(5).integers(0, 1 << 40, (512, 64))
Writer = Callable[[np.ndarray, int], int]

pytestmark = pytest.mark.skipif(bool(why_not_protect()), reason="method 'protect' " + why_not_protect())
PAGES = pytest.mark.parametrize("pages", ["small", "huge"])


@contextmanager
def memory(pages: str) -> Iterator[np.ndarray]:
    """NBYTES of populated memory on pages of one kind."""
    mapping = mmap.mmap(-1, NBYTES + 2 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE if pages == "huge" else mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(mapping, np.uint8)
    skip = -array.ctypes.data % (2 * MIB)
    array = array[skip:skip + NBYTES]
    array[:] = 1
    yield array


@PAGES
def test_dense_writer(benchmark: Any, tmp_path: Path, pages: str) -> None:
    """Seconds for each GiB that two threads write, at full speed, from the instant until the image is durable. Beside
    it what a sparse writer pays, for which a copy of a page is better than one of 64: it writes a byte to pages at
    random, and its figure is the time for a GiB of such pages."""
    def by(method: str, write: Writer) -> Side:
        @contextmanager
        def side() -> Iterator[Callable[[], float]]:
            with memory(pages) as array:
                yield lambda: written_beside(array, tmp_path / method, method, write)
        return side

    compare(benchmark, f"snapshot-writer-{pages}", by("protect", dense), {"fork": by("fork", dense)},
            beside={"sparse, at random": by("protect", sparse), "sparse, beside fork": by("fork", sparse)},
            warm_nbytes=64 * MIB, rounds=ROUNDS_OF_IMAGES)


def dense(half: np.ndarray, turn: int) -> int:
    """A piece after the other. How many bytes were written."""
    at = turn * PIECE_BYTES % len(half)
    piece = half[at:at + PIECE_BYTES]
    np.add(piece, 1, out=piece)
    return len(piece)


def sparse(half: np.ndarray, turn: int) -> int:
    offsets = AT_RANDOM[turn % len(AT_RANDOM)] % (len(half) // PAGE) * PAGE
    half[offsets] += 1
    return len(offsets) * PAGE


def written_beside(array: np.ndarray, path: Path, method: str, write_some: Writer) -> float:
    stop, counts = threading.Event(), [0] * WRITERS

    def write(lane: int) -> None:
        half = array[lane * NBYTES // WRITERS:(lane + 1) * NBYTES // WRITERS]
        turn = 0
        while not stop.is_set():
            counts[lane] += write_some(half, turn)
            turn += 1

    threads = [threading.Thread(target=write, args=(lane,)) for lane in range(WRITERS)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.02)
        before, begun_s = sum(counts), time.perf_counter()
        snapshot.take(array, path, method=method).wait()
        seconds, written = time.perf_counter() - begun_s, sum(counts) - before
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return seconds / max(written, 1) * (1 << 30)


def test_series(benchmark: Any, tmp_path: Path) -> None:
    """The first image of a series, and the next ones, 1 % written since: time and bytes; 4 KiB pages."""
    numbers: dict[str, list[float]] = {"time": [], "bytes": []}

    def one_round() -> None:
        with memory("small") as array:
            last = snapshot.take(array, tmp_path / "0", method="protect", base=snapshot.FIRST)
            first = last.wait()
            for number in (1, 2):
                begin = NBYTES // 100 * number
                array[begin:begin + NBYTES // 100] += 1
                last = snapshot.take(array, tmp_path / f"{number}", method="protect", base=last)
                report = last.wait()
                numbers["time"].append(100 * report.total_ns / first.total_ns)
                numbers["bytes"].append(100 * report.file_bytes / first.file_bytes)

    benchmark.pedantic(one_round, rounds=ROUNDS_OF_IMAGES)
    for name, samples in numbers.items():
        record(benchmark, f"snapshot-next-{name}", summary(samples))


RESTART = """
import sys, time
import numpy as np
import uffd
from uffd import snapshot
path, count, way = sys.argv[1], int(sys.argv[2]), sys.argv[3]
begun_s = time.perf_counter()
arrays = snapshot.load(path) if way == "with" else uffd.open(path)
array = arrays["array"]
order = np.random.default_rng(4).permutation(len(array) // 65536)[:count] * 65536
total = 0
for at in order.tolist():
    total += int(array[at])
print(time.perf_counter() - begun_s)
if way == "record":
    arrays.save_working_set()
"""


def test_restart(benchmark: Any, tmp_path: Path) -> None:
    """From the start of `load`, in a process of its own, to a first result that touches blocks all over a cold file."""
    path = tmp_path / "image"
    with memory("small") as array:
        array.view(np.uint64)[:] = np.random.default_rng(1).integers(1, 1 << 62, NBYTES // 8, np.uint64)
        snapshot.take(array, path).wait()
    started(path, "record")

    def way(name: str) -> Side:
        @contextmanager
        def side() -> Iterator[Callable[[], float]]:
            yield lambda: started(path, name)
        return side

    compare(benchmark, "snapshot-restart", way("with"), {"without": way("without")}, warm_nbytes=64 * MIB,
            rounds=ROUNDS_OF_IMAGES)


def started(path: Path, way: str) -> float:
    for name in (path, path.with_name(path.name + ".touched")):
        if name.exists():
            fd = os.open(name, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    done = subprocess.run([sys.executable, "-P", "-c", RESTART, path, str(TOUCHED), way], capture_output=True,
                          text=True, timeout=600, check=True)
    return float(done.stdout)
