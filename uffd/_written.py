"""Write-back of regions that are filled whole (eager.py): which blocks were written, and who writes the last ones."""

from __future__ import annotations

import hashlib
import queue
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .eager import EagerRegion

__all__ = ["Closer", "Written"]

_DIGEST_BYTES = 16                  # of BLAKE2b: two blocks that differ have the same one never, in practice


class Written:
    """Which blocks differ from what the provider has, by a checksum of each. One thread at a time may use it, but for
    `dirty`; others may write to the bytes meanwhile."""

    def __init__(self, data: np.ndarray, block_bytes: int) -> None:
        self._data, self._block_bytes = data, block_bytes
        self._digests = np.empty((-(-len(data) // block_bytes), _DIGEST_BYTES), np.uint8)
        self._unsynced = np.zeros(len(self._digests), bool)
        for block in range(len(self._digests)):
            self.keep(block, self._bytes_of(block))
        self.synced(True)

    def keep(self, block: int, data: Any) -> None:
        """The provider has `data`, one or more blocks from that one on."""
        view = memoryview(data)
        for at in range(0, len(view), self._block_bytes):
            self._digests[block + at // self._block_bytes] = np.frombuffer(
                _digest(view[at:at + self._block_bytes]), np.uint8)
            self._unsynced[block + at // self._block_bytes] = True

    def synced(self, well: bool) -> None:
        """What the provider was given since the last time is durable; or it could not make it so, and it counts as
        dirty."""
        if not well:
            self._digests[self._unsynced] = 0
        self._unsynced[:] = False

    def dirty(self) -> np.ndarray:
        return np.array([self._differs(block, self._bytes_of(block)) for block in range(len(self._digests))], bool)

    def changed(self, runs: list[list[int]], most_bytes: int) -> Iterator[tuple[int, bytes]]:
        """(block, bytes) of neighbours that differ, up to most_bytes at once; a copy, so that what is written is what
        was compared."""
        for first, end in runs:
            start = first
            found: list[bytes] = []
            for block in range(first, end):
                data = bytes(self._bytes_of(block))
                differs = self._differs(block, data)
                if found and (not differs or (len(found) + 1) * self._block_bytes > most_bytes):
                    yield start, b"".join(found)
                    found = []
                if differs:
                    start = start if found else block
                    found.append(data)
            if found:
                yield start, b"".join(found)

    def _bytes_of(self, block: int) -> np.ndarray:
        return self._data[block * self._block_bytes:(block + 1) * self._block_bytes]

    def _differs(self, block: int, data: Any) -> bool:
        return _digest(data) != self._digests[block].tobytes()


def _digest(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, usedforsecurity=False).digest()


class Closer:
    """A thread that flushes and closes regions whose last array died: that may be in the garbage collector, where no
    provider may be called and no lock be waited for. It is there as long as there are regions that it may be given."""

    def __init__(self) -> None:
        self._lock = threading.RLock()           # the garbage collector may run while this thread has it
        self._queue: queue.SimpleQueue[EagerRegion | None] = queue.SimpleQueue()     # its put may be called anywhere
        self._thread: threading.Thread | None = None
        self._regions = 0
        self._patience_s = 0.0

    def expect(self, region: EagerRegion) -> None:
        """It may be given, until it is `gone`."""
        with self._lock:
            self._regions += 1
            self._patience_s = max(self._patience_s, region._timeout_s)
            if self._thread is None:
                self._queue = queue.SimpleQueue()
                self._thread = threading.Thread(target=_close_all, args=(self._queue,), name="uffd-closer", daemon=True)
                self._thread.start()

    def put(self, region: EagerRegion) -> None:
        self._queue.put(region)

    def gone(self) -> None:
        with self._lock:
            self._regions -= 1
            if self._regions == 0:
                self._queue.put(None)
                self._thread = None

    def end(self) -> None:
        """At exit: waits for what it was given, as long as that may take."""
        thread, deadline = self._thread, time.monotonic() + 2 * self._patience_s + 1
        self._queue.put(None)
        while thread is not None and thread.is_alive() and time.monotonic() < deadline:
            thread.join(0.1)


def _close_all(given: queue.SimpleQueue[EagerRegion | None]) -> None:
    while (region := given.get()) is not None:
        try:
            region._end()
        except Exception:
            kind, value, trace = sys.exc_info()
            told: Any = _Unraisable(kind, value, trace, f"uffd: {region.name!r} was not flushed", region)
            sys.unraisablehook(told)
            del told, value, trace
        del region                               # until the next one comes, nobody would free it


class _Unraisable:
    """What sys.unraisablehook takes; its own class can't be made."""

    def __init__(self, kind: Any, value: Any, trace: Any, text: str, thing: Any) -> None:
        self.exc_type, self.exc_value, self.exc_traceback = kind, value, trace
        self.err_msg, self.object = text, repr(thing)
