"""An engine's figures on a unix socket: `Engine.serve`. HTTP, so that curl and Prometheus can read them.

```
 uffd top, curl, a scraper                  acceptor (one thread)             at most 8 threads, one per connection
    | connect --------------------------->   | accept; 503 if 8 are open      |
    | GET /stats -------------------------------------------------------->    | read the head: 5 s, 8 KiB at most
    |                                        |                                | Figures, shared while fresh
    | <-------------------------------------------------------------------    | answer, 5 s at most; close
```
All of them are daemons, take no lock that the engine needs, and touch no managed page; a client can delay neither a
fault nor an exit.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import threading
import time
import weakref
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from . import _figures, _sockets

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Monitor"]

_CONNECTIONS = 8                    # at once; a ninth is told so and closed
_TALK_S = 5.0                       # for a whole request to come, and as long for its answer to go
_BETWEEN_S = 0.005                  # from one accept to the next: clients in a loop cost a few percent of a CPU
_HEAD_BYTES = 8 << 10               # of a request
_END_S = 1.0                        # how long close waits for threads that were told to end
_PASSING = {errno.ECONNABORTED, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPROTO}
_open: weakref.WeakSet[Monitor] = weakref.WeakSet()


class Monitor:
    """What `Engine.serve` returns: tells the engine's figures at `path` until it, or the engine, is closed.

    A context manager. In a forked child it is closed: the parent alone answers.
    """

    def __init__(self, engine: Engine, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fsdecode(path))
        self._figures = _figures.Figures(engine)
        self._closed = False
        self._connections: set[socket.socket] = set()
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._listener = _sockets.listen_unix(self.path, _CONNECTIONS)
        try:
            found = os.lstat(self.path)
            self._node = found.st_dev, found.st_ino
            self._acceptor = threading.Thread(target=self._accept, name="uffd-monitor", daemon=True)
            self._acceptor.start()
        except BaseException:
            os.unlink(self.path)
            self._listener.close()
            raise
        _open.add(self)
        self._finalizer = weakref.finalize(engine, self.close)       # also at the program's exit

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Removes the socket and ends all connections; idempotent. Blocks for a second at most."""
        if self._closed:
            return
        self._closed = True
        self._finalizer.detach()
        with suppress(OSError):                  # somebody may have removed it, or put something else in its place
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self._node:
                os.unlink(self.path)
        for one in (self._listener, *list(self._connections)):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)   # wakes the thread that waits on it, which close would not
        deadline_s = time.monotonic() + _END_S
        for thread in (self._acceptor, *list(self._threads)):
            if thread.is_alive() and thread is not threading.current_thread():   # a handler may let go of the engine
                thread.join(max(0.0, deadline_s - time.monotonic()))

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<uffd.monitor.Monitor at {self.path!r}{', closed' if self._closed else ''}>"

    def _forget(self) -> None:
        """In a forked child: the parent's descriptors go, its path stays. No lock is taken: who had it is not here."""
        self._closed = True
        for one in (self._listener, *list(self._connections)):
            with suppress(OSError):
                os.close(one.detach())           # close() would wait for readers, which are the parent's threads

    # ---- threads ----

    def _accept(self) -> None:
        _block_signals()                         # of what it starts, too
        with self._listener:
            while not self._closed:
                try:
                    connection, _ = self._listener.accept()
                except OSError as error:
                    if error.errno not in _PASSING:          # EINVAL: close shut it down
                        return
                    time.sleep(0.05)
                    continue
                self._welcome(connection)
                time.sleep(_BETWEEN_S)

    def _welcome(self, connection: socket.socket) -> None:
        if len(self._connections) >= _CONNECTIONS:
            _refuse(connection)
            return
        self._connections.add(connection)
        try:
            thread = threading.Thread(target=self._talk, args=(connection,), name="uffd-monitor", daemon=True)
            self._threads.add(thread)
            thread.start()
        except RuntimeError:                     # no more threads to be had, or the interpreter is about to end
            self._part(connection)

    def _talk(self, connection: socket.socket) -> None:
        try:
            head = b"" if self._closed else _read_head(connection, time.monotonic() + _TALK_S)
            if head:
                answer = _Request(head, self._figures).answer
                connection.settimeout(_TALK_S)
                connection.sendall(answer)       # its time-out is for all of it
        except (OSError, ValueError):
            pass                                 # late, or gone, or past what the library's parser takes
        finally:
            self._part(connection)

    def _part(self, connection: socket.socket) -> None:
        self._connections.discard(connection)
        connection.close()


class _Request(BaseHTTPRequestHandler):
    """One request that was read whole; `answer` is what to send. Parsing is the library's, reading and writing are
    not: its time-out is for one recv, so that a client which sends a byte now and then would never be late."""

    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def __init__(self, head: bytes, figures: _figures.Figures) -> None:
        self._figures = figures
        self.client_address = ("", 0)
        self.rfile, self.wfile = io.BytesIO(head), io.BytesIO()
        if _ends(head):
            self.handle_one_request()
        else:
            self.requestline = self.request_version = self.command = ""
            self.send_error(431, f"a request's head has {_HEAD_BYTES} bytes at most")
        self.answer = self.wfile.getvalue()

    def do_GET(self) -> None:
        try:
            path = self.path.partition("?")[0]
            if path == "/stats":
                self._tell(*self._figures.as_json())
            elif path == "/metrics":
                self._tell(*self._figures.as_prometheus(self.headers.get("Accept", "")))
            elif path == "/":
                self._tell(b"GET /stats for JSON, /metrics for Prometheus text\n", self.error_content_type)
            else:
                self.send_error(404, "there are /stats and /metrics")
        except ImportError as error:
            self._fail(501, str(error))
        except ReferenceError as error:
            self._fail(503, str(error))
        except Exception as error:               # a bug of ours must not print into somebody's program
            self._fail(500, f"{type(error).__name__}: {error}")

    do_HEAD = do_GET

    def _fail(self, code: int, text: str) -> None:
        """The status line repeats the text: one line, ASCII."""
        self.send_error(code, " ".join(text.encode("ascii", "backslashreplace").decode().split()))

    def _tell(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "uffd"

    def log_message(self, *_: Any) -> None:
        pass


def _read_head(connection: socket.socket, deadline_s: float) -> bytes:
    """A request's head; without its end if it is too long, b"" if the client went away."""
    head = b""
    while len(head) < _HEAD_BYTES and not _ends(head):
        connection.settimeout(_left_s(deadline_s))
        piece = connection.recv(_HEAD_BYTES - len(head))
        if not piece:
            return b""
        head += piece
    return head


def _ends(head: bytes) -> bool:
    return b"\r\n\r\n" in head or b"\n\n" in head


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "the client is too slow")
    return left_s


def _refuse(connection: socket.socket) -> None:
    """Waits for nothing: so little always has room in the socket of somebody who was told nothing yet."""
    text = f"{_CONNECTIONS} clients are connected already\n"
    with connection, suppress(OSError):
        connection.setblocking(False)
        connection.send(f"HTTP/1.0 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}"
                        f"\r\n\r\n{text}".encode())


def _block_signals() -> None:
    """They are the program's; those that a thread's own instruction causes can't be left to others."""
    own = {signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL}
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - own)


def _forget_all() -> None:
    for monitor in list(_open):
        monitor._forget()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
