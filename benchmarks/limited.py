"""A program whose data is four times its memory, run in a process of its own under a memory cgroup: `python limited.py
SIDE WORK FOLDER NBYTES BUDGET` prints the seconds that the work took. bench_evict.py runs it; each side does the same.

SIDE: uffd, uffd-inline (a region over File, under a budget), memmap, memmap-random (the same with MADV_RANDOM), swap (a
plain ndarray: what does not fit the cgroup goes to swap). WORK: zipf, rmw, sort, scan.
"""
from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SPARE_BYTES = 40 << 20              # the interpreter, numpy, page tables, and the kernel's own of the cgroup
RECORD = 512                        # items of 8 bytes: a record is 4 KiB
WRITES = ("rmw", "sort")
OPERATIONS = {"zipf": 30_000, "rmw": 12_000}    # at full scale: more records than fit the budget
BLOCK_BYTES = {"zipf": 4096, "rmw": 4096}   # else the default: records are random


class Cgroup:
    """A memory cgroup of our own (version 1 or 2), with this process in it. OSError where none can be made."""

    def __init__(self, limit_bytes: int) -> None:
        first = Path("/sys/fs/cgroup/memory")
        self.mount = first if first.is_dir() else Path("/sys/fs/cgroup")
        self.names = ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if first.is_dir() else \
            ("memory.max", "memory.peak")
        self.folder = self.mount / f"uffd-bench-{os.getpid()}"
        self.folder.mkdir()
        try:
            (self.folder / self.names[0]).write_text(str(limit_bytes))
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            self.close()
            raise

    def peak_bytes(self) -> int:
        try:
            return int((self.folder / self.names[1]).read_text())
        except OSError:
            return 0

    def close(self) -> None:
        (self.mount / "cgroup.procs").write_text(str(os.getpid()))
        self.folder.rmdir()


def drop_cache(path: Path) -> None:
    """The device cache is cold: what was written is on the disk, and no page of the file is in memory."""
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@contextmanager
def opened(side: str, work: str, path: Path, budget_bytes: int) -> Iterator[tuple[np.ndarray, Callable[[], Any]]]:
    """(the array, what makes it durable)."""
    dtype, mode = ("f8" if work == "sort" else "u8"), ("r+" if work in WRITES else "r")
    if side.startswith("uffd"):
        import uffd

        with uffd.Engine(budget_bytes=budget_bytes) as engine:
            region = uffd.Region(None, uffd.providers.File(path, writable=mode == "r+"), engine=engine, mode=mode,
                                 block_bytes=BLOCK_BYTES.get(work, 65536),
                                 delivery="inline" if side == "uffd-inline" else "auto")
            yield region.array(dtype), region.flush
            stats = region.stats().as_dict()
            print(json.dumps({name: value for name, value in stats.items() if isinstance(value, int)}), file=sys.stderr)
    elif side.startswith("memmap"):
        mapped = np.memmap(path, dtype, mode)
        if side == "memmap-random":
            mapped._mmap.madvise(mmap.MADV_RANDOM)
        yield mapped, mapped.flush
    else:
        yield np.fromfile(path, dtype), lambda: None


def zipf(count: int, items: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    weights = np.cumsum(1 / np.arange(1, items + 1) ** exponent)
    return rng.permutation(items)[np.searchsorted(weights / weights[-1], rng.random(count))]


def run(work: str, array: np.ndarray, budget_bytes: int, scale: float) -> Callable[[], None]:
    rng = np.random.default_rng(11)
    records = len(array) // RECORD
    if work == "zipf":
        chosen = zipf(int(OPERATIONS[work] * scale), records, 0.99, rng) * RECORD
        return lambda: [array[chosen[i:i + 64]].sum() for i in range(0, len(chosen), 64)] and None
    if work == "rmw":
        chosen = rng.integers(0, records, int(OPERATIONS[work] * scale)) * RECORD

        def add() -> None:
            for i in range(0, len(chosen), 64):
                array[chosen[i:i + 64]] += 1
        return add
    if work == "sort":
        return lambda: sort_in_place(array, budget_bytes // 4 // array.itemsize)
    return lambda: [array[i:i + (1 << 17)].sum() for i in range(0, len(array), 1 << 17)] and None


def sort_in_place(array: np.ndarray, run_items: int) -> None:
    """numpy sorts runs that fit the budget, then neighbours are merged and split again, the smaller half to the left,
    until nothing moves (Baudet and Stevenson's odd-even merge-split sort, 1978)."""
    runs = [array[start:start + run_items] for start in range(0, len(array), run_items)]
    for run in runs:
        run.sort()
    for turn in range(len(runs)):
        for left, right in zip(runs[turn % 2::2], runs[turn % 2 + 1::2]):
            merge_split(left, right)


def merge_split(left: np.ndarray, right: np.ndarray) -> None:
    low, high = 0, min(len(left), len(right))    # how many change sides: as many as pair up the wrong way round
    while low < high:
        middle = (low + high) // 2
        if left[len(left) - 1 - middle] > right[middle]:
            low = middle + 1
        else:
            high = middle
    if low:
        taken = left[len(left) - low:].copy()
        left[len(left) - low:] = right[:low]
        right[:low] = taken
        left.sort(kind="stable")                 # two sorted stretches each: one merge
        right.sort(kind="stable")


def main() -> int:
    side, work, folder, _nbytes, budget = sys.argv[1:6]
    path = Path(folder) / "data.bin"
    drop_cache(path)
    import uffd                                  # noqa: F401 (for both sides: its memory is in the cgroup, too)
    try:
        beside = int(budget) // 2 if work == "sort" else 0      # what merging takes beside the array
        group = Cgroup(int(budget) + SPARE_BYTES + beside)
    except OSError as error:
        print(f"no memory cgroup can be made here: {error}", file=sys.stderr)
        return 77
    try:
        with opened(side, work, path, int(budget)) as (array, durable):
            do = run(work, array, int(budget), float(os.environ.get("UFFD_BENCH_SCALE", "1")))
            start_s = time.perf_counter()
            do()
            if work in WRITES:
                durable()
            taken_s = time.perf_counter() - start_s
            assert work != "sort" or (array[:-1:4097] <= array[1::4097]).all()
            del array, durable, do
        print(json.dumps({"seconds": taken_s, "peak_bytes": group.peak_bytes()}))
    finally:
        group.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
