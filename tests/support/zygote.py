"""A process that has everything imported, and forks itself for each script: a tenth of a fresh interpreter's time.

Started by support/scripts.py as `python -c "from support.child import *; ...; exec(serve())"`. It has made no engine
and no region, so the forked script begins as a fresh process would. In the child, `serve` returns the script's code,
which the main module then runs: it ends, and finalises, like any program.
"""

import json
import os
import signal
import sys
import warnings

from support import child
from support.matrix import where_from_environment

COMMANDS, ANSWERS = 0, 1  # pipes, in the place of stdin and stdout


def become(request):
    """In the child: its own session, files, directory, environment and user; the script's code."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    directory = request["directory"]
    os.chdir(directory)
    for fd, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
        opened = os.open(name, flags)
        os.dup2(opened, fd)
        os.close(opened)
    sys.argv = [request["script"], *request["argv"]]
    main = sys.modules["__main__"]
    if request["where"]:
        os.environ["UFFD_TEST_WHERE"] = request["where"]
    main.WHERE = child.WHERE = where_from_environment()
    if request["user_mode"]:
        child.drop_privileges()
    with open(request["script"]) as file:
        return compile(file.read(), request["script"], "exec")


def answer(text):
    os.write(ANSWERS, text.encode() + b"\n")


def reap(running):
    """Tell the exit of each child that ended."""
    for pid in list(running):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            answer(f"exit {running.pop(pid)} {os.waitstatus_to_exitcode(status)}")


def lines_of(reader, wake, running):
    """The commands' lines, until the pipe closes; children are reaped in between."""
    import select

    pending = b""
    while True:
        ready, _, _ = select.select([reader, wake], [], [])
        if wake in ready:
            os.read(wake, 1 << 12)
        reap(running)
        if reader in ready:
            piece = os.read(reader, 65536)
            if not piece:
                return
            *lines, pending = (pending + piece).split(b"\n")
            yield from lines


def serve():
    """In a child: the code to run. In the zygote itself it ends the process when its commands end."""
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running = {}
    for line in lines_of(COMMANDS, wake, running):
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            os.close(wake)
            code = become(request)
            os.close(waker)
            return code
        running[pid] = request["id"]
        answer(f"pid {request['id']} {pid}")
    os._exit(0)
