"""Providers in Python, beside native ones that do the same, and beside what a user would do without uffd."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hosted_providers
import native
import numpy as np
import pytest
import webserver
from bench_stream import timed
from harness import MIB, SCALE, Side, compare, note, record, scaled, summary

import uffd

BLOCK_BYTES = 64 << 10
TOUCHES = max(int(2000 * SCALE), 64)
SUM_NBYTES = scaled(512 * MIB)
ZLIB_BLOCKS = max(int(400 * SCALE), 32)
ZARR_SIDE, CHUNK_SIDE = 8192, 512
ROW_ITEMS, PICKED = 1024, 10_000
ROWS = max(int(65536 * SCALE), 4096)


def touching(make_provider: Callable[[], Any], engine: Any, **options: Any) -> Side:
    """The median microseconds of one random first touch, by a thread of C."""
    order = np.random.default_rng(2).permutation(TOUCHES) * BLOCK_BYTES

    @contextmanager
    def side() -> Iterator[Callable[[], float]]:
        with uffd.Region(TOUCHES * BLOCK_BYTES, make_provider(), engine=engine, **options) as region:
            time.sleep(0.01)
            yield lambda: float(np.median(native.touch(region.address, order)[0])) / 1e3
            array = region.array()
            assert (array == 7).all()
            del array
    return side


def test_hosted_touch(benchmark: Any, engine: Any) -> None:
    sevens = np.full(TOUCHES * BLOCK_BYTES, 7, np.uint8)

    def python() -> Any:
        return hosted_providers.seven

    def memory() -> Any:
        return uffd.providers.Memory(sevens)

    compare(benchmark, "hosted-touch", touching(python, engine, delivery="thread"),
            {"Memory": touching(memory, engine, delivery="thread")},
            beside={"ours, inline": touching(python, engine, delivery="inline"),
                    "Memory, inline": touching(memory, engine, delivery="inline")},
            warm_nbytes=3 * TOUCHES * BLOCK_BYTES)


@pytest.mark.parametrize("backing", ["anon", "shared"])
def test_hosted_sum(benchmark: Any, engine: Any, backing: str) -> None:
    source = np.random.default_rng(3).integers(0, 255, SUM_NBYTES, dtype=np.uint8)
    expected = int(source.view("u8").sum())

    def summing(make_provider: Callable[[], Any]) -> Side:
        @contextmanager
        def side() -> Iterator[Callable[[], float]]:
            with uffd.Region(SUM_NBYTES, make_provider(), engine=engine, block_bytes=MIB, backing=backing) as region:
                results: list[int] = []
                yield timed(SUM_NBYTES, lambda: results.append(int(region.array("u8").sum())))
                assert results == [expected]
        return side

    key = "hosted-sum" if backing == "anon" else "hosted-sum-shared"
    compare(benchmark, key, summing(lambda: hosted_providers.OwnArray(SUM_NBYTES)),
            {"Memory": summing(lambda: uffd.providers.Memory(source))}, warm_nbytes=2 * SUM_NBYTES)


def test_two_hosts(benchmark: Any) -> None:
    """Two threads, one touch after the other in each; no read-ahead, so that two blocks are under way at the most."""
    nbytes = ZLIB_BLOCKS * BLOCK_BYTES
    order = np.arange(ZLIB_BLOCKS) * BLOCK_BYTES

    def hosts(n: int) -> Side:
        @contextmanager
        def side() -> Iterator[Callable[[], float]]:
            with uffd.Engine(hosts=n) as engine:
                region = uffd.Region(nbytes, hosted_providers.Zlib(nbytes), engine=engine, readahead_bytes=0)
                with uffd.Region(nbytes, hosted_providers.Zlib(nbytes), engine=engine, readahead_bytes=0) as first:
                    native.touch(first.address, order[:8], 2)   # both hosts are up, and have it open
                native.touch(region.address, order[:8], 2)

                def work() -> float:
                    start_s = time.perf_counter()
                    native.touch(region.address, order[8:], 2)
                    return (time.perf_counter() - start_s) * 1e3
                yield work
                region.close()
        return side

    compare(benchmark, "hosted-two", hosts(2), {"one host": hosts(1)}, warm_nbytes=2 * nbytes, rounds=5)


def test_zarr_column(benchmark: Any, engine: Any, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    path, log = str(tmp_path / "a.zarr"), tmp_path / "log"
    side = max(int(ZARR_SIDE * min(SCALE, 1) ** 0.5) // CHUNK_SIDE, 2) * CHUNK_SIDE
    values = np.cumsum(np.random.default_rng(5).integers(-9, 9, (side, side)), axis=1).astype("f8")
    options = {"store": path, "shape": values.shape, "chunks": (CHUNK_SIDE, CHUNK_SIDE), "dtype": "f8"}
    zarr.create(**options)[...] = values
    column = np.s_[:, CHUNK_SIDE:2 * CHUNK_SIDE]

    @contextmanager
    def ours() -> Iterator[Callable[[], float]]:
        provider = hosted_providers.CountedZarr(path)
        provider.log = str(log)
        with uffd.Region(None, provider, engine=engine, block_bytes=provider.suggested_block_bytes()) as region:
            array = region.array(provider.dtype, provider.shape)
            results: list[np.ndarray] = []

            def work() -> float:
                start_s = time.perf_counter()
                results.append(array[column].copy())
                return (time.perf_counter() - start_s) * 1e3
            yield work
            assert np.array_equal(results[0], values[column])
            array = None                          # `work` still names it

    @contextmanager
    def plain() -> Iterator[Callable[[], float]]:
        opened = zarr.open(path, mode="r")

        def work() -> float:
            start_s = time.perf_counter()
            opened[column]
            return (time.perf_counter() - start_s) * 1e3
        yield work

    compare(benchmark, "hosted-zarr", ours, {"zarr": plain}, warm_nbytes=4 * values.nbytes // (side // CHUNK_SIDE))
    indices = log.read_text().split("\n")[:-1]
    rounds = max(indices.count(index) for index in set(indices))
    needed = [index for index in indices if index.endswith(", 1)")]
    note(benchmark, "decodes", {"in all": len(indices), "of the column": len(needed), "rounds": rounds})
    record(benchmark, "hosted-zarr-decodes", summary([len(needed) / (side // CHUNK_SIDE) / rounds]))


def test_http_rows(benchmark: Any, engine: Any, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    nbytes = ROWS * ROW_ITEMS * 4
    values = np.random.default_rng(6).random((ROWS, ROW_ITEMS), dtype=np.float32)
    values.tofile(tmp_path / "rows.bin")
    chosen = np.random.default_rng(7).integers(0, ROWS, min(PICKED, ROWS))
    (tmp_path / "server").mkdir()

    def rows(prefetch: bool) -> Side:
        @contextmanager
        def side() -> Iterator[Callable[[], float]]:
            provider = uffd.providers.Fsspec(f"{url}/rows.bin")
            with uffd.Region(nbytes, provider, engine=engine) as region:
                array = region.array("f4", values.shape)
                array[0, 0]

                def work() -> float:
                    start_s = time.perf_counter()
                    if prefetch:
                        uffd.prefetch(array, chosen)
                    got = array[chosen]
                    taken_s = time.perf_counter() - start_s
                    assert np.array_equal(got, values[chosen])
                    return taken_s
                yield work
                array = None                          # `work` still names it
        return side

    with webserver.serving(tmp_path, tmp_path / "server") as (url, server):
        note(benchmark, "server", server)
        compare(benchmark, "hosted-http", rows(True), {"without prefetch": rows(False)}, warm_nbytes=2 * nbytes,
                rounds=5)
