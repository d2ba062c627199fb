"""Where should the threads that serve faults run? The mechanisms in plain C, side by side.

`python benchmarks/placement.py [--touches N] [--rounds N]` prints, for each mechanism and number of touching threads,
p50 and p99 of a touch, the time of all touches divided by their number, the CPU time of the whole process per touch,
wake-ups in vain per fault and how often a touching thread changed its CPU.
"""
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import native
import numpy as np


@dataclass(frozen=True)
class Mechanism:
    name: str
    placement: int
    workers: int = 1
    cpu: int = 0
    touch_cpu: int = -1
    sample_every: int = 64
    spin_ns: int = 0
    deep_faults: int = 0
    policy: int = os.SCHED_OTHER


PER_CPU = native.CPUS
MANY = 8 * PER_CPU
MECHANISMS = (
    Mechanism("same CPU by force (floor)", native.ONE_PINNED, touch_cpu=0),
    Mechanism("one worker, free", native.ONE_FREE),
    Mechanism("one worker, pinned to CPU 0", native.ONE_PINNED),
    Mechanism("one worker, free, spins 50 us", native.ONE_SPIN, spin_ns=50_000),
    Mechanism("one worker, chases the faulter", native.ONE_CHASES, sample_every=1),
    Mechanism("one worker, chases, 1 look in 16", native.ONE_CHASES, sample_every=16),
    Mechanism("one pinned per CPU", native.PER_CPU, PER_CPU),
    Mechanism("one pinned per CPU, EPOLLEXCLUSIVE", native.EXCLUSIVE, PER_CPU),
    Mechanism("one pinned per CPU, in read()", native.READ, PER_CPU),
    Mechanism("one pinned per CPU, spin 5 us", native.SPIN, PER_CPU, spin_ns=5_000),
    Mechanism("one pinned per CPU, spin 50 us", native.SPIN, PER_CPU, spin_ns=50_000),
    Mechanism("one pinned per CPU, SCHED_BATCH", native.PER_CPU, PER_CPU, policy=os.SCHED_BATCH),
    Mechanism("one pinned per CPU, SCHED_IDLE", native.PER_CPU, PER_CPU, policy=os.SCHED_IDLE),
    Mechanism("one worker, chases 1/16, SCHED_IDLE", native.ONE_CHASES, sample_every=16, policy=os.SCHED_IDLE),
    Mechanism("follower, SCHED_IDLE", native.FOLLOW, PER_CPU, policy=os.SCHED_IDLE),
    Mechanism("follower", native.FOLLOW, PER_CPU),
    Mechanism("follower, one when queues are deep", native.FOLLOW, PER_CPU, deep_faults=2),
    Mechanism("follower, 1 look in 16", native.FOLLOW, PER_CPU, sample_every=16),
    Mechanism("many workers: pinned, all poll", native.PER_CPU, MANY),
    Mechanism("many workers: EPOLLEXCLUSIVE", native.EXCLUSIVE, MANY),
    Mechanism("many workers: follower", native.FOLLOW, MANY),
    Mechanism("many workers: follower, one if deep", native.FOLLOW, MANY, deep_faults=2),
    Mechanism("many workers: follower, SCHED_IDLE", native.FOLLOW, MANY, policy=os.SCHED_IDLE),
)


def measure(mechanism: Mechanism, threads: int, touches: int, source: np.ndarray, seed: int) -> dict[str, float]:
    nbytes = (touches + MANY) * native.PAGE_BYTES
    offsets = np.random.default_rng(seed).permutation(touches) * native.PAGE_BYTES
    counts = native.ServeCounts()
    with (native.open_range(nbytes, native.PAGE_BYTES, source, native.THREAD) as served,
          native.serving(served, mechanism.placement, mechanism.workers, cpu=mechanism.cpu, counts=counts,
                         sample_every=mechanism.sample_every, spin_ns=mechanism.spin_ns,
                         deep_faults=mechanism.deep_faults, policy=mechanism.policy)):
        time.sleep(0.01)
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        wait_ns, cpus = native.touch(served.base, offsets, threads, mechanism.touch_cpu)
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return {"p50_us": np.percentile(wait_ns, 50) / 1e3, "p99_us": np.percentile(wait_ns, 99) / 1e3,
            "wall_us": wall_s / touches * 1e6, "cpu_us": cpu_s / touches * 1e6, "wakeups": counts.wakeups / touches,
            "moves": np.count_nonzero(np.diff(cpus)) / touches, "armed": counts.armed_at_end,
            "look_us": counts.sample_ns / max(counts.sampled, 1) / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--touches", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2, 8])
    parser.add_argument("--only", default="")
    parser.add_argument("--hogs", type=int, default=0, help="processes that only burn CPU beside it")
    options = parser.parse_args()
    source = np.ones(1 << 24, dtype=np.uint8)
    chosen = [mechanism for mechanism in MECHANISMS if options.only in mechanism.name]
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.hogs)]
    try:
        compare(options, chosen, source)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def compare(options: argparse.Namespace, chosen: list[Mechanism], source: np.ndarray) -> None:
    for threads in options.threads:
        results: dict[str, list[dict[str, float]]] = {mechanism.name: [] for mechanism in chosen}
        for turn in range(options.rounds):
            native.warm(2 * options.touches * native.PAGE_BYTES)
            for mechanism in chosen if turn % 2 else reversed(chosen):
                results[mechanism.name].append(measure(mechanism, threads, options.touches, source, turn))
        print(f"{threads} touching thread(s), {options.touches} touches, median of {options.rounds} rounds")
        columns = list(results[chosen[0].name][0])
        print(f"  {'':36}" + "".join(f"{column:>9}" for column in columns))
        for name, rows in results.items():
            medians = [statistics.median(row[column] for row in rows) for column in columns]
            print(f"  {name:36}" + "".join(f"{value:9.2f}" for value in medians))


if __name__ == "__main__":
    main()
