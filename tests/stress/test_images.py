"""Images and trackers under everything at once: the sum holds in every image, copies by tracked pages equal the array.

Writers move amounts between regions (with a budget far below their size), heap arrays and arrays with holes, while
images are taken one after the other, alone and in series, aborted, and beside trackers, evictions and forks.
"""

import pytest
from support import matrix
from support.pattern import stress_seconds
from support.scripts import run_script

pytestmark = pytest.mark.skipif(matrix.filled_whole() or not matrix.full_mode(),
                                reason="no full userfaultfd: images are made by fork")

IMAGES = """
rng = seeded("images")
seconds, STEP = float(sys.argv[1]), 1024
engine = uffd.Engine(workers=2, budget_bytes=3 << 20)
sizes = [1 << 18, 1 << 18, 1 << 17, 1 << 19]
regions = [uffd.Region(8 * sizes[0], providers.Zero(), engine=engine, mode="c", delivery="thread",
                       backing=rng.choice(["anon", "shared"]), block_bytes=rng.choice([PAGE, 16 * PAGE, 64 * PAGE]))
           for _ in range(2)]
arrays = [r.array("<i8") for r in regions]
arrays += [np.ones(sizes[2], "<i8") - 1, np.zeros(sizes[3], "<i8")]
stop, lock, errors, turns = threading.Event(), threading.Lock(), [], [0]
def move(seed):
    own = np.random.default_rng(seed)
    while not stop.is_set():
        one, other = own.integers(0, 4, 2)
        i, j = (int(own.integers(0, sizes[k] - STEP)) for k in (one, other))
        with lock:
            np.subtract(arrays[one][i:i + STEP], 1, out=arrays[one][i:i + STEP])
            np.add(arrays[other][j:j + STEP], 1, out=arrays[other][j:j + STEP])
            turns[0] += 1
def disturb():
    while not stop.is_set():
        r = regions[rng.randrange(2)]
        at = rng.randrange(r.nbytes)
        r.evict((at, min(r.nbytes, at + (1 << 18))))
        r.prefetch((at, min(r.nbytes, at + (1 << 16))))
        stop.wait(0.002)
def follow():
    try:
        with uffd.track(arrays[0]) as tracker:
            copy = arrays[0].copy()
            while not errors:
                last = stop.is_set() and not any(t.is_alive() for t in writers)
                for start, end in tracker.ranges():
                    copy.view("u1")[start:end] = arrays[0].view("u1")[start:end]
                if last:
                    assert (copy == arrays[0]).all(), "a write was lost"
                    return
                stop.wait(0.01)
    except BaseException:
        import traceback
        errors.append(traceback.format_exc())
writers = [threading.Thread(target=move, args=(rng.randrange(1 << 30),), daemon=True) for _ in range(2)]
others = [threading.Thread(target=disturb, daemon=True), threading.Thread(target=follow, daemon=True)]
for thread in writers + others:
    thread.start()
ranges, at = [], 0
for array in arrays:
    ranges.append((array, at))
    at += array.nbytes
fd = os.open("image", os.O_RDWR | os.O_CREAT)
shadow, previous, images, end = None, None, 0, time.monotonic() + seconds
while time.monotonic() < end and not errors:
    keep = rng.random() < 0.6
    if previous is None:
        os.truncate(fd, 0)                  # what is not written is zero
        os.truncate(fd, at)
    image = uffd._core.Imager(ranges, fd, memory_limit_bytes=rng.choice([1 << 18, 1 << 20, 8 << 20]), keep=keep,
                              previous=previous)
    image.start()
    if rng.random() < 0.1:
        time.sleep(rng.random() * 0.01)
        image.abort()
        image.close()
        previous = None
        continue
    if rng.random() < 0.1:
        assert in_child(lambda: arrays[2].fill(1), 20) == 0
    assert image.wait(30)
    total = int(np.fromfile("image", "<i8").sum())
    assert -STEP <= total <= 0, (images, total, image.stats(), keep)
    image.finish()
    images += 1
    previous = image if keep else None
    if not keep:
        image.close()
if previous is not None:
    previous.close()
stop.set()
for thread in writers + others:
    thread.join(30)
    assert not thread.is_alive(), "a thread is left waiting"
assert not errors, errors[0]
assert sum(int(a.sum()) for a in arrays) == 0
say(f"{images} images, {turns[0]} moves")
assert images > 2 and turns[0] > 10
"""


@pytest.mark.deadline(60, per_stress_second=2)
def test_sums_hold_and_no_write_is_lost_whatever_goes_on():
    result = run_script(IMAGES, deadline_s=50 + 2 * stress_seconds(), argv=[str(stress_seconds())])
    print(result.check().stdout)
