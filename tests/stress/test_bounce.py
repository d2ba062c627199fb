"""The kernel's own stress idea through our API: a lock and a counter inside each page, bounced between areas.

Each round's region is served from the bytes that the round before left; threads take the lock inside random pages,
check and count, while faults, prefetch, populate, pins, forks and the close of other regions race. A shadow of
counters outside decides what is right.
"""

import ctypes
import os
import threading
import time

import numpy as np
import pytest
import uffd
from support.native import BounceResult, library
from support.pattern import seeded, stress_seconds
from support.scripts import run_script
from uffd import providers

PAGE = uffd._core.PAGE_BYTES
PAGES = 512
VISITS = 4000
THREADS = 4


def visit(region, seed, counts, results, errors):
    result = BounceResult()
    answer = library().oracle_visit(region.address, PAGES, PAGE, seed, VISITS, counts.ctypes.data,
                                    ctypes.byref(result))
    results.append((result.operations, result.wrong))
    if answer:
        errors.append(os.strerror(-answer))


def disturb(region, rng, stop, errors):
    """Prefetch, populate, pin and close at random while the others count."""
    while not stop.is_set():
        start = rng.randrange(PAGES * PAGE)
        where = (start, min(PAGES * PAGE, start + rng.randrange(1, 40 * PAGE)))
        try:
            action = rng.randrange(5)
            if action == 0:
                region.prefetch(where).cancel()
            elif action == 1:
                region.populate(where, timeout_s=20)
            elif action == 2:
                with region.pinned(where):
                    pass
            elif action == 3:
                region.resident(), region.dirty(), region.stats()
            else:
                with uffd.Region(4 * PAGE, providers.Zero(), engine=region.engine, block_bytes=PAGE) as other:
                    other.prefetch()
        except Exception as error:
            errors.append(repr(error))
        stop.wait(0.001)


def bounce(area, counts, rng, options):
    """One round: serve `area` in a new region, count in it, return its bytes and what was done."""
    engine = uffd.Engine(workers=2)
    region = uffd.Region(None, providers.Memory(area), engine=engine, **options)
    results, errors, stop = [], [], threading.Event()
    disturber = threading.Thread(target=disturb, args=(region, rng, stop, errors))
    visitors = [threading.Thread(target=visit, args=(region, rng.randrange(1 << 40), counts, results, errors))
                for _ in range(THREADS)]
    for thread in [disturber, *visitors]:
        thread.start()
    for thread in visitors:
        thread.join()
    stop.set()
    disturber.join()
    array = region.array()
    content = array.copy()
    del array
    region.close()
    engine.close()
    return content, results, errors


@pytest.mark.deadline(60, per_stress_second=3)
def test_bounce(where):
    """Goal: no count is lost and no page is torn, however the area got where it is."""
    rng = seeded("bounce")
    area, counts = np.zeros(PAGES * PAGE, "u1"), np.zeros(PAGES, "u8")
    library().oracle_write(area.ctypes.data, PAGES, PAGE)
    deadline = time.monotonic() + stress_seconds() / 5
    rounds = operations = 0
    while rounds < 2 or time.monotonic() < deadline:
        options = {"block_bytes": PAGE << rng.randrange(5), "readahead_bytes": rng.choice([None, 0]), **where.options}
        area, results, errors = bounce(area, counts, rng, options)
        assert not errors, errors
        assert sum(wrong for _, wrong in results) == 0, f"round {rounds}, {options}"
        wrong = library().oracle_check(area.ctypes.data, PAGES, PAGE, counts.ctypes.data)
        assert wrong == 0, f"{wrong} pages in round {rounds}, {options}"
        operations += sum(done for done, _ in results)
        rounds += 1
    print(f"{rounds} rounds, {operations} page visits")
    assert operations == int(counts.sum())


@pytest.mark.deadline(60, per_stress_second=3)
def test_bounce_with_forks(where):
    """Goal: while a parent counts in its pages, forked children see untorn pages, and take nothing from the parent."""
    run_script("""
from support.native import BounceResult
PAGES = 256
rng = seeded("bounce with forks")
area, counts = np.zeros(PAGES * PAGE, "u1"), np.zeros(PAGES, "u8")
LIB.oracle_write(area.ctypes.data, PAGES, PAGE)
deadline = time.monotonic() + float(sys.argv[1])
rounds = 0
while rounds < 2 or time.monotonic() < deadline:
    r = region(None, providers.Memory(area), block_bytes=PAGE << rng.randrange(5))
    results = [BounceResult() for _ in range(3)]
    answers = []
    def visit(result):
        answers.append(LIB.oracle_visit(r.address, PAGES, PAGE, rng.randrange(1 << 40), 3000, counts.ctypes.data,
                                        ctypes.byref(result)))
    threads = [threading.Thread(target=visit, args=(result,)) for result in results]
    for thread in threads:
        thread.start()
    def child():
        words = r.array("<u8", (PAGES, PAGE // 8))
        assert (words[:, 1] == np.arange(PAGES)).all(), "a child read zeros or another page"
    for _ in range(3):
        assert in_child(child, 20) == 0
    for thread in threads:
        thread.join()
    assert answers == [0] * 3 and not any(result.wrong for result in results)
    area = r.array().copy()
    r.close()
    assert LIB.oracle_check(area.ctypes.data, PAGES, PAGE, counts.ctypes.data) == 0
    rounds += 1
say(f"{rounds} rounds")
""", 50 + 2 * stress_seconds(), where=where, argv=[stress_seconds() / 5]).check()
