"""Where a file's headers are read from, and its bytes served from: a local path or a URL."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from .. import providers
from ..providers.urls import shown

_HEAD_BYTES = 1 << 16  # one request brings most headers whole


class LocalSource:
    """A file by its path. writable: its provider can write."""

    def __init__(self, path: str, writable: bool = False) -> None:
        self.path, self.writable = path, writable

    def open(self) -> BinaryIO:
        """The file for reading its headers, to be closed."""
        return open(self.path, "rb")

    def size_of(self, file: BinaryIO) -> int:
        """Its length, once `open` gave it."""
        return os.fstat(file.fileno()).st_size

    def provider(self, offset: int) -> Any:
        return providers.File(self.path, offset=offset, writable=self.writable)

    def beside(self, name: str) -> LocalSource:
        """Another file of the same folder."""
        return LocalSource(os.path.join(os.path.dirname(self.path), name), self.writable)


class RemoteSource:
    """A file by its URL. Its version is looked up once, at the first use: headers and bytes are of the same one."""

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        self.url = url
        self.path = shown(url)
        self._storage_options = storage_options
        self._found: Any = None

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Ranges(self.provider(0)), _HEAD_BYTES)

    def size_of(self, file: BinaryIO) -> int:
        del file
        return self.provider(0).nbytes

    def provider(self, offset: int) -> Any:
        from ..providers.remote import Fsspec

        if self._found is None:
            self._found = Fsspec(self.url, self._storage_options)
        return self._found.at(offset)

    def beside(self, name: str) -> RemoteSource:
        place, mark, query = self.url.partition("?")
        return RemoteSource(f"{place.rpartition('/')[0]}/{name}{mark}{query}", self._storage_options)


Source = LocalSource | RemoteSource


class _Ranges(io.RawIOBase):
    """A remote file as numpy's and our own header readers want it. Reads the ranges that are asked for."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._at = 0
        provider.open()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        nbytes = min(len(buffer), self._provider.nbytes - self._at)
        if nbytes > 0:
            self._provider.read(self._at, np.frombuffer(buffer, np.uint8)[:nbytes])
            self._at += nbytes
        return max(0, nbytes)

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if not self.closed:
            self._provider.close()
        super().close()
