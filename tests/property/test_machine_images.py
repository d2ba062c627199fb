"""Random sequences of writes, trackers, images, series and restarts against copies of arrays (hypothesis, stateful)."""

import contextlib
import gc
import mmap
import os
import tempfile

import numpy as np
import pytest
import uffd
from support import matrix
from support.pattern import pattern, stress_seconds
from uffd import snapshot

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed (the extra `test`)")
from hypothesis import HealthCheck, Phase, settings, strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule  # noqa: E402
from support.machines import run_machine  # noqa: E402

PAGE = uffd._core.PAGE_BYTES
SIZE = 4 * PAGE                 # of a block
BLOCKS = 40
NAMES = ("ours", "plain", "small")
LONG = stress_seconds() > 10
SETTINGS = settings(max_examples=100 if LONG else 20, stateful_step_count=60 if LONG else 40, deadline=None,
                    derandomize=not LONG, database=None, print_blob=True,
                    phases=(Phase.generate, Phase.shrink) if LONG else (Phase.generate,),
                    suppress_health_check=list(HealthCheck))
fraction = st.floats(0, 1, exclude_max=True)
names = st.sampled_from(NAMES)


class Machine(RuleBasedStateMachine):
    """One region, memory that is not ours, and an array on the heap. `where` is set by the test."""

    where = None

    @initialize(blocks=st.sampled_from([16, BLOCKS]))
    def begin(self, blocks):
        self.folder = contextlib.ExitStack()
        self.path = self.folder.enter_context(tempfile.TemporaryDirectory())
        self.engine = uffd.Engine(workers=2)
        self.engine.budget_bytes = uffd._core.least_budget(self.engine._threads) + blocks * SIZE
        self.other = uffd.Engine(workers=1)             # of what is opened again
        self.other.budget_bytes = uffd._core.least_budget(self.other._threads, 65536) + 8 * 65536
        provider = uffd.providers.Memory(pattern(0, BLOCKS * SIZE))
        self.region = uffd.Region(None, provider, mode="c", engine=self.engine, block_bytes=SIZE, **self.where.options)
        self.memory = mmap.mmap(-1, 300 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.arrays = {"ours": self.region.array(), "plain": np.frombuffer(self.memory, np.uint8),
                       "small": np.zeros(5000, np.uint8)}
        self.trackers, self.images, self.last = [], [], None

    # ---- the program

    def change(self, name, at, length, value):
        array = self.arrays[name]
        start = int(at * len(array))
        array[start:start + length] += np.uint8(value)

    @rule(name=names, at=fraction, length=st.sampled_from([1, 1, 100, PAGE, 9 * PAGE]), value=st.integers(1, 255))
    def write(self, name, at, length, value):
        self.change(name, at, length, value)

    @rule(at=fraction, pages=st.integers(1, 20))
    def drop(self, at, pages):
        """The program gives pages back: they are zeros from here on."""
        first = int(at * 300)
        self.memory.madvise(mmap.MADV_DONTNEED, first * PAGE, min(pages, 300 - first) * PAGE)

    @rule(at=fraction, what=st.sampled_from(["evict", "evict", "discard"]))
    def out(self, at, what):
        b = int(at * BLOCKS)
        getattr(self.region, what)((b * SIZE, min(b + 4, BLOCKS) * SIZE))

    # ---- trackers

    def kept(self):
        """Whether a series has memory in hand."""
        return self.last is not None and self.last._kept is not None

    @precondition(lambda self: len(self.trackers) < 4)
    @rule(name=names)
    def track(self, name):
        if name != "ours" and self.kept():
            with pytest.raises(ValueError, match="snapshot of it that is under way"):
                uffd.track(self.arrays[name])
            return
        try:
            self.trackers.append((name, uffd.track(self.arrays[name]), self.arrays[name].copy()))
        except uffd.Unavailable:
            assert (name == "ours" and not self.region.tracked) or matrix.missing_feature("WP_ASYNC")

    @precondition(lambda self: self.trackers)
    @rule(n=st.integers(0, 3), reset=st.sampled_from([True, True, False]))
    def take_written(self, n, reset):
        """A copy that takes what it is told is the array."""
        name, tracker, copy = self.trackers[n % len(self.trackers)]
        array = self.arrays[name]
        told = copy if reset else copy.copy()
        for start, stop in tracker.ranges(reset):
            told[start:stop] = array[start:stop]
        np.testing.assert_array_equal(told, array)

    @precondition(lambda self: self.trackers)
    @rule(n=st.integers(0, 3))
    def close_tracker(self, n):
        self.trackers.pop(n % len(self.trackers))[1].close()

    # ---- images

    def possible(self, method, base):
        """Whether `take` can do it: what has this memory in hand, and what it is."""
        taken = any(name != "ours" for name, _, _ in self.trackers) or (self.kept() and base is not self.last)
        protect = matrix.full_mode() and self.where.delivery == "thread" and not taken
        fork = self.where.backing != "shared"
        return {"protect": protect, "fork": fork, "auto": protect or fork}[method]

    @precondition(lambda self: len(self.images) < 12)
    @rule(method=st.sampled_from(["auto", "protect", "fork"]), base=st.sampled_from(["none", "none", "path"]),
          name=names, at=fraction, value=st.integers(1, 255))
    def single(self, method, base, name, at, value):
        self.take(method, base, name, at, value)

    @precondition(lambda self: len(self.images) < 12)
    @rule(method=st.sampled_from(["auto", "auto", "protect", "fork"]), base=st.sampled_from(["first", "last", "last"]),
          name=names, at=fraction, value=st.integers(1, 255))
    def series(self, method, base, name, at, value):
        self.take(method, base, name, at, value)

    def take(self, method, base, name, at, value):
        base = {"none": None, "first": snapshot.FIRST, "last": self.last,
                "path": self.images[-1][0] if self.images else snapshot.FIRST}[base]
        path = os.path.join(self.path, str(len(self.images)))
        right = {key: array.copy() for key, array in self.arrays.items()}
        try:
            taken = snapshot.take(self.arrays, path, method=method, base=base)
        except (ValueError, uffd.SnapshotError, uffd.Unavailable):
            assert not self.possible(method, base)
            assert not os.path.exists(path)
            return
        assert self.possible(method, base)
        self.change(name, at, 3 * PAGE, value)
        assert taken.wait(60).nbytes == sum(len(array) for array in right.values())
        self.images.append((path, right))
        self.last = taken if base is not None else self.last
        self.opened(len(self.images) - 1, False)

    def opened(self, n, lazy):
        path, right = self.images[n]
        found = snapshot.load(path, lazy=lazy, **({"engine": self.other} if lazy else {}))
        assert list(found) == list(right)
        for name, array in right.items():
            np.testing.assert_array_equal(found[name], array)
        return found

    @precondition(lambda self: self.images)
    @rule(n=st.integers(0, 11), value=st.integers(0, 255))
    def restart(self, n, value):
        """An image is what it was, however often, whatever was written to arrays of it."""
        found = self.opened(n % len(self.images), True)
        found["plain"][::PAGE] = value
        found.save_working_set()
        del found
        gc.collect()
        assert snapshot.verify(self.images[n % len(self.images)][0]) > 0

    @precondition(lambda self: self.last is not None)
    @rule()
    def end_series(self):
        self.last = None
        gc.collect()

    def teardown(self):
        self.last = None
        for _, tracker, _ in self.trackers:
            tracker.close()
        self.trackers.clear()
        self.arrays.clear()
        gc.collect()
        self.region.close()
        self.engine.__exit__(None, None, None)
        self.other.__exit__(None, None, None)
        self.folder.close()


@pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing is tracked")
@pytest.mark.deadline(240, per_stress_second=30)
@pytest.mark.keeps("a failing example's arrays live on in hypothesis's report; the machine itself closes all")
def test_machine_of_trackers_and_images(where):
    """Goal: whatever the order, a tracker tells enough, an image is of its instant, and what can't be is refused."""
    run_machine(Machine, "of images", SETTINGS, where=where)
