"""Migration over loopback and by descriptor, beside plain C that sends the same bytes over one socket."""
from __future__ import annotations

import ctypes as ct
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import native
import numpy as np
import pytest
from harness import MIB, ROUNDS, compare, record, scaled, summary

import uffd

GIB = 1 << 30
NBYTES = scaled(512 * MIB)
TCP = "tcp://127.0.0.1:0"
SAMPLES = 3                                  # of what is no comparison: their median counts


def command(script: str, *argv: object) -> list[str]:
    return [sys.executable, "-P", str(Path(__file__).with_name(script)), *map(str, argv)]


class Destination:
    """The other process; `told` waits for what it measured. warm: bytes of free memory that it touches beforehand."""

    def __init__(self, what: str, url: str = TCP, warm: int = 0) -> None:
        self.process = subprocess.Popen(command("migrate_destination.py", url, what, warm), stdout=subprocess.PIPE,
                                        text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def told(self) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0
        return json.loads(out)


@pytest.fixture(scope="module")
def source() -> np.ndarray:
    return np.random.default_rng(1).integers(1, 1 << 60, NBYTES // 8)


def migrated(array: np.ndarray, what: str = "idle", url: str = TCP, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The source's report, and what the destination told."""
    there = Destination(what, url)
    with suppress(uffd.MigrationError), uffd.migrate.connect(there.url, {"a": array}, **options) as outgoing:
        outgoing.switchover()
        if what != "touch":
            outgoing.wait(120)
    return outgoing.report(), there.told()


def test_total_time(benchmark: Any, source: np.ndarray) -> None:
    """From the switchover to the last block, memory that nobody writes to."""
    target = np.ones(NBYTES, np.uint8)

    @contextmanager
    def ours() -> Iterator[Callable[[], float]]:
        array = source.copy()                    # what was handed over is its source's no more
        there = Destination("idle", warm=NBYTES)
        with uffd.migrate.connect(there.url, {"a": array}) as outgoing:
            def work() -> float:
                begin_s = time.perf_counter()
                outgoing.switchover()
                outgoing.wait(120)
                return (time.perf_counter() - begin_s) * GIB / NBYTES
            yield work
        there.told()

    @contextmanager
    def floor() -> Iterator[Callable[[], float]]:
        run = native.library().wire_floor
        run.restype, run.argtypes = ct.c_int64, [ct.c_void_p, ct.c_void_p, ct.c_size_t]
        yield lambda: native.check(run(source.ctypes.data, target.ctypes.data, NBYTES)) / 1e9 * GIB / NBYTES

    compare(benchmark, "migrate-idle", ours, {"C": floor}, warm_nbytes=NBYTES, rounds=min(ROUNDS, 5))


def test_a_busy_program_at_the_destination(benchmark: Any, source: np.ndarray) -> None:
    rates = [NBYTES / 1e9 / migrated(source.copy(), "busy")[1]["took_s"] for _ in range(3)]
    benchmark.pedantic(lambda: None, rounds=1)
    record(benchmark, "migrate-busy", summary(rates))


@pytest.mark.parametrize("mib", [256, 2048, 8192])
def test_downtime(benchmark: Any, mib: int) -> None:
    """Each in a process of its own, whose writer is stopped for ever."""
    need, found = 20 * GIB, free_bytes()
    if mib == 8192 and found < need:
        pytest.skip(f"both sides together need 20 GiB of free memory; there are {found / GIB:.1f}")
    downtimes_ms = []
    for _ in range(SAMPLES):
        there = Destination("idle")
        told = subprocess.run(command("migrate_source.py", there.url, scaled(mib * MIB)), stdout=subprocess.PIPE,
                              text=True, check=True, timeout=400)
        downtimes_ms.append(float(told.stdout))
        there.told()
    benchmark.pedantic(lambda: None, rounds=1)
    record(benchmark, f"migrate-downtime-{mib}", summary(downtimes_ms))


def free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def test_requests_beside_the_push(benchmark: Any, source: np.ndarray) -> None:
    """The destination's own times: a random block, with nothing else on the link, and with the push at full speed."""
    alone = migrated(source.copy(), "touch", postcopy_bytes_per_s=1e5)[1]["waits"]
    beside = migrated(source.copy(), "touch")[1]["waits"]
    benchmark.pedantic(lambda: None, rounds=1)
    record(benchmark, "migrate-request-p50", summary([statistics.median(beside) * 1e6]),
           summary([statistics.median(alone) * 1e6]))
    record(benchmark, "migrate-request-p99", summary([float(np.quantile(beside, 0.99)) * 1e3]))


def by_descriptor() -> float:
    """Milliseconds in all, for a region with shared backing that was written."""
    with uffd.Engine(budget_bytes=None) as engine, tempfile.TemporaryDirectory() as folder:
        array = uffd.zeros(scaled(4 * GIB) // 8, backing="shared", engine=engine)
        array[:] = 1
        there = Destination("idle", f"unix:{folder}/s")
        begin_s = time.monotonic()
        with uffd.migrate.connect(there.url, {"a": array}) as outgoing:
            outgoing.switchover()
            outgoing.wait(60)
        took_ms = (there.told()["began_s"] - begin_s) * 1e3
        del array, outgoing
    return took_ms


def test_by_descriptor(benchmark: Any) -> None:
    took_ms = [by_descriptor() for _ in range(SAMPLES)]
    benchmark.pedantic(lambda: None, rounds=1)
    record(benchmark, "migrate-local", summary(took_ms))


def test_recovery(benchmark: Any, source: np.ndarray) -> None:
    """From recover() on, the new connections and their hellos among it."""
    there = Destination("idle")
    took_ms = []
    with uffd.migrate.connect(there.url, {"a": source.copy()}, postcopy_bytes_per_s=NBYTES / 2) as outgoing:
        outgoing.switchover()
        for _ in range(9):
            time.sleep(0.05)
            outgoing.pause()
            begin_s = time.perf_counter()
            outgoing.recover()
            took_ms.append((time.perf_counter() - begin_s) * 1e3)
        outgoing.wait(60)
    there.told()
    benchmark.pedantic(lambda: None, rounds=1)
    record(benchmark, "migrate-recover", summary(took_ms))
