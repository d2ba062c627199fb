"""SIGKILL at each step by which an image gets to its path: the old image is there, or the new one, whole."""

from support.scripts import run_script

from uffd import snapshot

SCRIPT = """
    from uffd import snapshot
    os.chdir(tempfile.mkdtemp())
    say(os.getcwd())
    base, number = {"whole": None, "incremental": "base"}[sys.argv[1]], int(sys.argv[2])
    arrays = {"a": np.full(50_000, 1.0), "b": np.arange(9)}
    snapshot.take(arrays, "base", method="fork").wait(15)
    snapshot.take(arrays, "a", method="fork").wait(15)
    arrays["a"][:] = 2
    steps = 0

    def dying(name, function):
        def call(*arguments, **options):
            global steps
            steps += 1
            if steps == number:
                os.kill(os.getpid(), 9)
            return function(*arguments, **options)
        setattr(os, name, call)

    for name in ("ftruncate", "pwrite", "fsync", "link", "rename"):
        dying(name, getattr(os, name))
    snapshot.take(arrays, "a", base=base, method="fork").wait(15)
    say("whole")
"""


def test_each_step_leaves_the_old_image_or_the_new():
    """Goal: nothing in between, nothing lost. Method: the process kills itself at its n-th call of those that write,
    until a run comes to its end."""
    for kind in ("whole", "incremental"):
        seen, number, done = set(), 0, None
        while done is None or done.signal is not None:
            number += 1
            assert number < 40
            done = run_script(SCRIPT, argv=[kind, number])
            folder = done.stdout.splitlines()[0]
            found = snapshot.load(f"{folder}/a", lazy=False)["a"]
            assert len(set(found.tolist())) == 1
            assert snapshot.verify(f"{folder}/a") > 0
            seen.add(found[0])
        assert done.check().stdout.endswith("whole\n") and seen == {1.0, 2.0} and number > 6
