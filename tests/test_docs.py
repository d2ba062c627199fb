"""README.md, ARCHITECTURE.md and docs/: each program in them runs and prints what it should, by itself or after what it
takes for granted; each name and link in them is there."""

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import uffd
import uffd.migrate
import uffd.snapshot
import uffd.testing
from support import redisserver
from support.scripts import deadline_scale

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN_BY_A_TEST = ROOT / "docs" / "syscalls.md"       # and may be missing in a copy

if not all(path.exists() for path in DOCS) or not (ROOT / "uffd").is_dir():
    pytest.skip("no source tree beside the tests: these hold only there", allow_module_level=True)


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


# What a program needs that its text does not say: in its directory, and as settings (text that is replaced).


@contextlib.contextmanager
def nothing(folder):
    yield {}


@contextlib.contextmanager
def compiled_in_c(folder):
    compiler = shutil.which("gcc")
    if not compiler:
        pytest.skip("no gcc")
    (source,) = [block for block in blocks("docs/native-providers.md", "c") if "ramp.c" in block]
    (folder / "ramp.c").write_text(source)
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{uffd.get_include()}"]
    subprocess.run([*command, "ramp.c", "-o", "ramp.so"], cwd=folder, check=True, timeout=50)
    yield {}


@contextlib.contextmanager
def compiled_in_cython(folder):
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    (source,) = blocks("docs/native-providers.md", "cython")
    (folder / "ramp.pyx").write_text(source)
    done = subprocess.run([sys.executable, "-P", "-m", "Cython.Build.Cythonize", "-i", "ramp.pyx"], cwd=folder,
                          capture_output=True, text=True, timeout=50 * deadline_scale(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    yield {"import ramp\n": "import sys; sys.path.insert(0, '.')\nimport ramp\n"}


@contextlib.contextmanager
def a_redis_server(folder):
    if redisserver.why_not():
        pytest.skip(redisserver.why_not())
    (folder / "server").mkdir()
    with redisserver.Server(folder / "server") as server:
        yield {"rediss://user:password@cache:6379": server.url}


@contextlib.contextmanager
def a_socket(folder):
    yield {"/run/user/1000/table.sock": f"{folder}/table.sock"}


@contextlib.contextmanager
def a_peer(folder):
    """The other side of a migration, on this machine."""
    yield {"tcp://10.0.0.7:7000": f"unix:{folder}/move.sock", "unix:/tmp/move.sock": f"unix:{folder}/move.sock"}


@dataclass(frozen=True)
class Program:
    prints: str = ""                # a pattern of all of stdout
    before: str = ""                # what a part of a program takes for granted
    after: str = ""
    needs: tuple[str, ...] = ()     # modules
    settings: Callable = nothing
    listener: "Program | None" = None   # another program that is started first, and listens at move.sock
    number: int = -1                # which one of the document it is; the others count up
    argv: tuple[str, ...] = ()


NUMPY = "import numpy as np, uffd\n"
TORN = """
import uffd
def torn(offset, out):
    if offset + len(out) > 65536:
        raise OSError(5, "torn")
    out[:] = 1
if __name__ != "__main__":
    raise SystemExit                # the provider host imports what follows, too
rows = slice(0, 70_000)
table = uffd.from_provider(torn, 1 << 17, "u1", retries=0)
"""
DESTINATION = Program("7.0\n", "import uffd\nkey = bytes(32)\ndef serve(table, state):\n    print(table.sum())\n",
                      settings=a_peer, number=0)
PROGRAMS = {
    "README.md": [
        Program(r"412344950\.0\n[\d,]+ of 48,000,000 bytes were filled, 1 block by a touch\n"),
        Program(r"1\.5241384130\d+e\+22\n"),
        Program(r"100\.0 \d+ MiB in memory\n"),
        Program("1000.0\nrow 6(99|98)\n"),
        Program(r"migration, source: COMPLETED; the memory is with the destination\n(.*\n)+", settings=a_peer,
                listener=Program(r"here now: b'column 0 was written' 10000\.0\n", settings=a_peer, argv=("there",),
                                 number=4)),
    ],
    "docs/externalization.md": [
        Program("True True True\n"),
        Program("True\n"),
        Program("r\\+ 80 blocks are dirty\n0 560.0\n"),
        Program("True 1.0\n0.0\nTrue 819200.0\n4096000.0\n"),
        Program("1000000.0 True 1000000.0\n"),
    ],
    "docs/failure.md": [
        Program(r"65536 5 \d\n", before=TORN),
        Program("True\n", "import torch.utils.data, uffd\narray = uffd.zeros((64, 2048))\n"
                "dataset = torch.utils.data.TensorDataset(torch.from_numpy(array))\n",
                "print(sum(batch.sum().item() == 0 for batch, in loader) == 64)\n", needs=("torch",)),
    ],
    "docs/migration.md": [
        Program(listener=DESTINATION, settings=a_peer, number=1,
                prints=r"migration, source: COMPLETED; the memory is with the destination\n(.*\n)+",
                before="import uffd\nkey = bytes(32)\ntable = uffd.zeros(100_000)\ntable[99_999] = 7\n"
                       "def stop_serving():\n    pass\n"),
    ],
    "docs/native-providers.md": [
        Program(settings=compiled_in_c),
        Program(settings=compiled_in_cython, needs=("Cython", "setuptools")),
        Program(settings=compiled_in_c, needs=("scipy",)),
        Program(needs=("numba",)),
    ],
    "docs/privileges.md": [
        Program("True\n", NUMPY + "array = uffd.zeros(2000)\n", "print((np.load('part.npy') == 0).all())\n"),
    ],
    "docs/redis.md": [
        Program("0.0 5.0\n", NUMPY + "if __name__ != '__main__':\n    raise SystemExit\ntable = np.zeros((100, 100))\n",
                "array[7] = 5\nuffd.region_of(array).flush()\nprint(array[0].max(), array[7].max())\n",
                needs=("redis", "xxhash"), settings=a_redis_server),
    ],
    "docs/seeing.md": [
        Program("HTTP/1.[01] 200 OK\n", "import uffd\n",
                "import socket\nwith socket.socket(socket.AF_UNIX) as asking:\n"
                "    asking.connect('/run/user/1000/table.sock')\n"
                "    asking.sendall(b'GET /stats HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n')\n"
                "    print(asking.recv(1000).decode().splitlines()[0])\n", settings=a_socket),
    ],
    "docs/snapshots.md": [
        Program(r"(protect|fork) 16000008\n"),
        Program(r"\d+\n"),
    ],
    "docs/tracking.md": [
        Program(r"245\d\d 36\d\d\d\n"),
    ],
    "docs/write-a-provider.md": [
        Program("1000000000000 40000180000285\n"),
        Program(r"\(10000, 3\) \[9999\. +4999\.5 +2499\.75\] 2499\.75\n"),
        Program("5 16 blocks, of which one was touched\n"),
        Program("100001 bytes, written and read back in 124 writes\n"),
        Program("5 True 2 OSError: \\[Errno 5\\] the tape is torn\n1\n"),
    ],
}


def numbered(name):
    """The programs of a document that are run by themselves, each with its place there."""
    return [(number if program.number < 0 else program.number, program)
            for number, program in enumerate(PROGRAMS[name])]


CASES = [pytest.param(name, number, program, id=f"{Path(name).stem}-{number}")
         for name in PROGRAMS for number, program in numbered(name)]


def start(name, number, program, folder, settings):
    """Run it as a file, for a provider host imports it again."""
    code = blocks(name, "python")[number]
    if program.before:
        code = program.before + code
    code += program.after
    for old, new in settings.items():
        code = code.replace(old, new)
    path = folder / f"program{number}{''.join(program.argv)}.py"
    path.write_text(code)
    return subprocess.Popen([sys.executable, "-P", str(path), *program.argv], cwd=folder, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def judge(process, program):
    try:
        out, err = process.communicate(timeout=45 * deadline_scale())
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, out + err
    assert re.fullmatch(program.prints, out), out
    warnings = [line for line in err.splitlines() if "Warning" in line]
    assert all("DegradedWarning" in line for line in warnings), err


def until_it_listens(process, path):
    deadline = time.monotonic() + 20 * deadline_scale()
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it does not listen"
        time.sleep(0.01)


def why_not(code):
    """Why the machine can't do what the program does; None if it can."""
    if "uffd.track" in code:
        try:
            uffd.track(np.ones(100_000)).close()
        except uffd.Unavailable as error:
            return str(error)
    return None


@pytest.mark.parametrize(("name", "number", "program"), CASES)
def test_the_program_runs(tmp_path, name, number, program):
    """Goal: it prints what it should, and ends. Method: in an empty directory, after what it takes for granted."""
    lacks = [module for module in program.needs if not importlib.util.find_spec(module)]
    if lacks:
        pytest.skip(f"not installed: {', '.join(lacks)}")
    reason = why_not(blocks(name, "python")[number])
    if reason:
        pytest.skip(reason)
    with program.settings(tmp_path) as settings:
        first = program.listener and start(name, program.listener.number, program.listener, tmp_path, settings)
        try:
            if first:
                until_it_listens(first, tmp_path / "move.sock")
            judge(start(name, number, program, tmp_path, settings), program)
            if first:
                judge(first, program.listener)
        finally:
            if first and first.poll() is None:
                first.kill()
                first.communicate()


def test_no_program_is_left_out():
    """Goal: who adds a program to a document says here what it prints."""
    for path in DOCS:
        name = str(path.relative_to(ROOT))
        known = {number for case, program in numbered(name) for number in (
            case, program.listener.number if program.listener else case)} if name in PROGRAMS else set()
        assert known == set(range(len(blocks(name, "python")))), name


# What the documents name


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_what_it_links_to_is_there(path):
    links = set(re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()))
    missing = [link for link in sorted(links) if not (path.parent / link).exists()]
    assert [link for link in missing if (path.parent / link).resolve() != WRITTEN_BY_A_TEST] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_what_it_names_of_the_package_is_there(path):
    """Goal: `uffd.zeros`, `uffd.providers.File` and the like exist, and so does each extra of `pyuffd[...]`."""
    text = path.read_text()
    files = {"uffd.h", "uffd.pp"}
    for name in sorted(set(re.findall(r"\buffd(?:\.[A-Za-z_]\w*)+", text)) - files):
        found = uffd
        for part in name.split(".")[1:]:
            assert hasattr(found, part), name
            found = getattr(found, part)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition(
        "[project.optional-dependencies]")[2].partition("\n[")[0], re.MULTILINE)
    assert set(re.findall(r"pyuffd\[(\w+)\]", text)) <= set(extras) and extras


def test_what_the_architecture_names_is_in_the_sources():
    """Goal: the functions, fields and states that ARCHITECTURE.md speaks of are there. Method: words with an underscore
    or in capitals within its code spans."""
    sources = "\n".join(path.read_text() for folder in ("uffd", "benchmarks", "tests") for path in
                        sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".pyx", ".pxi", ".h", ".c"))
    known = set(re.findall(r"\w+", sources)) | {path.stem.strip("_") for path in (ROOT / "uffd").rglob("*")}
    of_others = {"posix_spawn"}                                 # which it says is not used
    spans = re.findall(r"`([^`\n]+)`", (ROOT / "ARCHITECTURE.md").read_text())
    named = {word for span in spans for word in re.findall(r"[A-Za-z]\w+", span)
             if "_" in word or (word.isupper() and len(word) > 3)}
    missing = {word for word in named - known if word.strip("_") not in known} - of_others
    assert len(named) > 100 and not missing, missing
