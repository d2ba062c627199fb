"""The destination's door, a process of its own: it listens, and hands over the connections that have shown the key.

While a program waits for a block that has yet to come, it may hold the interpreter lock, and it waits for as long as
the connection is broken: nothing in that process could say hello to a source that comes back. So the hellos are said
here. Of a new migration both connections go to Incoming, in Python; of one that is taken up again, to a thread of the
core.

`Gate` is the parent's side, `main` what the process runs. It ends with the parent: its sockets are the parent's ends.
"""

from __future__ import annotations

import array
import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import MigrationError
from . import _auth, _urls

__all__ = ["Gate", "purpose"]

START_S = 30.0
PAIR_S = 10.0                       # a connection whose other half does not come is closed
_PURPOSE = re.compile(rb"(new|again):([0-9a-f]{32}):(push|ask)")
_MESSAGE_BYTES = 1 << 12


def purpose(what: str, migration: str, which: str) -> bytes:
    """What a source says that a connection is for."""
    return f"{what}:{migration}:{which}".encode()


class Gate:
    """The process, and the two sockets by which it hands connections over. OSError as _urls.listen."""

    def __init__(self, address: _urls.Address, key: bytes | None) -> None:
        self.new, new = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.again, again = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with new, again:
            self._process = subprocess.Popen(
                _command(new.fileno(), again.fileno()), pass_fds=(new.fileno(), again.fileno()),
                stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            self.new.send(json.dumps({"url": str(address), "key": _encoded(key)}).encode())
            self.new.settimeout(START_S)
            answer = json.loads(self.new.recv(_MESSAGE_BYTES) or b"{}")
            if "url" not in answer:
                raise _failure(answer)
        except BaseException:
            self.close()
            raise
        self.url: str = answer["url"]

    def accept(self, timeout_s: float) -> tuple[str, socket.socket, socket.socket] | None:
        """(migration, push, ask) of a new migration, or None when the time is over. OSError: the process is gone."""
        self.new.settimeout(max(timeout_s, 1e-6))
        try:
            data, fds, _, _ = socket.recv_fds(self.new, _MESSAGE_BYTES, 2)
        except (TimeoutError, BlockingIOError):
            return None
        if not data:
            raise ConnectionResetError("the process that listens for migrations has ended")
        return data.decode(), socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1])

    def close(self) -> None:
        """Idempotent; the process ends by itself when its sockets do."""
        self.new.close()
        self.again.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _command(new: int, again: int) -> list[str]:
    package = Path(__file__).resolve().parents[2]
    flags = subprocess._args_from_interpreter_flags()                    # type: ignore[attr-defined]
    start = (f"import sys; sys.path.insert(0, {str(package)!r}); from uffd.migrate._gate import main; "
             f"main({new}, {again})")
    return [sys.executable, *flags, "-P", "-c", start]


def _encoded(key: bytes | None) -> str | None:
    return None if key is None else base64.b64encode(key).decode()


def _failure(answer: dict[str, Any]) -> Exception:
    if "refused" in answer:
        return MigrationError(answer["refused"])
    return OSError(answer.get("errno", 0), answer.get("why", "the process that listens for migrations did not start"))


# ---- the process ------------------------------------------------------------------------------------------------


def main(new_fd: int, again_fd: int) -> None:
    """Until the parent closes its ends."""
    new, again = socket.socket(fileno=new_fd), socket.socket(fileno=again_fd)
    asked = json.loads(new.recv(_MESSAGE_BYTES))
    key = None if asked["key"] is None else base64.b64decode(asked["key"])
    pairs = _Pairs(new, again)
    from ._acceptor import Acceptor

    try:
        acceptor = Acceptor(_urls.parse(asked["url"]), key, pairs.ready)
    except MigrationError as error:
        new.send(json.dumps({"refused": str(error)}).encode())
        return
    except OSError as error:
        new.send(json.dumps({"errno": error.errno, "why": error.strerror or str(error)}).encode())
        return
    new.send(json.dumps({"url": str(acceptor.address)}).encode())
    with suppress(OSError, KeyboardInterrupt):
        while new.recv(_MESSAGE_BYTES):          # nothing is said here any more; its end is the parent's
            pass
    acceptor.close()
    os._exit(0)


class _Pairs:
    """The two connections of a migration come in any order."""

    def __init__(self, new: socket.socket, again: socket.socket) -> None:
        self._out = {b"new": new, b"again": again}
        self._half: dict[tuple[bytes, bytes], tuple[bytes, socket.socket, float]] = {}
        self._lock = threading.Lock()

    def ready(self, connection: socket.socket, peer: _auth.Peer) -> None:
        found = _PURPOSE.fullmatch(peer.purpose)
        if found is None:
            connection.close()
            return
        what, migration, which = found.groups()
        with self._lock:
            now_s = time.monotonic()
            for name in [name for name, half in self._half.items() if half[2] < now_s]:
                self._half.pop(name)[1].close()
            other = self._half.pop((what, migration), None)
            if other is None or other[0] == which:
                if other is not None:
                    other[1].close()
                self._half[what, migration] = which, connection, now_s + PAIR_S
                return
        both = {which: connection, other[0]: other[1]}
        self._hand_over(what, migration, both[b"push"], both[b"ask"])

    def _hand_over(self, what: bytes, migration: bytes, push: socket.socket, ask: socket.socket) -> None:
        fds = array.array("i", [push.fileno(), ask.fileno()])
        with push, ask:
            self._out[what].sendmsg([migration], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
