"""Many connections in the middle of their hello, in one thread: none delays another, and each has its own deadline.

```
 listener --accept--> half open, HALF_OPEN at most -- hello whole, key shown --> ready(connection, peer)
                       | a byte now and then: closed hello_s after it came, however busy it is
                       | one too many: the one that has been there longest goes
                       | refused: told why, closed
```
The oldest goes rather than the newest is refused: who fills the places has to do so anew in each round trip of the
hello, to keep an honest peer out, and not once in five seconds.
"""

from __future__ import annotations

import errno
import os
import selectors
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from . import _auth, _urls

__all__ = ["Acceptor"]

HALF_OPEN = 64
HELLO_S = 5.0
_CLOSE_S = 2.0                      # how long close waits for the thread
_PAUSE_S = 0.05                     # after an accept that found no descriptor or memory
_PASSING = {errno.ECONNABORTED, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPROTO}
_open: weakref.WeakSet[Acceptor] = weakref.WeakSet()

Ready = Callable[[socket.socket, _auth.Peer], object]


class Acceptor:
    """Listens at `address`, and calls ready(connection, peer) for each connection whose other end has the key.

    ready runs in the acceptor's thread and must not wait; the connection, which blocks, is its own from then on. What
    it raises closes the connection and nothing else. refused: connections that were turned away so far, by whom they
    were and why: [(reason, count)...] has at most a few kinds. In a forked child it is closed: the parent alone
    answers.
    """

    def __init__(self, address: _urls.Address, key: bytes | None, ready: Ready, *, hello_s: float = HELLO_S,
                 half_open: int = HALF_OPEN) -> None:
        self._key, self._ready = key, ready
        self._hello_s, self._places = hello_s, half_open
        self._half_open: dict[socket.socket, _HalfOpen] = {}     # in the order in which they came: of their deadlines
        self._closed = False
        self._pause_until_s = 0.0
        self.refused: dict[str, int] = {"late": 0, "crowded": 0, "gone": 0, "refused": 0}
        self._listener, self.address = _urls.listen(address, has_key=key is not None)
        try:
            self._node = _node(self.address.path) if self.address.path else None
            self._listener.setblocking(False)
            self._waker, self._bell = socket.socketpair()
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._selector.register(self._waker, selectors.EVENT_READ)
            self._thread = threading.Thread(target=self._run, name="uffd-migrate", daemon=True)
            self._thread.start()
        except BaseException:
            self._listener.close()
            raise
        _open.add(self)

    def close(self) -> None:
        """Stops listening and ends what is half open; what was handed to ready stays. Idempotent. Waits for the thread,
        two seconds at most; not when it is called from within ready."""
        if self._closed:
            return
        self._closed = True
        if self.address.path:
            with suppress(OSError):              # somebody may have put something else in its place
                if _node(self.address.path) == self._node:
                    os.unlink(self.address.path)
        with suppress(OSError):
            self._bell.send(b"x")
        if self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_S)

    # ---- the thread ----

    def _run(self) -> None:
        own = {signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL}
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - own)   # the others are the program's
        try:
            while not self._closed:
                for found, _ in self._selector.select(self._wait_s()):
                    self._serve(found.fileobj)
                self._end_late()
        finally:
            for one in [self._listener, self._waker, self._bell, *self._half_open]:
                one.close()
            self._half_open.clear()
            self._selector.close()

    def _serve(self, one: object) -> None:
        if one is self._listener:
            self._welcome()
        elif one in self._half_open:             # else it had to make room in this very round, or it is the bell
            half_open = self._half_open[one]
            try:
                over = half_open.go_on()
            except OSError:
                self._part(one, "gone")
                return
            if over:
                self._finish(one, half_open)

    def _welcome(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return                               # it went away again
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            self._selector.unregister(self._listener)            # it would be found ready at once, again and again
            self._pause_until_s = time.monotonic() + _PAUSE_S
            return
        try:
            _urls.check_peer(connection, has_key=self._key is not None)
            connection.setblocking(False)
        except (OSError, _urls.MigrationError):
            connection.close()
            self.refused["refused"] += 1
            return
        if len(self._half_open) >= self._places:
            self._part(next(iter(self._half_open)), "crowded")
        self._half_open[connection] = _HalfOpen(connection, _auth.Listening(self._key),
                                                time.monotonic() + self._hello_s)
        self._selector.register(connection, selectors.EVENT_READ)

    def _finish(self, connection: socket.socket, half_open: _HalfOpen) -> None:
        peer = half_open.talk.peer
        if peer is None:
            self._part(connection, "refused")
            return
        self._selector.unregister(connection)
        del self._half_open[connection]
        try:
            connection.setblocking(True)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ready(connection, peer)
        except BaseException as error:
            connection.close()
            if not isinstance(error, OSError):   # a bug of ours; the thread goes on for the others
                threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))

    def _part(self, connection: socket.socket, why: str) -> None:
        self._selector.unregister(connection)
        del self._half_open[connection]
        connection.close()
        self.refused[why] += 1

    def _end_late(self) -> None:
        now_s = time.monotonic()
        while self._half_open:
            oldest = next(iter(self._half_open))
            if self._half_open[oldest].deadline_s > now_s:
                break
            self._part(oldest, "late")
        if self._pause_until_s and self._pause_until_s <= now_s:
            self._pause_until_s = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _wait_s(self) -> float | None:
        ends_s = [half_open.deadline_s for half_open in list(self._half_open.values())[:1]]
        if self._pause_until_s:
            ends_s.append(self._pause_until_s)
        return max(0.0, min(ends_s) - time.monotonic()) if ends_s else None

    def _forget(self) -> None:
        """In a forked child. The path and the peers are the parent's; who holds a lock is not here."""
        self._closed = True
        for one in [self._listener, self._waker, self._bell, *list(self._half_open)]:
            with suppress(OSError):
                os.close(one.detach())
        with suppress(OSError):
            self._selector.close()


class _HalfOpen:
    def __init__(self, connection: socket.socket, talk: _auth.Listening, deadline_s: float) -> None:
        self.connection, self.talk, self.deadline_s = connection, talk, deadline_s
        self._got = b""

    def go_on(self) -> bool:
        """Reads what is there, and no byte beyond the hello; True when it is over. OSError: the other side is gone."""
        try:
            piece = self.connection.recv(self.talk.wanted - len(self._got))
        except BlockingIOError:
            return False
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "closed within the hello")
        self._got += piece
        if len(self._got) < self.talk.wanted:
            return False
        reply = self.talk.took(self._got)
        self._got = b""
        if self.connection.send(reply) < len(reply):     # 100 bytes in all always fit in an empty socket
            raise ConnectionResetError(errno.ENOBUFS, "no room for the answer")
        return not self.talk.wanted


def _node(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _forget_all() -> None:
    for acceptor in list(_open):
        if not acceptor._closed:
            acceptor._forget()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
