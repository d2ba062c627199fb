"""Provider hosts that are killed again and again under load: 1,000 times in `make stress`. A shadow decides."""

import os

import pytest
from support import matrix
from support.pattern import stress_seconds
from support.scripts import run_script

KILLS = int(os.environ.get("UFFD_STRESS_KILLS") or 1000 * min(1.0, stress_seconds() / 120))
KILLS_EACH = max(4, KILLS // len(matrix.WHERES))
SECONDS = 60 + 1.5 * KILLS_EACH  # a start takes 0.1 s on a quiet machine; what takes this long hangs

SCRIPT = """
from support import hosted
from support.hosted_writers import Store
rng = seeded("hosts are killed")
engine = uffd.Engine(hosts=2)
blocks, stop, wrong, done, kills = 64, [], [], [0, 0], 0
right = pattern(0, blocks * BLOCK)

def read():
    "Regions one after the other: touched in any order, populated, compared byte by byte."
    mine = np.random.default_rng(rng.randrange(1 << 30))
    while not stop:
        with region(blocks * BLOCK, hosted.Pattern(blocks * BLOCK, concurrency=4), engine=engine, retries=10000) as r:
            a = r.array()
            for b in mine.permutation(blocks):
                piece = slice(b * BLOCK, (b + 1) * BLOCK)
                if not (a[piece] == right[piece]).all():
                    wrong.append(int(b))
                done[0] += 1
                if stop or b == 0:
                    break
            r.populate()
            if not (a == right).all():
                wrong.append("whole")
            del a

def write():
    "Numbered contents, one block after the other; what was acknowledged last must be in the file."
    with region(blocks * BLOCK, Store("store", blocks * BLOCK), engine=engine, retries=10000) as r:
        last, number = {}, 0
        while not stop:
            number += 1
            b = number % blocks
            found, _, text = uffd._core._host_store(r, b * BLOCK, pattern(number, BLOCK).tobytes())
            if found:
                wrong.append(text)
            last[b] = number
            done[1] += 1
        with open("store", "rb") as file:
            for b, number in last.items():
                file.seek(b * BLOCK)
                if file.read(BLOCK) != pattern(number, BLOCK).tobytes():
                    wrong.append(f"stored {b}")

def guarded(work):
    try:
        work()
    except BaseException as error:
        wrong.append(repr(error))

threads = [threading.Thread(target=guarded, args=(work,)) for work in (read, read, write)]
for thread in threads:
    thread.start()
while kills < int(sys.argv[1]) and not wrong:
    before, patience = list(done), time.monotonic() + 20
    while (done[0] == before[0] or done[1] == before[1]) and not wrong:
        assert time.monotonic() < patience, f"nothing goes on after {kills} kills: {before}"
        time.sleep(0.002)
    time.sleep(rng.random() * rng.choice([0, 0.02, 0.1]))
    for pid in engine._threads.host_pids():
        try:
            os.kill(pid, signal.SIGKILL)
            kills += 1
        except ProcessLookupError:
            pass
stop.append(1)
for thread in threads:
    thread.join()
assert not wrong, wrong[:5]
engine.close()
say(f"{kills} kills, {done[0]} blocks read, {done[1]} written")
"""


@pytest.mark.deadline(2 * SECONDS)
def test_hosts_are_killed(where):
    """Goal: whatever moment a host is killed at, every byte read is right, every acknowledged write is stored, and all
    ends. Method: two threads read regions, one writes, and each time both went on all hosts are killed."""
    print(run_script(SCRIPT, SECONDS, where=where, argv=[str(KILLS_EACH)]).check().stdout)
