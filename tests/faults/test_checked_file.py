"""File(checksums=True): a region over it loses nothing that was written back, tears no block, and hands out no damage.

What each call of the store leaves behind is tested on the C code alone (tests/test_checked_c.py); here it is the whole
way, from an array to the file and back, with processes that are killed.
"""

import errno
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import uffd
from uffd import providers

TESTS = Path(__file__).resolve().parent.parent
SEED = int(os.environ.get("UFFD_SEED", random.SystemRandom().randrange(1 << 32)))
BLOCK = 65536
BLOCKS = 24
NBYTES = BLOCKS * BLOCK + 999
OFFSET = 128


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(b"h" * OFFSET + np.arange(NBYTES, dtype="u4").astype("u1").tobytes())
    providers.File.checksum(tmp_path / "file", OFFSET)
    return tmp_path / "file"


def opened(path, **options):
    return providers.File(path, OFFSET, checksums=True, **options)


def held(path):
    data = path.read_bytes()
    assert data[:OFFSET] == b"h" * OFFSET
    return np.frombuffer(data[OFFSET:], "u1")


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 16]))


# What it holds


@pytest.mark.parametrize("block_bytes", [BLOCK, uffd._core.PAGE_BYTES, 4 * BLOCK])
def test_written_back_and_read_again(path, engine, block_bytes):
    """Goal: evicted blocks come back as they were written; the file has them after a flush, for any program."""
    expected = held(path).copy()
    with uffd.Region(None, opened(path, writable=True), block_bytes=block_bytes, engine=engine) as region:
        array = region.array()
        assert region.mode == "r+"
        np.testing.assert_array_equal(array, expected)
        for value in (1, 2):
            array[3:5 * BLOCK] = expected[3:5 * BLOCK] = value
            array[-5:] = expected[-5:] = value
            region.evict()
            np.testing.assert_array_equal(array, expected)
        region.flush()
        np.testing.assert_array_equal(held(path), expected)
        array[9 * BLOCK] = expected[9 * BLOCK] = 77
        del array
    np.testing.assert_array_equal(held(path), expected)
    with uffd.Region(None, opened(path), block_bytes=block_bytes, engine=engine) as region:
        assert region.mode == "c"
        np.testing.assert_array_equal(region.array(), expected)


def test_two_engines_and_a_recipe(path):
    """Goal: one instance serves regions of several engines, which see what was written back; so does a pickle of it
    here, while in another process it is refused until this one is gone."""
    provider = opened(path, writable=True)
    with uffd.Engine(workers=1) as one, uffd.Engine(workers=1) as other:
        with uffd.Region(None, provider, engine=one) as region, uffd.Region(None, provider, engine=other) as second:
            array = region.array()
            array[:BLOCK] = 8
            region.evict()
            assert (second.array()[:BLOCK] == 8).all()
            del array
        recipe = pickle.dumps(provider)
        with uffd.Region(None, pickle.loads(recipe), engine=one, mode="r") as third:
            assert (third.array()[:BLOCK] == 8).all()
        assert opened_elsewhere(recipe) == f"{errno.EBUSY}"
        with pytest.raises(OSError) as info:
            providers.File.checksum(path, OFFSET)
        assert info.value.errno == errno.EBUSY
    del provider, region, second, third, one, other, info
    gc.collect()
    assert opened_elsewhere(recipe) == "0"


def opened_elsewhere(recipe):
    code = "import pickle, sys\ntry: pickle.loads(sys.stdin.buffer.read())\nexcept OSError as e: print(e.errno)\n" \
           "else: print(0)"
    done = subprocess.run([sys.executable, "-P", "-c", code], input=recipe, env=environment(), capture_output=True,
                          timeout=60, check=True)
    return done.stdout.decode().strip()


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(uffd.__file__).parent.parent), str(TESTS)])}


def test_a_forked_child_reads_on(path, engine):
    """Goal: a child reads what it had when it was forked, or, of what the parent writes afterwards, units of 4 KiB of
    before or after; never an error, never a hang."""
    with uffd.Region(None, opened(path, writable=True), engine=engine) as region:
        array = region.array()
        array[:BLOCK] = 5
        region.evict()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                time.sleep(0.2)
                units = [set(unit.tolist()) for unit in array[:4 * BLOCK].reshape(-1, 4 << 10)]
                good = all(unit in ({5} if i < BLOCK >> 12 else set(range(256)), {6}) for i, unit in enumerate(units))
                status = 0 if good else 2
            finally:
                os._exit(status)
        for _ in range(20):
            array[:4 * BLOCK] = 6
            region.flush()
            region.evict()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        del array


# Damage


def test_damage_is_an_error_with_its_cure(path):
    """Goal: a flipped bit in the file or in its checksums: ProviderError at the block, EBADMSG, and how to go on."""
    before = path.read_bytes()
    sidecar = Path(f"{path}.uffd")
    for damaged, at in ((path, OFFSET + 5 * BLOCK + 17), (sidecar, 2 * 4096 + 8 * (5 * BLOCK // 4096) + 3)):
        flip(damaged, at)
        with uffd.Region(None, opened(path), retries=0) as region:
            region.populate((0, 5 * BLOCK))
            with pytest.raises(uffd.ProviderError, match="checksum.*File.checksum") as info:
                region.populate()
            assert (info.value.errno, info.value.offset) == (errno.EBADMSG, 5 * BLOCK)
        flip(damaged, at)
        del region, info
    assert path.read_bytes() == before
    with uffd.Region(None, opened(path)) as region:
        region.populate()


def test_what_another_program_wrote(path):
    with open(path, "r+b") as file:
        file.seek(OFFSET + 2 * BLOCK)
        file.write(b"theirs")
    with uffd.Region(None, opened(path), retries=0) as region, pytest.raises(uffd.ProviderError):
        region.populate()
    del region
    providers.File.checksum(path, OFFSET)
    with uffd.Region(None, opened(path)) as region:
        assert region.array()[2 * BLOCK:2 * BLOCK + 6].tobytes() == b"theirs"


def test_what_can_not_be_opened(path, tmp_path):
    """Goal: a sidecar that is missing, short, or another's: an OSError that names the file and the cure."""
    sidecar, saved = Path(f"{path}.uffd"), Path(f"{path}.uffd").read_bytes()
    for change, number in ((sidecar.unlink, errno.ENOENT),
                           ((lambda: sidecar.write_bytes(saved[:5000])), errno.EBADMSG),
                           ((lambda: sidecar.write_bytes(saved[:9000])), errno.EBADMSG),
                           ((lambda: os.truncate(path, NBYTES)), errno.ESTALE)):
        sidecar.write_bytes(saved)
        change()
        for writable in (False, True):
            with pytest.raises(OSError, match=r"File\.checksum\(.*, 128\)") as info:
                opened(path, writable=writable)
            assert (info.value.errno, info.value.filename) == (number, str(path))
    with pytest.raises(OSError, match="offset") as info:
        providers.File(path, checksums=True)
    assert info.value.errno == errno.ESTALE
    with pytest.raises(ValueError, match="direct"):
        opened(path, direct=True)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="no bytes"):
        providers.File.checksum(tmp_path / "empty")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "file", "file.uffd"]


# Death


WRITES = """
import os, sys
import numpy as np, uffd
path, first = sys.argv[1], int(sys.argv[2])
region = uffd.Region(None, uffd.providers.File(path, 128, writable=True, checksums=True), readahead_bytes=0)
blocks = region.array("u1", (24, 65536))
ragged = region.array("u1", offset=24 * 65536)
version = first
while True:
    for block in range(24):
        blocks[block] = version % 251
        if block % 5 == 4:
            region.evict(((block - 4) * 65536, (block + 1) * 65536))
            os.write(1, b"%d %d\\n" % (version, block))
    ragged[:] = version % 251
    if version % 3:
        region.evict()
    else:
        region.flush()
    os.write(1, b"%d 24\\n" % version)
    version += 1
"""


def test_killed_at_any_time(path):
    """Goal: SIGKILL at any moment: each block is of one version, none older than what was acknowledged; the next
    process goes on from there. Method: a child that writes versions and says what was acknowledged, killed twelve
    times."""
    print(f"UFFD_SEED={SEED}")
    rng, version = random.Random(SEED), 1
    with uffd.Region(None, opened(path, writable=True)) as region:
        region.array()[:] = 0
    del region
    for _ in range(12):
        child = subprocess.Popen([sys.executable, "-P", "-W", "ignore", "-c", WRITES, path, str(version)],
                                 env=environment(), stdout=subprocess.PIPE)
        first = child.stdout.readline()
        assert first, "the child did not begin"
        time.sleep(rng.random() * 0.15)
        child.send_signal(signal.SIGKILL)
        said = (first + child.stdout.read()).decode().splitlines()
        child.wait(20)
        child.stdout.close()
        acknowledged = np.full(BLOCKS + 1, version - 1)
        for line in said:
            of, last = map(int, line.split())
            acknowledged[max(0, last - 4) if last < BLOCKS else 0:last + 1] = of
        with uffd.Region(None, opened(path), readahead_bytes=0) as region:
            data = region.array().copy()
        del region
        for block in range(BLOCKS + 1):
            values = np.unique(data[block * BLOCK:(block + 1) * BLOCK])
            assert len(values) == 1, f"block {block} is torn: {values}"
            newer = (int(values[0]) - int(acknowledged[block])) % 251
            assert newer <= 1, (block, values, acknowledged[block])
        version = int(acknowledged.max()) + 2
        with uffd.Region(None, opened(path, writable=True)) as region:
            np.testing.assert_array_equal(region.array(), data)
            region.array()[:] = (version - 1) % 251
        del region
        assert (held(path) == (version - 1) % 251).all()


def test_where_no_userfaultfd_can_be_had(path, monkeypatch):
    """Goal: regions that are filled whole keep the same promises, by the same code."""
    from support import fallback

    undo = fallback.ask_for_it(monkeypatch)
    next(undo)
    expected = held(path).copy()
    with uffd.Region(None, opened(path, writable=True)) as region:
        region.array()[BLOCK:BLOCK + 3] = expected[BLOCK:BLOCK + 3] = 250
        region.evict()
        assert held(path)[BLOCK] != 250
    np.testing.assert_array_equal(held(path), expected)
    flip(path, OFFSET + 7)
    with pytest.raises(uffd.ProviderError) as info:
        uffd.Region(None, opened(path), retries=0)
    assert info.value.errno == errno.EBADMSG
    next(undo, None)
