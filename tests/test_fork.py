"""Forked children serve themselves: right bytes, never zeros, never a hang; the parent's store is left alone."""

import pytest
import uffd
from support import matrix, shim
from support.scripts import run_script

PAGE = uffd._core.PAGE_BYTES


def test_child_reads_missing_blocks(where):
    """Goal: a child sees the whole content, what was there and what was not."""
    run_script("""
provider, control = controlled()
r = region(64 * BLOCK, provider)
a = r.array()
assert a[5 * BLOCK] == pattern(5 * BLOCK, 1)[0]
a[7 * BLOCK] = 1
def child():
    assert a[7 * BLOCK] == 1
    a[7 * BLOCK] = pattern(7 * BLOCK, 1)[0]
    assert checked(r.address, 0, 64 * BLOCK) is None
assert in_child(child) == 0
right = pattern(0, 64 * BLOCK).copy()
right[7 * BLOCK] = a[7 * BLOCK]
assert (a == right).all()
""", where=where).check()


def test_fork_while_spilled_blocks_come_back(where):
    """Goal: blocks that are being read from the spill file at the fork are right in the child, too: its bytes, not the
    provider's. Method: the parent's reads of the file fail, and are tried again, until the child has looked."""
    run_script("""
from support import shim
r = region(64 * BLOCK, retries=1000, timeout_s=30)
a = r.array()
a[:] = pattern(0, 64 * BLOCK)
assert r.evict() == 64 * BLOCK
rule = shim.Rule("pread", 1, -1, errno.EIO)
filling = threading.Thread(target=r.populate, args=((0, 8 * BLOCK),), daemon=True)
filling.start()
wait_until(lambda: rule.fired > 4, "nothing is read")
def child():
    shim.clear()
    assert checked(r.address, 0, 64 * BLOCK) is None
code = in_child(child)
shim.clear()
filling.join()
assert code == 0
assert checked(r.address, 0, 64 * BLOCK) is None
""", where=where, preload=shim.path()).check()


def test_blocks_that_were_spilled_and_written_again(where):
    """Goal: the child sees the latest bytes, not those that an earlier eviction put into the spill file. Method: all is
    spilled; then half of it is written anew, a part of which is spilled anew."""
    run_script("""
r = region(64 * BLOCK)
a = r.array()
a[:] = 1
a[32 * BLOCK:] = pattern(32 * BLOCK, 32 * BLOCK)
assert r.evict() == 64 * BLOCK
a[:32 * BLOCK] = pattern(0, 32 * BLOCK)
r.evict(a[:8 * BLOCK])
a[40 * BLOCK]                                       # back, and clean
def child():
    assert checked(r.address, 0, 64 * BLOCK) is None
    a[3 * BLOCK] ^= 1
    assert r.evict() > 0                            # pages that parent and child share may stay
    a[3 * BLOCK] ^= 1
    assert checked(r.address, 0, 64 * BLOCK) is None
assert in_child(child) == 0
assert checked(r.address, 0, 64 * BLOCK) is None
""", where=where).check()


def test_a_parent_that_forks_for_ever_goes_on_spilling(where):
    """Goal: more forks than there are numbers of spill files, each with blocks spilled since the last that stay there:
    all that was written leaves memory and comes back right, also in a child from the middle that looks at the end.
    Method: each turn spills two blocks, one of which later turns write anew."""
    if matrix.filled_whole() or where.backing != "anon":
        pytest.skip("nothing leaves memory, or as with anonymous memory")
    run_script("""
compress = %r
r = region(600 * PAGE, providers.Scratch(compress=compress) if compress else providers.Zero(), block_bytes=PAGE,
           readahead_bytes=0)
a = r.array().reshape(600, PAGE)
go = os.pipe()
child = 0
def right(n, turn):
    page = np.full(PAGE, n %% 251, np.uint8) if n %% 3 else pattern(n * PAGE, PAGE).copy()
    page[:2] = turn & 255, turn >> 8
    return page
for turn in range(320):
    a[turn] = right(turn, turn)
    a[599] = right(599, turn)
    r.evict()
    if turn == 100:
        r.discard((50 * PAGE, 60 * PAGE))
    if turn == 270:
        child = os.fork()
        if not child:
            os.close(go[1])
            os.read(go[0], 1)
            same = [np.array_equal(a[n], right(n, n)) for n in range(271) if not 50 <= n < 60]
            os._exit(0 if all(same) and not a[50:60].any() and np.array_equal(a[599], right(599, 270)) else 1)
    elif in_child(lambda: None) != 0:
        raise SystemExit("a child failed")
assert r.stats().write_errors == 0, r.stats()
for n in range(320):
    assert np.array_equal(a[n], right(n, n)) if not 50 <= n < 60 else not a[n].any(), n
assert np.array_equal(a[599], right(599, 319))
os.close(go[1])
assert wait_for_child(child, 60) == 0
""" % ("zstd" if where.delivery == "thread" else None), 150, where=where).check()


def test_child_discards_what_the_parent_wrote(where):
    """Goal: discard() in the child has the provider's bytes back, also of blocks that it had not touched yet, in the
    parent's memory or its spill file; the parent keeps its own."""
    run_script("""
r = region(64 * BLOCK)
a = r.array()
a[:] = 7
r.evict(a[:8 * BLOCK])
def child():
    r.discard(a[4 * BLOCK:40 * BLOCK])
    assert (a[:4 * BLOCK] == 7).all() and (a[40 * BLOCK:] == 7).all()
    assert (a[4 * BLOCK:40 * BLOCK] == 0).all(), np.unique(a[::BLOCK])
assert in_child(child) == 0
assert (a == 7).all()
""", where=where).check()


def test_what_a_child_may_read_is_not_discarded(where):
    """Goal: with shared backing, the parent's discard of what was dirty at a fork is refused, with the reason."""
    run_script("""
r = region(8 * BLOCK)
a = r.array()
a[:2 * BLOCK] = 7
assert in_child(lambda: None) == 0
try:
    r.discard()
    assert r.backing == "anon" and (a == 0).all()
except ValueError as error:
    assert r.backing == "shared" and "forked" in str(error) and (a[:2 * BLOCK] == 7).all(), error
""", where=where).check()


def test_child_without_privilege(where):
    run_script("""
provider, control = controlled()
r = region(64 * BLOCK, provider)
def child():
    assert checked(r.address, 0, 64 * BLOCK) is None
assert in_child(child) == 0
assert checked(r.address, 0, 64 * BLOCK) is None
""", where=where, user_mode=True).check()


def test_child_touches_first_thing(where):
    """Goal: the very first touch in the child is served. Method: many forks, each child touches another block."""
    run_script("""
provider, control = controlled()
r = region(64 * BLOCK, provider, readahead_bytes=0)
a = r.array()
for n in range(20):
    pid = os.fork()
    if not pid:
        right = a[n * BLOCK + n] == pattern(n * BLOCK + n, 1)[0] and checked(r.address, 0, 64 * BLOCK) is None
        os._exit(0 if right else 1)
    assert wait_for_child(pid) == 0, n
""", where=where).check()


def test_parent_in_mid_fault(where):
    """Goal: four threads wait in faults when the parent forks: the child, to which none of the fills belongs, reads
    the same blocks, and the parent's touches end, too."""
    run_script("""
provider, control = controlled()
control.close_gate(0, 4 * BLOCK)
e = uffd.Engine(workers=2)
r = region(64 * BLOCK, provider, engine=e, readahead_bytes=0)
a = r.array()
threads = touch_in_threads(a, [block * BLOCK for block in (0, 1, 2, 3)])
wait_until(lambda: control.gate_waiters >= 2, "no fill under way")
time.sleep(0.05)
def child():
    control.open_gate()
    assert checked(r.address, 0, 64 * BLOCK) is None
assert in_child(child) == 0
assert control.gate_waiters >= 2, "the parent's fills went on"
control.open_gate()
for thread in threads:
    thread.join(10)
    assert not thread.is_alive()
assert checked(r.address, 0, 64 * BLOCK) is None
""", where=where).check()


@pytest.mark.parametrize("user_mode", [False, True], ids=["full", "user"])
def test_busy_parent(where, user_mode):
    """Goal: forks at any moment of four touching threads. Method: touch and fork at once, often."""
    run_script("""
control = Control()
for turn in range(6):
    provider, control = controlled()
    control.delay_us = 50
    r = region(256 * BLOCK, provider)
    failed = []
    def touch():
        if checked(r.address, 0, 256 * BLOCK) is not None:
            failed.append(1)
    threads = [threading.Thread(target=touch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        def child():
            assert checked(r.address, 0, 256 * BLOCK) is None
        assert in_child(child) == 0
    for thread in threads:
        thread.join()
    assert not failed
    r.close()
""", 40, where=where, user_mode=user_mode).check()


def test_child_uses_the_api(where):
    """Goal: populate, prefetch, pinned, stats, new regions and close work in the child."""
    run_script("""
provider, control = controlled()
r = region(64 * BLOCK, provider)
a = r.array()
def child():
    global a
    r.populate((0, 10 * BLOCK))
    r.prefetch((10 * BLOCK, 20 * BLOCK)).wait(5)
    with uffd.pinned(a[20 * BLOCK:30 * BLOCK]):
        assert r.resident()[:30].all()
    r.stats()
    with region(4 * BLOCK, controlled()[0]) as own:
        assert checked(own.address, 0, 4 * BLOCK) is None
    with uffd.Engine(workers=1) as engine, region(4 * BLOCK, controlled()[0], engine=engine) as own:
        assert checked(own.address, 0, 4 * BLOCK) is None
    assert checked(r.address, 0, 64 * BLOCK) is None
    del a
    r.close()
assert in_child(child) == 0
assert checked(r.address, 0, 64 * BLOCK) is None
""", where=where).check()


def test_child_closes_and_parent_goes_on(where):
    """Goal: a child's normal exit, with atexit handlers, takes nothing from the parent."""
    run_script("""
provider, control = controlled()
r = region(64 * BLOCK, provider, readahead_bytes=0)
a = r.array()
pid = os.fork()
if not pid:
    assert a[0] == pattern(0, 1)[0]
    sys.exit(0)
assert wait_for_child(pid) == 0
assert checked(r.address, 0, 64 * BLOCK) is None
""", where=where).check()


def test_grandchild(where):
    run_script("""
provider, control = controlled()
r = region(64 * BLOCK, provider, readahead_bytes=0)
a = r.array()
def grandchild():
    assert checked(r.address, 0, 64 * BLOCK) is None
def child():
    assert a[3 * BLOCK] == pattern(3 * BLOCK, 1)[0]
    assert in_child(grandchild) == 0
    assert checked(r.address, 0, 64 * BLOCK) is None
assert in_child(child) == 0
""", where=where).check()


def test_parent_exits_before_the_child(where):
    """Goal: a child outlives its parent and still reads what is missing."""
    result = run_script("""
provider, control = controlled()
r = region(64 * BLOCK, provider, readahead_bytes=0)
reader, writer = os.pipe()
pid = os.fork()
if not pid:
    os.setsid()  # what stays in the script's group is killed with it
    os.close(writer)
    os.read(reader, 1)  # until the parent is gone
    ok = checked(r.address, 0, 64 * BLOCK) is None
    with open("verdict", "w") as file:
        file.write("right" if ok else "wrong")
    os._exit(0)
os.close(reader)
while os.getpgid(pid) != pid:
    time.sleep(0.001)
say(os.getcwd())
os._exit(0)
""", where=where).check()
    directory = result.stdout.split()[0]
    assert wait_for_text(f"{directory}/verdict") == "right"


def wait_for_text(path, timeout_s=10.0):
    import time

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with open(path) as file:
                if text := file.read():
                    return text
        except FileNotFoundError:
            pass
        time.sleep(0.01)
    return "no verdict: the child hung or died"


def test_fork_with_several_regions(where):
    """Goal: regions of every delivery and backing at once, open files, closed ones, survive a fork."""
    run_script("""
with open("data", "wb") as file:
    file.write(pattern(0, 16 * BLOCK).tobytes())
from support.matrix import WHERES
regions = []
for each in WHERES:
    if each.unavailable() is None:
        regions.append(uffd.Region(None, providers.File("data"), **each.options))
        regions.append(uffd.Region(16 * BLOCK, controlled()[0], **each.options))
closed = region(BLOCK, controlled()[0])
closed.close()
def child():
    assert closed.closed
    for r in regions:
        assert checked(r.address, 0, 16 * BLOCK) is None, r
for _ in range(3):
    assert in_child(child) == 0
for r in regions:
    assert checked(r.address, 0, 16 * BLOCK) is None, r
""", where=where).check()


def test_poison_in_the_child(where):
    """Goal: a block that fails in the child kills the child with a message, not the parent."""
    result = run_script("""
provider, control = controlled()
r = region(8 * BLOCK, provider, name="weights", readahead_bytes=0, retries=0)
def child():
    control.fail(3 * BLOCK, 4 * BLOCK, errno.EIO)
    LIB.touch_sum(r.address + 3 * BLOCK, 1, 1)
assert in_child(child) == -signal.SIGBUS
assert checked(r.address, 0, 8 * BLOCK) is None
""", where=where).check()
    assert "weights" in result.stderr


def test_poison_of_the_parent_stays_in_the_child(where):
    run_script("""
provider, control = controlled()
control.fail(3 * BLOCK, 4 * BLOCK, errno.EIO)
r = region(8 * BLOCK, provider, readahead_bytes=0, retries=0)
try:
    r.populate()
except uffd.ProviderError:
    pass
control.fail_times = 0
def touches():
    LIB.touch_sum(r.address + 3 * BLOCK, 1, 1)
def repairs():
    r.populate()
    assert checked(r.address, 0, 8 * BLOCK) is None
code = in_child(touches)
assert code in (0, -signal.SIGBUS), code
assert in_child(repairs) == 0
""", where=where).check()


def test_children_write_apart(where):
    """Goal: on anonymous memory parent and child write to copies of their own; on both, nobody reads zeros."""
    run_script("""
provider, control = controlled()
r = region(8 * BLOCK, provider, readahead_bytes=0)
a = r.array()
a[0] = 1
def child():
    a[0] = 2
    a[BLOCK] = 2
    assert checked(r.address + 2 * BLOCK, 2 * BLOCK, 6 * BLOCK) is None
assert in_child(child) == 0
if WHERE.backing == "anon":
    assert a[0] == 1 and a[BLOCK] == pattern(BLOCK, 1)[0]
assert checked(r.address + 2 * BLOCK, 2 * BLOCK, 6 * BLOCK) is None
""", where=where).check()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(where, method):
    """Goal: a region handed to a process of each start method is served there: inherited, or made anew from its
    recipe."""
    run_script("""
import multiprocessing
def check(r, queue):
    queue.put(checked(r.address, 0, 16 * BLOCK))
if __name__ == "__main__":
    with open("data", "wb") as file:
        file.write(pattern(0, 16 * BLOCK).tobytes())
    r = region(None, providers.File(os.path.abspath("data")))
    a = r.array()
    assert a[0] == pattern(0, 1)[0]
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=check, args=(r, queue))
    process.start()
    assert queue.get(timeout=15) is None
    process.join(10)
    assert process.exitcode == 0
    assert checked(r.address, 0, 16 * BLOCK) is None
""", 40, where=where, argv=[method], fresh=True).check()


def test_pool_of_forked_workers(where):
    run_script("""
import multiprocessing
provider, control = controlled()
r = region(64 * BLOCK, provider)
def check(block):
    return checked(r.address + block * BLOCK, block * BLOCK, BLOCK)
with multiprocessing.get_context("fork").Pool(3) as pool:
    assert pool.map(check, range(64)) == [None] * 64
assert checked(r.address, 0, 64 * BLOCK) is None
""", where=where).check()


def test_subprocess_during_faults(where):
    """Goal: subprocesses start while threads touch; they inherit nothing of ours."""
    run_script("""
provider, control = controlled()
control.delay_us = 100
r = region(512 * BLOCK, provider)
failed = []
def touch():
    if checked(r.address, 0, 512 * BLOCK) is not None:
        failed.append(1)
threads = [threading.Thread(target=touch) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(5):
    done = subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0
    for ours in ("userfaultfd", "memfd", "eventpoll", "eventfd"):
        assert ours not in done.stdout, done.stdout
for thread in threads:
    thread.join()
assert not failed
""", where=where).check()


def test_fork_keeps_the_parents_descriptors_closed_in_the_child(where):
    """Goal: a child holds no second handle of the parent's userfaultfd: else a fault of the parent could be read, and
    lost, there. Method: inode by inode is not to be had for anonymous files, so count them by kind."""
    run_script("""
provider, control = controlled()
r = region(8 * BLOCK, provider, readahead_bytes=0)
LIB.touch_sum(r.address, 1, 1)
kinds = leaks.fd_kinds()
def child():
    LIB.touch_sum(r.address, 8 * BLOCK, BLOCK)
    mine = leaks.fd_kinds()
    assert mine["anon_inode:[userfaultfd]"] <= kinds["anon_inode:[userfaultfd]"], (kinds, mine)
for _ in range(3):
    assert in_child(child) == 0
assert leaks.fd_kinds() == kinds
""", where=where).check()


KEPT = """
r = region(32 * PAGE, providers.Zero(), engine=uffd.Engine(workers=1), block_bytes=PAGE, mode="c", readahead_bytes=0)
a = r.array("u1", (32, PAGE))
a[16:] = 1
r.evict()
fds = len(os.listdir("/proc/self/fd"))
for n in range(16):
    a[n] = n + 1
def leaves():
    r.evict()
    return not r.resident()[:16].any()
"""


def test_what_a_child_may_read_stays_until_the_last_child_of_it_ends(where):
    """Goal: blocks of shared memory that were dirty at a fork leave the parent's memory when nobody reads them any
    more, and not before; all of them read right. Method: the child dies at once, a child of its own reads after it."""
    if where.backing != "shared" or matrix.filled_whole():
        pytest.skip("private memory is the kernel's matter")
    run_script(KEPT + """
go, answer = os.pipe(), os.pipe()
pid = os.fork()
if not pid:
    if not os.fork():
        os.close(go[1])
        os.read(go[0], 1)
        os.write(answer[1], b"y" if all((a[n] == n + 1).all() for n in range(16)) else b"n")
    os._exit(0)
assert wait_for_child(pid) == 0
time.sleep(1.5)                             # two ticks of who looks after it
r.evict()
assert r.resident()[:16].all()
assert all((a[n] == n + 1).all() for n in range(16))
os.close(go[1])
assert os.read(answer[0], 1) == b"y"
wait_until(leaves, "they stay, though nobody needs them")
for fd in (go[0], *answer):
    os.close(fd)
assert all((a[n] == n + 1).all() for n in range(16)) and (a[16:] == 1).all()
wait_until(lambda: len(os.listdir("/proc/self/fd")) <= fds + 1, "descriptors are left")      # its spill file more
""", where=where).check()


def test_a_child_that_runs_another_program_needs_nothing(where):
    if where.backing != "shared" or matrix.filled_whole():
        pytest.skip("private memory is the kernel's matter")
    run_script(KEPT + """
pid = os.fork()
if not pid:
    os.execvp("sleep", ["sleep", "30"])
wait_until(leaves, "they stay, though the child runs another program")
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
assert all((a[n] == n + 1).all() for n in range(16))
""", where=where).check()


def test_a_region_ends_before_the_children_that_read_it(where):
    """Goal: the child reads its bytes after the parent's region is gone; nothing of it is left there."""
    if where.backing != "shared" or matrix.filled_whole():
        pytest.skip("private memory is the kernel's matter")
    run_script(KEPT + """
go = os.pipe()
pid = os.fork()
if not pid:
    os.close(go[1])
    os.read(go[0], 1)
    os._exit(0 if all((a[n] == n + 1).all() for n in range(16)) else 1)
del a
r.close()
with region(PAGE, providers.Zero(), engine=r.engine) as other:
    other.populate()
    os.close(go[1])
    assert wait_for_child(pid) == 0
    wait_until(lambda: not any("pipe" in to for fd, to in leaks.read_fds().items() if int(fd) > 2 and int(fd) != go[0]),
               "the pipe is left")
""", where=where).check()


def test_matrix_is_tested_somewhere():
    """Goal: a kernel on which no delivery works makes this suite say so, rather than pass empty."""
    reasons = [where.unavailable() for where in matrix.WHERES]
    assert None in reasons, reasons
