"""Interpreters, virtual environments and the wheel, for tools/dev.py. Standard library only.

A virtual environment holds what pyproject.toml asks for and the wheel, never the tree. A stamp in each tells what it
was made from, so that nothing is fetched or built twice and a second run needs no network.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venv"
VERSIONS = ("3.11", "3.12", "3.13")
STAMP = "uffd-stamp.json"


def heading(text: str) -> str:
    return f"\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"== {text}"


def say(text: str) -> None:
    print(heading(text), flush=True)


def run(*command: object, env: dict[str, str] | None = None, cwd: Path = ROOT) -> None:
    """Run to the end; a failure ends the program with the command and its exit code."""
    words = [str(word) for word in command]
    code = subprocess.run(words, cwd=cwd, env={**os.environ, **(env or {})}, check=False).returncode
    if code:
        raise SystemExit(f"failed with exit code {code}: {' '.join(words)}")


# Interpreters


@dataclass(frozen=True)
class Interpreter:
    path: str
    version: str  # "3.11"

    @property
    def name(self) -> str:
        return "py" + self.version.replace(".", "")


def ask_interpreter(path: str) -> Interpreter | None:
    """What this program is, or None if it is no CPython that runs. A pyenv shim exists for versions that it refuses."""
    code = "import sys; print(sys.executable, '%d.%d' % sys.version_info[:2], sys.implementation.name)"
    try:
        answer = subprocess.run([path, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    real, version, implementation = answer.stdout.split()
    return Interpreter(real, version) if implementation == "cpython" else None


def pyenv_versions() -> Path:
    try:
        answer = subprocess.run(["pyenv", "root"], capture_output=True, text=True, timeout=20, check=True)
        return Path(answer.stdout.strip()) / "versions"
    except (OSError, subprocess.SubprocessError):
        return Path.home() / ".pyenv" / "versions"


def find_interpreters() -> list[Interpreter]:
    """One interpreter for each version that we support and this machine has; the one that runs us comes first."""
    named = os.environ.get("PYTHONS", "").split()
    if named:
        found = [ask_interpreter(path) for path in named]
        if None in found:
            raise SystemExit(f"PYTHONS={' '.join(named)}: not every one of them is a CPython that runs")
        return [python for python in found if python]
    by_version = {}
    ours = ask_interpreter(sys.executable)
    if ours and ours.version in VERSIONS:
        by_version[ours.version] = ours
    for version in VERSIONS:
        kept = sorted(pyenv_versions().glob(f"{version}.*/bin/python{version}"))
        for path in (f"python{version}", *map(str, reversed(kept)), f"/usr/bin/python{version}"):
            python = None if version in by_version else ask_interpreter(path)
            if python and python.version == version:
                by_version[version] = python
    return list(by_version.values())


# What the machine must have


def prepare_machine() -> None:
    """Compiler, headers, venv, and a Redis for tests and demo: from Debian's packages where we may install them, else a
    clear word about them."""
    missing = []
    if not shutil.which("gcc") and not shutil.which("cc"):
        missing.append(("a C compiler", "gcc libc6-dev"))
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append(("Python.h", "python3-dev"))
    if subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True, check=False).returncode:
        missing.append(("ensurepip", "python3-venv"))
    if not shutil.which("redis-server") and not shutil.which("valkey-server"):
        missing.append(("redis-server (without it, its tests are skipped, and the demo goes without)", "redis-server"))
    if not missing:
        return
    packages = " ".join(package for _, package in missing)
    if os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"apt-get install {packages}")
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(["apt-get", "install", "-qq", "-y", *packages.split()], check=False)
    else:
        say(f"missing: {', '.join(what for what, _ in missing)} (on Debian: apt-get install {packages})")


# Virtual environments


def extra(*names: str) -> list[str]:
    """The requirements of the package and of these extras, as pyproject.toml has them, extras of extras resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, todo = list(project["dependencies"]), list(names)
    for name in todo:
        for requirement in project["optional-dependencies"][name]:
            inner = requirement.removeprefix("pyuffd[").removesuffix("]")
            if inner == requirement:
                found.append(requirement)
            else:
                todo += [part for part in inner.split(",") if part not in todo]
    return sorted(set(found))


def build_requirements() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]


def read_stamp(folder: Path) -> dict:
    try:
        return json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return {}


def write_stamp(folder: Path, **values: object) -> None:
    (folder / STAMP).write_text(json.dumps({**read_stamp(folder), **values}))


def tools_python() -> Path:
    """The environment that builds and installs: its pip serves all others, which need none of their own."""
    folder = VENVS / "tools"
    asked = {"requirements": [*build_requirements(), "pip>=23.1"], "base": sys.executable}
    if read_stamp(folder) != asked:
        prepare_machine()
        say("environment of the tools")
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", folder)
        run(folder / "bin/python", "-m", "pip", "install", "-qq", "--disable-pip-version-check", *asked["requirements"])
        write_stamp(folder, **asked)
    return folder / "bin/python"


def pip(python: Path, *arguments: object) -> None:
    run(tools_python(), "-m", "pip", "--python", python, "-qq", "--disable-pip-version-check", *arguments)


def environment(name: str, base: Interpreter, requirements: list[str], wheel: Path,
                alone: tuple[str, ...] = ()) -> Path:
    """The python of an environment with these requirements, this wheel, and `alone` without what it asks for."""
    folder = VENVS / name
    python = folder / "bin/python"
    asked = {"base": base.path, "requirements": requirements, "alone": list(alone)}
    kept = read_stamp(folder)
    if {key: kept.get(key) for key in asked} != asked:
        say(f"environment {name}: {base.path}")
        shutil.rmtree(folder, ignore_errors=True)
        run(base.path, "-m", "venv", "--without-pip", folder)
        pip(python, "install", *requirements)
        if alone:
            pip(python, "install", "--no-deps", *alone)
        write_stamp(folder, **asked)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if read_stamp(folder).get("wheel") != digest:
        pip(python, "install", "--no-deps", "--force-reinstall", wheel)
        write_stamp(folder, wheel=digest)
    return python


# The wheel


def source_digest(flags: dict[str, str]) -> str:
    """Of all that goes into the wheel, and of how it is built."""
    names = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
    files = [ROOT / name for name in names] + sorted((ROOT / "uffd").rglob("*"))
    digest = hashlib.sha256(repr((flags, sys.version)).encode())
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def build_wheel(sanitize: str = "") -> Path:
    """Build strictly, from nothing: a stale build/lib would put deleted files into the wheel."""
    out = VENVS / "wheel-sanitize" if sanitize else ROOT / "dist"
    flags = {"UFFD_STRICT": "1", "UFFD_SANITIZE": sanitize}
    digest = source_digest(flags)
    kept = sorted(out.glob("pyuffd-*.whl"))
    if len(kept) == 1 and read_stamp(out).get("sources") == digest:
        return kept[0]
    python = tools_python()
    say("wheel" + (f" with -fsanitize={sanitize}" if sanitize else ""))
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    run(python, "-m", "pip", "-qq", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation",
        "-w", out, ROOT, env=flags)
    write_stamp(out, sources=digest)
    (wheel,) = out.glob("pyuffd-*.whl")
    return wheel
