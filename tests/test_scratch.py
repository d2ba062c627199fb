"""Scratch(compress=): cold private memory in a compressed spill file. What comes back, what it takes on the disk, and
what happens when the file, the disk or the codec fails."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import uffd
from support import leaks, matrix, shim
from support.blocks import PAGE, wait_until
from support.pattern import pattern
from support.scripts import deadline_scale, environment_for, run_script
from uffd import providers

pytestmark = pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing leaves memory")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def packs(make, nbytes, **options):
    return make(nbytes, providers.Scratch(compress="zstd"), readahead_bytes=0, **options)


def spill_files(folder):
    """Descriptors of the files without a name in the folder."""
    return [int(fd) for fd, target in leaks.read_fds().items() if target.startswith(f"{folder}/")]


def disk_bytes(folder):
    return sum(os.fstat(fd).st_blocks * 512 for fd in spill_files(folder))


def soft(nbytes, seed=0):
    """Bytes that get smaller by a half or more, and tell where they belong."""
    return (np.arange(seed, seed + -(-nbytes // 4), dtype="<u4") // 5).view("u1")[:nbytes]


@pytest.mark.parametrize("block_bytes", [PAGE, 2 * PAGE, 16 * PAGE, 256 * PAGE])
def test_what_was_written_comes_back(make, engine, folder, block_bytes):
    """Goal: of four times the budget each byte comes back, the odd end and what does not get smaller too; the file
    takes what stats() say, far less than was written, unless a block is a page."""
    engine.budget_bytes = (12 if block_bytes > 100 * PAGE else 36) * block_bytes
    nbytes = 4 * engine.budget_bytes - block_bytes - 1003
    region = packs(make, nbytes, block_bytes=block_bytes)
    array, right = region.array(), soft(nbytes).copy()
    hard = slice(5 * block_bytes, 9 * block_bytes)
    right[hard] = pattern(0, 4 * block_bytes)
    for start in range(0, nbytes, block_bytes):
        array[start:start + block_bytes] = right[start:start + block_bytes]
    wait_until(lambda: region.evict() == 0 and not region.resident().any(), "they stay")   # read-ahead may come late
    stats = region.stats()
    assert stats.bytes_written == nbytes and stats.written_back == len(region.dirty())
    assert abs(disk_bytes(folder) - stats.bytes_stored) <= 2 * PAGE
    assert stats.bytes_stored == nbytes if block_bytes == PAGE else stats.bytes_stored < 0.7 * nbytes
    for turn in range(2):
        for start in range(0, nbytes, block_bytes):
            np.testing.assert_array_equal(array[start:start + block_bytes], right[start:start + block_bytes])
        assert engine.resident_bytes <= engine.budget_bytes and turn < 2
    del array


def test_what_does_not_get_smaller_is_stored_as_it_is(make, folder):
    region = packs(make, 64 * 4 * PAGE, block_bytes=4 * PAGE)
    array = region.array()
    array[:] = pattern(3, len(array))
    region.evict()
    assert region.stats().bytes_stored == len(array) == disk_bytes(folder)
    np.testing.assert_array_equal(array, pattern(3, len(array)))
    del array


def test_a_block_that_changes_gives_room_back_and_takes_it_again(make, folder):
    """Goal: a block's image is replaced by a smaller or larger one, and the file has no more than the last one."""
    region = packs(make, 16 * PAGE, block_bytes=16 * PAGE)
    array = region.array()
    taken = []
    for turn in range(6):
        array[:] = turn
        array[:(0, 9 * PAGE, len(array))[turn % 3]] = pattern(turn, (0, 9 * PAGE, len(array))[turn % 3])
        right = array.copy()
        region.evict()
        np.testing.assert_array_equal(array, right)
        taken.append(disk_bytes(folder) // PAGE)
        array[:] = 7                        # (what was not tried to be compressed after a failure, is now)
        region.evict()
        array[:] = 7
        region.evict()
    assert taken == [1, 10, 16] * 2
    region.discard()
    assert not array.any()
    del array


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_what_is_discarded_is_given_back(make, folder, compress):
    """Goal: blocks that were spilled and are discarded take no room in the file any more, whether they are in memory
    or not, and read zeros; the others are as they were."""
    region = make(32 * 4 * PAGE, providers.Scratch(compress), block_bytes=4 * PAGE, readahead_bytes=0)
    array = region.array("u1", (32, 4 * PAGE))
    array[:] = pattern(0, array.size).reshape(array.shape)
    region.evict()
    assert disk_bytes(folder) == array.size
    assert array[5, 0] == pattern(5 * 4 * PAGE, 1)[0]        # back in memory
    region.discard((0, 16 * 4 * PAGE))
    assert disk_bytes(folder) == array.size // 2
    assert not array[:16].any()
    np.testing.assert_array_equal(array[16:].reshape(-1), pattern(array.size // 2, array.size // 2))
    array[3] = 7
    region.evict()
    assert (array[3] == 7).all() and not array[:3].any()
    del array


def test_an_image_of_memory_reads_it(make, where, engine, tmp_path):
    """Goal: who reads blocks that are not in memory, past the region, gets what was packed, too."""
    if where.delivery == "inline":
        pytest.skip("an image is not taken of a region with inline delivery")
    if where.options["backing"] == "shared" and not matrix.full_mode():
        pytest.skip("an image of shared memory needs a full userfaultfd")
    engine.budget_bytes = 32 * 4 * PAGE
    region = packs(make, 128 * 4 * PAGE, block_bytes=4 * PAGE)
    array = region.array()
    array[:] = soft(len(array), 99)
    region.evict()
    uffd.snapshot.take({"a": array}, tmp_path / "image").wait()
    np.testing.assert_array_equal(uffd.snapshot.load(tmp_path / "image", lazy=False)["a"], soft(len(array), 99))
    assert region.stats().bytes_stored < region.stats().bytes_written
    del array


FEW = """
from support import shim
os.environ["TMPDIR"] = os.getcwd()
SIZE = 4 * PAGE
engine = uffd.Engine(workers=1, budget_bytes=16 * SIZE)
r = region(64 * SIZE, providers.Scratch(compress="zstd"), name="scratch", engine=engine, block_bytes=SIZE, retries=0,
           timeout_s=1.5, readahead_bytes=0)
a = r.array("<u4", (64, SIZE // 4))
def right(n):
    return np.arange(n, n + SIZE // 4, dtype="<u4") // 3
def spill():
    return [int(fd) for fd, to in leaks.read_fds().items() if to.startswith(os.getcwd()) and "deleted" in to][0]
"""


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_takes_nothing(where, error):
    """Goal: where a packed block can't be written, evict raises and all bytes stay, in memory and of older images; it
    goes on when there is room."""
    run_script(FEW + """
for n in range(8):
    a[n] = right(n)
r.evict()
for n in range(4):
    a[n] = right(100 + n)
rule = shim.Rule("pwrite", 1, -1, getattr(errno, sys.argv[1]))
try:
    r.evict()
    raise SystemExit("nothing raised")
except uffd.ProviderError as error:
    assert error.errno == getattr(errno, sys.argv[1]), error
assert rule.fired and r.dirty()[:4].all()
for n in range(8):
    assert np.array_equal(a[n], right(100 + n if n < 4 else n)), n
shim.clear()
for n in range(64):
    a[n] = right(n + 7)
for n in range(64):
    assert np.array_equal(a[n], right(n + 7)), n
""", 30, where=where, argv=[error], preload=shim.path()).check()


def test_writes_and_reads_that_are_short(where):
    """Goal: a file that takes and gives few bytes at a time takes and gives all of them."""
    run_script(FEW + """
rules = [shim.Rule(call, 1, -1, 0, shim.SHORT, 1000) for call in ("pwrite", "pread")]
for n in range(64):
    a[n] = right(n)
for n in range(64):
    assert np.array_equal(a[n], right(n)), n
assert all(rule.fired for rule in rules) and r.stats().bytes_stored < r.stats().bytes_written
""", 30, where=where, preload=shim.path()).check()


@pytest.mark.parametrize("damage", ["bit", "zeros", "another", "short", "EIO"])
def test_a_file_that_lost_bytes(where, damage):
    """Goal: an image that is not what was written (a bit, zeros, another block's, cut off) is an error, never data; the
    touch is SIGBUS; other blocks are not harmed."""
    number = {"short": errno.ENODATA, "EIO": errno.EIO}.get(damage, errno.EBADMSG)
    result = run_script(FEW + f"""
for n in range(40):
    a[n] = right(n)
r.evict()
at = 39 * SIZE
image = os.pread(spill(), PAGE, at)
damage = {damage!r}
if damage == "bit":
    os.pwrite(spill(), bytes([image[100] ^ 4]), at + 100)
elif damage == "zeros":
    os.pwrite(spill(), bytes(PAGE), at)
elif damage == "another":
    os.pwrite(spill(), os.pread(spill(), 40, 38 * SIZE), at)
elif damage == "short":
    os.ftruncate(spill(), at + 20)
else:
    shim.Rule("pread", 1, -1, errno.EIO)
try:
    r.populate((at, at + PAGE))
    raise SystemExit("nothing raised")
except uffd.ProviderError as error:
    assert error.errno == {int(number)}, error
    say(f"raised: {{error}}")
if damage == "EIO":
    shim.clear()
    assert np.array_equal(a[39], right(39))
    r.evict()
for n in range(39):
    assert np.array_equal(a[n], right(n)), n
if damage == "EIO":
    shim.Rule("pread", 1, -1, errno.EIO)
say("touch")
say(f"read {{a[39, 5]}}")
""", 30, where=where, preload=shim.path())
    assert result.signal == signal.SIGBUS, result.describe()
    assert "touch" in result.stdout and "read" not in result.stdout, result.describe()
    assert damage not in ("bit", "zeros", "another") or "damaged" in result.stdout, result.describe()


def test_children_have_their_own(where):
    """Goal: what was packed before a fork is the child's, too; what either side writes afterwards is its own. Threads
    of the parent read and write packed blocks while it forks."""
    run_script(FEW + """
model = np.zeros((64, SIZE // 4), "<u4")
stop = threading.Event()
def work(value, rows):
    for n in rows:
        model[n] = right(value * 100 + n)
        a[n] = model[n]
    for n in rows:
        assert np.array_equal(a[n], model[n]), (value, n)
def background():
    value = 50
    while not stop.is_set():
        work(value, range(32, 64))
        value += 1
work(0, range(64))
thread = threading.Thread(target=background)
thread.start()
def generation(depth):
    for turn in range(2):
        work(10 * depth + turn + 1, range(32))
    if depth < 3:
        assert in_child(lambda: generation(depth + 1), 40) == 0
        work(10 * depth + 5, range(32))
generation(0)
stop.set()
thread.join()
for n in range(64):
    assert np.array_equal(a[n], model[n]), n
assert r.stats().bytes_stored < r.stats().bytes_written
""", 60, where=where).check()


def test_a_child_keeps_what_its_parent_discards(where):
    """Goal: both read one spill file; what the parent gives up is the child's all the same."""
    run_script(FEW + """
for n in range(32):
    a[n] = right(n)
r.evict()
go = os.pipe()
pid = os.fork()
if not pid:
    os.read(go[0], 1)
    os._exit(0 if all(np.array_equal(a[n], right(n)) for n in range(32)) else 1)
r.discard((0, 16 * SIZE))
for n in range(16):
    assert not a[n].any()
    a[n] = right(7)
r.evict()
os.write(go[1], b"x")
assert wait_for_child(pid, 20) == 0
r.discard((0, 8 * SIZE))
for n in range(32):
    assert np.array_equal(a[n], right(7 if n < 16 else n)) if n >= 8 else not a[n].any(), n
""", 40, where=where).check()


def test_many_readers_at_once(make, engine):
    """Goal: more threads than decoders read packed blocks; each gets its own."""
    engine.budget_bytes = 64 * 4 * PAGE
    region = packs(make, 256 * 4 * PAGE, block_bytes=4 * PAGE)
    array = region.array("u1", (256, 4 * PAGE))
    for n in range(256):
        array[n] = soft(4 * PAGE, n)
    run = np.random.default_rng(2).integers(0, 256, (24, 40))
    wrong = []

    def read(numbers):
        wrong.extend(n for n in numbers.tolist() if not np.array_equal(array[n], soft(4 * PAGE, n)))

    threads = [threading.Thread(target=read, args=(numbers,)) for numbers in run]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    del array


def test_without_the_codec(tmp_path):
    """Goal: where the library is missing, or lacks what is needed, making the provider says so with the cure; the plain
    one works. Method: an empty library of its name comes first."""
    fake = tmp_path / "libzstd.so.1"
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libzstd.so.1", "-o", str(fake)], check=True)
    done = subprocess.run([sys.executable, "-P", "-c", """
from support.child import *
try:
    providers.Scratch(compress="zstd")
except FileNotFoundError as error:
    say(error)
with uffd.Region(PAGE, providers.Scratch()) as r:
    assert r.array()[0] == 0
"""], env=environment_for(fake), capture_output=True, text=True, timeout=40 * deadline_scale(), check=False)
    assert done.returncode == 0 and "apt install libzstd1" in done.stdout, done


def test_its_recipe_and_what_it_refuses():
    assert repr(providers.Scratch(compress="zstd")) == "uffd.providers.Scratch(compress='zstd')"
    assert repr(pickle.loads(pickle.dumps(providers.Scratch("zstd")))) == "uffd.providers.Scratch(compress='zstd')"
    assert repr(pickle.loads(pickle.dumps(providers.Scratch()))) == "uffd.providers.Scratch()"
    with pytest.raises(ValueError, match="'lz5'"):
        providers.Scratch(compress="lz5")
    a = uffd.zeros((1 << 16,), provider=providers.Scratch(compress="zstd"))
    a[5] = 3
    assert a.sum() == 3 and uffd.region_of(a).mode == "c"
