"""Blocks straight from the socket into pages: the common way of a read, without the copies that a parser makes.

redis-py makes the connection, and has it for everything else. Here its answers (RESP2) are read by hand, since only
then the bytes of a block can go where they belong: a parser's buffer, a bytes object of each value and the copy from
it cost more than the server. This way believes nothing: at whatever it does not expect it gives up, the connection is
closed, and the caller asks again through redis-py, which knows all that may be in an answer.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .._coreless import core as _core
from .._coreless import reason as _no_core

__all__ = ["Answers", "Unexpected", "asked"]

_SMALL_BYTES = 1 << 10                           # what is read ahead of a block's bytes, and copied to them


class Unexpected(Exception):
    """An answer, or an end, that this way has no word for."""


class Answers:
    """The answers that come on a socket, taken one after the other."""

    def __init__(self, connection: Any) -> None:
        is_plain = type(connection) is socket.socket and _no_core is None     # and not TLS
        self._fd = connection.fileno() if is_plain else -1
        self._timeout_s = connection.gettimeout()
        self._receive = connection.recv_into
        self._buffer = bytearray(_SMALL_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._stop = 0             # what of the buffer was received and not taken

    def length(self, kind: bytes) -> int:
        """The number on a line that begins with `kind`: "$" a bulk's bytes, "*" an array's items. -1: there is none."""
        while True:
            end = self._buffer.find(b"\r\n", self._start, self._stop)
            if end >= 0:
                break
            self._more()
        line, self._start = bytes(self._view[self._start:end]), end + 2
        if line[:1] != kind or not line[1:].removeprefix(b"-").isdigit():
            raise Unexpected(line[:80])
        if (number := int(line[1:])) < -1:
            raise Unexpected(line[:80])
        return number

    def exactly(self, count: int) -> bytes:
        """The next `count` bytes."""
        taken = np.empty(count, np.uint8)
        self.into(taken)
        return taken.tobytes()

    def into(self, out: np.ndarray) -> None:
        """Fills `out` with what comes next."""
        target = out.data
        at = min(len(target), self._stop - self._start)
        target[:at] = self._view[self._start:self._start + at]
        self._start += at
        while at < len(target):
            count = self._receive(target[at:])
            if not count:
                raise Unexpected("the end of the connection")
            at += count

    def bulk(self) -> bytes:
        """A short bulk string; b"" if there is none."""
        count = self.length(b"$")
        data = self.exactly(max(count, 0))
        if count >= 0:
            self.end_of_bulk()
        return data

    def values(self, parts: Sequence[np.ndarray], head_bytes: int) -> tuple[list[int], bytes]:
        """Fills each part with what follows the head of a value, and with zeros behind that. The values' lengths, -1
        where there is none, and their heads, one behind the other."""
        heads = bytearray(head_bytes * len(parts))
        if self._fd >= 0:                        # all of them in one call, without the interpreter lock
            lengths, self._start, self._stop = _core.resp_take(self._fd, self._timeout_s, self._buffer, self._start,
                                                              self._stop, parts, heads)
            return lengths, bytes(heads)
        lengths = []
        for number, part in enumerate(parts):
            count = self.length(b"$")
            lengths.append(count)
            if count >= 0:
                if not 0 <= count - head_bytes <= len(part):
                    raise Unexpected("a value longer than a block, or shorter than its head")
                heads[number * head_bytes:(number + 1) * head_bytes] = self.exactly(head_bytes)
                self.into(part[:count - head_bytes])
                self.end_of_bulk()
            part[max(count - head_bytes, 0):] = 0
        return lengths, bytes(heads)

    def end_of_bulk(self) -> None:
        if self.exactly(2) != b"\r\n":
            raise Unexpected("bytes behind a bulk string")

    def _more(self) -> None:
        if self._start:
            left = self._buffer[self._start:self._stop]
            self._buffer[:len(left)] = left
            self._start, self._stop = 0, len(left)
        count = self._receive(self._view[self._stop:]) if self._stop < _SMALL_BYTES else 0
        if not count:
            raise Unexpected("the end of the connection, or a line without one")
        self._stop += count


@contextmanager
def asked(client: Any, commands: Sequence[tuple[Any, ...]]) -> Iterator[Answers]:
    """The answers to commands, on a connection of redis-py's. It is closed if they are not taken to their end."""
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        stream = getattr(connection, "_sock", None)
        if not hasattr(stream, "recv_into"):
            raise Unexpected("a connection without a socket of its own")
        connection.send_packed_command(connection.pack_commands(commands))
        yield Answers(stream)
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)
