"""uffd/_checked.h, compiled by itself: after any end, each store is there whole or not at all, and damage is an error.

Goal: whatever kills the process, at whatever call, and whatever of its unsynced writes a loss of power leaves on the
disk, a file opened again has each store whole or not at all, what was acknowledged where the process died and what was
synced where power was lost; flipped bits are EBADMSG; the file alone has the bytes after a sync.
Method: the header is compiled with gcc into a library whose writes and fdatasyncs go by a hook (checked_harness.c). A
death is one write that ends in its midst, and nothing after it. Power: the hook keeps all writes since the last
fdatasync of each file; disks are made of a random choice of their sectors.
"""

import ctypes
import errno
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS / "checked_harness.c"
INCLUDE = TESTS.parent / "uffd"
CFLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", f"-I{INCLUDE}"]
SEED = int(os.environ.get("UFFD_SEED", random.SystemRandom().randrange(1 << 32)))
UNIT, SECTOR = 4096, 512
BLOCK = 4 * UNIT
OFFSET, NBYTES = 100, 10 * BLOCK + 777  # the last unit is a short one
ID = 0x1234567890ABCDEF
HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64)

if shutil.which("gcc") is None:
    pytest.skip("gcc is not installed: the C harness cannot be built", allow_module_level=True)
if not (INCLUDE / "_checked.h").exists():
    pytest.skip("the source tree is not here: uffd/_checked.h is compiled by itself", allow_module_level=True)


@pytest.fixture(scope="module")
def c(tmp_path_factory):
    path = tmp_path_factory.mktemp("checked") / "harness.so"
    subprocess.run(["gcc", *CFLAGS, "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(path)], check=True, timeout=120,
                   capture_output=True)
    library = ctypes.CDLL(str(path))
    library.checked_test_xxh64.restype = library.checked_test_pending.restype = ctypes.c_uint64
    library.checked_test_xxh64.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64]
    library.checked_test_make.argtypes = [ctypes.c_int, ctypes.c_int] + 3 * [ctypes.c_uint64]
    library.checked_test_open.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint64,
                                          ctypes.c_uint64, ctypes.c_int]
    library.checked_test_fill.argtypes = library.checked_test_store.argtypes = [
        ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t]
    for name in ("sync", "close", "pending"):
        getattr(library, f"checked_test_{name}").argtypes = [ctypes.c_void_p]
    library.checked_test_hook(hook)
    yield library
    library.checked_test_hook(None)


opened = {}  # descriptor -> Checked


@HOOK
def hook(is_sync, fd, pointer, nbytes, offset):
    it = opened.get(fd)
    if it is None or it.plan is None:
        return 0
    data = ctypes.string_at(pointer, nbytes) if pointer else b""
    return it.plan("sync" if is_sync else "write", it.fds.index(fd), data, offset)


class Checked:
    """An open one. `plan`: what the hook does, a function of the test's."""

    def __init__(self, c, folder, writable=True, nbytes=NBYTES, offset=OFFSET, plan=None):
        self.c, self.plan = c, plan
        self.fds = [os.open(folder / name, os.O_RDWR) for name in ("file", "side")]
        opened.update(dict.fromkeys(self.fds, self))
        self.handle = ctypes.c_void_p()
        answer = c.checked_test_open(ctypes.byref(self.handle), *self.fds, offset, nbytes, writable)
        if answer:
            for fd in self.fds:
                del opened[fd]
                os.close(fd)
            raise OSError(-answer, os.strerror(-answer))

    def answer(self, number):
        if number:
            raise OSError(-number, os.strerror(-number))

    def fill(self, offset, nbytes):
        out = ctypes.create_string_buffer(nbytes)
        self.answer(self.c.checked_test_fill(self.handle, offset, out, nbytes))
        return out.raw

    def store(self, offset, data):
        self.answer(self.c.checked_test_store(self.handle, offset, data, len(data)))

    def sync(self):
        self.answer(self.c.checked_test_sync(self.handle))

    @property
    def pending(self):
        return self.c.checked_test_pending(self.handle)

    def close(self):
        self.c.checked_test_close(self.handle)
        for fd in self.fds:
            del opened[fd]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.plan = None
        self.close()


def content(version):
    """Of each block, a version of its own."""
    return np.random.default_rng(version).integers(0, 256, NBYTES, np.uint8).tobytes()


def made(c, folder):
    folder.mkdir(exist_ok=True)
    (folder / "file").write_bytes(b"h" * OFFSET + content(0))
    (folder / "side").write_bytes(b"")
    fds = [os.open(folder / name, os.O_RDWR) for name in ("file", "side")]
    assert c.checked_test_make(*fds, OFFSET, NBYTES, ID) == 0
    for fd in fds:
        os.close(fd)
    return folder


def held(folder):
    data = (folder / "file").read_bytes()
    assert data[:OFFSET] == b"h" * OFFSET
    return data[OFFSET:]


def spans():
    """(offset, nbytes) of runs of blocks, the last one ragged."""
    return [(0, BLOCK), (2 * BLOCK, 3 * BLOCK), (10 * BLOCK, 777), (3 * BLOCK, BLOCK), (8 * BLOCK, 2 * BLOCK + 777),
            (0, 2 * BLOCK), (5 * BLOCK, BLOCK)]


def test_the_checksum_is_xxh64(c):
    """Goal: the public algorithm, at lengths around its steps. Method: values that its own program gives."""
    for data, seed, expected in ((b"", 0, 0xEF46DB3751D8E999), (b"a", 0, 0xD24EC4F1A98C6E5B),
                                 (b"abc", 0, 0x44BC2CF5AD770999)):
        assert c.checked_test_xxh64(data, len(data), seed) == expected
    xxhash = pytest.importorskip("xxhash", reason="the package xxhash compares more lengths")
    for n in [*range(70), 4095, 4096]:
        data = content(1)[:n]
        assert c.checked_test_xxh64(data, n, 77) == xxhash.xxh64_intdigest(data, 77)


def test_stores_are_read_back_and_reach_the_file(c, tmp_path):
    """Goal: at once by a fill; in the file by itself after a sync; by who opens it next, reading alone too."""
    folder, expected = made(c, tmp_path / "a"), bytearray(content(0))
    with Checked(c, folder) as it:
        for version, (offset, nbytes) in enumerate(spans(), 1):
            new = content(version)[offset:offset + nbytes]
            expected[offset:offset + nbytes] = new
            it.store(offset, new)
            assert it.fill(0, NBYTES) == expected
            assert it.fill(4 * BLOCK, BLOCK + 5) == expected[4 * BLOCK:5 * BLOCK + 5]
        assert it.pending
        assert held(folder) != expected
        it.sync()
        assert (it.pending, held(folder)) == (0, expected)
        assert it.fill(0, NBYTES) == expected
        it.sync()
        it.store(0, content(9)[:BLOCK])
        expected[:BLOCK] = content(9)[:BLOCK]
    assert held(folder) == expected
    for writable in (False, True):
        with Checked(c, folder, writable) as it:
            assert it.fill(0, NBYTES) == expected


def test_a_full_journal_is_copied(c, tmp_path):
    folder = made(c, tmp_path / "a")
    with Checked(c, folder) as it:
        for _ in range(30):
            it.store(0, content(1)[:2 * BLOCK])
            assert (folder / "side").stat().st_size < (128 << 10) + 16 * UNIT
        assert it.fill(0, NBYTES) == content(1)[:2 * BLOCK] + content(0)[2 * BLOCK:]


def test_a_region_that_ends_inside_a_unit(c, tmp_path):
    folder = made(c, tmp_path / "a")
    with Checked(c, folder) as it:
        it.store(BLOCK, b"x" * (UNIT + 5))
        assert it.fill(0, NBYTES) == content(0)[:BLOCK] + b"x" * (UNIT + 5) + content(0)[BLOCK + UNIT + 5:]


def test_what_is_not_ours_is_refused(c, tmp_path):
    folder = made(c, tmp_path / "a")
    for options, number in (({"nbytes": NBYTES - 1}, errno.ESTALE), ({"offset": 0}, errno.ESTALE)):
        with pytest.raises(OSError) as info:
            Checked(c, folder, **options)
        assert info.value.errno == number
    with Checked(c, folder):
        for writable in (True, False):
            with pytest.raises(OSError) as info:
                Checked(c, folder, writable)
            assert info.value.errno == errno.EBUSY
    with Checked(c, folder, False) as it, Checked(c, folder, False), pytest.raises(OSError) as info:
        it.store(0, content(1)[:BLOCK])
    assert info.value.errno == errno.EBADF


# Damage


def test_a_flipped_bit_is_an_error(c, tmp_path):
    """Goal: of the file and of each part of the sidecar: an error, or, of the journal, what was there before."""
    print(f"UFFD_SEED={SEED}")
    rng, folder = random.Random(SEED), made(c, tmp_path / "a")
    with Checked(c, folder) as it:
        it.store(0, content(1)[:BLOCK])
        copies = {name: (folder / name).read_bytes() for name in ("file", "side")}
    table = range(2 * UNIT, 2 * UNIT + 8 * (-(-NBYTES // UNIT)))
    journal_at = -(-table.stop // UNIT) * UNIT
    places = [("file", OFFSET + BLOCK + rng.randrange(NBYTES - BLOCK)) for _ in range(20)] + \
        [("side", rng.randrange(table.start + 32, table.stop)) for _ in range(20)] + \
        [("side", rng.randrange(journal_at, journal_at + 5 * UNIT)) for _ in range(30)] + \
        [("side", page * UNIT + rng.randrange(56)) for page in (0, 1) for _ in range(10)]
    for name, at in places:
        for each, data in copies.items():
            (folder / each).write_bytes(data)
        damaged = bytearray(copies[name])
        damaged[at] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(damaged)
        with Checked(c, folder, False) as it:
            new, old = content(1)[:BLOCK], content(0)
            if name == "side" and (at >= journal_at or at < table.start):
                assert it.fill(0, NBYTES) in (new + old[BLOCK:], old), at
                continue
            bad = at - OFFSET if name == "file" else (at - table.start) // 8 * UNIT
            with pytest.raises(OSError) as info:
                it.fill(bad // UNIT * UNIT, min(UNIT, NBYTES - bad // UNIT * UNIT))
            assert info.value.errno == errno.EBADMSG
            assert it.fill(0, BLOCK) == new


def test_damage_to_the_newer_header_costs_nothing_that_was_synced(c, tmp_path):
    folder = made(c, tmp_path / "a")
    for damaged in (0, 1):
        with Checked(c, folder) as it:
            it.store(0, content(2 + damaged)[:BLOCK])
            it.sync()
        data = bytearray((folder / "side").read_bytes())
        data[damaged * UNIT + 9] ^= 4
        (folder / "side").write_bytes(data)
        with Checked(c, folder) as it:
            assert it.fill(0, BLOCK) == content(2 + damaged)[:BLOCK]
    (folder / "side").write_bytes(b"\0" * 2 * UNIT + bytes(data[2 * UNIT:]))
    with pytest.raises(OSError) as info:
        Checked(c, folder)
    assert info.value.errno == errno.EBADMSG


def test_a_truncated_sidecar(c, tmp_path):
    folder = made(c, tmp_path / "a")
    data = (folder / "side").read_bytes()
    for nbytes in (0, 10, UNIT, 2 * UNIT, 2 * UNIT + 8, len(data) - 1):
        (folder / "side").write_bytes(data[:nbytes])
        with pytest.raises(OSError) as info:
            Checked(c, folder)
        assert info.value.errno == errno.EBADMSG


# Ends


def script():
    """("store", offset, bytes) and ("sync",): enough to fill the journal, too."""
    steps = []
    for version, (offset, nbytes) in enumerate(spans(), 1):
        steps.append(("store", offset, content(version)[offset:offset + nbytes]))
        if version in (3, 5):
            steps.append(("sync",))
    return [*steps, ("sync",)]


def states():
    """What the bytes are after each number of stores."""
    now, found = bytearray(content(0)), [content(0)]
    for step in script():
        if step[0] == "store":
            now[step[1]:step[1] + len(step[2])] = step[2]
            found.append(bytes(now))
    return found


def run(it):
    """(stores acknowledged, stores synced) until it dies."""
    stored = synced = 0
    try:
        for step in script():
            if step[0] == "store":
                it.store(*step[1:])
                stored += 1
            else:
                it.sync()
                synced = stored
    except OSError:
        pass
    return stored, synced


def steps_of(c, folder):
    calls = []
    with Checked(c, folder) as it:
        it.plan = lambda *call: calls.append(call) or 0
        run(it)
        it.plan = None
    return len(calls)


def test_killed_at_each_step(c, tmp_path):
    """Goal: the death of the process, before and within each write and sync: what was acknowledged is there, of the
    store under way all or nothing; again when it dies at each step of the recovery. Method: from the Nth call on,
    nothing reaches the files; half of the Nth write does."""
    rng, all_states = random.Random(SEED), states()
    print(f"UFFD_SEED={SEED}")
    total = steps_of(c, made(c, tmp_path / "count"))
    assert total > 40

    def die_at(it, n):
        count = [0]

        def plan(kind, which, data, offset):
            count[0] += 1
            if count[0] == n and kind == "write":
                os.pwrite(it.fds[which], data[:rng.randrange(len(data) + 1)], offset)
            return errno.EIO if count[0] >= n else 0

        it.plan = plan

    for n in range(1, total + 1):
        folder = made(c, tmp_path / "a")
        with_death = Checked(c, folder)
        die_at(with_death, n)
        stored, _ = run(with_death)
        with_death.close()
        survived = {name: (folder / name).read_bytes() for name in ("file", "side")}
        with Checked(c, folder, False) as it:            # nothing is written, and all is there
            found = it.fill(0, NBYTES)
        assert found in all_states[stored:stored + 2], n
        for name, data in survived.items():
            assert (folder / name).read_bytes() == data
        with Checked(c, folder) as it:
            assert it.fill(0, NBYTES) == found == held(folder)
        assert held(folder) == found


def test_killed_in_the_recovery(c, tmp_path):
    """Goal: as often as it dies while it copies the journal, it can be opened again. Method: the same, at an open."""
    folder, rng = made(c, tmp_path / "a"), random.Random(SEED)
    it = Checked(c, folder)
    for step in script()[:3]:
        it.store(*step[1:])
    it.plan = lambda *_: errno.EIO
    it.close()
    copies, expected = {name: (folder / name).read_bytes() for name in ("file", "side")}, states()[3]
    for n in range(1, 14):
        for name, data in copies.items():
            (folder / name).write_bytes(data)
        count = [0]

        def dies(kind, which, data, offset, n=n, count=count):
            count[0] += 1
            if count[0] == n and kind == "write":
                with open(folder / ("file", "side")[which], "r+b") as file:
                    file.seek(offset)
                    file.write(data[:rng.randrange(len(data) + 1)])
            return errno.EIO if count[0] >= n else 0

        try:
            Checked(c, folder, plan=dies).close()
        except OSError as error:
            assert error.errno == errno.EIO
        with Checked(c, folder) as it:
            assert it.fill(0, NBYTES) == expected == held(folder)


class Disk:
    """What reached each file for certain, and the writes since its last fdatasync."""

    def __init__(self, folder):
        self.safe = [bytearray((folder / name).read_bytes()) for name in ("file", "side")]
        self.cached = [[], []]

    def plan(self, kind, which, data, offset):
        if kind == "write":
            self.cached[which].append((offset, data))
        else:
            for at, written in self.cached[which]:
                put(self.safe[which], at, written)
            self.cached[which] = []
        return 0

    def lose_power(self, folder, rng):
        """Of each sector any version that was ever in the cache since, the kernel writes back as it likes."""
        for which, name in enumerate(("file", "side")):
            disk, pages, some = bytearray(self.safe[which]), bytearray(self.safe[which]), rng.choice((0.1, 0.5, 0.9, 1))
            for at, written in self.cached[which]:
                put(pages, at, written)
                for sector in range(at // SECTOR * SECTOR, at + len(written), SECTOR):
                    if rng.random() < some:
                        put(disk, sector, pages[sector:sector + SECTOR])
            (folder / name).write_bytes(disk)


def put(disk, at, data):
    disk.extend(bytes(max(0, at + len(data) - len(disk))))
    disk[at:at + len(data)] = data


def test_power_lost_at_each_step(c, tmp_path):
    """Goal: what was synced is there; of the stores after it the first so many, each whole; and what is done after that
    is safe again: nothing of the time before the loss comes back. Method: Disk, at each call; then once more."""
    rng, all_states = random.Random(SEED), states()
    print(f"UFFD_SEED={SEED}")
    total = steps_of(c, made(c, tmp_path / "count"))
    for n in range(1, total + 1):
        for _ in range(4):
            folder = made(c, tmp_path / "a")
            disk, count = Disk(folder), [0]
            it = Checked(c, folder)

            def plan(*call, disk=disk, count=count, n=n):
                count[0] += 1
                return errno.EIO if count[0] > n else disk.plan(*call)

            it.plan = plan
            disk.safe[1][:] = (folder / "side").read_bytes()
            stored, synced = run(it)
            it.close()
            disk.lose_power(folder, rng)
            again = Disk(folder)
            with Checked(c, folder, plan=again.plan) as it:
                found = it.fill(0, NBYTES)
                assert found in all_states[synced:stored + 2], n
                it.store(6 * BLOCK, content(50)[6 * BLOCK:7 * BLOCK])
            again.lose_power(folder, rng)
            expected = found[:6 * BLOCK] + content(50)[6 * BLOCK:7 * BLOCK] + found[7 * BLOCK:]
            with Checked(c, folder) as it:
                assert it.fill(0, NBYTES) in (found, expected), n


def test_nothing_of_a_lost_journal_comes_back(c, tmp_path):
    """Goal: a record behind one that was lost stays lost, also when another of the same size takes the lost one's
    place. Method: of two records the first is made unreadable, as by a loss of power."""
    folder = made(c, tmp_path / "a")
    it = Checked(c, folder)
    for block in (0, 1):
        it.store(block * BLOCK, content(1)[block * BLOCK:(block + 1) * BLOCK])
    it.plan = lambda *_: errno.EIO
    it.close()
    data = bytearray((folder / "side").read_bytes())
    at = data.index(b"uffdrec1")
    data[at:at + 8] = bytes(8)
    (folder / "side").write_bytes(data)
    it = Checked(c, folder)
    it.store(0, content(2)[:BLOCK])
    it.plan = lambda *_: errno.EIO
    it.close()
    with Checked(c, folder) as it:
        assert it.fill(0, NBYTES) == content(2)[:BLOCK] + content(0)[BLOCK:]


def test_a_call_that_fails_is_told_and_may_be_tried_again(c, tmp_path):
    """Goal: ENOSPC or EIO at any call of a store or sync: an error, nothing torn, and the next try does it, but where
    an fdatasync of the journal has failed: nothing is acknowledged any more."""
    total = steps_of(c, made(c, tmp_path / "count"))
    for n in range(1, total + 1):
        folder, count, failed = made(c, tmp_path / "a"), [0], []
        with Checked(c, folder) as it:
            def plan(kind, which, data, offset, n=n, count=count, failed=failed):
                count[0] += 1
                if count[0] == n:
                    failed.append((kind, which))
                    return errno.EIO
                return 0

            it.plan = plan
            now = bytearray(content(0))
            for step in script():
                try:
                    getattr(it, step[0])(*step[1:])
                except OSError as error:
                    assert error.errno == errno.EIO
                    if failed == [("sync", 1)]:
                        break
                    getattr(it, step[0])(*step[1:])
                if step[0] == "store":
                    now[step[1]:step[1] + len(step[2])] = step[2]
            assert failed
            if failed == [("sync", 1)]:
                for again in (lambda: it.store(0, bytes(BLOCK)), it.sync):
                    with pytest.raises(OSError):
                        again()
            else:
                assert it.fill(0, NBYTES) == now == states()[-1] == held(folder)
        with Checked(c, folder) as it:
            assert it.fill(0, NBYTES) in states()
