"""Counters and latencies of a region or an engine, as plain numbers at one moment."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ._coreless import core as _core

__all__ = ["LatencyHistogram", "Stats"]


@dataclass(frozen=True)
class LatencyHistogram:
    """How long one stage took. counts[k]: how many took 2**k to 2**(k+1) ns (the last: that or longer)."""

    counts: tuple[int, ...]

    @property
    def n(self) -> int:
        return sum(self.counts)

    def quantile_ns(self, q: float) -> float:
        """The q-quantile in ns, by linear interpolation in its bucket; 0.0 when nothing was measured."""
        left = q * self.n
        if not left:
            return 0.0
        for k, count in enumerate(self.counts):
            if count and left <= count:
                return 2.0**k * (1 + left / count)
            left -= count
        return 2.0 ** len(self.counts)

    @property
    def p50_ns(self) -> float:
        return self.quantile_ns(0.5)

    @property
    def p99_ns(self) -> float:
        return self.quantile_ns(0.99)


@dataclass(frozen=True)
class Stats:
    """What happened since the region was made (an engine: since it was made, regions that are closed included).

    faults_read, faults_write, faults_wp: faults by kind, wp being the first write to a block that was filled for a
    read. blocks_demand, blocks_readahead, blocks_prefetch: blocks filled because of a touch, of a pattern, of prefetch
    or populate. bytes_filled: the user's bytes in them. duplicates: faults that needed no fill of their own. retries,
    errors: tries after the first, and tries that failed. poisoned: blocks given up at a touch. readahead_wasted: blocks
    read ahead of a pattern that ended before them (an estimate: the kernel does not say which pages were read).
    repaired: blocks of which the program had dropped pages. evicted: blocks that left memory. rescued: blocks that were
    touched while they waited, moved out but still in memory, for their second chance. written_back, bytes_written:
    blocks whose bytes a provider or a spill file took, and the user's bytes in them. write_errors: writes that failed.
    bytes_stored: what those bytes took in their store: pages of the spill file where it is compressed, else as many.
    evict_waits: touches that found no room and had to wait for an eviction. evict_busy: blocks that could not be moved
    out (a device has them). recycled: blocks filled into the pages of others that had left. queue, fill, resolve,
    write: latencies from reading the fault to the begin of its fill, of the provider, of putting the pages in place, of
    writing back.
    """

    faults_read: int = 0
    faults_write: int = 0
    faults_wp: int = 0
    blocks_demand: int = 0
    blocks_readahead: int = 0
    blocks_prefetch: int = 0
    bytes_filled: int = 0
    duplicates: int = 0
    retries: int = 0
    errors: int = 0
    poisoned: int = 0
    readahead_wasted: int = 0
    repaired: int = 0
    evicted: int = 0
    rescued: int = 0
    written_back: int = 0
    bytes_written: int = 0
    write_errors: int = 0
    evict_waits: int = 0
    evict_busy: int = 0
    recycled: int = 0
    bytes_stored: int = 0
    queue: LatencyHistogram = field(default_factory=lambda: LatencyHistogram(()))
    fill: LatencyHistogram = field(default_factory=lambda: LatencyHistogram(()))
    resolve: LatencyHistogram = field(default_factory=lambda: LatencyHistogram(()))
    write: LatencyHistogram = field(default_factory=lambda: LatencyHistogram(()))

    @classmethod
    def of(cls, counts: tuple[list[int], list[list[int]]]) -> Stats:
        numbers, stages = counts
        named: dict[str, Any] = dict(zip(_core.COUNTER_NAMES, numbers, strict=True))
        for name, buckets in zip(_core.STAGE_NAMES, stages, strict=True):
            named[name] = LatencyHistogram(tuple(buckets))
        return cls(**named)

    def __add__(self, other: Stats) -> Stats:
        total: dict[str, Any] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, LatencyHistogram):
                longer, shorter = sorted((mine.counts, theirs.counts), key=len, reverse=True)
                padded = shorter + (0,) * (len(longer) - len(shorter))
                total[item.name] = LatencyHistogram(tuple(a + b for a, b in zip(longer, padded, strict=True)))
            else:
                total[item.name] = mine + theirs
        return Stats(**total)

    def as_dict(self) -> dict[str, Any]:
        """All of it as numbers and lists; the histograms with n, p50_ns and p99_ns beside their counts."""
        out = asdict(self)
        for name in _core.STAGE_NAMES:
            histogram = getattr(self, name)
            out[name] = {"counts": list(histogram.counts), "n": histogram.n, "p50_ns": histogram.p50_ns,
                         "p99_ns": histogram.p99_ns}
        return out
