"""Part four: a program that counts up through all of a model's bytes, piece by piece, and keeps an image of them three
ways: np.save, which stops it; a forked child; write protection. How long it stood still for each, and that each image
is of one instant: a piece is never more than one step behind the one before it."""

import errno
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import uffd
from uffd import snapshot
from uffd.snapshot._methods import why_not_protect

from . import _eager
from ._screen import human_bytes, human_seconds

MOST_BYTES = 96 << 20
_PIECE_BYTES = 1 << 20
_RUN_S = 0.3                                     # before each image
_BAR_COLUMNS = 40
_NAMES = {"save": "np.save", "fork": "fork", "protect": "protection"}


def run(path: Path, *, screen, run_s: float = _RUN_S) -> dict:
    """Do the whole part with the arrays of the file `path`; returns the figures. Raises DataError, OSError."""
    _eager.check(path)
    if uffd.probe(self_test=False).mode == "none":
        raise uffd.Unavailable(errno.ENOSYS, "part four needs userfaultfd: `uffd probe` has the cure")
    arrays = _eager.load(path).values()
    plain = np.concatenate([_eager.flat_bytes(array) for array in arrays if array.size])[:MOST_BYTES]
    screen.head(f"uffd demo 4: an image of {human_bytes(plain.nbytes)} that are being written")
    ways = ["save", "fork", *([] if why_not_protect() else ["protect"])]
    with tempfile.TemporaryDirectory(prefix="uffd-demo-") as folder:
        result = {"nbytes": plain.nbytes, "ways": {way: _one(plain, way, Path(folder, way), run_s) for way in ways}}
    result["same_bits"] = all(way["right"] for way in result["ways"].values())
    _tell(result, screen)
    return result


class Counting:
    """Adds one to every byte, piece by piece, for ever; notes the longest time that a piece took to come."""

    def __init__(self, plain):
        self.bytes = plain.copy()
        self._at, self._last_s, self.longest_s = 0, time.perf_counter(), 0.0

    def step(self):
        piece = self.bytes[self._at:self._at + _PIECE_BYTES]
        piece += 1
        self._at = (self._at + _PIECE_BYTES) % len(self.bytes) if self._at + _PIECE_BYTES < len(self.bytes) else 0
        now_s = time.perf_counter()
        self.longest_s, self._last_s = max(self.longest_s, now_s - self._last_s), now_s

    def last_for(self, seconds):
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            self.step()


def _one(plain, way, path, run_s):
    counting = Counting(plain)
    counting.last_for(run_s)
    usual_s, counting.longest_s = counting.longest_s, 0.0
    begun_s = time.perf_counter()
    pause_s = None
    if way == "save":
        with open(path, "wb") as file:
            np.save(file, counting.bytes)
            file.flush()
            os.fsync(file.fileno())
        counting.step()
        found = np.load(path)
    else:
        taken = snapshot.take(counting.bytes, path, method=way)
        while not taken.done():
            counting.step()
        pause_s = taken.wait().pause_ns / 1e9
        found = snapshot.load(path, lazy=False)["array"]
    total_s = time.perf_counter() - begun_s
    return {"stall_s": counting.longest_s, "usual_s": usual_s, "total_s": total_s, "pause_s": pause_s,
            "right": _is_one_instant(found, plain)}


def _is_one_instant(found, plain):
    """Whether each piece was counted up as a whole, and none is more than one step behind the first."""
    steps = []
    for at in range(0, len(plain), _PIECE_BYTES):
        counted = found[at:at + _PIECE_BYTES] - plain[at:at + _PIECE_BYTES]
        if (counted != counted[0]).any():
            return False
        steps.append(int(counted[0]))
    behind = [(steps[0] - step) % 256 for step in steps]
    return behind == sorted(behind) and behind[-1] <= 1


def _tell(result, screen):
    longest_s = max(way["stall_s"] for way in result["ways"].values())
    for name, way in result["ways"].items():
        bar = "#" * max(1, round(_BAR_COLUMNS * way["stall_s"] / longest_s))
        screen.line(f"  {_NAMES[name]:<11}{bar:<{_BAR_COLUMNS}} stood still for {human_seconds(way['stall_s'])}")
    if "protect" not in result["ways"]:
        screen.pair("left out", "protection, which " + why_not_protect())
    screen.pair("checked", "each image is of one instant, bit by bit" if result["same_bits"] else "WRONG IMAGES",
                None if result["same_bits"] else "bold red")
