"""How a provider in Python gets into another process: what travels, what is refused, and in which words."""

import ctypes
import functools
import importlib.util
import io
import linecache
import os
import pickle
import re
import socket
import subprocess
import sys
import textwrap
import threading
import types

import numpy as np
import pytest
import uffd
from support.fakehost import BLOCK_BYTES, FakeEngine, Failed
from support.fakeproviders import BreaksWhenLoaded, Scaled, fill_three
from support.hosted import Pattern, fill_pattern
from support.pattern import pattern
from support.scripts import python_path
from uffd import _hosting
from uffd.providers import hosted

needs_cloudpickle = pytest.mark.skipif(importlib.util.find_spec("cloudpickle") is None, reason="needs cloudpickle")


@pytest.fixture(scope="module")
def host():
    with FakeEngine() as engine:
        yield engine


@pytest.fixture
def no_cloudpickle(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)


def pickled(thing):
    return hosted.pickled(hosted.as_provider(thing))


def read_elsewhere(host, thing):
    return host.read(host.session(thing))


# ---- what travels


@needs_cloudpickle
def test_things_of_all_kinds_travel(host):
    """Goal: instances, functions, lambdas, closures, partials and bound methods read the same in another process."""
    seven, values = 7, np.arange(100, dtype=np.uint8)

    class Local(Scaled):
        pass

    def closure(offset, out):
        out[:] = seven + values[1]

    for thing, value in ((Scaled(5), 5), (Scaled(4).method, 8), (functools.partial(fill_three, 2), 6), (closure, 8),
                         (lambda offset, out: out.fill(seven), 7), (Local(9), 9),
                         (functools.partial(lambda three, offset, out: out.fill(three), 3), 3)):
        assert set(read_elsewhere(host, thing)) == {value}


def test_without_cloudpickle_what_has_a_name_travels(host, no_cloudpickle):
    """Goal: the standard pickle is enough for classes and functions of a module, and what is made of them."""
    for thing, value in ((Scaled(5), 5), (Scaled(4).method, 8), (functools.partial(fill_three, 2), 6)):
        assert set(read_elsewhere(host, thing)) == {value}
    assert np.array_equal(read_elsewhere(host, fill_pattern), pattern(0, BLOCK_BYTES))


@needs_cloudpickle
def test_recipes_take_along_what_is_found_nowhere_else(tmp_path, monkeypatch):
    """Goal: with a region's recipe, too, code of a module that another process would not find travels by value."""
    module = types.ModuleType("found_nowhere")
    monkeypatch.setitem(sys.modules, "found_nowhere", module)
    exec("import uffd\n\nclass Five(uffd.Provider):\n    def read(self, offset, out):\n        out[:] = 5",
         vars(module))
    (tmp_path / "recipe").write_bytes(pickle.dumps(_hosting.Portable(module.Five()), protocol=5))
    program = ("import pickle, numpy as np; out = np.zeros(9, 'u1'); "
               "pickle.load(open('recipe', 'rb')).read(0, out); assert set(out) == {5}")
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("thing", [fill_pattern, functools.partial(fill_three, 2), Scaled(5)],
                         ids=["function", "partial", "instance"])
def test_recipes_give_back_what_was_given(thing):
    """Goal: a function comes out of a recipe as that function."""
    again = pickle.loads(pickle.dumps(_hosting.Portable(thing), protocol=5))
    assert type(again) is type(thing)


RECIPES = [
    (lambda: io.TextIOWrapper(io.BytesIO()), TypeError, "an open file belongs to this process"),
    (lambda: ctypes.CDLL(None), TypeError, "a loaded library belongs to this process"),
    (lambda: np.zeros(65 << 20, np.uint8), ValueError, "more than 64 MiB: it captured an array of 68157440 items"),
    (lambda: threading.Lock(), TypeError, "self.factor is a lock"),
]


@pytest.mark.parametrize(("make", "kind", "words"), RECIPES, ids=["file", "library", "array", "lock"])
def test_recipes_refuse_what_a_host_would(make, kind, words):
    """Goal: what could only fail later, or be something else there, is refused where the recipe is made."""
    with pytest.raises(kind, match=re.escape(words)):
        pickle.dumps(_hosting.Portable(Scaled(make())))


def test_nothing_is_unpickled_here(host):
    """Goal: a provider that can't be unpickled is pickled all the same; the host says what is wrong."""
    session = host.session(BreaksWhenLoaded())
    with pytest.raises(Failed) as caught:
        host.open(session)
    assert "ValueError: can't be had again. Keep in the instance" in caught.value.text.splitlines()[-1]


def test_what_goes_along(tmp_path, monkeypatch):
    """Goal: the host is told where modules are found, the directory and the arguments; an empty entry of sys.path is
    the directory of now."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *sys.path])
    monkeypatch.setattr("sys.argv", ["a", "b"])
    header, data = hosted.unpacked(hosted.pickled(Pattern()))
    assert header["path"] == [str(tmp_path), *sys.path[1:]]
    assert (header["cwd"], header["argv"]) == (str(tmp_path), ["a", "b"])
    assert len(data) < 1000


def module_from(path, name, text):
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@needs_cloudpickle
@pytest.mark.parametrize("name", ["uffd_test_nowhere", "uffd_test_parent.child", "json"])
def test_modules_that_only_this_process_has(host, tmp_path, monkeypatch, name):
    """Goal: a provider of a module that another process would not find, or would find another in its place (tests run
    by path, plug-ins), travels with its code. cloudpickle's registry is as before."""
    import cloudpickle

    monkeypatch.setitem(sys.modules, name, None)
    module = module_from(tmp_path / "some_file.py", name, textwrap.dedent("""
        import uffd
        def helper():
            return 11
        class Mine(uffd.Provider):
            def read(self, offset, out):
                out[:] = helper()
    """))
    if name == "json":                           # a module of the standard library is never taken along
        with pytest.raises(Failed, match="Mine"):
            host.open(host.session(module.Mine()))
    else:
        assert set(read_elsewhere(host, module.Mine())) == {11}
    assert name not in cloudpickle.list_registry_pickle_by_value()


@needs_cloudpickle
def test_tracebacks_name_file_and_line(host, tmp_path):
    """Goal: an error in code that travelled names its file, and shows the line; that of a notebook's cell, too.
    Method: a file that exists, and a name that only linecache knows, as IPython has it."""
    source = "def fails(offset, out):\n    raise ValueError('in the cell')  # here\n"
    scope = {"__name__": "__main__"}
    name = "<cell 12>"
    exec(compile(source, name, "exec"), scope)
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name

    def fails_here(offset, out):
        raise ValueError("in the file")  # in this line

    for thing, file, line in ((scope["fails"], name, "# here"), (fails_here, __file__, "# in this line")):
        with pytest.raises(Failed) as caught:
            read_elsewhere(host, thing)
        assert f'File "{file}", line ' in caught.value.text and line in caught.value.text
    del linecache.cache[name]


# ---- what does not


def open_file():
    return open(os.devnull, "rb")


def open_text():
    return open(os.devnull)


HELD = {
    "a file": (open_file, "an open file ('/dev/null')"),
    "a text file": (open_text, "an open file ('/dev/null')"),
    "a lock": (threading.Lock, "a lock"),
    "a socket": (socket.socket, "a socket.socket"),
    "a generator": (lambda: (number for number in range(3)), "a generator"),
    "a pointer": (lambda: ctypes.pointer(ctypes.c_int(1)), "a ctypes object (LP_c_int)"),
    "a library": (lambda: ctypes.CDLL(None), "a ctypes object (CDLL)"),
    "a thread": (lambda: threading.Thread(target=print), "a lock"),
    "a view": (lambda: memoryview(bytearray(3)), "memoryview"),
}


class Holder(uffd.Provider):
    def __init__(self, held):
        self.parts = {"some": [1, held]}

    def read(self, offset, out):
        out[:] = 1


@pytest.mark.parametrize("kind", HELD)
def test_what_belongs_to_this_process_is_refused(kind, no_cloudpickle):
    """Goal: the part of an instance that can't travel is named, by its place, with the cure."""
    make, words = HELD[kind]
    held = make()
    with pytest.raises(TypeError) as caught:
        hosted.pickled(Holder(held))
    assert "self.parts['some'][1]" in str(caught.value) and words in str(caught.value)
    assert "open the rest in open()" in str(caught.value)
    if isinstance(held, (io.IOBase, socket.socket)):         # a library has a function of that name
        held.close()


@needs_cloudpickle
@pytest.mark.parametrize("kind", [kind for kind in HELD if kind != "a view"])
def test_what_a_function_captured_is_refused(kind):
    """Goal: the same for the variables of a function; cloudpickle would take the text of an open file along."""
    make, words = HELD[kind]
    held = make()
    with pytest.raises(TypeError) as caught:
        pickled(lambda offset, out: held)
    assert "the variable 'held'" in str(caught.value) and words in str(caught.value)
    assert "a class derived from uffd.Provider" in str(caught.value)
    if isinstance(held, (io.IOBase, socket.socket)):         # a library has a function of that name
        held.close()


@needs_cloudpickle
def test_arguments_of_a_partial_are_named():
    """Goal: the parts of a partial and of a bound method have names of their own."""
    with pytest.raises(TypeError, match="argument 0 of the partial is a lock"):
        pickled(functools.partial(fill_three, threading.Lock()))
    with pytest.raises(TypeError, match=r"self\.factor is a lock"):
        pickled(Scaled(threading.Lock()).method)


def test_without_cloudpickle_the_cure_is_named(no_cloudpickle):
    """Goal: lambdas, local functions and local classes are refused with the name of the extra."""
    class Local(Scaled):
        pass

    def local(offset, out):
        out[:] = 1

    for thing in (lambda offset, out: None, local, Local(), functools.partial(lambda a, b, c: None, 1)):
        with pytest.raises(TypeError, match=r'pip install "pyuffd\[callback\]"'):
            pickled(thing)


def sparse_file(path, nbytes):
    with open(path, "wb") as file:
        file.truncate(nbytes)
    return path


TOO_LARGE = {
    "array": (lambda path: np.zeros((9, 1 << 20)), "an array of shape (9, 1048576), 75497472 bytes"),
    "map": (lambda path: np.memmap(sparse_file(path, 1 << 36), np.uint8, "r"),
            "an array of 68719476736 items, 68719476736 bytes"),
    "bytes": (lambda path: bytes(65 << 20), "a buffer, 68157440 bytes"),
    "bytearray": (lambda path: bytearray(65 << 20), "a buffer, 68157440 bytes"),
    "several arrays": (lambda path: [np.zeros(1 << 20) + at for at in range(9)], "an array of 1048576 items, 8388608"),
    "many": (lambda path: [bytes([at]) * (1 << 20) for at in range(70)], "64 MiB. Save that to a file"),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_more_than_64_mib_is_refused(kind, tmp_path):
    """Goal: a provider that captured data is a ValueError that names the array, its size and the cure.
    Method: one of them is a map of 64 GiB: nothing of it is read."""
    make, words = TOO_LARGE[kind]
    held = make(tmp_path / "large")
    with pytest.raises(ValueError) as caught:
        pickled(Scaled(held))
    assert words in str(caught.value) and "uffd.providers.Memory" in str(caught.value)


@needs_cloudpickle
def test_a_captured_region(engine, where):
    """Goal: a region over a native provider travels as its recipe; one over a provider in Python is refused."""
    native = uffd.Region(1 << 20, uffd.providers.Zero(), engine=engine, **where.options)
    python = uffd.Region(1 << 20, fill_pattern, engine=engine, **where.options)
    try:
        assert len(pickled(lambda offset, out: native)) < 10000
        with pytest.raises(TypeError, match="the variable 'python' is the region 'fill_pattern'"):
            pickled(lambda offset, out: python)
    finally:
        native.close()
        python.close()


def test_in_a_host_it_is_refused(monkeypatch):
    """Goal: a host starts no hosts of its own."""
    monkeypatch.setattr(hosted, "_in_host", True)
    with pytest.raises(RuntimeError, match="a provider host starts no hosts"):
        pickled(Pattern())


# ---- what can be a provider


async def coroutine(offset, out):
    pass


def generator(offset, out):
    yield


class NoRead(uffd.Provider):
    pass


class AsyncRead(uffd.Provider):
    async def read(self, offset, out):
        pass


class AsyncCall:
    async def __call__(self, offset, out):
        pass


REFUSED = [
    (Scaled, "is a class: give an instance"),
    (ctypes.CDLL(None).getpid, r"is compiled: give uffd.providers.Native\(getpid\)"),
    (coroutine, "an async function or a generator"),
    (generator, "an async function or a generator"),
    (AsyncCall(), "an async function or a generator"),
    (functools.partial(coroutine), "an async function or a generator"),
    (NoRead(), "has no method read"),
    (AsyncRead(), "async def"),
    (lambda offset: None, r"can't be called as f\(offset, out\)"),
    (lambda offset, out, more: None, r"can't be called as f\(offset, out\)"),
    (lambda *, offset, out: None, r"can't be called as f\(offset, out\)"),
]


@pytest.mark.parametrize(("thing", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_can_not_be_called_is_refused(thing, words):
    """Goal: what looks like a provider and would fail at each read is a TypeError at once."""
    with pytest.raises(TypeError, match=words):
        hosted.as_provider(thing)


def test_what_is_no_provider():
    """Goal: None for what is neither an instance nor callable."""
    assert [hosted.as_provider(thing) for thing in (None, 3, b"abc", np.zeros(3), uffd.providers.Zero())] == [None] * 5


def test_what_is_one():
    """Goal: an instance is itself; callables of all kinds are taken, builtins without a signature, too."""
    provider = Pattern()
    assert hosted.as_provider(provider) is provider
    for thing in (fill_pattern, provider.read, functools.partial(fill_three, 1), np.copyto,
                  lambda *anything: None):
        assert isinstance(hosted.as_provider(thing), hosted.FunctionProvider)
    assert hosted.title(hosted.as_provider(functools.partial(fill_three, 1))) == "fill_three"


# ---- the main module


SCRIPT = """
import sys
{head}
import uffd
from uffd import _hosting
from uffd.providers import hosted

{definition}

def try_it(thing):
    import subprocess
    try:
        data = hosted.pickled(hosted.as_provider(thing))
    except TypeError as error:
        print("refused:", error)
        return
    done = subprocess.run([*_hosting.command()[0][:-2], b"--load"], input=data, capture_output=True)
    print("loaded" if done.returncode == 0 else done.stderr.decode())

{tail}
"""
WITHOUT = 'sys.modules["cloudpickle"] = None'
FUNCTION = "def fill(offset, out):\n    out[:] = 1"
GUARDED = 'if __name__ == "__main__":\n    try_it(fill)'
UNGUARDED = "try_it(fill)"
INSIDE = f'if __name__ == "__main__":\n{textwrap.indent(FUNCTION, "    ")}\n    try_it(fill)'
SPAWNED = """
def in_child():
    try_it(fill)
if __name__ == "__main__":
    import multiprocessing
    child = multiprocessing.get_context("spawn").Process(target=in_child)
    child.start()
    child.join()
"""


def script(head="", definition=FUNCTION, tail=GUARDED):
    return SCRIPT.format(head=head, definition=definition, tail=tail)


def run(arguments, cwd, stdin=None):
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=50,
                          input=stdin, env={**os.environ, "PYTHONPATH": python_path()})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_main_is_imported_again(tmp_path):
    """Goal: without cloudpickle, a function of a guarded main module is found by importing that again."""
    (tmp_path / "program.py").write_text(script(WITHOUT))
    assert run(["program.py"], tmp_path) == "loaded\n"
    assert run(["-m", "program"], tmp_path) == "loaded\n"


@pytest.mark.parametrize("head", ["", WITHOUT], ids=["cloudpickle", "pickle"])
def test_main_of_a_spawned_child(tmp_path, head):
    """Goal: the same in a child of multiprocessing, where the main module has another name."""
    (tmp_path / "program.py").write_text(script(head, tail=SPAWNED))
    assert run(["program.py"], tmp_path) == "loaded\n"


def test_main_without_a_guard(tmp_path):
    """Goal: a main module that does everything again when it is imported is told so, with the cures; with cloudpickle
    it need not be imported."""
    (tmp_path / "program.py").write_text(script(WITHOUT, tail=UNGUARDED + "\nraise_no_more = 1"))
    told = run(["program.py"], tmp_path)
    assert "can't be imported again in the provider host (RuntimeError: a provider host starts no hosts" in told
    assert "Guard what the program does" in told.splitlines()[-2] and "pyuffd[callback]" in told
    if importlib.util.find_spec("cloudpickle"):
        (tmp_path / "program.py").write_text(script(tail=UNGUARDED))
        assert run(["program.py"], tmp_path) == "loaded\n"


def test_main_that_leaves(tmp_path):
    """Goal: a main module that ends the interpreter when it is imported ends nothing."""
    (tmp_path / "program.py").write_text(script(WITHOUT, tail=f"{GUARDED}\nelse:\n    sys.exit(3)"))
    assert "(SystemExit: 3)" in run(["program.py"], tmp_path)


def test_main_that_defines_it_only_for_itself(tmp_path):
    """Goal: what lies behind the guard is missing in the other process, and that is said."""
    (tmp_path / "program.py").write_text(script(WITHOUT, definition="", tail=INSIDE))
    assert "imported again, does not define it: move it out of" in run(["program.py"], tmp_path)


@pytest.mark.parametrize("how", ["-c", "stdin", "package"])
def test_main_that_is_no_module(tmp_path, how):
    """Goal: where there is no main module to import again, the refusal comes at once, with the cures; with cloudpickle
    all is well."""
    outcomes = []
    for head in (WITHOUT, ""):
        text = script(head, tail=UNGUARDED)
        (tmp_path / "package").mkdir(exist_ok=True)
        (tmp_path / "package" / "__main__.py").write_text(text)
        arguments = {"-c": ["-c", text], "stdin": ["-"], "package": ["-m", "package"]}[how]
        outcomes.append(run(arguments, tmp_path, stdin=text if how == "stdin" else None))
    assert outcomes[0].startswith("refused: fill is defined in the main module, which can't be imported again")
    assert "pyuffd[callback]" in outcomes[0]
    if importlib.util.find_spec("cloudpickle"):
        assert outcomes[1] == "loaded\n"


def test_the_trial_of_a_pickle(tmp_path):
    """Goal: `--load`, the trial of uffd.testing, ends with status 0 or with the reason on stderr."""
    argv = [*_hosting.command()[0][:-2], b"--load"]
    assert subprocess.run(argv, input=hosted.pickled(Pattern()), env={**os.environ, "PYTHONPATH": python_path()},
                          timeout=50).returncode == 0
    done = subprocess.run(argv, input=hosted.pickled(BreaksWhenLoaded()), capture_output=True, timeout=50,
                          env={**os.environ, "PYTHONPATH": python_path()})
    assert done.returncode == 1 and b"can't be had again" in done.stderr
