"""The sidecar of File(checksums=True), as far as it is Python: how it is made, opened, and what its errors say."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from typing import Any

from .._coreless import core as _core

__all__ = ["make", "opened", "sidecar"]

_SUFFIX = ".uffd"
_lock = threading.Lock()
_open: weakref.WeakValueDictionary[tuple[int, ...], _core.Filler] = weakref.WeakValueDictionary()
_WORDS = {
    errno.EBUSY: "it is open already, for writing there or here; one process that writes, or any number that read, at "
                 "a time",
    errno.ESTALE: "the file has another size than when its checksums were made, or they are for another offset; {cure}",
    errno.EBADMSG: "its checksums are damaged, or the file is no longer the one that they were made for; {cure}",
    errno.ENOENT: "it has no checksums yet, or they were left behind; {cure}",
}


def sidecar(name: Any) -> str:
    """Where the checksums of a file are."""
    return os.path.realpath(os.fsdecode(name)) + _SUFFIX


def opened(name: Any, fd: int, offset: int, nbytes: int, writable: bool) -> _core.Filler:
    """The core's side of a file that is open. OSError with the cure; the descriptor is still the caller's then.

    Within this process all who open it share one: they see what each other wrote back, and one may be opened while
    another was closed and is still kept by somebody.
    """
    with _lock:
        key = _key(name, fd, offset)
        found = None if key is None else _open.get(key)
        if found is not None and (found.writes or not writable):
            os.close(fd)
            return found.shared(writable)
        made = _opened(name, fd, offset, nbytes, writable)
        if key is not None:
            _open[key] = made
        return made


def _key(name: Any, fd: int, offset: int) -> tuple[int, ...] | None:
    try:
        file, side = os.fstat(fd), os.stat(sidecar(name))
    except OSError:                              # the open will say it
        return None
    return os.getpid(), file.st_dev, file.st_ino, file.st_size, side.st_dev, side.st_ino, offset


def _opened(name: Any, fd: int, offset: int, nbytes: int, writable: bool) -> _core.Filler:
    side = -1
    try:
        side = os.open(sidecar(name), (os.O_RDWR if writable else os.O_RDONLY) | getattr(os, "O_CLOEXEC", 0))
        return _core.Filler.checked_file(fd, side, offset, nbytes, bool(writable))
    except OSError as error:
        if side >= 0:
            os.close(side)
        if error.errno not in _WORDS:
            raise
        path = os.fsdecode(name)
        cure = f"uffd.providers.File.checksum({path!r}{f', {offset}' if offset else ''}) accepts it as it is now"
        raise OSError(error.errno, _WORDS[error.errno].format(cure=cure), path) from error


def make(name: Any, offset: int) -> None:
    """A new sidecar in place of whatever is there, all or nothing."""
    path, old = sidecar(name), None
    fresh = f"{path}.{os.getpid()}.new"
    fd = os.open(name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        nbytes = os.fstat(fd).st_size - offset
        if offset < 0 or nbytes <= 0:
            raise ValueError(f"{os.fsdecode(name)}: no bytes from offset {offset} on in a file of {nbytes + offset}")
        old = _with_its_journal(name, offset, nbytes)
        side = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            _core.make_checksums(fd, side, offset, nbytes, int.from_bytes(os.urandom(8), "little"))
            os.replace(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise
        finally:
            os.close(side)
        _sync_folder(os.path.dirname(path))
    finally:
        del old                                  # until here nobody else could open it
        os.close(fd)


def _with_its_journal(name: Any, offset: int, nbytes: int) -> _core.Filler | None:
    """The old one, if it can be used: opening it copied its journal into the file."""
    if not os.path.exists(sidecar(name)):
        return None
    fd = os.open(name, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    try:
        return _opened(name, fd, offset, nbytes, True)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.ESTALE, errno.EBADMSG):
            raise
        return None


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
