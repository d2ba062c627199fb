"""Providers that the destination can open by itself: what is said of one, and the proof that both ends have the same.

What a region did not write is still in its provider, a file on a disk that both machines have, or a namespace of a
Redis server, and need not travel. Only of regions that never write to it (modes r and c): what one of mode r+ writes
back can be seen by others at any time, and after the hand-over the destination must not.

A description names the place and what is there. The destination opens it as its own user may, and takes it only if all
that was said is so: of a file its inode number, size and time of change, and the digest of pieces that the source has
chosen at random (device numbers are not the same on two machines; and whoever can't read a file can't describe it); of
a namespace its generation, a random number that it got when it was made. Anything else is no error: it is sent.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
import stat
from typing import Any

from ..errors import MigrationError
from ..providers import File, Redis
from . import _frames

__all__ = ["describe", "opened"]

PIECES = 16                         # of a file, which are compared
PIECE_BYTES = 1 << 12             # also what O_DIRECT takes
LOOK_S = 2.0                        # for a server to say that it is the one, while the source waits
REDIS_S = 20.0                      # for its reads, later
_PATH_BYTES = 1 << 12
_FILE_BYTES = 1 << 62


def describe(region: Any) -> dict[str, Any] | None:
    """What a destination needs to know to open the region's provider; None: it has to be sent."""
    provider = region.provider
    if region.mode == "r+":
        return None
    try:
        if type(provider) is File:
            return _describe_file(provider)
        if type(provider) is Redis and not provider.delete and not _has_password(provider.url):
            return {"kind": "redis", "url": provider.url, "namespace": provider.namespace,
                    "generation": f"{provider._space.generation:x}"}
    except OSError:
        pass                                     # it can't be read: that is for its touches to say
    return None


def opened(description: Any, nbytes: int) -> Any:
    """The provider, if this process can open it and it is the same; else None. MigrationError for what no source of
    ours would have said."""
    if description is None:
        return None
    if not isinstance(description, dict):
        raise MigrationError("migration refused: the other side sent what can't be: a provider that is no object")
    kind = _frames.text(description, "kind", ("file", "redis"))
    try:
        provider = _open_file(description) if kind == "file" else _open_redis(description)
    except (OSError, ValueError, ImportError):
        return None
    return provider if provider is not None and (provider.nbytes is None or provider.nbytes >= nbytes) else None


def _describe_file(provider: File) -> dict[str, Any] | None:
    assert provider._recipe is not None                  # of each File
    (path, offset), options = provider._recipe
    found = os.fstat(provider._fd)
    if not stat.S_ISREG(found.st_mode) or len(os.fsencode(path)) > _PATH_BYTES or not path.isprintable():
        return None
    last = max(0, found.st_size - 1) // PIECE_BYTES
    at = [secrets.randbelow(last + 1) * PIECE_BYTES for _ in range(PIECES)]
    return {"kind": "file", "path": path, "offset": offset, "direct": options["direct"],
            "checksums": options["checksums"], "inode": found.st_ino, "size": found.st_size,
            "changed_ns": found.st_mtime_ns, "at": at, "digest": _digest(provider._fd, at)}


def _open_file(said: dict[str, Any]) -> File | None:
    path = _frames.text(said, "path", most_bytes=_PATH_BYTES)
    offset, size = (_frames.whole(said, name, 0, _FILE_BYTES) for name in ("offset", "size"))
    inode, changed_ns = (_frames.whole(said, name, 0, (1 << 64) - 1) for name in ("inode", "changed_ns"))
    digest, at = _frames.text(said, "digest"), said.get("at")
    if not isinstance(at, list) or len(at) > PIECES or not all(type(one) is int and 0 <= one < size for one in at):
        raise MigrationError("migration refused: the other side sent what can't be: pieces outside a file")
    provider = File(path, offset, direct=said.get("direct") is True, checksums=said.get("checksums") is True)
    found = os.fstat(provider._fd)
    same = (found.st_ino, found.st_size, found.st_mtime_ns) == (inode, size, changed_ns)
    return provider if same and secrets.compare_digest(_digest(provider._fd, at), digest) else None


def _digest(fd: int, at: list[int]) -> str:
    digest = hashlib.sha256()
    with mmap.mmap(-1, PIECE_BYTES) as aligned:  # what is opened with O_DIRECT wants that
        for one in at:
            digest.update(aligned[:os.preadv(fd, [aligned], one)])
    return digest.hexdigest()


def _has_password(url: str) -> bool:
    """Which does not travel."""
    return "@" in url or "password" in url


def _open_redis(said: dict[str, Any]) -> Redis | None:
    provider = Redis(_frames.text(said, "url"), _frames.text(said, "namespace"), create=False, timeout_s=LOOK_S)
    provider.timeout_s = REDIS_S
    return provider if f"{provider._space.generation:x}" == _frames.text(said, "generation") else None
