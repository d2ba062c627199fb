"""What an engine tells about itself, at one moment: as plain data for JSON, and as Prometheus text.

Nothing here touches a managed page or stops a worker. It runs with the interpreter lock in some thread of the program,
so what it costs is bounded: the maps of all regions together, and how often it is done (`Figures`).
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ._coreless import core as _core
from ._rates import FORMAT
from .errors import RegionClosed
from .stats import LatencyHistogram, Stats

if TYPE_CHECKING:
    from .engine import Engine
    from .region import Region

prometheus: Any = None
try:                                # now, and not when it is asked for: a fork in the middle of a thread's import would
    for _name in ("core", "exposition"):         # leave the child with modules that it can never import
        importlib.import_module(f"prometheus_client.{_name}")
    prometheus = importlib.import_module("prometheus_client")
except ImportError:
    pass

__all__ = ["Figures"]

MAX_CELLS = 1 << 12                 # of one region's map
_ALL_CELLS = 1 << 14                # of all maps together: regions may be thousands
_MIN_CELLS = 16                     # of one, all the same
_LEAST = 1e-4                       # a cell's fraction has four digits, and one block in a large cell must be seen
_FRESH_S = 0.1                      # figures are told again for that long,
_PAUSE = 4                          # or for so many times of what they took: at most a fifth of a CPU goes into them


class Figures:
    """The figures of one engine; gathered and written out by one thread at a time, and told again while fresh."""

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._lock = threading.Lock()
        self._numbers: weakref.WeakKeyDictionary[Region, int] = weakref.WeakKeyDictionary()
        self._next = itertools.count(1)
        self._fresh_until_s = 0.0
        self._told: dict[str, Any] = {}
        self._written: dict[str, bytes] = {}     # by content type

    def as_json(self) -> tuple[bytes, str]:
        """(body, content type), as docs/seeing.md has it. ReferenceError when the engine is gone."""
        return self._tell("application/json", _json)

    def as_prometheus(self, accept: str) -> tuple[bytes, str]:
        """The same for a scraper that accepts that. ImportError, with the cure, without prometheus-client."""
        if prometheus is None:
            raise ImportError('/metrics needs prometheus-client: pip install "pyuffd[prometheus]"')
        encode, content_type = prometheus.exposition.choose_encoder(accept)
        return self._tell(content_type, lambda told: encode(_registry(told)))

    def _tell(self, content_type: str, encode: Callable[[dict[str, Any]], bytes]) -> tuple[bytes, str]:
        with self._lock:
            began_s = time.monotonic()
            if began_s >= self._fresh_until_s:
                self._told, self._written = self._gather(), {}
                self._fresh_until_s = time.monotonic() + _FRESH_S
            if content_type not in self._written:
                self._written[content_type] = encode(self._told)
                now_s = time.monotonic()
                self._fresh_until_s = max(self._fresh_until_s, now_s + _PAUSE * (now_s - began_s))
            return self._written[content_type], content_type

    def _gather(self) -> dict[str, Any]:
        engine = self._engine()
        if engine is None:
            raise ReferenceError("the engine is gone")
        opened = list(engine.regions)
        for region in opened:
            if region not in self._numbers:
                self._numbers[region] = next(self._next)
        limit = min(MAX_CELLS, max(_MIN_CELLS, _ALL_CELLS // max(1, len(opened))))
        regions = [told for region in opened if (told := _region(region, self._numbers[region], limit)) is not None]
        regions.sort(key=lambda told: told["id"])
        return {"format": FORMAT, "pid": os.getpid(), "monotonic_ns": time.monotonic_ns(),
                "engine": {"closed": engine.closed, "workers": engine.workers, "fills_whole": engine.fills_whole,
                           **_room(engine, regions), "stats": engine.stats().as_dict()},
                "regions": regions}


def _json(figures: dict[str, Any]) -> bytes:
    """Region by region: the encoder keeps the interpreter lock for as long as one call of it takes."""
    head = json.dumps({key: value for key, value in figures.items() if key != "regions"})
    regions = ", ".join(json.dumps(region) for region in figures["regions"])
    return f'{head[:-1]}, "regions": [{regions}]}}\n'.encode()


def _room(engine: Any, regions: Iterable[dict[str, Any]]) -> dict[str, Any]:
    resident = getattr(engine, "resident_bytes", None)
    threads = None if engine.fills_whole else engine._threads
    return {"budget_bytes": getattr(engine, "budget_bytes", None),
            "resident_bytes": sum(region["resident_bytes"] for region in regions) if resident is None else resident,
            "pinned_bytes": None if threads is None else _core.budget(threads)[2]}


def _region(region: Region, number: int, limit: int) -> dict[str, Any] | None:
    """None: another thread closed it meanwhile."""
    try:
        resident, dirty, stats = region.resident(), region.dirty(), region.stats()
    except (RegionClosed, ValueError):
        if region.closed:
            return None
        raise
    per_cell = max(1, -(-len(resident) // limit))
    return {
        "id": number, "name": _printable(region.name), "nbytes": region.nbytes, "block_bytes": region.block_bytes,
        "mode": region.mode, "delivery": region.delivery, "backing": region.backing, "blocks": len(resident),
        "resident_blocks": int(np.count_nonzero(resident)), "resident_bytes": _bytes_of(resident, region),
        "dirty_blocks": int(np.count_nonzero(dirty)), "dirty_bytes": _bytes_of(dirty, region),
        "stats": stats.as_dict(),
        "map": {"blocks_per_cell": per_cell, "resident": _fractions(resident, per_cell),
                "dirty": _fractions(dirty, per_cell)}}


def _printable(name: str) -> str:
    """A file's name may have bytes that are no text, which JSON would carry and Prometheus refuse."""
    return name.encode("utf-8", "backslashreplace").decode()


def _bytes_of(blocks: np.ndarray, region: Any) -> int:
    """The last block may be a shorter one."""
    nbytes = int(np.count_nonzero(blocks)) * region.block_bytes
    return nbytes - (len(blocks) * region.block_bytes - region.nbytes if len(blocks) and blocks[-1] else 0)


def _fractions(blocks: np.ndarray, per_cell: int) -> list[float]:
    """Of each cell, which share of its blocks: 0 only for none, 1 only for all."""
    if not len(blocks):
        return []
    starts = np.arange(0, len(blocks), per_cell)
    sizes = np.minimum(per_cell, len(blocks) - starts)
    counts = np.add.reduceat(blocks, starts, dtype=np.int64)
    shares = np.clip(np.round(counts / sizes, 4), _LEAST, 1 - _LEAST)
    return np.where(counts == 0, 0.0, np.where(counts == sizes, 1.0, shares)).tolist()


# ---- Prometheus -------------------------------------------------------------------------------------------------


def _registry(figures: dict[str, Any]) -> Any:
    registry = prometheus.CollectorRegistry(auto_describe=False)
    registry.register(_Collector(figures))
    return registry


class _Collector:
    """Figures as metric families: bytes and seconds, as Prometheus has it. Regions of one name are told as one."""

    def __init__(self, figures: dict[str, Any]) -> None:
        self._engine = figures["engine"]
        self._regions = figures["regions"]

    def describe(self) -> list[Any]:
        return []                   # nothing else is in this registry that it could clash with

    def collect(self) -> Iterator[Any]:
        gauge, counter = prometheus.core.GaugeMetricFamily, prometheus.core.CounterMetricFamily
        for name, about in (("budget_bytes", "bytes that may be resident"), ("pinned_bytes", "bytes that are pinned"),
                            ("resident_bytes", "bytes that are in memory"), ("workers", "threads that serve faults")):
            if self._engine[name] is not None:
                yield gauge(f"uffd_{name}", f"The engine's {about}", self._engine[name])
        yield gauge("uffd_regions", "Regions that are open", len(self._regions))
        stats = self._engine["stats"]
        for name in counters():
            yield counter(f"uffd_{name}", f"Stats.{name}, closed regions included", stats[name])
        stages = prometheus.core.HistogramMetricFamily("uffd_stage_seconds", "Latencies of a fault's stages",
                                                       labels=["stage"])
        for name in histograms():
            stages.add_metric([name], _buckets(stats[name]["counts"]), None)
        yield stages
        for name, key, about in (("size", "nbytes", "size"), ("resident", "resident_bytes", "bytes in memory"),
                                 ("dirty", "dirty_bytes", "bytes in blocks that were written")):
            yield self._by_name(gauge, f"uffd_region_{name}_bytes", f"A region's {about}",
                                lambda region, key=key: region[key])
        for name in counters():
            yield self._by_name(counter, f"uffd_region_{name}", f"Stats.{name} of a region",
                                lambda region, name=name: region["stats"][name])

    def _by_name(self, family: Any, name: str, about: str, of: Callable[..., int]) -> Any:
        """Two samples of the same labels are no valid answer, and names need not be unique: their sum."""
        sums: dict[str, int] = {}
        for region in self._regions:
            sums[region["name"]] = sums.get(region["name"], 0) + of(region)
        made = family(name, about, labels=["region"])
        for region_name, value in sums.items():
            made.add_metric([region_name], value)
        return made


def counters() -> list[str]:
    """The names of all of Stats' plain numbers."""
    return [name for name, value in vars(Stats()).items() if not isinstance(value, LatencyHistogram)]


def histograms() -> list[str]:
    return [name for name, value in vars(Stats()).items() if isinstance(value, LatencyHistogram)]


def _buckets(counts: list[int]) -> list[tuple[str, int]]:
    """Cumulative, by upper bounds in seconds; the last of ours has none."""
    bounds = [repr(2.0 ** (k + 1) / 1e9) for k in range(len(counts) - 1)]
    return list(zip([*bounds, "+Inf"], np.cumsum([*counts, 0][:max(1, len(counts))]).tolist(), strict=True))
