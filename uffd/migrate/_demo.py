"""`uffd migrate demo`: memory moves to another process while a program writes to it, faster than it is sent; what was
written is checked there, and the program's speed is drawn, before, during and after.

The program adds one to every number of one block after the other, in random order. So the numbers of a block are equal,
but for the one that was being written when the source was stopped, and what the blocks hold in all is how often the
program wrote, here and there together.
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


class Writer:
    """The program: writes until it is told to end, or until its memory is another process's."""

    def __init__(self, memory: np.ndarray, seed: int) -> None:
        self._blocks = memory.reshape(-1, _BLOCK_BYTES // 8)
        self._order = np.random.default_rng(seed).integers(0, len(self._blocks), 1 << 16).tolist()
        self.written, self.ending = 0, False
        self.points: list[tuple[float, int]] = []              # (time.monotonic, written by then)
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        one, next_s = np.int64(1), 0.0
        while not self.ending:
            block = self._blocks[self._order[self.written % len(self._order)]]
            np.add(block, one, out=block)        # without the interpreter lock: it may wait in here for ever
            self.written += 1
            now_s = time.monotonic()
            if now_s >= next_s:
                self.points.append((now_s, self.written))
                next_s = now_s + _WINDOW_S

    def end(self) -> None:
        self.ending = True
        self._thread.join(10)


def main(nbytes: int, bytes_per_s: float, seconds: float, png: Path | None, as_json: bool) -> int:
    """Runs both processes; 0, or 1 if what arrived is not what was written."""
    warnings.simplefilter("ignore", uffd.DegradedWarning)       # no system call touches this memory
    nbytes = max(1, nbytes // _BLOCK_BYTES) * _BLOCK_BYTES
    key = secrets.token_hex(16)
    with subprocess.Popen([sys.executable, "-P", "-m", "uffd.migrate._demo"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as there:
        try:
            report, told, begun_s, points = _move(there, key, nbytes, bytes_per_s, seconds)
        except BaseException:
            there.kill()
            raise
    program = _speeds([*points, None, *(tuple(point) for point in told["points"])], begun_s)
    waited = told["report"]["requests"]          # measured there
    report = replace(report, program=tuple(program), requests=LatencyHistogram(tuple(waited["counts"])),
                     requests_max_ns=waited["max_ns"], blocked_s=told["report"]["blocked_s"])
    right = told["mixed"] <= 1 and abs(told["sum"] - told["written"] - points[-1][1]) <= 1
    result = {"right": right, "blocks": nbytes // _BLOCK_BYTES, "written_here": points[-1][1],
              "written_there": told["written"], "source": report.as_dict(), "destination": told["report"]}
    if png is not None:
        plot(report, png)
        result["png"] = str(png)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(report, result, nbytes, bytes_per_s)
    return 0 if right else 1


def _move(there: Any, key: str, nbytes: int, bytes_per_s: float,
          seconds: float) -> tuple[Report, dict[str, Any], float, list[tuple[float, int]]]:
    _say(there.stdin, key=key, seconds=seconds)
    memory = uffd.zeros(nbytes // 8, np.int64, block_bytes=_BLOCK_BYTES)
    memory[:] = 0                                # all of it is there
    writer = Writer(memory, 1)
    url = _heard(there.stdout)["url"]
    time.sleep(seconds)
    begun_s = time.monotonic()
    with connect(url, {"memory": memory}, key=key, precopy_bytes_per_s=bytes_per_s or None,
                 postcopy_bytes_per_s=bytes_per_s or None) as outgoing:
        outgoing.precopy(rounds=3)
        outgoing.switchover()                    # the writer waits in its next write, for ever: it goes on there
        report = outgoing.wait(_DEADLINE_S)
        told = _heard(there.stdout)
    return report, told, begun_s, [*writer.points, (writer.points[-1][0], writer.written)]


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
