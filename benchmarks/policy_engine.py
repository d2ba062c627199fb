"""Does the engine keep what the simulator says that its policy keeps? The same traces through both.

`python -P benchmarks/policy_engine.py [--trace FILE ...] [--sizes 10 25] [--delivery inline thread]` plays each trace
over a region, one thread, read-ahead off, and prints the share of touches that found their block in memory (the pool
included), beside the simulator's at the same budget and at what the engine fills of it: it keeps some headroom free.
The traces are those of policy_sim.py that have no read-ahead and blocks of one size, and words: which row of a table of
words a program looks up that reads this repository's documents, in their order.
"""
from __future__ import annotations

import argparse
import re
from pathlib import Path

import native
import numpy as np
import policy_sim as sim

import uffd

ROOT = Path(__file__).resolve().parent.parent
BLOCK_BYTES = native.PAGE_BYTES
SHIFT = BLOCK_BYTES.bit_length() - 1


def words(times: int = 1) -> sim.Trace:
    """A recorded trace: the words of the documents, a block for each."""
    text = "".join(path.read_text() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]))
    _, numbers = np.unique(re.findall(r"\w+", text.lower()), return_inverse=True)
    return sim.trace("words", np.tile(numbers, times), int(numbers.max()) + 1, shifts=SHIFT)


def engine_hits(played: sim.Trace, budget_bytes: int, delivery: str = "inline") -> tuple[float, uffd.Stats]:
    """Percent of the touches behind the warm part whose block was in memory, and what the engine counted for them."""
    offsets = played.touches.astype(np.uint64) * BLOCK_BYTES
    with uffd.Engine(budget_bytes=budget_bytes) as engine:
        with uffd.Region(len(played.shifts) * BLOCK_BYTES, uffd.providers.Zero(), engine=engine, mode="r",
                         block_bytes=BLOCK_BYTES, delivery=delivery, readahead_bytes=0) as region:
            native.touch(region.address, offsets[:played.warm])
            before = region.stats().blocks_demand
            native.touch(region.address, offsets[played.warm:])
            stats = region.stats()
    counted = len(offsets) - played.warm
    return 100 * (1 - (stats.blocks_demand - before) / counted), stats


def headroom_bytes(budget_bytes: int) -> int:
    """What the engine keeps free of a budget: room_high of uffd/_room.pxi."""
    return max(min(max(budget_bytes // 32, 4 << 20), budget_bytes // 16), 2 * BLOCK_BYTES)


def traces(blocks: int, count: int, seed: int) -> list[sim.Trace]:
    made = [played for played in sim.traces(blocks, count, seed)
            if not (played.touches & sim.AHEAD).any() and len(np.unique(played.shifts)) == 1]
    return [sim.trace(played.name, played.touches, blocks, shifts=SHIFT) for played in made] + [words(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", nargs="*", default=[], help="recorded traces, instead of the made ones")
    parser.add_argument("--sizes", type=float, nargs="*", default=[10, 25], help="memory, percent of the data")
    parser.add_argument("--delivery", nargs="*", default=["inline", "thread"])
    parser.add_argument("--blocks", type=int, default=20_000)
    parser.add_argument("--touches", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=4)
    options = parser.parse_args()
    chosen = [sim.load(path) for path in options.trace] or traces(options.blocks, options.touches, options.seed)
    print(f"hits, %{'':23}simulator  filled" + "".join(f"{name:>9}" for name in options.delivery) + "   most apart")
    for played in chosen:
        for percent in options.sizes:
            budget_bytes = int(played.data_bytes * percent / 100)
            told = [sim.play(played, "ours", budget).hits for budget in
                    (budget_bytes, budget_bytes - headroom_bytes(budget_bytes))]
            found = [engine_hits(played, budget_bytes, delivery)[0] for delivery in options.delivery]
            print(f"{played.name:22}{percent:5g} %" + "".join(f"{hits:10.2f}" for hits in told + found)
                  + f"{max(abs(hits - told[0]) for hits in found):9.2f}", flush=True)


if __name__ == "__main__":
    main()
