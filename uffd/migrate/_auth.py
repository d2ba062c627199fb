"""Who is there: four messages of fixed size before anything else is read or said on a connection.

```
 connector                                                        listener
 hello: versions it speaks, has a key?, nonce        ------->     at most so many bytes, until the deadline of the whole
                                        <-------     challenge: the version chosen, has a key?, nonce; or a refusal
 proof: purpose, HMAC(key, "connector", transcript)  ------->     compared in constant time
                                        <-------     proof: HMAC(key, "listener", transcript); or a refusal
```
The transcript is all that went before, both nonces among it: 32 fresh random bytes of each side, so that neither side's
messages serve a second time, and a version or purpose that somebody changed on the way fits no proof. The two labels
keep one side's proof from being sent back to it as the other's. The connector proves first: a listener says nothing
that depends on its key to somebody who does not have it. Scheme: challenge and response with mutual authentication, as
in ISO/IEC 9798-4 (three passes), HMAC of RFC 2104 over SHA-256.

What it does not do: encrypt, or authenticate what follows. Somebody on the way who can change packets can take an
authenticated connection over; where that matters, a tunnel goes around it (docs/migration.md).

`Listening` and `Connecting` are without input and output, so that one thread can talk with many (_acceptor.py's), and
tests can see every message; `answer` and `prove` drive them over a socket.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
from dataclasses import dataclass

from .._sockets import receive, send
from ..errors import MigrationError

__all__ = ["VERSIONS", "Connecting", "Listening", "Peer", "answer", "check_key", "prove"]

VERSIONS = (1, 1)                   # the oldest and the newest that this code speaks
PURPOSE_BYTES = 63                  # of what a connector says a connection is for, at most
_MAGIC = b"UFFDMIG\n"
_HELLO = struct.Struct("!8sHHB3x32s")            # magic, oldest, newest, has a key, nonce
_CHALLENGE = struct.Struct("!8sBxHHHB3x32s")     # magic, verdict, version, oldest, newest, has a key, nonce
_PROOF = struct.Struct("!B63s32s")               # length of the purpose, purpose, HMAC
_VERDICT = struct.Struct("!8sB3x32s")            # magic, verdict, HMAC
_NO_KEY = b"no key"                 # what proofs are made with where there is none: they then show two ends that agree
_ACCEPTED, _BAD_HELLO, _VERSION, _KEY_WANTED, _KEY_UNKNOWN, _WRONG_KEY = range(6)
_WHY = {
    _BAD_HELLO: "the destination did not understand the hello: is another kind of server there?",
    _KEY_WANTED: "the destination has a key, and none was given here: pass its key=",
    _KEY_UNKNOWN: "a key was given here, and the destination has none: pass the same key= to listen()",
    _WRONG_KEY: "the keys of the two ends differ: pass the same key= at both",
}


@dataclass(frozen=True)
class Peer:
    """The other end, once it has shown that it has the key (without one: that it speaks as we do).

    version: of what is spoken from now on. purpose: what the connector says the connection is for. session: 32 bytes
    that are the same at both ends, and of no other connection.
    """

    version: int
    purpose: bytes
    session: bytes


def prove(connection: socket.socket, key: bytes | None, purpose: bytes = b"", *, deadline_s: float) -> Peer:
    """The connector's side. Blocks until deadline_s (time.monotonic) at most, for all of it.

    MigrationError: refused, with the cure. OSError: the connection; TimeoutError past the deadline. The connection is
    the caller's to close.
    """
    talk = Connecting(key, purpose)
    _drive(connection, talk, deadline_s)
    assert talk.peer is not None
    return talk.peer


def answer(connection: socket.socket, key: bytes | None, *, deadline_s: float) -> Peer:
    """The listener's side, likewise."""
    talk = Listening(key)
    _drive(connection, talk, deadline_s)
    assert talk.peer is not None
    return talk.peer


def check_key(key: object) -> bytes | None:
    """What the user gave as key=, as bytes; TypeError or ValueError."""
    if key is None:
        return None
    if isinstance(key, str):
        key = key.encode()
    if not isinstance(key, (bytes, bytearray, memoryview)):
        raise TypeError(f"a key is bytes or str, not {type(key).__name__}: secrets.token_bytes(32) makes a good one")
    if not bytes(key):
        raise ValueError("the key is empty, which is no key at all: secrets.token_bytes(32) makes a good one; None "
                         "is for going without")
    return bytes(key)


class _Talk:
    """One side. `wanted` bytes are to be read and given to `took`, which answers what to send; 0: it is over. `failure`
    is then why it was refused, and to be raised once the last answer is sent; else `peer` is there."""

    def __init__(self, key: bytes | None, versions: tuple[int, int]) -> None:
        self._has_key = key is not None
        self._key = _NO_KEY if key is None else key
        self._versions = versions
        self._nonce = secrets.token_bytes(32)
        self._transcript = hashlib.sha256(b"uffd migration, hello 1")
        self.wanted = 0
        self.peer: Peer | None = None
        self.failure: MigrationError | None = None

    def took(self, data: bytes) -> bytes:
        raise AssertionError("of the two sides")

    def _mac(self, label: bytes) -> bytes:
        return hmac.digest(self._key, label + self._transcript.digest(), "sha256")

    def _refuse(self, why: str) -> None:
        self.wanted = 0
        self.failure = MigrationError(f"migration refused: {why}")

    def _accept(self, version: int, purpose: bytes) -> None:
        self.wanted = 0
        self.peer = Peer(version, purpose, self._mac(b"session"))


class Connecting(_Talk):
    """The connector's side: `hello` is sent first."""

    def __init__(self, key: bytes | None, purpose: bytes = b"", versions: tuple[int, int] = VERSIONS) -> None:
        super().__init__(key, versions)
        if len(purpose) > PURPOSE_BYTES:
            raise ValueError(f"a purpose has {PURPOSE_BYTES} bytes at most, this one {len(purpose)}")
        self._purpose = purpose
        self._version = 0
        self.hello = _HELLO.pack(_MAGIC, *versions, self._has_key, self._nonce)
        self._transcript.update(self.hello)
        self.wanted = _CHALLENGE.size

    def took(self, data: bytes) -> bytes:
        if len(data) == _CHALLENGE.size and not self._version:
            return self._took_challenge(data)
        return self._took_verdict(data)

    def _took_challenge(self, data: bytes) -> bytes:
        magic, verdict, version, oldest, newest, has_key, _ = _CHALLENGE.unpack(data)
        if magic != _MAGIC:
            self._refuse("what listens there does not speak as a destination does: is it another kind of server?")
        elif verdict == _VERSION:
            self._refuse(_versions_differ("the destination", (oldest, newest), "this side", self._versions))
        elif verdict != _ACCEPTED:
            self._refuse(_WHY.get(verdict, f"for a reason that only a newer version knows ({verdict})"))
        elif bool(has_key) != self._has_key:     # a listener of ours would have said so
            self._refuse(_WHY[_KEY_UNKNOWN if self._has_key else _KEY_WANTED])
        elif not self._versions[0] <= version <= self._versions[1]:
            self._refuse(f"the destination chose version {version}, which was not offered")
        else:
            self._transcript.update(data)
            padded = struct.pack("!B63s", len(self._purpose), self._purpose)
            self._transcript.update(padded)
            self._version = version
            self.wanted = _VERDICT.size
            return padded + self._mac(b"connector")
        return b""

    def _took_verdict(self, data: bytes) -> bytes:
        magic, verdict, mac = _VERDICT.unpack(data)
        if magic == _MAGIC and verdict != _ACCEPTED:
            self._refuse(_WHY.get(verdict, f"for a reason that only a newer version knows ({verdict})"))
        elif magic != _MAGIC or not hmac.compare_digest(mac, self._mac(b"listener")):
            self._refuse("what listens there could not show that it has the key: it is not the destination, or the "
                         "connection was tampered with")
        else:
            self._accept(self._version, self._purpose)
        return b""


class Listening(_Talk):
    """The listener's side."""

    def __init__(self, key: bytes | None, versions: tuple[int, int] = VERSIONS) -> None:
        super().__init__(key, versions)
        self._version = 0
        self.wanted = _HELLO.size

    def took(self, data: bytes) -> bytes:
        if not self._version:
            return self._took_hello(data)
        return self._took_proof(data)

    def _took_hello(self, data: bytes) -> bytes:
        magic, oldest, newest, has_key, _ = _HELLO.unpack(data)
        verdict = _ACCEPTED
        if magic != _MAGIC or oldest > newest or oldest == 0:
            verdict = _BAD_HELLO
            self._refuse("what connected does not speak as a source does")
        elif newest < self._versions[0] or oldest > self._versions[1]:
            verdict = _VERSION
            self._refuse(_versions_differ("the source", (oldest, newest), "this side", self._versions))
        elif bool(has_key) != self._has_key:
            verdict = _KEY_WANTED if self._has_key else _KEY_UNKNOWN
            self._refuse("the source has no key" if self._has_key else "the source has a key, and there is none here")
        version = 0 if verdict else min(newest, self._versions[1])
        reply = _CHALLENGE.pack(_MAGIC, verdict, version, *self._versions, self._has_key,
                                bytes(32) if verdict else self._nonce)
        if not verdict:
            self._transcript.update(data)
            self._transcript.update(reply)
            self._version = version
            self.wanted = _PROOF.size
        return reply

    def _took_proof(self, data: bytes) -> bytes:
        length, padded, mac = _PROOF.unpack(data)
        self._transcript.update(data[:-32])
        if not hmac.compare_digest(mac, self._mac(b"connector")):
            self._refuse("what connected could not show that it has the key")
            return _VERDICT.pack(_MAGIC, _WRONG_KEY, bytes(32))
        if length > PURPOSE_BYTES or any(padded[length:]):
            self._refuse("what connected does not speak as a source does")
            return _VERDICT.pack(_MAGIC, _BAD_HELLO, bytes(32))
        self._accept(self._version, padded[:length])
        return _VERDICT.pack(_MAGIC, _ACCEPTED, self._mac(b"listener"))


def _versions_differ(one: str, theirs: tuple[int, int], other: str, ours: tuple[int, int]) -> str:
    newer, spoken = (one, theirs) if theirs > ours else (other, ours)
    older = other if newer == one else one
    return (f"{one} speaks versions {theirs[0]} to {theirs[1]}, {other} {ours[0]} to {ours[1]}: upgrade uffd at "
            f"{older}, to one that speaks {spoken[0]}")


def _drive(connection: socket.socket, talk: Listening | Connecting, deadline_s: float) -> None:
    if isinstance(talk, Connecting):
        send(connection, talk.hello, deadline_s, "the hello")
    while talk.wanted:
        reply = talk.took(bytes(receive(connection, talk.wanted, deadline_s, "the hello")))
        if reply:
            send(connection, reply, deadline_s, "the hello")
    if talk.failure is not None:
        raise talk.failure
