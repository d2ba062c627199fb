"""Storms: madvise, signals, forks, opens and closes against faults. A shadow decides the content."""

import pytest
from support import matrix
from support.pattern import stress_seconds
from support.scripts import run_script

pytestmark = pytest.mark.deadline(60, per_stress_second=3)


def run(code, where, share=0.12, **options):
    """Run code with `seconds` to spend: a share of UFFD_STRESS_SECONDS."""
    seconds = share * stress_seconds()
    return run_script(f"deadline = time.monotonic() + {seconds}\n" + code, 40 + 2 * seconds, where=where,
                      **options).check()


@pytest.mark.parametrize("advice", ["DONTNEED", "WILLNEED COLD PAGEOUT", "NOHUGEPAGE HUGEPAGE",
                                    "RANDOM SEQUENTIAL NORMAL"])
def test_madvise_storm(where, advice):
    """Goal: madvise of every kind against reads: a page that was dropped comes back with the provider's bytes."""
    run("""
rng = seeded("madvise storm")
provider, control = controlled()
r = region(128 * BLOCK, provider)
libc = ctypes.CDLL(None, use_errno=True)
numbers = {"DONTNEED": 4, "WILLNEED": 3, "COLD": 20, "PAGEOUT": 21, "HUGEPAGE": 14, "NOHUGEPAGE": 15, "RANDOM": 1,
           "SEQUENTIAL": 2, "NORMAL": 0}
advice = [numbers[name] for name in sys.argv[1].split()]
stop, wrong, advised = [], [], 0
def read():
    while not stop:
        if (at := checked(r.address, 0, 128 * BLOCK)) is not None:
            wrong.append(at)
            return
threads = [threading.Thread(target=read) for _ in range(2)]
for thread in threads:
    thread.start()
while time.monotonic() < deadline and not wrong:
    start = rng.randrange(128 * BLOCK // PAGE)
    pages = rng.randrange(1, 64)
    nbytes = min(pages * PAGE, 128 * BLOCK - start * PAGE)
    libc.madvise(ctypes.c_void_p(r.address + start * PAGE), ctypes.c_size_t(nbytes), rng.choice(advice))
    advised += 1
    if advised % 64 == 0:
        r.prefetch((start * PAGE, start * PAGE + nbytes)).cancel()
stop.append(1)
for thread in threads:
    thread.join()
assert not wrong, wrong
say(f"{advised} calls")
""", where, 0.06, argv=[advice])


def test_dropped_page_comes_back(where):
    """Goal: the same without a race, page by page, read first and written first."""
    run("""
provider, control = controlled()
r = region(8 * BLOCK, provider, readahead_bytes=0)
a = r.array()
libc = ctypes.CDLL(None, use_errno=True)
def drop(start, nbytes):
    assert libc.madvise(ctypes.c_void_p(r.address + start), ctypes.c_size_t(nbytes), 4) == 0
assert checked(r.address, 0, 8 * BLOCK) is None
for start, nbytes in ((0, PAGE), (5 * PAGE, PAGE), (BLOCK - PAGE, 2 * PAGE), (2 * BLOCK, 3 * BLOCK)):
    drop(start, nbytes)
    assert checked(r.address, 0, 8 * BLOCK) is None, start
drop(6 * BLOCK, BLOCK)
a[6 * BLOCK + 5 * PAGE] = 1
right = pattern(0, 8 * BLOCK).copy()
right[6 * BLOCK + 5 * PAGE] = 1
assert (a == right).all()
drop(7 * BLOCK, BLOCK)
r.populate()
assert (a == right).all()
""", where)


@pytest.mark.parametrize("user_mode", [False, True], ids=["full", "user"])
def test_signal_storm(where, user_mode):
    """Goal: signals to every touching thread: right bytes, and each block is asked for once."""
    run("""
LIB.install_handler(signal.SIGUSR2, 0)
rng = seeded("signal storm")
sent = 0
while time.monotonic() < deadline:
    provider, control = controlled()
    blocks = 64
    counts = control.count_blocks(blocks * BLOCK, BLOCK)
    control.delay_us = rng.choice([0, 100])
    r = region(blocks * BLOCK, provider, readahead_bytes=rng.choice([None, 0]))
    totals, wrong = [], []
    def touch():
        storm = LIB.storm_start(signal.SIGUSR2, 100)
        if checked(r.address, 0, blocks * BLOCK) is not None:
            wrong.append(1)
        totals.append(LIB.storm_stop(storm))
    threads = [threading.Thread(target=touch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert counts.tolist() == [1] * blocks, counts
    sent += sum(totals)
    r.close()
say(f"{sent} signals")
""", where, 0.08, user_mode=user_mode)


def test_fork_storm(where):
    """Goal: forks, and forks of children, at any moment of touching, populating and closing threads."""
    run("""
rng = seeded("fork storm")
forks = 0
while time.monotonic() < deadline:
    provider, control = controlled()
    control.delay_us = rng.choice([0, 0, 50])
    r = region(64 * BLOCK, provider, block_bytes=PAGE << rng.randrange(5))
    wrong = []
    def touch():
        if checked(r.address, 0, 64 * BLOCK) is not None:
            wrong.append(1)
    def call():
        r.populate((0, 32 * BLOCK))
        r.prefetch((32 * BLOCK, 64 * BLOCK)).wait(10)
    def open_and_close():
        for _ in range(10):
            region(4 * BLOCK, controlled()[0]).close()
    threads = [threading.Thread(target=each) for each in (touch, touch, call, open_and_close)]
    for thread in threads:
        thread.start()
    def grandchild():
        assert checked(r.address, 0, 64 * BLOCK) is None
    def child():
        assert checked(r.address, 0, 64 * BLOCK) is None
        if forks % 4 == 0:
            assert in_child(grandchild) == 0
    for _ in range(3):
        forks += 1
        assert in_child(child, 15) == 0
    for thread in threads:
        thread.join()
    assert not wrong
    r.close()
say(f"{forks} forks")
""", where)


def test_close_storm(where):
    """Goal: regions are opened, touched, prefetched and closed by many threads at once; calls on a region that closes
    meanwhile raise RegionClosed, and nothing else."""
    run("""
engine = uffd.Engine(workers=2)
rng = seeded("close storm")
before = leaks.take()
errors, rounds = [], [0]
def work(seed):
    import random
    mine = random.Random(seed)
    try:
        while time.monotonic() < deadline:
            provider, control = controlled()
            control.delay_us = mine.choice([0, 0, 200])
            r = region(16 * BLOCK, provider, engine=engine, block_bytes=PAGE << mine.randrange(5))
            def use():
                try:
                    for _ in range(20):
                        r.prefetch(), r.populate((0, 2 * BLOCK)), r.resident(), r.stats()
                except uffd.RegionClosed:
                    pass
                except Exception as error:
                    errors.append(repr(error))
            user = threading.Thread(target=use)
            user.start()
            if mine.random() < 0.5 and checked(r.address, 0, 4 * BLOCK) is not None:
                errors.append("wrong bytes")
            r.close()
            user.join()
            rounds[0] += 1
    except Exception as error:
        errors.append(repr(error))
threads = [threading.Thread(target=work, args=(rng.random(),)) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors[:3]
left = [line for line in leaks.settle(before, 5.0) if not line.startswith("mappings")]  # malloc's arenas, stacks
assert not left, left
engine.close()
say(f"{rounds[0]} regions")
""", where)


def test_last_array_storm(where):
    """Goal: arrays that die on other threads than the one that closes; the engine goes while its arrays live."""
    run("""
rng = seeded("last array storm")
before = None
rounds = 0
while time.monotonic() < deadline or rounds < 5:
    engine = uffd.Engine(workers=1)
    wrong = []
    def read(array):
        if not (array == pattern(0, 16 * BLOCK)).all():
            wrong.append(1)
    with engine:
        threads = []
        for _ in range(3):
            with region(16 * BLOCK, controlled()[0], engine=engine) as r:
                threads += [threading.Thread(target=read, args=(r.array(),)) for _ in range(2)]
                for thread in threads[-2:]:
                    thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    del engine, threads, thread, r
    gc.collect()
    rounds += 1
    if rounds == 2:
        before = leaks.take()
left = leaks.settle(before, 5.0)
assert not left, left
""", where, 0.08)


def test_everything_at_once(where):
    """Goal: random actions of many threads on one region against a shadow, each thread owning its share of blocks."""
    run("""
rng = seeded("everything at once")
THREADS, SHARE = 6, 24
rounds = 0
while time.monotonic() < deadline:
    provider, control = controlled()
    control.delay_us = rng.choice([0, 0, 100])
    nbytes = THREADS * SHARE * BLOCK
    r = region(nbytes, provider, block_bytes=PAGE << rng.randrange(6), readahead_bytes=rng.choice([None, 0]))
    a, shadow, errors = r.array(), pattern(0, nbytes).copy(), []
    def work(number, seed):
        import random
        mine = random.Random(seed)
        low, high = number * SHARE * BLOCK, (number + 1) * SHARE * BLOCK
        try:
            for _ in range(150):
                start = mine.randrange(low, high)
                stop = min(high, start + mine.choice([1, 50, PAGE, 3 * BLOCK]))
                action = mine.randrange(6)
                if action == 0:
                    a[start:stop] = shadow[start:stop] = mine.randrange(256)
                elif action == 1:
                    r.populate((start, stop))
                elif action == 2:
                    r.prefetch((start, stop))
                elif action == 3:
                    with uffd.pinned(a[start:stop]):
                        a[start:stop] += 1
                    shadow[start:stop] += 1
                elif not (a[start:stop] == shadow[start:stop]).all():
                    errors.append((number, start, stop))
                    return
        except Exception as error:
            errors.append(repr(error))
    threads = [threading.Thread(target=work, args=(n, rng.random())) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[:3]
    assert (a == shadow).all()
    del a
    r.close()
    rounds += 1
say(f"{rounds} rounds")
""", where)


def test_many_regions_at_once(where):
    """Goal: hundreds of regions share an engine, touched at random by many threads."""
    run("""
rng = seeded("many regions")
engine = uffd.Engine(workers=2)
while time.monotonic() < deadline:
    regions = [region(4 * BLOCK, controlled(Control(seed=n))[0], engine=engine) for n in range(200)]
    orders = [rng.sample(range(200), 200) for _ in range(4)]
    wrong = []
    def touch(order):
        for n in order:
            if checked(regions[n].address, 0, 4 * BLOCK, n) is not None:
                wrong.append(n)
    threads = [threading.Thread(target=touch, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    for r in regions:
        r.close()
""", where, 0.08)


def test_all_of_the_matrix_together():
    """Goal: regions of every delivery and backing side by side, one copied into the other."""
    places = [place for place in matrix.WHERES if place.unavailable() is None]
    if len(places) < 2:
        pytest.skip("only one delivery and backing to be had here")
    run("""
from support.matrix import WHERES
places = [place for place in WHERES if place.unavailable() is None]
while time.monotonic() < deadline:
    for first in places:
        for second in places:
            with uffd.Engine(workers=1) as one, uffd.Engine(workers=1) as two:
                source = uffd.Region(16 * BLOCK, controlled()[0], engine=one, **first.options)
                target = uffd.Region(16 * BLOCK, providers.Zero(), engine=two, **second.options)
                a, b = source.array(), target.array()
                b[:] = a
                assert checked(target.address, 0, 16 * BLOCK) is None, (str(first), str(second))
                assert target.dirty().all() and not source.dirty().any()
                del a, b
""", None, 0.12)
