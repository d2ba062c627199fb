"""Ends of a process in mid-fault: gone within 2 s, nothing left over."""

import os
import signal
import time

import pytest
from support.scripts import finish_script, output_of, run_script, start_script, wait_for_line

BOUND_S = 2.0
# Two touches that wait in fills which never end by themselves, in threads without the GIL.
MID_FAULT = """
provider, control = controlled()
control.close_gate(0, 4 * BLOCK)
r = region(64 * BLOCK, provider, readahead_bytes=0)
a = r.array()
assert LIB.touch_sum(r.address + 9 * BLOCK, 1, 1) == pattern(9 * BLOCK, 1)[0]
for block in (0, 2):
    assert LIB.touch_detached(r.address + block * BLOCK, 1, 1) == 0
wait_until(lambda: control.gate_waiters >= 1, "no fill under way")
time.sleep(0.05)
def leave():
    say(f"leaving at {time.monotonic()}")
"""


def assert_gone_in_time(result):
    left_at = float(result.stdout.split("leaving at ")[1].split()[0])
    assert result.ended_at - left_at < BOUND_S, f"{result.ended_at - left_at:.1f} s\n{result.describe()}"


def shared_memory():
    """Names of ours: other programs come and go there."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return {name for name in names if "uffd" in name}


@pytest.mark.parametrize("how, code", [
    ("sys.exit(3)", 3), ("os._exit(4)", 4), ("pass", 0), ("raise SystemExit(5)", 5), ("raise KeyError('mine')", 1),
    ("os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(5)", -signal.SIGTERM),
    ("os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(5)", -signal.SIGKILL),
    ("os.abort()", -signal.SIGABRT),
], ids=["sys.exit", "os._exit", "end of script", "SystemExit", "exception", "SIGTERM", "SIGKILL", "abort"])
def test_exit_in_mid_fault(where, how, code):
    """Goal: each way to end with touches that wait: the promised exit code, in time, nothing left in /dev/shm."""
    before = shared_memory()
    result = run_script(MID_FAULT + "leave()\n" + how + "\n", where=where).check(code)
    assert_gone_in_time(result)
    assert shared_memory() <= before


def test_sigterm_from_outside(where):
    process = start_script(MID_FAULT + "leave()\ntime.sleep(15)\n", where=where)
    wait_for_line(process, "leaving")
    asked_at = time.monotonic()
    process.terminate()
    result = finish_script(process).check(-signal.SIGTERM)
    assert result.ended_at - asked_at < BOUND_S


def test_sigterm_handler_that_exits(where):
    process = start_script("signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))\n" + MID_FAULT + """
say("ready")
try:
    time.sleep(15)
finally:
    leave()
""", where=where)
    wait_for_line(process, "ready")
    process.terminate()
    assert_gone_in_time(finish_script(process).check(7))


def test_touch_in_atexit(where):
    """Goal: regions are served until the program's own atexit handlers are done, the first registered included."""
    result = run_script("""
r = a = None
def last():
    assert a[5 * BLOCK] == pattern(5 * BLOCK, 1)[0]
    assert checked(r.address, 0, 64 * BLOCK) is None
    say("served in atexit")
atexit.register(last)
provider, control = controlled()
r = region(64 * BLOCK, provider)
a = r.array()
def first():
    assert a[BLOCK] == pattern(BLOCK, 1)[0]
    say("served first")
atexit.register(first)
""", where=where).check()
    assert "served in atexit" in result.stdout and "served first" in result.stdout


def test_touch_in_a_finaliser(where):
    """Goal: a touch from __del__ of a global at shutdown sees right bytes, or the process ends; never a hang."""
    result = run_script("""
provider, control = controlled()
r = region(64 * BLOCK, provider)
a = r.array()
class Last:
    def __init__(self, array):
        self.array = array
        self.right = int(pattern(7 * BLOCK, 1)[0])
    def __del__(self):
        os.write(1, b"right" if int(self.array[7 * BLOCK]) == self.right else b"wrong")
keep = Last(a)
""", where=where)
    assert result.returncode in (0, -signal.SIGBUS), result.describe()
    assert "wrong" not in result.stdout, result.describe()


def test_daemon_threads_touch_while_exiting(where):
    """Goal: daemon threads that go on touching during the interpreter's end do no harm."""
    result = run_script("""
provider, control = controlled()
control.delay_us = 200
r = region(4000 * BLOCK, provider, readahead_bytes=0)
a = r.array()
def touch():
    for start in range(0, 4000 * BLOCK, BLOCK):
        if a[start] != pattern(start, 1)[0]:
            os._exit(9)
for _ in range(3):
    threading.Thread(target=touch, daemon=True).start()
time.sleep(0.1)
print(f"leaving at {time.monotonic()}", flush=True)
""", where=where).check()
    assert_gone_in_time(result)


def test_everything_left_open(where):
    """Goal: a program that closes nothing ends well, and says nothing."""
    result = run_script("""
regions = [region(4 * BLOCK, controlled()[0]) for _ in range(20)]
arrays = [r.array() for r in regions]
engine = uffd.Engine(workers=1)
other = region(4 * BLOCK, controlled()[0], engine=engine).array()
prefetches = [r.prefetch() for r in regions]
assert other[BLOCK] == pattern(BLOCK, 1)[0]
""", where=where).check()
    assert result.stderr == ""


def test_exit_during_prefetch(where):
    result = run_script("""
provider, control = controlled()
control.delay_us = 5000
r = region(4000 * BLOCK, provider)
r.prefetch()
time.sleep(0.05)
print(f"leaving at {time.monotonic()}", flush=True)
""", where=where).check()
    assert_gone_in_time(result)


def test_exit_of_a_forked_child_in_mid_fault(where):
    run_script(MID_FAULT + """
for way in (lambda: os._exit(0), lambda: sys.exit(0)):
    pid = os.fork()
    if not pid:
        LIB.touch_detached(r.address + BLOCK, 1, 1)
        time.sleep(0.1)
        way()
    assert wait_for_child(pid) == 0
os._exit(0)
""", where=where).check()


def test_exec_in_mid_fault(where):
    """Goal: execve while touches wait replaces the process cleanly."""
    process = start_script(MID_FAULT + "leave()\nos.execv('/bin/echo', ['echo', 'replaced'])\n", where=where)
    result = finish_script(process).check()
    assert "replaced" in output_of(process, "stdout")
    assert_gone_in_time(result)
