"""A memory cgroup of the demo's own, v1 or v2, where one may be made: its limit, its peak, and its end."""

import os
import time
from pathlib import Path

from uffd._machine import Machine

_ROOT = Path("/sys/fs/cgroup")
_END_S = 5.0


class Limit:
    """A cgroup made under `parent`. A context manager; leaving it removes it, once its processes are gone."""

    def __init__(self, parent: Path, nbytes: int):
        self.path = parent / f"uffd-demo-{os.getpid()}-{time.monotonic_ns() % 10**6}"
        self.path.mkdir()
        self._is_v1 = (self.path / "memory.limit_in_bytes").exists()
        try:
            (self.path / ("memory.limit_in_bytes" if self._is_v1 else "memory.max")).write_text(str(nbytes))
            self.nbytes = nbytes
        except OSError:
            self._remove()
            raise

    @property
    def procs(self) -> str:
        """The file into which a process that is to be limited writes its number."""
        return str(self.path / "cgroup.procs")

    def peak_bytes(self) -> int | None:
        """The most that was charged at once, page cache included; None where the kernel does not tell (v2 < 5.19)."""
        try:
            return int((self.path / ("memory.max_usage_in_bytes" if self._is_v1 else "memory.peak")).read_text())
        except (OSError, ValueError):
            return None

    def _remove(self):
        deadline_s = time.monotonic() + _END_S
        while True:
            try:
                return self.path.rmdir()
            except OSError:                      # a process in it is still on its way out
                if time.monotonic() > deadline_s:
                    return None
                time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._remove()


def make(nbytes: int) -> Limit | None:
    """A cgroup with that limit, beside our own if that may be, else at the top; None where none can be made."""
    for parent in _parents():
        try:
            return Limit(parent, nbytes)
        except OSError:
            continue
    return None


def _parents():
    found = []
    for line in (Machine().read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        top = _ROOT / "memory" if controllers else _ROOT
        found += [top / path.strip("/"), top]
    return found
