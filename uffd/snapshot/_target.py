"""A file that is there whole or not at all: written without a name, made durable, put in place by a rename."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import uuid
from collections.abc import Iterator
from typing import Any

from .._coreless import core as _core

_WRITE_OUT_S = 0.05
_NO_UNNAMED = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


class Target:
    """The file to be at `path`. Until `publish` nothing has that name; what a crash leaves has no name either, so that
    the kernel frees it (on file systems that can't do that: a hidden name beside it).

    Not for several threads at once. Raises OSError with the path."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.folder = os.path.dirname(path) or "."
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "an image is one file, and this is a directory", path)
        self._name: str | None = None
        self.fd = -1
        self.fd = self._open()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        unnamed = getattr(os, "O_TMPFILE", 0)
        if unnamed and os.path.isdir("/proc/self/fd"):
            try:
                return os.open(self.folder, flags | unnamed, 0o666)
            except OSError as error:
                if error.errno not in _NO_UNNAMED or not os.path.isdir(self.folder):
                    raise
        name = self._hidden()
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o666)
        self._name = name
        return fd

    def _hidden(self) -> str:
        return os.path.join(self.folder, f".{os.path.basename(self.path)[:200]}.{uuid.uuid4().hex[:12]}.tmp")

    @property
    def as_path(self) -> str:
        """A path by which this process can open what has been written."""
        return f"/proc/self/fd/{self.fd}" if self._name is None else self._name

    @contextlib.contextmanager
    def written_out(self) -> Iterator[None]:
        """Meanwhile what is written goes to the disk, by a thread that may wait for it, so that `publish` finds little
        left to do. The end waits for a few MiB at the most, however much is to be written."""
        over = threading.Event()
        enough = bytearray(1)

        def keep_busy() -> None:
            while not over.wait(_WRITE_OUT_S):
                _core.write_out(self.fd, enough)

        thread = threading.Thread(target=keep_busy, name="uffd-write-out")
        try:
            thread.start()
        except RuntimeError:       # no thread to be had: it is all done by `publish`
            thread = threading.current_thread()
        try:
            yield
        finally:
            enough[0] = 1
            over.set()
            if thread is not threading.current_thread():
                thread.join()

    def publish(self) -> None:
        """Durable, and at its path: when this is back a crash leaves the new file, before that the old one or none."""
        os.fsync(self.fd)
        if self._name is None:
            name = self._hidden()
            self._give_name(name)
            self._name = name
        os.rename(self._name, self.path)
        self._name = None
        sync_folder(self.folder)

    def _give_name(self, name: str) -> None:
        folder = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:                       # with a folder's descriptor it is linkat, which follows the link in /proc
            os.link(self.as_path, os.path.basename(name), dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Gives up what was not published; idempotent."""
        if self._name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name)
            self._name = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_exception: Any) -> None:
        self.close()


def sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
