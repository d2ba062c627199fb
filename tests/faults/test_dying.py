"""Workers and processes that die or are looked at in mid-fault: an error or a signal, in time; never zeros."""

import os
import shutil
import signal
import subprocess

import pytest
from support.scripts import end_group, finish_script, run_script, start_script, wait_for_line

WAITING = """
provider, control = controlled()
control.close_gate(0, 4 * BLOCK)
r = region(64 * BLOCK, provider, readahead_bytes=0)
a = r.array()
for block in (0, 2):
    assert LIB.touch_detached(r.address + block * BLOCK, 1, 1) == 0
wait_until(lambda: control.gate_waiters >= 1, "no fill under way")
"""


def test_fill_that_aborts(where):
    """Goal: a fill that aborts takes the process along by SIGABRT; it does not leave it waiting."""
    result = run_script("""
provider, control = controlled()
control.end_start, control.end_stop, control.end_how = 0, BLOCK, 1
r = region(8 * BLOCK, provider, readahead_bytes=0)
LIB.touch_sum(r.address, 1, 1)
say("survived")
""", 10, where=where)
    assert result.signal == signal.SIGABRT and "survived" not in result.stdout, result.describe()


@pytest.mark.parametrize("backing", ["anon", "shared"])
@pytest.mark.parametrize("wait", ["populate", "touch"])
def test_fill_that_ends_its_worker(backing, wait):
    """Goal: a worker that is gone (its fill called pthread_exit): the waiter gets an error or SIGBUS within timeout_s,
    and other blocks are served by who took its place."""
    code = {"populate": """
try:
    r.populate((0, BLOCK), timeout_s=8)
except (uffd.ProviderError, TimeoutError) as error:
    say(f"raised {error}")
assert checked(r.address + BLOCK, BLOCK, 7 * BLOCK) is None
""", "touch": "assert LIB.touch_sum(r.address, 1, 1) == 'never'\n"}[wait]
    result = run_script("""
provider, control = controlled()
control.end_start, control.end_stop, control.end_how = 0, BLOCK, 2
engine = uffd.Engine(workers=1)
r = region(8 * BLOCK, provider, engine=engine, name="weights", readahead_bytes=0, timeout_s=1.0, retries=0)
""" + code + "os._exit(0)\n", 15, where=f"thread-{backing}")
    if wait == "touch":
        assert result.signal == signal.SIGBUS and "weights" in result.stderr, result.describe()
    else:
        assert "raised" in result.check().stdout


@pytest.mark.parametrize("what", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL, signal.SIGQUIT], ids=lambda s: s.name)
def test_killed_in_mid_fault(where, what):
    """Goal: no signal that kills is held up by touches that wait, or by a core dump of missing pages."""
    process = start_script("resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, resource.getrlimit("
                           "resource.RLIMIT_CORE)[1])) if resource.getrlimit(resource.RLIMIT_CORE)[1] else None\n"
                           + WAITING + "say('ready')\ntime.sleep(30)\n", where=where)
    wait_for_line(process, "ready")
    process.send_signal(what)
    assert finish_script(process, 5).signal == what


@pytest.mark.parametrize("tool", ["gdb", "gcore"])
def test_debuggers_in_mid_fault(where, tool):
    """Goal: a debugger or a core dump taken while touches wait ends in time and leaves the process well."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    process = start_script("ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # let a debugger attach\n" + WAITING + """
say("ready")
wait_until(lambda: os.path.exists("looked"), "nobody looked", 60)
control.open_gate()
assert checked(r.address, 0, 64 * BLOCK) is None
say("whole")
""", where=where)
    wait_for_line(process, "ready")
    command = {"gdb": ["gdb", "-q", "-batch", "-nx", "-p", str(process.pid), "-ex", "thread apply all bt 3"],
               "gcore": ["gcore", "-o", str(process.directory / "core"), str(process.pid)]}[tool]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment,
                              stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        end_group(process)
        pytest.fail(f"{tool} hangs")
    if "ptrace" in done.stderr and "not permitted" in done.stderr:
        end_group(process)
        pytest.skip("ptrace is not permitted here")
    (process.directory / "looked").touch()
    result = finish_script(process).check()
    assert "whole" in result.stdout


@pytest.mark.deadline(90)
def test_process_vm_readv(where, mode):
    """Goal: another process that reads a missing page through process_vm_readv gets the right bytes, a short count or
    EFAULT; never zeros."""
    run_script("""
provider, control = controlled()
r = region(8 * BLOCK, provider, readahead_bytes=0)
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(0x59616D61, -1, 0, 0, 0)
me = os.getpid()
class IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]
def child():
    buffer = ctypes.create_string_buffer(BLOCK)
    local, remote = IoVec(ctypes.addressof(buffer), BLOCK), IoVec(r.address + 5 * BLOCK, BLOCK)
    got = libc.process_vm_readv(me, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    assert got <= 0 or buffer.raw[:got] == pattern(5 * BLOCK, got).tobytes(), got
assert in_child(child) == 0
assert checked(r.address, 0, 8 * BLOCK) is None
""", where=where, user_mode=mode == "user").check()
