"""Signals and SIGBUS handlers of others, row by row: who comes before us, after us, on which thread and stack."""

import shutil
import signal

import pytest
from support import matrix
from support.scripts import run_script

INLINE = [where for where in matrix.WHERES if where.delivery == "inline"]


@pytest.fixture(params=INLINE, ids=str)
def inline(request):
    reason = request.param.unavailable()
    if reason:
        pytest.skip(reason)
    return request.param


REGION = """
provider, control = controlled()
r = region(64 * BLOCK, provider, readahead_bytes=0)
a = r.array()
assert a[0] == pattern(0, 1)[0]
def works(block):
    return a[block * BLOCK] == pattern(block * BLOCK, 1)[0]
"""
# A page of a truncated file: its touch is a SIGBUS that is not ours.
FOREIGN = """
with open("short", "wb") as file:
    file.truncate(2 * PAGE)
fd = os.open("short", os.O_RDWR)
foreign = np.frombuffer(mmap.mmap(fd, 2 * PAGE), "u1")
os.ftruncate(fd, 0)
"""


# ---- handlers installed before us ----

def test_faulthandler_before_us(inline):
    """Goal: faulthandler enabled first still reports a SIGBUS that is not ours, and ours are served."""
    result = run_script("faulthandler.enable()\n" + REGION + FOREIGN + """
assert works(1)
say("served")
foreign[PAGE]
""", where=inline)
    assert result.signal == signal.SIGBUS, result.describe()
    assert "served" in result.stdout and "Fatal Python error: Bus error" in result.stderr, result.describe()
    assert "script.py" in result.stderr


def test_default_before_us(inline):
    """Goal: without any other handler a SIGBUS that is not ours kills, as it would without us."""
    result = run_script(REGION + FOREIGN + "assert works(1)\nsay('served')\nforeign[PAGE]\nsay('survived')\n",
                        where=inline)
    assert result.signal == signal.SIGBUS and "served" in result.stdout and "survived" not in result.stdout


def test_default_before_us_and_kill(inline):
    """Goal: SIGBUS sent by kill (si_code <= 0) is not taken for a fault: it ends the process."""
    result = run_script(REGION + "os.kill(os.getpid(), signal.SIGBUS)\ntime.sleep(2)\nsay('survived')\n", where=inline)
    assert result.signal == signal.SIGBUS and "survived" not in result.stdout, result.describe()


@pytest.mark.parametrize("how", [0, 1, 2], ids=["plain", "siginfo", "altstack flag"])
def test_c_handler_before_us(inline, how):
    """Goal: a C handler installed first is called, with siginfo if it asked for it, for what is not ours only."""
    result = run_script(f"assert LIB.install_handler(signal.SIGBUS, {how}) == 0\n" + REGION + """
assert works(1) and LIB.handler_count() == 0
os.kill(os.getpid(), signal.SIGBUS)
assert LIB.handler_count() == 1
assert works(2) and LIB.handler_count() == 1
""", where=inline).check()
    assert not result.stderr.strip()


@pytest.mark.parametrize("how", [1, 2], ids=["siginfo", "altstack flag"])
def test_c_handler_before_us_gets_the_address(inline, how):
    run_script(f"assert LIB.install_handler(signal.SIGBUS, {how}) == 0\n" + FOREIGN + REGION + """
assert foreign[PAGE + 5] == 0  # repaired by that handler
assert LIB.handler_count() == 1 and LIB.handler_last_address() == foreign.ctypes.data + PAGE + 5
assert works(1)
""", where=inline).check()


def test_python_handler_before_us(inline):
    """Goal: signal.signal(SIGBUS, f) before us: f is called for kill, never for a touch of ours."""
    run_script("""
calls = []
signal.signal(signal.SIGBUS, lambda number, frame: calls.append(number))
""" + REGION + """
assert works(1) and not calls
os.kill(os.getpid(), signal.SIGBUS)
wait_until(lambda: calls, "the handler was never called")
assert works(2) and len(calls) == 1
""", where=inline).check()


def test_ignored_before_us(inline):
    """Goal: SIG_IGN for SIGBUS before us: a kill is ignored still, touches are served."""
    run_script("signal.signal(signal.SIGBUS, signal.SIG_IGN)\n" + REGION + """
assert works(1)
os.kill(os.getpid(), signal.SIGBUS)
assert works(2)
""", where=inline).check()


# ---- handlers installed after us ----

NEWCOMERS = {
    "faulthandler": "faulthandler.enable()",
    "signal.signal": "calls = []\nsignal.signal(signal.SIGBUS, lambda number, frame: calls.append(number))",
    "C": "assert LIB.install_handler(signal.SIGBUS, 1) == 0",
}
SEES = {
    "region creation": "uffd.Region(PAGE, uffd.providers.Zero(), delivery='inline').close()",
    "stats": "r.stats()",
    "populate": "r.populate((0, 1))",
    "resident": "r.resident()",
    "array": "r.array()",
    "a worker, within a second": "time.sleep(1.6)",
}


@pytest.mark.parametrize("sees", SEES.values(), ids=SEES.keys())
@pytest.mark.parametrize("newcomer", NEWCOMERS.values(), ids=NEWCOMERS.keys())
def test_handler_after_us(inline, newcomer, sees):
    """Goal: who installs a handler after us is made our chain target, by the next API call or a worker's look."""
    if inline.backing == "shared" and "stats" not in sees:
        pytest.skip("the handler is the same for both backings: one row suffices")
    result = run_script(REGION + newcomer + "\nwarnings.simplefilter('ignore')\n" + sees + """
assert works(1) and works(2)
assert checked(r.address, 0, 64 * BLOCK) is None
""", where=inline).check()
    assert "Fatal" not in result.stderr


def test_handler_after_us_warns_once(inline):
    run_script(REGION + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    faulthandler.enable()
    for _ in range(3):
        r.stats()
        r.populate((0, 1))
told = [str(warning.message) for warning in caught if "SIGBUS" in str(warning.message)]
assert len(told) == 1, told
assert works(1)
""", where=inline).check()


def test_handler_after_us_is_our_target(inline):
    """Goal: the newcomer gets what is not ours."""
    result = run_script(REGION + FOREIGN + """
warnings.simplefilter("ignore")
faulthandler.enable()
r.stats()
assert works(1)
say("served")
foreign[PAGE]
""", where=inline)
    assert result.signal == signal.SIGBUS and "served" in result.stdout
    assert "Fatal Python error: Bus error" in result.stderr, result.describe()


def test_python_handler_after_us_is_called_for_kill(inline):
    run_script(REGION + NEWCOMERS["signal.signal"] + """
warnings.simplefilter("ignore")
r.stats()
os.kill(os.getpid(), signal.SIGBUS)
wait_until(lambda: calls, "the handler was never called")
assert works(1) and len(calls) == 1
""", where=inline).check()


def test_newcomers_in_turn(inline):
    """Goal: one newcomer after the other, no endless chain. Method: faulthandler off and on, a C handler between."""
    run_script(REGION + """
warnings.simplefilter("ignore")
for turn in range(1, 20):
    faulthandler.enable() if turn % 2 else LIB.install_handler(signal.SIGBUS, 1)
    r.stats()
    assert works(turn)
    if turn % 5 == 0:
        faulthandler.disable()
        r.stats()
assert checked(r.address, 0, 64 * BLOCK) is None
""", where=inline).check()


def test_thread_delivery_does_not_mind(where):
    """Goal: with thread delivery no SIGBUS handler matters. Method: newcomers, then touches without an API call."""
    if where.delivery == "inline":
        pytest.skip("about thread delivery")
    run_script(REGION + "faulthandler.enable()\nassert works(1)\n" + NEWCOMERS["signal.signal"] + "\nassert works(2)\n"
               + NEWCOMERS["C"] + "\nassert works(3)\nLIB.block_sigbus()\nassert works(4)\n", where=where).check()


def test_last_region_closed_leaves_the_chain_working(inline):
    """Goal: after the last inline region is gone, a SIGBUS goes where it went before us."""
    result = run_script("faulthandler.enable()\n" + REGION + FOREIGN + """
del a
r.close()
foreign[PAGE]
""", where=inline)
    assert result.signal == signal.SIGBUS and "Fatal Python error: Bus error" in result.stderr


# ---- threads and stacks ----

def test_thread_with_sigbus_blocked_is_killed(inline):
    """Goal: the documented limit: a thread that blocks SIGBUS dies at a touch; it neither hangs nor reads zeros."""
    result = run_script(REGION + "LIB.block_sigbus()\nworks(1)\nsay('survived')\n", where=inline)
    assert result.signal == signal.SIGBUS and "survived" not in result.stdout, result.describe()


def test_small_stacks(where):
    """Goal: 64 KiB of stack suffice for a touch, in Python threads and in threads that Python never saw."""
    run_script(REGION + """
sums = [int(pattern(block * BLOCK, 1)[0]) for block in range(64)]
assert LIB.touch_in_pthread(r.address, 20 * BLOCK, BLOCK, 65536) == sum(sums[:20])
threading.stack_size(65536)
got = []
t = threading.Thread(target=lambda: got.append(LIB.touch_sum(r.address + 20 * BLOCK, 20 * BLOCK, BLOCK)))
t.start()
t.join()
assert got == [sum(sums[20:40])]
""", where=where).check()


def test_threads_without_a_python_thread_state(where):
    run_script(REGION + """
right = sum(int(pattern(block * BLOCK, 1)[0]) for block in range(64))
for _ in range(3):
    assert LIB.touch_in_pthread(r.address, 64 * BLOCK, BLOCK, 1 << 20) == right
""", where=where).check()


def test_errno_survives_a_touch(where):
    run_script(REGION + """
for block in range(1, 64):
    assert LIB.touch_keeps_errno(r.address + block * BLOCK) == 0
""", where=where).check()


def test_touch_of_another_inline_region_in_a_fill(inline):
    """Goal: a fill that itself touches another region, in the handler, works: SIGBUS nests."""
    run_script("""
provider, control = controlled()
with uffd.Engine(workers=1) as below, uffd.Engine(workers=1) as above:
    source = region(16 * BLOCK, provider, engine=below).array()
    top = region(None, providers.Memory(source), engine=above)
    assert checked(top.address, 0, 16 * BLOCK) is None
    del source
""", where=inline).check()


# ---- storms ----

@pytest.mark.parametrize("handler", ["C", "Python"])
def test_alarm_storm(where, handler):
    """Goal: SIGALRM every 0.5 ms: right bytes, each block filled once."""
    install = {"C": "LIB.install_handler(signal.SIGALRM, 0)",
               "Python": "ticks = []\nsignal.signal(signal.SIGALRM, lambda *_: ticks.append(1))"}[handler]
    run_script(install + """
provider, control = controlled()
counts = control.count_blocks(256 * BLOCK, BLOCK)
control.delay_us = 700
r = region(256 * BLOCK, provider, readahead_bytes=0)
a = r.array()
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for block in range(256):
    start = block * BLOCK
    assert a[start + 17] == pattern(start + 17, 1)[0]
signal.setitimer(signal.ITIMER_REAL, 0)
assert checked(r.address, 0, 256 * BLOCK) is None
assert counts.tolist() == [1] * 256, counts
""", where=where).check()


def test_signal_to_the_faulting_thread(where):
    """Goal: signals sent to the very thread that waits in a fault: handlers run, the fault is served once."""
    run_script("""
LIB.install_handler(signal.SIGUSR2, 0)
provider, control = controlled()
counts = control.count_blocks(64 * BLOCK, BLOCK)
control.delay_us = 2000
r = region(64 * BLOCK, provider, readahead_bytes=0)
storm = LIB.storm_start(signal.SIGUSR2, 200)
assert LIB.check_pattern(r.address, 0, 64 * BLOCK, 0) == 0
sent = LIB.storm_stop(storm)
assert sent > 20 and LIB.handler_count() > 20
assert counts.tolist() == [1] * 64, counts
""", where=where).check()


def test_python_handler_that_touches(where):
    """Goal: a Python signal handler may touch the region, in between touches of the program."""
    run_script("""
provider, control = controlled()
r = region(256 * BLOCK, provider)
a = r.array()
rng = seeded("handler that touches")
wrong = []
def handler(number, frame):
    at = rng.randrange(256 * BLOCK)
    if a[at] != pattern(at, 1)[0]:
        wrong.append(at)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for start in range(0, 256 * BLOCK, BLOCK // 2):
    assert (a[start:start + 99] == pattern(start, 99)).all()
signal.setitimer(signal.ITIMER_REAL, 0)
assert not wrong
""", where=where).check()


def test_workers_take_no_signals(where):
    """Goal: workers block all signals but SIGBUS (a fill's own), so that no handler of the program runs on them.
    Method: /proc/self/task/*/status."""
    run_script("""
before = set(os.listdir("/proc/self/task"))
e = uffd.Engine(workers=2)
r = region(BLOCK, uffd.providers.Zero(), engine=e)
LIB.touch_sum(r.address, 1, 1)
never = [signal.SIGKILL, signal.SIGSTOP, signal.SIGBUS]
expected = sum(1 << (number - 1) for number in range(1, 32) if number not in never)
for task in set(os.listdir("/proc/self/task")) - before:
    status = dict(line.split(":", 1) for line in open(f"/proc/self/task/{task}/status") if ":" in line)
    blocked = int(status["SigBlk"], 16)
    assert blocked & expected == expected, (status["Name"], hex(blocked))
    assert "python" not in status["Name"], "workers have names of their own"
r.close()
e.close()
""", where=where).check()


# ---- debuggers ----

def test_gdb(inline):
    """Goal: the documented gdb line lets a program with inline delivery run to its end."""
    if shutil.which("gdb") is None:
        pytest.skip("gdb is not installed")
    result = run_script(REGION + "assert checked(r.address, 0, 64 * BLOCK) is None\nsay('whole')\n", 60, where=inline,
                        wrapper=["gdb", "-q", "-batch", "-ex", "handle SIGBUS nostop noprint pass", "-ex", "run",
                                 "--args"])
    if "ptrace" in result.stderr and "not permitted" in result.stderr:
        pytest.skip("ptrace is not permitted here")
    assert "whole" in result.stdout and "exited normally" in result.stdout, result.describe()
