"""The fallback: who gets it, what it may take of memory, and that it works where there is really no userfaultfd.

Some tests have the core answer that there is none; some run under a seccomp filter that denies it, and some where the
extension can't be imported, in processes of their own.
"""

import ast
import ctypes
import importlib
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import uffd
from support import fallback, matrix
from support.pattern import pattern
from uffd import providers

budget = importlib.import_module("uffd._budget")
Machine = importlib.import_module("uffd._machine").Machine

TESTS = Path(__file__).resolve().parent
DENIED = (sys.executable, str(TESTS / "support" / "deny.py"))
BLOCK = 65536
PAGE = uffd._core.PAGE_BYTES
NBYTES = 20 * BLOCK + 777


@pytest.fixture(autouse=True)
def no_userfaultfd(monkeypatch):
    yield from fallback.ask_for_it(monkeypatch)


def fresh_python(code, *arguments, wrapper=(), **environment):
    """Run code in a fresh interpreter, with what is on our path; the finished process."""
    env = {**{key: value for key, value in os.environ.items() if key != "UFFD_FALLBACK"}, **environment}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(uffd.__file__).parent.parent), str(TESTS)])
    return subprocess.run([*wrapper, sys.executable, "-P", "-c", code, *map(str, arguments)], capture_output=True,
                          text=True, env=env, timeout=60, check=False)


def file_of(path, data):
    path.write_bytes(data)
    return path


def pattern_file(folder):
    return providers.File(file_of(folder / "file", pattern(0, NBYTES).tobytes()))


# Who gets it


def test_regions_and_engines_are_of_the_public_classes():
    """Goal: isinstance holds, and a library need not know. Method: by each of the ways to ask."""
    with uffd.Region(NBYTES, providers.Zero()) as region:
        assert isinstance(region, uffd.Region)
        assert isinstance(region.engine, uffd.Engine)
        assert region.engine is uffd.default_engine()
        assert region in list(region.engine.regions)
    assert "userfaultfd" in repr(region.engine)


def test_the_engine_alone_can_ask(monkeypatch):
    """Goal: no environment is needed, and regions of no engine are refused without it, with both cures."""
    monkeypatch.delenv("UFFD_FALLBACK")
    with uffd.Engine(fallback="eager") as engine:
        assert uffd.Region(BLOCK, providers.Zero(), engine=engine).array().sum() == 0
        with pytest.raises(uffd.Unavailable, match="UFFD_FALLBACK=eager"):
            uffd.Region(BLOCK, providers.Zero())
    with pytest.raises(uffd.Unavailable):
        uffd.Engine()


def test_unknown_fallbacks_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="'eager'"):
        uffd.Engine(fallback="lazy")
    monkeypatch.setenv("UFFD_FALLBACK", "yes")
    with pytest.raises(ValueError, match="UFFD_FALLBACK"):
        uffd.Region(BLOCK, providers.Zero())


def test_options_are_checked_as_ever():
    for wrong in ({"mode": "w"}, {"mode": "r+"}, {"backing": "disk"}, {"delivery": "mail"}, {"on_error": "panic"},
                  {"block_bytes": 100}, {"retries": -1}, {"timeout_s": 0}, {"readahead_bytes": -1}, {"nbytes": 0}):
        with pytest.raises(ValueError):
            uffd.Region(**{"nbytes": BLOCK, "provider": providers.Zero(), **wrong})
    for wrong in ({"provider": 17}, {"engine": "fast"}, {"speed": 3}):
        with pytest.raises(TypeError):
            uffd.Region(**{"nbytes": BLOCK, "provider": providers.Zero(), **wrong})
    with pytest.raises(TypeError):
        uffd.Engine(speed=3)


def test_with_a_userfaultfd_nothing_changes(monkeypatch):
    """Goal: the fallback is asked for in vain where the real thing can be had."""
    if matrix.filled_whole() or matrix.opened()[0] is None:
        pytest.skip("no userfaultfd here")
    monkeypatch.undo()
    with uffd.Engine(fallback="eager", workers=1) as engine, uffd.Region(NBYTES, providers.Zero(), engine=engine) as r:
        assert not r.resident().any()


# Memory


def test_the_budget_holds_for_all_regions(monkeypatch):
    """Goal: UFFD_BUDGET_BYTES bounds what the regions of an engine hold together, and says so."""
    monkeypatch.setenv("UFFD_BUDGET_BYTES", str(3 * BLOCK))
    with uffd.Engine() as engine, uffd.Region(2 * BLOCK, providers.Zero(), name="first", engine=engine):
        with pytest.raises(uffd.BudgetError, match=f"second.*room for {BLOCK} ") as info:
            uffd.Region(2 * BLOCK, providers.Zero(), name="second", engine=engine)
        assert isinstance(info.value, MemoryError)
        assert isinstance(info.value, uffd.UffdError)
        uffd.Region(BLOCK, providers.Zero(), engine=engine).close()
        assert (engine.budget_bytes, engine.resident_bytes) == (3 * BLOCK, 2 * BLOCK)
    monkeypatch.setenv("UFFD_BUDGET_BYTES", "plenty")
    with pytest.raises(ValueError, match="UFFD_BUDGET_BYTES"):
        uffd.Engine()


@pytest.mark.parametrize("arguments, options", [((), {"budget_bytes": 3 * BLOCK}), ((1, 3 * BLOCK), {})])
def test_an_engine_has_a_budget_of_its_own(arguments, options):
    """Goal: the number given, by name or place, holds for the engine's regions alone; it can be set, but not below what
    they hold, since nothing can leave."""
    with uffd.Engine(*arguments, **options) as engine, uffd.Region(2 * BLOCK, engine=engine) as region:
        with pytest.raises(uffd.BudgetError, match=f"room for {BLOCK} "):
            uffd.Region(2 * BLOCK, engine=engine)
        with pytest.raises(uffd.BudgetError, match=f"hold {2 * BLOCK}"):
            engine.budget_bytes = BLOCK
        assert engine.budget_bytes == 3 * BLOCK
        engine.budget_bytes = None
        assert engine.budget_bytes is None
        uffd.Region(2 * BLOCK, engine=engine).close()
        engine.budget_bytes = 2 * BLOCK
        with pytest.raises(uffd.BudgetError):
            uffd.Region(1, engine=engine)
        region.close()
        assert engine.resident_bytes == 0
        for wrong in (-1, 0, "plenty"):
            with pytest.raises(ValueError):
                engine.budget_bytes = wrong
        engine.budget_bytes = "auto"
        assert engine.budget_bytes > BLOCK
    assert engine.budget_bytes is None
    with pytest.raises(ValueError, match="closed"):
        engine.budget_bytes = BLOCK


def test_engine_options_are_checked():
    for wrong in ({"hosts": 0}, {"budget_bytes": 0}, {"budget_bytes": "much"}):
        with pytest.raises(ValueError):
            uffd.Engine(**wrong)
    with pytest.raises(TypeError):
        uffd.Engine(1, BLOCK, 3)


def test_more_than_there_is():
    with pytest.raises(uffd.BudgetError, match="has room for"):
        uffd.Region(1 << 45, providers.Zero())


def test_more_than_can_be_mapped():
    with uffd.Engine(budget_bytes=None) as engine, pytest.raises(uffd.BudgetError, match="could not be had"):
        uffd.Region(1 << 46, providers.Zero(), engine=engine)


MEMINFO = "MemTotal:       2000000 kB\nMemAvailable:   1000000 kB\n"
V2 = {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/memory.max": "500000", "sys/fs/cgroup/a/memory.current": "400000",
      "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 50000\n", "sys/fs/cgroup/a/b/memory.max": "max",
      "sys/fs/cgroup/a/b/memory.current": "5"}
V1 = {"proc/self/cgroup": "3:cpu,memory:/a", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
      "sys/fs/cgroup/memory/memory.usage_in_bytes": "10", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1000",
      "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "900"}


def machine_with(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(folder, {})


@pytest.mark.parametrize("files, room", [
    ({}, 1_024_000_000), (V2, 150_000), (V1, 100), ({**V2, "sys/fs/cgroup/a/memory.current": "900000"}, 0)],
    ids=["no cgroup", "v2", "v1", "full"])
def test_the_room_is_the_smallest_of_machine_and_cgroups(tmp_path, files, room):
    """Goal: "auto" is 60 % of it, and what regions hold already is in it; a number is cut to 90 % of a cgroup's."""
    machine = machine_with(tmp_path, {"proc/meminfo": MEMINFO, **files})
    assert budget.limit("auto", 0, machine) == room * 6 // 10
    assert budget.limit(None, 0, machine) is None
    assert budget.limit(120, 0, machine) == min(120, room * 9 // 10)
    if not files:
        assert budget.limit("auto", 1000, machine) == (room + 1000) * 6 // 10
        assert budget.limit(1 << 40, 0, machine) == 1 << 40


def test_elsewhere_sysconf_tells(tmp_path):
    assert 0 < budget.limit("auto", 0, Machine(tmp_path, {})) < os.sysconf("SC_PHYS_PAGES") * PAGE


# Recipes


def test_a_recipe_is_opened_again(tmp_path):
    with uffd.Region(None, pattern_file(tmp_path), name="n", block_bytes=2 * BLOCK) as region:
        region.array()[:] = 0
        recipe = pickle.dumps(region)
    assert len(recipe) < 2000
    with pickle.loads(recipe) as again:
        assert (again.name, again.block_bytes) == ("n", 2 * BLOCK)
        np.testing.assert_array_equal(again.array(), pattern(0, NBYTES))


def test_a_recipe_of_an_engine_that_asked_needs_no_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("UFFD_FALLBACK")
    with uffd.Engine(fallback="eager") as engine:
        recipe = pickle.dumps(uffd.Region(None, pattern_file(tmp_path), engine=engine))
    done = fresh_python("import pickle, sys\nprint(pickle.loads(open(sys.argv[1], 'rb').read()).array().sum())",
                      file_of(tmp_path / "recipe", recipe), wrapper=DENIED)
    assert done.stdout.split() == [str(int(pattern(0, NBYTES).sum(dtype=np.uint64)))], done.stderr


# Where there is really none


DEGRADED = """
import numpy, uffd, warnings
assert uffd._core.mode()[0] == "none"
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    region = uffd.Region(1 << 20, uffd.providers.Memory(numpy.full(1 << 20, 3, "u1")))
    uffd.Engine(), uffd.Region(1 << 20, uffd.providers.Zero())
assert (region.array() == 3).all()
(warning,) = told
assert warning.category is uffd.DegradedWarning
print(warning.filename, warning.lineno, warning.message)
"""


def test_under_a_filter_that_denies_it():
    """Goal: one warning per process, at the caller's line, with the cure. Method: seccomp, as a container has it."""
    done = fresh_python(DEGRADED, wrapper=DENIED, UFFD_FALLBACK="eager")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<string> 6 ")
    assert "uffd probe" in done.stdout
    refused = fresh_python("import uffd\nuffd.Region(1 << 20, uffd.providers.Zero())", wrapper=DENIED)
    assert "Unavailable" in refused.stderr
    assert "UFFD_FALLBACK=eager" in refused.stderr


def test_probe_tells_of_it():
    done = subprocess.run([*DENIED, sys.executable, "-m", "uffd", "probe", "--no-self-test"], capture_output=True,
                          text=True, timeout=60, check=False)
    assert "mode: none" in done.stdout
    assert "fallback='eager'" in done.stdout


WITHOUT_CORE = """
import importlib.abc, sys
import numpy as np, pickle, warnings
try:
    import blosc2
except ImportError:
    blosc2 = None
from support.pattern import pattern

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "uffd._core":
            raise ImportError("no such file, for a test")

sys.meta_path.insert(0, Block())
sys.platform = sys.argv[1]
folder = sys.argv[2] + "/"
warnings.simplefilter("ignore", UserWarning)
import uffd

assert not hasattr(uffd, "_core")
for name in uffd.__all__:
    getattr(uffd, name)
assert uffd.probe().mode == "none"
try:
    uffd.Engine()
except uffd.Unavailable as error:
    print("refused:", error)
n = (1 << 20) + 77
data = pattern(0, n).copy()
with uffd.Engine(fallback="eager") as engine:
    data.tofile(folder + "raw")
    np.save(folder + "a.npy", data)
    def function(offset, out):
        out[:] = pattern(offset, len(out))
    given = [uffd.providers.Memory(data), uffd.providers.File(folder + "raw"), function]
    for provider in given:
        region = uffd.Region(n, provider, engine=engine)
        assert isinstance(region, uffd.Region)
        assert (region.array() == data).all(), provider
        assert uffd.region_of(region.array()[5:]) is region
        assert uffd.prefetch(region.array(), 3).done()
    source = data.copy()
    assert (uffd.open(folder + "a.npy", engine=engine) == data).all()
    again = pickle.loads(pickle.dumps(uffd.Region(None, given[1], engine=engine)))
    assert (again.array() == data).all()
    assert not uffd.from_provider(uffd.providers.Zero(), 1000, "f8", engine=engine).any()
    zeros = uffd.zeros(1000, "f8", engine=engine)
    zeros += 1
    with uffd.Region(None, uffd.providers.File(folder + "raw", 5, writable=True), engine=engine) as region:
        assert region.mode == "r+"
        region.array()[70_000:70_010] = 7
        region.flush()
        data[70_005:70_015] = 7
        assert (np.fromfile(folder + "raw", "u1") == data).all()
        region.array()[3] ^= 1
        data[8] ^= 1
    assert (np.fromfile(folder + "raw", "u1") == data).all()
    if blosc2:
        uffd.pack(folder + "a.npy", folder + "a.b2frame")
        assert (uffd.open(folder + "a.b2frame", engine=engine) == source).all()
    print(engine.stats().bytes_filled, repr(engine))
print("done")
"""


@pytest.mark.parametrize("platform", ["darwin", "win32", sys.platform])
def test_without_the_extension(tmp_path, platform):
    """Goal: everything can be imported and the fallback works where there is no core: not Linux, or its file missing.
    Method: a process in which its import fails and sys.platform is another's."""
    done = fresh_python(WITHOUT_CORE, platform, tmp_path)
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr
    assert ("Linux" if platform != sys.platform else "Reinstall") in done.stdout.partition("\n")[0]


def test_a_native_provider_without_the_extension():
    """Goal: a C function is called through ctypes, its data found, where there is no core."""
    code = """
import sys
sys.modules["uffd._core"] = None
import uffd, warnings
from support.native import controlled
from support.pattern import pattern
warnings.simplefilter("ignore")
with uffd.Engine(fallback="eager") as engine:
    provider, control = controlled()
    assert (uffd.Region(300_001, provider, engine=engine).array() == pattern(0, 300_001)).all()
    print("done")
"""
    done = fresh_python(code)
    assert done.stdout == "done\n", done.stderr


def test_capsules_without_the_extension():
    """Goal: what stands in for the core takes pointer and context out of a PyCapsule, whatever its name."""
    coreless = importlib.import_module("uffd._coreless")
    api, kept = ctypes.pythonapi, ctypes.create_string_buffer(b"a name")
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = api.PyCapsule_New(0x1234, kept, None)
    assert coreless.capsule_address(capsule) == uffd._core.capsule_address(capsule) == (0x1234, 0)
    array = np.arange(6).reshape(2, 3).T
    assert coreless.buffer_address(array) == uffd._core.buffer_address(array) == array.ctypes.data


def test_what_stands_in_for_the_core_agrees_with_it():
    coreless = importlib.import_module("uffd._coreless")
    for name in ("PAGE_BYTES", "MAX_BLOCK", "MAX_WORKERS_BASE", "MAX_HOST_COUNT", "STATES", "COUNTER_NAMES",
                 "STAGE_NAMES", "JOB_PREFETCH", "JOB_POPULATE"):
        assert getattr(coreless, name) == getattr(uffd._core, name), name


# The list of the run in this mode


@pytest.mark.parametrize("file", sorted({file for file, _ in fallback.LEFT_OUT}))
def test_what_is_left_out_of_that_run_is_still_there(file):
    tree = ast.parse((TESTS / file).read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert [name for of, name in fallback.LEFT_OUT if of == file and name not in names] == []


def test_no_warning_without_the_fallback(monkeypatch):
    """Goal: who did not ask for it hears nothing. Method: a normal engine, where one can be had."""
    if matrix.filled_whole() or matrix.opened()[0] is None:
        pytest.skip("no userfaultfd here")
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "only user-mode faults", uffd.DegradedWarning)
        uffd.Engine(workers=1).close()
