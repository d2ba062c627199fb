"""How blocks that come are placed: huge pages where a whole one comes, else copies; and what is left of a run that
fails."""

import pytest
import uffd
from support import matrix
from support.scripts import run_script

pytestmark = pytest.mark.skipif(matrix.filled_whole() or uffd.probe().mode != "full",
                                reason="no userfaultfd that serves the kernel's accesses")
START = '''from support.migration import *
from support import deny
def huge_bytes(array):
    "Of the array's memory, in huge pages."
    at, found, inside = array.ctypes.data, 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):
                start, end = (int(number, 16) for number in first.split("-"))
                inside = start < at + array.nbytes and end > at
            elif inside and first == "AnonHugePages:":
                found += int(rest.split()[0]) << 10
    return found
def granted():
    "Whether the kernel moves pages, and has a huge one at hand."
    with mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        view = np.frombuffer(memory, np.uint8)
        view[:] = 1
        found = huge_bytes(view)
        del view
    return found > 0 and uffd.probe(self_test=False).features["MOVE"]
'''


def script(text, **options):
    return run_script(START + text, **options).check()


def test_huge_pages_are_moved_to_their_place():
    """Goal: what comes as all of a huge page lies in one then, where the kernel grants such, with every byte right; and
    it is memory like any other: written, discarded, forked, evicted and brought back. An extent of which a block was
    there already has its bytes, too, and what the program wrote. Method: a source by hand."""
    script("""
import socket, struct
from uffd.migrate import _frames, _outgoing, _urls
N, B, HUGE = 16 << 20, 65536, 2 << 20
BLOCKS, PREPARE, COMMIT, READY, STARTED = 1, 5, 6, 34, 35
def destination(incoming):
    arrival = incoming.accept(20)
    a, region = arrival.arrays["x"], arrival.regions[0]
    a[3 * HUGE // 8] = 5                        # which is asked for
    report = arrival.wait(20)
    right = filled(N)
    right[3 * HUGE // 8] = 5
    assert (a == right).all() and report.blocks.doubled == 1, report
    assert huge_bytes(a) > 0 or not granted()
    a[::4096] += 1
    right[::4096] += 1
    region.discard((5 * HUGE + B, 5 * HUGE + 2 * B))
    right[(5 * HUGE + B) // 8:(5 * HUGE + 2 * B) // 8] = 0
    child = os.fork()
    if child == 0:
        os._exit(0 if (a == right).all() else 1)
    assert ended(child) == 0
    region.evict((0, N // 2))
    assert (a == right).all()
    arrival.close()
def head(kind, block=0, count=0, nbytes=0, extra=0):
    return struct.pack("=IIQIIQ", kind, 0, block, count, nbytes, extra)
def data(start, nbytes):
    return head(BLOCKS, start // B, nbytes // B, nbytes) + filled(N)[start // 8:(start + nbytes) // 8].tobytes()
def until(kind):
    while True:
        frame = ask.recv(32, socket.MSG_WAITALL)
        assert len(frame) == 32, "the destination is gone"
        if frame[0] == kind:
            return
def deadline():
    return time.monotonic() + 20
pid, url = start(destination)
layout = _frames.described(_frames.Layout((_frames.Part(N, B, "anon"),),
                                          (_frames.Array("x", 0, 0, np.dtype("i8"), (N // 8,), "C"),)))
push, ask = _outgoing._pair(_urls.parse(url), None, "new", f"{1:032x}", deadline())
frames = _frames.Frames(ask)
frames.send("offer", deadline_s=deadline(), byteorder=sys.byteorder, passed=[], **layout)
frames.receive("accepted", deadline_s=deadline())
for one in (push, ask):
    one.settimeout(20)
ask.sendall(head(PREPARE, nbytes=1, extra=1) + b"s")
until(READY)
ask.sendall(head(COMMIT))
until(STARTED)
until(33)
ask.sendall(data(3 * HUGE, B))
time.sleep(0.3)
for start_ in range(0, N, HUGE):
    push.sendall(data(start_, HUGE))
assert ended(pid) == 0
""", deadline_s=40)


@pytest.mark.deadline(150)
@pytest.mark.parametrize("kind", ["array", "region"])
def test_idle_memory_moves_on_and_on(kind):
    """Goal: what came at full speed, in large frames, has every byte right; it is written and migrated on."""
    script(f"N, KIND = 96 << 20, {kind!r}" + """
right = filled(N)
right[::4096] += 1
def destination(incoming):
    arrival = incoming.accept(30)
    a = arrival.arrays["a"]
    arrival.wait(60)
    assert (a == filled(N)).all()
    a[::4096] += 1
    there, on = start(second)
    with migrate.connect(on, {"a": a}) as outgoing:
        outgoing.switchover()
        outgoing.wait(60)
    assert ended(there) == 0
    arrival.close()
def second(incoming):
    arrival = incoming.accept(30)
    assert (arrival.arrays["a"] == right).all()
    arrival.wait(60)
    arrival.close()
pid, url = start(destination)
a = filled(N)
if KIND == "region":
    a = uffd.zeros(N // 8, np.int64)
    a[:] = filled(N)
with migrate.connect(url, {"a": a}) as outgoing:
    outgoing.switchover()
    report = outgoing.wait(60)
assert report.blocks.doubled == 0 and N - 65536 <= report.bytes.pushed + report.bytes.requested <= N, report
assert ended(pid) == 0
""", deadline_s=100)


def test_a_kernel_that_moves_nothing_copies():
    """Goal: where the kernel refuses to move a huge page, its bytes are copied, all of them."""
    script("""
N = 32 << 20
def destination(incoming):
    deny.deny_ioctl(deny.UFFDIO_MOVE)           # of all threads that are started from here on
    arrival = incoming.accept(30)
    arrival.wait(30)
    a = arrival.arrays["a"]
    assert huge_bytes(a) == 0 and (a == filled(N)).all()
    arrival.close()
pid, url = start(destination)
with migrate.connect(url, {"a": filled(N)}) as outgoing:
    outgoing.switchover()
    outgoing.wait(30)
assert ended(pid) == 0
""", deadline_s=40)


def test_blocks_beside_one_that_fails_are_their_own():
    """Goal: of a run that can't be placed as a whole, since the program has unmapped a page of it, the other blocks
    have their own bytes, once and for all: what the program writes there stays when the connection is taken up again.
    Method: blocks of a page, four of which come in one frame at least, as
    they lie; the first of four is unmapped."""
    script("""
N, B = 8 << 20, PAGE
right = filled(N).reshape(-1, B // 8)
def destination(incoming):
    arrival = incoming.accept(30)
    a = arrival.arrays["a"]
    blocks = a.reshape(-1, B // 8)
    LIBC = ctypes.CDLL(None, use_errno=True)
    LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    assert LIBC.munmap(a.ctypes.data + 400 * B, B) == 0
    os.write(tell, b"u")
    status_is(arrival, "PAUSED")
    assert (blocks[401:404] == right[401:404]).all()
    blocks[401:404] = -1
    os.write(tell, b"w")
    assert os.read(goes, 1) == b"g"
    assert (blocks[401:404] == -1).all()
    os._exit(0)
told, tell = os.pipe()
goes, go = os.pipe()
pid, url = start(destination)
os.close(tell)                                  # so that its end is seen
region = uffd.Region(N, providers.Zero(), mode="c", block_bytes=B)
a = region.array(np.int64)
a[:] = filled(N)
outgoing = migrate.connect(url, {"a": a}, postcopy_bytes_per_s=1e5)
outgoing.switchover()
assert os.read(told, 1) == b"u"
outgoing._wire.limit(0, 0)
assert os.read(told, 1) == b"w"
outgoing.recover()
status_is(outgoing, "PAUSED")                   # what is unmapped came again, and failed again
os.write(go, b"g")
assert ended(pid) == 0
os._exit(0)
""", deadline_s=60)
