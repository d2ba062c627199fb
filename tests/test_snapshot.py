"""Taking images while the program goes on: one instant under writers, all or nothing at the path, what is refused. What
the files hold is in test_snapshot_files.py."""

import os
import threading
import time

import numpy as np
import pytest
from support import matrix, shim
from support.scripts import finish_script, run_script, start_script, wait_for_line

import uffd
from uffd import snapshot
from uffd.snapshot import _methods

PAGE = uffd._core.PAGE_BYTES
METHODS = ["fork", "protect"]


@pytest.fixture(params=METHODS)
def method(request):
    why = request.param == "protect" and _methods.why_not_protect()
    if why:
        pytest.skip(f"method 'protect' {why}")
    return request.param


def bits(arrays):
    return {name: array.tobytes("A") for name, array in arrays.items()}


def test_the_image_is_the_state_at_the_call(tmp_path, method):
    """Goal: what np.save of the stopped program has, bit by bit, whatever is written after the call."""
    rng = np.random.default_rng(3)
    arrays = {"big": rng.random(1_000_000), "f": np.asfortranarray(rng.random((300, 200))), "small": np.arange(7),
              "bytes": np.frombuffer(bytearray(rng.bytes(100_001)), np.uint8)[3:]}
    np.save(tmp_path / "stopped.npy", arrays["big"])
    before = bits(arrays)
    called_ns = time.time_ns()
    taken = snapshot.take(arrays, tmp_path / "a", method=method)
    back_ns = time.time_ns()
    for array in arrays.values():
        array[...] = 0
    report = taken.wait(20)
    assert report.method == method and taken.done() and called_ns <= taken.instant_ns <= back_ns
    assert 0 < report.pause_ns < report.total_ns < 20e9
    found = snapshot.load(tmp_path / "a", lazy=False)
    assert bits(found) == before
    assert (found["big"] == np.load(tmp_path / "stopped.npy")).all()


def test_images_under_writers_hold_the_invariant(tmp_path, method):
    """Goal: every image is of one instant. Method: each writer counts up in the first array, then in the second and in
    a thousand small ones of the heap, round and round: at any instant a later one is at most one behind an earlier."""
    small = [np.zeros(640, np.int64) for _ in range(100)]
    arrays = {"first": np.zeros(300_000, np.int64), "second": np.zeros(300_000, np.int64),
              **{f"s{number:03}": array for number, array in enumerate(small)}}
    stop = threading.Event()

    def write(lane):
        rows = [array[lane::2] for array in arrays.values()]
        step = 0
        while not stop.is_set():
            step += 1
            for row in rows:
                row[...] = step
            _ = [bytearray(5000) for _ in range(20)]             # a busy allocator beside it

    threads = [threading.Thread(target=write, args=(lane,)) for lane in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        for number in range(6):
            time.sleep(0.01)
            snapshot.take(arrays, tmp_path / f"{number}", method=method).wait(30)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for number in range(6):
        found = list(snapshot.load(tmp_path / f"{number}", lazy=False).values())
        for lane in (0, 1):
            steps = np.concatenate([array[lane::2] for array in found])
            assert (np.diff(steps) <= 0).all() and steps[0] - steps[-1] <= 1


def test_a_series_of_images(tmp_path, method):
    """Goal: each image of a series is the state at its call, and the later ones hold what was written alone."""
    rng = np.random.default_rng(5)
    arrays = {"a": rng.random(2_000_000), "b": np.zeros(200_000)}
    last = snapshot.take(arrays, tmp_path / "0", method=method, base=snapshot.FIRST)
    whole = last.wait(20)
    states = [bits(arrays)]
    for number in range(1, 5):
        arrays["a"][number * 10_000:number * 10_000 + 20_000] = number
        arrays["b"][rng.integers(0, 200_000, 3)] = number
        states.append(bits(arrays))
        last = snapshot.take(arrays, tmp_path / f"{number}", method=method, base=last)
        report = last.wait(20)
        assert report.data_bytes <= 0.05 * whole.data_bytes and report.file_bytes <= 0.05 * whole.file_bytes
    for number, state in enumerate(states):
        assert bits(snapshot.load(tmp_path / f"{number}", lazy=False)) == state


def test_regions_are_imaged_with_what_is_not_resident(tmp_path, method):
    """Goal: missing, evicted and written blocks of a region are all there."""
    source = np.random.default_rng(1).integers(0, 255, 4 << 20).astype(np.uint8)
    with uffd.Engine(workers=2) as engine:
        region = uffd.Region(None, uffd.providers.Memory(source), engine=engine)
        array = region.array()
        array[:100] = 7
        array[1 << 20] = 8
        region.evict((1 << 20, 2 << 20))
        expected = source.copy()
        expected[:100], expected[1 << 20] = 7, 8
        taken = snapshot.take({"r": array}, tmp_path / "a", method=method)
        array[200:300] = 9
        taken.wait(20)
        assert region.resident().sum() < 40
        del array
        region.close()
    assert (snapshot.load(tmp_path / "a", lazy=False)["r"] == expected).all()


def test_a_huge_region_costs_what_was_written(tmp_path, method):
    with uffd.Engine(workers=2) as engine:
        array = uffd.zeros(1 << 30, engine=engine)
        array[[3, 1 << 29]] = 1, 2
        report = snapshot.take(array, tmp_path / "z", method=method).wait(30)
        uffd.region_of(array).discard()
        del array
    assert report.nbytes == 8 << 30 and report.disk_bytes < 1 << 20
    found = snapshot.load(tmp_path / "z")["array"]
    assert (found[3], found[1 << 29], found[1 << 28]) == (1, 2, 0)


def test_memory_that_a_fork_can_not_image_is_refused(tmp_path):
    """Goal: shared memory and a store that goes on changing are refused by fork, with the cure."""
    with uffd.Engine(workers=2) as engine:
        np.zeros(1 << 16, np.uint8).tofile(tmp_path / "f")
        writes = uffd.Region(None, uffd.providers.File(tmp_path / "f", writable=True), engine=engine)
        shared = uffd.Region(1 << 20, engine=engine, backing="shared")
        for region, words in ((writes, "mode 'r\\+'"), (shared, "shared memory")):
            with pytest.raises(uffd.SnapshotError, match=f"{words}.*protect"):
                snapshot.take(region.array(), tmp_path / "x", method="fork")
            region.close()
    assert not (tmp_path / "x").exists()


def test_protect_says_what_it_needs(tmp_path):
    why = _methods.why_not_protect()
    if why:
        with pytest.raises(uffd.Unavailable, match="fork"):
            snapshot.take(np.zeros(9), tmp_path / "x", method="protect")
        assert snapshot.take(np.zeros(9), tmp_path / "x").wait(10).method == "fork"
    elif matrix.full_mode():
        assert snapshot.take(np.zeros(9), tmp_path / "x").wait(10).method == "protect"


def test_auto_forks_where_protection_is_not_to_be_had(tmp_path):
    """Goal: memory that another image has, and regions served inline, are imaged all the same, by fork; by "protect"
    they are refused with the reason; and the series that had the memory loses no write by that."""
    if _methods.why_not_protect():
        pytest.skip("no protection here at all")
    array = np.ones(2_000_000)
    with uffd.Engine(workers=2) as engine:
        inline = uffd.Region(1 << 20, engine=engine, delivery="inline")
        inline.array()[:] = 5
        assert snapshot.take(inline.array(), tmp_path / "i").wait(20).method == "fork"
        assert (snapshot.load(tmp_path / "i", lazy=False)["array"] == 5).all()
        inline.close()
    first = snapshot.take(array, tmp_path / "0", base=snapshot.FIRST)
    assert first.wait(20).method == "protect"            # it keeps its protection
    assert snapshot.take(array, tmp_path / "1").wait(20).method == "fork"
    with pytest.raises(ValueError, match="another userfaultfd"):
        snapshot.take(array, tmp_path / "2", method="protect")
    array[7] = 3
    last = snapshot.take(array, tmp_path / "3", base=first)
    assert last.wait(20).method == "protect" and last.wait().data_bytes == PAGE
    assert (snapshot.load(tmp_path / "3", lazy=False)["array"] == array).all()


# ---- ends


def test_cancel_leaves_what_was_there(tmp_path, method):
    (tmp_path / "a").write_text("old")
    array = np.ones(8_000_000)
    taken = snapshot.take(array, tmp_path / "a", method=method)
    taken.cancel()
    taken.cancel()
    array[:] = 2
    if taken._report is None:                                    # it may have been faster
        with pytest.raises(uffd.SnapshotError, match="cancelled"):
            taken.wait()
        assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_progress_is_told_and_its_error_ends_the_image(tmp_path, method):
    seen = []
    snapshot.take(np.ones(3_000_000), tmp_path / "a", method=method, progress=lambda *n: seen.append(n)).wait(20)
    assert seen and seen[-1][0] == seen[-1][1]

    taken = []

    def cancels(done, total):
        while not taken:
            time.sleep(0.001)
        taken[0].cancel()

    taken.append(snapshot.take(np.ones(10), tmp_path / "c", method=method, progress=cancels))
    with pytest.raises(uffd.SnapshotError, match="cancelled"):
        taken[0].wait(20)

    def fails(done, total):
        raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match="user's own"):
        snapshot.take(np.ones(10), tmp_path / "b", method=method, progress=fails).wait(20)
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_ends_the_image_and_not_the_program(method):
    """Goal: SnapshotError that says why, the path as it was, the writers run on. Method: a limit on the file's size,
    met in the midst since the file is not made as long as it will be."""
    run_script(f"""
        from uffd import snapshot
        folder = tempfile.mkdtemp()
        path = folder + "/a"
        open(path, "w").write("old")
        array = np.ones(4_000_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, resource.RLIM_INFINITY))
        truncate, os.ftruncate = os.ftruncate, lambda fd, n: None
        taken = snapshot.take(array, path, method={method!r})
        array[:] = 2
        try:
            taken.wait(15)
        except uffd.SnapshotError as error:
            assert "too large" in str(error), error
        else:
            raise AssertionError("no error")
        array[:] = 3
        assert open(path).read() == "old" and os.listdir(folder) == ["a"]
        os.ftruncate = truncate
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        snapshot.take(array, path, method={method!r}).wait(15)
        assert (snapshot.load(path)["array"] == 3).all()
    """).check()


def test_the_child_may_be_killed(tmp_path):
    """Goal: a SIGKILL of the writing child is an error by name; the program goes on."""
    done = run_script("""
        from uffd import snapshot
        path = tempfile.mkdtemp() + "/a"
        array = np.ones(20_000_000)
        taken = snapshot.take(array, path, method="fork")
        children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        try:
            taken.wait(15)
        except uffd.SnapshotError as error:
            say(str(error))
        snapshot.take(array[:10], path, method="fork").wait(15)
    """)
    done.check()
    assert "signal 9" in done.stdout


def test_sigkill_leaves_no_partial_file(method):
    """Goal: whenever the program is killed, its path has the old image or the new one, whole, and the child ends."""
    script = """
        import itertools
        from uffd import snapshot
        arrays = {"a": np.zeros(500_000), "b": np.zeros(500_000)}
        for step in itertools.count(1):
            arrays["a"][:] = step
            arrays["b"][:] = step
            snapshot.take(arrays, "a", method=sys.argv[1]).wait(15)
            say(f"step {step}")
    """
    for number in range(4):
        process = start_script(script, argv=[method])
        wait_for_line(process, "step 2")
        time.sleep(0.007 * number)
        process.send_signal(9)
        finish_script(process)
        found = snapshot.load(process.directory / "a", lazy=False)
        assert found["a"][0] >= 2 and (found["a"] == found["a"][0]).all() and (found["b"] == found["a"][0]).all()
        assert snapshot.verify(process.directory / "a")


def test_another_process_restores_it(tmp_path, method):
    array = np.random.default_rng(2).random(300_000)
    snapshot.take({"x": array}, tmp_path / "a", method=method).wait(20)
    done = run_script("""
        from uffd import snapshot
        arrays = snapshot.load(sys.argv[1])
        say(repr(float(arrays["x"][::1000].sum())))
        arrays["x"][5] = 1
        assert arrays.save_working_set() > 0
    """, argv=[tmp_path / "a"])
    done.check()
    assert float(done.stdout) == float(array[::1000].sum())
    assert snapshot.info(tmp_path / "a").working_set > 0


def test_two_at_once_and_a_fork_meanwhile(tmp_path):
    """Goal: images beside each other are both right; in a forked child they are the parent's, and nothing is lost."""
    run_script("""
        from uffd import snapshot
        path = tempfile.mkdtemp()
        arrays = {"a": np.arange(3_000_000)}
        one = snapshot.take(arrays, path + "/1", method="fork")
        arrays["a"][:] += 1
        two = snapshot.take(arrays, path + "/2", method="fork")

        def child():
            assert one.done()
            one.cancel()
            try:
                one.wait()
            except uffd.SnapshotError as error:
                assert "fork" in str(error)
            else:
                raise AssertionError("the child waited")

        assert in_child(child) == 0
        one.wait(15), two.wait(15)
        assert (snapshot.load(path + "/2", lazy=False)["a"] - snapshot.load(path + "/1", lazy=False)["a"] == 1).all()
    """).check()


def test_ctrl_c_does_not_reach_the_child():
    """Goal: SIGINT to the whole group interrupts the program's wait, and not the image; a normal exit waits for it."""
    process = start_script("""
        from uffd import snapshot
        array = np.ones(30_000_000)
        taken = snapshot.take(array, "a", method="fork")
        say("taken")
        try:
            taken.wait()
            time.sleep(20)
        except KeyboardInterrupt:
            say("interrupted")
    """, fresh=True)
    wait_for_line(process, "taken")
    os.killpg(process.pid, 2)
    finish_script(process).check()
    assert (snapshot.load(process.directory / "a", lazy=False)["array"] == 1).all()


def test_giving_up_does_not_wait_for_the_disk():
    """Goal: the thread that has the disk begin asks it for a few MiB at once, and for nothing more once that is over:
    such a call can't be interrupted, and an image may be larger than what the disk does in an hour."""
    run_script("""
from support import shim
file = tempfile.TemporaryFile()
os.truncate(file.fileno(), 64 << 20)
rule = shim.Rule("sync_file_range", 1, 0)
uffd._core.write_out(file.fileno(), bytearray(b"\\1"))
assert rule.calls == 0
uffd._core.write_out(file.fileno(), bytearray(1))
assert rule.calls >= 4, rule.calls
""", preload=shim.path()).check()
