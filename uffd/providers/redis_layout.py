"""How a namespace lies in Redis: its keys, the head of each value, and the scripts by which all of it changes.

    uffd:{NAME}:head        hash: generation, block_bytes, nbytes, state, fence (of the last writer), owner (its token)
    uffd:{NAME}:lease       the writer's token, for as long as it renews it
    uffd:{NAME}:writers     the last 4,096 sessions that had it, by fence: who lost it does not get it again
    uffd:{NAME/g}:index     of group g: its head (40 bytes), then 8 bytes for each block: the version last acknowledged
    uffd:{NAME/g}:b         block b, of group g: 56 bytes of head, then its bytes
    uffd:{NAME/lN}:ledger   clusters only: hash of group: how many writes were acknowledged; two, on different shards

A group is what one script may touch: its keys have one hash slot. Runs of 16 neighbouring blocks belong to one group,
the next run to the next of the 256 groups. A block and its version in the index change together or not at all.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["GROUPS", "Damaged", "GroupHead", "Keys"]

GROUPS = 256
RUN_BLOCKS = 16
INDEX_HEAD_BYTES = 40
VALUE_HEAD_BYTES = 56
FORMAT = 1
_MAGIC = b"uffB"
_SLOTS = 16384
_VALUE_HEAD = struct.Struct("<4sHHQQQQIIQ")      # .., generation, block, version, writer, length, 0, checksum
_INDEX_HEAD = struct.Struct("<8sQQQ8s")          # generation, writes, newest version, fence, its owner
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class Damaged(Exception):
    """A value that is not what was stored for that block; the text says why."""


def checked_name(namespace: str) -> str:
    if not isinstance(namespace, str) or not _NAME.fullmatch(namespace):
        raise ValueError(f"namespace {namespace!r}: it must be 1 to 200 letters, digits, '.', '_' and '-', and begin "
                         "with a letter or digit")
    return namespace


# ---- keys -------------------------------------------------------------------------------------------------------


def group_of(block: int) -> int:
    return block // RUN_BLOCKS % GROUPS


def place_of(block: int) -> int:
    """Which entry of its group's index is the block's."""
    return block // (RUN_BLOCKS * GROUPS) * RUN_BLOCKS + block % RUN_BLOCKS


def block_at(group: int, place: int) -> int:
    return (place // RUN_BLOCKS * GROUPS + group) * RUN_BLOCKS + place % RUN_BLOCKS


@dataclass(frozen=True)
class Keys:
    """The keys of one namespace."""

    namespace: str

    @functools.cached_property
    def head(self) -> str:
        return f"uffd:{{{self.namespace}}}:head"

    @functools.cached_property
    def lease(self) -> str:
        return f"uffd:{{{self.namespace}}}:lease"

    @functools.cached_property
    def writers(self) -> str:
        return f"uffd:{{{self.namespace}}}:writers"

    @functools.cached_property
    def _tags(self) -> list[str]:
        return [f"uffd:{{{self.namespace}/{group}}}:" for group in range(GROUPS)]

    def index(self, group: int) -> str:
        return self._tags[group] + "index"

    def block(self, block: int) -> str:
        return f"{self._tags[group_of(block)]}{block}"

    @functools.cached_property
    def ledgers(self) -> tuple[str, str]:
        """Two, half of all slots apart: where shards own ranges of slots, on two of them."""
        from redis.crc import key_slot

        def named(number: int) -> str:
            return f"uffd:{{{self.namespace}/l{number}}}:ledger"
        far = (key_slot(named(0).encode()) + _SLOTS // 2) % _SLOTS
        return named(0), min(map(named, range(1, 2000)), key=lambda name: abs(key_slot(name.encode()) - far))

    @property
    def pattern(self) -> str:
        """Of SCAN: all keys of the namespace, and of no other."""
        return f"uffd:{{{self.namespace}[}}/]*"


@functools.lru_cache(64)
def keys_of(namespace: str) -> Keys:
    """The same object each time: its keys are made once."""
    return Keys(namespace)


HEADS_PATTERN = "uffd:{*}:head"


def namespace_of(head_key: str) -> str | None:
    """The namespace whose head that is."""
    name = head_key.removeprefix("uffd:{").removesuffix("}:head")
    return name if _NAME.fullmatch(name) and Keys(name).head == head_key else None


# ---- values -----------------------------------------------------------------------------------------------------


def require_xxhash() -> Any:
    try:
        import xxhash
    except ImportError as error:
        raise ImportError('blocks in Redis need the package xxhash: pip install "pyuffd[redis]"') from error
    return xxhash


def packed(generation: int, block: int, version: int, writer: int, data: Any) -> bytes:
    """The value of a block. The checksum is over all of it."""
    digest = require_xxhash().xxh3_64_intdigest
    fields = (_MAGIC, FORMAT, VALUE_HEAD_BYTES, generation, block, version, writer, len(data), 0)
    seed = digest(_VALUE_HEAD.pack(*fields, 0))
    return b"".join((_VALUE_HEAD.pack(*fields, digest(data, seed)), data))


class Values:
    """Takes values of one namespace apart. On the way of each block that is read: few names, no copies."""

    def __init__(self, generation: int) -> None:
        self._generation = generation
        self._digest = require_xxhash().xxh3_64_intdigest

    def unpacked(self, value: bytes, block: int) -> tuple[int, np.ndarray]:
        """(version, bytes, as a view of the value); Damaged if it is not that block."""
        if len(value) < VALUE_HEAD_BYTES:
            raise Damaged(f"a value of {len(value)} bytes is no block of ours")
        data = np.frombuffer(value, np.uint8, offset=VALUE_HEAD_BYTES)
        return self.checked(value[:VALUE_HEAD_BYTES], data, block), data

    def checked(self, head: bytes, data: np.ndarray, block: int) -> int:
        """The version of a value, by its head and what follows it; Damaged if it is not that block."""
        magic, form, head_bytes, generation, number, version, _, length, _, checksum = _VALUE_HEAD.unpack(head)
        if magic != _MAGIC or head_bytes != VALUE_HEAD_BYTES:
            raise Damaged("the value is no block of ours: something else wrote to that key")
        if form != FORMAT:
            raise Damaged(f"the value has format {form}, and this version of pyuffd reads {FORMAT}")
        if generation != self._generation:
            raise Damaged(f"the value is of generation {generation:016x} of the namespace, not of "
                          f"{self._generation:016x}")
        if number != block or length != data.nbytes:
            raise Damaged(f"the value says that it is block {number} of {length} bytes, and has {data.nbytes}")
        if self._digest(data, self._digest(head[:-8] + bytes(8))) != checksum:
            raise Damaged("the checksum is wrong")
        return version


@dataclass(frozen=True, slots=True)
class GroupHead:
    """The head of a group's index."""

    generation: int
    writes: int                                  # how many scripts have changed the group: never goes back
    newest: int                                  # the highest version of a block in it
    fence: int
    owner: bytes                                 # 8 bytes of the writer whose fence that is

    @classmethod
    def of(cls, data: bytes | None) -> GroupHead | None:
        """None: there is no such group."""
        if data is None or len(data) < INDEX_HEAD_BYTES:
            return None
        generation, *rest = _INDEX_HEAD.unpack_from(data)
        return cls(int.from_bytes(generation, "little"), *rest)


def versions_of(index: bytes) -> np.ndarray:
    """The versions in an index, or in a part of it that begins at an entry; one that ends early ends in zeros."""
    return np.frombuffer(index, "<u8", len(index) // 8)


def written_in(group: int, index: bytes) -> Iterator[int]:
    """The blocks of a group that were ever written, by its whole index."""
    for place in np.flatnonzero(versions_of(index[INDEX_HEAD_BYTES:])):
        yield block_at(group, int(place))


def raw(generation: int) -> bytes:
    return generation.to_bytes(8, "little")


# ---- scripts ----------------------------------------------------------------------------------------------------
# By EVAL, not EVALSHA: a server that took over has no scripts, and the text is short beside a block. Each answers
# {word, number, ...}.

# KEYS: head. ARGV: generation, block_bytes, nbytes. Answers the head's fields, made here or before.
CREATE = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], 'generation', ARGV[1], 'block_bytes', ARGV[2], 'nbytes', ARGV[3], 'state', 'making',
             'fence', '0', 'owner', '')
end
return redis.call('HGETALL', KEYS[1])
"""

# KEYS: head. ARGV: generation, from state, to state.
MOVE_STATE = """
if redis.call('HGET', KEYS[1], 'generation') ~= ARGV[1] then return {'LOST', 0} end
if redis.call('HGET', KEYS[1], 'state') == ARGV[2] then redis.call('HSET', KEYS[1], 'state', ARGV[3]) end
return {'OK', 0}
"""

# KEYS: index. ARGV: generation. Answers the head of the index, made here or before.
MAKE_GROUP = """
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SET', KEYS[1], ARGV[1] .. string.rep('\\0', 32)) end
return redis.call('GETRANGE', KEYS[1], 0, 39)
"""

# KEYS: head, lease, writers. ARGV: token, milliseconds, generation, the fence that we have (0: none), fence to be above
# of, owner. Both the first time and to renew. A lease that ran out is taken up again if nobody had it since.
ACQUIRE = """
if redis.call('HGET', KEYS[1], 'generation') ~= ARGV[3] then return {'LOST', 0} end
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'ready' then return {'STATE', 0, state} end
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] then return {'HELD', redis.call('PTTL', KEYS[2]), holder} end
local fence, owner = tonumber(redis.call('HGET', KEYS[1], 'fence')), redis.call('HGET', KEYS[1], 'owner')
local had = tonumber(ARGV[4])
if had > 0 and (owner ~= ARGV[1] or fence < had) then return {'TAKEN', fence, owner} end
if owner ~= ARGV[1] and redis.call('ZSCORE', KEYS[3], ARGV[6]) then return {'TAKEN', fence, owner} end
local word = 'SAME'
if owner ~= ARGV[1] or fence <= tonumber(ARGV[5]) then
  word, fence = 'NEW', math.max(fence, tonumber(ARGV[5])) + 1
  redis.call('HSET', KEYS[1], 'fence', string.format('%.0f', fence), 'owner', ARGV[1])
  redis.call('ZADD', KEYS[3], fence, ARGV[6])
  redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -4097)
end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return {word, fence}
"""

# KEYS: head, writers. ARGV: token, owner. Whether this session wrote before: in another host, or in one that died.
HAD_IT = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner == ARGV[1] then return {'SAME', 0} end
if redis.call('ZSCORE', KEYS[2], ARGV[2]) then return {'TAKEN', 0, owner or 'nobody'} end
return {'NO', 0}
"""

# KEYS: lease. ARGV: token.
RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return {'OK', redis.call('DEL', KEYS[1])} end
return {'OK', 0}
"""

_OPEN_GROUP = """
local head = redis.call('GETRANGE', KEYS[1], 0, 39)
if #head < 40 then return {'LOST', 0} end
if string.sub(head, 1, 8) ~= ARGV[1] then return {'OTHER', 0} end
local writes, newest, fence = struct.unpack('<I8I8I8', head, 9)
"""

# KEYS: index. ARGV: generation, fence, owner (8 bytes). From here on, writes by fences below are refused.
RAISE = _OPEN_GROUP + """
local mine, owner = tonumber(ARGV[2]), string.sub(head, 33, 40)
if fence > mine or (fence == mine and owner ~= ARGV[3]) then return {'FENCED', fence} end
if fence < mine then
  writes = writes + 1
  redis.call('SETRANGE', KEYS[1], 8, struct.pack('<I8I8I8', writes, newest, mine) .. ARGV[3])
end
return {'OK', writes, newest}
"""

_CHECK_WRITER = _OPEN_GROUP + """
if fence ~= tonumber(ARGV[2]) or string.sub(head, 33, 40) ~= ARGV[3] then return {'FENCED', fence} end
if writes < tonumber(ARGV[4]) then return {'BACK', writes} end
"""

# KEYS: index, block .... ARGV: generation, fence, owner, writes that must be there; then for each block: its place,
# version, the version that it must have now (-1: any below), value. All of them are stored, or none. One that is
# there already was sent twice.
WRITE = _CHECK_WRITER + """
local todo = {}
for i = 2, #KEYS do
  local at = 4 * i - 3
  local start, version, expected = 40 + 8 * ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local entry = redis.call('GETRANGE', KEYS[1], start, start + 7)
  local now = #entry == 8 and struct.unpack('<I8', entry) or 0
  local same = now == version and redis.call('GETRANGE', KEYS[i], 0, 55) == string.sub(ARGV[at + 3], 1, 56)
  if not same then
    if now >= version or (expected >= 0 and now ~= expected) then return {'NEWER', newest} end
    todo[#todo + 1] = i
  end
end
if #todo > 0 then
  for _, i in ipairs(todo) do
    local at = 4 * i - 3
    redis.call('SET', KEYS[i], ARGV[at + 3])
    redis.call('SETRANGE', KEYS[1], 40 + 8 * ARGV[at], struct.pack('<I8', tonumber(ARGV[at + 1])))
    newest = math.max(newest, tonumber(ARGV[at + 1]))
  end
  writes = writes + 1
  redis.call('SETRANGE', KEYS[1], 8, struct.pack('<I8I8', writes, newest))
end
return {'OK', writes}
"""

# KEYS: index. ARGV: generation, fence, owner, writes that must be there. A write that changes nothing, for WAIT to
# wait for.
TOUCH = _CHECK_WRITER + """
redis.call('SETRANGE', KEYS[1], 0, string.sub(head, 1, 8))
return {'OK', writes}
"""

# KEYS: ledger. ARGV: generation, then group, writes, ....
LEDGER = """
if redis.call('HGET', KEYS[1], 'generation') ~= ARGV[1] then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'generation', ARGV[1])
end
for i = 2, #ARGV, 2 do
  if tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or '0') < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return {'OK', 0}
"""


def evaluated(script: str, keys: Iterable[str], *arguments: Any) -> tuple[Any, ...]:
    """The command that runs a script."""
    named = tuple(keys)
    return ("EVAL", script, len(named), *named, *arguments)


def in_pairs(flat: Any) -> dict[str, str]:
    """What HGETALL answers in a script."""
    words = [word.decode() for word in flat]
    return dict(zip(words[::2], words[1::2], strict=True))
