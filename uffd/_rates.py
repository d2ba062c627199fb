"""What happened between two times that an engine told its figures: rates and latencies, and the words for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .stats import LatencyHistogram

__all__ = ["FORMAT", "Rates", "bytes_text", "count_text", "time_text"]

FORMAT = 1                          # of the figures; told in them, so that a reader of another version can say so


@dataclass(frozen=True)
class Rates:
    """Per second, over the time between the two; latencies of that time alone. None: not known."""

    faults: float | None
    fills: float | None             # blocks
    filled_bytes: float | None
    evicted: float | None           # blocks
    written_bytes: float | None
    errors: float | None
    stages: dict[str, LatencyHistogram]

    @classmethod
    def between(cls, before: dict[str, Any] | None, now: dict[str, Any], seconds: float) -> Rates:
        """Of two `stats`. before None: there are no rates yet, and latencies are those since the beginning."""
        def rate(*names: str) -> float | None:
            """None for counters that this engine does not have."""
            if before is None or seconds <= 0 or not all(name in now and name in before for name in names):
                return None
            return sum(max(0, now[name] - before[name]) for name in names) / seconds

        stages = {name: _since(None if before is None else before.get(name), value)
                  for name, value in now.items() if isinstance(value, dict)}
        return cls(rate("faults_read", "faults_write", "faults_wp"),
                   rate("blocks_demand", "blocks_readahead", "blocks_prefetch"), rate("bytes_filled"),
                   rate("evicted"), rate("bytes_written"), rate("errors"), stages)

    @property
    def activity(self) -> float:
        """To compare regions by."""
        return (self.faults or 0) + (self.fills or 0) + (self.evicted or 0)


def _since(before: dict[str, Any] | None, now: dict[str, Any]) -> LatencyHistogram:
    counts = now["counts"]
    if before is not None and len(before["counts"]) == len(counts):
        counts = [max(0, b - a) for a, b in zip(before["counts"], counts, strict=True)]
    return LatencyHistogram(tuple(counts))


def bytes_text(nbytes: float | None) -> str:
    """Decimal units: 1.07 GB."""
    return "-" if nbytes is None else _scaled(nbytes, ("B", "kB", "MB", "GB", "TB", "PB"), " ")


def count_text(count: float | None) -> str:
    """12.3k"""
    return "-" if count is None else _scaled(count, ("", "k", "M", "G"), "")


def time_text(ns: float | None) -> str:
    """Three digits at most: 33 us."""
    return "-" if not ns else _scaled(ns, ("ns", "us", "ms", "s"), " ")


def _scaled(value: float, units: tuple[str, ...], gap: str) -> str:
    for unit in units:
        if value < 999.5 or unit == units[-1]:
            break
        value /= 1000
    digits = 0 if value >= 99.95 or unit == units[0] else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{gap}{unit}"
