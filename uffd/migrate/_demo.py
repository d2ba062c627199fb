"""`uffd migrate demo`: memory moves to another process while a program writes to it, faster than it is sent; what was
written is checked there, and the program's speed is drawn, before, during and after.

The program adds one to every number of one block after the other, in random order. So the numbers of a block are equal,
but for the one that was being written when the source was stopped, and what the blocks hold in all is how often the
program wrote, here and there together.

Beside it (`--compare`) what others do: stop the program, copy all, and start it there; or copy while it runs, a few
times, then stop it and copy what it had written meanwhile. Against that: hand it over at once, and copy afterwards.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import uffd

from ..stats import LatencyHistogram
from ._incoming import listen
from ._outgoing import connect
from ._report import Report, plot

_BLOCK_BYTES = 65536
_WINDOW_S = 0.02                    # of the program's speed: one point
_DEADLINE_S = 120.0
_ROUNDS = 3                         # of precopy, to a program that writes faster than is sent
_WAYS = {"stop-and-copy": "#b03a2e", "precopy": "#7d6608", "postcopy": "#1f618d"}      # and their colours
_FULL_SPEED = 0.9                   # of what the program has in the end


class Writer:
    """The program: writes until it is told to end, or until its memory is another process's."""

    def __init__(self, memory: np.ndarray, seed: int) -> None:
        self._blocks = memory.reshape(-1, _BLOCK_BYTES // 8)
        self._order = np.random.default_rng(seed).integers(0, len(self._blocks), 1 << 16).tolist()
        self.written, self.last_s, self.ending = 0, 0.0, False
        self.points: list[tuple[float, int]] = []              # (time.monotonic, written by then)
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        one, next_s = np.int64(1), 0.0
        while not self.ending:
            block = self._blocks[self._order[self.written % len(self._order)]]
            np.add(block, one, out=block)        # without the interpreter lock: it may wait in here for ever
            self.written += 1
            self.last_s = now_s = time.monotonic()
            if now_s >= next_s:
                self.points.append((now_s, self.written))
                next_s = now_s + _WINDOW_S

    def end(self) -> None:
        self.ending = True
        self._thread.join(10)


def main(nbytes: int, bytes_per_s: float, seconds: float, png: Path | None, as_json: bool, compare: bool) -> int:
    """Runs both processes; 0, or 1 if what arrived is not what was written."""
    warnings.simplefilter("ignore", uffd.DegradedWarning)       # no system call touches this memory
    nbytes = max(1, nbytes // _BLOCK_BYTES) * _BLOCK_BYTES
    if compare:
        return _compare(nbytes, bytes_per_s, seconds, png, as_json)
    report, result = _moved(nbytes, bytes_per_s, seconds, "")
    if png is not None:
        plot(report, png)
        result["png"] = str(png)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(report, result, nbytes, bytes_per_s)
    return 0 if result["right"] else 1


def _compare(nbytes: int, bytes_per_s: float, seconds: float, png: Path | None, as_json: bool) -> int:
    """The same memory moved in each of the ways, one after the other."""
    runs = {way: _moved(nbytes, bytes_per_s, seconds, way) for way in _WAYS}
    if png is not None:
        _draw(runs, png)
    if as_json:
        print(json.dumps({way: result for way, (_, result) in runs.items()}, indent=2))
        return 0 if all(result["right"] for _, result in runs.values()) else 1
    print(f"{nbytes >> 20} MiB, moved by TCP on loopback, while a program writes to all of it")
    print(f"  {'way':<14}  {'stands still':>12}  {'at full speed after':>19}  {'all is there after':>18}  {'sent':>9}")
    for way, (report, result) in runs.items():
        print(f"  {way:<14}  {result['still_s'] * 1e3:>9,.1f} ms  {result['full_speed_s'] * 1e3:>16,.1f} ms"
              f"  {report.total_s * 1e3:>15,.1f} ms  {report.bytes_copied / 1e6:>6,.0f} MB"
              f"{'' if result['right'] else '  WRONG'}")
    print(f"at full speed: {_FULL_SPEED:.0%} of what the program has in the end, from its last write here on"
          f"{f'; picture: {png}' if png is not None else ''}")
    return 0 if all(result["right"] for _, result in runs.values()) else 1


def _draw(runs: dict[str, tuple[Report, dict[str, Any]]], png: Path) -> None:
    """The program's speed over the time from its last write at the source, one line for each way."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture is drawn with matplotlib: pip install 'pyuffd[plot]', or --no-png") from error
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for way, (report, result) in runs.items():
        points = [(at_s - result["stopped_s"], rate / 1e9) for at_s, rate in report.program]
        axes.plot(*zip(*points, strict=True), color=_WAYS[way], lw=1.2,
                  label=f"{way}: stands still for {result['still_s'] * 1e3:,.0f} ms")
    axes.set_xlabel("seconds from the program's last write at the source", fontsize=8)
    axes.set_ylabel("the program's own work, GB/s", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    figure.savefig(png)


def _moved(nbytes: int, bytes_per_s: float, seconds: float, way: str) -> tuple[Report, dict[str, Any]]:
    """One migration: the source's report, with what was measured at the destination, and what the demo tells."""
    key = secrets.token_hex(16)
    with subprocess.Popen([sys.executable, "-P", "-m", "uffd.migrate._demo"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as there:
        try:
            report, told, begun_s, points = _move(there, key, nbytes, bytes_per_s, seconds, way)
        except BaseException:
            there.kill()
            raise
    program = _speeds([*points, None, *(tuple(point) for point in told["points"])], begun_s)
    waited = told["report"]["requests"]          # measured there
    report = replace(report, program=tuple(program), requests=LatencyHistogram(tuple(waited["counts"])),
                     requests_max_ns=waited["max_ns"], blocked_s=told["report"]["blocked_s"])
    right = told["mixed"] <= 1 and abs(told["sum"] - told["written"] - points[-1][1]) <= 1
    stopped_s = points[-1][0] - begun_s
    return report, {"right": right, "blocks": nbytes // _BLOCK_BYTES, "written_here": points[-1][1],
                    "written_there": told["written"], "stopped_s": stopped_s,
                    "still_s": told["points"][0][0] - points[-1][0], "full_speed_s": _full_speed_s(program, stopped_s),
                    "source": report.as_dict(), "destination": told["report"]}


def _full_speed_s(program: list[tuple[float, float]], stopped_s: float) -> float:
    """From the program's last write at the source until it is, for five points together, as fast as it gets."""
    there = [(at_s, rate) for at_s, rate in program if at_s > stopped_s and rate]
    usual = sorted(rate for _, rate in there[len(there) // 2:])
    for k, (at_s, _) in enumerate(there):
        some = [rate for _, rate in there[k:k + 5]]
        if sum(some) / len(some) >= _FULL_SPEED * usual[len(usual) // 2]:
            return at_s - stopped_s
    return there[-1][0] - stopped_s if there else 0.0


def _move(there: Any, key: str, nbytes: int, bytes_per_s: float, seconds: float,
          way: str) -> tuple[Report, dict[str, Any], float, list[tuple[float, int]]]:
    _say(there.stdin, key=key, seconds=seconds)
    memory = uffd.zeros(nbytes // 8, np.int64, block_bytes=_BLOCK_BYTES)
    memory[:] = 0                                # all of it is there
    writer = Writer(memory, 1)
    url = _heard(there.stdout)["url"]
    time.sleep(seconds)
    begun_s = time.monotonic()
    with connect(url, {"memory": memory}, key=key, precopy_bytes_per_s=bytes_per_s or None,
                 postcopy_bytes_per_s=bytes_per_s or None) as outgoing:
        if way not in ("stop-and-copy", "postcopy"):
            outgoing.precopy(rounds=_ROUNDS)
        if way in ("stop-and-copy", "precopy"):
            writer.end()                         # it stands still until all is there
            outgoing.precopy(rounds=1)
        outgoing.switchover()                    # the writer waits in its next write, for ever: it goes on there
        report = outgoing.wait(_DEADLINE_S)
        told = _heard(there.stdout)
    return report, told, begun_s, [*writer.points, (writer.last_s, writer.written)]


def _there() -> None:
    """The destination, a process of its own; told by stdin, tells by stdout."""
    warnings.simplefilter("ignore", uffd.DegradedWarning)
    asked = _heard(sys.stdin)
    with listen("tcp://127.0.0.1:0", key=asked["key"]) as incoming:
        _say(sys.stdout, url=incoming.url)
        with incoming.accept(_DEADLINE_S) as arrival:
            memory = arrival.arrays["memory"]
            writer = Writer(memory, 2)           # at once, whatever has come by now
            report = arrival.wait(_DEADLINE_S)
            time.sleep(asked["seconds"])
            writer.end()
            blocks = memory.reshape(-1, _BLOCK_BYTES // 8)
            least, most = blocks.min(axis=1), blocks.max(axis=1)
            _say(sys.stdout, points=writer.points, written=writer.written, sum=int(most.sum()),
                 mixed=int((least != most).sum()), report=report.as_dict())
    sys.stdout.flush()
    os._exit(0)


def _speeds(points: list[Any], begun_s: float) -> list[tuple[float, float]]:
    """Bytes per second between two points, at the later one's time since begun_s. None parts the two processes: between
    them nothing was written, and where both counts begin is another matter."""
    found: list[tuple[float, float]] = []
    last = None
    for point in points:
        if point is None:
            if last is not None:
                found.append((last[0] - begun_s, 0.0))
        elif last is not None and point[0] > last[0]:
            found.append((point[0] - begun_s, (point[1] - last[1]) * _BLOCK_BYTES / (point[0] - last[0])))
        elif last is None and found:
            found.append((point[0] - begun_s, 0.0))
        last = point
    return found


def _print(report: Report, result: dict[str, Any], nbytes: int, bytes_per_s: float) -> None:
    mean = _mean_of(report.program)
    ends_s = report.total_s
    print(f"{nbytes >> 20} MiB, all of it there, moved by TCP on loopback"
          f"{f' at {bytes_per_s / 1e6:,.0f} MB/s at most' if bytes_per_s else ''}, while a program wrote to all of it")
    print(report)
    print(f"  the program {mean(-1e9, 0) / 1e9:.2f} GB/s before, {mean(0, ends_s) / 1e9:.2f} during, "
          f"{mean(ends_s, 1e9) / 1e9:.2f} after")
    if "png" in result:
        print(f"  picture     {result['png']}")
    print(f"{'right' if result['right'] else 'WRONG'}: {result['blocks']:,} blocks, written to "
          f"{result['written_here']:,} times here and {result['written_there']:,} times there")


def _mean_of(program: tuple[tuple[float, float], ...]) -> Callable[[float, float], float]:
    def mean(start_s: float, end_s: float) -> float:
        within = [rate for at_s, rate in program if start_s <= at_s < end_s]
        return sum(within) / len(within) if within else 0.0
    return mean


def _say(stream: Any, **what: Any) -> None:
    stream.write(json.dumps(what) + "\n")
    stream.flush()


def _heard(stream: Any) -> dict[str, Any]:
    line = stream.readline()
    if not line:
        raise OSError("the other process of the demo ended; what it said is above")
    return json.loads(line)


if __name__ == "__main__":
    _there()
