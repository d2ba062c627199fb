"""What the kernel may answer and seldom does: EAGAIN, EEXIST, parts of a copy, lacking features, short reads."""

import errno

import pytest
from support import shim
from support.scripts import run_everywhere, run_script

BEGIN = """
from support import shim
"""
PLACING = ("COPY", "CONTINUE")


def run(code, where, **options):
    return run_script(BEGIN + code, where=where, preload=shim.path(), **options)


@pytest.mark.parametrize("pages", [0, 1, 2, 7, 15])
def test_partial_placement(where, pages):
    """Goal: a copy that stops after some pages is gone on with, byte for byte."""
    run(f"""
rules = [shim.Rule(call, 1, 40, 0, shim.PARTIAL, {pages}) for call in {PLACING}]
provider, control = controlled()
r = region(32 * BLOCK, provider)
assert checked(r.address, 0, 16 * BLOCK) is None
r.populate()
assert checked(r.address, 0, 32 * BLOCK) is None
assert sum(rule.fired for rule in rules) > 0
""", where).check()


def test_partial_at_every_page_boundary(where):
    run(f"""
e = uffd.Engine(workers=1)
for pages in range(1, 17):
    shim.clear()
    [shim.Rule(call, 1, -1, 0, shim.PARTIAL, pages) for call in {PLACING}]
    provider, control = controlled()
    with region(3 * BLOCK + 77, provider, engine=e) as r:
        assert checked(r.address, 0, 3 * BLOCK + 77) is None, pages
    with region(3 * BLOCK, provider, engine=e) as r:
        a = r.array()
        a[BLOCK] = 1
        assert a[BLOCK] == 1 and checked(r.address + BLOCK + 1, BLOCK + 1, 2 * BLOCK - 1) is None
        del a
""", where).check()


@pytest.mark.parametrize("times", [1, 3, 50])
@pytest.mark.parametrize("call", ["COPY", "CONTINUE", "ZEROPAGE", "WRITEPROTECT"])
def test_eagain_then_success(where, call, times):
    """Goal: EAGAIN k times, then the right bytes."""
    run(f"""
rule = shim.Rule("{call}", 1, {times}, errno.EAGAIN)
provider, control = controlled()
for provider, right in ((provider, pattern(0, 4 * BLOCK)), (providers.Zero(), np.zeros(4 * BLOCK, "u1"))):
    r = region(4 * BLOCK, provider, timeout_s=10)
    a = r.array()
    assert (a == right).all()
    a[BLOCK] = 77
    assert a[BLOCK] == 77
    del a
    r.close()
""", where).check()


def test_eagain_for_ever():
    """Goal: EAGAIN that never ends is bounded by timeout_s, and is not answered by spinning."""
    results = run_everywhere(BEGIN + f"""
rules = [shim.Rule(call, 1, -1, errno.EAGAIN) for call in {PLACING}]
provider, control = controlled()
r = region(4 * BLOCK, provider, name="weights", timeout_s=1.0, retries=1)
began = time.process_time()
try:
    r.populate(timeout_s=8)
except (uffd.ProviderError, TimeoutError) as error:
    say(f"raised {{error}}")
assert sum(rule.calls for rule in rules) < 200000
say(f"cpu {{time.process_time() - began:.2f}}")
os._exit(0)
""", preload=shim.path())
    for result in results:
        assert "raised" in result.check().stdout
        assert float(result.stdout.split("cpu ")[1]) < 1.5, "spins"


def test_eexist_wakes_the_waiter(where):
    """Goal: a block that another one filled meanwhile (EEXIST, which wakes nobody) lets its waiters go on, and a write
    to it is noticed: it counts as dirty at the latest then."""
    run(f"""
rules = [shim.Rule(call, 1, 1000, 0, shim.EXISTED) for call in {PLACING}]
provider, control = controlled()
r = region(16 * BLOCK, provider, readahead_bytes=0)
a = r.array()
assert LIB.touch_sum(r.address + BLOCK, 1, 1) == pattern(BLOCK, 1)[0]
threads = touch_in_threads(a, [n * BLOCK for n in range(2, 10)])
for thread in threads:
    thread.join(5)
    assert not thread.is_alive(), "the waiter was not woken"
assert checked(r.address, 0, 16 * BLOCK) is None
a[3 * BLOCK] = 1
assert r.dirty()[3] and a[3 * BLOCK] == 1
assert checked(r.address + 4 * BLOCK, 4 * BLOCK, 12 * BLOCK) is None
assert sum(rule.fired for rule in rules) > 0
""", where).check()


@pytest.mark.parametrize("error", [errno.ENOENT, errno.EINVAL, errno.EFAULT, errno.ENOSPC, errno.ESRCH])
def test_placement_fails_for_ever(where, error):
    """Goal: a kernel that refuses a block's page is an error of that block, never zeros; others live after it."""
    result = run(f"""
rules = [shim.Rule(call, 1, -1, {error}) for call in {PLACING}]
provider, control = controlled()
r = region(8 * BLOCK, provider, name="weights", timeout_s=2.0, retries=1, readahead_bytes=0)
try:
    r.populate((3 * BLOCK, 4 * BLOCK), timeout_s=8)
except (uffd.UffdError, OSError) as error:
    say(f"raised {{type(error).__name__}} {{error}}")
shim.clear()
assert checked(r.address + 4 * BLOCK, 4 * BLOCK, 4 * BLOCK) is None
r.populate((3 * BLOCK, 4 * BLOCK), timeout_s=8)
assert checked(r.address, 0, 8 * BLOCK) is None
""", where).check()
    assert "raised" in result.stdout


FEATURES = ["PAGEFAULT_FLAG_WP", "EVENT_FORK", "THREAD_ID", "SIGBUS", "MISSING_SHMEM", "MINOR_SHMEM", "EXACT_ADDRESS",
            "WP_HUGETLBFS_SHMEM", "WP_UNPOPULATED", "POISON", "WP_ASYNC", "MOVE"]


@pytest.mark.parametrize("lacking", [*FEATURES, "everything after 5.7", "everything after 4.11"])
def test_older_kernels(where, lacking):
    """Goal: on a kernel without a feature a region works by another way, or is refused by a message that names it."""
    names = {"everything after 5.7": FEATURES[5:], "everything after 4.11": FEATURES}.get(lacking, [lacking])
    result = run(f"""
bits = 0
for name in {names}:
    bits |= next(bit for key, bit in uffd._core.FEATURES.items() if key == name or key.endswith(name)
                 or name.endswith(key))
shim.Rule("API", 1, -1, 0, shim.MASK, bits)
provider, control = controlled()
try:
    r = region(8 * BLOCK, provider, name="weights", retries=0, readahead_bytes=0)
except uffd.Unavailable as error:
    assert any(name.split("_")[-1].lower() in str(error).lower() for name in {names}), error
    say("refused")
    os._exit(0)
a = r.array()
assert checked(r.address, 0, 4 * BLOCK) is None
a[BLOCK] = a[6 * BLOCK] = 1
right = pattern(0, 8 * BLOCK).copy()
right[BLOCK] = right[6 * BLOCK] = 1
assert (a == right).all()
def child():
    assert (a == right).all()
assert in_child(child) == 0
control.fail(0, 8 * BLOCK, errno.EIO)
failing = region(8 * BLOCK, provider, name="weights", retries=0)
def touch():
    LIB.touch_sum(failing.address, 1, 1)
code = in_child(touch)
assert code in (-signal.SIGBUS, -signal.SIGSEGV), code
""", where).check()
    if "refused" not in result.stdout:
        assert "weights" in result.stderr, "a block that can't be filled must die with a message on old kernels, too"


@pytest.mark.parametrize("piece", [1, 511, 5000])
def test_short_preads(where, piece):
    """Goal: a read that gives less than it was asked for is gone on with, not padded."""
    run(f"""
with open("data", "wb") as file:
    file.write(pattern(0, 2 * BLOCK + 99).tobytes())
rule = shim.Rule("pread", 1, -1, 0, shim.SHORT, {piece})
r = region(None, providers.File("data"), block_bytes=PAGE, timeout_s=20)
assert checked(r.address, 0, {'2 * PAGE' if piece == 1 else '2 * BLOCK + 99'}) is None
assert rule.fired > 0, "File does not read by pread"
""", where).check()


@pytest.mark.parametrize("error, times", [(errno.EINTR, 20), (errno.EIO, 2), (errno.EAGAIN, 2)])
def test_preads_that_recover(where, error, times):
    run(f"""
with open("data", "wb") as file:
    file.write(pattern(0, 4 * BLOCK).tobytes())
rule = shim.Rule("pread", 2, {times}, {error})
r = region(None, providers.File("data"), retries=3, readahead_bytes=0)
assert checked(r.address, 0, 4 * BLOCK) is None
assert rule.fired == {times}
""", where).check()


def test_preads_that_do_not(where):
    run("""
with open("data", "wb") as file:
    file.write(pattern(0, 4 * BLOCK).tobytes())
rule = shim.Rule("pread", 1, -1, errno.EIO)
r = region(None, providers.File("data"), retries=2)
try:
    r.populate()
except uffd.ProviderError as error:
    assert error.errno == errno.EIO and error.tries == 3 and "data" in str(error), error
else:
    os._exit(5)
shim.clear()
r.populate()
assert checked(r.address, 0, 4 * BLOCK) is None
""", where).check()


def test_message_read_once_more(where):
    """Goal: a read of the userfaultfd that fails now and then loses no fault."""
    if where.delivery == "inline":
        pytest.skip("no messages with inline delivery")
    run("""
rule = shim.Rule("read", 2, 3, errno.EIO)
provider, control = controlled()
r = region(64 * BLOCK, provider, readahead_bytes=0)
assert checked(r.address, 0, 64 * BLOCK) is None
""", where).check()
