"""The memory node: a region's blocks in a Redis or Valkey server, or in a Redis Cluster whose shards are the pool.

Read `redis_layout.py` first: what is stored, and the scripts by which it changes. The rule is that of files: bytes are
given only if they are the last acknowledged ones, by generation, version and checksum; else an error names the block.
"""

from __future__ import annotations

import errno
import operator
import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import redis_layout as layout
from . import redis_store as store
from .hosted import Provider, in_host
from .redis_layout import GROUPS, INDEX_HEAD_BYTES, RUN_BLOCKS, VALUE_HEAD_BYTES, Damaged, GroupHead
from .redis_lease import Lease, process_identity
from .redis_server import Command, Server
from .redis_wire import Answers, Unexpected
from .urls import shown

__all__ = ["Redis"]

_DURABLE = ("ack", "wait", "aof")
_READ_BYTES = 2 << 20                            # of one pipeline: more only fills the server's buffers, and caches
_WRITE_BYTES = 8 << 20
_INDEX_PART_BYTES = 2 << 10                      # of an index, up to which its head is read along with the rest
_WRITE_TRIES = 8                                 # of a block that another host of the same session writes, too

Piece = tuple[int, int, np.ndarray]              # block, where in it, and the part of the caller's buffer


class Redis(Provider):
    """The blocks of `namespace` in a Redis or Valkey server, or in a Redis Cluster: memory elsewhere that many regions,
    programs and machines can read, and one session at a time can write.

    url: redis://, rediss:// (TLS) or unix://, as redis-py takes it, with user, password and TLS options; it is pickled
    with the recipe, password included. create: make the namespace where it is not there; False: it must be (OSError
    ENOENT). delete: remove it at close, if this session wrote it, or made it and nobody wrote. durable: what `flush`
    waits for: "ack" the server's reply, "wait" that `replicas` replicas of each shard have it (WAIT), "aof" that it is
    on the server's disk (WAITAOF; Redis 7.2, Valkey).

    nbytes: of a new namespace, None: as many as the region likes; of one that is there, what must be right.
    block_bytes: the size of one value, a new namespace has 64 KiB; best the region's own. lease_s: for how long a
    writer that died keeps others from writing. timeout_s: the patience of one read, write or flush, reconnecting and
    waiting for a failover included; keep it below the region's.

    The namespace is looked up here, in your process, and its generation is part of the recipe: a server that started
    again without its data, keys that were evicted or deleted, a replica that took over and was behind, are errors, not
    zeros. A block that was never written reads as zeros. OSError with the server, the namespace and the cure;
    ValueError for sizes that do not fit; ImportError names the extra. docs/redis.md has what is promised at each
    failure.
    """

    concurrency = 2                              # one works while the other waits; more wait for each other

    def __init__(self, url: str, namespace: str, *, create: bool = True, delete: bool = False, durable: str = "ack",
                 nbytes: int | None = None, block_bytes: int | None = None, replicas: int = 1, lease_s: float = 10.0,
                 timeout_s: float = 20.0) -> None:
        self.url = url
        self.namespace = layout.checked_name(namespace)
        self.delete, self.durable, self.replicas = delete, durable, replicas
        self.lease_s, self.timeout_s = lease_s, timeout_s
        self.title = f"Redis({shown(url)!r}, {namespace!r})"
        _check_options(durable, nbytes, block_bytes, replicas, lease_s)
        layout.require_xxhash()
        server = self._server()
        try:
            store.check_server(server, server.look(), durable)
            space = store.found(server, namespace, create=create, block_bytes=block_bytes, nbytes=nbytes)
            store.check_groups(server, space)
        finally:
            server.close()
        self.nbytes: int | None = space.nbytes if space.nbytes is not None else nbytes
        self.block_bytes = space.block_bytes
        self._space = space
        self._session_id = secrets.token_hex(8)
        self._maker = process_identity(os.getpid()) if space.is_new else None
        self._live: _Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None}

    def __repr__(self) -> str:
        return f"uffd.providers.{self.title}"

    def _server(self) -> Server:
        return Server(self.url, self.timeout_s, f"uffd-{self.namespace}")

    # ---- life ----

    def open(self) -> None:
        server = self._server()
        try:
            store.check_server(server, server.look(), self.durable)
            space = store.looked_up(server, self.namespace)
            if space is None or space.generation != self._space.generation or space.state != "ready":
                raise self._gone(server, space)
            heads = store.check_groups(server, space)
        except BaseException:
            server.close()
            raise
        read_at: dict[int, int] = {}
        self._live = _Live(server, layout.Values(space.generation), [head.writes for head in heads], read_at,
                           Lease(server, space, self._token(), self.lease_s, read_at))

    def _token(self) -> str:
        """The session, as all hosts of one region call it, and nobody else."""
        process = process_identity(os.getppid() if in_host() else os.getpid())
        region = getattr(self._session, "_number", 0)
        return f"{process}:{region}:{self._session_id}"

    def _gone(self, server: Server, space: store.Namespace | None) -> OSError:
        if space is not None and space.generation == self._space.generation:
            return store.problem(server, self.namespace, errno.ENOENT, "it is being removed")
        there = "is not there any more" if space is None else f"was made anew (generation {space.generation:016x})"
        return store.problem(server, self.namespace, errno.ESTALE, f"it {there}: it was removed, or the server started "
                             f"again without its data. Its blocks of generation {self._space.generation:016x} are "
                             "lost, unless you bring the server's data back; a new provider object begins anew")

    def close(self) -> None:
        """Gives the lease back; with `delete`, removes the namespace first, where that is ours to do."""
        live, self._live = self._live, None
        if live is None:
            return
        self._session_id = secrets.token_hex(8)  # opened again, it is another session
        try:
            if self.delete and self._may_delete(live):
                store.remove_known(live.server, self._space)
            live.lease.release()
        finally:
            live.server.close()

    def _may_delete(self, live: _Live) -> bool:
        if live.lease.fence:
            try:
                live.lease.check(live.server.deadline())
            except OSError:                      # another writes to it now
                return False
            return True
        if self._maker != process_identity(os.getppid() if in_host() else os.getpid()):
            return False
        return not any(head.fence for head in store.check_groups(live.server, self._space))

    def _opened(self) -> _Live:
        live = self._live
        if live is None:
            raise ValueError(f"{self.title} is not open")
        return live

    # ---- reading ----

    def read(self, offset: int, out: np.ndarray) -> None:
        self.read_many([(offset, out)])

    def read_many(self, requests: Sequence[tuple[int, np.ndarray]]) -> None:
        """Fetches all blocks of all requests pipelined, 2 MiB at a time."""
        live = self._opened()
        deadline = live.server.deadline()
        runs: dict[int, list[Piece]] = defaultdict(list)
        held = 0
        for block, begin, part in self._pieces(requests):
            runs[block // RUN_BLOCKS].append((block, begin, part))
            held += self.block_bytes
            if held >= _READ_BYTES:
                self._read_runs(live, runs, deadline)
                runs.clear()
                held = 0
        if runs:
            self._read_runs(live, runs, deadline)

    def _pieces(self, requests: Iterable[tuple[int, np.ndarray]]) -> Iterator[Piece]:
        size = self.block_bytes
        for offset, buffer in requests:
            nbytes = buffer.nbytes
            if offset < 0 or (self.nbytes is not None and offset + nbytes > self.nbytes):
                raise OSError(errno.EINVAL, f"namespace {self.namespace!r}: bytes {offset} to {offset + nbytes} of "
                              f"{self.nbytes} were asked for", shown(self.url))
            at = 0
            while at < nbytes:
                block, begin = divmod(offset + at, size)
                count = min(size - begin, nbytes - at)
                yield block, begin, buffer[at:at + count]
                at += count

    def _read_runs(self, live: _Live, runs: Mapping[int, list[Piece]], deadline: float) -> None:
        """For each run: the head of its index, the versions, and then the values, which are as new or newer."""
        asked = [self._asked(live, pieces) for pieces in runs.values()]
        asked = self._read_straight(live, asked)
        replies = iter(live.server.run([(run.index, command) for run in asked for command in run.commands], deadline))
        for run in asked:
            head, versions = self._versions(live, run, [next(replies) for _ in run.commands[1:]])
            self._saw(live, run.group, head)
            values = zip(run.blocks, next(replies), versions, strict=True)
            found = {block: self._checked(live, block, value, version) for block, value, version in values}
            for block, begin, part in run.pieces:
                _give(part, begin, found[block])

    def _asked(self, live: _Live, pieces: list[Piece]) -> _Run:
        """What is to be asked for a run."""
        keys = self._space.keys
        pieces = sorted(pieces, key=operator.itemgetter(0))
        blocks = sorted({block for block, _, _ in pieces})
        group = layout.group_of(blocks[0])
        index = keys.index(group)
        first, last = (INDEX_HEAD_BYTES + 8 * layout.place_of(block) for block in (blocks[0], blocks[-1]))
        ranges = [(0, last + 7)] if last < _INDEX_PART_BYTES else [(0, INDEX_HEAD_BYTES - 1), (first, last + 7)]
        commands = [*(("GETRANGE", index, *ends) for ends in ranges), ("MGET", *map(keys.block, blocks))]
        return _Run(group, index, live.writes[group], first, blocks, pieces, commands)

    def _versions(self, live: _Live, run: _Run, parts: Sequence[bytes]) -> tuple[GroupHead, list[int]]:
        """The head of a run's group and the versions of its blocks, from what was read of its index; checked."""
        head = self._check_group(run.blocks[0], parts[0], run.writes)
        entries = layout.versions_of(parts[0][run.first:] if len(parts) == 1 else parts[1])
        places = [block - run.blocks[0] for block in run.blocks]
        return head, [int(entries[at]) if at < len(entries) else 0 for at in places]

    # ---- the common way of a read: whole blocks, from the socket into the caller's buffers ----

    def _read_straight(self, live: _Live, runs: Sequence[_Run]) -> list[_Run]:
        """Reads what can be read that way. What is left: what can't, and all that did not go as it should, to be read
        again in the way that finds out why."""
        left = [run for run in runs if not self._is_straight(run)]
        by_node: dict[Any, list[_Run]] = defaultdict(list)
        try:
            for run in runs:
                if self._is_straight(run):
                    by_node[live.server.node_of(run.index)].append(run)
        except live.server.failures:             # no shard has the slot now
            return list(runs)
        for node, some in by_node.items():
            try:
                with live.server.answers(node, [command for run in some for command in run.commands]) as answers:
                    heads = [self._take_run(live, run, answers) for run in some]
                for run, head in zip(some, heads, strict=True):     # not before it is known that they are in step
                    self._saw(live, run.group, head)
            except live.server.failures:
                left += some
            except Damaged:
                left += some
        return left

    def _is_straight(self, run: _Run) -> bool:
        return len(run.pieces) == len(run.blocks) and all(part.nbytes == self.block_bytes for _, _, part in run.pieces)

    def _take_run(self, live: _Live, run: _Run, answers: Answers) -> GroupHead:
        head_of_group, versions = self._versions(live, run, [answers.bulk() for _ in run.commands[1:]])
        if answers.length(b"*") != len(run.blocks):
            raise Unexpected("another number of values")
        lengths, heads = answers.values([part for _, _, part in run.pieces], VALUE_HEAD_BYTES)
        for number, (block, _, part) in enumerate(run.pieces):
            count, version, at = lengths[number], versions[number], number * VALUE_HEAD_BYTES
            if count < 0:
                self._checked(live, block, None, version)
            elif live.values.checked(heads[at:at + VALUE_HEAD_BYTES], part[:count - VALUE_HEAD_BYTES],
                                     block) < version:
                raise Damaged("out of date")
        return head_of_group

    def _check_group(self, block: int, data: bytes, writes: int) -> GroupHead:
        """What is there of the group is what was made, and not older than what this session has seen."""
        head = GroupHead.of(data)
        if head is None or head.generation != self._space.generation:
            raise self._lost(block, errno.ENODATA, "its group of blocks is gone: the server started again without its "
                             "data, keys were deleted or evicted, or the namespace was removed")
        if head.writes < writes:
            raise self._lost(block, errno.ESTALE, f"its group of blocks went back from write {writes} to "
                             f"{head.writes}: a replica that was behind took over, or the server started from an older "
                             "copy")
        return head

    @staticmethod
    def _saw(live: _Live, group: int, head: GroupHead) -> None:
        live.saw(group, head.writes)
        if not live.lease.fence:
            live.read_at.setdefault(group, head.newest)

    def _checked(self, live: _Live, block: int, value: bytes | None, version: int) -> np.ndarray | None:
        """The bytes of a value; None: zeros, for it was never written."""
        if value is None:
            if version:
                raise self._lost(block, errno.ENODATA, f"it was written (version {version}), and is missing: it was "
                                 "deleted or evicted")
            return None
        try:
            found, data = live.values.unpacked(value, block)
        except Damaged as error:
            raise self._lost(block, errno.EBADMSG, str(error)) from None
        if found < version:
            raise self._lost(block, errno.ESTALE, f"version {found} is there, and {version} was acknowledged: it is "
                             "out of date")
        return data

    def _lost(self, block: int, number: int, text: str) -> OSError:
        return OSError(number, f"namespace {self.namespace!r}, block {block} (bytes {block * self.block_bytes} to "
                       f"{(block + 1) * self.block_bytes}): {text}. Bring the server's data back, or write the block "
                       f"anew into a new namespace; `uffd store rm` removes this one", shown(self.url))

    # ---- writing ----

    def write(self, offset: int, data: np.ndarray) -> None:
        self.write_many([(offset, data)])

    def write_many(self, requests: Sequence[tuple[int, np.ndarray]]) -> None:
        """Stores several pieces, pipelined, 8 MiB at a time; its return acknowledges all of them. If it fails, some
        blocks may be new and the others old, none torn. Takes the lease the first time."""
        live = self._opened()
        deadline = live.server.deadline()
        live.lease.ensure(deadline)
        batch: list[Piece] = []
        held = 0
        for piece in self._pieces(requests):
            batch.append(piece)
            held += self.block_bytes
            if held >= _WRITE_BYTES:
                self._write_batch(live, batch, deadline)
                batch, held = [], 0
        if batch:
            self._write_batch(live, batch, deadline)

    def _write_batch(self, live: _Live, pieces: Sequence[Piece], deadline: float) -> None:
        todo: dict[int, dict[int, list[Piece]]] = defaultdict(lambda: defaultdict(list))
        for piece in pieces:
            todo[layout.group_of(piece[0])][piece[0]].append(piece)
        with ExitStack() as stack:               # one thread at a time in a group; in order, so that no two wait
            for group in sorted(todo):
                stack.enter_context(live.locks[group])
            acknowledged: dict[int, int] = {}
            for _ in range(_WRITE_TRIES):
                acknowledged |= self._write_once(live, todo, deadline)
                if not todo:
                    break
            else:
                block = min(min(blocks) for blocks in todo.values())
                raise OSError(errno.EAGAIN, f"namespace {self.namespace!r}, block {block}: another host of this "
                              f"session wrote it at the same time, {_WRITE_TRIES} times; try again", shown(self.url))
            if live.server.is_cluster:
                self._enter_in_ledgers(live, acknowledged, deadline)

    def _write_once(self, live: _Live, todo: dict[int, dict[int, list[Piece]]], deadline: float) -> dict[int, int]:
        """Groups that were written leave `todo`; how many writes each of them has now."""
        commands: list[Command] = []
        olds = self._read_olds(live, todo, deadline)
        groups = list(todo)
        for group in groups:
            version = live.lease.newest[group] = live.lease.newest[group] + 1
            blocks = todo[group]
            arguments: list[Any] = [*self._right(live, group)]
            for block, pieces in blocks.items():
                expected, data = self._new_bytes(pieces, olds.get(block))
                arguments += (layout.place_of(block), version, expected,
                              layout.packed(self._space.generation, block, version, live.lease.writer, data))
            index = self._space.keys.index(group)
            commands.append((index, layout.evaluated(
                layout.WRITE, [index, *map(self._space.keys.block, blocks)], *arguments)))
        acknowledged = {}
        for group, (word, number) in zip(groups, live.server.run(commands, deadline), strict=True):
            if word == b"NEWER":                 # another host of this session: its versions and ours met
                live.lease.newest[group] = max(live.lease.newest[group], number)
                continue
            self._check_answer(live, group, word, number)
            live.wrote(group, number)
            acknowledged[group] = number
            del todo[group]
        return acknowledged

    def _right(self, live: _Live, group: int) -> tuple[Any, ...]:
        """What a script asks of a writer."""
        return layout.raw(self._space.generation), live.lease.fence, live.lease.owner, live.writes[group]

    def _check_answer(self, live: _Live, group: int, word: bytes, number: int) -> None:
        name = self._space.keys.index(group)
        if word == b"OK":
            return
        if word == b"FENCED" and number >= live.lease.fence:
            raise live.lease.lose(errno.EBUSY, "another session has written to it since: this one was stopped or cut "
                                  f"off for longer than its lease of {self.lease_s:g} s, and its writes are refused")
        if word in (b"BACK", b"FENCED"):
            raise store.problem(live.server, self.namespace, errno.ESTALE, f"{name} is older than what was "
                                "acknowledged to this session: a replica that was behind took over, or the server "
                                "started from an older copy. Bring the newer data back")
        raise store.problem(live.server, self.namespace, errno.ENODATA, f"{name} is gone, or of another generation: "
                            "the server started again without its data, or the namespace was removed")

    def _read_olds(self, live: _Live, todo: dict[int, dict[int, list[Piece]]],
                   deadline: float) -> dict[int, tuple[int, np.ndarray | None]]:
        """(version, bytes) of the blocks that are written in part."""
        keys = self._space.keys
        partial = [block for blocks in todo.values() for block, pieces in blocks.items()
                   if not any(self._is_whole(*piece) for piece in pieces)]
        if not partial:
            return {}
        commands: list[Command] = []
        for block in partial:
            index, at = keys.index(layout.group_of(block)), INDEX_HEAD_BYTES + 8 * layout.place_of(block)
            commands += [(index, ("GETRANGE", index, 0, INDEX_HEAD_BYTES - 1)),
                         (index, ("GETRANGE", index, at, at + 7)), (index, ("GET", keys.block(block)))]
        writes = list(live.writes)               # before they are asked for
        replies = iter(live.server.run(commands, deadline))
        olds = {}
        for block, head, entry, value in zip(partial, replies, replies, replies):
            group = layout.group_of(block)
            self._saw(live, group, self._check_group(block, head, writes[group]))
            version = int.from_bytes(entry, "little")
            olds[block] = version, self._checked(live, block, value, version)
        return olds

    def _is_whole(self, block: int, begin: int, part: np.ndarray) -> bool:
        """Whether nothing of the block's old bytes is left after it."""
        end = begin + part.nbytes
        return begin == 0 and (end == self.block_bytes or block * self.block_bytes + end == self.nbytes)

    def _new_bytes(self, pieces: Sequence[Piece], old: tuple[int, np.ndarray | None] | None) -> tuple[int, Any]:
        """(version that the block must have now, its bytes)."""
        if old is None and len(pieces) == 1:
            return -1, np.ascontiguousarray(pieces[0][2])
        version, data = old or (-1, None)
        kept = 0 if data is None else data.nbytes
        made = np.zeros(max([kept, *(begin + part.nbytes for _, begin, part in pieces)]), np.uint8)
        if data is not None:
            made[:kept] = data
        for _, begin, part in pieces:
            made[begin:begin + part.nbytes] = part
        return version, made

    def _enter_in_ledgers(self, live: _Live, acknowledged: dict[int, int], deadline: float) -> None:
        """What is acknowledged is told to two shards, so that a third party can know of it after one went back."""
        arguments = [word for pair in acknowledged.items() for word in pair]
        live.server.run([(ledger, layout.evaluated(layout.LEDGER, [ledger], f"{self._space.generation:016x}",
                                                   *arguments)) for ledger in self._space.keys.ledgers], deadline)

    # ---- durability ----

    def flush(self) -> None:
        """Returns when all that this provider wrote is still what the servers have, and as durable as `durable` says;
        OSError if it is not. Waits for timeout_s at most."""
        live = self._opened()
        deadline = live.server.deadline()
        if not live.lease.fence:
            if not live.lease.was_ours(deadline):            # nothing was written
                return
            live.keep_dirty(set(range(GROUPS)))  # by a host that died, it may be
        live.lease.ensure(deadline)
        live.lease.check(deadline)
        groups = live.take_dirty()
        try:
            self._flush_groups(live, groups, deadline)
        except BaseException:
            live.keep_dirty(groups)
            raise

    def _flush_groups(self, live: _Live, groups: set[int], deadline: float) -> None:
        keys = self._space.keys
        first = self.durable != "ack" and not live.is_durable    # a shard that has none of ours may lack the namespace
        order = list(range(GROUPS)) if first else sorted(groups)
        commands: list[Command] = [(keys.index(group), layout.evaluated(
            layout.TOUCH, [keys.index(group)], *self._right(live, group))) for group in order]
        if first:
            commands.append((keys.head, layout.evaluated(layout.MOVE_STATE, [keys.head],
                                                         f"{self._space.generation:016x}", "ready", "ready")))
        if self.durable == "ack" or not commands:
            answers, lasts = live.server.run(commands, deadline), []
        else:
            wait_ms = int(live.server.socket_timeout_s * 800)    # ends before the socket's patience does
            last = (("WAIT", self.replicas, wait_ms) if self.durable == "wait" else ("WAITAOF", 1, 0, wait_ms))
            told = live.server.run_on_each(commands, last, deadline)
            answers, lasts = [reply for _, reply in told[:len(commands)]], told[len(commands):]
        if first:
            self._check_answer(live, 0, *answers.pop())
        for group, (word, number) in zip(order, answers, strict=True):
            self._check_answer(live, group, word, number)
        for address, reply in lasts:
            reached, wanted = (reply, self.replicas) if self.durable == "wait" else (reply[0], 1)
            if reached < wanted:
                what = f"{reached} of {wanted} replicas have" if self.durable == "wait" else "the disk does not have"
                raise store.problem(live.server, self.namespace, errno.ETIMEDOUT, f'durable="{self.durable}": {what} '
                                    f"what was written to {address}, after {wait_ms} ms. See INFO "
                                    f"{'replication' if self.durable == 'wait' else 'persistence'} there; flush again")
        live.is_durable = live.is_durable or first


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring blocks of one group that are read together."""

    group: int
    index: str
    writes: int                                  # that the group had, before it was asked
    first: int                                   # where in the index the first block's version is
    blocks: list[int]
    pieces: list[Piece]                          # by block
    commands: list[tuple[Any, ...]]              # one or two of the index, one of the values


@dataclass
class _Live:
    """What there is between open and close."""

    server: Server
    values: layout.Values
    writes: list[int]                            # of each group: how many this session knows of; never fewer again
    read_at: dict[int, int]                      # see Lease
    lease: Lease
    locks: list[threading.Lock] = field(default_factory=lambda: [threading.Lock() for _ in range(GROUPS)])
    is_durable: bool = False                     # the namespace itself, on every shard
    _dirty: set[int] = field(default_factory=set)            # groups written since the last flush
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def saw(self, group: int, writes: int) -> None:
        if writes > self.writes[group]:
            with self._lock:
                self.writes[group] = max(self.writes[group], writes)

    def wrote(self, group: int, writes: int) -> None:
        with self._lock:
            self.writes[group] = max(self.writes[group], writes)
            self._dirty.add(group)

    def take_dirty(self) -> set[int]:
        with self._lock:
            dirty, self._dirty = self._dirty, set()
            return dirty

    def keep_dirty(self, groups: set[int]) -> None:
        with self._lock:
            self._dirty |= groups


def _give(part: np.ndarray, begin: int, data: np.ndarray | None) -> None:
    """Fills a part of a buffer from where it begins in the block. What a short block has not is zeros."""
    if data is None:
        part[:] = 0
        return
    have = min(max(len(data) - begin, 0), len(part))
    part[:have] = data[begin:begin + have]
    part[have:] = 0


def _check_options(durable: str, nbytes: int | None, block_bytes: int | None, replicas: int, lease_s: float) -> None:
    if durable not in _DURABLE:
        raise ValueError(f"durable must be one of {', '.join(_DURABLE)}, not {durable!r}")
    if nbytes is not None and nbytes < 0:
        raise ValueError(f"nbytes must be >= 0, not {nbytes}")
    if block_bytes is not None and (not 512 <= block_bytes <= store.BLOCK_BYTES_MAX or block_bytes & block_bytes - 1):
        raise ValueError(f"block_bytes must be a power of two, 512 to {store.BLOCK_BYTES_MAX}, not {block_bytes}")
    if replicas < 1 or not lease_s > 0:
        raise ValueError(f"replicas must be >= 1 and lease_s > 0, not {replicas} and {lease_s}")
