"""What every part of the demo prints with: lines, a table of steps, a residency bar, a bar for long steps.

On a terminal the bars move; elsewhere each step leaves plain lines and no control characters.
"""

import sys
import time
from contextlib import contextmanager

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.text import Text

WIDTH_COLUMNS = 80
_REDRAW_S = 0.02
_SHADES = {"unicode": " ░▒▓█", "ascii": " .:+#"}


def human_bytes(nbytes: float) -> str:
    """Decimal units, as disks are sold: 90.9 MB."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        nbytes /= 1000
        if nbytes < 999.5 or unit == "GB":
            break
    return f"{nbytes:.2f} {unit}" if nbytes < 10 else f"{nbytes:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds * 1e6:.0f} us"


def shade_bar(resident: np.ndarray, weights: np.ndarray, columns: int, shades: str) -> str:
    """One character per equal share of the bytes: blank for nothing resident, the darkest for all of it.

    A share with a single resident block gets the lightest shade rather than a blank: a fill must be seen.
    """
    edges = np.concatenate(([0], np.cumsum(weights)))
    filled = np.concatenate(([0], np.cumsum(np.where(resident, weights, 0))))
    marks = np.linspace(0, edges[-1], columns + 1)
    parts = np.diff(np.interp(marks, edges, filled)) / np.maximum(np.diff(marks), 1e-9)
    levels = np.where(parts > 1e-9, np.clip(np.floor(parts * (len(shades) - 1) + 1e-6), 1, None), 0).astype(int)
    return "".join(shades[level] for level in levels)


class Screen:
    """Prints the demo's lines. quiet=True prints nothing (for --json)."""

    def __init__(self, *, quiet=False, stream=None):
        self._stream = stream or sys.stdout
        terminal = self._stream.isatty()
        # A fixed width where there is no terminal: a log must not depend on the shell that wrote it.
        self.console = Console(file=self._stream, quiet=quiet, highlight=False, soft_wrap=not terminal,
                               width=None if terminal else WIDTH_COLUMNS, no_color=not terminal)
        self.moving = terminal and self.console.is_terminal and not quiet
        self.columns = min(self.console.width, 100)
        encoding = (getattr(self._stream, "encoding", None) or "ascii").lower()
        self.shades = _SHADES["unicode" if encoding.startswith("utf") else "ascii"]

    def line(self, text="", style=None):
        self.console.print(Text(text, style=style or ""), soft_wrap=True)

    def head(self, title, right=""):
        self.line(f"{title}{right:>{max(self.columns - len(title), len(right) + 1)}}", "bold")

    def pair(self, name, text, style=None):
        """One fact: a name in the left column, what is to be said of it beside."""
        self.console.print(Text.assemble((f"{name:<9}", "cyan"), (text, style or "")), soft_wrap=True)

    def residency(self, resident, weights) -> str:
        total_bytes = int(weights.sum())
        share = f"{100 * int(weights[resident].sum()) / max(total_bytes, 1):5.1f} %"
        bar = shade_bar(resident, weights, self.columns - len(share) - 12, self.shades)
        return f"resident |{bar}| {share}"

    @contextmanager
    def bar(self, name):
        """A bar for a step: yields update(done, total, residency=None, note=""). It is gone when the step ends."""
        if not self.moving:
            yield lambda done, total, residency=None, note="": None
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            last_s = 0.0

            def update(done, total, residency=None, note=""):
                nonlocal last_s
                now_s = time.monotonic()
                if now_s - last_s < _REDRAW_S and done < total:
                    return
                last_s = now_s
                rows = [Text(f"{name}  {100 * done / max(total, 1):3.0f} %  {note}", no_wrap=True, overflow="ellipsis"),
                        # Padding ends the line, which a bar by itself does not.
                        Padding(ProgressBar(total=max(total, 1), completed=done, width=self.columns - 2), 0)]
                if residency is not None:
                    rows.append(Text(self.residency(*residency()), style="green"))
                live.update(Group(*rows), refresh=True)

            yield update


class StepTable:
    """The table of steps: what each touched and filled, how fast, and whether the bits are the eager file's."""

    _ROW = "{:<22}{:>10}{:>10}{:>8}{:>10}{:>12}{:>7}"

    def __init__(self, screen):
        self._screen = screen

    def header(self):
        self._screen.line(self._ROW.format("step", "touched", "filled", "blocks", "time", "fill rate", "bits"),
                          "bold")

    def row(self, step):
        rate = human_bytes(step["filled_bytes"] / step["seconds"]) + "/s" if step["filled_bytes"] else "-"
        bits = {None: "-", True: "same", False: "DIFFER"}[step["same_bits"]]
        self._screen.line(self._ROW.format(step["name"], human_bytes(step["touched_bytes"]),
                                           human_bytes(step["filled_bytes"]), step["filled_blocks"],
                                           human_seconds(step["seconds"]), rate, bits),
                          "bold red" if step["same_bits"] is False else None)
