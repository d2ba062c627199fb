"""How `uffd top` looks: one frame from an engine's figures, drawn by rich, for any size of terminal."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ._rates import Rates, bytes_text, count_text, time_text

__all__ = ["Watch"]

_HEAD_LINES = 6                     # what stands above the regions, an empty line included
_SHADES = {"unicode": ("·░▒▓█", "▁▂▃▄▅▆▇█", "█░"), "ascii": (".:+%#", "_.-=+*%#", "#.")}
_WIDE_COLUMNS = 110                 # from here on each region has a bar of its own
_NARROW_COLUMNS = 76                # below that, what is left out of:
_COLUMNS = ("size", "resident", "dirty", "faults/s", "fills/s", "evict/s", "p50", "p99")
_LEFT_OUT = ("dirty", "fills/s", "evict/s", "p50")
_PRINTED_REGIONS = 40               # of a frame that is printed, where no screen sets a limit
_PRINTED_MAP_LINES = 8
_FADE = 0.7                         # of a region's activity, from one frame to the next: the map should not jump
_CLEAN, _DIRTY = "green", "yellow"
_SHARES = ("color(22)", "color(28)", "color(34)", "color(40)", "color(46)")      # a cell's colour, by what is resident
_MIXED = "color(148)"               # a cell of which less than half of what is resident is dirty


class Watch:
    """Takes figures as they come, and draws the latest. Not thread-safe."""

    def __init__(self, path: str, console: Console | None = None) -> None:
        self._path = path
        self._console = console or Console(highlight=False)
        unicode = (self._console.encoding or "ascii").lower().startswith("utf")
        self._shades, self._sparks, self._bars = _SHADES["unicode" if unicode else "ascii"]
        self._now: dict[str, Any] = {}
        self._rates = Rates.between(None, {}, 0)
        self._of_region: dict[int, Rates] = {}
        self._activity: dict[int, float] = {}
        self._faults: collections.deque[float] = collections.deque(maxlen=512)
        self._trouble = ""

    def take(self, figures: dict[str, Any]) -> None:
        """The next figures; told twice, the same ones change nothing."""
        before, self._trouble = self._now, ""
        seconds = (figures["monotonic_ns"] - before["monotonic_ns"]) / 1e9 if before else 0.0
        if before and seconds <= 0:
            if figures["pid"] == before["pid"]:
                return
            before = {}                          # another program has taken the path
        self._now = figures
        self._rates = Rates.between(before["engine"]["stats"] if before else None, figures["engine"]["stats"], seconds)
        known = {region["id"]: region["stats"] for region in before.get("regions", ())}
        self._of_region = {region["id"]: Rates.between(known.get(region["id"]), region["stats"], seconds)
                           for region in figures["regions"]}
        self._activity = {number: _FADE * self._activity.get(number, 0.0) + rates.activity
                          for number, rates in self._of_region.items()}
        if self._rates.faults is not None:
            self._faults.append(self._rates.faults)

    def missed(self, why: str) -> None:
        """No figures came; the last ones stay, and it is said."""
        self._trouble = why

    @contextmanager
    def live(self) -> Iterator[Callable[[], None]]:
        """The whole screen, until the context is left: a function that draws the latest."""
        with Live(console=self._console, screen=True, auto_refresh=False) as live:
            yield lambda: live.update(self.frame(self._console.height), refresh=True)

    def print(self) -> None:
        self._console.print(self.frame(None))

    def close(self) -> None:
        self._console.show_cursor(True)

    def frame(self, lines: int | None) -> Group:
        """All of it in that many lines; None: as many as it likes."""
        columns, regions = self._console.width, self._ranked()
        if lines is None:
            shown, map_lines = min(len(regions), _PRINTED_REGIONS), _PRINTED_MAP_LINES
        else:
            left = max(0, lines - _HEAD_LINES - 4)           # the table's head and its "and more", the map's head
            shown = min(len(regions), max(1, left // 2))
            map_lines = left - shown
        parts: list[Any] = [*self._head(columns), Text(), self._table(regions[:shown], columns)]
        if len(regions) > shown:
            parts.append(Text(f"and {len(regions) - shown} more, less busy", style="dim"))
        if not regions:
            parts.append(Text("no region is open", style="dim"))
        elif map_lines > 0:
            parts += [Text(), *self._map(max(regions, key=self._importance), columns, map_lines)]
        return Group(*parts)

    # ---- order ----

    def _importance(self, region: dict[str, Any]) -> tuple[float, int]:
        return self._activity.get(region["id"], 0.0), region["resident_bytes"]

    def _ranked(self) -> list[dict[str, Any]]:
        return sorted(self._now["regions"], key=self._importance, reverse=True)

    # ---- head ----

    def _head(self, columns: int) -> list[Text]:
        engine, regions = self._now["engine"], self._now["regions"]
        errors = engine["stats"]["errors"]
        warning = f"{_plural(errors, 'error')}, " if errors else ""
        about = [f"pid {self._now['pid']}", _plural(engine["workers"], "worker"), _plural(len(regions), "region"),
                 *(["filled whole: no userfaultfd"] if engine["fills_whole"] else []), _clean_text(self._path)]
        title = Text.assemble(("uffd top", "bold"), "  ", (warning, "bold red"), ", ".join(about), no_wrap=True)
        title.truncate(max(10, columns - 10), overflow="ellipsis", pad=True)
        title.append(f"{time.strftime('%H:%M:%S'):>10}", "dim")
        rates = self._rates
        now = _pairs("now", [("faults", _per_s(count_text(rates.faults))),
                             ("filled", _per_s(bytes_text(rates.filled_bytes))),
                             ("evicted", _per_s(count_text(rates.evicted))),
                             ("written", _per_s(bytes_text(rates.written_bytes)))], columns)
        if self._trouble:
            now = Text(f"no news: {_clean_text(self._trouble)}", style="bold red", no_wrap=True, overflow="ellipsis")
        latency = _pairs("p50/p99", [(name, f"{time_text(stage.p50_ns)}/{time_text(stage.p99_ns)}")
                                     for name, stage in rates.stages.items()], columns)
        return [title, self._budget(columns), now, latency, self._history(columns)]

    def _budget(self, columns: int) -> Text:
        """A bar of the budget, of all regions' bytes where there is none: dirty, clean, free."""
        engine = self._now["engine"]
        size = sum(region["nbytes"] for region in self._now["regions"])
        resident, budget = engine["resident_bytes"], engine["budget_bytes"]
        dirty = min(resident, sum(region["dirty_bytes"] for region in self._now["regions"]))
        whole = budget or size
        words = f"{bytes_text(resident)} of {bytes_text(whole)}" + ("" if budget else ", no budget")
        words += f", dirty {bytes_text(dirty)}"
        if engine["pinned_bytes"] is not None:
            words += f", pinned {bytes_text(engine['pinned_bytes'])}"
        room = max(8, columns - 9 - len(words) - 2)
        marks = np.ceil(np.clip([dirty / max(1, whole), resident / max(1, whole)], 0, 1) * room - 1e-9).astype(int)
        full, free = self._bars[0], self._bars[1]
        over = budget is not None and resident > budget
        return Text.assemble((f"{'budget' if budget else 'resident':<9}", "cyan"), (full * marks[0], _DIRTY),
                             (full * (marks[1] - marks[0]), "red" if over else _CLEAN),
                             (free * (room - marks[1]), "dim"), "  ", (words, "bold red" if over else ""),
                             no_wrap=True, overflow="crop")

    def _history(self, columns: int) -> Text:
        """Faults per second, a mark per frame, the newest at the right."""
        words = f"  most {count_text(max(self._faults))}" if self._faults else ""
        room = max(1, columns - 9 - len(words))
        values = np.array([*self._faults][-room:], float)
        levels = np.ceil(values / max(1e-9, values.max(initial=0.0)) * (len(self._sparks) - 1) - 1e-9).astype(int)
        line = "".join(self._sparks[level] for level in levels)
        return Text.assemble(("faults/s ", "cyan"), (f"{line:>{room}}", "blue"), (words, "dim"), no_wrap=True,
                             overflow="crop")

    # ---- regions ----

    def _table(self, regions: list[dict[str, Any]], columns: int) -> Table:
        wide = columns >= _WIDE_COLUMNS
        table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="bold")
        table.add_column("region", no_wrap=True, overflow="ellipsis", ratio=1, min_width=8)
        if wide:
            table.add_column("where it is resident", no_wrap=True, width=max(20, columns // 4))
            table.add_column("mode", no_wrap=True)
        shown = [name for name in _COLUMNS if columns >= _NARROW_COLUMNS or name not in _LEFT_OUT]
        for name in shown:
            table.add_column(name, justify="right", no_wrap=True)
        for region in regions:
            rates = self._of_region[region["id"]]
            fill = rates.stages["fill"]
            row: list[Any] = [_clean_text(region["name"])]
            if wide:
                row += [self._shaded(region, max(20, columns // 4), 1)[0], f"{region['mode']} {region['delivery']}"]
            values = dict(zip(_COLUMNS, (
                bytes_text(region["nbytes"]), bytes_text(region["resident_bytes"]), bytes_text(region["dirty_bytes"]),
                count_text(rates.faults), count_text(rates.fills), count_text(rates.evicted), time_text(fill.p50_ns),
                time_text(fill.p99_ns)), strict=True))
            table.add_row(*row, *(values[name] for name in shown))
        return table

    def _map(self, region: dict[str, Any], columns: int, lines: int) -> list[Text]:
        cells = len(region["map"]["resident"])
        drawn = self._shaded(region, columns, lines)
        share = 100 * region["resident_bytes"] / max(1, region["nbytes"])
        each = max(1, -(-cells // (columns * lines))) * region["map"]["blocks_per_cell"] * region["block_bytes"]
        scale = f", {bytes_text(min(each, region['nbytes']))} a cell"
        title = Text.assemble((_clean_text(region["name"]), "bold"), f"  {share:.1f} % resident{scale}  ",
                              (f"{self._shades[0]} none ", "dim"), (f"{self._shades[1:]} resident ", _CLEAN),
                              (f"{self._shades[-1]} dirty", _DIRTY), no_wrap=True, overflow="ellipsis")
        return [title, *drawn]

    def _shaded(self, region: dict[str, Any], columns: int, lines: int) -> list[Text]:
        """The map in at most that many lines: a character per group of cells, in reading order."""
        resident, dirty = (np.array(region["map"][kind], float) for kind in ("resident", "dirty"))
        room = columns * lines
        if len(resident) > room:
            resident, dirty = _fewer(resident, room), _fewer(dirty, room)
        elif len(resident):
            wider = columns // len(resident)                 # a small region fills one line all the same
            resident, dirty = np.repeat(resident, max(1, wider)), np.repeat(dirty, max(1, wider))
        levels, styles = self._levels(resident), _styles(resident, dirty)
        drawn = []
        for start in range(0, len(levels), columns):
            line = Text(no_wrap=True)
            for level, style in zip(levels[start:start + columns], styles[start:start + columns], strict=True):
                line.append(self._shades[level], style)
            drawn.append(line)
        return drawn or [Text()]

    def _levels(self, resident: np.ndarray) -> list[int]:
        """Which shade: blank for none only, the darkest for all only, so that a single block is seen either way."""
        last = len(self._shades) - 1
        some = np.clip(1 + np.floor(resident * (last - 1)), 1, last - 1)
        return np.where(resident <= 0, 0, np.where(resident >= 1, last, some)).astype(int).tolist()


def _styles(resident: np.ndarray, dirty: np.ndarray) -> list[str]:
    shares = np.minimum((resident * len(_SHARES)).astype(int), len(_SHARES) - 1)
    return [("dim" if not there else _DIRTY if 2 * written >= there else _MIXED if written else _SHARES[share])
            for there, written, share in zip(resident, dirty, shares, strict=True)]


def _fewer(cells: np.ndarray, n: int) -> np.ndarray:
    """Means over groups of equally many cells, n groups at most; no cell is in two, so none is shown twice."""
    starts = np.arange(0, len(cells), -(-len(cells) // n))
    return np.add.reduceat(cells, starts) / np.diff(np.append(starts, len(cells)))


def _pairs(name: str, pairs: list[tuple[str, str]], columns: int) -> Text:
    """Names and values in a line, as far apart as there is room."""
    gap = "   " if columns >= _WIDE_COLUMNS else "  "
    text = Text.assemble((f"{name:<9}", "cyan"), no_wrap=True, overflow="crop")
    for key, value in pairs:
        text.append(f"{key} ", "dim").append(value).append(gap)
    return text


def _per_s(text: str) -> str:
    return text if text == "-" else f"{text}/s"


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _clean_text(text: str) -> str:
    """Names come from somebody else's program: nothing in them may speak to the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
