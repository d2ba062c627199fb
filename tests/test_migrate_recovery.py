"""A broken connection is a pause: what is there stays usable, what is missing waits, and comes after recover()."""

import pytest
import uffd
from support import matrix
from support.scripts import run_script

pytestmark = pytest.mark.skipif(matrix.filled_whole() or uffd.probe().mode != "full",
                                reason="no userfaultfd that serves the kernel's accesses")
START = "from support.migration import *\n"


def script(text, **options):
    return run_script(START + text, **options).check()


def test_recovered_again_and_again():
    """Goal: no byte is lost or placed twice over five breaks, at either side's wish; a thread that waits for a block,
    and holds the interpreter lock while it does, goes on after each."""
    result = script("""
N = 16 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    a, r = arrival.arrays["a"], arrival.arrays["r"]
    for i in range(N // 65536 - 1, -1, -1):     # against the push, so that it must ask
        time.sleep(0.001)
        assert a[i * 8192] == i * 8192 * 3 and r[i * 8192 + 1] == i * 8192 * 3 + 3
    report = arrival.wait(20)
    assert (a == filled(N)).all() and (r == filled(N)).all()
    assert sum(moment.status == "PAUSED" for moment in report.timeline) == 5, report
    assert report.blocks.total + report.blocks.doubled >= 2 * N // 65536 - 2
    arrival.close()
pid, url = start(destination)
r = uffd.zeros(N // 8, np.int64); r[:] = filled(N)
with migrate.connect(url, {"a": filled(N), "r": r}, postcopy_bytes_per_s=20e6) as outgoing:
    outgoing.switchover()
    for turn in range(5):
        time.sleep(0.03)
        outgoing.pause()
        assert outgoing.status == "PAUSED"
        try:
            outgoing.wait(1)
            raise AssertionError("it is paused")
        except uffd.MigrationError as error:
            assert error.owner == "destination" and "recover" in str(error)
        outgoing.recover()
        assert outgoing.status in ("POSTCOPY", "COMPLETED")
    outgoing._wire.limit(0, 0)
    report = outgoing.wait(20)
    fails(outgoing.recover)
assert ended(pid) == 0
""")
    assert result.stderr.count("have yet to come, and touches of them wait") == 5


def test_a_long_wait_is_told_and_ctrl_c_twice_ends_it():
    """Goal: a touch that waits for a paused migration is told of on stderr, and Ctrl-C twice gets the program out of
    it, as of other waits. Method: the destination's stderr is a pipe; once the line is there, Ctrl-C until it ends."""
    script("""
def destination(incoming):
    os.dup2(tell, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arrival = incoming.accept(20)
    status_is(arrival, "PAUSED")
    arrival.arrays["0"][5 * 8192]
    os.write(2, b"it went on")
told, tell = os.pipe()
pid, url = start(destination)
os.close(tell)
outgoing = migrate.connect(url, [filled(1 << 20)], postcopy_bytes_per_s=1000)
outgoing.switchover()
outgoing.pause()
text = b""
while b"(Ctrl-C twice gives up)" not in text:
    piece = os.read(told, 4096)
    assert piece, text
    text += piece
assert b"block at offset 327680 (65536 bytes) waited for since 2 s, from the source of its migration, the" in text, text
while not (found := os.waitpid(pid, os.WNOHANG))[0]:    # this script's own deadline bounds it
    os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
text = os.read(told, 4096)
assert os.WIFSIGNALED(found[1]) and os.WTERMSIG(found[1]) == signal.SIGINT, (found, text)
assert b"interrupted twice" in text
outgoing.close()
assert outgoing.status == "FAILED"
""")


@pytest.mark.parametrize("kind", ["region", "array", "passed"])
def test_a_writer_stopped_at_the_source_is_told_of_and_ctrl_c_twice_ends_it(kind, tmp_path):
    """Goal: a source's program that writes after the hand-over is told that it waits, for what and for how long; Ctrl-C
    twice gets it out. Method: its stderr is a pipe; once the line is there, Ctrl-C until it has ended. Of each kind of
    memory; of memory that was passed by its file a read waits, too."""
    script(f"KIND, PATH = {kind!r}, {str(tmp_path)!r}\n" + """
import re
N = 1 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    assert (arrival.arrays["1"] == filled(N)).all()
    arrival.wait(20)
    arrival.close()
pid, url = start(destination, f"unix:{PATH}/a" if KIND == "passed" else TCP)
told, tell = os.pipe()
source = os.fork()
if not source:
    os.dup2(tell, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if KIND == "array":
        arrays = [filled(N, 1), filled(N)]
    else:
        backing = "shared" if KIND == "passed" else "anon"
        arrays = [uffd.zeros(N // 8, np.int64, backing=backing) for _ in range(2)]
        arrays[1][:] = filled(N)
    with migrate.connect(url, arrays) as outgoing:
        outgoing.switchover()
        outgoing.wait(20)
    if KIND == "passed":
        print(arrays[1][4 * 8192 + 999])
    else:
        arrays[1][4 * 8192 + 999] = 1
    os.write(2, b"it went on")
    os._exit(0)
os.close(tell)
text = b""
while b"(Ctrl-C twice gives up)" not in text:
    piece = os.read(told, 4096)
    assert piece, text
    text += piece
assert re.search(rb"a touch of array 1 at offset 262144 waits here, at the source, since \\d+ s, and will for ever: "
                 rb"the memory is the destination's", text), text
while not (found := os.waitpid(source, os.WNOHANG))[0]:     # this script's own deadline bounds it
    os.kill(source, signal.SIGINT)
    time.sleep(0.3)
text = os.read(told, 4096)
assert os.WIFSIGNALED(found[1]) and os.WTERMSIG(found[1]) == signal.SIGINT, (found, text)
assert b"interrupted twice" in text and b"it went on" not in text, text
assert ended(pid) == 0
""", deadline_s=60)


def test_broken_before_the_hand_over():
    """Goal: in precopy, a break lets the source's program write on; recovered, what was written meanwhile arrives."""
    script("""
N = 4 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    assert (arrival.arrays["0"] == filled(N, 5)).all() and (arrival.arrays["1"] == 8).all()
    arrival.wait(20)
    arrival.close()
pid, url = start(destination)
a, r = filled(N), uffd.zeros(1 << 17, np.int64)
with migrate.connect(url, [a, r]) as outgoing:
    outgoing.pause()
    fails(outgoing.precopy, "source")
    outgoing.recover()
    outgoing.precopy()
    a[:] = 0; r[:] = 7
    outgoing.pause()
    fails(outgoing.switchover, "source")
    a[:] = filled(N, 5)
    outgoing.recover()
    r[:] = 8
    outgoing.switchover()
    outgoing.wait(20)
assert ended(pid) == 0
""")


@pytest.mark.parametrize("when", ["no COMMIT arrived", "COMMIT arrived"])
def test_broken_in_the_hand_over(when):
    """Goal: a break at the very instant leaves nobody, or one, with the memory, never two; asked, they find out who.
    Method: a relay of frames that ends at the COMMIT, before or behind it."""
    script(f"""
N = 1 << 20
ARRIVES = {when == "COMMIT arrived"}
""" + """
import socket, struct
def destination(incoming):
    arrival = incoming.accept(20)
    assert (arrival.arrays["0"] == filled(N)).all() and arrival.state == b"s"
    arrival.wait(20)
    arrival.close()
def relay(listener, target, cut):
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(target)
        for one, other, watched in ((near, far, True), (far, near, False)):
            threading.Thread(target=pump, args=(one, other, watched, cut, (near, far)), daemon=True).start()
def pump(one, other, watched, cut, both):
    try:
        while piece := one.recv(1 << 16):
            if watched and not cut and len(piece) == 32 and struct.unpack("<I", piece[:4]) == (6,):
                cut.append(1)
                one.shutdown(socket.SHUT_RDWR)  # first, so that the answer is lost
                if ARRIVES:
                    other.sendall(piece)
                    time.sleep(0.1)
                break
            other.sendall(piece)
    except OSError:
        pass
    for end in both:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
pid, url = start(destination)
host, port = url.removeprefix("tcp://").split(":")
listener = socket.create_server(("127.0.0.1", 0))
cut = []
threading.Thread(target=relay, args=(listener, (host, int(port)), cut), daemon=True).start()
a = filled(N)
outgoing = migrate.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}", [a])
# The answer STARTED is lost, too, where COMMIT arrives: the relay's other direction ends with this one.
try:
    outgoing.switchover(b"s")
    assert ARRIVES
except uffd.MigrationError as error:
    assert error.owner == "unknown", error
    assert outgoing.status == "PAUSED"
    fails(outgoing.cancel, "unknown")
if outgoing.status == "POSTCOPY":
    status_is(outgoing, "PAUSED")
assert cut == [1]
if not outgoing.done():
    outgoing.recover(url)
outgoing.wait(20)
outgoing.close()
assert ended(pid) == 0
""")


def test_recovery_that_fails_and_the_next_that_does_not():
    """Goal: nobody at the other end, a hello that is cut off, one cut right after it: paused again each time."""
    script("""
import socket
N = 8 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    a = arrival.arrays["0"]
    assert (a == filled(N)).all()
    arrival.wait(20)
    arrival.close()
pid, url = start(destination)
host, port = url.removeprefix("tcp://").split(":")
def relay(listener, most):
    left = [most]
    def pump(one, other, near, far):
        try:
            while piece := one.recv(4096):
                if left[0] < len(piece):
                    break
                left[0] -= len(piece)
                other.sendall(piece)
        except OSError:
            pass
        for end in (near, far):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
    try:
        while True:
            near, _ = listener.accept()
            far = socket.create_connection((host, int(port)))
            for pair in ((near, far), (far, near)):
                threading.Thread(target=pump, args=(*pair, near, far), daemon=True).start()
    except OSError:
        pass
with migrate.connect(url, [filled(N)], postcopy_bytes_per_s=10e6) as outgoing:
    outgoing.switchover()
    outgoing.pause()
    closed = socket.create_server(("127.0.0.1", 0))
    port_of_nobody = closed.getsockname()[1]
    closed.close()
    for most in (None, 10, 150, 300, 480, 500, 600, 700, 5000):
        listener = None if most is None else socket.create_server(("127.0.0.1", 0))
        there = port_of_nobody if most is None else listener.getsockname()[1]
        if listener:
            threading.Thread(target=relay, args=(listener, most), daemon=True).start()
        try:
            outgoing.recover(f"tcp://127.0.0.1:{there}")
            status_is(outgoing, "PAUSED")       # it was cut a little later
        except (OSError, uffd.MigrationError):
            assert outgoing.status == "PAUSED", outgoing.status
    outgoing._wire.limit(0, 0)
    outgoing.recover(url)
    outgoing.wait(20)
assert ended(pid) == 0
""")


def test_source_dies():
    """Goal: what has come stays; what has not is SIGBUS or an error, never zeros, in the destination and its children;
    touches that wait when the source is given up end."""
    script("""
N = 8 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    a = arrival.arrays["0"]
    assert a[0] == 0 and a[5 * 8192] == 5 * 8192 * 3
    status_is(arrival, "PAUSED")
    child = os.fork()
    if not child:
        np.add(a, 1, out=a)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS
    results = []
    def populate():
        try:
            arrival.regions[0].populate()
        except uffd.ProviderError as error:
            results.append(error.errno)
    waiting = threading.Thread(target=populate)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    arrival.close()
    waiting.join(10)
    assert results == [errno.ENOTRECOVERABLE]
    assert arrival.status == "FAILED" and a[0] == 0 and a[5 * 8192] == 5 * 8192 * 3
    fails(lambda: arrival.wait(1), "destination")
    child = os.fork()
    if not child:
        np.add(a, 1, out=a)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS
pid, url = start(destination)
child = os.fork()
if not child:
    outgoing = migrate.connect(url, [filled(N)], postcopy_bytes_per_s=1e6)
    outgoing.switchover()
    time.sleep(0.2)
    os._exit(0)
os.waitpid(child, 0)
assert ended(pid) == 0
""")


def test_destination_dies():
    """Goal: before the hand-over the source goes on; after it, it knows that the destination had the memory."""
    script("""
def destination(incoming):
    try:
        incoming.accept(0.5)
    except TimeoutError:
        pass
    os._exit(0)
pid, url = start(destination)
a, r = filled(1 << 20), uffd.zeros(1 << 17)
outgoing = migrate.connect(url, [a, r])
outgoing.precopy()
assert ended(pid) == 0
status_is(outgoing, "PAUSED")
a[:] = 1; r[:] = 1
try:
    outgoing.recover()
    raise AssertionError("nobody is there")
except OSError:
    pass
outgoing.close()
assert outgoing.status == "CANCELLED"
a[:] = 2; r[:] = 2

def destination(incoming):
    arrival = incoming.accept(10)
    time.sleep(0.2)                             # else the word that it ran may be lost, too
    os._exit(0)
pid, url = start(destination)
outgoing = migrate.connect(url, [a, r], postcopy_bytes_per_s=1e5)
outgoing.switchover()
assert ended(pid) == 0
status_is(outgoing, "PAUSED")
outgoing.close()
assert outgoing.status == "FAILED" and outgoing._owner == "destination"
""")


def test_who_dies_on_this_machine_is_known_dead_at_once(tmp_path):
    """Goal: over a unix socket SIGKILL of either side gives a verdict, before and after the hand-over, without
    anybody's close() or a time-out; also while a child that the source had forked has its sockets open."""
    script("""
N = 4 << 20
def destination(incoming):
    fails(lambda: incoming.accept(20), "source")
    os.write(tell, b"p")                        # only now comes another source, which accept() might give first
    arrival = incoming.accept(20)
    os.write(tell, b"r")
    try:
        arrival.regions[0].populate()
        raise AssertionError("its source died")
    except uffd.ProviderError as error:
        assert error.errno == errno.ENOTRECOVERABLE, error
    assert arrival.status == "FAILED"
    fails(lambda: arrival.wait(20), "destination")
    os.write(tell, b"e")
    while True:                                 # killed in precopy, and then when it has the memory
        arrival = incoming.accept(20)
        os.write(tell, b"r")
        time.sleep(60)
told, tell = os.pipe()
""" + f"""
URL = "unix:{tmp_path}/s"
""" + """
pid, url = start(destination, URL)
for stage in ("precopy", "late"):
    r, w = os.pipe()
    child = os.fork()
    if not child:
        with migrate.connect(url, [filled(N)], postcopy_bytes_per_s=1e5) as outgoing:
            outgoing.precopy() if stage == "precopy" else outgoing.switchover()
            if not os.fork():                   # it has all descriptors, and outlives its parent
                os.write(w, b"f")
                time.sleep(8)
                os._exit(0)
            time.sleep(60)
    assert os.read(r, 1) == b"f"
    if stage == "late":
        assert os.read(told, 1) == b"r"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.read(told, 1) == (b"p" if stage == "precopy" else b"e")
for stage in ("precopy", "late"):
    a = filled(N)
    outgoing = migrate.connect(url, [a], postcopy_bytes_per_s=1e5)
    outgoing.precopy()
    if stage == "late":
        a[::8192] += 1
        outgoing.switchover()
        assert os.read(told, 1) == b"r"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    status_is(outgoing, "FAILED")
    assert outgoing._owner == ("source" if stage == "precopy" else "destination")
    if stage == "precopy":
        a[:] = 1                                # its program goes on
        pid, url = start(lambda incoming: (incoming.accept(20), os.write(tell, b"r"), time.sleep(60)), URL + "2")
    outgoing.close()
os._exit(0)
""")


@pytest.mark.deadline(90)
def test_a_peer_that_is_stopped_is_a_pause():
    """Goal: a destination that does nothing (SIGSTOP) keeps its source in no call for ever: the deadline of silence
    pauses the migration, the source's program goes on; continued, it is recovered and every byte is there."""
    script("""
N = 8 << 20
def destination(incoming):
    with incoming.accept(70) as arrival:
        assert (arrival.arrays["0"] == filled(N, 5)).all()
pid, url = start(destination)
a = filled(N)
with migrate.connect(url, [a]) as outgoing:
    outgoing.precopy()
    os.kill(pid, signal.SIGSTOP)
    a[:] = 4
    fails(outgoing.precopy, "source")
    assert outgoing.status == "PAUSED"
    a[:] = filled(N, 5)
    os.kill(pid, signal.SIGCONT)
    while outgoing.status == "PAUSED":
        try:
            outgoing.recover()
        except (OSError, uffd.MigrationError):
            time.sleep(0.1)
    outgoing.switchover()
    outgoing.wait(20)
assert ended(pid) == 0
""", deadline_s=70)
