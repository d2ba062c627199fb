"""A region read from one end to the other by one thread, beside the fastest plain way to the same bytes."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import native
import numpy as np
import pytest
from harness import MIB, ROUNDS, Side, compare, record, scaled, summary

import uffd

GIB = 1 << 30
PIECE_BYTES = 2 * MIB
FILE_PIECE_BYTES = MIB // 2
MEMORY_NBYTES, SHARED_NBYTES = scaled(GIB), scaled(512 * MIB)
FILE_NBYTES, BLOSC2_NBYTES = scaled(512 * MIB), scaled(256 * MIB)
CHUNK_BYTES, BLOCK_BYTES = MIB, 64 << 10


def seconds_per_gib(seconds: float, nbytes: int) -> float:
    return seconds * GIB / nbytes


def timed(nbytes: int, call: Callable[[], object]) -> Callable[[], float]:
    def work() -> float:
        start_s = time.perf_counter()
        call()
        return seconds_per_gib(time.perf_counter() - start_s, nbytes)
    return work


def plain(nbytes: int, prepare: Callable[[], Callable[[], object]]) -> Side:
    """A side whose preparation gives the call to be timed."""
    @contextmanager
    def side() -> Iterator[Callable[[], float]]:
        yield timed(nbytes, prepare())
    return side


def touched(nbytes: int) -> np.ndarray:
    buffer = np.empty(nbytes, dtype=np.uint8)
    buffer[::native.PAGE_BYTES] = 1
    return buffer


def agrees(region: Any, expected: np.ndarray) -> bool:
    """Some bytes of every block are compared: a benchmark that reads zeros would be fast."""
    array = region.array()
    step = 997
    return bool(np.array_equal(array[::step], expected[::step]))


def region_side(make_provider: Callable[[], Any], expected: np.ndarray, engine: Any, **options: Any) -> Side:
    """One byte of every page is read in order, by C without the GIL."""
    nbytes = expected.nbytes

    @contextmanager
    def side() -> Iterator[Callable[[], float]]:
        with uffd.Region(nbytes, make_provider(), engine=engine, **options) as region:
            yield lambda: seconds_per_gib(native.touch_sequential(region.address, nbytes), nbytes)
            assert agrees(region, expected)
    return side


def test_memory_sum(benchmark: Any, engine: Any) -> None:
    source = np.random.default_rng(3).random(MEMORY_NBYTES // 8)
    expected = source.sum()

    @contextmanager
    def ours() -> Iterator[Callable[[], float]]:
        with uffd.Region(MEMORY_NBYTES, uffd.providers.Memory(source), engine=engine) as region:
            results: list[float] = []
            yield timed(MEMORY_NBYTES, lambda: results.append(region.array("f8").sum()))
            assert results == [expected]

    @contextmanager
    def bulk() -> Iterator[Callable[[], float]]:
        with native.open_range(MEMORY_NBYTES, PIECE_BYTES, source, native.THREAD) as filled:
            yield lambda: seconds_per_gib(native.fill_bulk(filled, PIECE_BYTES), MEMORY_NBYTES)

    compare(benchmark, "memory-sum", ours, {"bulk COPY": bulk}, warm_nbytes=2 * MEMORY_NBYTES,
            beside={"sum of resident memory": plain(MEMORY_NBYTES, lambda: source.sum),
                    "np.copy, then sum": plain(MEMORY_NBYTES, lambda: lambda: source.copy().sum())})


def test_shared_sequential(benchmark: Any, engine: Any) -> None:
    source = np.random.default_rng(4).integers(1, 255, SHARED_NBYTES, dtype=np.uint8)

    @contextmanager
    def bulk() -> Iterator[Callable[[], float]]:
        with native.open_range(SHARED_NBYTES, PIECE_BYTES, source, native.INLINE_SHARED) as filled:
            yield lambda: seconds_per_gib(native.fill_bulk(filled, PIECE_BYTES), SHARED_NBYTES)

    ours = region_side(lambda: uffd.providers.Memory(source), source, engine, backing="shared", delivery="inline")
    compare(benchmark, "shared-sequential", ours, {"memcpy + CONTINUE": bulk}, warm_nbytes=2 * SHARED_NBYTES)


def test_file_sequential(benchmark: Any, engine: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    expected = np.random.default_rng(5).integers(1, 255, FILE_NBYTES, dtype=np.uint8)
    expected.tofile(path)
    path.read_bytes()                   # warm in the page cache

    @contextmanager
    def readinto() -> Iterator[Callable[[], float]]:
        buffer = touched(FILE_NBYTES)
        with open(path, "rb", buffering=0) as file:
            yield timed(FILE_NBYTES, lambda: file.readinto(memoryview(buffer)))

    @contextmanager
    def pread_and_copy() -> Iterator[Callable[[], float]]:
        with (native.open_range(FILE_NBYTES, PIECE_BYTES, expected, native.THREAD) as filled,
              open(path, "rb", buffering=0) as file):
            yield lambda: seconds_per_gib(native.fill_from_file(filled, file.fileno(), FILE_PIECE_BYTES, native.CPUS),
                                          FILE_NBYTES)

    def memmap() -> Callable[[], object]:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        return lambda: native.touch_sequential(mapped.ctypes.data, FILE_NBYTES)

    compare(benchmark, "file-sequential", region_side(lambda: uffd.providers.File(path), expected, engine),
            {"readinto": readinto}, warm_nbytes=2 * FILE_NBYTES,
            beside={"C, pread + COPY, a thread per CPU": pread_and_copy,
                    "np.memmap": plain(FILE_NBYTES, memmap),
                    "np.fromfile": plain(FILE_NBYTES, lambda: lambda: np.fromfile(path, dtype=np.uint8)),
                    "ours, inline": region_side(lambda: uffd.providers.File(path), expected, engine,
                                                delivery="inline")})


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A frame of smooth float32 data with noise in its low bits, some 2:1 under zstd and shuffle."""
    blosc2 = pytest.importorskip("blosc2")
    path = tmp_path_factory.mktemp("blosc2") / "data.b2frame"
    generator = np.random.default_rng(6)
    steps = generator.integers(-64, 64, BLOSC2_NBYTES // 4).astype(np.float32)
    values = np.cumsum(steps, dtype=np.float32) / 64
    blosc2.SChunk(chunksize=CHUNK_BYTES, data=values, urlpath=str(path), contiguous=True, mode="w",
                  cparams={"typesize": 4, "codec": blosc2.Codec.ZSTD, "clevel": 5, "nthreads": native.CPUS,
                           "filters": [blosc2.Filter.SHUFFLE], "blocksize": BLOCK_BYTES})
    path.read_bytes()
    return path, values.view(np.uint8)


def opened_frame(path: Path, threads: int) -> Any:
    import blosc2
    return blosc2.open(str(path), mode="r", dparams={"nthreads": threads})


def test_blosc2_sequential(benchmark: Any, engine: Any, frame: tuple[Path, np.ndarray]) -> None:
    path, expected = frame

    def loop() -> Callable[[], object]:
        chunks, out = opened_frame(path, 1), touched(CHUNK_BYTES)

        def decompress() -> None:
            for index in range(chunks.nchunks):
                chunks.decompress_chunk(index, dst=out)
        return decompress

    def slicing() -> Callable[[], object]:
        chunks = opened_frame(path, native.CPUS)
        return lambda: chunks[:]

    nbytes = expected.nbytes
    compare(benchmark, "blosc2-sequential", region_side(lambda: uffd.providers.Blosc2File(path), expected, engine),
            {"decompress_chunk": plain(nbytes, loop)}, warm_nbytes=3 * nbytes,
            beside={"blosc2 slicing, all threads": plain(nbytes, slicing)})


def test_blosc2_random(benchmark: Any, engine: Any, frame: tuple[Path, np.ndarray]) -> None:
    path, expected = frame
    blocks = expected.nbytes // BLOCK_BYTES
    chosen = np.random.default_rng(7).choice(blocks, max(blocks // 100, 1), replace=False) * BLOCK_BYTES
    shares: list[float] = []
    slices: list[float] = []

    def touch_all(region: Any) -> float:
        return native.touch_sequential(region.address, expected.nbytes)

    def touch_chosen(region: Any) -> float:
        start_s = time.perf_counter()
        native.touch(region.address, chosen)
        return time.perf_counter() - start_s

    def seconds(call: Callable[[Any], float]) -> float:
        with uffd.Region(expected.nbytes, uffd.providers.Blosc2File(path), engine=engine,
                         block_bytes=BLOCK_BYTES) as region:
            taken_s = call(region)
            array = region.array()
            assert np.array_equal(array[chosen], expected[chosen])
            del array
        return taken_s

    def sliced() -> float:
        chunks = opened_frame(path, 1)
        items = BLOCK_BYTES // 4
        start_s = time.perf_counter()
        for offset in chosen // 4:
            chunks[int(offset):int(offset) + items]
        return time.perf_counter() - start_s

    def one_round() -> None:
        native.warm(2 * expected.nbytes)
        all_s = seconds(touch_all)
        shares.append(100 * seconds(touch_chosen) / all_s)
        slices.append(100 * sliced() / all_s)

    benchmark.pedantic(one_round, rounds=ROUNDS)
    record(benchmark, "blosc2-random", summary(shares),
           beside={"the same blocks by blosc2 slicing": summary(slices)["median"]})
