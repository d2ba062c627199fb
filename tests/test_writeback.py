"""Write-back: what flush promises, what happens to writes that fail, how a region's end stores what was written.

The kinds of store: a C function that fails on demand (support/stores.py), a file, a file without a name that private
memory spills to, and a provider in Python.
"""

import errno
import signal
import threading
import time

import numpy as np
import pytest
import uffd
from support import matrix, shim
from support.blocks import BLOCKS, PAGE, SIZE, held, rows, wait_until
from support.hosted import lines
from support.hosted_writers import BadWriter, Store
from support.pattern import pattern
from support.scripts import finish_script, run_script, start_script, wait_for_line
from support.stores import stored
from uffd import providers

BLOCK = 65536

pytestmark = pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing is written back")


@pytest.fixture
def made(make):
    """(region of BLOCKS blocks in mode "r+" over a store in memory, that store)."""
    provider, store = stored(BLOCKS * SIZE)
    return make(None, provider, block_bytes=SIZE, readahead_bytes=0, retries=1), store


# ---- flush


def test_flush_stores_what_was_written(made):
    """Goal: after flush the store has each written byte; blocks that were not written were not stored, neighbours were
    stored together, and all is clean. A second flush has nothing to do; the next write is noticed again."""
    region, store = made
    counts = store.count_blocks(SIZE)
    assert region.mode == "r+"
    array = rows(region)
    region.populate()
    written = [0, *range(8, 24), 40, BLOCKS - 1]
    array[written] += 1
    array[8:24] += 1
    right = pattern(0, BLOCKS * SIZE).reshape(BLOCKS, SIZE).copy()
    right[written] += 1
    right[8:24] += 1
    assert np.flatnonzero(region.dirty()).tolist() == written
    region.flush()
    np.testing.assert_array_equal(held(store), right)
    assert np.flatnonzero(counts).tolist() == written and counts.max() == 1
    assert store.writes <= 6 and not region.dirty().any() and region.resident().all()
    stats = region.stats()
    assert (stats.written_back, stats.bytes_written) == (len(written), len(written) * SIZE)
    region.flush()
    assert region.stats().written_back == len(written)
    array[9, 5] = 77
    assert np.flatnonzero(region.dirty()).tolist() == [9]
    region.flush()
    assert held(store)[9, 5] == 77 and counts[9] == 2
    del array


def test_the_odd_end(make):
    """Goal: the last block is stored to its last byte and not beyond: a write past the provider's size is an error."""
    nbytes = 3 * SIZE + 1001
    provider, store = stored(nbytes)
    region = make(None, provider, block_bytes=SIZE)
    array = region.array()
    array[:] = 9
    region.flush()
    assert (store.held == 9).all()
    assert region.stats().bytes_written == nbytes
    del array


@pytest.mark.parametrize("mode", ["r", "c"])
def test_flush_where_nothing_is_to_be_stored(make, mode):
    provider, store = stored(BLOCKS * SIZE)
    region = make(None, provider, mode=mode, block_bytes=SIZE)
    array = rows(region)
    if mode == "c":
        array[:] = 1
    region.flush()
    region.flush(timeout_s=0)
    assert store.writes == 0
    del array
    region.close()
    assert store.writes == 0
    with pytest.raises(uffd.RegionClosed):
        region.flush()


@pytest.mark.parametrize(("answer", "number", "keeps"), [
    (-errno.EIO, errno.EIO, 0), (-errno.ENOSPC, errno.ENOSPC, 0), (-errno.EIO, errno.EIO, PAGE + 100),
    (7, errno.EIO, 0), (-100000, errno.EIO, 0)])
def test_failed_writes(made, answer, number, keeps):
    """Goal: flush raises for what could not be stored, with the list; those blocks stay, dirty, with their bytes, the
    others are stored; once the store takes them, the next flush has them all."""
    region, store = made
    array = rows(region)
    region.populate()
    array[:20] += 1
    store.fail(4 * SIZE, 6 * SIZE, answer, keeps=keeps)
    right = pattern(0, BLOCKS * SIZE).reshape(BLOCKS, SIZE).copy()
    right[:20] += 1
    for _ in range(2):
        with pytest.raises(uffd.ProviderError) as caught:
            region.flush()
        error = caught.value
        failed = {offset // SIZE for offset, _, _ in error.failed}
        assert {4, 5} <= failed and set(np.flatnonzero(region.dirty())) == failed
        assert all(n == number and nbytes == SIZE for _, nbytes, n in error.failed)
        assert error.errno == number and error.tries == 2 and error.region == region.name
        assert error.offset == min(failed) * SIZE and str(error.offset) in str(error)
        np.testing.assert_array_equal(array, right)
        others = sorted(set(range(20)) - failed)
        np.testing.assert_array_equal(held(store)[others], right[others])
    assert region.stats().write_errors > 0
    store.heal()
    region.flush()
    np.testing.assert_array_equal(held(store), right)
    assert not region.dirty().any()
    del array


def test_a_write_is_tried_again(make):
    """Goal: what fails fewer times than `retries` is stored, and nobody has to hear of it but the counter."""
    provider, store = stored(8 * SIZE)
    region = make(None, provider, block_bytes=SIZE, retries=3)
    array = rows(region)
    array[:] = 3
    store.fail(0, SIZE, -errno.EIO, times=3)
    region.flush()
    assert (store.held == 3).all() and store.failures == 3
    assert region.stats().write_errors == 3
    del array


def test_many_failures_are_listed(make):
    """Goal: of very many failures the list has 64 at the least, and says of none that it was stored."""
    provider, store = stored(200 * PAGE)
    region = make(None, provider, block_bytes=PAGE, retries=0)
    array = region.array()
    array[:] = 1
    store.fail(0, 200 * PAGE, -errno.EIO)
    with pytest.raises(uffd.ProviderError) as caught:
        region.flush()
    assert 64 <= len(caught.value.failed) <= 200
    assert region.dirty().all()
    store.heal()
    region.flush()
    assert (store.held == 1).all()
    del array


def test_evict_of_what_cannot_be_written(made):
    """Goal: evict raises for it, as flush does; it stays resident, dirty and right; the others are gone."""
    region, store = made
    array = rows(region)
    region.populate()
    array[3] = 1
    store.fail(3 * SIZE, 4 * SIZE, -errno.EIO)
    with pytest.raises(uffd.ProviderError) as caught:
        region.evict()
    assert [offset for offset, _, _ in caught.value.failed] == [3 * SIZE]
    assert region.resident()[3] and region.dirty()[3] and (array[3] == 1).all()
    store.heal()
    region.evict()
    assert not region.resident().any() and (held(store)[3] == 1).all()
    del array


def test_failures_under_pressure(make, engine):
    """Goal: while the store takes nothing, what was written stays and reads go on; once it does, all is stored with
    nobody asking for it."""
    engine.budget_bytes = BLOCKS * SIZE
    provider, store = stored(4 * BLOCKS * SIZE)
    region = make(None, provider, block_bytes=SIZE, retries=0)
    array = rows(region)
    array[:BLOCKS // 2] += 1
    store.fail(0, 1 << 40, -errno.EIO)
    right = pattern(0, 4 * BLOCKS * SIZE).reshape(-1, SIZE).copy()
    right[:BLOCKS // 2] += 1
    for _ in range(2):
        np.testing.assert_array_equal(array, right)
        assert region.dirty()[:BLOCKS // 2].all()
        assert engine.resident_bytes <= BLOCKS * SIZE
    assert region.stats().write_errors > 0
    store.heal()
    deadline = time.monotonic() + 15
    while region.dirty()[:BLOCKS // 2].all():
        assert array[BLOCKS:, 0].sum() >= 0  # pressure
        assert time.monotonic() < deadline, "nothing is tried again"
    np.testing.assert_array_equal(array, right)
    region.flush()
    np.testing.assert_array_equal(held(store), right)
    del array


@pytest.mark.deadline(60)
@pytest.mark.parametrize("on_error", ["poison", "wait"])
def test_no_room_since_nothing_can_be_stored(where, on_error):
    """Goal: with the whole budget dirty and a store that takes nothing, a touch fails loudly after timeout_s, by signal
    and with numbers, or waits (on_error="wait") until the store takes it; what was written is intact in both."""
    result = run_script("""
engine = uffd.Engine(workers=1, budget_bytes=16 * PAGE)
provider, store = stored(64 * PAGE)
store.fail(0, 64 * PAGE, -errno.ENOSPC)
r = region(None, provider, engine=engine, name="weights", block_bytes=PAGE, retries=0, timeout_s=1.0,
           on_error=sys.argv[1], readahead_bytes=0)
a = r.array("u1", (64, PAGE))
def heal():
    time.sleep(2.5)
    say(f"written {int((store.held == 7).reshape(64, PAGE).all(axis=1).sum())}")
    if sys.argv[1] == "wait":
        store.heal()
    else:
        time.sleep(20)
        os._exit(3)
threading.Thread(target=heal, daemon=True).start()
began = time.monotonic()
for block in range(64):
    a[block] = 7
assert sys.argv[1] == "wait" and time.monotonic() - began > 2, "not a wait"
r.flush()
assert (store.held == 7).all()
say("whole")
""", 30, where=where, argv=[on_error])
    if on_error == "wait":
        assert "whole" in result.check().stdout
    else:
        assert result.signal == signal.SIGBUS, result.describe()
        assert "weights" in result.stderr and "no room" in result.stderr and str(16 * PAGE) in result.stderr


# ---- several threads


@pytest.mark.deadline(60)
def test_every_flush_has_stored_what_was_written_before_it(where):
    """Goal: of several threads that write and flush, each finds its own writes in the store when its flush returns,
    whoever of them stored it; blocks are never written twice at the same time.
    Method: neighbouring blocks belong to different threads, so that one's flush takes the others' blocks along."""
    run_script("""
BLOCKS = 32
provider, store = stored(BLOCKS * PAGE)
counts = store.count_blocks(PAGE)
r = region(None, provider, block_bytes=PAGE)
a = r.array("<u8", (BLOCKS, PAGE // 8))
words = store.held.view("<u8").reshape(BLOCKS, PAGE // 8)
errors = []
end = time.monotonic() + float(sys.argv[1])
def work(mine):
    n = 0
    try:
        while time.monotonic() < end:
            n += 1
            a[mine::4] = n * 4 + mine
            r.flush()
            if not (words[mine::4] == n * 4 + mine).all():
                errors.append(f"thread {mine}: flush {n} returned before its bytes were stored")
    except BaseException as error:
        errors.append(repr(error))
threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(30)
    assert not thread.is_alive(), "hangs"
assert not errors, (len(errors), errors[:3])
assert store.overlaps == 0
say(f"{int(counts.sum())} block writes")
""", 45, where=where, argv=[1.5]).check()


@pytest.mark.deadline(60)
def test_every_failed_flush_says_so(where):
    """Goal: two threads that flush what can't be stored both hear of it, each time: neither takes the other's error."""
    run_script("""
provider, store = stored(4 * PAGE)
store.fail(0, 4 * PAGE, -errno.EIO)
store.delay_us = 200
r = region(None, provider, block_bytes=PAGE, retries=0)
a = r.array()
a[:] = 5
silent, heard = [], []
end = time.monotonic() + 1.5
def work():
    while time.monotonic() < end:
        try:
            r.flush()
            silent.append(1)
        except uffd.ProviderError:
            heard.append(1)
threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(30)
    assert not thread.is_alive(), "hangs"
assert heard and not silent, f"{len(silent)} of {len(silent) + len(heard)} flushes returned with nothing stored"
assert r.dirty().all()
store.heal()
r.flush()
assert (store.held == 5).all()
""", 45, where=where).check()


def test_writes_during_a_flush(made):
    """Goal: a write while its block is on its way to the store is not lost: it is dirty afterwards, and the next flush
    has it. Method: a store that waits in the middle of a write."""
    region, store = made
    array = rows(region)
    array[5] = 1
    store.close_gate(5 * SIZE, 6 * SIZE)
    flush = threading.Thread(target=region.flush)
    flush.start()
    wait_until(lambda: store.gate_waiters, "no write under way")
    assert region.dirty()[5] and (array[5] == 1).all()  # not acknowledged
    array[5] = 2
    array[6] = 3
    store.open_gate()
    flush.join(10)
    assert not flush.is_alive()
    assert region.dirty()[5]
    assert (held(store)[5] <= 2).all()
    region.flush()
    assert (held(store)[5] == 2).all() and (held(store)[6] == 3).all()
    assert not region.dirty().any() and store.overlaps == 0
    del array


def test_a_block_on_its_way_is_not_dropped(made, engine):
    """Goal: a block leaves memory when its write is acknowledged and not before, whoever wants it gone."""
    region, store = made
    array = rows(region)
    region.populate()
    array[5] = 1
    store.close_gate(5 * SIZE, 6 * SIZE)
    flush = threading.Thread(target=region.flush)
    flush.start()
    wait_until(lambda: store.gate_waiters, "no write under way")
    engine.budget_bytes = 16 * SIZE
    wait_until(lambda: engine.resident_bytes <= 16 * SIZE, "it does not shrink")
    assert region.resident()[5] and region.dirty()[5]
    store.open_gate()
    flush.join(10)
    assert (held(store)[5] == 1).all() and (array[5] == 1).all()
    del array


# ---- time


SLOW = """
provider, store = stored(64 * PAGE * 16)
store.delay_us = 300000
r = region(None, provider, block_bytes=16 * PAGE)
a = r.array()
a[:] = 7
"""


@pytest.mark.deadline(60)
def test_timeout(where):
    """Goal: flush(timeout_s) of a slow store ends soon after that with a TimeoutError that says what is left, by far
    not after all its blocks; a later one stores the rest."""
    run_script(SLOW + """
for timeout_s in (0.2, 0):
    began = time.monotonic()
    try:
        r.flush(timeout_s=timeout_s)
        say("in time")
    except TimeoutError as error:
        took = time.monotonic() - began
        assert took < timeout_s + 1.0, f"{took:.1f} s"
        assert "blocks are left" in str(error), error
        say("raised")
assert r.dirty().any() and (a == 7).all()
store.delay_us = 0
r.flush(timeout_s=20)
assert (store.held == 7).all() and not r.dirty().any()
""", 45, where=where).check()


@pytest.mark.deadline(60)
def test_ctrl_c(where):
    """Goal: Ctrl-C interrupts a flush of a slow store within a second; nothing is lost."""
    process = start_script(SLOW + """
say("ready")
began = time.monotonic()
try:
    r.flush()
    say("not interrupted")
except KeyboardInterrupt:
    say(f"interrupted after {time.monotonic() - began:.2f}")
assert r.dirty().any() and (a == 7).all()
store.delay_us = 0
r.flush()
assert (store.held == 7).all()
""", where=where)
    wait_for_line(process, "ready")
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    result = finish_script(process, 30).check()
    assert "interrupted after" in result.stdout, result.describe()
    assert float(result.stdout.split("after ")[1].split()[0]) < 2.0, result.stdout


# ---- the end of a region


ENDS = {
    "close": "del a\nr.close()",
    "with": "with r:\n    del a",
    "with, array lives": "with r:\n    pass\na[1] = 8\ndel a\nr = None",
    "last array dies": "r = None\ndel a",
    "last view dies": "b = a[3:5, 1:]\nr = None\ndel a\nb[:] = 9\ndel b",
    "engine with": "with engine:\n    pass",
    "engine closed": "del a\nengine.close()",
    "exit": "",
    "exit without the region": "r = engine = None",
    "dies and exits": "r = None\ndel a\nsys.exit(0)",
    "sys.exit": "sys.exit(0)",
    "exception": "raise KeyError('mine')",
    "exit with a thread": "threading.Thread(target=time.sleep, args=(0.3,)).start()",
}


@pytest.mark.parametrize("slow", [False, True], ids=["", "slow"])
@pytest.mark.parametrize("end", ENDS)
def test_every_end_flushes(tmp_path, end, slow):
    """Goal: however a region ends, short of os._exit and signals that kill, what was written is in the file then.
    Method: slow: each write takes 50 ms, so that an end that does not wait for it is seen."""
    path = tmp_path / "data"
    pattern(0, 32 * PAGE).tofile(path)
    result = run_script("""
engine = uffd.Engine(workers=2)
if sys.argv[2] == "True":
    provider, store = stored(32 * PAGE)
    store.held = np.memmap(sys.argv[1], "u1", "r+")       # stored bytes outlive the process
    store.bytes = store.held.ctypes.data
    store.delay_us = 50000
else:
    provider = providers.File(sys.argv[1], writable=True)
r = region(None, provider, engine=engine, block_bytes=PAGE)
a = r.array("u1", (32, PAGE))
a[::2] = 7
provider = None
""" + ENDS[end] + "\n", 20, where="thread-anon", argv=[path, slow])
    assert result.returncode == (1 if end == "exception" else 0), result.describe()
    assert end == "exception" or not result.stderr, result.describe()
    right = pattern(0, 32 * PAGE).reshape(32, PAGE).copy()
    right[::2] = 7
    if end == "with, array lives":
        right[1] = 8
    if end == "last view dies":
        right[3:5, 1:] = 9
    np.testing.assert_array_equal(np.fromfile(path, "u1").reshape(32, PAGE), right)


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_what_was_flushed_outlives_a_sudden_end(where, tmp_path, end):
    """Goal: os._exit and SIGKILL lose what was not flushed, and nothing else: the file has no byte that is neither the
    old one nor one that was written."""
    path = tmp_path / "data"
    pattern(0, 32 * PAGE).tofile(path)
    run_script("""
r = region(None, providers.File(sys.argv[1], writable=True), block_bytes=PAGE)
a = r.array("u1", (32, PAGE))
a[:10] = 7
r.flush()
a[5:20] = 8
""" + end + "\n", 20, where=where, argv=[path])
    found, old = np.fromfile(path, "u1").reshape(32, PAGE), pattern(0, 32 * PAGE).reshape(32, PAGE)
    assert (found[:5] == 7).all() and np.isin(found[5:10], (7, 8)).all()
    assert ((found[10:20] == 8) | (found[10:20] == old[10:20])).all()
    np.testing.assert_array_equal(found[20:], old[20:])


FAILING = """
provider, store = stored(8 * PAGE)
store.fail(2 * PAGE, 4 * PAGE, -errno.ENOSPC)
r = region(None, provider, name="weights", block_bytes=PAGE, retries=1)
a = r.array("u1", (8, PAGE))
a[:] = 7
"""


def test_the_last_array_dies_and_nothing_can_be_stored(where):
    """Goal: nobody is there to raise at, so sys.unraisablehook hears of it: which region, how many blocks, why. The
    blocks that could be stored are."""
    run_script(FAILING + """
heard = []
sys.unraisablehook = heard.append
r = None
del a
wait_until(lambda: heard, "nobody is told", 10)
error = heard[0].exc_value
assert heard[0].exc_type is uffd.ProviderError and error.errno == errno.ENOSPC, error
assert "weights" in str(error) and "2 blocks" in str(error), error
assert len(heard) == 1
kept = [0, 1, 4, 5, 6, 7]
assert (store.held.reshape(8, PAGE)[kept] == 7).all()
""", 30, where=where).check()


def test_leaving_a_region_that_cannot_be_flushed(where):
    """Goal: the `with` statement's end raises; the body's own exception is its context, not lost."""
    run_script(FAILING + """
del a
try:
    with r:
        raise KeyError("mine")
except uffd.ProviderError as error:
    assert isinstance(error.__context__, KeyError), repr(error.__context__)
    assert len(error.failed) == 2 and error.errno == errno.ENOSPC
else:
    raise SystemExit("nothing raised")
assert r.closed
""", 30, where=where).check()


def test_close_raises_and_stays_open(made):
    region, store = made
    array = rows(region)
    array[3] = 1
    store.fail(0, 1 << 40, -errno.EIO)
    del array
    for _ in range(2):
        with pytest.raises(uffd.ProviderError):
            region.close()
        assert not region.closed and region.dirty()[3]
    store.heal()
    region.close()
    assert region.closed and (held(store)[3] == 1).all()


@pytest.mark.parametrize("how", ["flush", "close", "exit"])
def test_one_region_that_fails_does_not_keep_the_others(tmp_path, how):
    """Goal: an engine of which one region can't be flushed stores the others, raises for it, and at the process's end
    says so on stderr."""
    paths = [tmp_path / str(n) for n in range(4)]
    for path in paths:
        pattern(0, 8 * PAGE).tofile(path)
    result = run_script("""
engine = uffd.Engine(workers=2)
bad_provider, bad = stored(8 * PAGE)
bad.fail(0, 8 * PAGE, -errno.EIO)
regions, arrays = [], []
for n, path in enumerate(sys.argv[2:]):
    regions.append(region(None, providers.File(path, writable=True), engine=engine, block_bytes=PAGE))
    if n == 1:
        regions.append(region(None, bad_provider, name="bad", engine=engine, block_bytes=PAGE, retries=0))
arrays = [r.array() for r in regions]
for a in arrays:
    a[:] = 7
if sys.argv[1] != "exit":
    del a
    arrays.clear()
    try:
        engine.flush() if sys.argv[1] == "flush" else engine.close()
        raise SystemExit("nothing raised")
    except uffd.ProviderError as error:
        assert error.region == "bad" and len(error.failed) == 8
    assert not regions[2].closed
    os._exit(0)
""", 20, where="thread-anon", argv=[how, *paths])
    assert result.returncode == 0, result.describe()
    assert how != "exit" or "'bad'" in result.stderr, result.describe()
    for path in paths:
        assert (np.fromfile(path, "u1") == 7).all(), path.name


def test_a_child_stores_nothing(where, tmp_path):
    """Goal: in a forked child "r+" is private: it writes, flushes, evicts, closes and exits, and the file and the
    parent's bytes are what the parent made them."""
    path = tmp_path / "data"
    pattern(0, 32 * PAGE).tofile(path)
    run_script("""
engine = uffd.Engine(workers=2, budget_bytes=16 * PAGE)
r = region(None, providers.File(sys.argv[1], writable=True), engine=engine, block_bytes=PAGE)
a = r.array("u1", (32, PAGE))
a[:8] = 7
pid = os.fork()
if not pid:
    try:
        for _ in range(2):
            assert (a[:8] == 7).all()
            a[8:] = 9
            assert (a[8:] == 9).all()
            r.flush()
            engine.flush()
        r.evict()
        assert (a[8:] == 9).all() and (a[:8] == 7).all()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    sys.exit(0)                       # the child's own atexit
assert wait_for_child(pid, 20) == 0
right = pattern(0, 32 * PAGE).reshape(32, PAGE).copy()
right[:8] = 7
assert np.array_equal(a, right)
found = np.fromfile(sys.argv[1], "u1").reshape(32, PAGE)
assert not (found == 9).all(axis=1).any()
r.flush()
assert np.array_equal(np.fromfile(sys.argv[1], "u1").reshape(32, PAGE), right)
""", 40, where=where, argv=[path]).check()


# ---- files, and what the kernel may answer


FILE = """
from support import shim
pattern(0, 32 * PAGE).tofile("data")
r = region(None, providers.File("data", writable=True), name="weights", block_bytes=PAGE, retries=1)
a = r.array("u1", (32, PAGE))
r.populate()
a[:20] = 7
right = pattern(0, 32 * PAGE).reshape(32, PAGE).copy()
right[:20] = 7
def found():
    return np.fromfile("data", "u1").reshape(32, PAGE)
"""


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_file_that_takes_nothing(where, number):
    run_script(FILE + f"""
rule = shim.Rule("pwrite", 1, -1, {number})
try:
    r.flush()
    raise SystemExit("nothing raised")
except uffd.ProviderError as error:
    assert error.errno == {number} and error.region == "weights" and "data" in str(error), error
    assert sorted(offset for offset, _, _ in error.failed) == [n * PAGE for n in range(20)]
assert r.dirty()[:20].all() and np.array_equal(a, right)
shim.clear()
r.flush()
assert np.array_equal(found(), right) and not r.dirty().any()
""", where=where, preload=shim.path()).check()


@pytest.mark.parametrize("nbytes", [1, 100, PAGE, 5000])
def test_short_writes_of_a_file(where, nbytes):
    """Goal: a pwrite that takes less than it was given is gone on with, byte for byte."""
    run_script(FILE + f"""
rule = shim.Rule("pwrite", 1, {400 if nbytes == 1 else -1}, 0, shim.SHORT, {nbytes})
r.flush()
assert rule.fired > 3
assert np.array_equal(found(), right)
""", where=where, preload=shim.path()).check()


def test_a_file_that_cannot_be_made_durable(where):
    """Goal: a failing fdatasync is flush's error, and what was written before it is not taken for stored: the kernel
    may have dropped it, and says so only once. The next flush writes all of it again, and asks for a sync again."""
    run_script(FILE + """
r.flush()
a[3] = right[3] = 9
rule = shim.Rule("fdatasync", 1, 2, errno.EIO)
def fails():
    try:
        r.flush()
        raise SystemExit("nothing raised")
    except uffd.ProviderError as error:
        assert error.errno == errno.EIO and "durable" in str(error) and "weights" in str(error), error
        return error
for _ in range(2):
    fails()
    assert r.dirty().nonzero()[0].tolist() == [3], "what was flushed before that is durable"
    pattern(3 * PAGE, PAGE).tofile("page")      # the kernel has dropped what it could not write
    with open("data", "r+b") as file:
        file.seek(3 * PAGE)
        file.write(open("page", "rb").read())
r.flush()
assert rule.calls == 3 and rule.fired == 2
assert np.array_equal(found(), right) and not r.dirty().any()
a[4] = right[4] = 9
a[5] = right[5] = 9
r.evict((4 * PAGE, 5 * PAGE))                   # acknowledged, gone from memory, and read again from the file
assert (a[4] == 9).all()
rule = shim.Rule("fdatasync", 1, 1, errno.EIO)
for _ in range(2):
    error = fails()
    assert error.failed == [(4 * PAGE, PAGE, errno.EIO)] and "had left memory" in str(error), error
assert np.array_equal(found(), right), "the others are stored all the same"
r.discard((4 * PAGE, 5 * PAGE))                 # given up
a[6] = right[6] = 9
r.flush()
assert np.array_equal(found(), right)
""", where=where, preload=shim.path()).check()


def test_a_file_at_an_offset(make, tmp_path):
    """Goal: a file's bytes before and behind the region's are left alone; its size stays."""
    path = tmp_path / "data"
    pattern(0, 10 * PAGE + 123).tofile(path)
    provider = providers.File(path, 100, writable=True)
    region = make(5 * PAGE + 7, provider, block_bytes=PAGE)
    array = region.array()
    array[:] = 7
    region.flush()
    found, right = np.fromfile(path, "u1"), pattern(0, 10 * PAGE + 123).copy()
    right[100:100 + 5 * PAGE + 7] = 7
    np.testing.assert_array_equal(found, right)
    del array


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 6 * PAGE), (0, 5 * PAGE + 1001), (3 * PAGE, 5 * PAGE + 7),
                                                (512, 6 * PAGE), (100, 5 * PAGE + 1)])
def test_a_file_past_the_page_cache(make, tmp_path, offset, nbytes):
    """Goal: what is written goes back by O_DIRECT, or beside it where neither the file nor the disk is of whole pages;
    it is read again as it was written, and the bytes around are left alone."""
    path = tmp_path / "data"
    pattern(0, offset + nbytes).tofile(path)
    try:
        provider = providers.File(path, offset, writable=True, direct=True)
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")
    region = make(None, provider, block_bytes=2 * PAGE, retries=0)
    array, right = region.array(), pattern(0, offset + nbytes).copy()
    for turn in range(3):
        array[turn::3] = right[offset + turn::3] = turn + 1
        region.flush() if turn else region.evict()
        np.testing.assert_array_equal(np.fromfile(path, "u1"), right)
        region.evict()
        np.testing.assert_array_equal(array, right[offset:])
    del array


def test_a_file_that_is_not_writable(make, tmp_path):
    path = tmp_path / "data"
    pattern(0, PAGE).tofile(path)
    with pytest.raises(ValueError, match="r\\+.*write"):
        make(None, providers.File(path), mode="r+")
    assert make(None, providers.File(path), block_bytes=PAGE).mode == "c"
    assert make(None, providers.File(path, writable=True), block_bytes=PAGE).mode == "r+"


# ---- private memory spills


SPILLS = """
engine = uffd.Engine(workers=1, budget_bytes=16 * PAGE)
r = region(64 * PAGE, providers.Zero(), name="scratch", engine=engine, block_bytes=PAGE, mode="c", retries=0,
           timeout_s=1.5, readahead_bytes=0)
a = r.array("u1", (64, PAGE))
"""


@pytest.mark.parametrize("why", ["no folder", "a file", "ENOSPC", "EIO at once", "no file"])
def test_a_folder_that_takes_nothing(where, why):
    """Goal: where cold private memory can't be written, evict says so by name and folder, and all bytes stay; a touch
    that finds no room dies loudly after timeout_s; both are over when there is room."""
    broken = {"no folder": 'os.environ["TMPDIR"] = "/nonexistent/folder"', "a file": 'os.environ["TMPDIR"] = "file"',
              "ENOSPC": 'shim.Rule("pwrite", 1, -1, errno.ENOSPC)',
              "EIO at once": 'shim.Rule("pwrite", 1, -1, errno.EIO)',
              "no file": 'shim.Rule("tmpfile", 1, -1, errno.EACCES)'}[why]
    result = run_script(f"""
from support import shim
os.environ["TMPDIR"] = os.getcwd()
open("file", "w").close()
{broken}
""" + SPILLS + """
a[:8] = 7
try:
    r.evict()
    raise SystemExit("nothing raised")
except uffd.ProviderError as error:
    assert "scratch" in str(error) and os.environ["TMPDIR"] in str(error), error
    say(f"raised {error}")
assert (a[:8] == 7).all() and r.dirty()[:8].sum() >= 7
assert (a[8:16] == 0).all()
if sys.argv[1] not in ("no folder", "a file"):
    shim.clear()
    r.evict()
    wait_until(lambda: not r.dirty().any(), "it is not written, though there is room again")
    assert (a[:8] == 7).all() and (a[8:16] == 0).all()
    for n in range(64):
        a[n] = n
    assert all((a[n] == n).all() for n in range(64))
    say("healed")
    os._exit(0)
def look():
    time.sleep(3)
    say("no end")
    os._exit(4)
threading.Thread(target=look, daemon=True).start()
for n in range(64):
    a[n] = n
    say(n)
""", 30, where=where, argv=[why], preload=shim.path())
    if why in ("no folder", "a file"):
        assert result.signal == signal.SIGBUS and "no room" in result.stderr, result.describe()
    else:
        assert "healed" in result.check().stdout


def test_a_spill_file_that_cannot_be_read(where):
    """Goal: what was spilled and can't be read back is an error, after the tries, and never zeros."""
    result = run_script("""
from support import shim
""" + SPILLS + """
a[:40] = 7
r.evict()
rule = shim.Rule("pread", 1, -1, errno.EIO)
try:
    r.populate((0, PAGE))
    raise SystemExit("nothing raised")
except uffd.ProviderError as error:
    assert error.errno == errno.EIO, error
shim.clear()
assert (a[:40] == 7).all() and (a[40:] == 0).all()
r.evict()
shim.Rule("pread", 1, -1, errno.EIO)
say(f"touch")
say(f"read {a[3, 5]}")
""", 30, where=where, preload=shim.path())
    assert result.signal == signal.SIGBUS, result.describe()
    assert "touch" in result.stdout and "read" not in result.stdout, result.describe()


def test_nothing_of_a_spill_file_is_left(where):
    """Goal: the file has no name while it is used, and is gone with the region."""
    run_script("""
os.environ["TMPDIR"] = os.getcwd()
""" + SPILLS + """
for turn in range(3):
    a[:] = turn
r.evict()
assert not [name for name in os.listdir() if name.startswith("uffd")]
def spilled():
    return [target for target in leaks.read_fds().values() if target.startswith(os.getcwd()) and "deleted" in target]
assert len(spilled()) == 1, leaks.read_fds()
assert (a == 2).all()
del a
r.close()
assert not spilled()
""", where=where).check()


def test_children_and_spilled_blocks(where):
    """Goal: what was spilled before a fork is the child's, too; what either side writes and spills afterwards is its
    own, through several generations."""
    run_script(SPILLS + """
model = np.zeros((64, PAGE), "u1")
def work(value):
    a[value % 7::7] = value
    model[value % 7::7] = value
    for _ in range(2):
        assert np.array_equal(a, model), (value, np.flatnonzero((a != model).any(axis=1)))
def generation(depth):
    for turn in range(3):
        work(10 * depth + turn + 1)
    if depth < 3:
        assert in_child(lambda: generation(depth + 1), 25) == 0
        work(10 * depth + 5)
        assert in_child(lambda: work(10 * depth + 6), 25) == 0
        work(10 * depth + 7)
generation(0)
assert r.stats().written_back > 0
""", 60, where=where).check()


# ---- providers in Python


@pytest.mark.deadline(90)
def test_hosted_from_end_to_end(make, engine, tmp_path):
    """Goal: a region over a provider in Python that writes, of four times the budget: written at random, evicted,
    stored by its `write`, read again by its `read`, and durable by its `flush`."""
    engine.budget_bytes = BLOCKS * SIZE
    path, log, size = str(tmp_path / "store"), str(tmp_path / "log"), 4 * BLOCKS * SIZE
    pattern(0, size).tofile(path)
    region = make(size, Store(path, size, log, concurrency=2), block_bytes=SIZE)
    assert region.mode == "r+"
    array, model = rows(region), pattern(0, size).reshape(-1, SIZE).copy()
    rng = np.random.default_rng(3)
    for _ in range(6):
        for block in rng.integers(0, len(model), 40):
            array[block] += 1
            model[block] += 1
        for block in rng.integers(0, len(model), 60):
            np.testing.assert_array_equal(array[block], model[block])
        assert engine.resident_bytes <= BLOCKS * SIZE
    assert region.stats().evicted > 0 and region.stats().written_back > 0
    region.flush()
    np.testing.assert_array_equal(np.fromfile(path, "u1").reshape(-1, SIZE), model)
    assert lines(log)[-1].startswith("flush") and not region.dirty().any()
    array[5] = 1
    model[5] = 1
    del array
    region.close()
    wait_until(lambda: lines(log)[-1:] == ["close"], "its provider is not closed")
    assert [line.split()[0] for line in lines(log)[-3:]] == ["write", "flush", "close"]
    np.testing.assert_array_equal(np.fromfile(path, "u1").reshape(-1, SIZE), model)


@pytest.mark.parametrize(("how", "number", "text"), [
    ("write_raises", errno.EIO, "no room here"), ("write_raises_errno", errno.ENOSPC, "the disk is full"),
    ("write_is_short", errno.EIO, "short write"), ("write_dies", None, "")])
def test_hosted_writes_that_fail(make, tmp_path, how, number, text):
    """Goal: flush raises with what the provider said; the block stays dirty with its bytes, the others are stored,
    those too that were written together with it."""
    path = str(tmp_path / "store")
    pattern(0, 4 * BLOCK).tofile(path)
    region = make(4 * BLOCK, BadWriter(how, path, 4 * BLOCK), retries=1, timeout_s=10)
    array = region.array("u1", (4, BLOCK))
    array[1] = 7
    array[2:] = 8
    with pytest.raises(uffd.ProviderError) as caught:
        region.flush()
    assert number is None or caught.value.errno == number
    assert text in (caught.value.provider_traceback or "") and text in str(caught.value)
    assert [offset for offset, _, _ in caught.value.failed] == [BLOCK]
    assert np.flatnonzero(region.dirty()).tolist() == [1]
    assert (array[1] == 7).all() and (array[2:] == 8).all()
    assert (np.fromfile(path, "u1").reshape(4, BLOCK)[2:] == 8).all()
    region.discard()
    del array


def test_hosted_write_that_fails_for_a_while(make, tmp_path):
    path = str(tmp_path / "store")
    pattern(0, 4 * BLOCK).tofile(path)
    region = make(4 * BLOCK, BadWriter("write_raises", path, 4 * BLOCK, at_most=2), retries=3)
    array = region.array("u1", (4, BLOCK))
    array[1] = 7
    region.flush()
    assert (np.fromfile(path, "u1").reshape(4, BLOCK)[1] == 7).all() and not region.dirty().any()
    del array


def test_hosted_flush_that_fails(make, tmp_path):
    path = str(tmp_path / "store")
    pattern(0, 4 * BLOCK).tofile(path)
    region = make(4 * BLOCK, BadWriter("flush_raises_errno", path, 4 * BLOCK, at_most=2), retries=0)
    array = region.array("u1", (4, BLOCK))
    array[1] = 7
    for _ in range(2):
        with pytest.raises(uffd.ProviderError, match="durable") as caught:
            region.flush()
        assert caught.value.errno == errno.EIO and "the tape is torn" in (caught.value.provider_traceback or "")
    region.flush()
    del array


@pytest.mark.parametrize("written", ["evicted", "dirty", "nothing"])
def test_hosted_last_array_dies(make, tmp_path, written):
    """Goal: when the last array of a region dies, what was written is made durable, also where eviction had stored all
    of it before; nothing is flushed where nothing was written."""
    path, log = str(tmp_path / "store"), str(tmp_path / "log")
    pattern(0, 4 * BLOCK).tofile(path)
    region = make(4 * BLOCK, Store(path, 4 * BLOCK, log))
    array = region.array("u1", (4, BLOCK))
    if written == "nothing":
        assert array[1, 0] == pattern(BLOCK, 1)[0]
    else:
        array[1] = 7
    if written == "evicted":
        assert region.evict() == BLOCK
        assert not any(line.startswith("flush") for line in lines(log))
    with region:
        pass
    at_exit = [line.split()[0] for line in lines(log)]
    assert written == "nothing" or at_exit.count("flush") == 1
    array[2] = 8
    del array
    wait_until(lambda: lines(log)[-1:] == ["close"], "its provider is not closed")
    words = [line.split()[0] for line in lines(log)]
    assert words[-2:] == ["flush", "close"], words
    assert (np.fromfile(path, "u1").reshape(4, BLOCK)[2] == 8).all()


@pytest.mark.deadline(90)
def test_hosted_host_killed_under_load(where, tmp_path):
    """Goal: a host that is killed again and again while blocks go to it and come from it loses no acknowledged byte.
    Method: SIGKILL from outside each 100 ms; the provider stores by pwrite; a shadow of all blocks."""
    path = tmp_path / "store"
    pattern(0, 128 * SIZE).tofile(path)
    run_script("""
from support.hosted_writers import Store
SIZE = 4 * PAGE
engine = uffd.Engine(workers=2, budget_bytes=32 * SIZE)
r = region(128 * SIZE, Store(sys.argv[1], 128 * SIZE, "log"), engine=engine, block_bytes=SIZE, timeout_s=20)
a = r.array("u1", (128, SIZE))
model = pattern(0, 128 * SIZE).reshape(128, SIZE).copy()
rng = np.random.default_rng(1)
stop = threading.Event()
killed = []
def kill():
    while not stop.wait(0.15):
        with open("log") as file:
            pid = [line.split()[1] for line in file if line.startswith("open")][-1]
        if pid not in killed and len(killed) < 3:
            killed.append(pid)
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
killer = threading.Thread(target=kill)
killer.start()
end = time.monotonic() + 2
while time.monotonic() < end:
    block = int(rng.integers(0, 128))
    assert np.array_equal(a[block], model[block]), block
    a[block] += 1
    model[block] += 1
stop.set()
killer.join()
r.flush()
assert np.array_equal(a, model)
assert np.array_equal(np.fromfile(sys.argv[1], "u1").reshape(128, SIZE), model)
assert killed
""", 60, where=where, argv=[path]).check()
