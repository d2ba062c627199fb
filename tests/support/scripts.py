"""Run Python text in a process of its own, with a deadline: for what may hang or kill its process."""

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

from support import matrix, native

TESTS = Path(__file__).resolve().parent.parent
PRELUDE = "from support.child import *  # noqa: F401, F403\n"
ZYGOTE = PRELUDE + "from support.zygote import serve\nexec(serve())\n"


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str
    ended_at: float  # time.monotonic() just after the process was reaped

    @property
    def signal(self):
        """The signal that ended it, or None."""
        return signal.Signals(-self.returncode) if self.returncode < 0 else None

    def check(self, returncode=0):
        assert self.returncode == returncode, f"{self.describe()}"
        return self

    def describe(self):
        return f"exit {self.returncode}\n--- stdout\n{self.stdout[-4000:]}\n--- stderr\n{self.stderr[-6000:]}"


def deadline_scale():
    """Sanitizer builds are slower: UFFD_DEADLINE_SCALE stretches every deadline."""
    return float(os.environ.get("UFFD_DEADLINE_SCALE", "1"))


def where_it_stands(pid):
    """Names and kernel wait channels of the process's threads, for a failure message."""
    lines = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            texts = [Path(f"/proc/{pid}/task/{task}/{name}").read_text().strip() for name in ("comm", "wchan")]
            lines.append(f"thread {task}: {texts[0]} in {texts[1]}")
    except OSError:
        pass
    return "\n".join(lines)


def python_path():
    """PYTHONPATH for a subprocess: these tests, what was there, and never the source tree."""
    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)
               if entry and Path(entry).resolve() not in (TESTS, TESTS.parent)]
    return os.pathsep.join([str(TESTS), *entries])


def environment_for(preload):
    environment = {**os.environ, "PYTHONPATH": python_path(), "UFFD_TEST_NATIVE": native.library_path()}
    environment.pop("PYTHONFAULTHANDLER", None)
    if preload:  # a sanitizer's own preload stays first
        before = environment.get("LD_PRELOAD")
        environment["LD_PRELOAD"] = f"{before}:{preload}" if before else str(preload)
    return environment


class Zygote:
    """The parent's side of support/zygote.py."""

    def __init__(self, preload):
        self.process = subprocess.Popen([sys.executable, "-P", "-c", ZYGOTE], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, start_new_session=True, env=environment_for(preload))
        self.owner = os.getpid()
        self.pending, self.started, self.pids, self.exits = b"", 0, {}, {}
        atexit.register(self.close)

    def start(self, request):
        self.started += 1
        self.process.stdin.write(json.dumps({"id": self.started, **request}).encode() + b"\n")
        self.process.stdin.flush()
        script = Forked(self, self.started)
        deadline = time.monotonic() + 20 * deadline_scale()
        while script.number not in self.pids:
            self.listen(1.0)
            assert time.monotonic() < deadline, "the zygote does not answer"
        script.pid = self.pids.pop(script.number)
        return script

    def listen(self, timeout_s):
        """Take what the zygote has to tell, waiting for it at most timeout_s."""
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        if not ready:
            return
        piece = os.read(self.process.stdout.fileno(), 65536)
        assert piece, "the zygote died"
        *lines, self.pending = (self.pending + piece).split(b"\n")
        for line in lines:
            kind, number, value = line.decode().split()
            (self.pids if kind == "pid" else self.exits)[int(number)] = int(value)

    def close(self):
        if os.getpid() == self.owner:
            self.process.stdin.close()
            self.process.wait(timeout=10)
            self.process.stdout.close()


class Forked:
    """A script forked by a zygote, with the part of Popen's interface that is used here."""

    def __init__(self, zygote, number):
        self.zygote, self.number, self.returncode, self.pid = zygote, number, None, None

    def poll(self):
        self.zygote.listen(0)
        if self.number in self.zygote.exits:
            self.returncode = self.zygote.exits.pop(self.number)
        return self.returncode

    def wait(self, timeout):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise subprocess.TimeoutExpired("script.py", timeout)
            self.zygote.listen(left_s)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


@functools.lru_cache(maxsize=None)
def zygote(preload):
    return Zygote(preload)


def start_script(code, *, argv=(), where=None, user_mode=False, preload=None, fresh=False, wrapper=()):
    """Start `code` (dedented, after the prelude of support/child.py); the process, its files in .directory.

    fresh: by an interpreter of its own rather than by a fork of one that has everything imported.
    """
    directory = Path(tempfile.mkdtemp(prefix="script-", dir=native.build_directory()))
    os.chmod(directory, 0o777)  # scripts that drop their privileges write here
    script = directory / "script.py"
    script.write_text((PRELUDE if fresh or wrapper else "\n") + textwrap.dedent(code))
    with open(directory / "stdout", "wb") as out, open(directory / "stderr", "wb") as err:
        if not fresh and not wrapper:
            process = zygote(preload).start({
                "script": str(script), "directory": str(directory), "argv": [str(item) for item in argv],
                "where": None if where is None else str(where), "user_mode": user_mode})
        else:
            environment = environment_for(preload)
            environment.update({"UFFD_TEST_WHERE": str(where)} if where is not None else {})
            environment.update({"UFFD_TEST_DROP": "1"} if user_mode else {})
            command = [*wrapper, sys.executable, "-P", script, *map(str, argv)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=directory,
                                       start_new_session=True, env=environment)
    process.directory = directory
    return process


def output_of(process, name):
    return (process.directory / name).read_text(errors="replace")


def wait_for_line(process, text, timeout_s=15.0):
    """Wait until the script has printed `text` on stdout."""
    deadline = time.monotonic() + timeout_s * deadline_scale()
    while text not in output_of(process, "stdout"):
        if process.poll() is not None or time.monotonic() > deadline:
            stands = where_it_stands(process.pid)
            end_group(process)
            raise AssertionError(f"{text!r} never came\n{stands}\n{output_of(process, 'stderr')}")
        time.sleep(0.01)


def end_group(process):
    """Kill the script with all it started, and reap it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(timeout=10)


def finish_script(process, deadline_s=20.0):
    """Wait for the end; an overrun is a failure, with where each thread stood."""
    try:
        process.wait(timeout=deadline_s * deadline_scale())
    except subprocess.TimeoutExpired:
        stands = where_it_stands(process.pid)
        end_group(process)
        raise AssertionError(f"hang: still there after {deadline_s:g} s\n{stands}\n--- stdout\n"
                             f"{output_of(process, 'stdout')[-4000:]}\n--- stderr\n"
                             f"{output_of(process, 'stderr')[-4000:]}") from None
    ended_at = time.monotonic()
    result = Result(process.returncode, output_of(process, "stdout"), output_of(process, "stderr"), ended_at)
    end_group(process)  # whoever it left behind
    return result


def run_script(code, deadline_s=20.0, **options):
    """Result of `code` run in a process of its own, killed after deadline_s."""
    return finish_script(start_script(code, **options), deadline_s)


def run_everywhere(code, deadline_s=20.0, **options):
    """Results of `code` for each delivery and backing to be had, all at once: for scripts that mostly wait."""
    places = [where for where in matrix.WHERES if where.unavailable() is None]
    processes = [start_script(code, where=where, **options) for where in places]
    return [finish_script(process, deadline_s) for process in processes]
