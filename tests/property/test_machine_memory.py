"""Random sequences of writes, flushes, evictions, discards and pins under a budget that is smaller than the data,
against a model made of plain arrays, and against what the store holds (hypothesis, stateful)."""

import contextlib
import gc
import time

import numpy as np
import pytest
import uffd
from support import matrix
from support.pattern import stress_seconds
from support.stores import stored

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed (the extra `test`)")
from hypothesis import HealthCheck, Phase, settings, strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule  # noqa: E402
from support.machines import run_machine  # noqa: E402

PAGE = uffd._core.PAGE_BYTES
SIZE = 4 * PAGE                 # of a block
BLOCKS = 64
BUDGETS = tuple(blocks * SIZE for blocks in (20, 32, 48, 100))
LONG = stress_seconds() > 10
SETTINGS = settings(max_examples=60 if LONG else 8, stateful_step_count=80 if LONG else 40, deadline=None,
                    derandomize=not LONG, database=None, print_blob=True,
                    phases=(Phase.generate, Phase.shrink) if LONG else (Phase.generate,),
                    suppress_health_check=list(HealthCheck))
block = st.integers(0, BLOCKS - 1)
length = st.sampled_from([1, 1, 2, 5, 20, BLOCKS])
which = st.integers(0, 1)


class Memory:
    """A region, what it has to hold, and what its store may hold."""

    def __init__(self, engine, mode, options):
        if mode == "packed":
            provider, mode, self.store = uffd.providers.Scratch(compress="zstd"), "c", None
            self.source = np.zeros(BLOCKS * SIZE, "u1")
        else:
            provider, self.store = stored(BLOCKS * SIZE)
            self.source = self.store.held.copy()
        self.region = uffd.Region(BLOCKS * SIZE, provider, mode=mode, engine=engine, block_bytes=SIZE, timeout_s=20,
                                  **options)
        self.array = self.region.array("u1", (BLOCKS, SIZE))
        self.model = self.source.reshape(BLOCKS, SIZE).copy()

    @property
    def held(self):
        return self.store.held.reshape(BLOCKS, SIZE)


class Machine(RuleBasedStateMachine):
    """Two regions of one engine. `where` and `mode` ("packed": private, with a compressed spill file) are set by the
    test."""

    where = mode = None

    @initialize(budget=st.sampled_from(BUDGETS))
    def begin(self, budget):
        self.engine = uffd.Engine(workers=2, budget_bytes=budget)
        self.memories = [Memory(self.engine, self.mode, self.where.options) for _ in range(2)]
        self.pins = contextlib.ExitStack()
        self.pinned = {0: set(), 1: set()}

    @rule(n=which, b=block, k=length, value=st.integers(0, 255), at=st.integers(0, SIZE - 1), whole=st.booleans())
    def write(self, n, b, k, value, at, whole):
        m, where = self.memories[n], slice(None) if whole else at
        m.array[b:b + k, where] = value
        m.model[b:b + k, where] = value

    @rule(n=which, b=block, k=length, seed=st.integers(0, 99))
    def write_noise(self, n, b, k, seed):
        """What can't be compressed."""
        m = self.memories[n]
        m.array[b:b + k] = m.model[b:b + k] = np.random.default_rng(seed).integers(0, 256, SIZE, "u1")

    @rule(n=which, b=block, k=length)
    def read(self, n, b, k):
        m = self.memories[n]
        np.testing.assert_array_equal(m.array[b:b + k], m.model[b:b + k])

    @rule(n=which)
    def flush(self, n):
        m = self.memories[n]
        m.region.flush(timeout_s=20)
        if self.mode == "r+":
            np.testing.assert_array_equal(m.held, m.model)
            dirty = m.region.dirty()
            if self.where.delivery == "inline" or not matrix.full_mode():
                dirty[list(self.pinned[n])] = False     # stored, and writable still: the kernel may write there
            assert not dirty.any()

    @rule(n=which, b=block, k=length)
    def evict(self, n, b, k):
        m = self.memories[n]
        where, left, deadline = (b * SIZE, min(b + k, BLOCKS) * SIZE), {None}, time.monotonic() + 10
        while not left <= self.pinned[n]:           # read-ahead that was asked for before may come late
            assert time.monotonic() < deadline, (left, self.pinned[n])
            freed = m.region.evict(where)
            left = set((b + np.flatnonzero(m.region.resident()[b:b + k])).tolist())
            assert freed % SIZE == 0, freed

    @rule(n=which, b=block, k=length)
    def discard(self, n, b, k):
        m, blocks = self.memories[n], range(b, min(b + k, BLOCKS))
        if self.pinned[n] & set(blocks):
            with pytest.raises(ValueError, match="pinned"):
                m.region.discard((b * SIZE, blocks.stop * SIZE))
            blocks = range(b, min(self.pinned[n] & set(blocks)))
        else:
            m.region.discard((b * SIZE, blocks.stop * SIZE))
        theirs = m.held if self.mode == "r+" else m.source.reshape(BLOCKS, SIZE)
        m.model[blocks] = theirs[blocks]    # what was written back is the store's, and stays

    @rule(n=which, b=block, k=st.integers(1, 3))
    def pin(self, n, b, k):
        m = self.memories[n]
        try:
            self.pins.enter_context(uffd.pinned(m.array[b:b + k]))
        except uffd.BudgetError:
            assert len(self.pinned[0]) + len(self.pinned[1]) > 1, "there was room"
        else:
            self.pinned[n] |= set(range(b, min(b + k, BLOCKS)))

    @precondition(lambda self: self.pinned[0] or self.pinned[1])
    @rule()
    def unpin(self):
        self.pins.close()
        self.pinned = {0: set(), 1: set()}

    @rule(n=which, b=block, k=length)
    def bring_in(self, n, b, k):
        uffd.prefetch(self.memories[n].array[b:b + k]).wait(20)

    @rule(n=which, rows=st.integers(1, 4))
    def chunks(self, n, rows):
        m = self.memories[n]
        with contextlib.suppress(uffd.BudgetError):     # beside what is pinned
            for start, piece in enumerate(uffd.chunks(m.array, rows * SIZE)):
                np.testing.assert_array_equal(piece, m.model[start * rows:(start + 1) * rows])

    @rule(budget=st.sampled_from(BUDGETS))
    def budget(self, budget):
        try:
            self.engine.budget_bytes = budget
        except uffd.BudgetError:
            assert self.pinned[0] or self.pinned[1]

    @invariant()
    def within_the_budget(self):
        if hasattr(self, "engine"):
            states = [m.region.resident() for m in self.memories]
            for n, resident in enumerate(states):
                assert all(resident[b] for b in self.pinned[n]), "a pinned block has left"
            limit = self.engine.budget_bytes
            if self.engine.resident_bytes > limit:      # it was lowered a moment ago, and dirty blocks are on their way
                deadline = time.monotonic() + 10
                while self.engine.resident_bytes > limit:
                    assert time.monotonic() < deadline, (self.engine.resident_bytes, limit)
                    time.sleep(0.001)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.pins.close()
        for m in self.memories:
            np.testing.assert_array_equal(m.array, m.model)
            del m.array
            m.region.close()
            if self.mode == "r+":
                np.testing.assert_array_equal(m.held, m.model)
            elif m.store is not None:
                np.testing.assert_array_equal(m.store.held, m.source)
            assert m.region.closed and (m.store is None or m.store.overlaps == 0)
        self.memories.clear()
        gc.collect()
        self.engine.close()


@pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing leaves memory")
@pytest.mark.parametrize("mode", ["r+", "c", "packed"])
@pytest.mark.deadline(120, per_stress_second=30)
@pytest.mark.keeps("a failing example's arrays live on in hypothesis's report; the machine itself closes all")
def test_machine_under_a_budget(where, mode):
    """Goal: no sequence loses an update, or stores what was not written; never more in memory than the budget."""
    run_machine(Machine, "under a budget", SETTINGS, where=where, mode=mode)
