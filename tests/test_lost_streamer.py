"""A thread of an image that hangs in a provider, and comes back: it gives back what it had."""

import pytest
from support import matrix, shim
from support.scripts import run_script

COMES_BACK = """
from support import shim
SIZE = 65536
source = tempfile.NamedTemporaryFile()
source.write(pattern(0, 8 * SIZE))
source.flush()
r = region(8 * SIZE, providers.File(source.name), mode="c", timeout_s=0.4, retries=0, readahead_bytes=0)
array = r.array()
def image(hangs):
    with tempfile.TemporaryFile() as file:
        os.truncate(file.fileno(), 8 * SIZE)
        one = uffd._core.Imager([(array, 0)], file.fileno(), memory_limit_bytes=2 << 20)
        one.start()
        try:
            one.wait(15)
        except OSError as error:
            assert hangs and error.errno == errno.ETIMEDOUT, error
        else:
            assert not hangs
        one.close()
threads = len(os.listdir("/proc/self/task"))
for turn in range(3):
    shim.Rule("pread", 1, -1, errno.EINTR)          # the streamer goes round in the provider
    image(True)
    image(True)
    shim.clear()
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= threads, "they don't come back")
image(False)
assert checked(r.address, 0, 8 * SIZE) is None
assert r.evict() == 8 * SIZE
"""


def test_a_streamer_that_comes_back_gives_its_slot_back(where):
    """Goal: more images than the engine has slots for calls hang in a provider that does come back at last; then calls
    and images work as ever."""
    if where.delivery == "inline" or matrix.filled_whole():
        pytest.skip("inline delivery: refused; or nothing is missing")
    if not matrix.full_mode():
        pytest.skip("an image of protected memory needs a full userfaultfd")
    run_script(COMES_BACK, where=where, preload=shim.path()).check()
