"""Providers in Python that write, for the tests: a host imports this module by its name."""

import os
import signal
import threading
import time

import numpy as np
import uffd

from support.hosted import BLOCK, tell

GATE_S = 20.0


class Store(uffd.Provider):
    """A file; a write is there when it returns, a flush is an fsync. `log` tells what was called."""

    def __init__(self, path, nbytes=None, log=None, concurrency=1):
        self.path, self.nbytes, self.log, self.concurrency = path, nbytes, log, concurrency

    def note(self, text):
        if self.log:
            tell(self.log, text)

    def open(self):
        self.note(f"open {os.getpid()}")
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT)

    def read(self, offset, out):
        out[:] = 0
        os.preadv(self.fd, [out], offset)

    def write(self, offset, data):
        self.note(f"write {offset} {len(data)} {os.getpid()}")
        self.put(offset, data)

    def put(self, offset, data):
        assert data.dtype == np.uint8 and data.ndim == 1 and not data.flags.writeable
        assert data.ctypes.data % 4096 == 0
        assert os.pwrite(self.fd, data, offset) == len(data)

    def flush(self):
        os.fsync(self.fd)
        self.note(f"flush {os.getpid()}")

    def close(self):
        self.note("close")
        os.close(self.fd)


class StoresMany(Store):
    """Takes writes that wait together. The first one waits for the test."""

    def write(self, offset, data):
        super().write(offset, data)
        deadline = time.monotonic() + GATE_S
        while not os.path.exists(f"{self.path}.open") and time.monotonic() < deadline:
            time.sleep(0.002)

    def write_many(self, requests):
        self.note("many " + " ".join(str(offset) for offset, _ in requests))
        if os.path.exists(f"{self.path}.fail"):
            raise ValueError("all of them")
        for offset, data in requests:
            self.put(offset, data)


class BadWriter(Store):
    """Misbehaves as its name says, at BLOCK: each time, or (`at_most`) so often over all its instances."""

    def __init__(self, how, path, nbytes=None, log=None, at_most=1 << 30):
        super().__init__(path, nbytes, log)
        self.how, self.at_most = how, at_most

    def again(self):
        """Whether it is to misbehave once more."""
        tell(f"{self.path}.tries", "try")
        with open(f"{self.path}.tries") as file:
            return len(file.readlines()) <= self.at_most

    def write(self, offset, data):
        super().write(offset, data)
        if offset == BLOCK and self.how.startswith("write") and self.again():
            return getattr(self, self.how)(data)
        return None

    def flush(self):
        if self.how.startswith("flush") and self.again():
            return getattr(self, self.how)()
        return super().flush()

    def write_raises(self, data):
        raise KeyError("no room here")

    def write_raises_errno(self, data):
        raise OSError(28, "the disk is full")

    def write_is_short(self, data):
        return len(data) - 1

    def write_is_long(self, data):
        return len(data) + 1

    def write_returns_true(self, data):
        return True

    def write_changes(self, data):
        data[:] = 0

    def write_changes_the_buffer(self, data):
        memoryview(data.base)[0] = 1

    def write_dies(self, data):
        os.kill(os.getpid(), signal.SIGKILL)

    def write_hangs(self, data):
        time.sleep(3600)

    def write_returns_all(self, data):
        return np.int64(len(data))

    def flush_raises_errno(self):
        raise OSError(5, "the tape is torn")

    def flush_returns(self):
        return False

    def flush_dies(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def flush_hangs(self):
        time.sleep(3600)


class KeepsData(Store):
    """Keeps `data`, and stores it again a little later."""

    def open(self):
        super().open()
        self.kept = []

    def put(self, offset, data):
        super().put(offset, data)
        self.kept.append((offset, data))

    def flush(self):
        for offset, data in self.kept:
            super().put(offset, data)
        super().flush()


class WaitsToStore(Store):
    """Notes that it is in a write, and ends it when the test says so."""

    def put(self, offset, data):
        deadline = time.monotonic() + GATE_S
        while not os.path.exists(f"{self.path}.open") and time.monotonic() < deadline:
            time.sleep(0.002)
        super().put(offset, data)


class Buffered(Store):
    """Acknowledges what is in a buffer of its own: wrong by contract once its host dies, and right until then."""

    def open(self):
        super().open()
        self.lock, self.pending = threading.Lock(), []

    def write(self, offset, data):
        with self.lock:
            self.pending.append((offset, data.tobytes()))

    def read(self, offset, out):
        super().read(offset, out)
        with self.lock:
            for at, data in self.pending:
                low, high = max(at, offset), min(at + len(data), offset + len(out))
                if low < high:
                    out[low - offset:high - offset] = np.frombuffer(data, np.uint8)[low - at:high - at]

    def flush(self):
        with self.lock:
            for offset, data in self.pending:
                os.pwrite(self.fd, data, offset)
            self.pending.clear()
        super().flush()


class OffersOld(Store):
    """Whoever is asked for the first block takes a copy of all of the file, waits for the test, and offers it."""

    concurrency = 4

    def read(self, offset, out):
        if offset:
            super().read(offset, out)
            return
        old = np.fromfile(self.path, np.uint8)
        self.note("copied")
        deadline = time.monotonic() + GATE_S
        while not os.path.exists(f"{self.path}.open") and time.monotonic() < deadline:
            time.sleep(0.002)
        out[:] = old[:len(out)]
        self.note(f"offered {self.offer(BLOCK, old[BLOCK:])}")
