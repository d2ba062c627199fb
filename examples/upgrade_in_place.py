"""A service replaces itself by a new version of its program and keeps its memory: a table of 1 GiB goes from the old
process to the new one by its descriptor, in milliseconds, and not a byte of it is copied.

Run: python examples/upgrade_in_place.py [MiB, default 1024]. It needs nothing but uffd, and a userfaultfd that serves
the kernel's own accesses, too (python -m uffd probe says "full").
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

import uffd

UNSUITED = 77


def table(mib):
    """backing="shared" is what makes it possible: the pages lie in a file in memory that both processes can map."""
    return uffd.zeros((mib << 20) // 8, np.int64, backing="shared", engine=uffd.Engine(budget_bytes=None))


def old_version(folder, mib):
    data = table(mib)
    data[:] = np.arange(len(data))
    answered = 0
    for key in range(0, len(data), 1 + len(data) // 1000):
        assert data[key] == key
        answered += 1
    print(f"version 1, process {os.getpid()}: {data.nbytes / 2**20:.0f} MiB, {answered} requests answered")
    url = f"unix:{folder}/upgrade"
    successor = subprocess.Popen([sys.executable, "-P", os.path.abspath(__file__), "--new", url],
                                 stdout=subprocess.PIPE, text=True)
    assert successor.stdout.readline() == "ready\n"      # its imports are done while we still answer
    began_s = time.monotonic()
    with uffd.migrate.connect(url, {"data": data}) as outgoing:
        outgoing.switchover(json.dumps({"answered": answered, "began_s": began_s}).encode())
        report = outgoing.wait(30)
    print(successor.communicate(timeout=30)[0], end="")
    print(f"passed {report.bytes_passed / 2**20:.0f} MiB, copied {report.bytes_copied} bytes; nobody could write for "
          f"{report.downtime_s * 1e3:.2f} ms")
    return successor.returncode


def new_version(url):
    with uffd.migrate.listen(url, engine=uffd.Engine(budget_bytes=None)) as incoming:
        print("ready", flush=True)
        with incoming.accept(30) as arrival:
            data, state = arrival.arrays["data"], json.loads(arrival.state)
            first = int(data[12345])
            took_ms = (time.monotonic() - state["began_s"]) * 1e3
            wrong = int(np.count_nonzero(data != np.arange(len(data))))
            data[12345] += 1                     # it is an ordinary array
    print(f"version 2, process {os.getpid()}: the first answer ({first}) {took_ms:.1f} ms after the upgrade began, "
          f"{state['answered']} requests so far, {wrong} wrong of {len(data)}")
    return wrong != 0


def main():
    if uffd.probe().mode != "full":
        print("this machine grants no full userfaultfd, so a region can't be passed on (python -m uffd probe)")
        return UNSUITED
    if len(sys.argv) > 2 and sys.argv[1] == "--new":
        return new_version(sys.argv[2])
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:      # a socket's path must be short
        return old_version(folder, int(sys.argv[1]) if len(sys.argv) > 1 else 1024)


if __name__ == "__main__":
    sys.exit(main())
