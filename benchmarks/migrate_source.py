"""A source for bench_migrate.py, a process of its own: `URL NBYTES`. A thread writes all of it, over and over, to the
last moment that it can, and is then stopped for ever. Prints the downtime in milliseconds."""

import os
import sys
import threading

import numpy as np

import uffd


def write():
    while True:
        for at in range(0, len(array), 1 << 17):
            np.add(array[at:at + (1 << 17)], 1, out=array[at:at + (1 << 17)])


array = np.ones(int(sys.argv[2]) // 8)
threading.Thread(target=write, daemon=True).start()
with uffd.migrate.connect(sys.argv[1], {"a": array}) as outgoing:
    outgoing.precopy(rounds=2, timeout_s=60)
    outgoing.switchover()
    report = outgoing.wait(300)
print(report.downtime_s * 1e3, flush=True)
os._exit(0)                              # the writer holds the memory
