"""Which blocks should leave memory? uffd/_policy.h, compiled as it is, played over traces beside other policies.

`python benchmarks/policy_sim.py [--trace FILE ...] [--sizes 1 10 25] [--define POLICY_POOL_PERCENT=20 ...]` prints, for
each trace and each size of memory (percent of the data), miss ratios in percent, and of ours what share of the hits had
to be brought back from the pool (a `rescue`, some 10 us) and how many blocks were moved to the pool for each fill.

FILE is a recorded trace: an .npy of integers, or text with one block number per line (`#` begins a comment, a second
number is the log2 of the block's bytes, an `a` at the line's end says that it was filled ahead of need).
"""
from __future__ import annotations

import argparse
import ctypes as ct
import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-shared", "-fPIC")
AHEAD = 1 << 31
POLICIES = ("belady", "s3fifo", "ours", "lru", "fifo")


class CTrace(ct.Structure):
    _fields_ = [("touches", ct.c_void_p), ("count", ct.c_uint64), ("warm", ct.c_uint64), ("shifts", ct.c_void_p),
                ("blocks", ct.c_uint32), ("late", ct.c_uint32), ("capacity", ct.c_uint32),
                ("budget_bytes", ct.c_uint64)]


class Result(ct.Structure):
    _fields_ = [("touches", ct.c_uint64), ("misses", ct.c_uint64), ("fills", ct.c_uint64), ("rescues", ct.c_uint64),
                ("moves", ct.c_uint64), ("peak_bytes", ct.c_uint64), ("nodes", ct.c_uint64), ("broken", ct.c_int32)]

    @property
    def hits(self) -> float:
        """Percent of the touches."""
        return 100 * (1 - self.misses / max(self.touches, 1))

    @property
    def rescued(self) -> float:
        """Percent of the hits."""
        return 100 * self.rescues / max(self.touches - self.misses, 1)


@functools.cache
def library(defines: tuple[str, ...] = ()) -> ct.CDLL:
    """The simulator, with other numbers than the header's own: `("POLICY_POOL_PERCENT=20",)`."""
    with tempfile.TemporaryDirectory(prefix="uffd-policy-") as folder:
        target = Path(folder) / "policy.so"
        subprocess.run([os.environ.get("CC", "cc"), *FLAGS, f"-I{HERE.parent / 'uffd'}",
                        *(f"-D{define}" for define in defines), str(HERE / "policy_sim.c"), "-o", str(target)],
                       check=True)
        return ct.CDLL(str(target))


@dataclass(frozen=True)
class Trace:
    """Block numbers from 0, with AHEAD for fills that nobody waits for; the first `warm` are not counted."""

    name: str
    touches: np.ndarray
    shifts: np.ndarray
    warm: int

    @property
    def data_bytes(self) -> int:
        return int((1 << self.shifts.astype(np.uint64)).sum())


def trace(name: str, touches: np.ndarray, blocks: int, *, shifts: np.ndarray | int = 16,
          warm: float = 0.25) -> Trace:
    sizes = np.full(blocks, shifts, np.uint8) if isinstance(shifts, int) else shifts.astype(np.uint8)
    return Trace(name, np.ascontiguousarray(touches, np.uint32), sizes, int(len(touches) * warm))


def play(played: Trace, policy: str, budget_bytes: int, *, defines: tuple[str, ...] = (), late: int = 1,
         capacity: int = 0) -> Result:
    """One policy over one trace."""
    given = CTrace(played.touches.ctypes.data, len(played.touches), played.warm, played.shifts.ctypes.data,
                   len(played.shifts), late, capacity, budget_bytes)
    result = Result()
    rc = getattr(library(defines if policy == "ours" else ()), f"sim_{policy}")(ct.byref(given), ct.byref(result))
    if rc:
        raise RuntimeError(f"sim_{policy} answered {rc}: out of memory if negative, else a line of _policy.h whose "
                           "rule does not hold")
    return result


# Traces


def zipf(rng: np.random.Generator, count: int, blocks: int, alpha: float) -> np.ndarray:
    """Independent draws, rank r with weight r ** -alpha; ranks lie about at random."""
    weights = np.cumsum(np.arange(1, blocks + 1, dtype=float) ** -alpha)
    ranks = np.searchsorted(weights, rng.random(count) * weights[-1])
    return rng.permutation(blocks)[np.minimum(ranks, blocks - 1)]


def interleave(rng: np.random.Generator, count: int, streams: list[tuple[float, np.ndarray]],
               run: int = 16) -> np.ndarray:
    """Runs of `run` touches of one stream after the other, by weight; a stream that ends begins again."""
    weights = np.array([weight for weight, _ in streams])
    chosen = np.repeat(rng.choice(len(streams), count // run + 1, p=weights / weights.sum()), run)[:count]
    touches = np.empty(count, np.int64)
    for number, (_, stream) in enumerate(streams):
        places = np.flatnonzero(chosen == number)
        touches[places] = np.resize(stream, len(places))
    return touches


def scan_and_loop(rng: np.random.Generator, count: int, blocks: int) -> np.ndarray:
    """A hot 5 % (half of the touches), a loop over 30 % (three tenths), scans of the rest, each block once a lap."""
    hot, looped = blocks // 20, blocks // 20 + blocks * 3 // 10
    return interleave(rng, count, [(0.5, zipf(rng, count, hot, 0.7)), (0.3, np.arange(hot, looped)),
                                   (0.2, np.arange(looped, blocks))])


def later(rng: np.random.Generator, count: int, blocks: int) -> np.ndarray:
    """The same after memory was filled with something else: Zipf 0.6, a quarter of the touches, not counted."""
    return np.concatenate([zipf(rng, count // 4, blocks, 0.6),
                           (scan_and_loop(rng, count - count // 4, blocks) + blocks // 2) % blocks])


def shifting(rng: np.random.Generator, count: int, blocks: int, phases: int = 8) -> np.ndarray:
    """Zipf 0.9 over a window of a fifth of the blocks, which jumps on."""
    window = blocks // 5
    parts = [zipf(rng, count // phases, window, 0.9) + int(start)
             for start in np.linspace(0, blocks - window, phases)]
    return np.concatenate(parts)


def with_ahead(touches: np.ndarray, blocks: int, ahead: int) -> np.ndarray:
    """Before each touch of a block, the one `ahead` blocks further is filled, as sequential read-ahead does it."""
    return np.stack([np.minimum(touches + ahead, blocks - 1) | AHEAD, touches], axis=1).ravel()


def phases(rng: np.random.Generator, count: int, blocks: int, ahead: int = 0) -> np.ndarray:
    """Zipf 0.9 over everything, then laps over 9 % and later over 22 % of it, which fit memory of 10 % and 25 %."""
    parts = [zipf(rng, count // 4, blocks, 0.9)]
    for share in (9, 22):
        lap = int(rng.integers(blocks // 2)) + np.arange(blocks * share // 100)
        looped = np.resize(lap, count // 4)
        parts += [with_ahead(looped, blocks, ahead) if ahead else looped, zipf(rng, count // 8, blocks, 0.9)]
    return np.concatenate(parts)


def bursts(rng: np.random.Generator, count: int, blocks: int) -> np.ndarray:
    """Zipf 0.9, each block touched one to four times within the next few touches: correlated references."""
    drawn = zipf(rng, count // 2, blocks, 0.9)
    repeats = rng.integers(1, 5, len(drawn))
    order = np.repeat(np.arange(len(drawn)), repeats) + rng.integers(0, 30, repeats.sum())
    return np.repeat(drawn, repeats)[np.argsort(order, kind="stable")][:count]


def sizes_mixed(rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Regions of 4 KiB, 64 KiB and 1 MiB blocks."""
    return rng.choice(np.array([12, 16, 20], np.uint8), blocks, p=[0.6, 0.35, 0.05])


def traces(blocks: int = 20_000, count: int = 2_000_000, seed: int = 4) -> Iterator[Trace]:
    def made(name: str, make: Callable[[np.random.Generator], np.ndarray], **options: object) -> Trace:
        return trace(name, make(np.random.default_rng(seed)), blocks, **options)  # type: ignore[arg-type]

    for alpha in (0.7, 0.9, 0.99, 1.2):
        yield made(f"zipf {alpha}", functools.partial(zipf, count=count, blocks=blocks, alpha=alpha))
    yield made("scan + loop", lambda rng: scan_and_loop(rng, count, blocks))
    yield made("scan + loop, later", lambda rng: later(rng, count, blocks))
    yield made("loop, all", lambda rng: np.resize(np.arange(blocks), count))
    yield made("loop, 30 %", lambda rng: np.resize(np.arange(blocks * 3 // 10), count))
    yield made("shifting", lambda rng: shifting(rng, count, blocks))
    yield made("bursts", lambda rng: bursts(rng, count, blocks))
    yield made("phases", lambda rng: phases(rng, count, blocks))
    yield made("phases, read ahead", lambda rng: phases(rng, count, blocks, 8))
    yield made("zipf 0.9, ahead in vain", lambda rng: with_ahead(zipf(rng, count // 2, blocks, 0.9), blocks, 1))
    yield made("zipf 0.9, mixed sizes", lambda rng: zipf(rng, count, blocks, 0.9),
               shifts=sizes_mixed(np.random.default_rng(seed), blocks))


def load(path: str) -> Trace:
    """A recorded trace; its block numbers are made dense, in the order of the addresses."""
    ahead = None
    sizes = None
    if path.endswith(".npy"):
        numbers = np.load(path).astype(np.int64)
    else:
        rows = [line.partition("#")[0].split() for line in Path(path).read_text().splitlines()]
        rows = [row for row in rows if row]
        ahead = np.array([row[-1] == "a" for row in rows])
        numbers = np.array([int(row[0]) for row in rows], np.int64)
        sizes = np.array([int(row[1]) if len(row) > 1 and row[1] != "a" else 16 for row in rows])
    names, dense = np.unique(numbers, return_inverse=True)
    shifts = np.full(len(names), 16, np.uint8)
    if sizes is not None:
        shifts[dense] = sizes
    dense = dense.astype(np.uint32)
    if ahead is not None:
        dense |= ahead.astype(np.uint32) * np.uint32(AHEAD)
    return trace(Path(path).name, dense, len(names), shifts=shifts, warm=0.0)


# The table


def row(played: Trace, percent: float, defines: tuple[str, ...], late: int) -> str:
    budget_bytes = int(played.data_bytes * percent / 100)
    results = {policy: play(played, policy, budget_bytes, defines=defines, late=late) for policy in POLICIES}
    ours = results["ours"]
    begun = time.perf_counter()
    play(played, "ours", budget_bytes, defines=defines, late=late)
    each_ns = (time.perf_counter() - begun) / len(played.touches) * 1e9
    ratios = "".join(f"{100 - results[policy].hits:9.2f}" for policy in POLICIES)
    return (f"{played.name:24}{percent:5g} %{ratios}{ours.hits - results['lru'].hits:+9.2f}{ours.rescued:9.2f}"
            f"{ours.moves / max(ours.fills, 1):9.2f}{each_ns:9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", nargs="*", default=[], help="recorded traces, instead of the made ones")
    parser.add_argument("--sizes", type=float, nargs="*", default=[1, 10, 25], help="memory, percent of the data")
    parser.add_argument("--define", nargs="*", default=[], help="numbers of _policy.h to change")
    parser.add_argument("--late", type=int, default=1, help="events that wait until the evictor looks")
    parser.add_argument("--blocks", type=int, default=20_000)
    parser.add_argument("--touches", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=4)
    options = parser.parse_args()
    print(f"miss ratio, %{'':17}" + "".join(f"{policy:>9}" for policy in POLICIES)
          + f"{'hits-lru':>9}{'rescued%':>9}{'moves/f':>9}{'ns/touch':>9}")
    chosen = map(load, options.trace) if options.trace else traces(options.blocks, options.touches, options.seed)
    for played in chosen:
        for percent in options.sizes:
            print(row(played, percent, tuple(options.define), options.late), flush=True)


if __name__ == "__main__":
    main()
