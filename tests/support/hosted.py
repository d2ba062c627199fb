"""Providers in Python for the tests: a host imports this module by its name, as it would a user's."""

import os
import signal
import sys
import threading
import time

import numpy as np
import uffd

from support.pattern import pattern

BLOCK = 65536


def tell(path, text):
    """Append a line to a file that the test reads: one write, so that lines of several threads stay whole."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"{text}\n".encode())


def lines(path):
    try:
        with open(path) as file:
            return file.read().split("\n")[:-1]
    except FileNotFoundError:
        return []


def fill_pattern(offset, out):
    out[:] = pattern(offset, len(out))


class Pattern(uffd.Provider):
    """The test's byte sequence; writes what happens to it into `log`."""

    def __init__(self, nbytes=None, log=None, concurrency=1):
        self.nbytes, self.log, self.concurrency = nbytes, log, concurrency

    def note(self, text):
        if self.log:
            tell(self.log, text)

    def open(self):
        self.note(f"open {os.getpid()}")

    def read(self, offset, out):
        self.note(f"read {offset} {len(out)}")
        out[:] = pattern(offset, len(out))

    def close(self):
        self.note(f"close {os.getpid()}")


class KnownAfterOpen(Pattern):
    def open(self):
        self.nbytes = 3 * BLOCK + 100


class FailsToOpen(Pattern):
    def open(self):
        raise PermissionError(13, "the vault is shut")


class Broken(Pattern):
    """Misbehaves at the block of offset BLOCK, in a way given by its name."""

    def __init__(self, how, nbytes=8 * BLOCK, log=None):
        super().__init__(nbytes, log)
        self.how = how

    def read(self, offset, out):
        self.note(f"read {offset} {len(out)}")
        out[:] = pattern(offset, len(out))
        if offset <= BLOCK < offset + len(out):
            return getattr(self, self.how)(offset, out)
        return None

    def raises(self, offset, out):
        raise KeyError("no such block here")

    def raises_errno(self, offset, out):
        raise FileNotFoundError(2, "the source is gone")

    def exits(self, offset, out):
        sys.exit(3)

    def returns_bytes(self, offset, out):
        return bytes(len(out))

    def returns_short(self, offset, out):
        return len(out) - 1

    def recurses(self, offset, out):
        return self.recurses(offset, out)

    def dies(self, offset, out):
        os.kill(os.getpid(), signal.SIGKILL)

    def leaves(self, offset, out):
        os._exit(9)

    def sleeps(self, offset, out):
        time.sleep(3600)


class Unfilled(Pattern):
    """Leaves the second half of everything as it was."""

    def read(self, offset, out):
        out[:len(out) // 2] = 1


class Keeps(Pattern):
    """Keeps `out` and writes to it later: when the next read() begins, and a while after the last one."""

    def open(self):
        self.kept, self.later = [], None

    def read(self, offset, out):
        if self.later:
            self.later.cancel()
            self.later.join()               # whatever it writes from now on, it would write to what read() fills here
        scribble(self.kept)
        out[:] = pattern(offset, len(out))
        self.kept.append(out)
        self.later = threading.Timer(0.3, scribble, [self.kept])
        self.later.start()


def scribble(kept):
    for out in kept:
        out[:] = 0xEE


class Offers(Pattern):
    """Whoever is asked for a block of a group of eight gives the other seven, too."""

    def read(self, offset, out):
        self.note(f"read {offset} {len(out)}")
        out[:] = pattern(offset, len(out))
        start = offset // (8 * BLOCK) * 8 * BLOCK
        self.note(f"offer {self.offer(start, pattern(start, 8 * BLOCK))}")


class Many(Pattern):
    """Takes neighbouring requests together."""

    def read_many(self, requests):
        self.note(f"many {len(requests)}")
        for offset, out in requests:
            out[:] = pattern(offset, len(out))
        time.sleep(0.02)


class Waits(Pattern):
    """Takes neighbouring requests together; nothing goes on before the file `gate` is there."""

    def __init__(self, nbytes, log, gate):
        super().__init__(nbytes, log)
        self.gate = gate

    def read(self, offset, out):
        self.read_many([(offset, out)])

    def read_many(self, requests):
        self.note("asked " + " ".join(str(offset // BLOCK) for offset, _ in requests))
        while not os.path.exists(self.gate):
            time.sleep(0.01)
        for offset, out in requests:
            out[:] = pattern(offset, len(out))


class Slow(Pattern):
    def __init__(self, delay_s, nbytes=None, log=None, concurrency=1):
        super().__init__(nbytes, log, concurrency)
        self.delay_s = delay_s

    def read(self, offset, out):
        time.sleep(self.delay_s)
        super().read(offset, out)


class Once(Pattern):
    """Fails the first tries of each block."""

    def __init__(self, failures, nbytes=None):
        super().__init__(nbytes)
        self.failures = failures

    def open(self):
        self.tries = {}

    def read(self, offset, out):
        self.tries[offset] = self.tries.get(offset, 0) + 1
        if self.tries[offset] <= self.failures:
            raise OSError(5, "not yet")
        out[:] = pattern(offset, len(out))


class Prints(Pattern):
    def read(self, offset, out):
        print("hello from the provider")
        print("and a complaint", file=sys.stderr)
        super().read(offset, out)


class Forks(Pattern):
    """Uses children of its own."""

    def read(self, offset, out):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        super().read(offset, out)


class Descriptors(Pattern):
    """Its bytes are the numbers of the host's open descriptors."""

    def read(self, offset, out):
        out[:] = 0
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
        out[:len(numbers)] = np.sort(np.array(numbers, np.uint8))


class Straggles(Pattern):
    """Fails at once while a thread of its own goes on writing to what it was given."""

    def open(self):
        self.calls = 0

    def read(self, offset, out):
        self.calls += 1
        if self.calls > 1:
            out[:] = pattern(offset, len(out))
            return
        threading.Thread(target=self.scribble, args=(out,), daemon=True).start()
        raise OSError(5, "one part of it failed")

    def scribble(self, out):
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            out[:] = 0xEE
            time.sleep(0.0005)


class FailsAlways(Pattern):
    def read(self, offset, out):
        raise OSError(5, "never")


class SleepsInOpen(Pattern):
    def open(self):
        time.sleep(3600)


class BrokenTwice(Pattern):
    """Fails at block 3, after a while, and at once at block 40."""

    def read(self, offset, out):
        if offset <= 3 * BLOCK < offset + len(out):
            time.sleep(0.2)
            raise OSError(5, "block 3")
        if offset <= 40 * BLOCK < offset + len(out):
            raise OSError(5, "block 40")
        out[:] = pattern(offset, len(out))
