"""What this machine grants: ways in, kernel features, a measured fault, and the cure for what is missing.

`uffd.probe()` never raises and never hangs: it runs where the extension can't be loaded too, and its self-test faults
in a process of its own, with a deadline.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass, field

from ._cures import cures_for
from ._machine import Machine

__all__ = ["Capabilities", "probe"]

SELF_TEST_FAULTS = 64
SELF_TEST_DEADLINE_S = 10.0

# Name in the kernel's UFFD_FEATURE_ family -> (first kernel, what it gives). KERNEL_EXTRAS are no bits of UFFDIO_API.
FEATURES = {
    "PAGEFAULT_FLAG_WP": ("5.7", "write protection: exact dirty blocks"),
    "EVENT_FORK": ("4.11", "children of a fork are announced (needs CAP_SYS_PTRACE)"),
    "EVENT_REMAP": ("4.11", "mremap is announced"),
    "EVENT_REMOVE": ("4.11", "madvise that drops pages is announced"),
    "EVENT_UNMAP": ("4.11", "munmap is announced"),
    "MISSING_HUGETLBFS": ("4.11", "missing pages of hugetlbfs"),
    "MISSING_SHMEM": ("4.11", "missing pages of shared memory"),
    "SIGBUS": ("4.14", "delivery inline: the faulting thread serves itself"),
    "THREAD_ID": ("4.14", "faults name their thread"),
    "MINOR_HUGETLBFS": ("5.13", "CONTINUE on hugetlbfs"),
    "MINOR_SHMEM": ("5.14", "CONTINUE: shared backing without a copy"),
    "EXACT_ADDRESS": ("5.18", "faults name the exact address"),
    "WP_HUGETLBFS_SHMEM": ("5.19", "write protection of shared memory"),
    "WP_UNPOPULATED": ("6.4", "write protection before the first touch"),
    "POISON": ("6.6", "a failed fill is an error at the touch"),
    "WP_ASYNC": ("6.7", "tracking of writes without faults to serve"),
    "MOVE": ("6.8", "pages moved, not copied"),
}
KERNEL_EXTRAS = {
    "USER_MODE_ONLY": ("5.11", "a userfaultfd for everybody"),
    "DEVICE": ("6.1", "/dev/userfaultfd: a full userfaultfd by file permission"),
    "PAGEMAP_SCAN": ("6.7", "written pages found without reading all of pagemap"),
}
WAYS = {
    "device": "/dev/userfaultfd (Linux 6.1)",
    "syscall": "userfaultfd(2) (Linux 4.3)",
    "syscall-user": "userfaultfd(2) with UFFD_USER_MODE_ONLY (Linux 5.11)",
}
MODE_TEXT = {
    "full": "faults of system calls are served as well as those of the program",
    "user": "faults of the program are served, those of system calls are not",
    "none": "no userfaultfd is to be had here",
}
USER_MODE_COST = (
    "A system call that meets a missing page answers EFAULT, or does part of its work and says nothing: np.save, "
    "tofile, f.write, send, readinto. Put such a call into `with uffd.pinned(view):`. Regions are delivered inline."
)

FALLBACK = (
    "Regions are Unavailable. With UFFD_FALLBACK=eager in the environment, or uffd.Engine(fallback='eager'), they are "
    "filled whole when they are made, and must fit into memory."
)


@dataclass(frozen=True)
class Way:
    """One way to open a userfaultfd, as tried."""

    name: str
    opened: bool
    errno_name: str | None  # "EPERM", or None if it was opened
    what: str
    features: int  # bits of UFFDIO_API, 0 if it was not opened


@dataclass(frozen=True)
class SelfTest:
    """Faults of one page each, served for real, in a process of its own."""

    delivery: str
    ok: bool
    median_ns: int | None
    p99_ns: int | None
    faults: int
    error: str | None


@dataclass(frozen=True)
class Capabilities:
    """What `uffd.probe()` found. `str()` of it is the report of `uffd probe`, `as_dict()` what its `--json` prints.

    mode: "full", "user" or "none". kernel_faults: whether system calls on missing pages are served (mode "full").
    features: kernel feature -> present. ways: each way to open a userfaultfd with its answer, in the order tried.
    self_test: a `SelfTest` for each delivery. cures: what to do for all that is missing, in words with commands.
    machine: kernel, limits and confinement, as text and numbers; sizes in bytes, None for no limit.
    """

    mode: str
    kernel_faults: bool
    features: dict[str, bool]
    ways: tuple[Way, ...]
    self_test: tuple[SelfTest, ...]
    cures: list[str]
    machine: dict[str, object]
    reason: str | None = field(default=None)  # why there is no mode, in one line

    def as_dict(self) -> dict[str, object]:
        births = {name: birth for name, (birth, _) in {**FEATURES, **KERNEL_EXTRAS}.items()}
        return {**asdict(self), "feature_kernels": births, "page_bytes": self.machine.get("page_bytes")}

    def __str__(self) -> str:
        return "\n".join(_report(self))


def probe(*, self_test: bool = True) -> Capabilities:
    """Find out what this machine grants; returns a `Capabilities`, never raises.

    Opens and closes a userfaultfd in each way, reads /proc and /sys, and, unless `self_test` is False, lets a process
    of its own fault on some pages by each delivery: some tenths of a second, 10 s for each delivery at the very most,
    the calling thread waiting without the GIL. Threads: safe from any.
    """
    machine = Machine()
    core, reason = _load_core()
    ways = _try_ways(core) if core else ()
    opened = {way.name for way in ways if way.opened}
    mode = "full" if opened & {"device", "syscall"} else "user" if opened else "none"
    if core and mode == "none":
        reason = "no way in: " + ", ".join(f"{way.name} {way.errno_name}" for way in ways)
    features = _features(core, ways)
    tests = tuple(_self_test(delivery, features) for delivery in ("thread", "inline")) if self_test and opened else ()
    facts = machine.facts()
    cures = _guarded(lambda: cures_for(machine, mode, {way.name: way.errno_name for way in ways}, features, reason), [])
    return Capabilities(mode, mode == "full", features, ways, tests, cures, facts, reason)


def _guarded(function, otherwise):
    """A probe that fails on a machine nobody foresaw is of no use: what can't be told is left out."""
    try:
        return function()
    except Exception:
        return otherwise


def _load_core():
    if not sys.platform.startswith("linux"):
        return None, f"userfaultfd is a call of Linux, and this is {platform.system() or sys.platform}"
    try:
        from . import _core
    except Exception as error:
        return None, f"the extension uffd._core can't be loaded: {error}"
    return _core, None


def _try_ways(core) -> tuple[Way, ...]:
    tried = []
    for name, what in WAYS.items():
        try:
            fd, features, _ = core.try_open(name)
        except Exception as error:
            fd, features = -(getattr(error, "errno", None) or errno.EIO), 0
        name_of_errno = None if fd >= 0 else errno.errorcode.get(-fd, str(-fd))
        tried.append(Way(name, fd >= 0, name_of_errno, what, features if fd >= 0 else 0))
    return tuple(tried)


def _features(core, ways: tuple[Way, ...]) -> dict[str, bool]:
    bits = 0
    for way in ways:
        bits |= way.features
    found = {name: bool(bits & core.FEATURES.get(name, 0)) if core else False for name in FEATURES}
    opened = {way.name: way.opened for way in ways}
    found["USER_MODE_ONLY"] = opened.get("syscall-user", False)
    found["DEVICE"] = os.path.exists("/dev/userfaultfd")
    found["PAGEMAP_SCAN"] = _guarded(_has_pagemap_scan, False)
    return found


def _has_pagemap_scan() -> bool:
    """Scan nothing: a kernel without the call answers ENOTTY."""
    import fcntl  # not everywhere, as is the file below

    words = 12  # struct pm_scan_arg: 12 fields of 64 bits, of which the first is its own size
    argument = bytearray(struct.pack(f"={words}Q", 8 * words, *[0] * (words - 1)))
    request = 3 << 30 | len(argument) << 16 | ord("f") << 8 | 16  # _IOWR('f', 16, struct pm_scan_arg)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        try:
            fcntl.ioctl(pagemap, request, argument)
        except OSError as error:
            return error.errno != errno.ENOTTY
    return True


# The self-test. It runs in a child, so that a fault that nobody serves costs the child and not the program.

_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from uffd.probe import _fault_in_child
_fault_in_child(sys.argv[2], int(sys.argv[3]))
"""


def _fault_in_child(delivery: str, faults: int) -> None:
    """Touch pages of a region one by one; print the time of each in ns. Zeros in place of the data are an error."""
    import time

    import numpy as np

    import uffd

    page_bytes = os.sysconf("SC_PAGESIZE")
    source = np.arange(faults, dtype="u1").repeat(page_bytes) ^ np.uint8(0xA5)
    region = uffd.Region(source.nbytes, uffd.providers.Memory(source), block_bytes=page_bytes, delivery=delivery,
                         readahead_bytes=0)
    array = region.array().data
    times = []
    for at in range(0, source.nbytes, page_bytes):
        start = time.perf_counter_ns()
        value = array[at]
        times.append(time.perf_counter_ns() - start)
        if value != source[at]:
            raise SystemExit(f"page {at // page_bytes} holds {value}, not {source[at]}")
    print(json.dumps(sorted(times)), flush=True)
    os._exit(0)  # what is measured is the fault: the way out is not waited for


def _self_test(delivery: str, features: dict[str, bool]) -> SelfTest:
    def failed(error: str) -> SelfTest:
        return SelfTest(delivery, False, None, None, SELF_TEST_FAULTS, error)

    if delivery == "inline" and not features["SIGBUS"]:
        return failed("needs the feature SIGBUS (Linux 4.14)")
    if not sys.executable:
        return failed("not run: sys.executable names no interpreter")
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), delivery, str(SELF_TEST_FAULTS)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=SELF_TEST_DEADLINE_S, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word on stderr"])[-1]
            return failed(f"exit code {done.returncode}: {last}")
        times = json.loads(done.stdout)
        return SelfTest(delivery, True, times[len(times) // 2], times[len(times) * 99 // 100], len(times), None)
    except subprocess.TimeoutExpired:
        return failed(f"no end within {SELF_TEST_DEADLINE_S:g} s")
    except (OSError, ValueError, IndexError) as error:
        return failed(str(error))


# The report


def _report(found: Capabilities):
    facts = found.machine
    yield f"{facts['system']} {facts['kernel']} {facts['processor']}, {facts['cpus']} CPUs, " \
          f"pages of {facts['page_bytes']} bytes, Python {facts['python']}"
    yield f"mode: {found.mode} ({found.reason or MODE_TEXT[found.mode]})"
    if found.mode == "user":
        yield USER_MODE_COST
    if found.mode == "none":
        yield FALLBACK
    yield "\nways to open a userfaultfd"
    for way in found.ways:
        yield f"  {way.name:<13} {'yes' if way.opened else way.errno_name:<7} {way.what}"
    yield "\nkernel features (first kernel)"
    for name, (birth, what) in {**FEATURES, **KERNEL_EXTRAS}.items():
        yield f"  {name:<19} {'yes' if found.features[name] else 'no':<4} {birth:<5} {what}"
    if found.self_test:
        yield f"\nself-test: {SELF_TEST_FAULTS} faults of one page each"
    for test in found.self_test:
        figures = f"median {(test.median_ns or 0) / 1e3:.1f} us, p99 {(test.p99_ns or 0) / 1e3:.1f} us"
        yield f"  {test.delivery:<7} {figures if test.ok else 'FAILED: ' + str(test.error)}"
    yield "\nmachine"
    for name, value in facts.items():
        if name not in ("system", "kernel", "processor", "cpus", "page_bytes", "python"):
            yield f"  {name:<27} {_fact(name, value)}"
    yield "\nwhat to do" if found.cures else "\nnothing is missing"
    for cure in found.cures:
        yield from (("- " if not at else "  ") + line for at, line in enumerate(cure.splitlines()))


def _fact(name: str, value: object) -> str:
    if value is None:
        return "no limit" if "limit" in name else "-"
    if isinstance(value, int) and name.endswith("_bytes"):
        return f"{value / 2**20:,.0f} MiB"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
