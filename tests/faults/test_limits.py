"""Limits and refusals of the system: descriptors, address space, processes, seccomp, mlockall, privilege."""

import os

import pytest
from support import matrix
from support.scripts import run_script

BEGIN = """
def attempt(count=400):
    "Make regions until one is refused; what was made must work, and closing all leaves nothing."
    made, refused = [], None
    for _ in range(count):
        try:
            made.append(region(4 * BLOCK, controlled()[0], engine=engine))
        except (OSError, MemoryError, uffd.UffdError) as error:
            refused = error
            assert str(error)
            break
    for r in made:
        LIB.touch_sum(r.address, 4 * BLOCK, BLOCK)
        assert checked(r.address, 0, 4 * BLOCK) is None
    for r in made:
        r.close()
    return len(made), refused
engine = uffd.Engine(workers=1)
region(BLOCK, controlled()[0], engine=engine).close()
before = leaks.take()
"""
END = """
left = leaks.settle(before, 3.0)
assert not left, left
"""


def test_descriptors_used_up(where):
    """Goal: out of descriptors: a clear error, what was made works, nothing leaks, and it works again afterwards."""
    run_script(BEGIN + """
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
n, refused = attempt()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
assert refused is not None and getattr(refused, "errno", None) == errno.EMFILE, (n, refused)
n, refused = attempt(50)
assert n == 50 and refused is None
""" + END, where=where).check()


def test_descriptors_used_up_at_each_number(where):
    """Goal: whichever descriptor is the one too many, engine or region are refused cleanly."""
    run_script("""
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
before = leaks.take()
lowest = len(leaks.read_fds())
for limit in range(3, lowest + 16):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with uffd.Engine(workers=1) as engine, region(4 * BLOCK, controlled()[0], engine=engine) as r:
            assert checked(r.address, 0, 4 * BLOCK) is None
    except (OSError, uffd.UffdError) as error:
        assert str(error)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
left = leaks.settle(before, 3.0)
assert not left, left
""", where=where).check()


def test_address_space_used_up(where):
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer needs its terabytes of address space")
    run_script(BEGIN + """
with open("/proc/self/statm") as statm:
    now = int(statm.read().split()[0]) * PAGE
resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), resource.RLIM_INFINITY))
try:
    region(1 << 30, controlled()[0], engine=engine)
except (OSError, MemoryError) as error:
    assert str(error) or isinstance(error, MemoryError)
else:
    os._exit(5)
with region(4 * BLOCK, controlled()[0], engine=engine) as r:
    assert checked(r.address, 0, 4 * BLOCK) is None
for nbytes in range(1 << 20, 100 << 20, 9 << 20):
    try:
        region(nbytes, controlled()[0], engine=engine).close()
    except (OSError, MemoryError):
        pass
    try:
        uffd.Engine(workers=2).close()
    except (OSError, MemoryError):
        pass
""" + END, where=where).check()


def test_processes_used_up(where):
    """Goal: no thread to be had (RLIMIT_NPROC binds users without privilege): refused, nothing left over."""
    run_script("""
before = leaks.take()
resource.setrlimit(resource.RLIMIT_NPROC, (0, resource.RLIM_INFINITY if os.geteuid() == 0 else
                                           resource.getrlimit(resource.RLIMIT_NPROC)[1]))
try:
    threading.Thread(target=int).start()
    say("skip: the limit does not bind here")
    os._exit(0)
except RuntimeError:
    pass
try:
    with uffd.Engine(workers=2) as engine, region(4 * BLOCK, controlled()[0], engine=engine) as r:
        assert checked(r.address, 0, 4 * BLOCK) is None
except (OSError, RuntimeError, uffd.UffdError) as error:
    assert str(error)
    say("refused")
left = leaks.settle(before, 3.0)
assert not left, left
""", where=where, user_mode=True).check()


SECCOMP = """
import struct
def deny_userfaultfd(error):
    "A seccomp filter as container run-times install it: userfaultfd(2) answers error, in all modes."
    number = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
    program = b"".join(struct.pack("HBBI", *step) for step in [
        (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)])
    buffer = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, header, 0, 0) == 0, os.strerror(ctypes.get_errno())
"""


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS", "EACCES"])
@pytest.mark.parametrize("what", ["region", "array", "engine"])
def test_seccomp(where, error, what):
    """Goal: where every way to a userfaultfd is barred, Unavailable names the reason and a cure; no zeros, no crash."""
    make = {"region": "region(4 * BLOCK, controlled()[0])",
            "array": "uffd.from_provider(providers.Zero(), 5, 'u1', **WHERE.options)",
            "engine": "region(BLOCK, providers.Zero(), engine=uffd.Engine(workers=1))"}[what]
    run_script(SECCOMP + f"""
deny_userfaultfd(errno.{error})
try:
    {make}
except uffd.Unavailable as error:
    assert isinstance(error, OSError) and isinstance(error, uffd.UffdError)
    assert error.errno, "an OSError has its errno"
    text = str(error).lower()
    assert "userfaultfd" in text
    assert any(word in text for word in ("/dev/userfaultfd", "seccomp", "sysctl", "probe")), text
else:
    os._exit(5)
assert uffd.probe().mode == "none"
""", where=where, user_mode=True).check()


def test_seccomp_with_the_device(where):
    """Goal: the device goes where the syscall is barred (a container with --device /dev/userfaultfd)."""
    if not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        pytest.skip("no access to /dev/userfaultfd")
    run_script(SECCOMP + """
deny_userfaultfd(errno.EPERM)
with region(4 * BLOCK, controlled()[0]) as r:
    assert checked(r.address, 0, 4 * BLOCK) is None
assert uffd.probe().mode == "full"
""", where=where).check()


@pytest.mark.parametrize("flags", [2, 3, 6], ids=["MCL_FUTURE", "MCL_CURRENT|FUTURE", "MCL_FUTURE|ONFAULT"])
def test_mlockall(where, flags):
    """Goal: with mlockall(MCL_FUTURE), which populates new mappings with zeros, a region is right or refused."""
    result = run_script(f"""
libc = ctypes.CDLL(None, use_errno=True)
if libc.mlockall({flags}):
    say("skip " + os.strerror(ctypes.get_errno()))
    os._exit(0)
try:
    r = region(16 * BLOCK, controlled()[0], readahead_bytes=0)
except (uffd.UffdError, OSError, MemoryError) as error:  # MemoryError: more than this user may lock
    assert str(error)
    os._exit(0)
a = r.array()
assert checked(r.address, 0, 16 * BLOCK) is None
a[5 * BLOCK] = 1
assert np.flatnonzero(r.dirty()).tolist() == [5]
""", where=where).check()
    if result.stdout.startswith("skip"):
        pytest.skip(f"mlockall is refused here: {result.stdout[5:]}")


def test_mlockall_after_the_fact(where):
    """Goal: mlockall(MCL_CURRENT) and mlock over a region populate it by faults: right bytes, no hang."""
    result = run_script("""
r = region(16 * BLOCK, controlled()[0])
libc = ctypes.CDLL(None, use_errno=True)
answer = libc.mlock(ctypes.c_void_p(r.address), ctypes.c_size_t(16 * BLOCK))
say(f"mlock answers {answer}")
assert checked(r.address, 0, 16 * BLOCK) is None
libc.munlockall()
assert checked(r.address, 0, 16 * BLOCK) is None
""", where=where).check()
    assert "mlock answers" in result.stdout


def test_user_mode_warns_once():
    """Goal: without privilege there is one warning per process, which says what is lost."""
    run_script("""
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        uffd.Region(BLOCK, providers.Zero()).close()
assert len(caught) == 1, [str(w.message) for w in caught]
assert issubclass(caught[0].category, uffd.DegradedWarning) and "pinned" in str(caught[0].message), caught[0].message
""", user_mode=True).check()


def test_full_mode_does_not_warn(needs_full_mode):
    run_script("""
warnings.simplefilter("error")
with uffd.Region(BLOCK, providers.Zero()) as r:
    LIB.touch_sum(r.address, 1, 1)
""").check()


def test_privileges_dropped_after_the_region_was_made(where):
    """Goal: a region goes on when the process drops its privileges, as daemons do."""
    if os.geteuid() != 0:
        pytest.skip("has no privileges to drop")
    run_script("""
r = region(16 * BLOCK, controlled()[0])
LIB.touch_sum(r.address, BLOCK, PAGE)
drop_privileges()
assert checked(r.address, 0, 16 * BLOCK) is None
def child():
    assert checked(r.address, 0, 16 * BLOCK) is None
assert in_child(child) == 0
with region(4 * BLOCK, controlled()[0]) as other:
    assert checked(other.address, 0, 4 * BLOCK) is None
""", where=where).check()


def test_small_memlock_limit_does_not_matter(where):
    run_script("""
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
with region(16 * BLOCK, controlled()[0]) as r:
    assert checked(r.address, 0, 16 * BLOCK) is None
""", where=where, user_mode=True).check()


def test_matrix_reads_the_features():
    """Goal: the skip reasons of this suite come from the kernel. Method: names of features exist."""
    for where in matrix.WHERES:
        matrix.missing_feature(*where.features)
