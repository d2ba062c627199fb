"""An engine's side and a HostEnd in Python, to test uffd/_host.py without an engine: both talk over the control socket,
and page buffers lie in the channel, as with the real ones."""

import mmap
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from uffd.providers import hosted

from support.scripts import python_path

PAGE = mmap.PAGESIZE
SLOTS = 32
BUFFER_BYTES = 1 << 20
CANARY_BYTES = 8
BLOCK_BYTES = 65536
WAIT_S = 20.0
OPEN, READ, WRITE, FLUSH = range(4)
PATIENCE_S = 10  # the real one gives a second; here a slow machine must not matter
START = ("import runpy, uffd._core; from support.fakehost import FakeHostEnd; uffd._core.HostEnd = FakeHostEnd; "
         "runpy.run_module('uffd._host', run_name='__main__', alter_sys=True)")


class Failed(Exception):
    def __init__(self, number, text):
        super().__init__(number, text)
        self.errno, self.text = number, text


class Opened(NamedTuple):
    nbytes: int | None
    concurrency: int
    read_many: bool
    writes: bool
    write_many: bool


# ---- in the host


class FakeHostEnd:
    """What uffd._core.HostEnd does, for one host process; watch() reads the socket for all."""

    def __init__(self, channel_fd, control_fd):
        self.channel_fd = channel_fd
        self.connection = Connection(control_fd)
        self.sending = threading.Lock()
        self.changed = threading.Condition()
        self.pending = []
        self.batch = {}  # slot: the slots that were taken with it, until all are answered
        self.running, self.limit, self.many, self.kinds = {}, {}, {}, {}
        self.known, self.waiting_offers = {}, []
        self.asked, self.windows, self.canary = {}, {}, secrets.token_bytes(CANARY_BYTES)
        self.stopping = False

    def tell(self, *message):
        with self.sending:
            try:
                self.connection.send(message)
            except OSError:  # the end of service
                pass

    def ready(self):
        self.tell("ready")

    def watch(self):
        while True:
            try:
                kind, *rest = self.connection.recv()
            except (EOFError, OSError):
                signal.alarm(PATIENCE_S)
                with self.changed:
                    self.stopping = True
                    self.changed.notify_all()
                return None
            if kind == "close":
                return rest[0]
            with self.changed:
                if kind == "post":
                    self.pending.append(rest)
                elif kind == "pickle":
                    self.known[rest[0]] = rest[1:]
                elif kind == "offered":
                    self.waiting_offers.append(rest[0])
                self.changed.notify_all()

    def take(self):
        with self.changed:
            while not self.stopping:
                for request in self.pending:
                    kind, session, slot, _, _ = request
                    if self.running.get(session, 0) < self.limit.get(session, 1):
                        return self._take(kind, session, slot)
                self.changed.wait()
        return None

    def _take(self, kind, session, slot):
        chosen = [other for other in self.pending if other[2] == slot or
                  (kind in self.many.get(session, ()) and other[0] == kind and other[1] == session)]
        self.pending = [other for other in self.pending if other not in chosen]
        self.running[session] = self.running.get(session, 0) + 1
        batch = {session: {other[2] for other in chosen}}
        for other in chosen:
            self.batch[other[2]] = batch
            self.asked[other[2]], self.kinds[other[2]] = other[4], kind
        requests = sorted((tuple(other[2:]) for other in chosen), key=lambda request: request[1])
        return kind, session, slot, requests

    def out(self, slot):
        nbytes = self.asked[slot]
        window = self.windows[slot] = mmap.mmap(self.channel_fd, BUFFER_BYTES, offset=slot * BUFFER_BYTES)
        view = memoryview(window)[:nbytes]
        for end in self._ends(nbytes):
            view[max(0, end - CANARY_BYTES):end] = self.canary[:min(end, CANARY_BYTES)]
        return view

    def data(self, slot):
        window = self.windows[slot] = mmap.mmap(self.channel_fd, BUFFER_BYTES, offset=slot * BUFFER_BYTES)
        return memoryview(window)[:self.asked[slot]].toreadonly()

    def _ends(self, nbytes):
        return [min(nbytes, start + PAGE) for start in range(0, nbytes, PAGE)]

    def opened(self, slot, session, nbytes, concurrency, read_many, writes, write_many):
        with self.changed:
            self.limit[session] = concurrency
            self.many[session] = [kind for kind, many in ((READ, read_many), (WRITE, write_many)) if many]
            self.changed.notify_all()
        self._answer(slot, "opened", session, Opened(nbytes, concurrency, read_many, writes, write_many))

    def done(self, slot):
        kind, nbytes, window = self.kinds[slot], self.asked[slot], self.windows.pop(slot, None)
        if kind == FLUSH:
            self._answer(slot, "done")
            return None
        raw = window[:nbytes]
        try:
            window.close()
            warning = None
        except BufferError:
            warning = f"the provider kept `{'out' if kind == READ else 'data'}`"
        ends = [end for end in self._ends(nbytes) if kind == READ and end >= CANARY_BYTES]
        if any(raw[end - CANARY_BYTES:end] == self.canary for end in ends):
            self._answer(slot, "failed", 5, "not filled whole")
        else:
            self._answer(slot, "done")
        return warning

    def failed(self, slot, number, text):
        self._answer(slot, "failed", number, text)

    def _answer(self, slot, *answer):
        if slot >= 0:
            with self.changed:
                ((session, left),) = self.batch.pop(slot).items()
                left.discard(slot)
                if not left:
                    self.running[session] -= 1
                self.changed.notify_all()
        self.tell("answer", slot, *answer)

    def offer(self, session, offset, step, rows):
        view = memoryview(rows)
        assert view.contiguous and view.ndim == 2 and view.itemsize == 1 and view.shape[1] <= 16 << 20
        self.tell("offer", session, offset, step, view.shape, bytes(view.cast("B")[:64]))
        with self.changed:
            while not self.waiting_offers:
                self.changed.wait()
            return self.waiting_offers.pop()

    def pickle_of(self, session):
        with self.changed:
            self.known.pop(session, None)
        self.tell("ask", session)
        with self.changed:
            while session not in self.known:
                self.changed.wait()
            data = self.known[session][0]
        if data is None:
            raise OSError(2, "the engine did not hand the provider over")
        return data

    def name_of(self, session):
        return self.known[session][1]

    def block_bytes_of(self, session):
        return BLOCK_BYTES

    def free_session(self, session):
        self.tell("freed", session)


# ---- in the test


class FakeEngine:
    """Starts a provider host and asks it. A context manager: the host is gone afterwards, and nothing is left."""

    def __init__(self, environment=None, preexec=None, channel_number=None, more_fds=(), **popen):
        self.channel_fd = os.memfd_create("fake-channel")
        os.ftruncate(self.channel_fd, SLOTS * BUFFER_BYTES)
        self.memory = mmap.mmap(self.channel_fd, SLOTS * BUFFER_BYTES)
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        self.control_number = theirs.fileno()
        self.numbers, self.messages, self.pickles = set(range(SLOTS)), [], {}
        self.changed, self.sending = threading.Condition(), threading.Lock()
        self.ended = False
        number = self.channel_fd if channel_number is None else channel_number
        self.host = subprocess.Popen(
            [sys.executable, "-P", "-c", START, str(number), str(self.control_number)],
            preexec_fn=lambda: self._before_exec(preexec),  # noqa: PLW1509
            pass_fds=(self.channel_fd, self.control_number, *more_fds),
            env={**os.environ, "PYTHONPATH": python_path(), **(environment or {})}, **popen)
        theirs.close()
        self.reader = threading.Thread(target=self._receive, daemon=True)
        self.reader.start()

    def _before_exec(self, preexec):
        """As the engine starts it: with all signals blocked."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        if preexec is not None:
            preexec(self)

    def _receive(self):
        while True:
            try:
                message = self.connection.recv()
            except (EOFError, OSError):
                with self.changed:
                    self.ended = True
                    self.changed.notify_all()
                return
            if message[0] == "ask":
                self.tell("pickle", message[1], *self.pickles.get(message[1], (None, "")))
            elif message[0] == "offer":
                self.tell("offered", True)
            with self.changed:
                self.messages.append(message)
                self.changed.notify_all()

    def tell(self, *message):
        with self.sending:
            self.connection.send(message)

    def wait(self, *beginning):
        """The next message that begins so; TimeoutError, EOFError when the host has ended."""
        with self.changed:
            while True:
                for message in self.messages:
                    if message[:len(beginning)] == beginning:
                        self.messages.remove(message)
                        return message[len(beginning):]
                if self.ended:
                    raise EOFError("the host has ended")
                if not self.changed.wait(WAIT_S):
                    raise TimeoutError(f"no {beginning} within {WAIT_S} s; there are {self.messages}")

    def session(self, provider, name="a region"):
        """A number for the provider, which the host may ask for by it."""
        with self.changed:
            number = len(self.pickles) + 1
            served = hosted.as_provider(provider)
            data = provider if isinstance(provider, bytes) else hosted.pickled(served)
            self.pickles[number] = (data, name)
        return number

    def post(self, session, offset=0, nbytes=BLOCK_BYTES, kind=READ, data=None):
        with self.changed:
            slot = self.numbers.pop()
        start = slot * BUFFER_BYTES
        self.memory[start:start + nbytes] = b"\xA5" * nbytes if data is None else data
        self.tell("post", kind, session, slot, offset, nbytes)
        return slot, nbytes

    def answer(self, posted):
        """Bytes of a read, Opened of an open; raises Failed."""
        slot, nbytes = posted
        kind, *rest = self.wait("answer", slot)
        with self.changed:
            self.numbers.add(slot)
        if kind == "failed":
            raise Failed(*rest)
        if kind == "opened":
            return rest[1]
        return np.frombuffer(self.memory[slot * BUFFER_BYTES:slot * BUFFER_BYTES + nbytes], np.uint8)

    def open(self, session):
        return self.answer(self.post(session, nbytes=0, kind=OPEN))

    def read(self, session, offset=0, nbytes=BLOCK_BYTES):
        return self.answer(self.post(session, offset, nbytes))

    def write(self, session, offset, data):
        self.answer(self.post(session, offset, len(data), WRITE, bytes(data)))

    def flush(self, session):
        self.answer(self.post(session, nbytes=0, kind=FLUSH))

    def opened(self, provider, name="a region"):
        session = self.session(provider, name)
        self.open(session)
        return session

    def end(self):
        """Ends the service; the host's exit code."""
        if self.connection is not None:
            with self.sending:
                os.set_blocking(self.connection.fileno(), True)
                shut = socket.socket(fileno=os.dup(self.connection.fileno()))
            shut.shutdown(socket.SHUT_RDWR)
            shut.close()
        return self.exit_code()

    def exit_code(self):
        return self.host.wait(WAIT_S)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        try:
            if self.host.poll() is None:
                self.host.kill()
            self.host.wait(WAIT_S)
            self.reader.join(WAIT_S)
        finally:
            self.connection.close()
            self.memory.close()
            os.close(self.channel_fd)
            for stream in (self.host.stdin, self.host.stdout, self.host.stderr):
                if stream is not None:
                    stream.close()


def read_until(stream, words):
    """What a pipe says, up to and with `words`."""
    text = b""
    while words not in text:
        if not select.select([stream], [], [], WAIT_S)[0]:
            raise TimeoutError(f"no {words!r} in {text!r}")
        piece = os.read(stream.fileno(), 65536)
        if not piece:
            raise EOFError(f"no {words!r} in {text!r}")
        text += piece
    return text
