"""Count what a process holds: descriptors, threads, children, mappings. Every test ends with what it began with."""

import collections
import gc
import os
import time
from dataclasses import dataclass

# Memory allocators make and merge mappings as they please; only managed and memfd mappings are counted exactly.
MAPPINGS_TOLERANCE = 150
# What ends in the background (a region whose last array died) gets this long.
SETTLE_S = float(os.environ.get("UFFD_SETTLE_S", "5"))
UFFD_FLAGS = {"um", "uw", "ui"}  # registered for missing, write-protect and minor faults


@dataclass(frozen=True)
class Snapshot:
    fds: dict
    threads: dict
    children: frozenset
    managed: tuple  # address ranges registered with a userfaultfd
    memfds: tuple  # lines of mapped memfds
    mappings: int


def read_fds():
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the descriptor of this very listing
            pass
    return fds


def read_threads():
    threads = {}
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as comm:
                threads[int(task)] = comm.read().strip()
        except OSError:  # ended meanwhile
            pass
    return threads


def read_children():
    children = set()
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                children.update(int(pid) for pid in file.read().split())
        except OSError:
            pass
    return frozenset(children)


def read_mappings(fds):
    """(ranges registered with a userfaultfd, lines of memfds, number of mappings).

    A registration ends with the last descriptor of its userfaultfd, so without one the short list will do: the kernel
    takes ten times as long to write the long one, and this is asked twice in each test."""
    if not any("userfaultfd" in target for target in fds.values()):
        with open("/proc/self/maps") as maps:
            lines = maps.read().splitlines()
        return (), tuple(line.strip() for line in lines if "/memfd:" in line), len(lines)
    managed, memfds, count, head = [], [], 0, ""
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            word = line.split(" ", 1)[0]
            if "-" in word and not word.endswith(":"):
                head, count = line.strip(), count + 1
                if "/memfd:" in line:
                    memfds.append(head)
            elif word == "VmFlags:" and UFFD_FLAGS.intersection(line.split()[1:]):
                managed.append(head)
    return tuple(managed), tuple(memfds), count


def take():
    fds = read_fds()
    managed, memfds, count = read_mappings(fds)
    return Snapshot(fds, read_threads(), read_children(), managed, memfds, count)


def difference(before, after):
    """What `after` has too much, as lines for a failure message."""
    lines = [f"descriptor {fd} -> {target}" for fd, target in after.fds.items() if before.fds.get(fd) != target]
    lines += [f"thread {tid} ({name})" for tid, name in after.threads.items() if tid not in before.threads]
    lines += [f"child process {pid}" for pid in after.children - before.children]
    if len(after.managed) > len(before.managed):
        lines += [f"managed mapping {line}" for line in set(after.managed) - set(before.managed)]
    if len(after.memfds) > len(before.memfds):
        lines += [f"memfd mapping {line}" for line in set(after.memfds) - set(before.memfds)]
    sanitized = "asan" in os.environ.get("LD_PRELOAD", "")
    if after.mappings > before.mappings + MAPPINGS_TOLERANCE and not sanitized:
        lines.append(f"mappings: {before.mappings} before, {after.mappings} after")
    return lines


def reap(pids):
    """Take the exit status of children that ended: orphans of a test come to this process."""
    for pid in pids:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass


def settle(before, timeout_s=SETTLE_S):
    """Wait until nothing is left over `before`; the lines that stay after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while True:
        gc.collect()
        reap(read_children() - before.children)
        lines = difference(before, take())
        if not lines or time.monotonic() > deadline:
            return lines
        time.sleep(0.02)


def rss_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mapping_of(address):
    """The line of /proc/self/maps that covers address, or None."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, stop = (int(word, 16) for word in line.split(" ", 1)[0].split("-"))
            if start <= address < stop:
                return line.strip()
    return None


def fd_kinds():
    """How many descriptors of each kind (userfaultfd, eventfd, memfd, ...) are open."""
    return collections.Counter(target.split(":")[0] if target.startswith("/memfd") else target
                               for target in read_fds().values() if "anon_inode" in target or "memfd" in target)
