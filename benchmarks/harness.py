"""How a row is measured: ours and the floor in alternating rounds of one process, in swapped order, on memory that was
touched just before; medians and spread go to `benchmark.extra_info`."""
from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import native
from rows import BY_KEY

# A side prepares what it needs when entered, and gives the work: a call that returns its cost in the row's unit.
Side = Callable[[], AbstractContextManager[Callable[[], float]]]

SCALE = float(os.environ.get("UFFD_BENCH_SCALE", "1"))
ROUNDS = 9 if SCALE >= 1 else 3
MIB = 1 << 20


def scaled(nbytes: int, multiple: int = 2 * MIB) -> int:
    """That many bytes at full scale; at least one multiple."""
    return max(int(nbytes * SCALE) // multiple, 1) * multiple


def summary(samples: list[float]) -> dict[str, float]:
    """Median and the quartiles around it."""
    if len(samples) == 1:
        return {"median": samples[0], "low": samples[0], "high": samples[0]}
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


class Comparison:
    """One row's rounds. `floors` are alternatives of which the fastest is the floor; `beside` is only shown."""

    def __init__(self, ours: Side, floors: Mapping[str, Side], beside: Mapping[str, Side], warm_nbytes: int) -> None:
        self.ours = ours
        self.others = {**floors, **beside}
        self.warm_nbytes = warm_nbytes
        self.samples: dict[str, list[float]] = {name: [] for name in ("ours", *self.others)}
        self.stack = ExitStack()
        self.turn = 0

    def run_others(self) -> None:
        names = list(self.others)
        for name in names if self.turn % 4 < 2 else reversed(names):
            with self.others[name]() as work:
                self.samples[name].append(work())

    def before(self) -> tuple[tuple[Callable[[], float]], dict[str, Any]]:
        """Setup of a timed round: ends the round before, whose floor may come after it."""
        self.after()
        native.warm(self.warm_nbytes)
        self.turn += 1
        if self.turn % 2:
            self.run_others()
        return (self.stack.enter_context(self.ours()),), {}

    def timed(self, work: Callable[[], float]) -> None:
        self.samples["ours"].append(work())

    def after(self) -> None:
        self.stack.close()
        if self.turn and not self.turn % 2:
            self.run_others()

    def summaries(self) -> dict[str, dict[str, float]]:
        return {name: summary(samples) for name, samples in self.samples.items()}


def compare(benchmark: Any, key: str, ours: Side, floors: Mapping[str, Side], *, warm_nbytes: int,
            beside: Mapping[str, Side] | None = None, rounds: int = ROUNDS) -> None:
    """Measure row `key` and leave its numbers in the benchmark's extra_info."""
    comparison = Comparison(ours, floors, beside or {}, warm_nbytes)
    try:
        benchmark.pedantic(comparison.timed, setup=comparison.before, rounds=rounds)
    finally:
        comparison.after()
    results = comparison.summaries()
    best = min(floors, key=lambda name: results[name]["median"])
    rest = {name: result["median"] for name, result in results.items() if name not in ("ours", best)}
    record(benchmark, key, results["ours"], results[best], floor_name=best if len(floors) > 1 else "",
           beside=rest)


def record(benchmark: Any, key: str, ours: Mapping[str, float], floor: Mapping[str, float] | None = None, *,
           floor_name: str = "", beside: Mapping[str, float] | None = None) -> None:
    """Store a row's result. A benchmark may store several rows."""
    row = BY_KEY[key]
    judged = row.judged(ours["median"], floor["median"] if floor else None)
    benchmark.extra_info.setdefault("rows", {})[key] = {
        "ours": dict(ours), "floor": dict(floor) if floor else None, "floor_name": floor_name,
        "judged": judged, "goal": row.goal, "met": row.met(judged), "unit": row.unit, "beside": dict(beside or {}),
        "scale": SCALE,
    }


def note(benchmark: Any, name: str, value: object) -> None:
    """Something that a reader of the JSON wants beside the rows, where threads ran for instance."""
    benchmark.extra_info.setdefault("notes", {})[name] = value
