"""Migration between two processes: all of the memory, once; one owner at each instant; writers stopped, and let go."""

import numpy as np
import pytest
import uffd
from support import matrix, shim
from support.scripts import run_script
from uffd import migrate

pytestmark = pytest.mark.skipif(matrix.filled_whole() or uffd.probe().mode != "full",
                                reason="no userfaultfd that serves the kernel's accesses")
START = "from support.migration import *\n"


def script(text, **options):
    return run_script(START + text, **options).check()


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:0", "unix:{}/s"], ids=["tcp", "unix"])
@pytest.mark.parametrize("precopy", [0, 2])
def test_arrays_of_all_kinds(url, precopy, tmp_path):
    """Goal: every byte of arrays, structured ones, views of regions, empty ones and Fortran's; state; names; report."""
    script(f"""
N = 4 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    got = arrival.arrays
    assert arrival.state == b"x" * 100000
    assert got["b"].flags.f_contiguous and got["b"].shape == (3, 1000) and got["b"][2, 999] == 2999
    assert got["s"]["y"][7] == 7 and got["e"].shape == (0, 5) and got["n"].shape == () and got["n"] == 5
    assert (got["v"] == filled(N)[100:200]).all() and (got["r"] == filled(N)).all()
    assert np.shares_memory(got["v"], got["r"]) and len(arrival.regions) == 7
    assert not got["z"].any() and (got["a"] == filled(N, 9)).all()
    got["a"][:] = 1; got["z"][5] = 1            # it is ordinary memory
    report = arrival.wait(20)
    assert report.side == "destination" and report.owner == "destination" and arrival.status == "COMPLETED"
    arrival.close()
    assert got["a"].sum() == N // 8
pid, url = start(destination, {url.format(tmp_path)!r})
r = uffd.zeros(N // 8, np.int64); r[:] = filled(N)
s = np.zeros(1000, [("x", "u1"), ("y", "<i4")]); s["y"] = range(1000)
arrays = {{"a": filled(N, 9), "b": np.asfortranarray(np.arange(3000.).reshape(1000, 3).T), "r": r, "v": r[100:200],
          "s": s, "e": np.zeros((0, 5)), "z": uffd.zeros(1 << 20), "n": np.array(5)}}
with migrate.connect(url, arrays) as outgoing:
    assert outgoing.status == "SETUP"
    if {precopy}:
        outgoing.precopy({precopy})
        assert outgoing.status == "PRECOPY"
    outgoing.switchover(b"x" * 100000)
    report = outgoing.wait(20)
assert outgoing.status == "COMPLETED" and outgoing.done() and report.owner == "destination"
assert 0 < report.downtime_s < 5 and report.blocks_left == 0 and report.blocks.doubled == 0
assert report.blocks.zero >= 128 and report.rounds == {precopy}
moved = 2 * N + 24000 + 5000 + 8
assert report.bytes.total <= moved + ({precopy} and 1 << 20) and report.bytes.total > moved - 65536 * 4
if {precopy}:
    assert report.bytes.precopy > 2 * N - 65536 and report.bytes.pushed < 1 << 20, report.bytes
assert "COMPLETED" in str(report) and report.as_dict()["status"] == "COMPLETED"
assert ended(pid) == 0
""")


def test_a_source_ends_by_itself():
    """Goal: what was handed over is never freed, since who frees memory may write to it, and would wait for ever; so
    the interpreter of a source comes to its end. Method: malloc is told to fill what is freed."""
    script("""
M_PERTURB = -6
ctypes.CDLL(None).mallopt(M_PERTURB, 165)
def destination(incoming):
    for size in (100_000, 300_000):
        with incoming.accept(20) as arrival:
            arrival.wait(20)
            assert (arrival.arrays["0"] == 7).all()
pid, url = start(destination)
for size in (100_000, 300_000):     # of malloc's heap, and mapped by itself
    with migrate.connect(url, np.full(size, 7, "u1")) as outgoing:
        outgoing.switchover()
    del outgoing
    gc.collect()
assert ended(pid) == 0
say("the end")
""", fresh=True)


def test_precopy_while_a_writer_never_stops():
    """Goal: what is there at the instant of the hand-over is what arrives, of memory of both kinds, while threads write
    as fast as they can. Method: each write raises both counters of a pair in one order; writers are stopped by the
    switchover itself; a digest is taken of what the destination has, and of what the stopped source has."""
    script("""
import hashlib
N = 8 << 20
def digest(arrays):
    return b"".join(hashlib.sha1(one).digest() for one in arrays)
r, w = os.pipe()
def destination(incoming):
    arrival = incoming.accept(20)
    arrival.wait(20)
    os.write(w, digest([arrival.arrays["a"], arrival.arrays["r"]]))
    arrival.close()
pid, url = start(destination)
a, b = filled(N), uffd.zeros(N // 8, np.int64)
b[:] = filled(N)
def write(one):
    rng = np.random.default_rng(1)
    while True:
        i = int(rng.integers(0, N // 8 - 30000))
        np.add(one[i:i + 30000], 1, out=one[i:i + 30000])       # lets the interpreter go
outgoing = migrate.connect(url, {"a": a, "r": b})
threads = [threading.Thread(target=write, args=(one,), daemon=True) for one in (a, b)]
[thread.start() for thread in threads]
outgoing.precopy(rounds=4, timeout_s=10)
wait_until(outgoing._wire.dirty_blocks, "no write is seen")
outgoing.switchover()
report = outgoing.wait(20)
assert 1 <= report.rounds <= 4 and report.blocks.precopy >= 2 * N // 65536
assert report.blocks.pushed + report.blocks.requested > 0
assert digest([a, b]) == os.read(r, 100)
assert all(thread.is_alive() for thread in threads)
assert ended(pid) == 0
os._exit(0)
""")


def test_sources_that_are_not_in_memory():
    """Goal: evicted, spilled and unfilled blocks arrive, and none becomes resident by that; with an engine that has no
    room for them at the destination either."""
    script("""
N = 4 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    for name, one in arrival.arrays.items():
        assert (one == filled(N)).all(), name
    arrival.wait(20)
    for name, one in arrival.arrays.items():
        assert (one == filled(N)).all(), name
    assert arrival.regions[0].engine.resident_bytes <= 4 << 20
    arrival.close()
def served(offset, out):
    out.view(np.int64)[:] = filled(N)[offset // 8:(offset + len(out)) // 8]
pid, url = start(destination, engine=uffd.Engine(budget_bytes=4 << 20))
engine = uffd.Engine(budget_bytes=4 << 20)
arrays = {
    "memory": uffd.from_provider(providers.Memory(filled(N)), (N // 8,), np.int64, engine=engine),
    "python": uffd.from_provider(served, (N // 8,), np.int64, engine=engine),
    "spilled": uffd.zeros(N // 8, np.int64, engine=engine),
    "shared": uffd.zeros(N // 8, np.int64, engine=engine, backing="shared")}
arrays["spilled"][:] = filled(N)
arrays["shared"][:] = filled(N)
before = [int(uffd.region_of(one).resident().sum()) for one in arrays.values()]
assert before[0] == before[1] == 0
with migrate.connect(url, arrays) as outgoing:
    outgoing.precopy()
    outgoing.switchover()
    outgoing.wait(20)
after = [int(uffd.region_of(one).resident().sum()) for one in arrays.values()]
assert after[0] == after[1] == 0 and sum(after) <= sum(before)
assert ended(pid) == 0
""")


def test_requests_overtake_the_push():
    """Goal: a touch waits for its block alone, however slow the push; prefetch and populate ask, too; waiting is
    measured."""
    script("""
N = 16 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    a = arrival.arrays["a"]
    t0 = time.monotonic()
    for i in range(100):
        at = (i * 37) % 256 * 8192 + 5
        assert a[at] == filled(N)[at]
    took = time.monotonic() - t0
    arrival.regions[0].populate((8 << 20, 9 << 20))
    assert arrival.regions[0].resident()[128:144].all()
    assert time.monotonic() - t0 < 2.5, took
    report = arrival.report()
    assert report.blocks.requested >= 90 and report.requests.n >= 90 and report.status == "POSTCOPY"
    assert report.blocked_s > 0 and report.requests_max_ns > 0
    (mine,) = [s for tid, s in report.blocked_by_thread_s.items() if tid == threading.get_native_id()]
    assert 0 < mine <= report.blocked_s and sum(report.blocked_by_thread_s.values()) <= report.blocked_s + 1e-6
    arrival.close()                             # what has not come by now never does
    try:
        arrival.regions[0].populate()
        raise AssertionError("what never came")
    except uffd.ProviderError as error:
        assert error.errno == errno.ENOTRECOVERABLE
pid, url = start(destination)
a = filled(N)
outgoing = migrate.connect(url, {"a": a}, postcopy_bytes_per_s=1e6)
outgoing.switchover()
assert ended(pid) == 0
status_is(outgoing, "PAUSED" if outgoing.status != "FAILED" else "FAILED")
outgoing.close()
assert outgoing.status == "FAILED"
""")


def test_cancel_in_each_state():
    """Goal: before the hand-over a cancelled migration leaves the program as it was, its writers included; after it,
    cancel is refused and says who has the memory."""
    script("""
def destination(incoming):
    for _ in range(2):                          # of the third it hears nothing: the next one takes its place
        fails(lambda: incoming.accept(20), "source")
    arrival = incoming.accept(20)
    assert (arrival.arrays["0"] == 5).all()
    arrival.wait(20)
    arrival.close()
pid, url = start(destination)
a, r = filled(1 << 20), uffd.zeros(1 << 17, np.int64)
for state in ("setup", "precopy", "paused"):
    outgoing = migrate.connect(url, [a, r])
    if state != "setup":
        outgoing.precopy()
        a[:] = 1; r[:] = 2
    if state == "paused":
        outgoing.pause()
        assert outgoing.status == "PAUSED"
        a[:] = 3; r[:] = 4
    outgoing.cancel()
    assert outgoing.status == "CANCELLED" and outgoing.done()
    a[5] = 9; r[5] = 9
    outgoing.close()
    a[:] = 5; r[:] = 5
    outgoing.cancel()                           # again is nothing
    fails(lambda: outgoing.wait(1), "source")
with migrate.connect(url, [a, r]) as outgoing:
    outgoing.switchover()
    fails(outgoing.cancel, "destination")
    outgoing.wait(20)
assert ended(pid) == 0
""")


def test_writers_are_stopped_or_killed():
    """Goal: after the hand-over no write reaches the source's memory: it waits ("stop"), also in a system call; or the
    process dies by a signal and a line ("kill"), but only once the destination has everything."""
    script("""
def destination(incoming):
    for _ in range(2):
        arrival = incoming.accept(20)
        arrival.wait(20)
        assert (arrival.arrays["0"] == filled(1 << 20)).all() and not arrival.arrays["1"].any()
        arrival.close()
pid, url = start(destination)
def moved(**options):
    arrays = [filled(1 << 20), uffd.zeros(1 << 17, np.int64)]
    outgoing = migrate.connect(url, arrays)
    outgoing.switchover(**options)
    return arrays, outgoing
(a, r), outgoing = moved()
writers = [threading.Thread(target=np.add, args=(one, 1), kwargs={"out": one}, daemon=True) for one in (a, r)]
readinto = threading.Thread(target=open("/dev/zero", "rb", 0).readinto, args=(a[60000:],), daemon=True)
for thread in [*writers, readinto]:
    thread.start()
outgoing.wait(20)
time.sleep(0.1)
assert all(thread.is_alive() for thread in [*writers, readinto])
assert (a == filled(1 << 20)).all() and not r.any()
child = os.fork()
if not child:
    (a, r), outgoing = moved(on_write="kill")
    outgoing.wait(20)
    r[7] = 1
    os._exit(0)
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS
assert ended(pid) == 0
os._exit(0)
""")


def test_release():
    """Goal: memory that has arrived is given back at the source, of both kinds; touching it there is a signal, never
    zeros; a break in between loses nothing."""
    script("""
N = 16 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    arrival.wait(20)
    assert all((one == filled(N)).all() for one in arrival.arrays.values())
    arrival.close()
pid, url = start(destination)
a, r = filled(N), uffd.zeros(N // 8, np.int64)
r[:] = filled(N)
before = leaks.rss_bytes()
with migrate.connect(url, [a, r], release=True, postcopy_bytes_per_s=50e6) as outgoing:
    outgoing.switchover()
    time.sleep(0.03)
    outgoing.pause()
    outgoing.recover()
    outgoing.wait(20)
    status_is(outgoing, "COMPLETED")
    wait_until(lambda: before - leaks.rss_bytes() > 1.8 * N, "memory given back", 10)
assert uffd.region_of(r).resident().sum() == 0
for one in (a, r):
    child = os.fork()
    if not child:
        signal.alarm(10)
        one[N // 16]
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS
assert ended(pid) == 0
""")


def test_release_gives_each_page_back_once():
    """Goal: a page that was given back is not given back again at the end: it would be zeros in between."""
    script("""
from support import shim
N = 4 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    arrival.wait(20)
    assert (arrival.arrays["a"] == filled(N)).all()
pid, url = start(destination)
a = np.frombuffer(mmap.mmap(-1, N, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.int64)
a[:] = filled(N)
rule = shim.Rule("POISON", 1, 0)
with migrate.connect(url, {"a": a}, release=True) as outgoing:
    outgoing.switchover()
    report = outgoing.wait(20)
assert 1 < rule.calls <= N // 65536, rule.calls
assert ended(pid) == 0
""", preload=shim.path())


def test_compression():
    """Goal: what gets smaller goes smaller, what does not goes as it is; both arrive, by the push and by requests."""
    script("""
N = 8 << 20
NOISE = np.random.default_rng(1).integers(0, 1 << 60, N // 8)
def destination(incoming):
    arrival = incoming.accept(20)
    got = arrival.arrays
    for i in range(N // 65536 - 1, 0, -9):
        assert got["text"][i * 8192] == (i * 8192) // 1000 + 1 and got["noise"][i * 8192] == NOISE[i * 8192]
    report = arrival.wait(20)
    assert (got["text"] == np.arange(N // 8) // 1000 + 1).all() and (got["noise"] == NOISE).all()
    assert report.bytes.total == 2 * N and N <= report.bytes_wire < 1.6 * N, report
    arrival.close()
pid, url = start(destination)
arrays = {"text": np.arange(N // 8) // 1000 + 1, "noise": NOISE.copy()}
with migrate.connect(url, arrays, compress="zstd", postcopy_bytes_per_s=100e6) as outgoing:
    outgoing.switchover()
    report = outgoing.wait(20)
assert report.bytes.total == 2 * N and N <= report.bytes_wire < 1.6 * N, report
assert ended(pid) == 0
""")


def test_keys():
    """Goal: only who has the key moves memory; others disturb nobody."""
    script("""
def destination(incoming):
    arrival = incoming.accept(20)
    assert (arrival.arrays["0"] == 1).all()
    arrival.wait(20)
    arrival.close()
pid, url = start(destination, key=b"secret")
for wrong in (None, b"other"):
    try:
        migrate.connect(url, [np.ones(1000)], key=wrong)
        raise AssertionError("let in")
    except uffd.MigrationError as error:
        assert error.owner == "source" and "key" in str(error)
with migrate.connect(url, [np.ones(1000)], key="secret") as outgoing:
    outgoing.switchover()
assert ended(pid) == 0
""")


def test_nothing_is_left():
    """Goal: neither side keeps threads, processes, descriptors or mappings, and a region can move again."""
    script("""
def destination(incoming):
    for turn in range(4):
        if turn == 1:
            before = leaks.take()
        try:
            incoming.accept(20)
        except uffd.MigrationError:
            gc.collect()
    leaks.settle(before)
pid, url = start(destination)
r = uffd.zeros(1 << 17)
for turn in range(4):
    if turn == 1:
        before = leaks.take()
    with migrate.connect(url, [r, np.ones(100000)]) as outgoing:
        outgoing.precopy()
        r[5] = turn
    assert outgoing.status == "CANCELLED"
    del outgoing
    gc.collect()
leaks.settle(before)
assert ended(pid) == 0
""")


@pytest.mark.parametrize("call, error", [
    (lambda: migrate.connect("tcp://127.0.0.1:1", [np.array([None])]), TypeError),
    (lambda: migrate.connect("tcp://127.0.0.1:1", [np.zeros((10, 10))[:, ::2]]), ValueError),
    (lambda: migrate.connect("tcp://127.0.0.1:1", []), ValueError),
    (lambda: migrate.connect("tcp://127.0.0.1:1", [np.zeros(5)], compress="lz4"), ValueError),
    (lambda: migrate.connect("http://x", [np.zeros(5)]), ValueError),
    (lambda: migrate.connect("tcp://127.0.0.1:1", [np.zeros(5)]), OSError),
    (lambda: migrate.listen("tcp://1.2.3.4:1"), migrate._outgoing.MigrationError),
], ids=["objects", "gaps", "none", "codec", "scheme", "nobody", "public"])
def test_what_is_refused(call, error):
    with pytest.raises(error):
        call()


def test_two_views_of_one_memory_are_refused():
    a = np.zeros(1000)
    with pytest.raises(ValueError, match="share memory"):
        migrate.connect("tcp://127.0.0.1:1", [a, a[500:]])


def test_shared_regions_are_passed_and_not_copied(tmp_path):
    """Goal: on one machine a region with shared backing goes by its descriptor: no byte of it travels, what is evicted
    or unfilled does; the source can't touch it any more; cancelled or failed, it is as it was; and it goes on again."""
    script("""
N = 8 << 20
ENGINE = uffd.Engine(budget_bytes=None)
def destination(incoming):
    fails(lambda: incoming.accept(20))
    arrival = incoming.accept(20)
    a, b = arrival.arrays["a"], arrival.arrays["b"]
    assert a[0] == 5 and (a[1:] == filled(N)[1:]).all()
    a[:] = 6                                    # at the source nothing sees it
    report = arrival.wait(20)
    assert (b == filled(4 << 20, 3)).all() and (a == 6).all()
    assert report.bytes_passed == N + 65536 and report.bytes.total == (4 << 20) - 65536, report
    arrival.close()
    with migrate.connect(arrival.state.decode(), arrival.arrays) as outgoing:        # and on
        outgoing.switchover()
        report = outgoing.wait(20)
    assert report.bytes_passed == N + (4 << 20) and report.bytes.total == 0, report
def next_destination(incoming):
    arrival = incoming.accept(20)
    assert (arrival.arrays["a"] == 6).all() and (arrival.arrays["b"] == filled(4 << 20, 3)).all()
    arrival.wait(20)
    arrival.close()
""" + f"""
pid, url = start(destination, "unix:{tmp_path}/a")
next_pid, next_url = start(next_destination, "unix:{tmp_path}/b")
""" + """
a = uffd.zeros(N // 8, np.int64, backing="shared", engine=ENGINE)
b = uffd.from_provider(providers.Memory(filled(4 << 20, 3)), (N // 16,), np.int64, backing="shared", engine=ENGINE)
a[:] = filled(N)
outgoing = migrate.connect(url, {"a": a, "b": b})
outgoing.precopy()
a[0] = 4
outgoing.cancel()
outgoing.close()
assert a[0] == 4 and (a[1:] == filled(N)[1:]).all()
a[0] = 5
assert b[9] == 30
with migrate.connect(url, {"a": a, "b": b}) as outgoing:
    t0 = time.monotonic()
    outgoing.switchover(next_url.encode())
    report = outgoing.wait(20)
touch = threading.Thread(target=a.sum, daemon=True)
touch.start()
time.sleep(0.1)
assert touch.is_alive()                         # a read, too: the memory is not here any more
assert report.bytes_passed == N + 65536 and report.blocks.precopy == 0
assert ended(pid) == 0 and ended(next_pid) == 0
os._exit(0)
""")


def test_passed_memory_comes_within_the_budget(tmp_path):
    """Goal: memory that is passed by its file may be more than the destination's budget; what is too much leaves by
    itself, before anybody touches it, and no byte is lost by that."""
    script(f"url = 'unix:{tmp_path}/a'" + """
N, BUDGET = 48 << 20, 16 << 20
ENGINE = uffd.Engine(budget_bytes=BUDGET)
def destination(incoming):
    arrival = incoming.accept(20)
    wait_until(lambda: ENGINE.resident_bytes <= BUDGET, "resident bytes within the budget")
    a = arrival.arrays["0"]
    assert uffd.region_of(a).stats().evicted >= (N - BUDGET) // 65536
    assert (a[::-1] == filled(N)[::-1]).all()
    a[::4096] += 1
    expected = filled(N)
    expected[::4096] += 1
    wait_until(lambda: ENGINE.resident_bytes <= BUDGET, "resident bytes within the budget, again")
    assert (a == expected).all()
    assert arrival.wait(20).bytes_passed == N
    arrival.close()
pid, url = start(destination, url, engine=ENGINE)
a = uffd.zeros(N // 8, np.int64, backing="shared", engine=uffd.Engine(budget_bytes=None))
a[:] = filled(N)
with migrate.connect(url, [a]) as outgoing:
    outgoing.switchover()
    outgoing.wait(20)
assert ended(pid) == 0
os._exit(0)
""")
