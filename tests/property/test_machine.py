"""Random sequences of API calls against a model made of plain arrays (hypothesis, stateful)."""

import contextlib
import gc
import os
import pickle
import signal
import time

import numpy as np
import pytest
import uffd
from support import matrix
from support.native import controlled
from support.pattern import pattern, stress_seconds
from uffd import providers

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed (the extra `test`)")
from hypothesis import HealthCheck, Phase, settings, strategies as st  # noqa: E402
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule  # noqa: E402
from support.machines import run_machine  # noqa: E402

PAGE = uffd._core.PAGE_BYTES
LONG = stress_seconds() > 10
SETTINGS = settings(max_examples=100 if LONG else 30, stateful_step_count=50 if LONG else 30, deadline=None,
                    derandomize=not LONG,  # the same examples in each short run; new ones in `make stress`
                    database=None, phases=(Phase.generate, Phase.shrink) if LONG else (Phase.generate,),
                    print_blob=True, suppress_health_check=list(HealthCheck))
fractions = st.floats(0, 1, exclude_max=True)


def exit_code(pid, timeout_s=10.0):
    """Of a forked child; one that hangs is killed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


class Machine(RuleBasedStateMachine):
    """Regions, their arrays and the arrays' models. `where` is set by the test."""

    where = None
    hosts_are_killed = False
    providers = {"native": lambda model: controlled()[0], "zero": lambda model: providers.Zero(),
                 "memory": lambda model: providers.Memory(model.copy())}
    regions = Bundle("regions")
    arrays = Bundle("arrays")

    def __init__(self):
        super().__init__()
        self.engine = uffd.Engine(workers=2)
        self.opened = []

    @rule(target=regions, pages=st.integers(1, 40), odd=st.integers(-PAGE + 1, 0), blocks=st.integers(0, 5),
          kind=st.integers(0, 11), readahead=st.sampled_from([None, 0, 8 * PAGE]))
    def open_region(self, pages, odd, blocks, kind, readahead):
        nbytes = pages * PAGE + odd
        kind = list(self.providers)[kind % len(self.providers)]
        model = np.zeros(nbytes, "u1") if kind == "zero" else pattern(0, nbytes).copy()
        provider = self.providers[kind](model)
        region = uffd.Region(nbytes, provider, engine=self.engine, block_bytes=PAGE << blocks,
                             readahead_bytes=readahead, **self.where.options)
        record = {"region": region, "model": model, "written": set(), "touched": set(), "pinned": set(),
                  "arrays": 0}
        self.opened.append(record)
        return record

    @rule(target=arrays, record=regions, start=fractions, stop=fractions, step=st.sampled_from([1, 1, 2, 7, -1, -3]))
    def view(self, record, start, stop, step):
        if record["region"].closed:
            return None
        whole = record["region"].array()
        first, last = sorted((int(start * len(whole)), int(stop * len(whole)) + 1))
        record["arrays"] += 1
        key = slice(first, last, step) if step > 0 else slice(last, first or None, step)
        return {"array": whole[key], "key": key, "record": record}

    def blocks_of(self, item):
        bytes_ = np.arange(len(item["record"]["model"]))[item["key"]]
        return set((bytes_ // item["record"]["region"].block_bytes).tolist())

    @rule(item=arrays)
    def read(self, item):
        if item is not None:
            np.testing.assert_array_equal(item["array"], item["record"]["model"][item["key"]])
            item["record"]["touched"] |= self.blocks_of(item)

    @rule(item=arrays, value=st.integers(0, 255))
    def write(self, item, value):
        if item is not None:
            item["array"][...] = value
            item["record"]["model"][item["key"]] = value
            item["record"]["written"] |= self.blocks_of(item)

    @rule(item=arrays, value=st.integers(1, 255))
    def add(self, item, value):
        if item is not None and len(item["array"]):
            item["array"] += np.uint8(value)
            item["record"]["model"][item["key"]] += np.uint8(value)
            item["record"]["written"] |= self.blocks_of(item)

    @rule(item=arrays, call=st.sampled_from(["populate", "prefetch", "prefetch and wait", "cancel", "pinned",
                                             "chunks"]))
    def bring_in(self, item, call):
        if item is None or not len(item["array"]):
            return
        array, right = item["array"], item["record"]["model"][item["key"]]
        if call == "populate":
            uffd.populate(array)
        elif call == "prefetch":
            uffd.prefetch(array)
        elif call == "prefetch and wait":
            uffd.prefetch(array).wait(20)
        elif call == "cancel":
            uffd.prefetch(array).cancel()
        elif call == "pinned":
            with uffd.pinned(array):
                np.testing.assert_array_equal(array, right)
        else:
            np.testing.assert_array_equal(np.concatenate(list(uffd.chunks(array, 3 * PAGE))), right)
        if call in ("pinned", "chunks"):
            item["record"]["pinned"] |= self.blocks_of(item)
        if call not in ("prefetch", "cancel"):
            resident = item["record"]["region"].resident()
            assert all(resident[block] for block in self.blocks_of(item))

    @rule(item=arrays, ids=st.lists(fractions, max_size=20))
    def populate_ids(self, item, ids):
        if item is None or not len(item["array"]):
            return
        ids = np.array([int(fraction * len(item["array"])) for fraction in ids], int)
        uffd.populate(item["array"], ids)
        np.testing.assert_array_equal(item["array"][ids], item["record"]["model"][item["key"]][ids])

    @rule(item=consumes(arrays))
    def drop(self, item):
        if item is not None:
            del item["array"]
            item["record"]["arrays"] -= 1
            gc.collect()

    @rule(record=regions)
    def close(self, record):
        region = record["region"]
        if region.closed:
            with pytest.raises(uffd.RegionClosed):
                region.array()
        elif record["arrays"]:
            with pytest.raises(BufferError):
                region.close()
        else:
            region.close()
            assert region.closed
        if region.closed:
            region.close()

    @rule(record=regions)
    def recipe(self, record):
        """What can be pickled is made anew with the provider's content; what can't says so."""
        try:
            recipe = pickle.dumps(record["region"])
        except (TypeError, pickle.PicklingError, uffd.RegionClosed):
            return
        assert len(recipe) < len(record["model"]) + 5000

    @rule(record=regions)
    def fork(self, record):
        """A child reads the whole region; it is what it was at the fork."""
        if record["region"].closed:
            return
        array = record["region"].array()
        pid = os.fork()
        if not pid:
            right = False
            try:
                right = np.array_equal(array, record["model"])
            finally:
                os._exit(0 if right else 1)
        del array
        assert exit_code(pid) == 0

    @invariant()
    def written_blocks_are_dirty(self):
        for record in self.opened:
            if not record["region"].closed:
                dirty, resident = record["region"].dirty(), record["region"].resident()
                # Pinned blocks may be written by the kernel, which tells nobody: they count as dirty at once.
                assert record["written"] <= set(np.flatnonzero(dirty).tolist()) <= record["written"] | record["pinned"]
                assert all(resident[block] for block in record["written"] | record["touched"])
                assert self.hosts_are_killed or record["region"].stats().errors == 0

    def teardown(self):
        for record in self.opened:
            record.pop("region").__exit__(None, None, None)
        self.opened.clear()
        self.names_to_values.clear()  # the bundles' arrays
        gc.collect()
        self.engine.__exit__(None, None, None)


@pytest.mark.deadline(120, per_stress_second=30)
@pytest.mark.keeps("a failing example's arrays live on in hypothesis's report; the machine itself closes all")
def test_machine(where):
    """Goal: any sequence of calls gives what the same sequence on plain arrays gives."""
    run_machine(Machine, "of calls", SETTINGS, where=where)


@pytest.mark.skipif(uffd._core.mode()[0] == "none", reason="no userfaultfd, no provider hosts")
@pytest.mark.deadline(240, per_stress_second=30)
@pytest.mark.keeps("a failing example's arrays live on in hypothesis's report; the machine itself closes all")
def test_machine_over_hosts(where):
    """Goal: the same over providers in Python, of all kinds, whose hosts are killed in between."""
    from support import hosted

    class Killing(Machine):
        hosts_are_killed = True
        providers = {"function": lambda model: hosted.fill_pattern,
                     "class": lambda model: hosted.Pattern(len(model), concurrency=3),
                     "many": lambda model: hosted.Many(len(model)), "offers": lambda model: hosted.Offers(len(model))}

        @rule()
        def kill_hosts(self):
            for pid in self.engine._threads.host_pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    few = settings(SETTINGS, max_examples=SETTINGS.max_examples // 5)
    run_machine(Killing, "over hosts", few, where=where)


@pytest.mark.parametrize("place", matrix.WHERES, ids=str)
def test_keys_at_random(place):
    """Goal: populate(array, key) brings in what array[key] touches, for keys that hypothesis makes of every kind."""
    if place.unavailable():
        pytest.skip(place.unavailable())
    from hypothesis import given
    from hypothesis.extra import numpy as strategies

    shape = (12, 3 * PAGE)
    numbers = np.broadcast_to(np.arange(12 * 3).repeat(PAGE).reshape(shape), shape)

    @settings(SETTINGS, max_examples=200 if LONG else 40)
    @given(key=strategies.basic_indices(shape, allow_newaxis=True) | strategies.integer_array_indices(
        shape, result_shape=strategies.array_shapes(max_dims=2, max_side=6)))
    def check(key):
        options = {"block_bytes": PAGE, "readahead_bytes": 0, **place.options}
        with uffd.Region(12 * 3 * PAGE, controlled()[0], **options) as region:
            array = region.array("u1", shape)
            uffd.populate(array, key)
            assert np.flatnonzero(region.resident()).tolist() == np.unique(numbers[key]).tolist()
            assert region.stats().blocks_demand == 0
            del array

    check()
