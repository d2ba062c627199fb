"""What the destination can open by itself is not sent: files and namespaces of Redis, if it is shown to be the same."""

import os

import numpy as np
import pytest
import uffd
from support import matrix, redisserver
from support.scripts import run_script
from uffd import providers
from uffd.migrate import _stores

pytestmark = pytest.mark.skipif(matrix.filled_whole() or uffd.probe().mode != "full",
                                reason="no userfaultfd that serves the kernel's accesses")
BLOCK = 65536


def script(text, **options):
    return run_script("from support.migration import *\n" + text, **options).check()


@pytest.mark.parametrize("precopy", [0, 2])
def test_blocks_of_a_file_are_read_where_they_are(precopy, tmp_path):
    """Goal: of a region over a file only what was written travels, also what was written and left memory since, was set
    to zeros, or discarded after it was sent; the report says how much did not; broken and recovered in between. Another
    file in the place of the one that is open is not taken for it."""
    script(f"""
N, B, PRECOPY, FOLDER = 8 << 20, {BLOCK}, {precopy}, {str(tmp_path)!r}
""" + """
right = filled(N)
right[3 * 8192:4 * 8192] = 0                    # written; zeros, which the file does not have there
right[7 * 8192] = -1                            # written in part
right[40 * 8192:50 * 8192] = 5                  # written, and out of memory since
def destination(incoming):
    arrival = incoming.accept(20)
    a, b = arrival.arrays["a"], arrival.arrays["b"]
    assert (a[::-1] == right[::-1]).all() and (b == filled(N, 1)).all()
    report = arrival.wait(20)
    assert report.bytes_opened == N - 12 * B, report
    a[:] = 9                                    # the file is nobody's to write
    while not os.path.exists(f"{FOLDER}/heard"):    # else a source that was cut off could not be told that it is over
        time.sleep(0.01)
    arrival.close()
    assert (a == 9).all() and arrival.regions[0].mode == "c"
pid, url = start(destination)
for name, seed in (("a", 0), ("b", 1), ("other", 2)):
    filled(N, seed).tofile(f"{FOLDER}/{name}")
a, b = (uffd.from_provider(providers.File(f"{FOLDER}/{name}"), (N // 8,), np.int64, mode="c") for name in "ab")
os.replace(f"{FOLDER}/other", f"{FOLDER}/b")    # under the region, which has the old one open
a[20 * 8192:30 * 8192].sum()                    # clean, in memory
a[40 * 8192:50 * 8192] = 5
region = uffd.region_of(a)
while region.resident()[40:50].any():
    region.evict((40 * B, 50 * B))
with migrate.connect(url, {"a": a, "b": b}, postcopy_bytes_per_s=50e6) as outgoing:
    a[60 * 8192] = 7
    if PRECOPY:
        outgoing.precopy(PRECOPY)
    region.discard((60 * B, 61 * B))            # it is the file's again
    a[3 * 8192:4 * 8192] = 0
    a[7 * 8192] = -1
    outgoing.pause()
    outgoing.recover()
    outgoing.switchover()
    outgoing.pause()
    if not outgoing.done():                     # where all was there already
        outgoing.recover()
    report = outgoing.wait(20)
open(f"{FOLDER}/heard", "w").close()
assert report.bytes_opened == N - 12 * B, report
assert report.bytes.total <= N + 30 * B, report         # of breaks, some twice
assert "not sent" in str(report)
assert report.as_dict()["bytes_opened"] == report.bytes_opened
assert ended(pid) == 0
assert (np.fromfile(f"{FOLDER}/a", np.int64) == filled(N)).all()
""")


def test_cancelled_and_moved_later():
    """Goal: a hand-over that fails leaves the region as it was, and what the next one need not send is found anew."""
    script("""
import tempfile
N, B = 4 << 20, 65536
def destination(incoming):
    fails(lambda: incoming.accept(20))
    with incoming.accept(20) as arrival:
        a = arrival.arrays["0"]
        assert (a[8192:] == filled(N)[8192:]).all() and (a[:8192] == 1).all()
        assert arrival.wait(20).bytes_opened == N - B
pid, url = start(destination)
with tempfile.NamedTemporaryFile() as file:
    filled(N).tofile(file.name)
    a = uffd.from_provider(providers.File(file.name), (N // 8,), np.int64, mode="c")
    outgoing = migrate.connect(url, [a])
    outgoing.precopy()
    outgoing.cancel()
    outgoing.close()
    a[:8192] = 1
    with migrate.connect(url, [a], release=True) as outgoing:
        outgoing.switchover()
        assert outgoing.wait(20).bytes_opened == N - B
    assert ended(pid) == 0
""")


def test_a_region_that_writes_to_its_file_is_sent(tmp_path):
    np.arange(BLOCK, dtype=np.uint8).tofile(tmp_path / "f")
    with uffd.Engine() as engine:
        file = providers.File(tmp_path / "f", writable=True)
        assert _stores.describe(uffd.Region(None, file, engine=engine)) is None
        assert _stores.describe(uffd.Region(BLOCK, providers.Zero(), engine=engine)) is None


def test_blocks_of_a_redis_namespace(tmp_path):
    """Goal: the same of a namespace, and not of another one that has its name."""
    if redisserver.why_not():
        pytest.skip(redisserver.why_not())
    with redisserver.Server(tmp_path) as server:
        script(f"URL = {server.url!r}" + """
import dataclasses
N, B = 4 << 20, 65536
def destination(incoming):
    with incoming.accept(20) as arrival:
        a = arrival.arrays["0"]
        assert (a[8192:] == filled(N)[8192:]).all() and (a[:8192] == 1).all()
        assert arrival.wait(20).bytes_opened == N - B
    with incoming.accept(20) as arrival:
        assert (arrival.arrays["0"] == filled(N)).all() and arrival.wait(20).bytes_opened == 0
def made(seed):
    with uffd.Region(N, providers.Redis(URL, "space"), mode="r+") as region:
        region.array(np.int64)[:] = filled(N, seed)
made(0)
pid, url = start(destination)
a = uffd.from_provider(providers.Redis(URL, "space", create=False), (N // 8,), np.int64, mode="c")
a[:8192] = 1
with migrate.connect(url, [a]) as outgoing:
    outgoing.switchover()
    report = outgoing.wait(20)
assert report.bytes_opened == N - B and report.bytes.total == B, report
b = uffd.from_provider(providers.Redis(URL, "space", create=False), (N // 8,), np.int64, mode="c")
uffd.populate(b)
provider = uffd.region_of(b).provider
provider._space = dataclasses.replace(provider._space, generation=5)     # another one's
with migrate.connect(url, [b]) as outgoing:
    outgoing.switchover()
    assert outgoing.wait(20).bytes_opened == 0
assert ended(pid) == 0
""", deadline_s=40)


@pytest.fixture
def described(tmp_path):
    """A file, and what a source says of it."""
    np.random.default_rng(1).integers(0, 256, 10 * BLOCK + 5, np.uint8).tofile(tmp_path / "f")
    with uffd.Engine() as engine:
        yield _stores.describe(uffd.Region(None, providers.File(tmp_path / "f", 100), engine=engine, mode="c"))


def test_what_is_described_is_opened(described):
    assert _stores.opened(described, 10 * BLOCK - 95).nbytes == 10 * BLOCK - 95
    assert _stores.opened(None, BLOCK) is None


@pytest.mark.parametrize("change", [{"path": "/nowhere/f"}, {"inode": 1}, {"size": 10 * BLOCK + 4}, {"changed_ns": 5},
                                    {"digest": "0" * 64}, {"at": []}, {"offset": 10 * BLOCK + 6}, {"path": "/dev/zero"},
                                    {"path": "/etc"}, {"checksums": True}], ids=lambda change: next(iter(change)))
def test_what_is_not_the_same_is_sent(described, change):
    """Goal: no doubt that both ends have the same file; a refusal is no error."""
    assert _stores.opened({**described, **change}, 100) is None


def test_a_file_that_changed_or_is_too_short_is_sent(described):
    assert _stores.opened(described, 10 * BLOCK) is None
    os.utime(described["path"], ns=(0, described["changed_ns"] + 1))
    assert _stores.opened(described, 100) is None


@pytest.mark.parametrize("wrong", ["text", {}, {"kind": "s3"}, {"kind": "file"}, {"kind": "file", "path": 5},
                                   {"kind": "redis", "url": "redis://x"}])
def test_what_no_source_would_say_is_refused(wrong):
    with pytest.raises(uffd.MigrationError):
        _stores.opened(wrong, BLOCK)


@pytest.mark.parametrize("change", [{"at": [10 * BLOCK + 5]}, {"at": [-1]}, {"at": [0] * 17}, {"at": ["x"]},
                                    {"size": -1}, {"inode": 1.5}], ids=str)
def test_numbers_of_a_description_are_checked(described, change):
    with pytest.raises(uffd.MigrationError):
        _stores.opened({**described, **change}, BLOCK)
