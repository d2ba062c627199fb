"""A proxy between source and destination that cuts, resets, silences, changes bytes: wherever it does, the migration is
recovered and every byte is right, or it ends with a verdict; no touch hangs, none sees zeros."""

import pytest
import uffd
from support import matrix
from support.pattern import stress_seconds
from support.scripts import run_script

pytestmark = pytest.mark.skipif(matrix.filled_whole() or uffd.probe(self_test=False).mode != "full",
                                reason="no userfaultfd that serves the kernel's accesses")
START = """
from support.migration import *
from support.pattern import stress_seconds
from support.proxy import Proxy, Rule
"""


def script(text, deadline_s=40.0, **options):
    return run_script(START + text, deadline_s, **options).check()


def test_a_block_sent_again_and_lost_on_its_way_is_sent_a_third_time():
    """Goal: in a later round of precopy, a break loses blocks of which the destination has an older state; it can't
    tell that they are missing. Method: a slow link, cut while a round's blocks lie in its buffers; zeros among them."""
    script("""
N = 8 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    arrival.wait(20)
    assert (arrival.arrays["0"] == filled(N, 5)).all() and not arrival.arrays["1"].any()
    arrival.close()
pid, url = start(destination)
a, b = uffd.zeros(N // 8, np.int64), uffd.zeros(N // 8, np.int64)
a[:] = b[:] = filled(N)
with Proxy(url) as proxy, migrate.connect(proxy.url, [a, b]) as outgoing:
    outgoing.precopy()
    a[:] = filled(N, 5)
    b[:] = 0
    for turn in range(3):
        proxy.rate_bytes_per_s = 20e6
        threading.Timer(0.05, proxy.cut_all, ["reset"]).start()
        try:
            outgoing.precopy()
        except uffd.MigrationError as error:
            assert error.owner == "source"
        proxy.rate_bytes_per_s = None
        status_is(outgoing, "PAUSED")
        outgoing.recover()
    outgoing.switchover()
    outgoing.wait(20)
assert ended(pid) == 0
""")


# A destination that takes one migration after the other, says "k" for each whose bytes are right, and goes on after all
# others; a source that recovers whatever may be recovered. What both have in common:
BOTH = """
N = 3 * 65536 + 8
A, R = filled(N, 1), filled(N, 2)
said, tell = os.pipe()
def destination(incoming):
    last = None
    while True:
        try:
            arrival = incoming.accept(60)
        except uffd.MigrationError as error:
            assert error.owner == "source", error
            continue
        if last is not None:
            last.close()                    # not before: its source may have to be told once more that all is there
        last = arrival
        try:
            arrival.wait(20)
        except uffd.MigrationError:
            continue
        right = (arrival.arrays["a"] == A).all() and (arrival.arrays["r"] == R).all() and arrival.state == b"s"
        os.write(tell, b"k" if right else b"!")
def went_through(url):
    "Whether it came to be at all; if so, it came to its end, with every byte. Memory of its own: it stays stopped."
    arrays = {"a": A.copy(), "r": uffd.zeros(N // 8, np.int64)}
    arrays["r"][:] = R
    try:
        outgoing = migrate.connect(url, arrays)
    except (OSError, uffd.MigrationError) as error:
        assert getattr(error, "owner", "source") == "source"
        arrays["a"][0] = A[0]               # nobody stops writers
        return False
    with outgoing:
        for turn in range(10):
            try:
                if outgoing.status in ("SETUP", "PRECOPY"):
                    outgoing.precopy()
                    outgoing.switchover(b"s")
                outgoing.wait(20)
                break
            except uffd.MigrationError:
                if outgoing.status != "PAUSED":
                    raise
                try:
                    outgoing.recover()
                except (OSError, uffd.MigrationError):
                    time.sleep(0.02 * 2 ** turn)    # on a busy machine the other side has yet to see the break
    assert outgoing.status == "COMPLETED", outgoing
    assert os.read(said, 1) == b"k"
    return True
"""


@pytest.mark.deadline(90, per_stress_second=3)
def test_cut_at_each_byte():
    """Goal: wherever a connection ends, the migration goes on after recover() with every byte in its place, or never
    came to be, and the next one works. Method: one migration is measured, then others are cut after each number of
    bytes of each connection and direction, in random order for as long as there is time (UFFD_STRESS_SECONDS); bytes
    of blocks are sampled."""
    result = script(BOTH + """
import random
seed = os.environ.get("UFFD_SEED", "1")
rng = random.Random(seed)
pid, url = start(destination)
with Proxy(url) as proxy:
    assert went_through(proxy.url)
    lengths = [dict(counted) for counted in proxy.counts[:2]]
    places = []
    for connection, directions in enumerate(lengths):
        for direction, nbytes in directions.items():
            places += [(connection, direction, at) for at in range(min(nbytes, 1500))]
            places += [(connection, direction, rng.randrange(1500, nbytes)) for _ in range(40) if nbytes > 1500]
    rng.shuffle(places)
    seconds = stress_seconds() if stress_seconds() > 10 else 2
    ends_at, done, refused = time.monotonic() + seconds, 0, 0
    for connection, direction, at in places:
        if time.monotonic() > ends_at:
            break
        what = rng.choice(("cut", "reset"))
        proxy.rules[:] = [Rule(what, direction, at, len(proxy.counts) + connection)]
        try:
            refused += not went_through(proxy.url)
        except BaseException:
            print("seed", seed, "place", connection, direction, at, what, lengths, flush=True)
            raise
        done += 1
    proxy.rules.clear()
    assert went_through(proxy.url)
print(done, "of", len(places), "places,", refused, "before it came to be")
assert done > 5 and refused < done
os.kill(pid, 9)
ended(pid)
os._exit(0)
""", 60 + 2 * stress_seconds())
    print(result.stdout)


def test_a_region_whose_connection_failed_can_be_tried_again():
    script("""
import socket
a = uffd.zeros(100000, np.int64)
a[:] = 7
def destination(incoming):
    arrival = incoming.accept(20)
    assert (arrival.arrays["0"] == 8).all()
    arrival.wait(20)
    arrival.close()
pid, url = start(destination, key=b"k")
with socket.socket() as nobody:
    nobody.bind(("127.0.0.1", 0))
    for where, key in ((f"tcp://127.0.0.1:{nobody.getsockname()[1]}", None), (url, None), (url, b"wrong")):
        try:
            migrate.connect(where, [a], key=key)
            raise AssertionError("who let it in?")
        except (OSError, uffd.MigrationError):
            pass
a[:] = 8
with migrate.connect(url, [a], key=b"k") as outgoing:
    outgoing.switchover()
    outgoing.wait(20)
assert ended(pid) == 0
""")


# Frames as the core's parsers take them, and others: kinds of both sides, and none; counts, blocks and lengths that are
# right, at their bounds, and beyond. Behind some comes what their length says, behind others nothing.
FRAMES = """
import random, struct
from uffd.migrate import _auth, _frames, _outgoing, _urls
seed = os.environ.get("UFFD_SEED", "1")
rng = random.Random(seed)
EDGES = (0, 1, 2, 3, 63, 64, 65535, 65536, 65537, 2**31, 2**32 - 1)
def frame():
    kind = rng.choice((*range(0, 11), *range(30, 44), 2**32 - 1))
    part = rng.choice((0, 0, 0, 1, 2**32 - 1))
    block = rng.choice((0, 1, 2, 3, 63, 64, 128, 2**40, 2**63, 2**64 - 1))
    count = rng.choice((0, 1, 1, 2, 3, 4, 2**32 - 1))
    nbytes = rng.choice((0, 0, 8, 65536, 65536, 131072, *EDGES))
    extra = rng.choice((0, 0, 1, 8, 2**26, 2**40, 2**64 - 1))
    body = rng.randbytes(min(nbytes, 140000)) if rng.random() < 0.7 else b""
    return struct.pack("=IIQIIQ", kind, part, block, count, nbytes, extra) + body
def garbage(connection):
    connection.settimeout(1)
    try:
        for _ in range(rng.randrange(1, 6)):
            connection.sendall(frame() if rng.random() < 0.9 else rng.randbytes(rng.randrange(1, 100)))
    except OSError:
        pass                                # it was refused by now
def deadline():
    return time.monotonic() + 10
"""


@pytest.mark.deadline(90, per_stress_second=3)
def test_a_hostile_source_against_the_destinations_parser():
    """Goal: whatever somebody sends who even has the key, the destination refuses it, or takes blocks into memory that
    is that migration's; it neither dies nor hangs, and the next migration is served. Fuzzed, by a seed."""
    script(FRAMES + """
def destination(incoming):
    import resource
    while True:
        try:
            arrival = incoming.accept(60)
        except uffd.MigrationError:
            continue
        if "real" in arrival.arrays:
            assert (arrival.arrays["real"] == 5).all()
            arrival.wait(20)
            arrival.close()
            return
        arrival.close()
pid, url = start(destination)
address = _urls.parse(url)
layout = _frames.described(_frames.Layout((_frames.Part(3 * 65536 + 8, 65536, "anon"),),
                                          (_frames.Array("x", 0, 0, np.dtype("u1"), (1000,), "C"),)))
ends_at, done = time.monotonic() + 0.6 * stress_seconds(), 0
while time.monotonic() < ends_at:
    push, ask = _outgoing._pair(address, None, "new", f"{rng.getrandbits(128):032x}", deadline())
    with push, ask:
        frames = _frames.Frames(ask)
        frames.send("offer", deadline_s=deadline(), byteorder=sys.byteorder, passed=[], **layout)
        frames.receive("accepted", deadline_s=deadline())
        for connection in rng.choice(((push,), (ask,), (push, ask), (ask, push))):
            garbage(connection)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), f"seed {seed}: the destination died"
    done += 1
with migrate.connect(url, {"real": np.full(100000, 5)}) as outgoing:
    outgoing.switchover()
    outgoing.wait(20)
assert ended(pid) == 0
assert done > 5, done
""", 40 + 2 * stress_seconds())


@pytest.mark.deadline(90, per_stress_second=3)
def test_a_hostile_destination_against_the_sources_parser():
    """Goal: the same from the other side: the source's memory stays its own, until it has said COMMIT."""
    script(FRAMES + """
import socket
listener = socket.create_server(("127.0.0.1", 0))
url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
def serve():
    while True:
        both = {}
        while len(both) < 2:
            connection, _ = listener.accept()
            peer = _auth.answer(connection, None, deadline_s=deadline())
            both[peer.purpose.rpartition(b":")[2]] = connection
        frames = _frames.Frames(both[b"ask"])
        frames.receive("offer", deadline_s=deadline())
        frames.send("accepted", deadline_s=deadline())
        for which in rng.choice(((b"push",), (b"ask",), (b"push", b"ask"))):
            garbage(both[which])
        for connection in both.values():
            connection.close()
threading.Thread(target=serve, daemon=True).start()
ends_at, done, ends = time.monotonic() + 0.6 * stress_seconds(), 0, set()
while time.monotonic() < ends_at:
    a = uffd.zeros(3 * 8192 + 1, np.int64)
    outgoing = migrate.connect(url, [a])
    try:
        if rng.random() < 0.5:
            outgoing.precopy(timeout_s=5)
        outgoing.switchover(b"s")
    except (uffd.MigrationError, TimeoutError) as error:
        ends.add(getattr(error, "owner", "source"))
    outgoing.close()
    if outgoing._owner == "source":
        a[:] = 1                            # it is written to as before
    done += 1
assert done > 5 and "source" in ends, (done, ends)
os._exit(0)
""", 40 + 2 * stress_seconds())


@pytest.mark.parametrize("key", [None, b"k" * 32])
def test_answers_that_come_late_twice_and_in_another_order(key):
    """Goal: a block is what its first answer says; what comes again, with other bytes, on either connection, asked for
    or not, is thrown away and counted, also once the program has written there. Method: a source by hand."""
    script(FRAMES + f"key = {key!r}" + """
import socket
B, (BLOCKS, PREPARE, COMMIT), (WANT, READY, STARTED) = 65536, (1, 5, 6), (33, 34, 35)
told, tell = os.pipe()
def destination(incoming):
    arrival = incoming.accept(20)
    a = arrival.arrays["x"]
    assert a[5 * B] == 6
    a[5 * B] = 200
    os.write(tell, b"w")
    assert [a[b * B + 1] for b in range(8)] == list(range(1, 9))
    report = arrival.wait(20)
    assert a[5 * B] == 200 and (np.delete(a, 5 * B) == np.delete(np.repeat(np.arange(1, 9), B), 5 * B)).all()
    assert report.blocks.doubled == 1 + 6 + 4, report
    arrival.close()
def head(kind, block=0, count=0, nbytes=0, extra=0):
    return struct.pack("=IIQIIQ", kind, 0, block, count, nbytes, extra)
def block(b, right=True):
    return head(BLOCKS, b, 1, B) + bytes([b + 1 if right else 99]) * B
def until(kind):
    while True:
        frame = ask.recv(32, socket.MSG_WAITALL)
        assert len(frame) == 32, "the destination is gone"
        if frame[0] == kind:
            return struct.unpack("=IIQIIQ", frame)[2]
pid, url = start(destination, key=key)
layout = _frames.described(_frames.Layout((_frames.Part(8 * B, B, "anon"),),
                                          (_frames.Array("x", 0, 0, np.dtype("u1"), (8 * B,), "C"),)))
push, ask = _outgoing._pair(_urls.parse(url), key, "new", f"{1:032x}", deadline())
frames = _frames.Frames(ask)
frames.send("offer", deadline_s=deadline(), byteorder=sys.byteorder, passed=[], **layout)
frames.receive("accepted", deadline_s=deadline())
for one in (push, ask):
    one.settimeout(20)
ask.sendall(head(PREPARE, nbytes=1, extra=1) + b"s")
until(READY)
ask.sendall(head(COMMIT))
until(STARTED)
assert until(WANT) == 5
time.sleep(0.2)
ask.sendall(block(7) + block(6) + block(5) + block(5, False))
assert os.read(told, 1) == b"w"
for one in (push, ask):
    one.sendall(b"".join(block(b, False) for b in (5, 7, 6)))
time.sleep(0.2)
for b in (4, 3, 2, 1):
    push.sendall(block(b) + block(b, False))
push.sendall(block(0))                      # it is complete: nobody listens any more
assert ended(pid) == 0
""")


def test_of_several_arrivals_each_is_recovered_by_its_own_source():
    """Goal: new connections go to the migration that they are of, while others came by the same Incoming and are open;
    also when the program has closed that Incoming's other arrivals meanwhile."""
    script("""
N = 4 << 20
def destination(incoming):
    arrivals = [incoming.accept(20) for _ in range(4)]
    for i, arrival in enumerate(arrivals):
        arrival.wait(20)
        assert (arrival.arrays["0"] == filled(N, i)).all()
    last = incoming.accept(20)              # when all sources have heard that theirs is there
    last.wait(20)
    for arrival in [*arrivals, last]:
        arrival.close()
pid, url = start(destination)
several = []
for i in range(4):                          # one by one: each is accepted when it is handed over
    several.append(migrate.connect(url, [filled(N, i)], postcopy_bytes_per_s=1e6))
    several[i].switchover()
for turn in range(3):
    for outgoing in several:
        outgoing.pause()
    for outgoing in several[turn:] + several[:turn]:
        outgoing.recover()
for outgoing in several:
    outgoing._wire.limit(0, 0)
    outgoing.wait(20)
with migrate.connect(url, [filled(4096)]) as outgoing:
    outgoing.switchover()
assert ended(pid) == 0
""")


def test_a_source_that_comes_back_after_the_end_hears_how_it_ended():
    """Goal: the word that all is there was lost with the connection, and the destination's program has closed its
    arrival; the source learns it all the same. So it does when the destination gave up, before or after it ran."""
    script("""
N = 1 << 20
told, tell = os.pipe()
def destination(incoming):
    arrival = incoming.accept(20)           # complete
    arrival.wait(20)
    arrival.close()
    os.write(tell, b"1")
    arrival = incoming.accept(20)           # ran, and was closed
    while arrival.status != "PAUSED":
        time.sleep(0.01)
    arrival.close()
    os.write(tell, b"2")
    time.sleep(60)
pid, url = start(destination)
with Proxy(url) as proxy:
    a = filled(N)
    outgoing = migrate.connect(proxy.url, [a], postcopy_bytes_per_s=1e6)
    outgoing.switchover()
    time.sleep(0.05)                        # all that was said has been counted
    # All it says from here on is lost: that it is done.
    proxy.rules[:] = [Rule("silence", "down", proxy.passed(1, "down"), connection=1)]
    outgoing._wire.limit(0, 0)
    assert os.read(told, 1) == b"1"
    outgoing.pause()
    outgoing.recover()
    report = outgoing.wait(10)
    assert report.owner == "destination" and outgoing.status == "COMPLETED"
    outgoing.close()
outgoing = migrate.connect(url, [filled(N)], postcopy_bytes_per_s=1e5)
outgoing.switchover()
outgoing.pause()
assert os.read(told, 1) == b"2"
fails(outgoing.recover, "destination")
assert outgoing.status == "FAILED"
os.kill(pid, 9)
ended(pid)
os._exit(0)
""")
