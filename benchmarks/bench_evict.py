"""More memory than there is: data of four times the budget, beside np.memmap and swap under the same memory cgroup; and
what one fill and one eviction cost, beside the same calls of the kernel in plain C."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import native
import numpy as np
import policy_sim
import pytest
from harness import MIB, SCALE, Side, compare, note, record, scaled, summary

import uffd

HERE = Path(__file__).resolve().parent
BUDGET_BYTES = scaled(32 * MIB, 16 * MIB)
NBYTES = 4 * BUDGET_BYTES
BLOCK_BYTES = 65536
ROUNDS_LIMITED = 3 if SCALE >= 1 else 1     # each is a process that starts with a cold cache
NO_CGROUP = 77


def test_steady(benchmark: Any) -> None:
    """A clean 64 KiB block filled from memory and one taken out, for ever; inline, so that no thread is waited for."""
    source = np.random.default_rng(9).integers(1, 255, 2 * NBYTES, dtype=np.uint8)
    offsets = np.random.default_rng(10).permutation(source.nbytes // BLOCK_BYTES).astype(np.uint64) * BLOCK_BYTES

    def through(mode: str, delivery: str) -> Side:
        @contextmanager
        def side() -> Iterator[Callable[[], float]]:
            with uffd.Engine(budget_bytes=BUDGET_BYTES) as engine:
                with uffd.Region(None, uffd.providers.Memory(source), engine=engine, block_bytes=BLOCK_BYTES, mode=mode,
                                 delivery=delivery, readahead_bytes=0) as region:
                    native.touch(region.address, offsets[:len(offsets) // 2])    # memory is full
                    yield lambda: timed(lambda: native.touch(region.address, offsets)) / len(offsets) * 1e6
                    array = region.array()
                    assert np.array_equal(array[offsets], source[offsets])
                    del array
        return side

    @contextmanager
    def in_c() -> Iterator[Callable[[], float]]:
        yield lambda: native.evict_cycle(source, BLOCK_BYTES, offsets) / len(offsets) * 1e6

    compare(benchmark, "evict-steady", through("r", "inline"), {"memcpy, MOVE in, WP, MOVE out": in_c},
            warm_nbytes=2 * BUDGET_BYTES,
            beside={"thread delivery": through("r", "thread"), "writable, inline": through("c", "inline")})


def timed(work: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


@pytest.mark.parametrize("delivery", ["thread", "inline"])
def test_waits(benchmark: Any, delivery: str) -> None:
    """Is room made ahead of need? Budgets of several sizes in a steady state; the worst of them counts."""
    rng = np.random.default_rng(13)
    shares = {}

    def once() -> None:
        for budget_bytes in (scaled(32 * MIB, 16 * MIB), scaled(64 * MIB, 16 * MIB), scaled(256 * MIB, 16 * MIB)):
            blocks = 4 * budget_bytes // BLOCK_BYTES
            touches = policy_sim.zipf(rng, 3 * blocks, blocks, 0.99) * BLOCK_BYTES
            with uffd.Engine(budget_bytes=budget_bytes) as engine:
                with uffd.Region(blocks * BLOCK_BYTES, engine=engine, delivery=delivery, block_bytes=BLOCK_BYTES,
                                 readahead_bytes=0) as region:
                    array = region.array()
                    write_every_second(array, touches[:blocks])
                    before = region.stats()
                    write_every_second(array, touches[blocks:])
                    after = region.stats()
                    del array
            waits, faults = (sum(getattr(after, name) - getattr(before, name) for name in names) for names in
                             (["evict_waits"], ["faults_read", "faults_write", "faults_wp"]))
            shares[budget_bytes] = 100 * waits / faults
            note(benchmark, f"budget of {budget_bytes >> 20} MiB", f"{waits} waits, {faults} faults")

    benchmark.pedantic(once, rounds=1)
    record(benchmark, "evict-waits" if delivery == "thread" else "evict-waits-inline", summary([max(shares.values())]))


def write_every_second(array: np.ndarray, touches: np.ndarray) -> None:
    for write, at in enumerate(touches.tolist()):
        if write & 1:
            array[at] = 1
        else:
            array[at]


def test_packed(benchmark: Any) -> None:
    """Data of four times the budget written and read, spilled compressed: what can't get smaller must cost little;
    beside it what can, both ways."""
    rng = np.random.default_rng(14)
    hard = rng.integers(0, 256, NBYTES, dtype=np.uint8)
    soft = rng.integers(0, 1000, NBYTES // 4, dtype=np.int32).view(np.uint8)
    shares = {}

    def through(data: np.ndarray, compress: str | None) -> Side:
        @contextmanager
        def side() -> Iterator[Callable[[], float]]:
            with uffd.Engine(budget_bytes=BUDGET_BYTES) as engine:
                with uffd.Region(NBYTES, uffd.providers.Scratch(compress=compress), engine=engine,
                                 block_bytes=BLOCK_BYTES) as region:
                    yield lambda: timed(lambda: written_and_read(region.array(), data))
                    stats = region.stats()
                    shares[data is soft, compress] = 100 * stats.bytes_stored / stats.bytes_written
        return side

    compare(benchmark, "evict-packed", through(hard, "zstd"), {"Scratch()": through(hard, None)},
            warm_nbytes=2 * BUDGET_BYTES,
            beside={"integers, zstd": through(soft, "zstd"), "integers, Scratch()": through(soft, None)})
    record(benchmark, "evict-packed-bytes", summary([shares[True, "zstd"]]))


def written_and_read(array: np.ndarray, data: np.ndarray) -> None:
    for start in range(0, len(array), MIB):
        array[start:start + MIB] = data[start:start + MIB]
    for start in range(0, len(array), MIB):
        assert np.array_equal(array[start:start + MIB], data[start:start + MIB])


def test_metadata(benchmark: Any) -> None:
    """Memory beside the data: of a process that has touched many small blocks, less the budget, for each block."""
    blocks = scaled(1 << 20, 1 << 14)
    program = (
        "import numpy as np, uffd, sys\n"
        "blocks, page = int(sys.argv[1]), uffd._core.PAGE_BYTES\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * page\n"
        "engine = uffd.Engine(budget_bytes=16 << 20)\n"
        "region = uffd.Region(blocks * page, uffd.providers.Zero(), engine=engine, mode='r', block_bytes=page,\n"
        "                     readahead_bytes=0)\n"
        "array = region.array()\n"
        "array[:4096 * page:page].sum(); engine.budget_bytes = 8 << 20\n"
        "before = resident() - engine.resident_bytes\n"
        "array[::page].sum()\n"
        "print((resident() - engine.resident_bytes - before) / blocks)\n")

    def once() -> None:
        answer = subprocess.run([sys.executable, "-P", "-c", program, str(blocks)], capture_output=True, text=True,
                                check=True, timeout=600)
        record(benchmark, "evict-metadata", summary([float(answer.stdout)]))

    benchmark.pedantic(once, rounds=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of NBYTES of noise on a disk (the folder for temporary files may be memory)."""
    made = Path(os.environ.get("TMPDIR", "/var/tmp")) / f"uffd-bench-{os.getpid()}"
    made.mkdir()
    try:
        rng = np.random.default_rng(12)
        with open(made / "data.bin", "wb") as file:
            for _ in range(NBYTES // MIB):
                file.write(rng.random(MIB // 8).tobytes())
        yield made
    finally:
        shutil.rmtree(made)


@pytest.fixture(scope="module")
def swap() -> Iterator[str]:
    """The machine's swap, where there is enough of it; where there is none, on a compressed disk in memory (zram), for
    the time of these tests; "" where that can't be had either."""
    device = Path("/sys/block/zram0/disksize")
    rows = [line.split() for line in Path("/proc/swaps").read_text().splitlines()[1:]]
    if rows:
        free = sum(int(size) - int(used) for _, _, size, used, _ in rows) << 10
        yield ", ".join(Path(row[0]).name for row in rows) if free > NBYTES + NBYTES // 4 else ""
        return
    if os.geteuid() or not device.exists() or not shutil.which("mkswap"):
        yield ""
        return
    try:
        Path("/sys/block/zram0/reset").write_text("1")
        device.write_text(str(2 * NBYTES))
        subprocess.run(["mkswap", "/dev/zram0"], check=True, capture_output=True)
        subprocess.run(["swapon", "/dev/zram0"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield ""
        return
    yield "zram"
    with suppress(OSError, subprocess.CalledProcessError):
        subprocess.run(["swapoff", "/dev/zram0"], check=True, capture_output=True)
        Path("/sys/block/zram0/reset").write_text("1")


def limited(benchmark: Any, side: str, work: str, folder: Path) -> float:
    """Seconds of one run in a process of its own; the test is skipped where no memory cgroup can be had."""
    answer = subprocess.run([sys.executable, "-P", str(HERE / "limited.py"), side, work, str(folder), str(NBYTES),
                             str(BUDGET_BYTES)], capture_output=True, text=True, check=False, timeout=1200,
                            env={**os.environ, "PYTHONPATH": ""})
    if answer.returncode == NO_CGROUP:
        pytest.skip(answer.stderr.strip())
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    note(benchmark, f"{side}: cgroup's peak", found["peak_bytes"])
    if answer.stderr.startswith("{"):
        note(benchmark, f"{side}: counters", json.loads(answer.stderr.splitlines()[0]))
    return float(found["seconds"])


@pytest.mark.parametrize("work", ["zipf", "rmw", "sort", "scan"])
def test_limited(benchmark: Any, folder: Path, swap: str, work: str) -> None:
    def side(name: str) -> Side:
        @contextmanager
        def one() -> Iterator[Callable[[], float]]:
            yield lambda: limited(benchmark, name, work, folder)
        return one

    beside = {"uffd, inline": side("uffd-inline")}
    if work in ("zipf", "rmw"):
        beside["np.memmap, MADV_RANDOM"] = side("memmap-random")
    if swap:
        beside[f"swap on {swap}, a plain ndarray"] = side("swap")
    compare(benchmark, f"evict-{work}", side("uffd"), {"np.memmap": side("memmap")}, warm_nbytes=BUDGET_BYTES,
            beside=beside, rounds=ROUNDS_LIMITED)
