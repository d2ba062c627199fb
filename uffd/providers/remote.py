"""Files elsewhere: byte ranges over HTTP, S3 and whatever else fsspec reaches.

An answer is believed only if it says that it is the range asked for, of the file that was opened. HTTP is therefore
asked through fsspec's session and not through its `cat_file`, which hands out bodies without their heads: a server
that ignores Range would send the whole file, and a file that was replaced would go unnoticed.
"""

from __future__ import annotations

import errno
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .hosted import Provider
from .urls import shown

__all__ = ["Fsspec"]

_PIECE_BYTES_MAX = 4 << 20          # neighbouring requests are fetched as one up to this size
_GAP_BYTES_MAX = 64 << 10           # what lies between them is fetched too, and dropped: it costs less than a request
_REQUESTS_AT_ONCE = 16              # of one call of read_many
_READ_BYTES = 1 << 20
_CONNECT_TIMEOUT_S = 10.0
_SILENCE_TIMEOUT_S = 20.0           # below the 30 s of a region, so that the error names the cause

# What tells one version of a file from the next, the best first; a store has one of these groups, or nothing.
_OF_FILES = (("etag",), ("generation",), ("versionid", "version_id"), ("content-md5",), ("mtime", "ino"),
             ("lastmodified", "last_modified"), ("modified",), ("created",))
_OF_ANSWERS = (("etag",), ("last-modified",))
_ERRNO_OF = ((FileNotFoundError, errno.ENOENT), (IsADirectoryError, errno.EISDIR), (PermissionError, errno.EACCES),
             (TimeoutError, errno.ETIMEDOUT))


class Fsspec(Provider):
    """The bytes of a remote file from `offset` on: any URL that fsspec knows (https://, s3://, gs://, sftp://, ...).

    storage_options: fsspec's, for that protocol (credentials, headers); they are pickled with the recipe. Only byte
    ranges are asked for, several at once, and nothing is cached on the way: the region is the cache. Over HTTP the
    server must do ranges.

    The file is looked up here (OSError; ImportError naming the extra), as File opens its file here: `nbytes` and the
    version (ETag, generation or time of change) are part of the recipe. Each process that opens it, and each read,
    compares them: a file that has changed since is ESTALE, a short answer ENODATA, a server without ranges EOPNOTSUPP,
    never other bytes. HTTP tells the version with each answer; with other stores each read ends with a look at the
    file's entry. Where a store tells no version, a change of size alone is noticed.
    """

    concurrency = 8

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None, *,
                 offset: int = 0) -> None:
        self.url = os.fspath(url)
        self.storage_options = dict(storage_options or {})
        self.offset = operator.index(offset)
        self._store: _Http | _Files | None = None
        store = _store_of(self.url, self.storage_options)
        size, self._version = store.look()
        if not 0 <= self.offset <= size:
            raise ValueError(f"{shown(self.url)}: offset {offset} is outside the file of {size} bytes")
        self.nbytes: int | None = size - self.offset
        self.title = _title(self.url, self.offset)

    def __reduce__(self) -> Any:
        return _remade, (self.url, self.storage_options, self.offset, self.nbytes, self._version)

    def __repr__(self) -> str:
        return f"uffd.providers.{self.title}"

    def at(self, offset: int) -> Fsspec:
        """The same version of the same file from another offset on; asks nobody."""
        size = self.offset + (self.nbytes or 0)
        if not 0 <= offset <= size:
            raise ValueError(f"{shown(self.url)}: offset {offset} is outside the file of {size} bytes")
        return _remade(self.url, self.storage_options, offset, size - offset, self._version)

    def open(self) -> None:
        store = _store_of(self.url, self.storage_options)
        found, opened = store.look(), (self.offset + (self.nbytes or 0), self._version)
        if found != opened:
            raise _changed(self.url, opened, found)
        store.expect(*opened)
        self._store = store

    def read(self, offset: int, out: np.ndarray) -> None:
        self.read_many([(offset, out)])

    def read_many(self, requests: Sequence[tuple[int, np.ndarray]]) -> None:
        """Fetches neighbours as one range, and all ranges at once."""
        if self._store is None:
            raise ValueError(f"{self.title} is not open")
        size = self.offset + (self.nbytes or 0)
        pieces = _pieces((self.offset + offset, out) for offset, out in requests if out.nbytes)
        if any(piece.start < self.offset or piece.stop > size for piece in pieces):
            raise OSError(errno.EINVAL, f"bytes past the end of {size} were asked for", shown(self.url))
        self._store.fetch(pieces)

    def close(self) -> None:
        self._store = None               # the session goes with the file system


def require_fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise ImportError('remote files need the package fsspec: pip install "pyuffd[fsspec]"') from error
    return fsspec


def _remade(url: str, storage_options: dict[str, Any], offset: int, nbytes: int, version: Any) -> Fsspec:
    """What was looked up before, without looking again."""
    made = Fsspec.__new__(Fsspec)
    made.url, made.storage_options, made.offset, made.nbytes = url, dict(storage_options), offset, nbytes
    made._version, made._store, made.title = version, None, _title(url, offset)
    return made


def _title(url: str, offset: int) -> str:
    return f"Fsspec({shown(url)!r}{f', offset={offset}' if offset else ''})"


def _store_of(url: str, storage_options: Mapping[str, Any]) -> _Http | _Files:
    fsspec = require_fsspec()
    try:
        # an instance of our own: one that is shared may have listings that are out of date
        fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, **storage_options)
    except ImportError as error:
        if url.startswith(("http://", "https://")):
            raise ImportError('files over HTTP need the package aiohttp: pip install "pyuffd[fsspec]"') from error
        raise                            # fsspec names the package that the protocol needs
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return _Http(fs, path) if "https" in protocols else _Files(fs, path)


# ---- ranges -----------------------------------------------------------------------------------------------------


class _Piece:
    """A range of the file, and the buffers that it goes to one after the other; in gaps it goes nowhere."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.stop = start
        self._outs: list[np.ndarray | None] = []
        self._ends: list[int] = []               # of each of them in the piece
        self._taken = 0                          # bytes so far

    def add(self, offset: int, out: np.ndarray) -> None:
        if offset > self.stop:
            self._put(None, offset)
        self._put(out, offset + out.nbytes)

    def _put(self, out: np.ndarray | None, stop: int) -> None:
        self.stop = stop
        self._outs.append(out)
        self._ends.append(stop - self.start)

    @property
    def missing(self) -> int:
        return self.stop - self.start - self._taken

    def take(self, data: bytes) -> None:
        """What has come next, no more than is missing."""
        given = np.frombuffer(data, np.uint8)
        while len(given):
            left = self._ends[0] - self._taken   # in the buffer at hand
            part, given = given[:left], given[left:]
            out = self._outs[0]
            if out is not None:
                at = out.nbytes - left
                out[at:at + len(part)] = part
            self._taken += len(part)
            if len(part) == left:
                del self._outs[0], self._ends[0]


def _pieces(requests: Iterable[tuple[int, np.ndarray]]) -> list[_Piece]:
    pieces: list[_Piece] = []
    for offset, out in sorted(requests, key=operator.itemgetter(0)):
        last = pieces[-1] if pieces else None
        if (last is None or not 0 <= offset - last.stop <= _GAP_BYTES_MAX
                or offset + out.nbytes - last.start > _PIECE_BYTES_MAX):
            last = _Piece(offset)
            pieces.append(last)
        last.add(offset, out)
    return pieces


def _changed(url: str, opened: tuple[int, Any], found: tuple[int, Any]) -> OSError:
    def told(size: int, version: Any) -> str:
        return f"{size} bytes, {version}" if version else f"{size} bytes"
    return OSError(errno.ESTALE, f"the file has changed since it was opened: then {told(*opened)}, now {told(*found)}; "
                   "open it again", shown(url))


def _short(url: str, piece: _Piece, got: int) -> OSError:
    return OSError(errno.ENODATA, f"short answer: {got} of the {piece.stop - piece.start} bytes from {piece.start} on",
                   shown(url))


def _version_of(fields: Mapping[str, Any], groups: Sequence[tuple[str, ...]]) -> str | None:
    """One word that changes with the file's content, from its head or its entry; None if there is nothing in it."""
    known = {str(name).lower(): value for name, value in fields.items() if value not in (None, "")}
    for group in groups:
        found = [f"{name} {known[name]}" for name in group if name in known]
        if found:
            return ", ".join(found)
    return None


def _named(error: BaseException, url: str, what: str) -> OSError:
    """As an OSError with a number; fsspec raises FileNotFoundError without one."""
    number = getattr(error, "errno", None)
    if not isinstance(number, int) or number <= 0:           # a name that can't be resolved has a negative one
        number = next((n for kind, n in _ERRNO_OF if isinstance(error, kind)), errno.EIO)
    return OSError(number, f"{what}: {type(error).__name__}: {error}", shown(url))


class _Files:
    """Any file system of fsspec, by `info` and `cat_ranges`."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path
        self._opened: tuple[int, Any] | None = None
        # what opens a file for each range would read ahead of it; asynchronous ones ask for the range itself
        self._uncached = {} if getattr(fs, "async_impl", False) else {"cache_type": "none"}

    def look(self) -> tuple[int, str | None]:
        self._fs.invalidate_cache()
        try:
            info = self._fs.info(self._path)
            if info.get("type") == "directory":
                raise IsADirectoryError(errno.EISDIR, "a directory, not a file", self._path)
            version = _version_of(info, _OF_FILES[:-1]) or self._modified() or _version_of(info, _OF_FILES)
        except OSError as error:
            raise _named(error, self._path, "looked up") from error
        if info.get("size") is None:
            raise OSError(errno.EOPNOTSUPP, "the store does not tell the file's size", self._path)
        return int(info["size"]), version

    def _modified(self) -> str | None:
        try:
            return f"modified {self._fs.modified(self._path)}"
        except (RuntimeError, AttributeError, OSError, KeyError):    # a file system that does not know it
            return None

    def expect(self, size: int, version: str | None) -> None:
        self._opened = (size, version)

    def fetch(self, pieces: Sequence[_Piece]) -> None:
        answers = self._fs.cat_ranges([self._path] * len(pieces), [piece.start for piece in pieces],
                                      [piece.stop for piece in pieces], on_error="return", **self._uncached)
        for piece, answer in zip(pieces, answers, strict=True):
            if isinstance(answer, BaseException):
                raise _named(answer, self._path, f"bytes {piece.start} to {piece.stop}") from answer
            if len(answer) != piece.stop - piece.start:
                raise self._if_changed() or _short(self._path, piece, len(answer))
            piece.take(answer)
        changed = self._if_changed()             # after the bytes: what was replaced meanwhile is seen
        if changed:
            raise changed

    def _if_changed(self) -> OSError | None:
        assert self._opened is not None
        found = self.look()
        return None if found == self._opened else _changed(self._path, self._opened, found)


class _Http:
    """Ranges over HTTP by fsspec's session, with a look at the head of every answer."""

    def __init__(self, fs: Any, url: str) -> None:
        import aiohttp

        self._fs = fs
        self._url = url
        self._opened: tuple[int, Any] | None = None
        self._errors = (aiohttp.ClientError, OSError, TimeoutError)
        # a buffer that holds what a socket gives at once: else it is stopped and started again for each 64 KiB
        self._options = {"read_bufsize": _READ_BYTES, **fs.kwargs}
        self._headers = dict(self._options.pop("headers", None) or {})
        if "timeout" not in self._options and "timeout" not in fs.client_kwargs:
            self._options["timeout"] = aiohttp.ClientTimeout(sock_connect=_CONNECT_TIMEOUT_S,
                                                             sock_read=_SILENCE_TIMEOUT_S)

    def look(self) -> tuple[int, str | None]:
        """By a range of one byte: a HEAD tells less (whether ranges work), and signed URLs often refuse it."""
        return self._wait(self._look())

    def expect(self, size: int, version: str | None) -> None:
        self._opened = (size, version)

    def fetch(self, pieces: Sequence[_Piece]) -> None:
        self._wait(self._fetch_all(pieces))

    def _wait(self, coroutine: Any) -> Any:
        async def run() -> tuple[Any, BaseException | None]:
            try:
                return await coroutine, None
            except Exception as error:           # as a value: fsspec puts an error of its own in a TimeoutError's place
                return None, error
        value, error = require_fsspec().asyn.sync(self._fs.loop, run)
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if error is not None:
            raise error
        return value

    async def _look(self) -> tuple[int, str | None]:
        async with _answering(self, 0, 1) as answer:
            version = _version_of(answer.headers, _OF_ANSWERS)
            if answer.status == 416 and (match := re.fullmatch(r"bytes \*/0", answer.headers.get("Content-Range", ""))):
                return 0, version
            self._check_status(answer)
            if answer.status != 206:
                if answer.headers.get("Content-Length") == "0":
                    return 0, version
                raise self._no_ranges(answer)
            match = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("Content-Range", ""))
            if match is None:
                raise OSError(errno.EOPNOTSUPP, "the server does not tell the file's size (Content-Range: "
                              f"{answer.headers.get('Content-Range')!r})", shown(self._url))
            return int(match[1]), version

    async def _fetch_all(self, pieces: Sequence[_Piece]) -> None:
        import asyncio                           # here: it takes long to import

        turns = asyncio.Semaphore(_REQUESTS_AT_ONCE)

        async def one(piece: _Piece) -> None:
            async with turns:
                await self._fetch(piece)
        # a group ends when all of its tasks have ended: none may write to a buffer after the return
        async with asyncio.TaskGroup() as group:
            for piece in pieces:
                group.create_task(one(piece))

    async def _fetch(self, piece: _Piece) -> None:
        async with _answering(self, piece.start, piece.stop) as answer:
            self._check(answer, piece)
            async for data in answer.content.iter_any():
                if len(data) > piece.missing:
                    raise OSError(errno.EIO, f"more came than bytes {piece.start} to {piece.stop}", shown(self._url))
                piece.take(data)
            if piece.missing:
                raise _short(self._url, piece, piece.stop - piece.start - piece.missing)

    def _check(self, answer: Any, piece: _Piece) -> None:
        """Whether the head promises the bytes asked for, of the file that was opened."""
        assert self._opened is not None
        size, version = self._opened[0], _version_of(answer.headers, _OF_ANSWERS)
        if answer.status == 416:                 # the range is past its end
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            raise _changed(self._url, self._opened, (int(total) if total.isdigit() else 0, version))
        self._check_status(answer)
        coding = answer.headers.get("Content-Encoding", "identity")
        if coding not in ("identity", ""):
            raise OSError(errno.EOPNOTSUPP, f"the server answers encoded ({coding}) though identity was asked for; its "
                          "ranges are not those of the file", shown(self._url))
        stop = piece.stop
        if answer.status == 206:
            told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if told is None or int(told[1]) != piece.start:
                raise OSError(errno.EIO, f"asked for bytes from {piece.start} on, the server sends "
                              f"{answer.headers.get('Content-Range')!r}", shown(self._url))
            stop = int(told[2]) + 1
            found = (size if told[3] == "*" else int(told[3]), version)
        elif (piece.start, piece.stop) == (0, size):
            found = (answer.content_length, version)                 # all of it, which is what was asked for
        else:
            raise self._no_ranges(answer)
        if found != self._opened:
            raise _changed(self._url, self._opened, found)
        if stop != piece.stop:
            raise _short(self._url, piece, stop - piece.start)

    def _check_status(self, answer: Any) -> None:
        if answer.status in (200, 206):
            return
        number = {404: errno.ENOENT, 410: errno.ENOENT, 401: errno.EACCES, 403: errno.EACCES}.get(answer.status)
        raise OSError(number or errno.EIO, f"the server answers {answer.status} {answer.reason}", shown(self._url))

    def _no_ranges(self, answer: Any) -> OSError:
        return OSError(errno.EOPNOTSUPP, f"the server does not do byte ranges: it answers {answer.status} with the "
                       "whole file; download it first", shown(self._url))


class _answering:
    """The answer to a request for [start, stop), its failures as OSErrors that name the range."""

    def __init__(self, http: _Http, start: int, stop: int) -> None:
        self._http = http
        self._what = f"bytes {start} to {stop}"
        self._headers = {**http._headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        self._answer: Any = None

    async def __aenter__(self) -> Any:
        http = self._http
        session = await http._fs.set_session()
        try:
            self._answer = await session.get(http._fs.encode_url(http._url), headers=self._headers, **http._options)
        except http._errors as error:
            raise _named(error, http._url, self._what) from error
        return self._answer

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None and self._answer.content.at_eof():
            self._answer.release()
        else:
            self._answer.close()                 # a body that nobody wants is not read to its end
        if isinstance(error, self._http._errors) and not (isinstance(error, OSError) and error.filename):
            raise _named(error, self._http._url, self._what) from error
