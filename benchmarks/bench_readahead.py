"""What read-ahead brings in: never much that nobody asked for, and nearly all of what a stride will ask for."""
from __future__ import annotations

import time
from typing import Any

import native
import numpy as np
import pytest
from harness import ROUNDS, SCALE, record, summary

import uffd

BLOCK_BYTES = 64 << 10
BLOCKS = max(int(6144 * SCALE), 768)
STRIDE_BLOCKS = 3
QUIET_S, DEADLINE_S = 0.02, 5.0


def settled(region: Any) -> Any:
    """The stats once no block has come for a while: read-ahead may still be under way when the last touch returns."""
    deadline_s = time.monotonic() + DEADLINE_S
    before = -1
    while time.monotonic() < deadline_s:
        stats = region.stats()
        if stats.bytes_filled == before:
            return stats
        before = stats.bytes_filled
        time.sleep(QUIET_S)
    raise TimeoutError(f"blocks still come {DEADLINE_S} s after the last touch")


@pytest.fixture(scope="module")
def source() -> np.ndarray:
    return np.ones(BLOCKS * BLOCK_BYTES, dtype=np.uint8)


def touched_stats(engine: Any, source: np.ndarray, blocks: np.ndarray, threads: int = 1) -> Any:
    native.warm(source.nbytes)
    with uffd.Region(source.nbytes, uffd.providers.Memory(source), engine=engine, block_bytes=BLOCK_BYTES) as region:
        native.touch(region.address, blocks * BLOCK_BYTES, threads)
        return settled(region)


def filled(stats: Any) -> int:
    return stats.blocks_demand + stats.blocks_readahead + stats.blocks_prefetch


def test_random(benchmark: Any, engine: Any, source: np.ndarray) -> None:
    generator = np.random.default_rng(8)
    ratios: list[float] = []

    def one_round() -> None:
        blocks = generator.choice(BLOCKS, BLOCKS // 10, replace=False)
        ratios.append(filled(touched_stats(engine, source, blocks)) / blocks.size)

    benchmark.pedantic(one_round, rounds=ROUNDS)
    record(benchmark, "readahead-random", summary(ratios))


def test_stride(benchmark: Any, engine: Any, source: np.ndarray) -> None:
    blocks = np.arange(0, BLOCKS, STRIDE_BLOCKS)
    ratios: list[float] = []
    ahead: list[float] = []

    def one_round() -> None:
        stats = touched_stats(engine, source, blocks)
        ratios.append(filled(stats) / blocks.size)
        ahead.append(100 * (1 - stats.blocks_demand / blocks.size))

    benchmark.pedantic(one_round, rounds=ROUNDS)
    record(benchmark, "readahead-stride", summary(ratios))
    record(benchmark, "readahead-stride-ahead", summary(ahead))


def test_both(benchmark: Any, engine: Any, source: np.ndarray) -> None:
    """One thread strides through the first half of a region while another touches the second half at random."""
    generator = np.random.default_rng(9)
    half = BLOCKS // 2
    strided = np.arange(0, half, STRIDE_BLOCKS)
    ratios: list[float] = []
    ahead: list[float] = []

    def one_round() -> None:
        scattered = half + generator.choice(half, strided.size, replace=False)
        stats = touched_stats(engine, source, np.concatenate([strided, scattered]), threads=2)
        ratios.append(filled(stats) / (strided.size + scattered.size))
        ahead.append(100 * (1 - max(stats.blocks_demand - scattered.size, 0) / strided.size))

    benchmark.pedantic(one_round, rounds=ROUNDS)
    record(benchmark, "readahead-both", summary(ratios))
    record(benchmark, "readahead-both-ahead", summary(ahead))
