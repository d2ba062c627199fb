"""The budget: what may be asked, what counts, that it is never exceeded, and that the smallest one makes progress."""

import contextlib
import os
import threading
import time

import numpy as np
import pytest
import uffd
from support.native import controlled, library
from support.pattern import pattern
from support.scripts import finish_script, run_script, start_script
from support.stores import stored

PAGE = uffd._core.PAGE_BYTES
BLOCK = 65536
SMALL = 4 * PAGE                # of a block, where a budget of many blocks is to be little memory


def wait_until(condition, what, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def least(engine, block_bytes):
    """What `engine` needs with regions of that block size."""
    return uffd._core.least_budget(engine._threads, block_bytes)


class Sampled:
    """A context in which a thread looks at engine.resident_bytes all the time; `most` is the highest it saw."""

    def __init__(self, engine):
        self.engine, self.most, self.looks, self.stop = engine, 0, 0, threading.Event()
        self.thread = threading.Thread(target=self.look)

    def look(self):
        while not self.stop.is_set():
            self.most = max(self.most, self.engine.resident_bytes)
            self.looks += 1
            if self.looks % 64 == 0:
                time.sleep(0.0005)  # others want the interpreter, too

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.stop.set()
        self.thread.join()


# ---- what may be asked


@pytest.mark.parametrize("asked", [1 << 26, np.int64(1 << 26), 10 << 20])
def test_a_number(asked):
    with uffd.Engine(workers=1, budget_bytes=asked) as engine:
        assert engine.budget_bytes == asked and engine.resident_bytes == 0


def test_no_limit():
    with uffd.Engine(workers=1, budget_bytes=None) as engine:
        assert engine.budget_bytes is None


def test_auto_is_part_of_what_there_is():
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    with uffd.Engine(workers=1) as engine:
        assert 0 < engine.budget_bytes <= 0.7 * available


@pytest.mark.parametrize(("text", "argument", "right"), [
    (str(1 << 26), {}, 1 << 26), (str(1 << 26), {"budget_bytes": "auto"}, 1 << 26),
    (str(1 << 26), {"budget_bytes": 1 << 25}, 1 << 25), (str(1 << 26), {"budget_bytes": None}, None),
    ("", {"budget_bytes": 1 << 25}, 1 << 25)])
def test_environment(monkeypatch, text, argument, right):
    """Goal: UFFD_BUDGET_BYTES is what "auto" means; what the program says itself stands."""
    monkeypatch.setenv("UFFD_BUDGET_BYTES", text)
    with uffd.Engine(workers=1, **argument) as engine:
        assert engine.budget_bytes == right


@pytest.mark.parametrize("text", ["lots", "64M", "0", "-5", "1e9"])
def test_environment_refused(monkeypatch, text):
    monkeypatch.setenv("UFFD_BUDGET_BYTES", text)
    with pytest.raises(ValueError, match=r"UFFD_BUDGET_BYTES|budget_bytes"):
        uffd.Engine(workers=1)


@pytest.mark.parametrize(("asked", "error"), [
    (0, ValueError), (-1, ValueError), ("64M", ValueError), ("", ValueError), (1.5, TypeError), ([1], TypeError),
    (1, uffd.BudgetError), (PAGE, uffd.BudgetError)])
def test_refused(asked, error):
    """Goal: nonsense is refused, when the engine is made and later, and then nothing has changed."""
    with pytest.raises(error):
        uffd.Engine(workers=1, budget_bytes=asked)
    with uffd.Engine(workers=1, budget_bytes=1 << 26) as engine:
        with pytest.raises(error):
            engine.budget_bytes = asked
        assert engine.budget_bytes == 1 << 26


def test_too_small_is_refused_with_numbers():
    """Goal: the message has what was asked, what is pinned and the least; the least itself is taken."""
    with uffd.Engine(workers=2, budget_bytes=1 << 26) as engine:
        region = uffd.Region(16 * BLOCK, controlled()[0], engine=engine)
        few = least(engine, BLOCK)
        assert few == 8 * BLOCK
        with region.pinned((0, 3 * BLOCK)):
            with pytest.raises(uffd.BudgetError) as caught:
                engine.budget_bytes = few
            for number in (few, 3 * BLOCK, few + 3 * BLOCK):
                assert str(number) in str(caught.value)
            engine.budget_bytes = few + 3 * BLOCK
        engine.budget_bytes = few
        with pytest.raises(uffd.BudgetError):
            engine.budget_bytes = few - 1
        assert engine.budget_bytes == few


def test_region_with_too_large_blocks(where):
    """Goal: a region that the budget could not serve is refused when it is made, and leaves the engine as it was."""
    with uffd.Engine(workers=2, budget_bytes=16 * BLOCK) as engine:
        small = uffd.Region(8 * BLOCK, controlled()[0], engine=engine, **where.options)
        with pytest.raises(uffd.BudgetError, match=f"{16 * BLOCK}.*{8 * 4 * BLOCK}"):
            uffd.Region(8 << 20, controlled()[0], engine=engine, block_bytes=4 * BLOCK, **where.options)
        assert engine.budget_bytes == 16 * BLOCK
        engine.budget_bytes = 8 * BLOCK  # the large blocks do not count any more
        array = small.array()
        np.testing.assert_array_equal(array, pattern(0, 8 * BLOCK))
        del array


def test_closed_engine():
    engine = uffd.Engine(workers=1, budget_bytes=1 << 26)
    engine.close()
    assert engine.resident_bytes == 0
    with pytest.raises(ValueError, match="closed"):
        engine.budget_bytes = 1 << 26


# ---- what counts


def test_all_is_counted(make, engine):
    """Goal: what is there, what was moved out and waits, what is pinned and what is on its way counts, once each."""
    engine.budget_bytes = None
    provider, control = controlled()
    region = make(64 * BLOCK, provider, readahead_bytes=0)
    assert engine.resident_bytes == 0
    region.populate((0, 8 * BLOCK))
    assert engine.resident_bytes == 8 * BLOCK
    with region.pinned((4 * BLOCK, 12 * BLOCK)), region.pinned((4 * BLOCK, 5 * BLOCK)):
        assert engine.resident_bytes == 12 * BLOCK
    control.close_gate(20 * BLOCK, 21 * BLOCK)
    touch = threading.Thread(target=library().touch_sum, args=(region.address + 20 * BLOCK, 1, 1))
    touch.start()
    wait_until(lambda: control.gate_waiters, "no fill under way")
    assert engine.resident_bytes == 13 * BLOCK
    control.open_gate()
    touch.join()
    assert engine.resident_bytes == 13 * BLOCK
    assert region.evict((0, 2 * BLOCK)) == 2 * BLOCK
    assert engine.resident_bytes == 11 * BLOCK == int(region.resident().sum()) * BLOCK


def test_a_fill_that_fails_counts_no_more(make, engine):
    provider, control = controlled()
    control.fail(0, 4 * BLOCK, 5)
    region = make(8 * BLOCK, provider, retries=0, readahead_bytes=0)
    for _ in range(3):
        with pytest.raises(uffd.ProviderError):
            region.populate()
    region.discard()
    region.evict()
    assert engine.resident_bytes == int(region.resident().sum()) * BLOCK == 0


def test_the_last_block_counts_in_pages(make, engine):
    region = make(2 * BLOCK + 100, controlled()[0])
    region.populate()
    assert engine.resident_bytes == 2 * BLOCK + PAGE
    assert region.evict() == 2 * BLOCK + PAGE
    assert engine.resident_bytes == 0


@pytest.mark.parametrize("limited", [False, True])
def test_closing_gives_all_back(where, limited):
    """Goal: with its regions an engine's memory goes, whatever state it was in: clean, dirty, waiting, recycled."""
    with uffd.Engine(workers=2, budget_bytes=40 * SMALL if limited else None) as engine:
        for mode in ("r", "c", "r+"):
            provider, _ = stored(100 * SMALL)
            region = uffd.Region(100 * SMALL, provider, engine=engine, mode=mode, block_bytes=SMALL, **where.options)
            array = region.array()
            for _ in range(2):
                if mode != "r":
                    array[::3 * SMALL] += 1
                assert array[::SMALL].sum() >= 0
            del array
            assert engine.resident_bytes > 0
            region.close()
            wait_until(lambda: engine.resident_bytes == 0, f"{engine.resident_bytes} bytes are left of mode {mode}", 3)


# ---- changing it


def test_shrinking_evicts_at_once(make, engine):
    """Goal: lowered, the budget holds again in a moment, with no touch to help; raised, it can be filled again."""
    engine.budget_bytes = None
    region = make(256 * SMALL, controlled()[0], block_bytes=SMALL)
    array = region.array()
    array[::5 * SMALL] += 1
    region.populate()
    assert engine.resident_bytes == 256 * SMALL
    engine.budget_bytes = 64 * SMALL
    wait_until(lambda: engine.resident_bytes <= 64 * SMALL, "it does not shrink")
    assert int(region.resident().sum()) <= 64
    right = pattern(0, 256 * SMALL).copy()
    right[::5 * SMALL] += 1
    np.testing.assert_array_equal(array, right)
    engine.budget_bytes = 1 << 26
    region.populate()
    assert engine.resident_bytes == 256 * SMALL
    np.testing.assert_array_equal(array, right)
    del array


@pytest.mark.deadline(60, per_stress_second=4)
def test_changed_while_threads_touch(where):
    """Goal: content stays right, and the budget of the moment is kept soon after each change."""
    run_script("""
rng = seeded("budget changes")
engine = uffd.Engine(workers=2, budget_bytes=64 * PAGE)
provider, store = stored(512 * PAGE)
r = region(None, provider, engine=engine, block_bytes=PAGE)
a = r.array("<u8", (512, PAGE // 8))
model = store.held.view("<u8").reshape(512, PAGE // 8).copy()
stop, errors = threading.Event(), []
def work(mine, rng):
    while not stop.is_set():
        row = rng.randrange(mine, 512, 3)
        if not np.array_equal(a[row], model[row]):
            errors.append(row)
        a[row] += 1
        model[row] += 1
import random
threads = [threading.Thread(target=work, args=(n, random.Random(rng.random()))) for n in range(3)]
for thread in threads:
    thread.start()
deadline = time.monotonic() + float(sys.argv[1])
while time.monotonic() < deadline:
    budget = rng.choice([16, 40, 100, 300, 600]) * PAGE
    engine.budget_bytes = budget
    wait_until(lambda: engine.resident_bytes <= budget, f"{engine.resident_bytes} and no less than {budget}")
    for _ in range(200):
        assert engine.resident_bytes <= budget
stop.set()
for thread in threads:
    thread.join()
assert not errors, errors
r.flush()
assert np.array_equal(store.held.view("<u8").reshape(model.shape), model)
say(r.stats())
""", 40 + 2 * 5, where=where, argv=[1.0]).check()


# ---- never above it


TRAFFIC = """
rng = seeded("traffic")
BLOCKS, SIZE, BUDGET = 400, 4 * PAGE, 60 * 4 * PAGE
engine = uffd.Engine(workers=2, budget_bytes=BUDGET)
mode = sys.argv[1]
provider, store = stored(BLOCKS * SIZE)
r = region(None, provider, engine=engine, block_bytes=SIZE, mode=mode)
a = r.array("u1", (BLOCKS, SIZE))
model = store.held.reshape(BLOCKS, SIZE).copy()
most, stop, errors = [0], threading.Event(), []
def look():
    while not stop.is_set():
        for _ in range(50):
            most[0] = max(most[0], engine.resident_bytes)
        time.sleep(0.0005)
def work(mine, rng):
    try:
        while not stop.is_set():
            block = rng.randrange(mine, BLOCKS, 4)
            if not np.array_equal(a[block], model[block]):
                errors.append(f"block {block} is wrong")
            if mode != "r" and rng.random() < 0.5:
                value = rng.randrange(256)
                a[block] = value
                model[block] = value
            if rng.random() < 0.05:
                start = rng.randrange(BLOCKS - 20)
                with r.pinned((start * SIZE, (start + 4) * SIZE)):
                    r.prefetch((start * SIZE, (start + 20) * SIZE))
    except Exception as error:
        errors.append(repr(error))
import random
threads = [threading.Thread(target=work, args=(n, random.Random(rng.random()))) for n in range(4)]
threads.append(threading.Thread(target=look))
for thread in threads:
    thread.start()
time.sleep(float(sys.argv[2]))
stop.set()
for thread in threads:
    thread.join()
stats = r.stats()
say(f"most {most[0] / BUDGET:.3f} of the budget, {stats.evicted} evicted, {stats.rescued} rescued")
assert not errors, errors[:5]
assert most[0] <= BUDGET, (most[0], BUDGET)
assert most[0] > BUDGET // 2 and stats.evicted > 100, stats
assert np.array_equal(a, model)
"""


@pytest.mark.deadline(60)
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_never_above_the_budget(where, mode):
    """Goal: whatever threads touch, write, pin and prefetch, resident_bytes stays within; and all of it is right.
    Method: four threads, data of 6.7 x the budget, a thread that looks all the time."""
    run_script(TRAFFIC, 40, where=where, argv=[mode, 0.7]).check()


def test_blocks_of_several_sizes_share_it(where):
    """Goal: regions of all block sizes live from one budget, none of them starves another, and no update is lost.
    Method: two processes at once, so that threads are stopped anywhere; a fault that is answered late, from a state
    that is over, has shown itself here in three of four runs."""
    script = """
sizes = [PAGE, 4 * PAGE, 16 * PAGE, 64 * PAGE]
engine = uffd.Engine(workers=2, budget_bytes=4 << 20)
regions, arrays, models = [], [], []
for n, size in enumerate(sizes):
    provider, store = stored(3 << 20)
    r = region(None, provider, engine=engine, block_bytes=size, mode="c")
    regions.append(r)
    arrays.append(r.array("<u8", (768, 512)))
    models.append(store.held.view("<u8").reshape(768, 512).copy())
errors, most = [], 0
def work(n):
    rng = np.random.default_rng(n)
    for row in rng.integers(0, 768, 4000):
        if not np.array_equal(arrays[n][row], models[n][row]):
            errors.append((n, int(row)))
        arrays[n][row] += 1
        models[n][row] += 1
threads = [threading.Thread(target=work, args=(n,)) for n in range(len(sizes))]
for thread in threads:
    thread.start()
while any(thread.is_alive() for thread in threads):
    most = max(most, engine.resident_bytes)
    time.sleep(0.0002)
assert not errors, errors[:5]
assert most <= 4 << 20, most
for array, model in zip(arrays, models):
    assert np.array_equal(array, model)
assert all(r.stats().evicted > 0 for r in regions), [r.stats().evicted for r in regions]
"""
    for process in [start_script(script, where=where) for _ in range(2)]:
        finish_script(process, 55).check()


@pytest.mark.deadline(60)
@pytest.mark.parametrize("threads", [1, 2, 6])
def test_the_smallest_budget_makes_progress(where, threads):
    """Goal: with the least budget that is taken, copies between two regions end, by any number of threads.
    Method: np.copyto of whole regions, in slices that are not aligned, so that an instruction needs four blocks."""
    run_script("""
engine = uffd.Engine(workers=2)
n, size = int(sys.argv[1]), 24 * 4 * PAGE
provider, store = stored(size)
source = region(None, provider, engine=engine, block_bytes=4 * PAGE, mode="r")
target = region(size, providers.Zero(), engine=engine, block_bytes=4 * PAGE)
engine.budget_bytes = uffd._core.least_budget(engine._threads)
assert engine.budget_bytes == 8 * 4 * PAGE
a, b = source.array(), target.array()
edges = np.linspace(0, size - 3, n + 1).astype(int)
def copy(first, last):
    b[first + 3:last + 3] = a[first:last]
threads = [threading.Thread(target=copy, args=pair, daemon=True) for pair in zip(edges[:-1], edges[1:])]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(25)
    assert not thread.is_alive(), f"no progress: {source.stats()} {target.stats()}"
assert (b[:3] == 0).all() and np.array_equal(b[3:], store.held[:-3])
say(f"{target.stats().evict_waits} waits")
""", 40, where=where, argv=[threads]).check()


# ---- pins, populate, prefetch


def test_pins_beyond_it(make, engine):
    """Goal: more pins than there is room for is a BudgetError with the numbers; nothing is pinned by it then."""
    engine.budget_bytes = 32 * BLOCK
    region = make(64 * BLOCK, controlled()[0])
    array = region.array()
    for _ in range(2):
        with pytest.raises(uffd.BudgetError) as caught, uffd.pinned(array):
            pytest.fail("entered")
        for number in (64 * BLOCK, 32 * BLOCK, 8 * BLOCK):
            assert str(number) in str(caught.value), number
        assert isinstance(caught.value, MemoryError) and "chunks" in str(caught.value)
    with uffd.pinned(array[:24 * BLOCK]), uffd.pinned(array[8 * BLOCK:20 * BLOCK]):
        with pytest.raises(uffd.BudgetError, match=str(24 * BLOCK)), uffd.pinned(array[24 * BLOCK:25 * BLOCK]):
            pytest.fail("entered")
        for start in range(0, 64 * BLOCK, BLOCK):  # the others still come and go
            assert array[start] == pattern(start, 1)[0]
        assert region.resident()[:24].all()
        assert engine.resident_bytes <= 32 * BLOCK
    with uffd.pinned(array[-24 * BLOCK:]):
        np.testing.assert_array_equal(array, pattern(0, 64 * BLOCK))
    del array


def test_pins_stay_whatever_is_touched(make, engine):
    """Goal: a pinned block does not leave, and its address holds its bytes, while all else comes and goes."""
    engine.budget_bytes = 16 * SMALL
    provider, store = stored(128 * SMALL)
    region = make(None, provider, block_bytes=SMALL)
    array = region.array()
    with region.pinned((10 * SMALL, 14 * SMALL)):
        for _ in range(3):
            array[::SMALL] += 1
            assert region.resident()[10:14].all()
        assert engine.resident_bytes <= 16 * SMALL
    assert (array[::SMALL] == pattern(0, 128 * SMALL)[::SMALL] + np.uint8(3)).all()
    del array


def test_chunks_of_more_than_the_budget(make, engine):
    """Goal: an array of four times the budget is gone through in pinned pieces, and changed by it."""
    engine.budget_bytes = 32 * BLOCK
    provider, store = stored(128 * BLOCK)
    region = make(None, provider)
    array = region.array()
    with Sampled(engine) as sampled:
        for piece in uffd.chunks(array, 4 * BLOCK):
            piece ^= np.uint8(255)
    assert sampled.most <= 32 * BLOCK
    del piece
    np.testing.assert_array_equal(array, ~pattern(0, 128 * BLOCK))
    region.flush()
    np.testing.assert_array_equal(store.held, ~pattern(0, 128 * BLOCK))
    del array


def test_populate_beyond_it(make, engine):
    engine.budget_bytes = 32 * BLOCK
    region = make(64 * BLOCK, controlled()[0])
    with pytest.raises(uffd.BudgetError, match=f"{64 * BLOCK}.*{32 * BLOCK}"):
        region.populate()
    assert engine.resident_bytes <= 32 * BLOCK
    region.populate((0, 20 * BLOCK))
    assert region.resident()[:20].all()
    region.populate((40 * BLOCK, 60 * BLOCK))
    assert region.resident()[40:60].all()
    assert engine.resident_bytes <= 32 * BLOCK


def test_prefetch_beyond_it(make, engine):
    """Goal: a prefetch of more than the budget ends, within it, and what it could not bring comes by touch."""
    engine.budget_bytes = 32 * BLOCK
    region = make(128 * BLOCK, controlled()[0])
    with Sampled(engine) as sampled:
        ahead = region.prefetch()
        ahead.wait(20)
        assert ahead.done()
    assert sampled.most <= 32 * BLOCK
    assert 0 < int(region.resident().sum()) <= 32
    array = region.array()
    np.testing.assert_array_equal(array, pattern(0, 128 * BLOCK))
    del array


def test_waits_are_counted(make, engine):
    """Goal: evict_waits counts touches that found no room, and no others."""
    region = make(256 * SMALL, controlled()[0], block_bytes=SMALL, readahead_bytes=0)
    array = region.array()
    assert array[::SMALL].sum() > 0 and region.stats().evict_waits == 0
    region.evict()
    engine.budget_bytes = 16 * SMALL
    with region.pinned((0, 8 * SMALL)):
        for _ in range(4):
            assert array[::SMALL].sum() > 0
    stats = region.stats()
    assert 0 < stats.evict_waits <= stats.faults_read + stats.faults_write + stats.faults_wp + stats.blocks_demand
    assert engine.stats().evict_waits == stats.evict_waits
    del array


# ---- memory cgroups


def cgroup_v1():
    """The folder of this process's own memory cgroup of version 1, or why there is none to be had."""
    if os.geteuid():
        return "a cgroup is made by root"
    with open("/proc/self/cgroup") as file:
        own = [line.strip().split(":", 2)[2] for line in file if "memory" in line.split(":")[1].split(",")]
    folder = "/sys/fs/cgroup/memory" + (own[0] if own else "")
    if not own or not os.access(folder, os.W_OK):
        return "no memory cgroup of version 1"
    return folder


@contextlib.contextmanager
def cgroup(name):
    """A memory cgroup for a child process; skips the test where none can be made. Empty when the context ends."""
    parent = cgroup_v1()
    folder = os.path.join(parent, f"{name}-{os.getpid()}")
    try:
        if not parent.startswith("/"):
            pytest.skip(parent)
        os.mkdir(folder)
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made: {error}")
    try:
        yield folder
    finally:
        deadline = time.monotonic() + 5
        while True:
            try:
                os.rmdir(folder)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


FOLLOWS = """
folder = sys.argv[1]
def number(name):
    with open(f"{folder}/{name}") as file:
        return int(file.read())
def lower(nbytes):
    # Version 1 refuses a limit below what is in use and can't be reclaimed: who lowers it by much goes in steps.
    deadline = time.monotonic() + 10
    while True:
        try:
            with open(f"{folder}/memory.limit_in_bytes", "w") as file:
                file.write(str(nbytes))
            return
        except OSError as error:
            assert error.errno == errno.EBUSY and time.monotonic() < deadline, (nbytes, number("memory.usage_in_bytes"))
            time.sleep(0.02)
lower(600 << 20)
with open(f"{folder}/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
engine = uffd.Engine(workers=2, budget_bytes=sys.argv[2] if sys.argv[2] == "auto" else int(sys.argv[2]))
first = engine.budget_bytes
assert 100 << 20 < first < 600 << 20, first
r = region(400 << 20, providers.Zero(), engine=engine)
a = r.array()
a[::PAGE] = 7
assert engine.resident_bytes <= first
share = 0.6 if sys.argv[2] == "auto" else 0.9
for step in (560, 520, 480, 440, 400, 360, 320):
    began = time.monotonic()
    lower(step << 20)
    wait_until(lambda: engine.budget_bytes <= step * share * (1 << 20), f"a limit of {step} MiB is not followed", 3.0)
    followed = time.monotonic() - began
    now = engine.budget_bytes
    wait_until(lambda: engine.resident_bytes <= engine.budget_bytes, "it does not shrink")
    say(f"{step} MiB: {now >> 20} MiB after {followed:.2f} s")
    assert followed < 1.6, followed
a[::PAGE] += 1
assert (a[::PAGE] == 8).all()
assert engine.resident_bytes < 320 << 20
lower(600 << 20)
wait_until(lambda: engine.budget_bytes > now * 1.2, "the raised limit is not followed", 3.0)
"""


@pytest.mark.deadline(120)
@pytest.mark.parametrize("asked", ["auto", str(500 << 20)])
def test_the_cgroups_limit_is_followed(asked):
    """Goal: a memory cgroup whose limit is lowered has a lower budget within about a second, and keeps within it: the
    process is not killed and does not swap itself to death; raised again, the budget comes back."""
    with cgroup("uffd-budget") as folder:
        run_script(FOLLOWS, 90, where="thread-anon", argv=[folder, asked], fresh=True).check()


def test_the_cgroup_has_no_room():
    """Goal: a budget of which the cgroup leaves less than the least is refused, with its numbers."""
    with cgroup("uffd-no-room") as folder:
        run_script("""
folder = sys.argv[1]
with open(f"{folder}/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
engine = uffd.Engine(workers=2, budget_bytes=1 << 30)
r = region(64 << 20, providers.Zero(), engine=engine, block_bytes=16 << 20)
with open(f"{folder}/memory.limit_in_bytes", "w") as file:
    file.write(str(100 << 20))
try:
    engine.budget_bytes = 1 << 30
    say("taken")
except uffd.BudgetError as error:
    assert str(1 << 30) in str(error) and str(8 * 16 << 20) in str(error), error
    say("refused")
""", 30, where="thread-anon", argv=[folder], fresh=True).check()


def test_a_forked_child_counts_for_itself(where):
    """Goal: a child keeps within the budget, too; its parent's sum does not move."""
    run_script("""
engine = uffd.Engine(workers=2, budget_bytes=32 * PAGE)
provider, store = stored(256 * PAGE)
r = region(None, provider, engine=engine, block_bytes=PAGE, mode="c", readahead_bytes=0)
a = r.array("<u8", (256, PAGE // 8))
right = store.held.view("<u8").reshape(a.shape) + np.uint64(1)
a += 1

def child():
    for _ in range(2):
        for row in range(256):
            assert np.array_equal(a[row], right[row]), row
            a[row] += 0
            assert engine.resident_bytes <= 32 * PAGE, (row, engine.resident_bytes)
for _ in range(2):      # what is dirty in shared memory at a fork stays in it: it is to be little
    assert a[64:].any()
assert in_child(child, 20) == 0
assert engine.resident_bytes <= 32 * PAGE
assert np.array_equal(a, right)
""", 40, where=where).check()
