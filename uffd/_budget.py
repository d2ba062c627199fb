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

__all__ = ["cgroup_files", "checked", "limit", "pressure_file", "refuse_small", "size"]

_NO_LIMIT = 1 << 62                 # what a cgroup says that has none


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
                names = [os.fsencode(f"{folder}/{name}") for name in (limit, usage, "memory.stat")]
                found.append((names[0], names[1], names[2]))
    return found


def pressure_file(machine: Machine | None = None) -> bytes:
    """The kernel's account of memory pressure (PSI), or b"" where it keeps none."""
    path = "/proc/pressure/memory"
    return os.fsencode(path) if (machine or Machine()).read(path) else b""


def limit(asked: int | str | None, held: int, machine: Machine | None = None) -> int | None:
    """What regions may hold in all by what was `asked`, of which they have `held` already: as the core has it
    (budget_follow of _keeper.pxi), for who has no core. None: no limit, or nobody tells."""
    if asked is None:
        return None
    machine = machine or Machine()
    rooms = [_cgroup_room(machine, files, held) for files in cgroup_files(machine)]
    if asked == "auto":
        rooms.append(_free_bytes(machine, held))
    known = [room for room in rooms if room is not None]
    if isinstance(asked, int):
        return min([asked, *(room * 9 // 10 for room in known)])
    return min(known) * 6 // 10 if known else None


def _cgroup_room(machine: Machine, files: tuple[bytes, bytes, bytes], held: int) -> int | None:
    """Limit less what others use; file pages are room, since the kernel takes them away when it needs them."""
    most, used, stat = (machine.read(os.fsdecode(name)) or "" for name in files)
    if not most.isdigit() or not used.isdigit() or int(most) >= _NO_LIMIT:
        return None
    words = stat.split()
    numbers = dict(zip(words[::2], words[1::2], strict=False))
    prefix = "total_" if "total_inactive_file" in numbers else ""
    cached = sum(int(numbers.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return max(0, int(most) - max(0, int(used) - cached - held))


def _free_bytes(machine: Machine, held: int) -> int | None:
    free = machine.available_bytes()
    if free is None and hasattr(os, "sysconf"):
        name = next((name for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in os.sysconf_names), None)
        free = os.sysconf(name) * _core.PAGE_BYTES if name else None
    return None if free is None or free < 0 else free + held


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
