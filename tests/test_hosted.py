"""Providers in Python, end to end: content, errors, time-outs, buffers that are kept, offers, batches, hosts' lives."""

import ctypes
import errno
import mmap
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import uffd
from support import hosted
from support.hosted import BLOCK, Broken, Keeps, Many, Offers, Pattern, Slow, fill_pattern, lines
from support.hosted_concurrent import Concurrent
from support.pattern import pattern, stress_seconds
from support.scripts import run_script

def pids(engine):
    return engine._threads.host_pids()


def wait_until(condition, what, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@pytest.mark.parametrize("provider", [fill_pattern, Pattern(10 * BLOCK + 777), Pattern(10 * BLOCK + 777, concurrency=4),
                                      Many(10 * BLOCK + 777), Offers(10 * BLOCK + 777)],
                         ids=["function", "class", "concurrent", "many", "offers"])
def test_content(make, provider):
    """Goal: the provider's bytes, by touch in any order, prefetch and populate, the odd end included."""
    region = make(10 * BLOCK + 777, provider)
    array = region.array()
    right = pattern(0, 10 * BLOCK + 777)
    for offset in (5 * BLOCK + 3, 0, 10 * BLOCK + 776, 9 * BLOCK - 1):
        assert array[offset] == right[offset]
    region.prefetch((2 * BLOCK, 4 * BLOCK)).wait(20)
    region.populate()
    assert np.array_equal(array, right)
    assert region.stats().bytes_filled >= 10 * BLOCK + 777
    array[7] = 1
    assert region.dirty().sum() == 1 or not region.tracked
    del array


def test_writes_stay_private(make):
    """Goal: a store is kept, what is around it comes from the provider, the provider never sees it."""
    array = make(4 * BLOCK, fill_pattern).array()
    array[BLOCK] ^= 0xFF
    right = pattern(0, 4 * BLOCK).copy()
    right[BLOCK] ^= 0xFF
    assert np.array_equal(array, right)
    del array


def test_size_known_after_open(make):
    """Goal: nbytes None takes what open() found out; more than that is refused."""
    region = make(None, hosted.KnownAfterOpen())
    assert region.nbytes == 3 * BLOCK + 100
    with pytest.raises(ValueError, match="holds 196708 bytes"):
        make(4 * BLOCK, hosted.KnownAfterOpen())


def test_function_without_size_is_refused(make):
    with pytest.raises(ValueError, match="no size of its own"):
        make(None, fill_pattern)


def test_open_fails(make):
    """Goal: an error of open() comes at once, with its errno and the provider's traceback."""
    with pytest.raises(uffd.ProviderError, match="the vault is shut") as caught:
        make(BLOCK, hosted.FailsToOpen(BLOCK))
    assert caught.value.errno == errno.EACCES
    assert "FailsToOpen" in str(caught.value)
    assert "in open" in caught.value.provider_traceback
    del caught


@pytest.mark.parametrize(("how", "number", "words"), [
    ("raises", errno.EIO, "no such block here"), ("raises_errno", errno.ENOENT, "the source is gone"),
    ("exits", errno.EIO, "SystemExit"), ("returns_bytes", errno.EIO, "bytes"),
    ("returns_short", errno.EIO, "65535"), ("recurses", errno.EIO, "RecursionError")])
def test_errors_have_their_own_words(make, how, number, words):
    """Goal: each failure reaches the caller by name, of its block alone; the others are filled."""
    region = make(None, Broken(how), retries=1)
    with pytest.raises(uffd.ProviderError) as caught:
        region.populate()
    error = caught.value
    assert (error.errno, error.offset, error.nbytes) == (number, BLOCK, BLOCK)
    assert words in str(error) or words in error.provider_traceback
    del caught, error
    for start in (0, 2 * BLOCK):
        region.populate((start, start + BLOCK))
    array = region.array()
    assert np.array_equal(array[2 * BLOCK:3 * BLOCK], pattern(2 * BLOCK, BLOCK))
    del array


def test_populate_names_the_first_block_that_failed(make):
    """Goal: of several blocks that can't be filled it is the lowest that is told, whichever failed first; blocks before
    it are there. A cancelled populate still ends at once."""
    region = make(64 * BLOCK, hosted.BrokenTwice(64 * BLOCK, concurrency=4), retries=0)
    for _ in range(3):
        with pytest.raises(uffd.ProviderError, match="block 3") as caught:
            region.populate()
        assert caught.value.offset == 3 * BLOCK
    assert region.resident()[:3].all() and not region.resident()[3]


def test_not_filled_whole_is_an_error(make):
    """Goal: what the provider left unwritten is neither zeros nor another block's bytes."""
    region = make(None, hosted.Unfilled(4 * BLOCK), retries=0)
    with pytest.raises(uffd.ProviderError, match="not filled whole"):
        region.populate()


def test_retries(make):
    """Goal: a block that fails twice is there at the third try."""
    region = make(4 * BLOCK, hosted.Once(2, 4 * BLOCK), retries=3)
    region.populate()
    array = region.array()
    assert np.array_equal(array, pattern(0, 4 * BLOCK))
    del array
    assert region.stats().retries > 0


def test_late_writes_reach_nobody(make, capfd):
    """Goal: a provider that keeps `out` and writes to it later changes no array, neither its own nor another's,
    and is named."""
    region, other = make(8 * BLOCK, Keeps()), make(64 * BLOCK, fill_pattern)
    array, beside = region.array(), other.array()
    region.populate()
    other.populate((0, 32 * BLOCK))
    time.sleep(0.6)
    other.populate()
    assert np.array_equal(array, pattern(0, 8 * BLOCK))
    assert np.array_equal(beside, pattern(0, 64 * BLOCK))
    del array, beside
    assert "kept `out`" in capfd.readouterr().err


def test_offers_are_taken(make, tmp_path):
    """Goal: blocks that the provider offers are there without being asked for, and asked for only once."""
    log = tmp_path / "log"
    region = make(16 * BLOCK, Offers(log=str(log)), readahead_bytes=0)
    array = region.array()
    assert array[3 * BLOCK] == pattern(3 * BLOCK, 1)[0]
    assert region.resident()[:8].all() and not region.resident()[8:].any()
    assert np.array_equal(array, pattern(0, 16 * BLOCK))
    del array
    assert [line for line in lines(log) if line.startswith("read")] == [
        f"read {3 * BLOCK} {BLOCK}", f"read {8 * BLOCK} {BLOCK}"]
    assert lines(log).count("offer True") == 2


def test_neighbours_come_together(make, tmp_path):
    """Goal: read_many gets the requests that wait, several at once."""
    log = tmp_path / "log"
    region = make(400 * BLOCK, Many(log=str(log)), block_bytes=BLOCK)
    runs = [(block * BLOCK, (block + 1) * BLOCK) for block in range(0, 400, 3)]
    for fetch in [region.prefetch(run) for run in runs]:
        fetch.wait(30)
    counts = [int(line.split()[1]) for line in lines(log) if line.startswith("many")]
    alone = [line for line in lines(log) if line.startswith("read")]
    assert sum(counts) + len(alone) == len(runs) and max(counts) > 4, counts
    assert region.resident()[::3].all()


def test_who_waits_does_not_wait_for_what_nobody_waits_for(make, tmp_path):
    """Goal: a block that is asked for is not read together with those of a prefetch. Method: they queue up behind a
    request that is held; in which order they are taken then does not matter."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    region = make(400 * BLOCK, hosted.Waits(None, str(log), str(gate)), block_bytes=BLOCK, readahead_bytes=0)
    jobs = [region.prefetch((0, BLOCK))]
    wait_until(lambda: "asked 0" in lines(log), "the first is not read", 20)
    jobs += [region.prefetch((block * BLOCK, (block + 1) * BLOCK)) for block in range(100, 110, 2)]
    time.sleep(0.2)
    waiting = threading.Thread(target=region.populate, args=((300 * BLOCK, 301 * BLOCK),))
    waiting.start()
    time.sleep(0.2)
    gate.touch()
    waiting.join()
    for job in jobs:
        job.wait(30)
    asked = [line.split()[1:] for line in lines(log) if line.startswith("asked")]
    assert ["300"] in asked, asked
    assert sorted(int(block) for batch in asked for block in batch) == [0, *range(100, 110, 2), 300], asked


@pytest.mark.parametrize("limit", [1, 3])
def test_concurrency_is_kept_to(make, tmp_path, limit):
    """Goal: no more calls of one provider at once than it allows, and as many as it allows."""
    log = tmp_path / "log"
    region = make(24 * BLOCK, Concurrent(limit, str(log)), readahead_bytes=0)
    fetches = [region.prefetch((block * BLOCK, (block + 1) * BLOCK)) for block in range(24)]
    for fetch in fetches:
        fetch.wait(30)
    seen = [int(line) for line in lines(log)]
    assert max(seen) == limit, seen


def test_slow_provider_holds_up_nobody(make):
    """Goal: while one provider sleeps, another region of the same engine, hosted or not, is served."""
    slow = make(BLOCK, Slow(1.5, BLOCK))
    fetch = slow.prefetch()
    others = [make(8 * BLOCK, fill_pattern), make(8 * BLOCK, uffd.providers.Zero())]
    for other in others:
        other.populate()
    assert not fetch.done()
    fetch.wait(20)


def test_a_long_prefetch_makes_way_for_who_waits(make):
    """Goal: the requests that a prefetch has under way go to a populate as they end, not to its own next pieces.
    Method: a prefetch of hundreds of pieces that would take many seconds, and has all requests that it can have."""
    slow, other = make(800 * BLOCK, Slow(0.03), block_bytes=BLOCK), make(8 * BLOCK, fill_pattern)
    fetch = uffd.prefetch(slow.array(), np.arange(0, 800 * BLOCK, 2 * BLOCK))
    wait_until(lambda: slow.resident()[:100:2].sum() > 5, "the prefetch does not begin", 20)
    other.populate()
    assert other.resident().all() and not fetch.done()
    fetch.cancel()
    fetch.wait(20)


def test_time_out_names_the_block_and_spares_the_others(make, capfd):
    """Goal: a provider that sleeps for ever fails its block by name; a request of another provider that was under way
    in the same host is given again."""
    make(BLOCK, fill_pattern).populate()        # the host is up: its start has a time-out of its own
    region, other = make(None, Broken("sleeps"), timeout_s=1.0, retries=0), make(4 * BLOCK, Slow(1.4, 4 * BLOCK))
    fetch = other.prefetch((0, BLOCK))
    with pytest.raises(uffd.ProviderError, match="in time") as caught:
        region.populate((BLOCK, 2 * BLOCK))
    assert (caught.value.errno, caught.value.offset) == (errno.ETIMEDOUT, BLOCK)
    del caught
    fetch.wait(20)
    array = other.array()
    assert array[9] == pattern(9, 1)[0]
    del array
    region.populate((0, BLOCK))
    assert "did not answer in time" in capfd.readouterr().err


def test_a_failed_call_loses_its_buffer(make):
    """Goal: what a provider's own thread writes after its call failed reaches no block, of this region or another."""
    region = make(128 * BLOCK, hosted.Straggles(), readahead_bytes=0)
    array, right = region.array(), pattern(0, 128 * BLOCK)
    for start in range(0, 128 * BLOCK, BLOCK):
        assert np.array_equal(array[start:start + BLOCK], right[start:start + BLOCK])
    time.sleep(0.3)
    assert np.array_equal(array, right)
    del array


def test_dropped_pages_come_again(make):
    """Goal: pages that the program drops (madvise) are asked for again."""
    region = make(8 * BLOCK, fill_pattern)
    array = region.array()
    assert np.array_equal(array, pattern(0, 8 * BLOCK))
    address = ctypes.c_void_p(array.ctypes.data + BLOCK)
    assert ctypes.CDLL(None).madvise(address, ctypes.c_size_t(3 * BLOCK), mmap.MADV_DONTNEED) == 0
    assert np.array_equal(array, pattern(0, 8 * BLOCK))
    del array


def test_a_queue_is_nobodys_fault(make, engine):
    """Goal: requests that wait for their turn longer than timeout_s are not late; the host answers all the time."""
    make(BLOCK, fill_pattern).populate()        # the host is up: its start has a time-out of its own
    region = make(32 << 20, Slow(0.05, 32 << 20), timeout_s=1.0, readahead_bytes=0)
    fetch = region.prefetch()
    wait_until(lambda: region.resident().any(), "nothing came")
    first = pids(engine)
    array = region.array()
    assert array[-1] == pattern((32 << 20) - 1, 1)[0]      # before the pieces that wait, for 2 s or more
    assert not fetch.done()
    del array
    fetch.wait(50)
    assert pids(engine) == first


@pytest.mark.parametrize("backing", ["anon", "shared"])
def test_touches_that_fail_hold_up_nobody(backing):
    """Goal: while touches of a region fail for ever (on_error="wait"), other regions of the engine are served."""
    run_script(f"""
from support.hosted import FailsAlways
engine = uffd.Engine(workers=2)
bad = region(64 * BLOCK, FailsAlways(), engine=engine, on_error="wait", backing={backing!r}, delivery="thread")
good = region(64 * BLOCK, providers.Zero(), engine=engine, delivery="thread")
touch_in_threads(bad.array(), [block * BLOCK for block in range(0, 60, 5)])
time.sleep(0.5)
assert good.array().sum() == 0
os._exit(0)
""").check()


def test_closing_the_engine_ends_a_region_in_the_making():
    """Goal: Region() that waits for open() in one thread, Engine.close() in another: an error, and no crash."""
    run_script("""
from support.hosted import SleepsInOpen
engine = uffd.Engine(workers=1)
caught = []
def make():
    try:
        uffd.Region(BLOCK, SleepsInOpen(), engine=engine)
    except ValueError as error:
        caught.append(str(error))
thread = threading.Thread(target=make)
thread.start()
time.sleep(0.5)
engine.close()
thread.join()
assert caught == ["the engine was closed"], caught
""").check()


def test_interrupted_while_the_provider_is_opened():
    """Goal: Ctrl-C ends Region() that waits for open(), and the host goes on for others."""
    run_script("""
from support.hosted import SleepsInOpen, fill_pattern
other = region(64 * BLOCK, fill_pattern, readahead_bytes=0)
other.populate((0, BLOCK))
hosts = other.engine._threads.host_pids()
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    region(BLOCK, SleepsInOpen())
    assert False
except KeyboardInterrupt:
    pass
time.sleep(1.5)
assert other.array()[9 * BLOCK] == pattern(9 * BLOCK, 1)[0]
assert other.engine._threads.host_pids() == hosts
os._exit(0)
""").check()


@pytest.mark.parametrize("how", ["dies", "leaves"])
def test_a_host_that_dies_each_time(make, how):
    """Goal: a block whose provider kills its host fails by name after `retries` hosts; the others come."""
    region = make(None, Broken(how), retries=1)
    with pytest.raises(uffd.ProviderError, match="died") as caught:
        region.populate((BLOCK, 2 * BLOCK))
    assert caught.value.errno == errno.ECONNRESET
    del caught
    region.populate((0, BLOCK))
    region.populate((2 * BLOCK, 8 * BLOCK))


def test_killed_host_is_replaced(make, engine, tmp_path):
    """Goal: after SIGKILL the same region goes on in a new host, where its provider is opened again."""
    log = tmp_path / "log"
    region = make(64 * BLOCK, Pattern(log=str(log)))
    array = region.array()
    assert array[0] == pattern(0, 1)[0]
    first, = pids(engine)
    os.kill(first, signal.SIGKILL)
    assert array[40 * BLOCK] == pattern(40 * BLOCK, 1)[0]
    del array
    second, = pids(engine)
    assert second != first
    assert [line for line in lines(log) if line.startswith("open")] == [f"open {first}", f"open {second}"]


def test_host_is_killed_again_and_again(make, engine):
    """Goal: every byte is right although hosts are killed all the time. Method: a thread kills, this one reads. A host
    that has filled nothing yet is spared: on a busy machine it would never come to that, and touches have their
    time."""
    region = make(256 * BLOCK, Slow(0.002, 256 * BLOCK, concurrency=4), retries=1000)
    stop, kills, filled = threading.Event(), [], 0

    def kill():
        nonlocal filled
        while not stop.wait(np.random.uniform(0.05, 0.3)):
            if filled == (filled := np.count_nonzero(region.resident())):
                continue
            for pid in pids(engine):
                try:
                    os.kill(pid, signal.SIGKILL)
                    kills.append(pid)
                except ProcessLookupError:
                    pass

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        array = region.array()
        deadline = time.monotonic() + min(stress_seconds(), 60)
        right = pattern(0, 256 * BLOCK)
        while time.monotonic() < deadline and not (region.resident().all() and len(kills) > 3):
            block = np.random.randint(256)
            piece = slice(block * BLOCK, (block + 1) * BLOCK)
            assert np.array_equal(array[piece], right[piece])
    finally:
        stop.set()
        killer.join()
    assert kills
    assert np.array_equal(array, right)
    del array


def test_two_hosts_share_the_work(tmp_path):
    """Goal: Engine(hosts=2) opens a provider in both and runs them at once."""
    log = tmp_path / "log"
    with uffd.Engine(hosts=2) as engine:
        region = uffd.Region(64 * BLOCK, Slow(0.05, log=str(log)), engine=engine)
        fetches = [region.prefetch((block * BLOCK, (block + 1) * BLOCK)) for block in range(0, 16, 2)]
        for fetch in fetches:
            fetch.wait(20)
        assert len(pids(engine)) == 2
        region.close()
    assert len({line for line in lines(log) if line.startswith("open")}) == 2


def test_provider_is_closed_with_its_region(make, engine, tmp_path):
    """Goal: close() runs in the host when the region goes, and when the engine does."""
    log = tmp_path / "log"
    first, second = make(BLOCK, Pattern(log=str(log))), make(BLOCK, Pattern(log=str(log)))
    first.populate()
    second.populate()
    first.close()
    wait_until(lambda: any(line.startswith("close") for line in lines(log)), "close() never ran")
    second.close()
    engine.close()
    assert len([line for line in lines(log) if line.startswith("close")]) == 2


def test_no_host_no_zombie_after_the_engine():
    """Goal: closing an engine ends its hosts and leaves no zombie."""
    engine = uffd.Engine(workers=1, hosts=2)
    uffd.Region(BLOCK, fill_pattern, engine=engine).close()
    running = pids(engine)
    assert running
    engine.close()
    for pid in running:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_host_has_only_its_descriptors(make):
    """Goal: 0, 1, 2, its own two, what it opened itself (the parent's pidfd, the listing); none of the program."""
    extra = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    inherited = os.dup(extra[0])
    os.set_inheritable(inherited, True)
    try:
        array = make(BLOCK, hosted.Descriptors(BLOCK)).array()
        numbers = array[:64][array[:64] > 2].tolist()
        del array
        assert len(numbers) <= 5, numbers
    finally:
        for fd in [*extra, inherited]:
            os.close(fd)


def test_prints_come_out(make, capfd):
    """Goal: what a provider prints goes where the program's own output goes."""
    make(BLOCK, hosted.Prints()).populate()
    printed = ["", ""]

    def all_came():
        for i, text in enumerate(capfd.readouterr()):
            printed[i] += text
        return "hello from the provider" in printed[0] and "and a complaint" in printed[1]

    wait_until(all_came, "what the provider printed never came out")


def test_provider_may_fork(make):
    """Goal: a provider that forks works."""
    region = make(16 * BLOCK, hosted.Forks())
    region.populate()
    array = region.array()
    assert np.array_equal(array, pattern(0, 16 * BLOCK))
    del array


def test_not_a_provider():
    with pytest.raises(TypeError, match="is no provider"):
        uffd.Region(BLOCK, object())


def test_poison_prints_the_traceback(where):
    """Goal: a touch that can't go on ends the process by SIGBUS, with the provider's own traceback on stderr."""
    result = run_script("""
from support.hosted import Broken
a = region(None, Broken("raises"), retries=0).array()
assert a[0] == pattern(0, 1)[0]
a[BLOCK]
""", where=where)
    assert result.signal == signal.SIGBUS, result.describe()
    assert "no such block here" in result.stderr and "in raises" in result.stderr
    assert re.search(r"block at offset 65536 \(65536 bytes\) could not be filled", result.stderr)


def test_wait_for_ever(where):
    """Goal: on_error="wait" tries until the provider can."""
    run_script("""
from support.hosted import Once
a = region(4 * BLOCK, Once(5, 4 * BLOCK), retries=0, on_error="wait").array()
assert a[2 * BLOCK] == pattern(2 * BLOCK, 1)[0]
""", where=where).check()


def test_forked_child_has_a_host_of_its_own(where):
    """Goal: a child of a 4-thread parent in mid-fault reads the right bytes, from its own host; the parent goes on."""
    run_script("""
from support.hosted import Slow
r = region(64 * BLOCK, Slow(0.2, concurrency=2), readahead_bytes=0)
a = r.array()
assert a[0] == pattern(0, 1)[0]
threads = touch_in_threads(a, [block * BLOCK for block in (1, 2, 3, 4)])
time.sleep(0.1)
parents = r.engine._threads.host_pids()
def child():
    assert np.array_equal(a[2 * BLOCK:6 * BLOCK], pattern(2 * BLOCK, 4 * BLOCK))
    own = r.engine._threads.host_pids()
    assert own and not set(own) & set(parents)
assert in_child(child, 20) == 0
for thread in threads:
    thread.join()
assert np.array_equal(a[:8 * BLOCK], pattern(0, 8 * BLOCK))
assert r.engine._threads.host_pids() == parents
""", 40, where=where).check()


@pytest.mark.parametrize("end", ["sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 15)"])
def test_no_orphan(end, tmp_path):
    """Goal: however the program ends, its hosts are gone within 2 s, one in the middle of a call, too."""
    note = tmp_path / "pids"
    run_script(f"""
from support.hosted import Slow
r = region(64 * BLOCK, Slow(60))
r.prefetch()
s = region(4 * BLOCK, Slow(0))
s.populate()
open({str(note)!r}, "w").write(" ".join(map(str, r.engine._threads.host_pids())))
{end}
""")
    hosts = [int(pid) for pid in note.read_text().split()]
    assert hosts
    for pid in hosts:
        wait_until(lambda pid=pid: not running(pid), f"host {pid} is still there", 3.0)


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_terminal_interrupt_is_the_programs(where):
    """Goal: SIGINT to the whole process group does not end the host."""
    run_script("""
from support.hosted import Slow
r = region(64 * BLOCK, Slow(0.01))
r.populate((0, BLOCK))
host, = r.engine._threads.host_pids()
signal.signal(signal.SIGINT, lambda *_: None)
os.killpg(os.getpgid(0), signal.SIGINT)
os.kill(host, signal.SIGINT)
r.populate()
assert r.engine._threads.host_pids() == [host]
""", where=where).check()


def test_program_that_waits_for_any_child(where):
    """Goal: a program that reaps whatever child has ended may reap a host: it is replaced all the same."""
    run_script("""
from support.hosted import fill_pattern
r = region(8 * BLOCK, fill_pattern, readahead_bytes=0)
a = r.array()
for block in range(4):
    assert a[block * BLOCK] == pattern(block * BLOCK, 1)[0]
    os.kill(r.engine._threads.host_pids()[0], 9)
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        pass
assert (a == pattern(0, 8 * BLOCK)).all()
""", where=where).check()


def test_gil_held_touches(where):
    """Goal: no deadlock for touches that hold the interpreter lock, with a provider in Python."""
    from test_gil import EXPRESSIONS, STORES

    run_script(f"""
from support.hosted import fill_pattern
model = pattern(0, 8 * BLOCK).copy()
for text in {EXPRESSIONS!r}:
    with region(8 * BLOCK, fill_pattern) as r:
        got = eval(text, globals() | {{"a": r.array()}})
        want = eval(text, globals() | {{"a": model.copy()}})
        assert np.array_equal(got, want) if isinstance(got, (np.ndarray, list)) else got == want, text
for text in {STORES!r}:
    with region(8 * BLOCK, fill_pattern) as r:
        a, right = r.array(), model.copy()
        exec(text, globals() | {{"a": a}})
        exec(text, globals() | {{"a": right}})
        assert (a == right).all(), text
        del a
""", 60, where=where).check()


def test_killed_host_while_the_lock_is_held(where):
    """Goal: a[0] holds the interpreter lock while the host is dead; a new one is started all the same."""
    run_script("""
from support.hosted import fill_pattern
r = region(16 * BLOCK, fill_pattern, readahead_bytes=0)
a = r.array()
for block in range(8):
    assert a[block * BLOCK] == pattern(block * BLOCK, 1)[0]
    os.kill(r.engine._threads.host_pids()[0], signal.SIGKILL)
""", where=where).check()
