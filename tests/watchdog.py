"""Kill a test process that overran its deadline, from outside it.

Usage: watchdog.py PID < pipe. Lines on the pipe: ``start SECONDS NAME`` and ``stop``. The process ends when the pipe
closes or PID is gone. It imports nothing of the project: a hang of the code under test can't reach it.
"""

import os
import select
import signal
import sys
import time

DUMP_GRACE_S = 1.5
THREADS_SHOWN = 40


def children_of():
    """Map each pid to the pids of its children, from one pass over /proc."""
    families = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as stat:
                parent = int(stat.read().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        families.setdefault(parent, []).append(int(entry))
    return families


def descendants(pid):
    families = children_of()
    found, queue = [], [pid]
    while queue:
        for child in families.get(queue.pop(), ()):
            if child != os.getpid():
                found.append(child)
                queue.append(child)
    return found


def thread_lines(pid):
    """One line per thread of pid: its name, state and what it waits for in the kernel."""
    for task in sorted(os.listdir(f"/proc/{pid}/task"), key=int)[:THREADS_SHOWN]:
        texts = []
        for name in ("comm", "wchan", "syscall"):
            try:
                with open(f"/proc/{pid}/task/{task}/{name}") as file:
                    texts.append(file.read().strip())
            except OSError as error:
                texts.append(error.strerror)
        yield f"  thread {task}: {' | '.join(texts)}"


def end(pid, name, deadline_s):
    """Say which test it was and where it stood, then kill the process with all its descendants."""
    print(f"\nwatchdog: {name} overran its deadline of {deadline_s:g} s; killing {pid}", file=sys.stderr, flush=True)
    try:
        for line in thread_lines(pid):
            print(line, file=sys.stderr)
        os.kill(pid, signal.SIGUSR1)  # faulthandler prints the Python stacks, without the GIL
        time.sleep(DUMP_GRACE_S)
    except OSError as error:
        print(f"watchdog: {error}", file=sys.stderr)
    sys.stderr.flush()
    for victim in [pid, *descendants(pid)]:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass


def serve(pid):
    pidfd = os.pidfd_open(pid)
    pending, name, deadline_s, due = b"", "", 0.0, None
    while True:
        wait_s = None if due is None else max(0.0, due - time.monotonic())
        ready, _, _ = select.select([0, pidfd], [], [], wait_s)
        if pidfd in ready:
            return
        if not ready:
            end(pid, name, deadline_s)
            return
        piece = os.read(0, 65536)
        if not piece:
            return
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            words = line.decode(errors="replace").split(" ", 2)
            if words[0] == "start":
                deadline_s, name = float(words[1]), words[2]
                due = time.monotonic() + deadline_s
            else:
                due = None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the tests to handle
    serve(int(sys.argv[1]))
