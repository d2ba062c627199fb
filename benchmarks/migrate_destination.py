"""A destination for bench_migrate.py, a process of its own: `URL what warm`. It says where it listens, then what it
saw.

what: "idle" waits for all; "busy" adds up pieces of the array meanwhile; "touch" reads random blocks, one at a time.
warm: so many bytes of free memory are touched before, in huge pages: what lay idle is slow to touch again.
"""

import json
import mmap
import sys
import time

import numpy as np

import uffd


def busy(array, arrival):
    rounds = 0
    while not arrival.status.over:
        array[rng.integers(0, len(array) - 100_000):][:100_000].sum()
        rounds += 1
    return {"rounds": rounds}


def touch(array, arrival):
    waits = []
    for at in rng.integers(0, len(array), 3000).tolist():
        if arrival.status.over:
            break
        begin_s = time.perf_counter()
        array[at]
        took_s = time.perf_counter() - begin_s
        if took_s > 5e-6:                        # what was there already is no request
            waits.append(took_s)
    return {"waits": waits}


def touch_free(nbytes):
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as scratch:
        scratch.madvise(mmap.MADV_HUGEPAGE)
        view = np.frombuffer(scratch, dtype=np.uint8)
        view[::mmap.PAGESIZE] = 1
        del view


url, what, warm = sys.argv[1:]
if int(warm):
    touch_free(int(warm))
rng = np.random.default_rng(7)
with uffd.migrate.listen(url, engine=uffd.Engine(budget_bytes=None)) as incoming:
    print(incoming.url, flush=True)
    arrival = incoming.accept(60)
    began_s = time.monotonic()
    found = {"busy": busy, "touch": touch}.get(what, lambda *_: {})(arrival.arrays["a"], arrival)
    if what == "touch" and not arrival.status.over:
        arrival.close()                          # the rest is of no interest
    else:
        arrival.wait(120)
        arrival.close()
    print(json.dumps({**found, "began_s": began_s, "took_s": time.monotonic() - began_s}), flush=True)
