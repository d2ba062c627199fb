"""Providers for the tests of the host's Python; the host imports this module by its name."""

import errno
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import uffd

from support.hosted import Pattern, lines
from support.pattern import pattern

GATE_S = 20.0


def wait_for(path):
    """Until the test makes this file."""
    deadline = time.monotonic() + GATE_S
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.002)


class Scaled(uffd.Provider):
    def __init__(self, factor=1):
        self.factor = factor

    def read(self, offset, out):
        out[:] = self.factor

    def method(self, offset, out):
        out[:] = 2 * self.factor


class Writes(Scaled):
    nbytes = 5

    def write(self, offset, data):
        pass


class BreaksWhenLoaded(Scaled):
    def __setstate__(self, state):
        raise ValueError("can't be had again")


class OnlyHere(Scaled):
    def __reduce__(self):
        return elsewhere, (os.getpid(),)


def elsewhere(process):
    if os.getpid() != process:
        raise ValueError("only here")
    return Scaled(1)


def fill_three(scale, offset, out):
    out[:] = 3 * scale


class Gated(Pattern):
    """A read at an offset under `gated_below` notes that it is there, and waits for the test."""

    def __init__(self, log, gate, concurrency=1, gated_below=1 << 60):
        super().__init__(None, log, concurrency)
        self.gate, self.gated_below = gate, gated_below

    def read(self, offset, out):
        self.note(f"in {offset}")
        if offset < self.gated_below:
            wait_for(self.gate)
        out[:] = pattern(offset, len(out))
        self.note(f"out {offset}")


class StuckAtClose(Pattern):
    def close(self):
        self.note("close")
        time.sleep(1000)


class LeavesThreads(Pattern):
    """Threads that would keep an interpreter from ending, one of them inside read."""

    def open(self):
        threading.Thread(target=time.sleep, args=(1000,)).start()

    def read(self, offset, out):
        self.note("in")
        time.sleep(1000)


class OpensAtTheSecondTry(Pattern):
    def open(self):
        super().open()
        if len(lines(self.log)) == 1:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "not yet")


class Answers(Pattern):
    """read() answers with what `how` makes, after a right fill."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def read(self, offset, out):
        if self.how != "unfilled":
            out[:] = pattern(offset, len(out))
        return getattr(self, self.how)(offset, out)

    def nothing(self, offset, out):
        return None

    def its_size(self, offset, out):
        return len(out)

    def its_size_by_numpy(self, offset, out):
        return np.int64(len(out))

    def too_little(self, offset, out):
        return 100

    def too_much(self, offset, out):
        return 1 << 30

    def true(self, offset, out):
        return True

    def data(self, offset, out):
        return bytes(out)

    def itself(self, offset, out):
        return out

    def unfilled(self, offset, out):
        out[:-8] = 1

    def os_error(self, offset, out):
        raise FileNotFoundError(errno.ENOENT, "gone", "/the/file")

    def os_error_without_errno(self, offset, out):
        raise TimeoutError("slow")

    def odd_errno(self, offset, out):
        raise OSError(123456, "odd")

    def key_error(self, offset, out):
        try:
            {}["inner"]
        except KeyError as error:
            raise ValueError("outer") from error

    def leaves(self, offset, out):
        sys.exit("leaving")

    def interrupted(self, offset, out):
        raise KeyboardInterrupt

    def hostile(self, offset, out):
        class HostileError(Exception):
            def __str__(self):
                raise RuntimeError("no words")
        raise HostileError

    def keeps(self, offset, out):
        self.__dict__.setdefault("kept", []).append(out)

    def surrogates(self, offset, out):
        raise ValueError("caf\udce9")

    def in_a_region(self, offset, out):
        uffd.Region(1 << 20, Pattern())


class ChecksItsCalls(Pattern):
    """Fails where `out`, the thread or the order of calls is not as promised."""

    def open(self):
        assert not hasattr(self, "file")
        self.file = object()

    def read(self, offset, out):
        assert self.file
        assert type(out) is np.ndarray and out.ndim == 1 and out.dtype == np.uint8
        assert out.flags.writeable and out.flags.c_contiguous and out.ctypes.data % uffd._core.PAGE_BYTES == 0
        assert threading.current_thread().daemon
        out[:] = pattern(offset, len(out))


class Many(Pattern):
    def read_many(self, requests):
        self.note(" ".join(f"{offset}+{len(out)}" for offset, out in requests))
        if os.path.exists(self.log + ".fail"):
            raise ValueError("all of them")
        for offset, out in requests:
            out[:] = pattern(offset, len(out))

    def read(self, offset, out):
        self.note("one")
        if offset == 0 and os.path.exists(self.log + ".gate"):
            wait_for(self.log + ".open")
        out[:] = pattern(offset, len(out))


class OnlyMany(uffd.Provider):
    def read_many(self, requests):
        for offset, out in requests:
            out[:] = pattern(offset, len(out))


class Says(Pattern):
    """Hands over what the process is like: read() answers with text in `out`."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def read(self, offset, out):
        text = getattr(self, self.what)().encode()
        out[:] = np.frombuffer(text.ljust(len(out)), np.uint8)

    def signals(self):
        with open("/proc/self/status") as file:
            found = dict(line.split(":\t") for line in file.read().splitlines() if line.startswith("Sig"))
        ignored = [number for number in range(1, 32) if int(found["SigIgn"], 16) >> (number - 1) & 1]
        return f"{int(found['SigBlk'], 16)} {ignored}"

    def files(self):
        found = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                found[int(name)] = (os.readlink(f"/proc/self/fd/{name}"), os.get_inheritable(int(name)))
            except OSError:
                pass
        return repr(found)

    def faulthandler(self):
        return str(faulthandler.is_enabled())

    def place(self):
        return f"{os.getcwd()} {sys.argv} {uffd.providers.hosted.in_host()}"

    def threads(self):
        return str(len([one for one in threading.enumerate() if one.name.startswith("uffd-host")]))

    def alarm(self):
        return str(signal.getsignal(signal.SIGINT))


def square(number):
    return number * number


def fork_and_exit():
    pid = os.fork()
    if not pid:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Children(Says):
    """Processes of the provider's own."""

    def fork(self):
        return str(fork_and_exit())

    def subprocess(self):
        return subprocess.run(["echo", "hello"], capture_output=True, text=True, check=True).stdout

    def pool_fork(self):
        return self._pool("fork")

    def pool_spawn(self):
        return self._pool("spawn")

    def pool_sends_itself(self):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return pool.apply(self.subprocess)

    def _pool(self, method):
        with multiprocessing.get_context(method).Pool(2) as pool:
            return str(pool.map(square, range(4)))

    def forked_child_returns(self):
        if os.fork() == 0:
            raise SystemExit(3)
        return str(os.waitstatus_to_exitcode(os.wait()[1]))


class Offers(Pattern):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def read(self, offset, out):
        out[:] = pattern(offset, len(out))
        block = self._session.block_bytes
        if self.what == "bytes":
            assert self.offer(block, b"\x01" * block)
        elif self.what == "array":
            assert self.offer(block, np.arange(2 * block, dtype="f8").reshape(2, block))
        elif self.what == "fortran":
            assert self.offer(block, np.asfortranarray(np.arange(6, dtype="u1").reshape(2, 3)))
        elif self.what == "large":
            assert self.offer(3 * block, np.zeros((40 << 20) + 5, np.uint8))
        elif self.what == "rows":
            assert self._session.offer_rows(block, 10 * block, np.zeros((3, block), np.uint8))
        elif self.what == "negative":
            self.offer(-1, b"123")


class Breakpoint(Pattern):
    def read(self, offset, out):
        breakpoint()
        out[:] = pattern(offset, len(out))


class Dies(Pattern):
    def read(self, offset, out):
        os.kill(os.getpid(), signal.SIGSEGV)


class WrongAboutItself(Pattern):
    def __init__(self, log, **claims):
        super().__init__(None, log)
        self.claims = claims

    def open(self):
        self.note("open")
        self.__dict__.update(self.claims)

    def close(self):
        self.note("close")


class FailsToClose(Pattern):
    def close(self):
        raise ValueError("the door is stuck")
