"""The wheel as installed: its content, its tag, its stubs, its command, and what importing it does not do."""

import ast
import importlib.metadata
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import uffd

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(uffd.__file__).resolve().parent
SCRIPTS = Path(sysconfig.get_path("scripts"))
# Every public name there may ever be is agreed on before it is written: one that is not here is private.
MUST = {"probe", "open", "pack", "from_provider", "region_of", "populate", "prefetch", "pinned", "chunks",
        "default_engine", "get_include", "Engine", "Region", "Prefetch", "providers", "UffdError", "Unavailable",
        "ProviderError", "RegionClosed", "MigrationError", "SnapshotError", "DegradedWarning", "Tracker", "track"}
MAY = MUST | {"zeros", "BudgetError", "Capabilities", "Stats", "LatencyHistogram", "Provider", "migrate", "snapshot",
              "__version__"}


def run(*command, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60, check=False,
                          **options)


def run_python(code, **options):
    return run(sys.executable, "-c", code, **options)


# What is tested


def test_it_is_the_installed_package_that_is_tested():
    assert PACKAGE != ROOT / "uffd"
    assert PACKAGE.parent in {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    assert "uffd._core" in sys.modules
    assert sys.modules["uffd._core"].__file__.startswith(str(PACKAGE))


def test_it_was_installed_from_a_wheel_of_the_stable_abi():
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("a free-threaded interpreter has no stable ABI")
    wheel = importlib.metadata.distribution("pyuffd").read_text("WHEEL")
    tags = [line.removeprefix("Tag: ") for line in wheel.splitlines() if line.startswith("Tag: ")]
    assert tags
    assert all(tag.startswith("cp311-abi3-") for tag in tags)
    assert (PACKAGE / "_core.abi3.so").exists()


def test_the_wheel_holds_what_users_compile_and_check_against():
    files = {str(file) for file in importlib.metadata.files("pyuffd")}
    for name in ("_core.pxd", "_core.pyi", "uffd.h", "py.typed", "__main__.py", "cures/60-userfaultfd.rules",
                 "cures/seccomp-userfaultfd.json", "cures/pod.yaml"):
        assert f"uffd/{name}" in files, name
    assert not [file for file in files if file.startswith(("tests/", "benchmarks/", "tools/", "build/"))]


def test_the_wheel_holds_every_module_of_the_tree():
    tree = ROOT / "uffd"
    if not tree.is_dir():
        pytest.skip("no source tree beside the tests")
    wanted = [path.relative_to(tree) for suffix in ("py", "pyi", "pxd", "h") for path in tree.rglob(f"*.{suffix}")]
    assert [str(path) for path in wanted if not (PACKAGE / path).exists()] == []
    assert [str(path) for path in wanted if (PACKAGE / path).read_bytes() != (tree / path).read_bytes()] == []


def test_what_it_needs_is_numpy_alone():
    needed = [line for line in importlib.metadata.requires("pyuffd") if "extra ==" not in line]
    assert [line.split(">")[0] for line in needed] == ["numpy"]


def test_the_extension_exports_nothing_but_its_start():
    if not shutil.which("nm"):
        pytest.skip("no nm")
    if os.environ.get("UFFD_SANITIZE"):
        pytest.skip("a sanitized build has symbols of the sanitizer")
    listed = run("nm", "-D", "--defined-only", sys.modules["uffd._core"].__file__).stdout
    assert [line.split()[-1] for line in listed.splitlines()] == ["PyInit__core"]


def test_get_include_names_the_folder_of_header_and_declarations():
    folder = Path(uffd.get_include())
    assert (folder / "uffd.h").exists() or (folder / "uffd" / "uffd.h").exists()
    assert PACKAGE in (folder, *folder.parents) or folder in PACKAGE.parents


def test_the_header_compiles_by_itself_in_c_and_cpp(tmp_path):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    languages = ["c"] + (["c++"] if shutil.which("g++") else [])
    (tmp_path / "use.c").write_text("#include <uffd.h>\nuffd_fill_fn fill;\n")
    for language in languages:
        done = run(compiler, "-x", language, "-Wall", "-Wextra", "-Werror", f"-I{uffd.get_include()}", "-c",
                   "-o", tmp_path / "use.o", tmp_path / "use.c")
        assert done.returncode == 0, done.stderr


def test_cython_code_can_cimport_the_declarations(tmp_path):
    if not (shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler")
    pytest.importorskip("Cython", reason="Cython is not installed")
    (tmp_path / "use.pyx").write_text("# cython: language_level=3\ncimport uffd._core\n")
    done = run(sys.executable, "-m", "cython", "-3", "-Werror", tmp_path / "use.pyx")
    assert done.returncode == 0, done.stderr + done.stdout


# Names


def test_the_public_names_are_those_agreed_on():
    assert MUST <= set(uffd.__all__) <= MAY
    assert [name for name in uffd.__all__ if not hasattr(uffd, name)] == []
    assert len(uffd.__all__) == len(set(uffd.__all__))


@pytest.mark.parametrize("name", sorted(MUST))
def test_a_public_name_says_what_it_gives(name):
    assert len(inspect.getdoc(getattr(uffd, name)) or "") > 40


@pytest.mark.parametrize("owner", ["Engine", "Region", "Prefetch", "Tracker"])
def test_a_public_method_says_what_it_does(owner):
    members = {name: member for name, member in vars(getattr(uffd, owner)).items() if not name.startswith("_")}
    assert members
    assert [name for name, member in members.items() if not inspect.getdoc(member)] == []


@pytest.mark.parametrize("name", ["Engine", "Region"])
def test_help_shows_what_a_class_takes(name):
    """Goal: editors and help() list the arguments, which __new__, that only chooses a class, would hide."""
    made = getattr(uffd, name)
    assert list(inspect.signature(made).parameters) == list(inspect.signature(made.__init__).parameters)[1:]


def test_every_error_is_of_one_family():
    for name in ("Unavailable", "ProviderError", "RegionClosed", "MigrationError", "SnapshotError"):
        assert issubclass(getattr(uffd, name), uffd.UffdError)
    assert issubclass(uffd.Unavailable, OSError)
    assert issubclass(uffd.ProviderError, OSError)
    assert issubclass(uffd.RegionClosed, ValueError)
    assert issubclass(uffd.DegradedWarning, Warning)


def stub_names(body):
    """Names of a stub's body -> (node, names of its arguments or None)."""
    names = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            names[node.name] = (node, [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)])
        elif isinstance(node, ast.ClassDef):
            names[node.name] = (node, None)
        elif isinstance(node, ast.AnnAssign):
            names[node.target.id] = (node, None)
    return names


def compare(stub, owner, where):
    """Every name of the stub is there with the arguments it tells, and every public name that is there is told."""
    names = stub_names(stub)
    wrong = [f"{where}{name} is not there" for name in names if not hasattr(owner, name)]
    public = {name for name in vars(owner) if not name.startswith("_")}
    if inspect.ismodule(owner):
        public = {name for name in public if not inspect.ismodule(getattr(owner, name))
                  and getattr(getattr(owner, name), "__module__", owner.__name__) == owner.__name__}
    wrong += [f"{where}{name} is not in the stub" for name in sorted(public - set(names))]
    for name, (node, arguments) in names.items():
        member = getattr(owner, name, None)
        if isinstance(node, ast.ClassDef) and member is not None:
            wrong += compare(node.body, member, f"{where}{name}.")
        elif arguments is not None and name != "__init__" and callable(member):
            try:
                found = list(inspect.signature(member).parameters)
            except (TypeError, ValueError):
                continue
            if [a for a in arguments if a not in ("self", "cls")] != [a for a in found if a not in ("self", "cls")]:
                wrong.append(f"{where}{name}{tuple(found)} is told as {tuple(arguments)}")
    return wrong


def test_the_stub_tells_what_the_extension_has():
    stub = ast.parse((PACKAGE / "_core.pyi").read_text())
    assert compare(stub.body, sys.modules["uffd._core"], "") == []


# Importing


def test_importing_loads_no_optional_library():
    optional = ["blosc2", "ml_dtypes", "numba", "scipy", "matplotlib", "rich", "fsspec", "zarr", "h5py", "cloudpickle"]
    done = run_python(f"import sys, uffd; print([name for name in {optional} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_importing_starts_no_thread_and_opens_nothing():
    done = run_python("import os, numpy\n"
                      "def count(): return [len(os.listdir(f'/proc/self/{name}')) for name in ('task', 'fd')]\n"
                      "before = count()\nimport uffd\nprint(before == count(), before, count())")
    assert done.stdout.startswith("True"), done.stdout + done.stderr


ELSEWHERE = """
import os, sys, numpy
os.environ.pop("UFFD_FALLBACK", None)
sys.platform = "darwin"
sys.modules["uffd._core"] = None
import uffd
assert uffd.probe().mode == "none"
try:
    uffd.Region(1 << 16, uffd.providers.Zero())
except uffd.Unavailable as error:
    print(error)
"""


def test_it_can_be_imported_elsewhere_and_says_why_it_does_nothing():
    done = run_python(ELSEWHERE)
    assert done.returncode == 0, done.stderr
    assert "Linux" in done.stdout


# The command


@pytest.mark.parametrize("command", [[SCRIPTS / "uffd"], [SCRIPTS / "pyuffd"], [sys.executable, "-m", "uffd"]],
                         ids=["uffd", "pyuffd", "python-m-uffd"])
def test_the_command_tells_its_version(command):
    done = run(*command, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["uffd", importlib.metadata.version("pyuffd")]


def test_the_version_is_that_of_the_distribution():
    assert uffd.__version__ == importlib.metadata.version("pyuffd")


@pytest.mark.parametrize("words", [[], ["no-such-command"], ["pack"]], ids=["nothing", "unknown", "too-few"])
def test_wrong_usage_is_told(words):
    done = run(sys.executable, "-m", "uffd", *words)
    assert done.returncode == 2
    assert "usage: uffd" in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["probe", "--help"], ["pack", "--help"], ["demo", "--help"]],
                         ids=lambda words: words[0])
def test_help_is_given(words):
    done = run(sys.executable, "-m", "uffd", *words)
    assert done.returncode == 0, done.stderr
    assert "usage: uffd" in done.stdout


def test_an_error_is_one_line_and_no_traceback(tmp_path):
    done = run(sys.executable, "-m", "uffd", "pack", tmp_path / "missing.npy", tmp_path / "out")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("uffd: ")
    assert "missing.npy" in line


def test_pack_tells_the_sizes(tmp_path):
    if not importlib.util.find_spec("blosc2"):
        pytest.skip("blosc2 is not installed")
    source, target = tmp_path / "a.npy", tmp_path / "a.packed"
    np.save(source, np.arange(1 << 18, dtype="i8"))
    done = run(sys.executable, "-m", "uffd", "pack", "--json", source, target)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["source_bytes"] == source.stat().st_size
    assert told["ratio"] > 2
    made = [path for path in tmp_path.iterdir() if path.name.startswith("a.") and path != source]
    assert told["target_bytes"] == made[0].stat().st_size
