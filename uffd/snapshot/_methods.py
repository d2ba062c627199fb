"""The ways to an image: a forked child that writes its own memory, or write protection, with which the program saves a
block before it changes it. Both write into a file that is as long as the image, and say afterwards what they wrote."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

import numpy as np

from .._coreless import core as _core
from ..errors import SnapshotError, Unavailable
from ._layout import Layout
from ._memory import Place

Runs = list[tuple[int, int]]       # in the image: from, to


def require_core() -> None:
    if not hasattr(_core, "ForkedImage"):
        raise Unavailable(errno.ENOSYS, "images need the extension, which is there on Linux alone")


def choose(method: str, places: list[Place]) -> str:
    """"protect" or "fork". ValueError, Unavailable, SnapshotError with the reason."""
    if method not in ("auto", "protect", "fork"):
        raise ValueError(f"method must be 'auto', 'protect' or 'fork', not {method!r}")
    why = why_not_protect()
    if method == "protect" and why:
        raise Unavailable(errno.ENOTSUP, f"method 'protect' {why}; method 'fork' works without")
    if method == "auto":
        method = "fork" if why else "protect"
    why = why_not_fork(places) if method == "fork" else ""
    if why:
        raise SnapshotError(why)
    return method


def why_not_protect() -> str:
    """What method "protect" lacks here; empty: nothing."""
    if not hasattr(_core, "Imager"):
        return "needs the extension, which is not there"
    way = _core.mode()[0]
    if way != "full":
        return (f"needs a full userfaultfd, and here it is {way!r}: system calls that write to the arrays would fail "
                "while the image is taken (`python -m uffd probe` has the cure)")
    return "" if _core.supports("PAGEFAULT_FLAG_WP") else "needs write protection by userfaultfd (Linux 5.7)"


def why_not_fork(places: list[Place]) -> str:
    """Which memory a forked child would not have as it was; empty: none."""
    for place in places:
        region = place.region
        if place.shared:
            return (f"array {place.name!r} is in shared memory, which a forked child does not have as it was: it needs "
                    "method='protect', and that a full userfaultfd")
        if region is not None and region.mode == "r+":
            return (f"array {place.name!r} is in the region {region.name!r} of mode 'r+': what a forked child reads "
                    "from its provider later is not as it was; it needs method='protect', and that a full userfaultfd")
    return ""


class Fork:
    """A child of fork(), which runs nothing but the core's own loop."""

    method = "fork"

    def __init__(self, layout: Layout, places: list[Place], fd: int, data_offset: int) -> None:
        offsets = {entry.name: entry.offset for entry in layout.entries}
        self._starts = [offsets[place.name] for place in places]
        self._places = places
        rows = [(place.address, place.nbytes, data_offset + start)
                for place, start in zip(places, self._starts, strict=True)]
        self._child = _core.ForkedImage(np.array(rows, np.int64).reshape(-1, 3), fd)
        self.instant_ns = time.time_ns() - (time.monotonic_ns() - self._child.instant_ns)
        self.pause_ns = self._child.pause_ns

    def wait(self, timeout_s: float) -> bool:
        return self._child.wait(int(timeout_s * 1e9))

    def progress(self) -> tuple[int, int]:
        return self._child.progress()

    def abort(self) -> None:
        self._child.abort()

    def check(self) -> None:
        """SnapshotError unless the child wrote all of it."""
        finished, number, status = self._child.result()
        if number:
            raise SnapshotError(f"the forked child could not write the image: {os.strerror(number)}") from OSError(
                number, os.strerror(number))
        if not finished:
            how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"wait status {status}"
            raise SnapshotError(f"the forked child ended before the image was written ({how}); what it printed stands "
                                "on stderr")

    def runs(self) -> Runs:
        """What it wrote; all else is zeros."""
        out: Runs = []
        page = _core.PAGE_BYTES
        for number, (place, start) in enumerate(zip(self._places, self._starts, strict=True)):
            there = np.frombuffer(self._child.written(number), np.uint8)
            edges = np.flatnonzero(np.diff(there, prepend=np.uint8(0), append=np.uint8(0)))
            skip = place.address % page
            for first, end in edges.reshape(-1, 2).tolist():
                out.append((start + max(0, first * page - skip), start + min(place.nbytes, end * page - skip)))
        return out

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._child.close()


class Protect:
    """Write protection: the core's Imager."""

    method = "protect"

    def __init__(self, layout: Layout, places: list[Place], fd: int, data_offset: int, *,
                 memory_limit_bytes: int, keep: bool, previous: Protect | None, buffers: list[Any]) -> None:
        offsets = {entry.name: entry.offset for entry in layout.entries}
        self._starts = [offsets[place.name] for place in places]
        ranges = [(buffer, data_offset + start) for buffer, start in zip(buffers, self._starts, strict=True)]
        self.key = [(place.name, place.address, place.nbytes) for place in places]
        self._imager: Any = _core.Imager(ranges, fd, memory_limit_bytes=memory_limit_bytes, keep=keep,
                                    previous=None if previous is None else previous._imager)
        try:
            self._imager.start()
        except BaseException:
            self._imager.close()
            raise
        self.instant_ns, self.pause_ns = self._imager.instant_ns, self._imager.pause_ns

    def wait(self, timeout_s: float) -> bool:
        return self._imager.wait(timeout_s)

    def progress(self) -> tuple[int, int]:
        return self._imager.progress()

    def abort(self) -> None:
        self._imager.abort()

    def check(self) -> None:
        self._imager.finish()

    def runs(self) -> Runs:
        return [(self._starts[number] + start, self._starts[number] + stop)
                for number, start, stop in self._imager.written_runs()]

    def stats(self) -> dict[str, Any]:
        return dict(self._imager.stats())

    def close(self) -> None:
        self._imager.close()
