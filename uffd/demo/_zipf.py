"""Look-ups in a table larger than memory, in a process of its own: `python -m uffd.demo._zipf JOB`, JOB as JSON.

It runs inside the memory cgroup, so it holds as little as it can: the table that values are checked against is memory
of the demo's process, given as a memfd. It tells how it goes in lines of JSON on stdout.
"""

import base64
import json
import mmap
import resource
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import uffd

_REPORT_S = 0.1
_FILL_BYTES = 1 << 20
_DRAWN = 2048                                    # look-ups drawn at a time
_CLOCK_EVERY = 32
_SHIFT = 7919
EXPONENT = 0.99


@dataclass
class Job:
    way: str                                     # "redis", "scratch", "memmap" or "random"
    place: str                                   # URL of the store, or path of the file
    table_fd: int
    table_rows: int
    rows: int
    row_bytes: int
    block_bytes: int
    budget_bytes: int
    warm_s: float
    seconds: float


class Tiled:
    """The rows that the large table must have: those of the small one over and over, each time in another order, so
    that a block that came to the wrong place is found."""

    def __init__(self, table: np.ndarray, rows: int):
        self.table, self.rows = table, rows

    def number(self, row):
        return (row + _SHIFT * (row // len(self.table))) % len(self.table)

    def rows_of(self, start: int, stop: int) -> np.ndarray:
        return self.table[self.number(np.arange(start, stop))]


def open_table(job: Job) -> np.ndarray:
    memory = mmap.mmap(job.table_fd, job.table_rows * job.row_bytes, prot=mmap.PROT_READ)
    return np.frombuffer(memory, np.uint8).reshape(job.table_rows, job.row_bytes)


def tell(**figures) -> None:
    print(json.dumps(figures), flush=True)


def barrier(stage: str) -> None:
    """Tells that a stage is over, and waits until the demo has noted its own figures of it."""
    tell(stage=stage)
    sys.stdin.readline()


class Managed:
    """The table in a region, with its budget."""

    def __init__(self, job: Job):
        self._job = job
        self.engine = uffd.Engine(budget_bytes=job.budget_bytes)
        provider = uffd.providers.Redis(job.place, "uffd-demo", block_bytes=job.block_bytes) \
            if job.way == "redis" else None
        self.region = uffd.Region(job.rows * job.row_bytes, provider, engine=self.engine, block_bytes=job.block_bytes,
                                  name="table")
        self.array = self.region.array(np.uint8, (job.rows, job.row_bytes))

    def fill(self, tiled: Tiled) -> dict:
        """The whole table, written through the region; what does not fit leaves for the store meanwhile."""
        step = max(1, _FILL_BYTES // self._job.row_bytes)
        started_s = told_s = time.perf_counter()
        for start in range(0, self._job.rows, step):
            stop = min(start + step, self._job.rows)
            self.array[start:stop] = tiled.rows_of(start, stop)
            if time.perf_counter() - told_s > _REPORT_S:
                told_s = time.perf_counter()
                tell(stage="fill", done=stop / self._job.rows, **self.seen())
        self.region.flush()
        counted = self.region.stats()
        return {"fill_s": time.perf_counter() - started_s, "fill_evicted": counted.evicted,
                "fill_written_bytes": counted.bytes_written}

    def seen(self) -> dict:
        """Which blocks are in memory: bits in base64."""
        bits = np.packbits(self.region.resident())
        return {"resident": base64.b64encode(bits).decode(), "resident_bytes": self.engine.resident_bytes,
                "budget_bytes": self.engine.budget_bytes}

    def counts(self) -> dict:
        counted = self.region.stats()
        return {"missed": counted.blocks_demand, "evicted": counted.evicted, "rescued": counted.rescued,
                "evict_waits": counted.evict_waits, "read_bytes": counted.bytes_filled}

    def blocks_of(self, rows: np.ndarray) -> int:
        first = rows * self._job.row_bytes
        return int(((first + self._job.row_bytes - 1) // self._job.block_bytes - first // self._job.block_bytes
                    + 1).sum())

    def close(self) -> dict:
        self.array = None
        self.region.close()
        self.engine.close()
        return {}


class Mapped:
    """The same table in a file, mapped by the kernel. A miss is a fault for which the kernel had to read."""

    def __init__(self, job: Job):
        mapped = np.memmap(job.place, np.uint8, "r", shape=(job.rows, job.row_bytes))
        if job.way == "random":
            mapped._mmap.madvise(mmap.MADV_RANDOM)           # the kernel then reads the page alone
        self.array = np.asarray(mapped)

    def seen(self) -> dict:
        return {}

    def counts(self) -> dict:
        return {"missed": resource.getrusage(resource.RUSAGE_SELF).ru_majflt, "evicted": 0, "rescued": 0,
                "evict_waits": 0, "read_bytes": _read_from_disk()}

    def blocks_of(self, rows: np.ndarray) -> int:
        return len(rows)

    def close(self) -> dict:
        return {}


def _read_from_disk() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


class LookUps:
    """Rows by Zipf's law, the popular ones scattered over the table; each copied out, timed, and checked."""

    def __init__(self, tiled: Tiled, seed: int):
        self._tiled, self._random = tiled, np.random.default_rng(seed)
        weights = np.arange(1, tiled.rows + 1, dtype=np.float64) ** -EXPONENT
        self._shares = np.cumsum(weights) / weights.sum()
        self._row_of_rank = np.random.default_rng(20140815).permutation(tiled.rows)

    def _draw(self) -> np.ndarray:
        ranks = np.searchsorted(self._shares, self._random.random(_DRAWN))
        return self._row_of_rank[np.minimum(ranks, self._tiled.rows - 1)]

    def run(self, source, stage: str, seconds: float) -> dict:
        """Look-ups for that long. Their latencies leave the check out."""
        array, taken_ns, blocks, wrong = source.array, [], 0, 0
        before, started_s = source.counts(), time.perf_counter()
        told_s, told_n, clock = started_s, 0, time.perf_counter_ns
        while (now_s := time.perf_counter()) - started_s < seconds:
            rows = self._draw()
            for begin in range(0, _DRAWN, _CLOCK_EVERY):
                part = rows[begin:begin + _CLOCK_EVERY]
                for row, right in zip(part.tolist(), self._tiled.number(part).tolist()):
                    from_ns = clock()
                    copy = array[row].copy()
                    taken_ns.append(clock() - from_ns)
                    wrong += not np.array_equal(copy, self._tiled.table[right])
                blocks += source.blocks_of(part)
                now_s = time.perf_counter()
                if now_s - told_s > _REPORT_S:
                    self._tell(source, stage, (now_s - started_s) / seconds, before, blocks, taken_ns[told_n:])
                    told_s, told_n = time.perf_counter(), len(taken_ns)
                if now_s - started_s >= seconds:
                    break
        counts = source.counts()
        taken = np.array(taken_ns)
        return {"look_ups": len(taken), "blocks": blocks, "wrong": int(wrong), "seconds": now_s - started_s,
                "per_s": len(taken) / (taken.sum() / 1e9), "p50_us": float(np.percentile(taken, 50)) / 1e3,
                "p99_us": float(np.percentile(taken, 99)) / 1e3,
                **{key: counts[key] - before[key] for key in counts},
                "hit_ratio": max(0.0, 1 - (counts["missed"] - before["missed"]) / max(blocks, 1))}

    @staticmethod
    def _tell(source, stage, done, before, blocks, taken_ns):
        missed = source.counts()["missed"] - before["missed"]
        tell(stage=stage, done=min(done, 1.0), hit_ratio=max(0.0, 1 - missed / max(blocks, 1)),
             per_s=len(taken_ns) / max(sum(taken_ns) / 1e9, 1e-9), **source.seen())


def main(argument: str) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # the demo gets it, too, and ends us
    warnings.simplefilter("ignore", uffd.DegradedWarning)    # the demo's first line says the mode
    job = Job(**json.loads(argument))
    try:
        tiled = Tiled(open_table(job), job.rows)
        source = Mapped(job) if job.way in ("memmap", "random") else Managed(job)
        result = {}
        if isinstance(source, Managed):
            result |= source.fill(tiled)
            barrier("filled")
        result["warm"] = LookUps(tiled, 1).run(source, "warm up", job.warm_s)
        barrier("warm")
        result |= LookUps(tiled, 2).run(source, "look up", job.seconds)
        barrier("looked up")
        result |= source.seen()
        source.close()
    except (uffd.UffdError, OSError, ValueError, ImportError) as error:
        tell(error=f"{type(error).__name__}: {error}")
        return 1
    tell(result=result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
