"""One fault at a time: 4 KiB blocks, first touches in random order, by threads of C that the scheduler may move."""
from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import native
import numpy as np
import pytest
from harness import SCALE, Side, compare, note

import uffd

PAGES = max(int(8192 * SCALE), 256)
NBYTES = PAGES * native.PAGE_BYTES
SETTLE_S = 0.01                     # threads just made reach their wait before the first touch


@pytest.fixture(scope="module")
def source() -> np.ndarray:
    return np.random.default_rng(1).integers(1, 255, NBYTES, dtype=np.uint8)


@pytest.fixture(scope="module")
def order() -> np.ndarray:
    return np.random.default_rng(2).permutation(PAGES) * native.PAGE_BYTES


class Touches:
    """Makes the work of both sides, and remembers for each the slow touches and where they ran."""

    def __init__(self, order: np.ndarray, threads: int, measure: str) -> None:
        self.order, self.threads, self.measure = order, threads, measure
        self.p99_us: dict[str, list[float]] = defaultdict(list)
        self.cpu_share: dict[str, list[list[float]]] = defaultdict(list)
        self.moves: dict[str, list[float]] = defaultdict(list)

    def work(self, name: str, base: int, cpu: int = -1) -> Callable[[], float]:
        def touch() -> float:
            start_s = time.perf_counter()
            wait_ns, cpus = native.touch(base, self.order, self.threads, cpu)
            wall_s = time.perf_counter() - start_s
            self.p99_us[name].append(float(np.percentile(wait_ns, 99)) / 1e3)
            self.cpu_share[name].append([float(np.mean(cpus == cpu)) for cpu in range(native.CPUS)])
            self.moves[name].append(float(np.mean(np.diff(cpus) != 0)))
            return float(np.median(wait_ns)) / 1e3 if self.measure == "median" else wall_s / self.order.size * 1e6
        return touch

    def notes(self, benchmark: Any) -> None:
        note(benchmark, "p99_us", {name: float(np.median(values)) for name, values in self.p99_us.items()})
        note(benchmark, "share_of_touches_by_cpu",
             {name: np.median(values, axis=0).round(3).tolist() for name, values in self.cpu_share.items()})
        note(benchmark, "moves_per_touch", {name: float(np.median(values)) for name, values in self.moves.items()})


def through_uffd(touches: Touches, source: np.ndarray, engine: Any, delivery: str) -> Side:
    @contextmanager
    def side() -> Iterator[Callable[[], float]]:
        provider = uffd.providers.Memory(source)
        with uffd.Region(NBYTES, provider, engine=engine, block_bytes=native.PAGE_BYTES, delivery=delivery) as region:
            time.sleep(SETTLE_S)
            yield touches.work("ours", region.address)
            array = region.array()
            assert np.array_equal(array, source)
            del array
    return side


def in_c(touches: Touches, source: np.ndarray, name: str, placement: int, workers: int = 1, *, cpu: int = 0,
         touch_cpu: int = -1) -> Side:
    @contextmanager
    def side() -> Iterator[Callable[[], float]]:
        with (native.open_range(NBYTES, native.PAGE_BYTES, source, native.THREAD) as served,
              native.serving(served, placement, workers, cpu=cpu)):
            time.sleep(SETTLE_S)
            yield touches.work(name, served.base, touch_cpu)
    return side


def test_thread_latency(benchmark: Any, engine: Any, source: np.ndarray, order: np.ndarray) -> None:
    touches = Touches(order, 1, "median")
    compare(benchmark, "thread-latency", through_uffd(touches, source, engine, "thread"),
            {"same CPU": in_c(touches, source, "same CPU", native.ONE_PINNED, touch_cpu=0)},
            beside={"C, one worker per CPU": in_c(touches, source, "per CPU", native.PER_CPU, native.CPUS),
                    "C, one free worker": in_c(touches, source, "free", native.ONE_FREE)},
            warm_nbytes=4 * NBYTES)
    touches.notes(benchmark)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_thread_rate(benchmark: Any, engine: Any, source: np.ndarray, order: np.ndarray, threads: int) -> None:
    touches = Touches(order, threads, "rate")
    floors = {"one worker per CPU": in_c(touches, source, "per CPU", native.PER_CPU, native.CPUS)}
    for cpu in range(min(native.CPUS, 2)):
        name = f"one worker on CPU {cpu}"
        floors[name] = in_c(touches, source, name, native.ONE_PINNED, cpu=cpu)
    free = {"C, one free worker": in_c(touches, source, "free", native.ONE_FREE)}    # no placement: the kernel's
    compare(benchmark, f"thread-rate-{threads}", through_uffd(touches, source, engine, "thread"), floors,
            beside=free, warm_nbytes=4 * NBYTES)
    touches.notes(benchmark)


def test_inline_latency(benchmark: Any, engine: Any, source: np.ndarray, order: np.ndarray) -> None:
    touches = Touches(order, 1, "median")

    @contextmanager
    def floor() -> Iterator[Callable[[], float]]:
        with (native.open_range(NBYTES, native.PAGE_BYTES, source, native.INLINE) as served,
              native.serving_inline(served)):
            yield touches.work("SIGBUS + COPY", served.base)

    compare(benchmark, "inline-latency", through_uffd(touches, source, engine, "inline"), {"SIGBUS + COPY": floor},
            warm_nbytes=4 * NBYTES)
    touches.notes(benchmark)
