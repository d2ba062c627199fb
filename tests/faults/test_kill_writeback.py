"""SIGKILL in the middle of write-back: what flush had promised is in the file, whatever the moment.

`File` promises no more: without checksums a block that was on its way may be half old, half new. What is checked is
that acknowledged and flushed versions survive, and that no byte is there that nobody wrote.
"""

import time

import numpy as np
import pytest
import uffd
from support import matrix
from support.pattern import seeded
from support.scripts import finish_script, start_script, wait_for_line

pytestmark = pytest.mark.skipif(matrix.filled_whole(), reason="no userfaultfd: nothing is written back")

PAGE = uffd._core.PAGE_BYTES
PAGES = 256

# Each page has its number and a version in every word. "flushed N": every version below N is promised to be durable.
WRITER = """
path, first = sys.argv[1], int(sys.argv[2])
engine = uffd.Engine(workers=2, budget_bytes=48 * 4 * PAGE if first % 2 else 16 * 4 * PAGE)
r = region(None, providers.File(path, writable=True), engine=engine, block_bytes=4 * PAGE)
a = r.array("<u8", (r.nbytes // PAGE, PAGE // 8))
pages, version = len(a), first
rng = np.random.default_rng(first)
say("ready")
while True:
    version += 1
    for page in rng.permutation(pages):
        a[page] = (int(page) << 32) + version
    r.flush()
    say(f"flushed {version}")
"""


@pytest.mark.deadline(90)
def test_killed_at_any_moment(where, tmp_path):
    """Goal: after SIGKILL at a random moment each page of the file has, in every word, its own number and a version
    that is not older than the last one that was flushed, nor newer than the one being written; the next process goes on
    from there. Method: several processes one after the other, over one file."""
    rng = seeded("killed in write-back")
    path = tmp_path / "data"
    promised = version = 0
    (np.arange(PAGES, dtype="<u8")[:, None] << np.uint64(32)).repeat(PAGE // 8, axis=1).tofile(path)
    for _ in range(5):
        process = start_script(WRITER, where=where, argv=[path, version])
        wait_for_line(process, "ready")
        time.sleep(rng.uniform(0.02, 0.4))
        process.send_signal(9)
        result = finish_script(process, 10)
        assert result.returncode == -9, result.describe()
        flushed = [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("flushed")
                   and line.split()[-1].isdigit()]
        found = np.fromfile(path, "<u8").reshape(PAGES, PAGE // 8)
        assert found.size == PAGES * PAGE // 8
        assert (found >> np.uint64(32) == np.arange(PAGES, dtype="u8")[:, None]).all(), "bytes of another page"
        versions = found & np.uint64(0xffffffff)
        promised = max(flushed, default=promised)
        assert versions.min() >= promised, f"version {promised} was flushed, and {versions.min()} is there"
        assert versions.max() <= max(flushed, default=version) + 1, "bytes that nobody wrote"
        version = int(versions.max())
