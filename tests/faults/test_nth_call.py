"""Fail the Nth call, N = 1, 2, ... until clean, once and for ever: a clear error or right bytes, nothing left over."""

import pytest
from support import shim
from support.pattern import stress_seconds
from support.scripts import run_script

# Rounds grow with the time that the run may take: 4 in `make test`.
ROUNDS = 4 if stress_seconds() <= 10 else 40

SCRIPT = """
from support import shim
import traceback
error, calls, rounds = int(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
CLEAR = (OSError, MemoryError, uffd.UffdError, RuntimeError)
CLEAN, FIRED, RAISED = 0, 10, 11

def use_everything():
    "Make an engine and regions, fill by call and by touch, read first and write first, close."
    with uffd.Engine(workers=1) as engine:
        for provider in (controlled()[0], providers.Zero()):
            with region(8 * BLOCK, provider, engine=engine, name="weights", timeout_s=2.0, retries=1) as r:
                a = r.array()
                r.populate((0, BLOCK), timeout_s=5)
                if isinstance(provider, providers.Zero):
                    assert LIB.touch_sum(r.address, 8 * BLOCK, 512) == 0
                else:
                    wrong = checked(r.address, 0, 4 * BLOCK)
                    assert wrong is None, f"WRONG BYTES at {wrong}"
                a[5 * BLOCK] = 3
                a[BLOCK] = 3
                assert a[5 * BLOCK] == a[BLOCK] == 3, "WRONG BYTES"
                if isinstance(provider, providers.Zero):
                    assert not a[6 * BLOCK:].any(), "WRONG BYTES"
                else:
                    assert checked(r.address + 6 * BLOCK, 6 * BLOCK, 2 * BLOCK) is None, "WRONG BYTES"
                del a

def attempt(call, first, count):
    before = leaks.take()
    rule = shim.Rule(call, first, count, error)
    code = CLEAN
    try:
        use_everything()
    except CLEAR as raised:
        if not str(raised):
            raise
        code = RAISED
    fired = rule.fired
    shim.clear()
    if code == CLEAN and fired:
        code = FIRED
    left = [line for line in leaks.settle(before, 2.0) if "anon_inode" in line or "memfd" in line or "thread" in line
            or "managed" in line] if code != CLEAN else []
    if left and call not in ("UNREGISTER", "mmap", "mprotect"):
        raise AssertionError(f"left over: {left}")
    os._exit(code)

def run(call, first, count):
    # A message that can never be read, and an epoll that never works, leave nothing to answer with.
    count = 100 if count < 0 and call in ("read", "epoll_wait") else count
    err = os.open("child-stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    pid = os.fork()
    if not pid:
        os.dup2(err, 2)
        try:
            attempt(call, first, count)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)
    os.close(err)
    try:
        code = wait_for_child(pid, 6)
    except TimeoutError:
        return "hang"
    said = open("child-stderr").read()
    if code in (CLEAN, FIRED, RAISED):
        return code
    if code == -signal.SIGBUS and "uffd" in said:
        return FIRED
    return f"exit {code}: {said[-1500:]}"

bad = []
for call in calls:
    for count in (1, -1):
        for first in range(1, rounds + 1 if count == 1 else 2):
            verdict = run(call, first, count)
            if verdict == CLEAN:
                break
            if verdict not in (FIRED, RAISED):
                bad.append(f"{call} number {first}, {'once' if count == 1 else 'for ever'}: {verdict}")
say("\\n".join(bad))
sys.exit(1 if bad else 0)
"""

GROUPS = {
    "opening": "device,userfaultfd,NEW,API,REGISTER,memfd_create,ftruncate",
    "memory": "mmap,mprotect",
    "threads and descriptors": "eventfd,epoll_create1,epoll_ctl,pthread_create",
    "filling": "COPY,CONTINUE,ZEROPAGE,WRITEPROTECT",
    "waking and ending": "WAKE,POISON,UNREGISTER",
    "waiting": "read,epoll_wait",
}
ERRORS = {"opening": 22, "memory": 12, "threads and descriptors": 11, "filling": 22, "waking and ending": 22,
          "waiting": 5}


@pytest.mark.deadline(120, per_stress_second=20)
@pytest.mark.parametrize("group", GROUPS)
def test_nth_call(where, group):
    """Goal: whichever call fails: an error that says something, SIGBUS with a message, or right bytes."""
    rounds = 2 if group in ("waking and ending", "waiting") and ROUNDS == 4 else ROUNDS
    run_script(SCRIPT, 110 + 18 * stress_seconds(), where=where, preload=shim.path(),
               argv=[ERRORS[group], GROUPS[group], rounds]).check()


@pytest.mark.parametrize("group, error", [("filling", 12), ("threads and descriptors", 24), ("waiting", 4)])
def test_other_errors(where, group, error):
    """Goal: ENOMEM from the kernel's page calls, EMFILE for descriptors, EINTR while waiting."""
    run_script(SCRIPT, 55, where=where, preload=shim.path(), argv=[error, GROUPS[group], 1]).check()
