"""A fill that fails is never zeros and never a hang: errors from calls, poison at a touch, repair, time-outs."""

import errno
import signal
import threading
import time

import numpy as np
import pytest
import uffd
from support import matrix
from support.native import controlled
from support.pattern import pattern
from support.scripts import finish_script, output_of, run_everywhere, run_script, start_script, wait_for_line

PAGE = uffd._core.PAGE_BYTES
BLOCK = 65536
NBYTES = 8 * BLOCK
BAD = (3 * BLOCK, 4 * BLOCK)
# Scripts: a region whose block 3 fails with EIO for ever.
FAILING = """
provider, control = controlled()
control.fail(3 * BLOCK, 4 * BLOCK, errno.EIO)
r = region(8 * BLOCK, provider, name="weights", retries=2, readahead_bytes=0)
a = r.array()
"""


def failing(make, times=-1, **options):
    provider, control = controlled()
    control.fail(*BAD, errno.EIO, times)
    return make(NBYTES, provider, **{"retries": 2, "readahead_bytes": 0, "name": "weights", **options}), control


# ---- errors from calls ----

@pytest.mark.parametrize("call", ["populate", "pinned", "module populate", "prefetch wait"])
def test_error_from_a_call(make, call):
    """Goal: the error has region, offset, nbytes, errno and tries, and its text names them and the provider."""
    region, control = failing(make)
    array = region.array()
    with pytest.raises(uffd.ProviderError) as caught:
        if call == "populate":
            region.populate()
        elif call == "pinned":
            with region.pinned(BAD):
                pass
        elif call == "module populate":
            uffd.populate(array)
        else:
            region.prefetch().wait(10)
    error = caught.value
    assert isinstance(error, OSError) and isinstance(error, uffd.UffdError)
    assert error.errno == errno.EIO and error.offset == BAD[0] and error.nbytes == BLOCK and error.tries == 3
    assert error.region in (region, "weights")
    assert error.provider_traceback is None
    for word in ("weights", str(BAD[0]), "Native", "3"):
        assert word in str(error), str(error)
    assert "EIO" in str(error) or "Input/output" in str(error)
    assert control.calls >= 3
    del array


def test_other_blocks_live(make):
    """Goal: populate of all fills what can be filled, and raises for the one that can't."""
    region, _ = failing(make)
    with pytest.raises(uffd.ProviderError):
        region.populate()
    array = region.array()
    np.testing.assert_array_equal(array[:BAD[0]], pattern(0, BAD[0]))
    np.testing.assert_array_equal(array[BAD[1]:], pattern(BAD[1], NBYTES - BAD[1]))
    assert not region.resident()[3]
    del array


@pytest.mark.parametrize("times", [1, 2])
def test_retries_succeed(make, times):
    """Goal: failures fewer than retries are not seen by a touch, only by the counters."""
    region, control = failing(make, times)
    array = region.array()
    np.testing.assert_array_equal(array, pattern(0, NBYTES))
    stats = region.stats()
    assert stats.retries == times and stats.poisoned == 0
    del array


def test_repair_by_populate(make):
    """Goal: a block that failed is filled by a later populate, once its source is well again."""
    region, control = failing(make, retries=0)
    with pytest.raises(uffd.ProviderError):
        region.populate(BAD)
    with pytest.raises(uffd.ProviderError):
        region.populate(BAD)
    control.fail_times = 0
    region.populate(BAD)
    array = region.array()
    np.testing.assert_array_equal(array, pattern(0, NBYTES))
    del array


@pytest.mark.parametrize("answer", [errno.EIO, errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.ETIMEDOUT, 1, 133, 4000])
def test_any_errno(make, answer):
    provider, control = controlled()
    control.fail(0, NBYTES, answer)
    region = make(NBYTES, provider, retries=1, timeout_s=5)
    with pytest.raises(uffd.ProviderError) as caught:
        region.populate((0, BLOCK))
    assert caught.value.errno == answer
    assert not region.resident().any()


def test_a_fill_that_answers_positive_is_an_error(make):
    """Goal: an answer that is neither 0 nor -errno is an error, not taken for success."""
    provider, control = controlled()
    control.fail(0, NBYTES, -7)
    region = make(NBYTES, provider, retries=0)
    with pytest.raises(uffd.ProviderError):
        region.populate((0, BLOCK))


# ---- poison at a touch ----

def assert_poison_message(result, tries=3):
    assert result.signal == signal.SIGBUS, result.describe()
    for word in ("weights", str(BAD[0]), "Native", f"{tries}"):
        assert word in result.stderr, result.describe()
    assert "EIO" in result.stderr or "Input/output" in result.stderr or "errno 5" in result.stderr, result.describe()


@pytest.mark.parametrize("touch", ["a[3 * BLOCK + 9]", "a[3 * BLOCK] = 1", "a.sum()", "LIB.touch_sum(r.address, NB, 1)",
                                   "np.add(a, 1)"], ids=["element", "store", "sum", "C", "ufunc"])
def test_poison_kills_with_a_message(where, touch):
    """Goal: a touch of a block that can't be filled ends the process by SIGBUS, after a line that names it all."""
    result = run_script(FAILING + f"""
NB = 8 * BLOCK
assert a[0] == pattern(0, 1)[0]
{touch}
say("survived")
""", where=where)
    assert "survived" not in result.stdout
    assert_poison_message(result)


@pytest.mark.parametrize("how", ["pthread", "thread"])
def test_poison_in_a_thread(where, how):
    code = {"pthread": "LIB.touch_in_pthread(r.address + 3 * BLOCK, 1, 1, 65536)",
            "thread": "t = threading.Thread(target=lambda: a[3 * BLOCK]); t.start(); t.join()"}[how]
    assert_poison_message(run_script(FAILING + code + "\nsay('survived')\n", where=where))


def test_poison_in_user_mode(where):
    assert_poison_message(run_script(FAILING + "a[3 * BLOCK]\n", where=where, user_mode=True))


def test_second_touch_of_poison_dies_too(where):
    """Goal: poison stays: after populate raised, a touch still dies, and with the message."""
    assert_poison_message(run_script(FAILING + """
try:
    r.populate()
except uffd.ProviderError:
    pass
else:
    os._exit(5)
a[3 * BLOCK + 1]
""", where=where))


def test_poison_repaired_before_the_touch(where):
    run_script(FAILING + """
try:
    r.populate()
except uffd.ProviderError:
    pass
control.fail_times = 0
r.populate()
assert checked(r.address, 0, 8 * BLOCK) is None
""", where=where).check()


def test_poison_survived_by_a_handler(where):
    """Goal: a program with a SIGBUS handler of its own, set before us, is handed the poisoned touch: it can jump away,
    go on with other blocks, and repair. Again and again: nothing is held or lost by the jump."""
    run_script("""
spare = np.zeros(PAGE, "u1")
assert LIB.touch_guarded(spare.ctypes.data) == 0  # installs the handler
""" + FAILING + """
for turn in range(40):
    assert LIB.touch_guarded(r.address + 3 * BLOCK) == -signal.SIGBUS
assert checked(r.address, 0, 3 * BLOCK) is None
assert checked(r.address + 4 * BLOCK, 4 * BLOCK, 4 * BLOCK) is None
control.fail_times = 0
r.populate()
assert LIB.touch_guarded(r.address + 3 * BLOCK) == pattern(3 * BLOCK, 1)[0]
assert checked(r.address, 0, 8 * BLOCK) is None
""", where=where).check()


@pytest.mark.parametrize("user_mode", [False, True], ids=["full", "user"])
def test_poison_in_a_syscall_is_efault(where, user_mode):
    """Goal: a kernel access to a poisoned page is EFAULT, in every delivery."""
    if not user_mode and not matrix.full_mode():
        pytest.skip("no full userfaultfd: this user has user mode only")
    run_script(FAILING + """
try:
    r.populate()
except uffd.ProviderError:
    pass
reader, writer = os.pipe()
try:
    os.write(writer, a[3 * BLOCK:3 * BLOCK + 100])
except OSError as error:
    assert error.errno == errno.EFAULT, error
else:
    os._exit(7)
""", where=where, user_mode=user_mode).check()


# ---- on_error="wait" ----

def test_wait_outlasts_the_failure(make):
    """Goal: on_error="wait" tries for ever: the touch goes on when the source is well again."""
    region, control = failing(make, on_error="wait", retries=0, timeout_s=0.2)
    array = region.array()
    healer = threading.Timer(0.5, lambda: setattr(control, "fail_times", 0))
    healer.start()
    np.testing.assert_array_equal(np.add(array, 0), pattern(0, NBYTES))
    healer.join()
    assert region.stats().poisoned == 0
    del array


def test_wait_does_not_spin(make):
    """Goal: retries of on_error="wait" are paced, and others are served meanwhile."""
    region, control = failing(make, on_error="wait", retries=0)
    array = region.array()
    done = threading.Event()

    def touch():
        np.add(array[BAD[0]:BAD[0] + PAGE], 0)
        done.set()

    thread = threading.Thread(target=touch)
    thread.start()
    time.sleep(0.5)
    np.testing.assert_array_equal(array[:BAD[0]], pattern(0, BAD[0]))
    calls = control.calls
    assert not done.is_set() and calls < 5000
    control.fail_times = 0
    thread.join()
    assert done.is_set()
    del array


def test_wait_says_what_it_waits_for():
    for result in run_everywhere("""
provider, control = controlled()
control.fail(3 * BLOCK, 4 * BLOCK, errno.EIO)
r = region(8 * BLOCK, provider, name="weights", retries=0, readahead_bytes=0, on_error="wait")
threading.Timer(3.5, lambda: setattr(control, "fail_times", 0)).start()
assert LIB.touch_sum(r.address + 3 * BLOCK, 1, 1) == pattern(3 * BLOCK, 1)[0]
"""):
        assert_one_waiting_line(result.check().stderr)


# ---- time ----

def assert_one_waiting_line(stderr):
    lines = [line for line in stderr.splitlines() if "weights" in line]
    assert len(lines) == 1, stderr
    assert "wait" in lines[0] and str(BAD[0]) in lines[0], stderr


def test_a_line_after_two_seconds():
    """Goal: one line on stderr for a touch that waits for more than 2 s, none for a quicker one."""
    for result in run_everywhere("""
provider, control = controlled()
control.close_gate(3 * BLOCK, 4 * BLOCK)
r = region(8 * BLOCK, provider, name="weights", readahead_bytes=0)
LIB.touch_sum(r.address, 1, 1)
threading.Timer(3.5, control.open_gate).start()
assert LIB.touch_sum(r.address + 3 * BLOCK, 1, 1) == pattern(3 * BLOCK, 1)[0]
"""):
        assert_one_waiting_line(result.check().stderr)


HANGING = """
provider, control = controlled()
control.close_gate(3 * BLOCK, 4 * BLOCK)
e = uffd.Engine(workers=1)
r = region(8 * BLOCK, provider, engine=e, name="weights", readahead_bytes=0, timeout_s=1.0, retries=0)
"""


@pytest.mark.parametrize("backing", ["anon", "shared"])
def test_hanging_fill_times_out_at_a_touch(backing):
    """Goal: with thread delivery a fill that hangs is given up after timeout_s: SIGBUS that names the block."""
    result = run_script(HANGING + "LIB.touch_sum(r.address + 3 * BLOCK, 1, 1)\nsay('survived')\n",
                        where=f"thread-{backing}")
    assert result.signal == signal.SIGBUS, result.describe()
    assert "weights" in result.stderr and str(BAD[0]) in result.stderr, result.describe()
    assert "time" in result.stderr.lower(), result.describe()


@pytest.mark.parametrize("backing", ["anon", "shared"])
def test_hanging_fill_times_out_in_populate(backing):
    """Goal: populate raises with ETIMEDOUT and names the block; the only worker was replaced: other blocks are served;
    the late fill does no harm; when the source is well again populate repairs, or says that it never will."""
    run_script(HANGING + """
try:
    r.populate((3 * BLOCK, 4 * BLOCK), timeout_s=10)
except uffd.ProviderError as error:
    assert error.errno == errno.ETIMEDOUT and error.offset == 3 * BLOCK, error
    assert "weights" in str(error)
else:
    os._exit(5)
assert checked(r.address, 0, 3 * BLOCK) is None
assert checked(r.address + 4 * BLOCK, 4 * BLOCK, 4 * BLOCK) is None
control.gate_start = control.gate_stop = 0
control.open_gate()
time.sleep(0.2)
try:
    r.populate(timeout_s=10)
except uffd.ProviderError as error:  # a shared page into which the lost fill may still write
    assert WHERE.backing == "shared" and error.errno == errno.ETIMEDOUT, error
else:
    assert checked(r.address, 0, 8 * BLOCK) is None
os._exit(0)  # the retired worker is nobody's to join
""", where=f"thread-{backing}").check()


@pytest.mark.parametrize("backing", ["anon", "shared"])
def test_hanging_run_times_out_in_populate(backing):
    """Goal: the same where one call of the fill has several blocks: the error covers the one that hangs."""
    run_script(HANGING.replace("8 * BLOCK", "64 * BLOCK") + """
try:
    r.populate(timeout_s=10)
except uffd.ProviderError as error:
    assert error.errno == errno.ETIMEDOUT, error
    assert error.offset <= 3 * BLOCK and error.offset % BLOCK == 0, error
else:
    os._exit(5)
assert checked(r.address + 32 * BLOCK, 32 * BLOCK, 32 * BLOCK) is None  # no part of that one call
os._exit(0)
""", where=f"thread-{backing}").check()


def test_hanging_fills_do_not_use_up_the_workers():
    """Goal: each hung worker is replaced. Method: as many hung blocks as would stall three workers in turn."""
    run_script("""
provider, control = controlled()
control.close_gate(0, 3 * BLOCK)
e = uffd.Engine(workers=1)
r = region(8 * BLOCK, provider, engine=e, readahead_bytes=0, timeout_s=0.3, retries=0)
for block in range(3):
    try:
        r.populate((block * BLOCK, (block + 1) * BLOCK), timeout_s=10)
    except uffd.ProviderError as error:
        assert error.errno == errno.ETIMEDOUT
    else:
        os._exit(5)
assert checked(r.address + 3 * BLOCK, 3 * BLOCK, 5 * BLOCK) is None
os._exit(0)
""").check()


# ---- Ctrl-C ----

CTRL_C = """
provider, control = controlled()
control.close_gate(3 * BLOCK, 4 * BLOCK)
r = region(8 * BLOCK, provider, readahead_bytes=0)
try:
    say("waiting")
    {wait}
except KeyboardInterrupt:
    say("interrupted")
control.open_gate()
r.populate(timeout_s=10)
assert checked(r.address, 0, 8 * BLOCK) is None
say("whole")
"""


@pytest.mark.parametrize("wait", ["r.populate()", "r.prefetch().wait()", "r.pinned().__enter__()"])
def test_ctrl_c_ends_a_wait_of_a_call(where, wait):
    """Goal: Ctrl-C (at the latest the second) ends a wait of a call by KeyboardInterrupt, and nothing is broken."""
    process = start_script(CTRL_C.format(wait=wait), where=where)
    interrupt(process)
    result = finish_script(process).check()
    assert "interrupted" in result.stdout and "whole" in result.stdout


def interrupt(process, times=6):
    """Wait for the script to wait, then press Ctrl-C until it says that it was interrupted."""
    wait_for_line(process, "waiting")
    for _ in range(times):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        if process.poll() is not None or "interrupted" in output_of(process, "stdout"):
            return


def test_ctrl_c_during_a_touch(where):
    """Goal: Ctrl-C during a user-mode fault is taken once the touch was served; the bytes are right."""
    process = start_script("""
provider, control = controlled()
control.close_gate(3 * BLOCK, 4 * BLOCK)
r = region(8 * BLOCK, provider, readahead_bytes=0)
try:
    say("waiting")
    threading.Timer(1.0, control.open_gate).start()
    value = LIB.touch_sum(r.address + 3 * BLOCK, 1, 1)
    time.sleep(3)
except KeyboardInterrupt:
    say("interrupted")
assert checked(r.address, 0, 8 * BLOCK) is None
say("whole")
""", where=where)
    interrupt(process, times=1)
    result = finish_script(process).check()
    assert "interrupted" in result.stdout and "whole" in result.stdout


@pytest.mark.parametrize("backing", ["anon", "shared"])
def test_ctrl_c_during_a_kernel_mode_fault(backing, needs_full_mode):
    """Goal: Ctrl-C while write(2) waits for a missing page: the call ends, served or interrupted; then all is well."""
    process = start_script("""
provider, control = controlled()
control.close_gate(3 * BLOCK, 4 * BLOCK)
r = region(8 * BLOCK, provider, readahead_bytes=0)
a = r.array()
out = os.open("out", os.O_WRONLY | os.O_CREAT)
threading.Timer(1.0, control.open_gate).start()
try:
    say("waiting")
    os.write(out, a)
    time.sleep(3)
except KeyboardInterrupt:
    say("interrupted")
assert checked(r.address, 0, 8 * BLOCK) is None
written = os.path.getsize("out")
assert open("out", "rb").read() == pattern(0, written).tobytes()
say("whole")
""", where=f"thread-{backing}")
    interrupt(process, times=1)
    result = finish_script(process).check()
    assert "interrupted" in result.stdout and "whole" in result.stdout
