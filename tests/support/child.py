"""What scripts in subprocesses begin with: common imports, a region where the test wants it, privileges dropped."""

import atexit  # noqa: F401
import ctypes
import errno  # noqa: F401
import faulthandler  # noqa: F401
import gc  # noqa: F401
import mmap  # noqa: F401
import os
import pickle  # noqa: F401
import resource  # noqa: F401
import signal  # noqa: F401
import subprocess  # noqa: F401
import sys
import tempfile  # noqa: F401
import threading
import time
import warnings

import numpy as np  # noqa: F401
import uffd
from uffd import providers  # noqa: F401

from support import leaks  # noqa: F401
from support.matrix import where_from_environment
from support.native import Control, checked, controlled, library  # noqa: F401
from support.pattern import pattern, seeded, stress_seconds  # noqa: F401
from support.stores import Store, stored  # noqa: F401

PAGE = uffd._core.PAGE_BYTES
BLOCK = 65536
PR_SET_DUMPABLE = 4
WHERE = where_from_environment()
LIB = library()


def drop_privileges():
    """Become nobody, as most users are; everything imported stays. /proc/self stays readable."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def expect_user_mode():
    """The one warning of user mode is tested on its own; elsewhere it would only be among what scripts say."""
    warnings.filterwarnings("ignore", "only user-mode faults", uffd.DegradedWarning)


def region(nbytes=None, provider=None, **options):
    return uffd.Region(nbytes, provider, **{**WHERE.options, **options})


def say(text):
    print(text, flush=True)


def wait_until(condition, what, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.002)


def touch_in_threads(array, offsets):
    """Start a daemon thread per offset that touches the byte there with the GIL released; the threads."""
    threads = [threading.Thread(target=LIB.touch_sum, args=(array.ctypes.data + offset, 1, 1), daemon=True)
               for offset in offsets]
    for thread in threads:
        thread.start()
    return threads


def wait_for_child(pid, timeout_s=10.0):
    """Exit code of a forked child (negative: the signal); a child that hangs is killed and fails the test."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"child {pid} hung for {timeout_s} s")


def in_child(function, timeout_s=10.0):
    """Run function in a forked child; its exit code: 0, 99 for an exception (printed), negative for a signal."""
    pid = os.fork()
    if pid:
        return wait_for_child(pid, timeout_s)
    code = 99
    try:
        function()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


expect_user_mode()
if os.environ.get("UFFD_TEST_DROP") == "1":
    drop_privileges()
