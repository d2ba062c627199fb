"""SIGKILL of either side of a migration at any moment: one side, or none, has the memory, and the other says who."""

import pytest
import uffd
from support import matrix
from support.pattern import stress_seconds
from support.scripts import run_script

TEXT = """
from support.migration import *
import random
N = 4 << 20
SECONDS = %r
seed = int.from_bytes(os.urandom(4), "little")
say(f"seed {seed}")
rng = random.Random(seed)
def checksum(a, r):
    return int(a.sum()) + int(r.sum())
def destination(incoming, out):
    try:
        arrival = incoming.accept(2)
    except uffd.MigrationError as error:
        assert error.owner == "source"
        return "source"
    except TimeoutError:
        return "nobody came"
    a, r = arrival.arrays["0"], arrival.arrays["1"]
    try:
        arrival.wait(1.5)
    except TimeoutError:
        status = arrival.status
        arrival.close()
        assert status in ("PAUSED", "RECOVERING") and arrival.status == "FAILED", status
        there = arrival.regions[0].resident()
        right = filled(N)
        for b in np.flatnonzero(there)[:20]:    # what is there is right
            assert (a[b * 8192:(b + 1) * 8192] == right[b * 8192:(b + 1) * 8192]).all(), b
        return "incomplete"
    assert checksum(a, r) == int(arrival.state), "the sums differ"
    arrival.close()
    return "complete"
def source(url, out):
    a, r = filled(N), uffd.zeros(N // 8, np.int64)
    r[:] = filled(N, 1)
    try:
        with migrate.connect(url, [a, r], postcopy_bytes_per_s=rng.choice([None, 200e6])) as outgoing:
            outgoing.precopy()
            r[::5000] += 1
            outgoing.switchover(b"%%d" %% checksum(a, r))
            outgoing.wait(3)
            return "complete"
    except (OSError, uffd.MigrationError) as error:
        owner = getattr(error, "owner", "source")
        if owner == "source":
            a[:] = 1
            r[:] = 1                            # its program goes on
            assert checksum(a, r) == 2 * (N // 8)
        return owner
def told(role, *arguments):
    "A process that says how it ended; what it says comes by a pipe, since it may be killed."
    near, far = os.pipe()
    pid = os.fork()
    if pid:
        os.close(far)
        return pid, near
    status = 1
    try:
        os.close(near)
        signal.alarm(20)
        os.write(far, role(*arguments, far).encode())
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(status)
def round(victim):
    r, w = os.pipe()
    def listens(out):
        with migrate.listen(TCP) as incoming:
            os.write(w, incoming.url.encode())
            os.close(w)
            return destination(incoming, out)
    there, there_says = told(listens)
    os.close(w)
    url = os.read(r, 1000).decode()
    os.close(r)
    here, here_says = told(source, url)
    time.sleep(rng.random() ** 2 * 0.15)
    killed = {"source": here, "destination": there}[victim]
    os.kill(killed, signal.SIGKILL)
    codes = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (here, there)}
    said = [os.read(end, 100).decode() for end in (here_says, there_says)]
    os.close(here_says)
    os.close(there_says)
    for pid, code in codes.items():
        assert code == 0 or pid == killed, (victim, said, codes)
    here, there = said
    assert here in ("", "source", "destination", "unknown", "complete"), said
    assert there in ("", "source", "nobody came", "incomplete", "complete"), said
    assert not (here == "source" and there in ("incomplete", "complete")), said
    assert not (here == "complete" and there not in ("complete", "")), said
    return f"{victim}: {here or 'killed'} / {there or 'killed'}"
seen = {}
end = time.monotonic() + SECONDS
turns = 0
while turns < 4 or time.monotonic() < end:
    result = round(("source", "destination")[turns %% 2])
    seen[result] = seen.get(result, 0) + 1
    turns += 1
say(f"{turns} rounds: {seen}")
"""


pytestmark = pytest.mark.skipif(matrix.filled_whole() or uffd.probe().mode != "full",
                                reason="no userfaultfd that serves the kernel's accesses")


@pytest.mark.deadline(120, per_stress_second=2)
def test_either_side_is_killed_at_any_moment():
    """Goal: whoever is left knows; never two owners; what it has is right, and what never came is no zeros."""
    seconds = stress_seconds()
    result = run_script(TEXT % min(seconds, 600.0), seconds + 60).check()
    print(result.stdout)
