"""What the user asks of an engine's budget, in bytes, and the files that say what there is."""

from __future__ import annotations

import operator
import os
from typing import TYPE_CHECKING, Any

from ._coreless import core as _core
from ._machine import Machine
from .errors import BudgetError

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["cgroup_files", "checked", "refuse_small", "size"]


def checked(asked: Any) -> int | str | None:
    """"auto", a number of bytes or None; "auto" is what UFFD_BUDGET_BYTES says, if it is set. ValueError."""
    if asked is None:
        return None
    if isinstance(asked, str) and asked != "auto":
        raise ValueError(f"budget_bytes must be 'auto', None or a number of bytes, not {asked!r}")
    if asked == "auto":
        text = os.environ.get("UFFD_BUDGET_BYTES") or "auto"
        if text == "auto":
            return "auto"
        try:
            asked = int(text)
        except ValueError:
            raise ValueError(f"UFFD_BUDGET_BYTES must be a number of bytes, not {text!r}") from None
    asked = operator.index(asked)
    if asked <= 0:
        raise ValueError(f"budget_bytes must be positive, not {asked}")
    return asked


def cgroup_files(machine: Machine | None = None) -> list[tuple[bytes, bytes, bytes]]:
    """(limit, usage, stat) of each memory cgroup that holds us and says something, our own first."""
    machine = machine or Machine()
    found = []
    for line in (machine.read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, usage = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes") \
            if controllers else ("/sys/fs/cgroup", "memory.max", "memory.current")
        parts = [part for part in path.split("/") if part]
        for n in range(len(parts), -1, -1):
            folder = "/".join([mount, *parts[:n]])
            if machine.read(f"{folder}/{limit}") is not None:
                found.append(tuple(os.fsencode(f"{folder}/{name}") for name in (limit, usage, "memory.stat")))
    return found


def pressure_file(machine: Machine | None = None) -> bytes:
    """The kernel's account of memory pressure (PSI), or b"" where it keeps none."""
    path = "/proc/pressure/memory"
    return os.fsencode(path) if (machine or Machine()).read(path) else b""


def size(nbytes: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def refuse_small(engine: Engine, limit: int | None, block_bytes: int = 0) -> None:
    """BudgetError for a budget with which nothing could be filled."""
    least = _core.least_budget(engine._threads, block_bytes)
    if limit is not None and limit < least:
        pinned = 0 if engine._threads is None else _core.budget(engine._threads)[2]
        raise BudgetError(f"a budget of {limit} bytes ({size(limit)}) is too small: {pinned} bytes are pinned, and "
                          f"{engine.workers} workers and an instruction that touches several blocks need "
                          f"{least - pinned} (smaller block_bytes need less); {least} is the least")
