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
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import MigrationError
from . import _auth, _states, _urls

__all__ = ["Gate", "last_words", "notice_silence", "own_pidfd", "purpose", "take_pidfd"]

START_S = 30.0
SILENCE_S = 15
PAIR_S = 10.0                       # a connection whose other half does not come is closed
_PURPOSE = re.compile(rb"(new|again):([0-9a-f]{32}):(push|ask)")
_MESSAGE_BYTES = 1 << 12
_LAST_WORDS = 1000                  # of migrations that are over, which are kept
_HEAD = struct.Struct("=IIQIIQ")    # of the core's frames: _wire.h; their kinds as _wire.pxi numbers them
_HAVE_END, _DONE, _GAVE_UP, _ENDED = range(37, 41)


def notice_silence(connection: socket.socket) -> None:
    """A peer whose machine is gone says nothing: what it does not acknowledge in time ends the connection."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)


def own_pidfd(ask: socket.socket) -> int:
    """This process, for a peer on the same machine to see its end: a descriptor, the caller's; -1: there is none."""
    if ask.family != socket.AF_UNIX:
        return -1
    try:
        return os.pidfd_open(os.getpid())
    except OSError:
        return -1


def take_pidfd(ask: socket.socket) -> int:
    """The one that the peer sends next; -1: something between the two passes bytes only."""
    data, fds, _, _ = socket.recv_fds(ask, 1, 1)
    if data != b"p":
        for fd in fds:
            os.close(fd)
        raise MigrationError("migration refused: the other side sent what can't be: no descriptor of its process")
    return fds[0] if fds else -1


def purpose(what: str, migration: str, which: str) -> bytes:
    """What a source says that a connection is for."""
    return f"{what}:{migration}:{which}".encode()


def last_words(phase: _states.Phase) -> bytes:
    """What a destination that is over would answer to a source that comes back: frames, for the process to say."""
    if phase is _states.Phase.COMPLETED:
        return _HEAD.pack(_HAVE_END, 0, 0, 0, 0, 1) + _HEAD.pack(_DONE, 0, 0, 0, 0, 0)
    ran = _states.owner_of("destination", phase) == "destination"
    return _HEAD.pack(_ENDED if ran else _GAVE_UP, 0, 0, 0, 0, 0)


class Gate:
    """The process, and the socket by which it hands connections over. OSError as _urls.listen."""

    def __init__(self, address: _urls.Address, key: bytes | None) -> None:
        self.new, new = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with new:
            self._process = subprocess.Popen(_command(new.fileno()), pass_fds=(new.fileno(),),
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

    def route(self, migration: str) -> socket.socket:
        """By which connections come from now on that take this migration up again; the caller's, who closes it when
        there will be none. One for each migration: several may be alive, and each reads its own. What is sent to it
        before it is closed is the migration's last words. OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(self.new, [migration.encode()], [theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        return ours

    def close(self) -> None:
        """Idempotent; the process ends by itself when its socket does."""
        self.new.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _command(new: int) -> list[str]:
    package = Path(__file__).resolve().parents[2]
    flags = subprocess._args_from_interpreter_flags()                    # type: ignore[attr-defined]
    start = (f"import sys; sys.path.insert(0, {str(package)!r}); from uffd.migrate._gate import main; "
             f"main({new})")
    return [sys.executable, *flags, "-P", "-c", start]


def _encoded(key: bytes | None) -> str | None:
    return None if key is None else base64.b64encode(key).decode()


def _failure(answer: dict[str, Any]) -> Exception:
    if "refused" in answer:
        return MigrationError(answer["refused"])
    return OSError(answer.get("errno", 0), answer.get("why", "the process that listens for migrations did not start"))


# ---- the process ------------------------------------------------------------------------------------------------


def main(new_fd: int) -> None:
    """Until the parent closes its end."""
    new = socket.socket(fileno=new_fd)
    asked = json.loads(new.recv(_MESSAGE_BYTES))
    key = None if asked["key"] is None else base64.b64decode(asked["key"])
    pairs = _Pairs(new)
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
        while pairs.look():                      # its end is the parent's
            select.select([new], [], [])
    acceptor.close()
    os._exit(0)


class _Pairs:
    """The two connections of a migration come in any order."""

    def __init__(self, new: socket.socket) -> None:
        self._new = new
        self._routes: dict[bytes, socket.socket] = {}
        self._last_words: dict[bytes, bytes] = {}
        self._half: dict[tuple[bytes, bytes], tuple[bytes, socket.socket, float]] = {}
        self._answered: list[tuple[float, socket.socket]] = []
        self._lock = threading.Lock()

    def look(self) -> bool:
        """Takes what the parent said; False: it is gone."""
        with self._lock:
            return self._take_routes()

    def _take_routes(self) -> bool:
        """Where connections go that take a migration up again. Under the lock, by both threads: a source may be back
        before the other one has looked."""
        while select.select([self._new], [], [], 0)[0]:
            migration, fds, _, _ = socket.recv_fds(self._new, _MESSAGE_BYTES, 1)
            if not migration:
                return False
            for name in list(self._routes):
                self._look(name)
            self._routes[migration] = socket.socket(fileno=fds[0])
        return True

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
            while self._answered and self._answered[0][0] < now_s:
                self._answered.pop(0)[1].close()
            other = self._half.pop((what, migration), None)
            if other is None or other[0] == which:
                if other is not None:
                    other[1].close()
                self._half[what, migration] = which, connection, now_s + PAIR_S
                return
            both = {which: connection, other[0]: other[1]}
            self._hand_over(what, migration, both[b"push"], both[b"ask"])

    def _hand_over(self, what: bytes, migration: bytes, push: socket.socket, ask: socket.socket) -> None:
        for one in (push, ask):
            notice_silence(one)
        if what == b"again":
            self._take_routes()
            self._look(migration)
            if migration in self._last_words:
                self._answer(self._last_words[migration], push, ask)
                return
        out = self._new if what == b"new" else self._routes.get(migration)
        fds = array.array("i", [push.fileno(), ask.fileno()])
        with push, ask:                          # closed here: its other end has them, or nobody wants them
            if out is not None:
                with suppress(OSError):          # it is over, or takes none just now: others must not wait for it
                    out.sendmsg([migration], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)], socket.MSG_DONTWAIT)

    def _look(self, migration: bytes) -> None:
        """Whether that migration is over: then it has said its last words, or ended without."""
        to = self._routes.get(migration)
        if to is None:
            return
        try:
            said = to.recv(_MESSAGE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        self._routes.pop(migration).close()
        if said:
            self._last_words[migration] = said
            while len(self._last_words) > _LAST_WORDS:
                self._last_words.pop(next(iter(self._last_words)))

    def _answer(self, words: bytes, push: socket.socket, ask: socket.socket) -> None:
        """The source hangs up when it has read them: closed from here, they might be lost."""
        with suppress(OSError):
            ask.send(words, socket.MSG_DONTWAIT)
        ends_s = time.monotonic() + PAIR_S
        self._answered += [(ends_s, push), (ends_s, ask)]
