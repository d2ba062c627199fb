"""Which pages of an array were written: `track`."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np

from . import foreign
from ._coreless import core as _core
from .engine import require_userfaultfd
from .errors import RegionClosed, SnapshotError, Unavailable
from .region import Region, region_of

__all__ = ["Tracker", "track"]


def track(x: Any) -> Tracker:
    """A `Tracker` of the pages of `x` that are written from now on.

    x: a `Region`, an array of one, or any other writable array or buffer (np.zeros, a small array on the heap, a torch
    CPU tensor's `.numpy()`, shared memory, a shared file mapping such as np.memmap). TypeError for dtypes of Python
    objects; ValueError for read-only or empty arrays and for memory that somebody else's userfaultfd has; Unavailable,
    with the cure, where the kernel can't do it (regions: Linux 5.7; other memory: 6.7 with WP_ASYNC, or 5.18 with a
    full userfaultfd, then no mappings of files).

    Costs: regions pay a fault for the first write to each page since the last reset (some 10 us), other memory about
    1 us, without a fault that a thread of ours serves (before Linux 6.7 as regions). What other processes write to
    shared memory is not seen.
    """
    return Tracker(x)


class Tracker:
    """Which pages of an array were written since it was made, or last reset. A context manager; `close` ends it.

    Exact to the page, never less: a write that has ended when `written` is called is in it; one that runs beside it is
    in this answer, in the next, or in both. The pages at the array's edges are reported whole: a write to what else
    lies on them counts, too (small arrays on the heap share pages with each other). Also reported are pages whose bytes
    changed without a write: discarded blocks of a region, pages that the program gave back with madvise. A block of a
    region that was evicted and came back is what it was. Pages that the kernel must be able to write to without a fault
    (pinned, where only user-mode faults are served) are reported each time.

    The tracker keeps the array alive. Memory that was unmapped, moved or freed all the same (ndarray.resize with
    refcheck=False) raises SnapshotError, "tracking lost", and never counts as clean. Thread-safe: of two that reset at
    once, each page is reported to one. Any number of trackers may share an array (a region: eight), each with its own
    memory of what was written. In a forked child a tracker of a region goes on, for the child's copy; one of other
    memory is lost there.
    """

    def __init__(self, x: Any) -> None:
        self.page_bytes: int = _core.PAGE_BYTES
        self._closed = False
        self._pid = os.getpid()
        self._region: Region | None = None
        self._array: np.ndarray | None = None
        if isinstance(x, Region):
            x._check_open()
            if x.mode == "r":
                raise ValueError(f"region {x.name!r} is read-only: nobody writes to it")
            start, end, self._array = _bounds_of_region(x)
        else:
            self._array, start, end = foreign.span_of(x)
        self._start, self._end = start, end
        self._low, self._high = foreign.widened(start, end)
        if _core.base_at(start) is None:
            self._watch: Any = self._watch_foreign()
        else:
            self._region = x if isinstance(x, Region) else region_of(self._array)
            self._watch = self._watch_region(self._region)

    def _watch_region(self, region: Region) -> Any:
        if not region.tracked:
            raise Unavailable(errno.ENOTSUP, f"region {region.name!r}: this kernel has no write protection for its "
                              "memory (Linux 5.7, backing \"shared\": 5.19)")
        first = (self._low - region.address) // self.page_bytes
        try:
            return _core.Watch(region, first, first + self._pages)
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise
            raise ValueError(f"region {region.name!r} has as many trackers as it may have; close one") from None

    def _watch_foreign(self) -> Any:
        require_userfaultfd()
        pieces = foreign.memory_of(self._low, self._high)
        foreign.refuse_unmapped(pieces, self._low, self._high)
        try:
            return _core.ForeignWatch(self._low, self._high, not all(piece.anonymous for piece in pieces))
        except (OSError, MemoryError) as e:
            number = getattr(e, "errno", None) or errno.ENOMEM
            raise foreign.refusal(number, self._low, self._high, "tracked") from None

    @property
    def _pages(self) -> int:
        return (self._high - self._low) // self.page_bytes

    def written(self, reset: bool = True) -> np.ndarray:
        """bool, one per page that the array touches: written since the last reset. reset: they are clean from here on.
        In an array that is no region's, a page that did not exist before counts as written when it came with a huge
        page, of which the program wrote another part.

        Blocks for one scan, without the interpreter lock. SnapshotError where tracking was lost.
        """
        if self._closed:
            raise ValueError("the tracker is closed")
        out = np.zeros(self._pages, bool)
        self._refuse_moved()
        try:
            n = self._watch.take(out.view(np.uint8), reset)
        except ValueError:
            if self._region is not None and self._region.gone:
                raise RegionClosed(f"region {self._region.name!r} is closed, and its tracker has ended") from None
            raise
        if n < 0:
            raise self._lost(-n)
        return out

    def ranges(self, reset: bool = True) -> list[tuple[int, int]]:
        """The same as byte ranges of the array's memory: (start, stop) each, sorted, neighbours merged, counted from
        its first byte and cut at its ends."""
        written = self.written(reset)
        steps = np.flatnonzero(np.diff(written.view(np.int8), prepend=0, append=0))
        bounds = steps.reshape(-1, 2).astype(np.int64) * self.page_bytes + (self._low - self._start)
        return [(start, stop) for start, stop in np.clip(bounds, 0, self._end - self._start).tolist()]

    def _refuse_moved(self) -> None:
        """An array whose memory is somewhere else by now. (A region's can't be.)"""
        if self._region is None and self._array is not None:
            bounds = (self._array.__array_interface__["data"][0], self._array.nbytes)
            if bounds != getattr(self, "_seen", bounds):
                raise self._lost(errno.EFAULT)
            self._seen = bounds

    def _lost(self, number: int) -> SnapshotError:
        if number == errno.ECHILD or os.getpid() != self._pid:
            why = "this is a forked child, whose memory is another one; track it anew"
        else:
            why = f"the memory was freed, moved or mapped anew ({os.strerror(number)}); copy it all, and track it anew"
        return SnapshotError(f"tracking lost: {self._end - self._start} bytes at {self._start:#x}: {why}")

    def close(self) -> None:
        """Ends it, and lets go of the array; idempotent."""
        self._closed = True
        self._watch.close()
        self._array = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<uffd.Tracker of {self._end - self._start} bytes at {self._start:#x}{', closed' * self._closed}>"


def _bounds_of_region(region: Region) -> tuple[int, int, np.ndarray]:
    array = region.array()
    address = array.__array_interface__["data"][0]
    return address, address + array.nbytes, array
