"""The frame round every test: a watchdog outside the process, a leak check, engines and regions to test with.

Environment: UFFD_SEED repeats a random run, UFFD_STRESS_SECONDS sets the length of races (default 5),
UFFD_STRESS_KILLS how often provider hosts are killed (1,000 at 120 seconds, fewer below),
UFFD_DEADLINE_SCALE stretches the deadlines (sanitizers), UFFD_TEST_WHERES names the deliveries and backings (all).
"""

import ctypes
import faulthandler
import gc
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def import_the_installed_package():
    """Leave the source tree out of sys.path: what is tested is the wheel."""
    tree = TESTS.parent
    if not list(tree.glob("uffd/_core*.so")):
        sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != tree]
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    if importlib.util.find_spec("uffd") is None:
        raise pytest.UsageError("uffd is not installed: pip install the wheel first")


import_the_installed_package()

pytest.register_assert_rewrite("support.redisblocks")   # a plugin that test files import from, too
from support import fallback, leaks, matrix, native, scripts, shim  # noqa: E402
from support.pattern import stress_seconds  # noqa: E402

DEFAULT_DEADLINE_S = 60.0
PR_SET_CHILD_SUBREAPER = 36


class Watchdog:
    """The process that kills this one when a test overruns: tests/watchdog.py."""

    def __init__(self, stderr_fd):
        self.process = subprocess.Popen([sys.executable, "-I", "-S", str(TESTS / "watchdog.py"), str(os.getpid())],
                                        stdin=subprocess.PIPE, stdout=stderr_fd, stderr=stderr_fd)
        self.owner = os.getpid()

    def tell(self, line):
        if os.getpid() == self.owner:
            os.write(self.process.stdin.fileno(), line.encode("utf-8", "replace") + b"\n")

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=10)


def deadline_of(item):
    """Seconds a test may take: @deadline(seconds, per_stress_second=0), else the default."""
    marker = item.get_closest_marker("deadline")
    if marker is None:
        return DEFAULT_DEADLINE_S * scripts.deadline_scale()
    per_stress_second = marker.kwargs.get("per_stress_second", 0)
    return (marker.args[0] + per_stress_second * stress_seconds()) * scripts.deadline_scale()


def pytest_configure(config):
    config.addinivalue_line("markers", "deadline(seconds, per_stress_second=0): when the watchdog kills the test run")
    config.addinivalue_line("markers", "keeps(reason): the leak check is left out, for the reason given")
    config.addinivalue_line("filterwarnings", "ignore:fallback 'eager':uffd.DegradedWarning")
    stderr_fd = os.dup(2)  # output is not captured yet
    config.uffd_stderr = os.fdopen(stderr_fd, "w")
    faulthandler.register(signal.SIGUSR1, file=config.uffd_stderr, all_threads=True)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of a test come back here and are seen
    config.uffd_watchdog = Watchdog(stderr_fd)


def pytest_unconfigure(config):
    if hasattr(config, "uffd_watchdog"):
        config.uffd_watchdog.close()
        faulthandler.unregister(signal.SIGUSR1)
        config.uffd_stderr.close()


def pytest_report_header():
    if matrix.filled_whole():
        return f"fallback: no userfaultfd; left out are {len(fallback.LEFT_OUT)} tests that can't hold (-rs says why)"


def pytest_collection_modifyitems(items):
    fallback.skip_what_cannot_hold(items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    watchdog = item.config.uffd_watchdog
    watchdog.tell(f"start {deadline_of(item)} {item.nodeid}")
    try:
        return (yield)
    finally:
        watchdog.tell("stop")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.uffd_failed = report.failed
    return report


@pytest.fixture(scope="session", autouse=True)
def warm(request):
    """Make what is made once per process before anything is counted: the default engine, each kind of region."""
    import numpy as np
    import uffd

    native.library()
    modules = [item.module for item in request.session.items]
    if any(hasattr(module, "run_script") for module in modules):
        scripts.zygote(None)
    if any(hasattr(module, "shim") for module in modules):
        scripts.zygote(shim.path())
    for where in matrix.WHERES:
        if where.unavailable() is None:
            with uffd.Region(1 << 20, uffd.providers.Zero(), **where.options) as region:
                np.add.reduce(region.array())
    yield


@pytest.fixture(autouse=True)
def no_leaks(request, warm):
    """Descriptors, threads, children and mappings are after the test what they were before it."""
    before = leaks.take()
    yield
    kept = request.node.get_closest_marker("keeps")
    if kept is None and not getattr(request.node, "uffd_failed", True):
        left = leaks.settle(before)
        gc.freeze()  # what survived stays: the next collections look at what the next tests make
        assert not left, "left over after the test:\n" + "\n".join(left)


@pytest.fixture(params=matrix.WHERES, ids=str)
def where(request):
    """Delivery x backing; skipped with the reason where the kernel or the user can't have it."""
    reason = request.param.unavailable()
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def engine():
    import uffd

    made = uffd.Engine(workers=2)
    yield made
    try:
        made.close()
    except BufferError:  # arrays in a failed test's traceback: they must not hide its error
        made.__exit__(None, None, None)


@pytest.fixture
def make(engine, where):
    """make(nbytes, provider, **options): a Region in this test's engine and place, closed at the end."""
    import uffd

    made = []

    def build(nbytes=None, provider=None, **options):
        region = uffd.Region(nbytes, provider, **{"engine": engine, **where.options, **options})
        made.append(region)
        return region

    yield build
    while made:  # emptied: pytest keeps the fixture, and with it what it refers to, beyond the leak check
        try:
            made.pop().close()
        except BufferError:  # an array outlives the test: the leak check will say so if the mapping does, too
            pass


@pytest.fixture(scope="module")
def blosc2():
    module = pytest.importorskip("blosc2", reason="Blosc2 files need the package blosc2")
    from uffd.formats import packing

    with pytest.MonkeyPatch.context() as patch:  # the library keeps threads, which look like a leak of ours
        patch.setattr(packing, "_compression_threads", lambda: 1)
        before = module.set_nthreads(1)
        yield module
        module.set_nthreads(before)


@pytest.fixture
def needs_full_mode():
    if not matrix.full_mode():
        pytest.skip("kernel accesses to missing pages need a full userfaultfd: /dev/userfaultfd or CAP_SYS_PTRACE")


@pytest.fixture(params=("full", "user"))
def mode(request):
    """A full userfaultfd, and the one that users without privilege get."""
    if request.param == "full" and not matrix.full_mode():
        pytest.skip("no full userfaultfd: this user has user mode only")
    return request.param
