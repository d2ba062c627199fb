"""Writers that race the evictor on every page: no update is lost, no page is torn, whatever leaves and comes back.

The kernel's own stress idea (tests/stress/test_bounce.py): a lock and two counters inside each page, and a shadow of
counters outside that decides what is right. Here the area is several times the budget, so that each page leaves memory
and comes back all the time, through the pool, the store and the spill file, while others evict, flush, pin, prefetch,
change the budget, and fork.
"""

import pytest
from support import matrix
from support.pattern import stress_seconds
from support.scripts import run_script

pytestmark = pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing is evicted")

RACE = """
from support.native import BounceResult
rng = seeded("race with the evictor")
mode, seconds, forks = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "forks"
block_pages, blocks, pages = rng.choice([(1, 64, 512), (4, 24, 512), (16, 16, 1024), (1, 400, 1500)])
size = block_pages * PAGE
say(f"blocks of {block_pages} pages, budget of {blocks}, {pages} pages, {mode}")
area, counts = np.zeros(pages * PAGE, "u1"), np.zeros(pages, "u8")
LIB.oracle_write(area.ctypes.data, pages, PAGE)
area.tofile("data")
engine = uffd.Engine(workers=2, budget_bytes=blocks * size)
provider = providers.File("data", writable=mode == "r+")
r = region(None, provider, engine=engine, mode=mode, block_bytes=size, timeout_s=60)
results, answers, errors, stop = [], [], [], threading.Event()
allowed = [blocks * size]
def visit(seed):
    while not stop.is_set() and not errors:
        result = BounceResult()
        answers.append(LIB.oracle_visit(r.address, pages, PAGE, seed, 500, counts.ctypes.data, ctypes.byref(result)))
        results.append(result)
        seed += 1
def disturb():
    while not stop.is_set():
        start = rng.randrange(pages * PAGE)
        where = (start, min(pages * PAGE, start + rng.randrange(1, 6 * size)))
        try:
            action = rng.randrange(8)
            if action == 0:
                r.evict(where)
            elif action == 1:
                r.flush(timeout_s=30)
            elif action == 2:
                with r.pinned(where):
                    assert r.resident()[where[0] // size]
            elif action == 3:
                r.prefetch(where)
            elif action == 4:
                asked = rng.choice([blocks, blocks // 2 + 9, 2 * blocks]) * size
                engine.budget_bytes = asked         # refused where more is pinned, for a child perhaps
                allowed[0] = asked
                deadline = time.monotonic() + 20
                while engine.resident_bytes > allowed[0]:
                    assert time.monotonic() < deadline, "does not shrink"
                    time.sleep(0.001)
            elif action == 5:
                r.dirty(), r.stats(), engine.stats()
            elif action == 6:
                time.sleep(0.01)
            else:
                assert engine.resident_bytes <= allowed[0], (engine.resident_bytes, allowed)
        except uffd.BudgetError:
            pass
        except Exception as error:
            import traceback
            errors.append(traceback.format_exc())
        stop.wait(0.0005)
def child():
    words = r.array("<u8", (pages, PAGE // 8))
    for _ in range(2):
        for page in range(0, pages, 3):
            row = words[page, :4].copy()
            assert row[1] == page, f"page {page} is another one, or zeros: {row}"
            assert engine.resident_bytes <= 2 * blocks * size, engine.resident_bytes
        words[::2, -1] += 1             # private: the parent's store is not touched
    r.flush()
threads = [threading.Thread(target=visit, args=(rng.randrange(1 << 40),)) for _ in range(3)]
threads.append(threading.Thread(target=disturb))
for thread in threads:
    thread.start()
end = time.monotonic() + seconds
children = 0
while time.monotonic() < end or forks and children < 2:
    time.sleep(0.05)
    if forks:
        assert in_child(child, 40) == 0
        children += 1
    if errors:
        break
stop.set()
for thread in threads:
    thread.join(60)
    assert not thread.is_alive(), "hangs"
assert not errors, errors[0]
assert not any(answers), set(answers)
wrong = sum(result.wrong for result in results)
done = sum(result.operations for result in results)
stats = r.stats()
say(f"{done} visits, {wrong} wrong, {children} children, {stats.evicted} evicted, {stats.rescued} rescued, "
    f"{stats.written_back} written back, {stats.evict_busy} busy")
assert wrong == 0 and done == int(counts.sum())
assert stats.evicted > 50 and stats.poisoned == 0
found = r.array().copy()
assert LIB.oracle_check(found.ctypes.data, pages, PAGE, counts.ctypes.data) == 0, "updates were lost"
if mode == "r+":
    r.flush()
    stored_bytes = np.fromfile("data", "u1")
    assert LIB.oracle_check(stored_bytes.ctypes.data, pages, PAGE, counts.ctypes.data) == 0, "the file lacks updates"
    assert stats.written_back > 0
else:
    stored_bytes = np.fromfile("data", "u1")
    zero = np.zeros(pages, "u8")
    assert LIB.oracle_check(stored_bytes.ctypes.data, pages, PAGE, zero.ctypes.data) == 0, "the file was changed"
os._exit(0)
"""


@pytest.mark.deadline(120, per_stress_second=2)
@pytest.mark.parametrize("mode", ["c", "r+"])
def test_race(where, mode):
    """Goal: while writers and everything that takes blocks out, stores them and brings them in race on every page, no
    count is lost, in memory and in the file, and the budget holds."""
    print(run_script(RACE, 90 + stress_seconds(), where=where,
                     argv=[mode, max(0.5, stress_seconds() / 8), "alone"]).check().stdout)


@pytest.mark.deadline(200, per_stress_second=2)
@pytest.mark.parametrize("mode", ["c", "r+"])
def test_race_with_forks(where, mode):
    """Goal: the same while children are forked: they see untorn pages, keep a budget of their own and change nothing of
    the parent's; the parent loses nothing by it."""
    print(run_script(RACE, 150 + stress_seconds(), where=where,
                     argv=[mode, max(0.5, stress_seconds() / 8), "forks"]).check().stdout)
