"""Sockets: a unix socket's place in the file system, who is at its other end; so many bytes until a deadline."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["left_s", "listen_unix", "peer", "receive", "send"]

_PATH_BYTES = 107                   # struct sockaddr_un, less the zero at its end
_LOCK_S = 1.0                       # how long one that starts waits for another that starts in the same folder


def listen_unix(path: str, backlog: int) -> socket.socket:
    """A listening socket at path, mode 0600, in the place of a dead one. OSError with what to do."""
    if len(os.fsencode(path)) > _PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, f"a socket's path has {_PATH_BYTES} bytes at most, this one "
                      f"{len(os.fsencode(path))}; take a shorter one, under $XDG_RUNTIME_DIR or /tmp", path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)      # bind makes the file with it: at no time may others connect
        with _alone_in(os.path.dirname(path)):
            _remove_dead(path)
            listener.bind(path)
            listener.listen(backlog)
    except BaseException as error:
        listener.close()
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, f"{error.strerror}: no socket can be made here", path) from error
        raise
    return listener


@contextmanager
def _alone_in(folder: str) -> Iterator[None]:
    """One at a time of those that start here: who looks at a dead socket must not remove the one that another has put
    there meanwhile. Where the folder can't be locked (some network file systems), or others hold the lock, it is gone
    on without: what is then left to chance is two that start over one dead socket in the same millisecond."""
    import fcntl                                 # here: it is not on every system where this is imported

    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline_s = time.monotonic() + _LOCK_S
        while time.monotonic() < deadline_s:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield
    finally:
        os.close(fd)


def _remove_dead(path: str) -> None:
    """FileExistsError for all that is not a socket of this user at which nobody listens."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "it is there, and no socket: choose another path, or remove it", path)
    if found.st_uid != os.geteuid():
        raise FileExistsError(errno.EEXIST, f"it is a socket of user {found.st_uid}: choose another path", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:                 # its backlog is full, or it is of another kind
            raise FileExistsError(errno.EEXIST, f"it is there, and in use ({error.strerror}): choose another path",
                                  path) from error
        pid, _ = peer(probe)
    raise FileExistsError(errno.EEXIST, f"process {pid} listens there: choose another path", path)

def peer(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a connected unix socket: who listened or connected, by the kernel's word."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


# ---- until a deadline (time.monotonic), which is for all of it: a byte now and then does not put it off -------------


def send(connection: socket.socket, data: bytes, deadline_s: float, what: str) -> None:
    """All of it. TimeoutError says `what`; OSError."""
    connection.settimeout(left_s(deadline_s, what))
    try:
        connection.sendall(data)                 # its time-out is for all of it
    except TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"{what}: {len(data):,} bytes were not taken in time") from None


def receive(connection: socket.socket, nbytes: int, deadline_s: float, what: str) -> bytearray:
    """Exactly so many bytes. Memory is taken as they come. TimeoutError says `what`; ConnectionResetError: the other
    side closed; OSError."""
    got = bytearray()
    while len(got) < nbytes:
        try:
            connection.settimeout(left_s(deadline_s, what))
            piece = connection.recv(min(nbytes - len(got), 1 << 18))
        except TimeoutError:
            raise TimeoutError(errno.ETIMEDOUT, f"{what}: {len(got):,} of {nbytes:,} bytes came in time") from None
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, f"{what}: the other side closed the connection after "
                                       f"{len(got):,} of {nbytes:,} bytes")
        got += piece
    return got


def left_s(deadline_s: float, what: str) -> float:
    """Seconds until then, above 0; else TimeoutError."""
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise TimeoutError(errno.ETIMEDOUT, f"{what}: too late")
    return left
