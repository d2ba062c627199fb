"""Namespaces in Redis: made, looked up and checked, listed, removed."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import redis_layout as layout
from .redis_layout import GROUPS, GroupHead, Keys
from .redis_server import Server

__all__ = ["Namespace", "connected", "listed", "removed"]

BLOCK_BYTES = 64 << 10                           # of a new namespace, unless told
BLOCK_BYTES_MAX = 64 << 20
_REMOVE_AT_ONCE = 1000                           # keys in one pipeline


@dataclass(frozen=True)
class Namespace:
    """What its head says."""

    name: str
    generation: int
    block_bytes: int
    nbytes: int | None
    state: str                                   # making > ready > removing
    is_new: bool = False                         # this very call made it

    @property
    def keys(self) -> Keys:
        return layout.keys_of(self.name)


def problem(server: Server, namespace: str, number: int, text: str) -> OSError:
    return OSError(number, f"namespace {namespace!r}: {text}", server.place)


def _from_fields(name: str, fields: dict[str, str], *, is_new: bool = False) -> Namespace:
    return Namespace(name, int(fields["generation"], 16), int(fields["block_bytes"]),
                     int(fields["nbytes"]) if fields["nbytes"] else None, fields["state"], is_new)


def looked_up(server: Server, name: str) -> Namespace | None:
    """The namespace, or None."""
    keys = layout.keys_of(name)
    (flat,) = server.run([(keys.head, ("HGETALL", keys.head))])
    fields = {key.decode(): value.decode() for key, value in (
        flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True))}
    if not fields:
        return None
    try:
        return _from_fields(name, fields)
    except (KeyError, ValueError):
        raise problem(server, name, errno.EBADMSG, f"its head {keys.head} is not one of ours: {fields}") from None


def found(server: Server, name: str, *, create: bool, block_bytes: int | None, nbytes: int | None) -> Namespace:
    """The namespace, made if it is not there and that is wanted; whole, and of the sizes that are given."""
    space = looked_up(server, name)
    if space is None:
        if not create:
            raise problem(server, name, errno.ENOENT, "it is not there. Either nobody made it, or the server started "
                          "again without its data; `uffd store ls` lists what is there, create=True makes it anew")
        space = _made(server, name, block_bytes or BLOCK_BYTES, nbytes)
    if space.state == "making":                  # by us just now, or by somebody who did not get to the end
        space = _completed(server, space)
    if space.state != "ready":
        raise problem(server, name, errno.ENOENT, f"it is being removed; end that by `uffd store rm URL {name}`")
    if block_bytes not in (None, space.block_bytes):
        raise ValueError(f"{server.place}: namespace {name!r} has blocks of {space.block_bytes} bytes, not of "
                         f"{block_bytes}: leave block_bytes out, or take another namespace")
    if nbytes is not None and space.nbytes not in (None, nbytes):
        raise ValueError(f"{server.place}: namespace {name!r} has {space.nbytes} bytes, not {nbytes}: take another "
                         "namespace, or remove this one (uffd store rm)")
    return space


def _made(server: Server, name: str, block_bytes: int, nbytes: int | None) -> Namespace:
    generation = secrets.randbits(63) | 1
    keys = layout.keys_of(name)
    (flat,) = server.run([(keys.head, layout.evaluated(layout.CREATE, [keys.head], f"{generation:016x}", block_bytes,
                                                       "" if nbytes is None else nbytes))])
    space = _from_fields(name, layout.in_pairs(flat))
    return Namespace(name, space.generation, space.block_bytes, space.nbytes, space.state,
                     space.generation == generation)


def _completed(server: Server, space: Namespace) -> Namespace:
    """Its groups; nobody has written to it yet. Several may be at it at once."""
    keys = space.keys
    heads = server.run([(keys.index(group), layout.evaluated(layout.MAKE_GROUP, [keys.index(group)],
                                                             layout.raw(space.generation)))
                        for group in range(GROUPS)])
    for head in map(GroupHead.of, heads):
        if head is None or head.generation != space.generation:
            raise problem(server, space.name, errno.ESTALE, "parts of an older namespace of that name are there, and "
                          "its head was lost: a shard has lost its data. Bring that shard's data back, or remove what "
                          f"is left by `uffd store rm URL {space.name}`")
    server.run([(keys.head, layout.evaluated(layout.MOVE_STATE, [keys.head], f"{space.generation:016x}", "making",
                                             "ready"))])
    return Namespace(space.name, space.generation, space.block_bytes, space.nbytes, "ready", space.is_new)


def check_server(server: Server, infos: Sequence[dict[str, Any]], durable: str) -> None:
    """Servers that lose data by design, or can't do what `durable` promises, are refused."""
    for info in infos:
        policy = str(info.get("maxmemory_policy", "noeviction"))
        if policy.startswith("allkeys"):         # volatile-*: our blocks have no time to live
            raise OSError(errno.EINVAL, f"{info['address']} has maxmemory-policy {policy}: it drops keys when memory "
                          "is short, blocks among them. CONFIG SET maxmemory-policy noeviction (or volatile-*)",
                          server.place)
        if info.get("role") == "slave":
            raise OSError(errno.EROFS, f"{info['address']} is a replica: give the master's address", server.place)
        if durable == "aof":
            version = str(info.get("redis_version", "0"))
            if tuple(int(part) for part in version.split(".")[:2]) < (7, 2):
                raise OSError(errno.EOPNOTSUPP, f'durable="aof" needs WAITAOF, of Redis 7.2 or Valkey, and '
                              f"{info['address']} is version {version}", server.place)
            if not int(info.get("aof_enabled", 0)):
                raise OSError(errno.EOPNOTSUPP, f'durable="aof" needs an append-only file, and {info["address"]} has '
                              "none: CONFIG SET appendonly yes", server.place)


def check_groups(server: Server, space: Namespace) -> list[GroupHead]:
    """The heads of all groups, which must be there, and not older than what the ledgers of a cluster say."""
    keys = space.keys
    commands: list[Any] = [(keys.index(group), ("GETRANGE", keys.index(group), 0, layout.INDEX_HEAD_BYTES - 1))
                           for group in range(GROUPS)]
    acknowledged: list[dict[str, str]] = []
    if server.is_cluster:                        # first: what is written meanwhile makes groups newer, not older
        flats = server.run([(ledger, ("EVAL", "return redis.call('HGETALL', KEYS[1])", 1, ledger))
                            for ledger in keys.ledgers])
        acknowledged = [pairs for flat in flats
                        if (pairs := layout.in_pairs(flat)).get("generation") == f"{space.generation:016x}"]
    heads = [GroupHead.of(data) for data in server.run(commands)]
    lost = [group for group, head in enumerate(heads) if head is None or head.generation != space.generation]
    if lost:
        raise problem(server, space.name, errno.ENODATA, f"{len(lost)} of its {GROUPS} groups of blocks are lost (the "
                      f"first is {keys.index(lost[0])}): a server or shard started again without its data, or keys "
                      f"were deleted. Bring the data back, or remove the rest by `uffd store rm URL {space.name}`")
    whole = [head for head in heads if head is not None]
    behind = [group for group, head in enumerate(whole)
              if any(int(ledger.get(str(group), 0)) > head.writes for ledger in acknowledged)]
    if behind:
        raise problem(server, space.name, errno.ESTALE, f"{len(behind)} of its {GROUPS} groups of blocks are older "
                      f"than the last acknowledged write (the first is {keys.index(behind[0])}): a failover to a "
                      "replica that was behind, or an old backup. Bring the newer data back, or remove the namespace "
                      f"by `uffd store rm URL {space.name}`")
    return whole


@contextmanager
def connected(url: str, timeout_s: float) -> Iterator[Server]:
    """A server that was looked at, for as long as it takes."""
    server = Server(url, timeout_s)
    try:
        server.look()
        yield server
    finally:
        server.close()


# ---- uffd store -------------------------------------------------------------------------------------------------


def listed(server: Server) -> list[dict[str, Any]]:
    """What is there, by name: one dict for each namespace. Looks through all keys of the server."""
    names = {name for key in server.names(layout.HEADS_PATTERN) if (name := layout.namespace_of(key))}
    return [row for name in sorted(names) if (row := _row(server, name))]


def _row(server: Server, name: str) -> dict[str, Any] | None:
    space = looked_up(server, name)
    if space is None:                            # removed meanwhile
        return None
    keys = space.keys
    indexes = server.run([(keys.index(group), ("GET", keys.index(group))) for group in range(GROUPS)])
    (writer,) = server.run([(keys.lease, ("GET", keys.lease))])
    blocks = sum(int(np.count_nonzero(layout.versions_of(index[layout.INDEX_HEAD_BYTES:])))
                 for index in indexes if index)
    lost = 0 if space.state == "making" else sum(index is None for index in indexes)
    return {"namespace": name, "state": space.state if not lost else f"{lost} of {GROUPS} groups lost",
            "nbytes": space.nbytes, "block_bytes": space.block_bytes, "blocks_written": blocks,
            "stored_bytes_max": blocks * (space.block_bytes + layout.VALUE_HEAD_BYTES),
            "writer": writer.decode(errors="replace") if writer else None, "generation": f"{space.generation:016x}"}


def removed(server: Server, name: str, *, force: bool = False) -> int:
    """Removes a namespace, whatever is left of it; how many keys it had. OSError while somebody writes to it, unless
    `force`."""
    keys = layout.keys_of(layout.checked_name(name))
    (writer,) = server.run([(keys.lease, ("GET", keys.lease))])
    if writer and not force:
        raise problem(server, name, errno.EBUSY, f"{writer.decode(errors='replace')} writes to it; end that program, "
                      "or use --force")
    space = looked_up(server, name)
    count = remove_known(server, space) if space is not None else 0
    left = list(server.names(keys.pattern))      # what no index tells of any more
    for at in range(0, len(left), _REMOVE_AT_ONCE):
        count += sum(server.run([(key, ("UNLINK", key)) for key in left[at:at + _REMOVE_AT_ONCE]]))
    if not count:
        raise problem(server, name, errno.ENOENT, "it is not there")
    return count


def remove_known(server: Server, space: Namespace) -> int:
    """Removes all that the indexes tell of, the head last; how many keys."""
    keys, generation = space.keys, f"{space.generation:016x}"
    for state in ("making", "ready"):            # nobody opens it from here on
        server.run([(keys.head, layout.evaluated(layout.MOVE_STATE, [keys.head], generation, state, "removing"))])
    count = 0
    for group in range(GROUPS):
        (index,) = server.run([(keys.index(group), ("GET", keys.index(group)))])
        blocks = [keys.block(block) for block in layout.written_in(group, index or b"")]
        # its index first: from then on no write of anybody is taken
        names = [keys.index(group), *blocks]
        for at in range(0, len(names), _REMOVE_AT_ONCE):
            count += sum(server.run([(name, ("UNLINK", name)) for name in names[at:at + _REMOVE_AT_ONCE]]))
    rest = [*(keys.ledgers if server.is_cluster else ()), keys.writers, keys.lease, keys.head]
    return count + sum(server.run([(key, ("UNLINK", key)) for key in rest]))
