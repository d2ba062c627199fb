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
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as enabled:
        return "[never]" not in enabled.read() and uffd.probe(self_test=False).features["MOVE"]
'''


def script(text, **options):
    return run_script(START + text, **options).check()


@pytest.mark.deadline(150)
@pytest.mark.parametrize("kind", ["array", "region"])
def test_huge_pages_are_moved_to_their_place(kind):
    """Goal: idle memory that comes at full speed lies in huge pages then, where the kernel grants such, with every byte
    right; and it is memory like any other: written, forked, evicted and brought back, discarded, migrated on."""
    script(f"N, KIND = 96 << 20, {kind!r}" + """
right = filled(N)
right[::4096] += 1
right[(10 << 20) // 8:(11 << 20) // 8] = 0
def destination(incoming):
    arrival = incoming.accept(30)
    a, region = arrival.arrays["a"], arrival.regions[0]
    report = arrival.wait(60)
    assert huge_bytes(a) > 0 or not granted(), report
    assert (a == filled(N)).all()
    a[::4096] += 1
    region.discard((10 << 20, 11 << 20))
    child = os.fork()
    if child == 0:
        os._exit(0 if (a == right).all() else 1)
    assert ended(child) == 0
    region.evict((0, N // 2))
    assert (a == right).all()
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
assert report.blocks.doubled == 0 and report.bytes.pushed + report.bytes.zero >= N - 65536, report
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
