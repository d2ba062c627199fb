"""What a migration was: states, times, bytes, and how long the program waited; and its picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ..stats import LatencyHistogram
from ._states import Phase, owner_of, status_name

__all__ = ["Moment", "Report", "Side", "Status", "Traffic", "plot"]

_KINDS = ("precopy", "pushed", "requested", "zero", "doubled")
_COLOURS = {"SETUP": "#e8e8e8", "PRECOPY": "#edae49", "SWITCHOVER": "#d1495b", "POSTCOPY": "#00798c",
            "PAUSED": "#b8b8b8", "RECOVERING": "#9d79bc", "COMPLETED": "#66a182", "FAILED": "#d1495b",
            "CANCELLED": "#b8b8b8"}


class Status(StrEnum):
    """Where a migration stands. ARCHITECTURE.md and docs/migration.md draw the way between them."""

    SETUP = "SETUP"
    PRECOPY = "PRECOPY"
    SWITCHOVER = "SWITCHOVER"
    POSTCOPY = "POSTCOPY"
    PAUSED = "PAUSED"
    RECOVERING = "RECOVERING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def over(self) -> bool:
        """Whether nothing follows it."""
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


@dataclass(frozen=True)
class Traffic:
    """A number for each way in which memory travels.

    precopy: sent while the source's program ran. pushed: sent after the hand-over without being asked for. requested:
    because the destination's program touched it. zero: nothing but zeros, of which only that was said. doubled: had
    come already, and was thrown away (of the three first, besides).
    """

    precopy: int = 0
    pushed: int = 0
    requested: int = 0
    zero: int = 0
    doubled: int = 0

    @property
    def total(self) -> int:
        """All that travelled as bytes: precopy, pushed and requested."""
        return self.precopy + self.pushed + self.requested


class Side:
    """What both ends of a migration say of themselves; `_wire` is the core's end."""

    _wire: Any

    @property
    def status(self) -> Status:
        """Where the migration is, as this side knows it."""
        return Status[status_name(self._phase)]

    @property
    def _phase(self) -> Phase:
        return Phase(self._wire.phase)


@dataclass(frozen=True)
class Moment:
    """at_s: since the beginning. status: what came then. blocks_left: that had yet to travel, just then."""

    at_s: float
    status: Status
    blocks_left: int


@dataclass(frozen=True)
class Report:
    """One side's account of a migration, at one moment; times in seconds of this machine's clock.

    side: "source" or "destination". owner: who has the memory, as far as this side knows ("unknown": it does not).
    setup_s: from the beginning until memory could travel. downtime_s: from the last write that was possible at the
    source until the source heard that the destination runs (so it is too long by half a round trip); None before, and
    at the destination, which does not see its begin. total_s: from the beginning to the end, or to now. bytes, blocks:
    by the way they went. bytes_passed: of shared memory handed over by descriptor, without being copied. bytes_opened:
    not sent either, since the destination has them from their provider, which it opened by itself. bytes_wire:
    what went over the network, after compression; heads of frames are not counted. rounds: of precopy; dirty_blocks:
    for each, what was to be sent in it. requests: how long the destination's threads waited for a block, from the fault
    to the block in its place, in ns; requests_max_ns: the longest. blocked_s: the sum of that over all blocks;
    blocked_by_thread_s: by thread id, where the kernel tells it; of several that wait for one block, the first; of 256
    threads at the most. timeline: the states in their order. program: (at_s,
    per second) of the program's own work, if somebody measured it: `plot` draws it.
    """

    side: str
    status: Status
    owner: str
    setup_s: float = 0.0
    downtime_s: float | None = None
    total_s: float = 0.0
    bytes: Traffic = Traffic()
    blocks: Traffic = Traffic()
    bytes_passed: int = 0
    bytes_opened: int = 0
    bytes_wire: int = 0
    blocks_left: int = 0
    rounds: int = 0
    dirty_blocks: tuple[int, ...] = ()
    requests: LatencyHistogram = field(default_factory=lambda: LatencyHistogram(()))
    requests_max_ns: int = 0
    blocked_s: float = 0.0
    blocked_by_thread_s: Mapping[int, float] = field(default_factory=dict)
    timeline: tuple[Moment, ...] = ()
    program: tuple[tuple[float, float], ...] = ()

    @classmethod
    def of(cls, figures: Mapping[str, Any], *, side: str, phase: Phase, began_ns: int, now_ns: int, setup_ns: int = 0,
           dirty_blocks: Sequence[int] = (), bytes_passed: int = 0) -> Report:
        """From what the core counted (`Wire.figures`). began_ns, now_ns: CLOCK_MONOTONIC, like all in it."""
        moments = tuple(Moment(max(0, at_ns - began_ns) / 1e9, Status(status_name(Phase(number))), left)
                        for at_ns, number, left in figures["moments"])
        first = Moment(0.0, Status.SETUP, moments[0].blocks_left if moments else figures["left"])
        # The hand-over has two phases and one name.
        timeline = (first, *(moment for moment, before in zip(moments, (first, *moments), strict=False)
                             if moment.status is not before.status))
        status = Status(status_name(phase))
        stopped_ns, resumed_ns = figures["stopped_ns"], figures["resumed_ns"]
        down = side == "source" and 0 < stopped_ns < resumed_ns
        carried = Traffic(**{kind: figures["bytes"][kind] for kind in _KINDS})
        return cls(
            side=side, status=status, owner=owner_of(side, phase), setup_s=setup_ns / 1e9,
            downtime_s=(resumed_ns - stopped_ns) / 1e9 if down else None,
            total_s=timeline[-1].at_s if status.over else (now_ns - began_ns) / 1e9,
            bytes=carried, blocks=Traffic(**{kind: figures["blocks"][kind] for kind in _KINDS}),
            bytes_passed=bytes_passed, bytes_opened=figures.get("bytes_opened", 0),
            bytes_wire=figures.get("bytes_wire", carried.total), blocks_left=figures["left"],
            rounds=figures["rounds"], dirty_blocks=tuple(dirty_blocks),
            requests=LatencyHistogram(tuple(figures["latency"])), requests_max_ns=figures["latency_max_ns"],
            blocked_s=figures["blocked_ns"] / 1e9,
            blocked_by_thread_s={tid: ns / 1e9 for tid, ns in figures["blocked_by_thread_ns"].items()},
            timeline=timeline)

    @property
    def bytes_copied(self) -> int:
        """Bytes of memory that travelled, zeros not counted."""
        return self.bytes.total

    @property
    def throughput_bytes_per_s(self) -> float:
        """bytes_copied over the time after setup; pauses count."""
        return self.bytes_copied / (self.total_s - self.setup_s) if self.total_s > self.setup_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All of it as numbers, texts, lists and dicts, fit for JSON, with the derived figures beside the measured."""
        by_way = {name: {kind: getattr(getattr(self, name), kind) for kind in (*_KINDS, "total")}
                  for name in ("bytes", "blocks")}
        plain = ("side", "owner", "setup_s", "downtime_s", "total_s", "bytes_passed", "bytes_opened", "bytes_copied",
                 "bytes_wire", "blocks_left", "rounds", "blocked_s", "throughput_bytes_per_s")
        return {**{name: getattr(self, name) for name in plain}, **by_way, "status": str(self.status),
                "dirty_blocks": list(self.dirty_blocks),
                "requests": {"counts": list(self.requests.counts), "n": self.requests.n, "p50_ns": self.requests.p50_ns,
                             "p99_ns": self._at_most_the_longest(0.99), "max_ns": self.requests_max_ns},
                "blocked_by_thread_s": {str(tid): seconds for tid, seconds in self.blocked_by_thread_s.items()},
                "timeline": [{"at_s": moment.at_s, "status": str(moment.status), "blocks_left": moment.blocks_left}
                             for moment in self.timeline],
                "program": [list(point) for point in self.program]}

    def __str__(self) -> str:
        down = "not yet, or not to be seen from here" if self.downtime_s is None else f"{self.downtime_s * 1e3:.2f} ms"
        lines = [
            f"migration, {self.side}: {self.status}; the memory is with the {self.owner}" if self.owner != "unknown"
            else f"migration, {self.side}: {self.status}; who has the memory is unknown: ask the other side",
            f"  downtime    {down}",
            f"  total       {self.total_s:.3f} s, of which setup {self.setup_s * 1e3:.1f} ms",
            f"  copied      {_size(self.bytes_copied)}, {_size(self.throughput_bytes_per_s)}/s"
            + (f"; {_size(self.bytes_wire)} over the network" if self.bytes_wire != self.bytes_copied else ""),
        ]
        if self.bytes_passed:
            lines.append(f"  passed      {_size(self.bytes_passed)} by descriptor, without a copy")
        if self.bytes_opened:
            lines.append(f"  not sent    {_size(self.bytes_opened)}: the destination reads them from their provider")
        lines += [f"  {kind:<11} {getattr(self.blocks, kind):,} blocks, {_size(getattr(self.bytes, kind))}"
                  for kind in _KINDS if getattr(self.blocks, kind) or kind in ("precopy", "pushed", "requested")]
        if self.rounds:
            dirty = f"; dirty blocks by round {', '.join(f'{n:,}' for n in self.dirty_blocks)}"
            lines.append(f"  rounds      {self.rounds}{dirty if self.dirty_blocks else ''}")
        if self.blocks_left:
            lines.append(f"  left        {self.blocks_left:,} blocks")
        if self.requests.n:
            lines.append(f"  requests    {self.requests.n:,}: p50 {_time(self.requests.p50_ns)}, p99 "
                         f"{_time(self._at_most_the_longest(0.99))}, max {_time(self.requests_max_ns)}; blocked "
                         f"{self.blocked_s * 1e3:.1f} ms in all")
            lines += self._bars()
        if self.blocked_by_thread_s:
            longest = sorted(self.blocked_by_thread_s.items(), key=lambda item: -item[1])[:8]
            lines.append("  by thread   " + ", ".join(f"{tid}: {seconds * 1e3:.1f} ms" for tid, seconds in longest))
        lines.append("  time line   " + " > ".join(f"{moment.status} {moment.at_s * 1e3:.1f}"
                                                   for moment in _shortened(self.timeline)) + " ms")
        return "\n".join(lines)

    def _at_most_the_longest(self, quantile: float) -> float:
        """A quantile out of buckets may lie beyond the longest that was measured."""
        found = self.requests.quantile_ns(quantile)
        return min(found, float(self.requests_max_ns)) if self.requests_max_ns else found

    def _bars(self) -> list[str]:
        counts = self.requests.counts
        used = [k for k, count in enumerate(counts) if count]
        most = max(counts)
        return [f"    {_time(2.0**k):>8} {'#' * max(1 if counts[k] else 0, round(40 * counts[k] / most)):<40} "
                f"{counts[k]:,}" for k in range(used[0], used[-1] + 1)]


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a picture (PNG, SVG or PDF by the name's end): the states over time with what was left to travel and, where
    report.program is there, the program's own speed; the bytes by their way; how long requested blocks took.

    Needs matplotlib, an extra: ImportError names it. The file is written whole, or OSError.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("uffd.migrate.plot draws with matplotlib: pip install 'pyuffd[plot]'") from error
    figure = Figure(figsize=(9, 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)                      # no window system, and no state that the program may have set
    above, left, right = figure.subplot_mosaic([["time", "time"], ["ways", "waits"]], height_ratios=[3, 2]).values()
    _draw_time(above, report)
    _draw_ways(left, report)
    _draw_waits(right, report)
    down = "" if report.downtime_s is None else f", downtime {report.downtime_s * 1e3:.2f} ms"
    figure.suptitle(f"{report.side}: {report.status}, {_size(report.bytes_copied)} in {report.total_s:.2f} s{down}",
                    fontsize=10)
    figure.savefig(os.fspath(path))


def _draw_time(axes: Any, report: Report) -> None:
    ends = [moment.at_s for moment in report.timeline[1:]] + [max([report.total_s,
                                                                  *(at_s for at_s, _ in report.program)])]
    named = set()
    for moment, end_s in zip(report.timeline, ends, strict=True):
        label = None if moment.status in named else str(moment.status)
        named.add(moment.status)
        axes.axvspan(moment.at_s, max(end_s, moment.at_s), color=_COLOURS[moment.status], alpha=0.25, lw=0, label=label)
    if report.program:
        axes.plot([at_s for at_s, _ in report.program], [rate for _, rate in report.program], color="#222222", lw=1.2,
                  label="the program")
        axes.set_ylabel("the program's own work, per second", fontsize=8)
    else:
        axes.step([moment.at_s for moment in report.timeline], [moment.blocks_left for moment in report.timeline],
                  where="post", color="#222222", lw=1.2, label="blocks left")
        axes.set_ylabel("blocks that have yet to travel", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds", fontsize=8)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _draw_ways(axes: Any, report: Report) -> None:
    values = [getattr(report.bytes, kind) / 2**20 for kind in _KINDS]
    bars = axes.barh(_KINDS, values, color="#30638e")
    axes.bar_label(bars, [f" {getattr(report.blocks, kind):,} blocks" for kind in _KINDS], fontsize=8)
    axes.margins(x=0.35)
    axes.invert_yaxis()
    axes.set_xlabel("MiB", fontsize=8)


def _draw_waits(axes: Any, report: Report) -> None:
    counts = report.requests.counts
    used = [k for k, count in enumerate(counts) if count]
    if not used:
        why = "no block was asked for" if report.side == "destination" else "waiting is measured at the destination"
        axes.text(0.5, 0.5, why, ha="center", va="center", fontsize=8, transform=axes.transAxes)
        axes.set_axis_off()
        return
    shown = range(used[0], used[-1] + 1)
    axes.bar([_time(2.0**k) for k in shown], [counts[k] for k in shown], color="#00798c", width=0.9)
    axes.tick_params(axis="x", labelrotation=60, labelsize=7)
    axes.set_xlabel(f"a requested block took this, to twice this (longest {_time(report.requests_max_ns)})", fontsize=8)


def _shortened(timeline: tuple[Moment, ...]) -> tuple[Moment, ...]:
    return timeline if len(timeline) <= 16 else (*timeline[:8], *timeline[-8:])


def _size(nbytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def _time(ns: float) -> str:
    for unit in ("ns", "us", "ms"):
        if ns < 1000:
            return f"{ns:.3g} {unit}"
        ns /= 1000
    return f"{ns:.3g} s"
