"""What a region costs before anybody touches it, and what is left of it afterwards."""
from __future__ import annotations

import gc
import os
import resource
import time
from pathlib import Path
from typing import Any

import native
from harness import MIB, ROUNDS, SCALE, record, summary

import uffd

TIB = 1 << 40
REGIONS = max(int(1000 * SCALE), 20)
TIMES = 20 if SCALE >= 1 else 3


def resident_mib() -> float:
    """Resident memory now; ru_maxrss would answer with the largest ever."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * native.PAGE_BYTES / MIB


def test_tebibyte(benchmark: Any, engine: Any) -> None:
    times_ms: list[float] = []
    grown_mib: list[float] = []

    def one_round() -> None:
        gc.collect()
        before_mib = resident_mib()
        start_s = time.perf_counter()
        region = uffd.Region(TIB, uffd.providers.Zero(), engine=engine)
        made_s = time.perf_counter() - start_s
        grown_mib.append(resident_mib() - before_mib)
        start_s = time.perf_counter()
        region.close()
        times_ms.append((made_s + time.perf_counter() - start_s) * 1e3)

    benchmark.pedantic(one_round, rounds=ROUNDS)
    record(benchmark, "life-1tib-time", summary(times_ms))
    record(benchmark, "life-1tib-rss", summary(grown_mib))


def things() -> dict[str, int]:
    return {"fds": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")),
            "mappings": len(Path("/proc/self/maps").read_text().splitlines())}


def test_thousand(benchmark: Any, engine: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def one_round() -> None:
        regions = [uffd.Region(MIB, uffd.providers.Zero(), engine=engine) for _ in range(REGIONS)]
        for region in regions:
            region.close()

    try:
        one_round()                     # what an allocator keeps for the next time is no leak
        gc.collect()
        before = things()
        benchmark.pedantic(one_round, rounds=TIMES)
        gc.collect()
        after = things()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    left = {name: after[name] - before[name] for name in before}
    benchmark.extra_info["left"] = left
    record(benchmark, "life-1000", summary([float(sum(max(count, 0) for count in left.values()))]))
