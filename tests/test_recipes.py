"""Regions pickle as recipes, provider and options, never bytes: each process that gets one opens its own.

Each test is a script whose regions, one of every provider, travel to other processes by one way of many. The workers
tell who they are, what was there before they touched anything, and whether the bytes are right.
"""

import pytest
import uffd
from support import matrix
from support.scripts import run_script

PROVIDERS_IN_PYTHON = hasattr(uffd, "Provider")

BEGIN = """
import multiprocessing
NBYTES = 9 * BLOCK + 123

def function_of_main(offset, out):
    out[:] = pattern(offset, len(out))

if hasattr(uffd, "Provider"):
    class OfMain(uffd.Provider):
        nbytes = NBYTES
        def __init__(self, log):
            self.log = log
        def open(self):
            self.opened = open(self.log, "a")             # can't be pickled
            print(os.getpid(), os.getppid(), file=self.opened, flush=True)
        def read(self, offset, out):
            out[:] = pattern(offset, len(out))

def native():
    folder = os.path.abspath(".")
    pattern(0, NBYTES).tofile(folder + "/raw")
    yield "file", region(None, providers.File(folder + "/raw"), name="the file", block_bytes=2 * BLOCK)
    np.save(folder + "/a.npy", pattern(0, NBYTES))
    yield "npy", uffd.region_of(uffd.open(folder + "/a.npy"))
    try:
        import blosc2
    except ImportError:
        return
    uffd.pack(folder + "/a.npy", folder + "/a.b2frame")
    yield "packed", uffd.region_of(uffd.open(folder + "/a.b2frame"))

def in_python():
    from support import hosted
    yield "a class of a module", region(NBYTES, hosted.Pattern())
    yield "a function of a module", region(NBYTES, hosted.fill_pattern)
    yield "a class of main", region(None, OfMain(os.path.abspath("log")))
    yield "a function of main", region(NBYTES, function_of_main)
    try:
        import cloudpickle
    except ImportError:
        return
    first = 0
    def closure(offset, out):
        out[:] = pattern(first + offset, len(out))
    yield "a closure", region(NBYTES, closure)
    yield "a lambda", region(NBYTES, lambda offset, out: function_of_main(offset, out))

def regions():
    made = dict(native())
    if hasattr(uffd, "Provider"):
        made.update(in_python())
    for r in made.values():
        r.array()[:100] = 0                               # what was written here stays here
    return made

def check(name, r, parent):
    expected = pattern(0, NBYTES)
    touched = bool(r.resident().any()) and not r.engine.fills_whole
    a = r.array()[-NBYTES:]
    return name, os.getpid() != parent, touched, bool((a == expected).all())

def judge(answers, made):
    wrong = [answer for answer in answers if answer[1:] != (True, False, True)]
    assert not wrong, wrong
    assert sorted(answer[0] for answer in answers) == sorted(made), answers
    if os.path.exists("log"):
        hosts = [tuple(map(int, line.split())) for line in open("log")]
        assert len(set(hosts)) >= 2, hosts                # ours, and that of the worker
        if not made["file"].engine.fills_whole:
            assert (len({parent for _, parent in hosts}), hosts[0][1]) == (len(hosts), os.getpid()), hosts
    say(f"{len(answers)} recipes")
"""

WAYS = {
    "spawn": """
if __name__ == "__main__":
    made = regions()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        judge(pool.starmap(check, [(name, r, os.getpid()) for name, r in made.items()]), made)
        pool.close()
        pool.join()
""",
    "forkserver": """
if __name__ == "__main__":
    made = regions()
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        judge(pool.starmap(check, [(name, r, os.getpid()) for name, r in made.items()]), made)
        pool.close()
        pool.join()
""",
    "joblib": """
if __name__ == "__main__":
    import joblib
    made = regions()
    tasks = [joblib.delayed(check)(name, r, os.getpid()) for name, r in made.items()]
    judge(joblib.Parallel(n_jobs=2, backend="loky")(tasks), made)
""",
    "dask": """
if __name__ == "__main__":
    import dask
    made = regions()
    tasks = [dask.delayed(check)(name, r, os.getpid()) for name, r in made.items()]
    judge(dask.compute(*tasks, scheduler="processes", num_workers=1), made)
""",
    "cloudpickle": """
if __name__ == "__main__":
    import cloudpickle
    made = regions()
    with open("recipes", "wb") as file:
        file.write(cloudpickle.dumps([(check, name, r, os.getpid()) for name, r in made.items()]))
    assert os.path.getsize("recipes") < 30_000
    code = '''if True:
        import pickle
        answers = [check(*rest) for check, *rest in pickle.load(open("recipes", "rb"))]
        pickle.dump(answers, open("answers", "wb"))'''
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
    judge(pickle.load(open("answers", "rb")), made)
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_each_process_opens_its_own(way):
    """Goal: a worker of any kind gets the recipe and serves itself, with a provider host of its own, and sees no byte
    that was written elsewhere. Method: every provider, natives and such in Python, by each way to another process."""
    if way not in ("spawn", "forkserver"):
        pytest.importorskip(way)
    done = run_script(BEGIN + WAYS[way], 50, fresh=True).check()
    expected = 3 + (6 if PROVIDERS_IN_PYTHON else 0)
    if way == "cloudpickle":
        assert f"{expected} recipes" in done.stdout


@pytest.mark.skipif(not PROVIDERS_IN_PYTHON, reason="providers in Python are not there yet")
def test_a_recipe_is_small_and_made_of_what_was_given():
    """Goal: no byte of a region's memory is in its recipe, nor what its provider opened; the options are."""
    run_script(BEGIN + """
if __name__ == "__main__":
    for name, r in regions().items():
        r.populate()
        recipe = pickle.dumps(r)
        assert len(recipe) < 6000, (name, len(recipe))
        with pickle.loads(recipe) as again:
            assert (again.nbytes, again.name, again.mode, again.block_bytes, again.delivery, again.backing) == \\
                   (r.nbytes, r.name, r.mode, r.block_bytes, r.delivery, r.backing), name
            assert (again.array()[-NBYTES:] == pattern(0, NBYTES)).all(), name
""", 50, where=matrix.WHERES[-1], fresh=True).check()


@pytest.mark.skipif(not PROVIDERS_IN_PYTHON, reason="providers in Python are not there yet")
def test_what_cannot_travel_is_refused_where_it_is_pickled():
    """Goal: memory of this process, and what pickle can't take, are a TypeError here and not a failure there."""
    run_script("""
r = region(BLOCK, providers.Memory(bytes(BLOCK)))
for thing in (r, [r]):
    try:
        pickle.dumps(thing)
    except TypeError as error:
        assert "memory of this process" in str(error), error
    else:
        raise AssertionError("pickled")
try:
    region(BLOCK, lambda offset, out, file=open(os.devnull, "rb"): out.fill(1))
except TypeError as error:
    assert "file" in str(error), error
else:
    assert uffd.default_engine().fills_whole  # it never leaves this process there
""").check()
