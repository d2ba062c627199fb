"""`uffd top PATH`: reads what `Engine.serve` tells at a socket, and shows it. How it looks: _frame.py."""

from __future__ import annotations

import errno
import http.client
import io
import json
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from ._rates import FORMAT

_ANSWER_S = 10.0                    # for a whole answer; an engine's thread may have to wait for the interpreter lock
_NEWS_S = 2.0                       # the same on a screen that shows earlier ones meanwhile
_ANSWER_BYTES = 64 << 20
_LEAST_INTERVAL_S = 0.1             # figures are not gathered more often
_NEEDS_RICH = 'top needs rich: pip install "pyuffd[ui]"; or --json'


class Gone(ConnectionError):
    """Nobody listens there (any more)."""


def main(path: str, *, interval_s: float, once: bool, as_json: bool) -> int:
    """Shows until Ctrl-C or until the program that is shown ends: 0. OSError, ImportError: one line each."""
    if not interval_s >= _LEAST_INTERVAL_S:
        raise ValueError(f"--interval must be {_LEAST_INTERVAL_S} s or more, not {interval_s:g}")
    try:
        if as_json:
            return _lines(path, interval_s, once)
        return _view(path, interval_s, once or not sys.stdout.isatty())
    except KeyboardInterrupt:       # the way to end it
        return 0


def _lines(path: str, interval_s: float, once: bool) -> int:
    """One JSON document per line."""
    print(json.dumps(read_stats(path)), flush=True)
    while not once:
        time.sleep(interval_s)
        try:
            print(json.dumps(read_stats(path)), flush=True)
        except Gone:
            return _ended(path)
    return 0


def _view(path: str, interval_s: float, once: bool) -> int:
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise ImportError(_NEEDS_RICH) from error
    from ._frame import Watch

    watch = Watch(path)
    watch.take(read_stats(path))
    if once:                        # rates are between two moments
        time.sleep(interval_s)
        watch.take(read_stats(path))
        watch.print()
        return 0
    try:
        with watch.live() as show:
            while True:
                show()
                time.sleep(interval_s)
                try:
                    watch.take(read_stats(path, _NEWS_S))
                except Gone:
                    break
                except OSError as error:         # stopped, or busy with something else: it may come back
                    watch.missed(error.strerror or str(error))
    finally:
        watch.close()
    return _ended(path)


def _ended(path: str) -> int:
    print(f"uffd: the engine at {path} is gone", file=sys.stderr)
    return 0


# ---- the client -------------------------------------------------------------------------------------------------


class _Answer(io.RawIOBase):
    """A socket to read from until a deadline; recv's own time-out would begin anew with every byte."""

    def __init__(self, connection: socket.socket, deadline_s: float) -> None:
        self._connection, self._deadline_s = connection, deadline_s

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
        self._connection.settimeout(left_s)
        try:
            return self._connection.recv_into(out)
        except ConnectionResetError:             # an end, too: it closed before it had read what we asked
            return 0


def read_stats(path: str, timeout_s: float | None = None) -> dict[str, Any]:
    """The engine's figures (docs/seeing.md), within 10 s. Gone where nobody listens; OSError for all else."""
    timeout_s = _ANSWER_S if timeout_s is None else timeout_s
    try:
        status, body = _get(path, "/stats", timeout_s)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise Gone(error.errno, f"nobody listens here ({error.strerror}): has the program ended, or has it not called "
                   "engine.serve() yet?", path) from error
    except TimeoutError as error:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {timeout_s:g} s: the program is stopped, or this is not "
                           "the socket of a uffd engine", path) from error
    except http.client.HTTPException as error:
        raise OSError(errno.EPROTO, "not the socket of a uffd engine, or one that ended just now "
                      f"({type(error).__name__})", path) from error
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), path) from error
    if status == 503:
        raise OSError(errno.EBUSY, body.decode("utf-8", "replace").strip() or "busy", path)
    figures, told = _parsed(body) if status == 200 else ({}, None)
    if told is None:
        raise OSError(errno.EPROTO, f"not the socket of a uffd engine (HTTP status {status})", path)
    if told != FORMAT:
        raise OSError(errno.EPROTO, f"it tells its figures in format {told}, and this program knows {FORMAT}: use the "
                      "same version of pyuffd for both", path)
    return figures


def _parsed(body: bytes) -> tuple[dict[str, Any], Any]:
    """The figures, and their format; None as format: these are none."""
    try:
        figures = json.loads(body)
    except ValueError:
        return {}, None
    if not isinstance(figures, dict) or "engine" not in figures:
        return {}, None
    return figures, figures.get("format")


def _get(path: str, target: str, timeout_s: float) -> tuple[int, bytes]:
    deadline_s = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(path)
        except OSError as error:
            if error.errno is None:              # Python's own: the path is too long
                raise OSError(errno.ENAMETOOLONG, str(error)) from error
            raise
        with suppress(BrokenPipeError, ConnectionResetError):        # refused at once: why stands in the answer
            connection.sendall(f"GET {target} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        response = http.client.HTTPResponse(_Answer(connection, deadline_s))  # type: ignore[arg-type]
        response.begin()
        body = response.read(_ANSWER_BYTES + 1)
        if len(body) > _ANSWER_BYTES:
            raise OSError(errno.EMSGSIZE, f"its answer has more than {_ANSWER_BYTES} bytes")
        return response.status, body
