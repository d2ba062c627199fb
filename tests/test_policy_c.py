"""uffd/_policy.h, compiled by itself: it does what a plain model does, and it is good at it.

Goal: any sequence of calls, with late, double and wrong ones among them, gives what a model of lists gives, block by
block and byte by byte; nothing corrupts it; and what it keeps in memory is worth keeping: above FIFO and LRU on scan +
loop, at most 2 points below LRU on Zipf, no collapse where a program turns to something new or the budget is tiny.
Method: the header is compiled with gcc into a library for ctypes and, with sanitizers, into a program that calls at
random (policy_harness.c). Quality is asserted on the simulator of benchmarks/, with fixed seeds: hit ratios are the
same on every machine.
"""

import ctypes
import functools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS / "policy_harness.c"
INCLUDE = TESTS.parent / "uffd"
BENCHMARKS = TESTS.parent / "benchmarks"
CFLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", f"-I{INCLUDE}"]
SEED = int(os.environ.get("UFFD_SEED", random.SystemRandom().randrange(1 << 32)))
NO_LIMIT = (1 << 64) - 1
FREE, SMALL, MAIN, POOL, HAND, GHOST = range(6)

if shutil.which("gcc") is None:
    pytest.skip("gcc is not installed: the C harness cannot be built", allow_module_level=True)
if not (INCLUDE / "_policy.h").exists() or not BENCHMARKS.is_dir():
    pytest.skip("the source tree is not here: uffd/_policy.h is compiled by itself", allow_module_level=True)

sys.path.insert(0, str(BENCHMARKS))
import policy_sim as sim  # noqa: E402


def compile_harness(target, *flags):
    subprocess.run(["gcc", *CFLAGS, *flags, str(SOURCE), "-o", str(target)], check=True, capture_output=True,
                   timeout=120)
    return target


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    path = compile_harness(tmp_path_factory.mktemp("policy") / "harness.so", "-O2", "-shared", "-fPIC")
    c = ctypes.CDLL(str(path))
    c.policy_test_make.restype = ctypes.c_void_p
    c.policy_test_ref.restype = ctypes.c_uint64
    return c


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The program, under the address and undefined-behaviour sanitizers."""
    target = tmp_path_factory.mktemp("policy") / "harness"
    try:
        return compile_harness(target, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"gcc cannot build with sanitizers here: {error.stderr.decode()[-200:]}")


class Policy:
    """The header's, by the names of its functions."""

    def __init__(self, c, capacity):
        self.c, self.capacity = c, capacity
        self.handle = ctypes.c_void_p(c.policy_test_make(capacity))
        assert self.handle.value

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.c.policy_test_free(self.handle)

    def __getattr__(self, name):
        function = getattr(self.c, f"policy_test_{name}")
        if name == "limit":
            return lambda nbytes: function(self.handle, ctypes.c_uint64(nbytes))
        if name == "filled":
            return lambda node, ref, shift, ahead=0: function(self.handle, node, ctypes.c_uint64(ref), shift, ahead)
        return functools.partial(function, self.handle)

    def bytes(self):
        out = (ctypes.c_uint64 * 3)()
        self.c.policy_test_bytes(self.handle, out)
        return list(out)

    def order(self, queue):
        out = (ctypes.c_uint32 * self.capacity)()
        return out[:self.c.policy_test_order(self.handle, queue, out)]


class Block:
    def __init__(self, ref, shift):
        self.ref, self.shift = ref, shift
        self.queue = self.source = None
        self.laps = self.hot = self.ahead = 0


class Model:
    """The same by lists, the oldest first; blocks are its own objects, named by the node that the header gave them."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.blocks = {}  # node -> Block
        self.queues = {queue: [] for queue in (SMALL, MAIN, POOL, HAND, GHOST)}
        self.backs = 0
        self.evicting = False
        self.limit(NO_LIMIT)

    def nbytes(self, *queues):
        return sum(1 << self.blocks[node].shift for queue in queues for node in self.queues[queue])

    def limit(self, budget):
        self.budget = budget
        share = (lambda percent: budget) if budget == NO_LIMIT else (lambda percent: budget * percent // 100)
        self.small_limit, self.pool_limit, self.ghost_limit = share(10), share(10), share(90)
        self.trim()

    def trim(self):
        while self.nbytes(GHOST) > self.ghost_limit:
            self.forget(self.queues[GHOST][0])

    def queue(self, node):
        return self.blocks[node].queue if node in self.blocks else FREE

    def pull(self, node):
        self.queues[self.blocks[node].queue].remove(node)

    def push(self, node, queue):
        self.queues[queue].append(node)
        self.blocks[node].queue = queue
        if queue in (SMALL, MAIN):
            self.blocks[node].source = queue

    def move(self, node, queue):
        self.pull(node)
        self.push(node, queue)
        return node

    def forget(self, node):
        if node in self.blocks:
            self.pull(node)
            del self.blocks[node]

    def has_room(self):
        if self.nbytes(SMALL, MAIN, POOL, HAND) < self.budget // 4 * 3:
            self.evicting = False
        return not self.evicting and self.nbytes(SMALL) >= self.small_limit

    def filled(self, node, ref, shift, ahead, given):
        """`given`: the node that the header answered, which names a new block."""
        block = self.blocks.get(node)
        if block and block.ref == ref and block.queue != GHOST:
            self.rescued(node)
            return node
        to_main = False
        if block and block.ref == ref:
            to_main = not ahead or block.ahead
            block.ahead = ahead
            self.pull(node)
            block.shift = shift
        else:
            if len(self.blocks) == self.capacity - 1:
                if not self.queues[GHOST]:
                    return 0
                self.forget(self.queues[GHOST][0])
            assert given not in self.blocks, "a node that is in use was given to another block"
            assert 0 < given < self.capacity
            node = given
            self.blocks[node] = Block(ref, shift)
        self.push_new(node, to_main)
        return node

    def push_new(self, node, to_main):
        block = self.blocks[node]
        block.queue = None
        room = self.has_room()
        self.push(node, MAIN if to_main or room else SMALL)

    def rescued(self, node):
        if self.queue(node) in (POOL, HAND):
            block = self.blocks[node]
            block.laps, block.hot, block.ahead = 2, 1, 0
            self.move(node, MAIN)

    def next(self):
        small, main = self.queues[SMALL], self.queues[MAIN]
        from_small = self.nbytes(SMALL) > self.small_limit and (len(small) > 16 or
                                                                 self.nbytes(SMALL) > self.budget // 2)
        from_small ^= self.backs > 0 and (self.backs + len(self.queues[HAND])) % 2 == 1
        if not small or not main:
            return (small or main or [0])[0]
        return (small if from_small else main)[0]

    def victim(self):
        self.evicting = True
        for _ in range(64):
            node = self.next()
            if not node or not self.blocks[node].laps:
                break
            self.blocks[node].laps -= 1
            self.move(node, MAIN)
        node = self.next()
        return self.move(node, HAND) if node else 0

    def pooled(self, node):
        if self.queue(node) == HAND:
            self.backs = 0
            self.move(node, POOL)

    def back(self, node):
        if self.queue(node) == HAND:
            self.backs += 1
            self.move(node, self.blocks[node].source)

    def drop(self):
        return self.move(self.queues[POOL][0], HAND) if self.queues[POOL] else 0

    def redrop(self, node):
        if self.queue(node) == HAND:
            self.move(node, POOL)

    def gone(self, node):
        if self.queue(node) != HAND:
            return node if node in self.blocks else 0
        self.backs = 0
        block = self.blocks[node]
        if block.source == MAIN and not block.hot:
            self.forget(node)
            return 0
        block.laps = block.hot = 0
        self.move(node, GHOST)
        self.trim()
        return node if node in self.blocks else 0

    def pool_full(self):
        return bool(self.queues[POOL]) and self.nbytes(POOL) >= self.pool_limit


def assert_same(policy, model):
    assert policy.check() == 0
    assert policy.bytes() == [model.nbytes(SMALL, MAIN), model.nbytes(POOL), model.nbytes(HAND)]
    for queue in (SMALL, MAIN, POOL, GHOST):
        assert policy.order(queue) == model.queues[queue]
    for node in range(model.capacity + 2):
        block = model.blocks.get(node)
        right = (block.queue, block.ref, block.shift) if block else (FREE, policy.ref(node) and 0, 0)
        assert (policy.queue(node), policy.ref(node), policy.shift(node)) == right
    assert bool(policy.pool_full()) == model.pool_full()


def call_both(rng, policy, model):
    """One call of each, mostly one that makes sense; both answers."""
    in_use = [node for queue in (SMALL, MAIN, POOL, HAND, GHOST) for node in model.queues[queue][:8]]
    wrong = [0, 1, model.capacity, model.capacity + 1, (1 << 32) - 1]
    node = rng.choice(in_use) if in_use and rng.random() < 0.8 else rng.choice(wrong)
    if model.queues[HAND] and rng.random() < 0.5:
        node = rng.choice(model.queues[HAND])
    name = rng.choice(["filled"] * 8 + ["victim"] * 4 + ["pooled"] * 4 + ["drop"] * 3 + ["gone"] * 4
                      + ["rescued"] * 3 + ["back", "redrop", "forget", "limit"])
    if name == "filled":
        same = node in model.blocks and rng.random() < 0.6
        ref = model.blocks[node].ref if same else rng.randrange(1, 200) << rng.choice([0, 30])
        shift, ahead = rng.choice([12, 16, 16, 16, 20, 24]), rng.randrange(2)
        given = policy.filled(node, ref, shift, ahead)
        return given, model.filled(node, ref, shift, ahead, given)
    if name == "limit":
        nbytes = rng.choice([0, 1 << 16, 1 << 20, 1 << 22, 5 << 20, 1 << 26, NO_LIMIT])
        policy.limit(nbytes)
        return 0, model.limit(nbytes) or 0
    if name in ("victim", "drop"):
        return getattr(policy, name)(), getattr(model, name)()
    got, right = getattr(policy, name)(node), getattr(model, name)(node)
    return (got, right) if name == "gone" else (0, 0)


@pytest.mark.parametrize("capacity", [1, 2, 5, 40, 300])
def test_the_model_and_the_header_agree(harness, capacity):
    print("UFFD_SEED", SEED)
    rng = random.Random(SEED + capacity)
    for _ in range(4):
        with Policy(harness, capacity) as policy:
            model = Model(capacity)
            for _ in range(1000):
                got, right = call_both(rng, policy, model)
                assert got == right
                if rng.random() < 0.2:
                    assert_same(policy, model)
            assert_same(policy, model)


def test_any_calls_under_sanitizers(program):
    print("UFFD_SEED", SEED)
    done = subprocess.run([program, "fuzz", str(SEED), "400000"], capture_output=True, text=True, check=False,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "400000 calls\n"


# Single rules, where a random run would not say what broke


def fill(policy, count, shift=16, first=1, known=None):
    known = {} if known is None else known
    for ref in range(first, first + count):
        known[ref] = policy.filled(known.get(ref, 0), ref, shift)
    return known


def evict(policy, known, nbytes):
    """Down to that many bytes, as the engine does it."""
    while sum(policy.bytes()) > nbytes:
        if policy.pool_full():
            node = policy.drop()
            ref = policy.ref(node)
            known[ref] = policy.gone(node)
        else:
            policy.pooled(policy.victim())


def test_a_node_is_small(harness):
    assert harness.policy_test_node_bytes() == 20


def test_who_comes_back_soon_goes_to_main(harness):
    with Policy(harness, 1000) as policy:
        policy.limit(100 << 16)
        known = fill(policy, 100)
        evict(policy, known, 80 << 16)
        known |= fill(policy, 60, first=101)
        evict(policy, known, 100 << 16)
        ghost = policy.order(GHOST)[-1]
        ref = policy.ref(ghost)
        assert policy.filled(ghost, ref, 16) == ghost
        assert policy.queue(ghost) == MAIN


def test_a_guess_goes_to_main_the_second_time(harness):
    with Policy(harness, 1000) as policy:
        policy.limit(100 << 16)
        known = fill(policy, 100)
        policy.victim()  # from now on memory counts as full
        node = policy.filled(0, 500, 16, 1)
        for right in (SMALL, MAIN):
            while policy.queue(node) in (SMALL, MAIN):
                policy.pooled(policy.victim())
            while policy.queue(node) == POOL:
                known[0] = policy.gone(policy.drop())
            assert policy.queue(node) == GHOST
            assert policy.filled(node, 500, 16, 1) == node
            assert policy.queue(node) == right


def test_an_index_of_another_block_is_no_ghost(harness):
    with Policy(harness, 10) as policy:
        policy.limit(4 << 16)
        node = policy.filled(0, 1, 16)
        policy.forget(node)
        assert policy.filled(0, 2, 16) == node
        assert policy.filled(node, 1, 16) not in (0, node)
        assert [policy.ref(n) for n in (1, 2)] == [2, 1]


def test_out_of_nodes_the_oldest_ghost_gives_its_own(harness):
    with Policy(harness, 5) as policy:
        policy.limit(1 << 30)
        known = fill(policy, 4)
        assert policy.filled(0, 9, 16) == 0
        for _ in range(2):
            policy.pooled(policy.victim())
            assert policy.gone(policy.drop())
        first = policy.order(GHOST)[0]
        assert policy.filled(0, 9, 16) == first
        assert policy.filled(known[1], 1, 16) != 0
        assert policy.check() == 0


def test_pinned_blocks_do_not_hide_the_others(harness):
    """All of SMALL and most of MAIN are pinned, and each block that is not is found in bounded calls."""
    with Policy(harness, 1000) as policy:
        policy.limit(100 << 16)
        fill(policy, 100)
        small, main = policy.order(SMALL), policy.order(MAIN)
        assert len(small) > 5 and len(main) > 50
        free = {main[len(main) // 2], main[-1]}
        for _ in range(8 * 100):
            node = policy.victim()
            if node in free:
                policy.pooled(node)
                free.remove(node)
            else:
                policy.back(node)
        assert not free


def test_a_late_rescue_changes_nothing_that_left(harness):
    with Policy(harness, 100) as policy:
        policy.limit(20 << 16)
        known = fill(policy, 20)
        node = policy.victim()
        policy.pooled(node)
        assert policy.drop() == node
        ref = policy.ref(node)
        known[ref] = policy.gone(node)
        before = [policy.order(queue) for queue in range(1, 6)]
        policy.rescued(node)
        assert [policy.order(queue) for queue in range(1, 6)] == before
        again = policy.filled(known[ref], ref, 16)
        policy.rescued(again)
        assert policy.queue(again) in (SMALL, MAIN) and policy.check() == 0


def test_no_limit_and_no_memory(harness):
    with Policy(harness, 100) as policy:
        known = fill(policy, 50)
        assert not policy.pool_full() and policy.bytes() == [50 << 16, 0, 0]
        policy.limit(0)
        evict(policy, known, 0)
        assert policy.bytes() == [0, 0, 0] and policy.victim() == 0 and policy.drop() == 0
        assert policy.order(GHOST) == [] and set(known.values()) == {0}


def test_sizes_from_4_kib_to_16_mib_are_counted_in_bytes(harness):
    with Policy(harness, 6000) as policy:
        policy.limit(256 << 20)
        known = fill(policy, 5000, shift=12)
        known |= fill(policy, 20, shift=24, first=6000)
        evict(policy, known, 256 << 20)
        assert policy.bytes()[0] + policy.bytes()[1] <= 256 << 20
        assert sum(1 << policy.shift(node) for q in (SMALL, MAIN, POOL) for node in policy.order(q)) == \
            sum(policy.bytes())


# Quality: hit ratios of the simulator, the same everywhere

PERCENTS = (1, 10, 25)


@functools.cache
def made(blocks=8000, count=400_000, seed=11):
    return {played.name: played for played in sim.traces(blocks, count, seed)}


def hits(played, policy, budget_bytes, **options):
    """Percent of the touches; and memory was never above its budget, and every rule of the header holds."""
    result = sim.play(played, policy, int(budget_bytes), **options)
    if policy == "ours":
        waiting = options.get("late", 1) << int(played.shifts.max())
        assert result.peak_bytes <= max(budget_bytes, budget_bytes / 2 + waiting) + (1 << int(played.shifts.max()))
    return result.hits


# name, percent, late: events that wait, for which memory is kept free; not where that is a large part of all there is.
ZIPF = [(name, percent, late) for name in made() if name.startswith("zipf") for percent in PERCENTS for late in (1, 8)
        if late << int(made()[name].shifts.max()) < made()[name].data_bytes * percent / 100 / 8]


@pytest.mark.parametrize("name, percent, late", ZIPF)
def test_on_zipf_it_is_not_below_lru(name, percent, late):
    played = made()[name]
    budget = played.data_bytes * percent / 100
    ours, lru = hits(played, "ours", budget, late=late), hits(played, "lru", budget)
    assert ours > lru - 2
    assert ours > hits(played, "fifo", budget)
    assert hits(played, "belady", budget) > ours or "mixed" in name


@pytest.mark.parametrize("percent", PERCENTS)
@pytest.mark.parametrize("name", ["scan + loop", "scan + loop, later"])
def test_on_scan_and_loop_it_is_above_fifo_and_lru(name, percent):
    played = made()[name]
    budget = played.data_bytes * percent / 100
    ours = hits(played, "ours", budget)
    assert ours > max(hits(played, policy, budget) for policy in ("fifo", "lru")) + 5


@pytest.mark.parametrize("percent", PERCENTS)
@pytest.mark.parametrize("name", ["loop, all", "loop, 30 %"])
def test_a_loop_larger_than_memory_keeps_most_of_what_it_can(name, percent):
    played = made()[name]
    budget = played.data_bytes * percent / 100
    assert hits(played, "lru", budget) == 0
    assert hits(played, "ours", budget) > 0.7 * hits(played, "belady", budget)


@pytest.mark.parametrize("percent", PERCENTS)
@pytest.mark.parametrize("name", ["shifting", "bursts", "phases", "phases, read ahead"])
def test_what_changes_is_followed(name, percent):
    played = made()[name]
    budget = played.data_bytes * percent / 100
    assert hits(played, "ours", budget) > hits(played, "lru", budget) - 2


@pytest.mark.parametrize("percent", [10, 25])
def test_laps_that_fit_are_filled_once_by_read_ahead_too(percent):
    """Guesses are no proof, but where a scan comes again and again there is no other sign."""
    played = made()["phases, read ahead"]
    budget = int(played.data_bytes * percent / 100)
    assert sim.play(played, "ours", budget).fills < 1.2 * sim.play(played, "lru", budget).fills


@pytest.mark.parametrize("name", made())
def test_rescues_are_few(name):
    """Each costs some 10 us: of the hits 6 % at most."""
    played = made()[name]
    for percent in PERCENTS:
        result = sim.play(played, "ours", int(played.data_bytes * percent / 100))
        assert result.rescued < 6
        assert result.moves < 2 * result.fills + 1000


@pytest.mark.parametrize("blocks", [8, 16, 32, 64])
@pytest.mark.parametrize("name", [name for name in made() if "mixed" not in name])
def test_tiny_budgets(name, blocks):
    played = made(800, 100_000)[name]
    assert hits(played, "ours", blocks << 16) > hits(played, "lru", blocks << 16) - 4


@pytest.mark.parametrize("name", ["zipf 0.9", "scan + loop", "zipf 0.9, mixed sizes"])
def test_with_few_nodes_it_forgets_ghosts_and_goes_on(name):
    played = made()[name]
    budget = played.data_bytes // 10
    result = sim.play(played, "ours", budget, capacity=len(played.shifts) // 2)
    assert result.nodes < len(played.shifts) // 2
    assert result.hits > sim.play(played, "fifo", budget).hits


# The simulator itself: against policies written the slow way


def slow(touches, policy, room):
    """Hits of count blocks of one size: [old ... new], whatever `policy` says of it."""
    held, hit = [], 0
    for at, block in enumerate(touches):
        if block in held:
            hit += 1
            if policy == "lru":
                held.remove(block)
                held.append(block)
            continue
        held.append(block)
        if len(held) > room and policy == "belady":
            later = list(touches[at + 1:])
            held.remove(max(held, key=lambda b: later.index(b) if b in later else len(later)))
        elif len(held) > room:
            held.pop(0)
    return hit


@pytest.mark.parametrize("policy", ["fifo", "lru", "belady"])
def test_the_simulator_is_right(policy):
    print("UFFD_SEED", SEED)
    rng = np.random.default_rng(SEED)
    for room in (1, 3, 10):
        touches = sim.zipf(rng, 600, 30, 0.8)
        result = sim.play(sim.trace("t", touches, 30, warm=0), policy, room << 16)
        assert result.touches - result.misses == slow(touches.tolist(), policy, room)


def test_recorded_traces_are_read(tmp_path):
    text, binary = tmp_path / "a.txt", tmp_path / "a.npy"
    text.write_text("# block, log2 bytes, ahead\n7000 12\n\n5\n7000 12 a\n9 20 a\n")
    read = sim.load(str(text))
    assert read.touches.tolist() == [2, 0, 2 | sim.AHEAD, 1 | sim.AHEAD]
    assert read.shifts.tolist() == [16, 20, 12]
    np.save(binary, np.array([4, 1 << 40, 4]))
    read = sim.load(str(binary))
    assert read.touches.tolist() == [0, 1, 0] and read.shifts.tolist() == [16, 16]
    assert sim.play(read, "ours", 4 << 16).misses == 2
