"""What is said in Python: one JSON object per frame behind its length, and the checks of everything in it.

A frame is 4 bytes of length (big-endian) and UTF-8 JSON, an object whose "type" says what it is. What comes from the
other side is believed in nothing: the length is bounded before a byte is read, JSON is strict (no NaN, no number with
a fraction where a count belongs, no key twice, no deep nesting), and `layout` checks that every region and array is
one that could be, before memory is made for it.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._sockets import receive, send
from ..errors import MigrationError

__all__ = ["Array", "Frames", "Layout", "Part", "described", "layout", "numbers", "parse", "text", "whole"]

FRAME_BYTES = 4 << 20               # of one frame at most: some 20,000 arrays' names, types and shapes
PARTS = 4 << 10                     # pieces of memory of one migration at most
ARRAYS = 65536                      # arrays in them
NAME_BYTES = 1024                   # of one name
MEMORY_BYTES = 1 << 47              # of all of it: the address space of a process
DIMENSIONS = 32                     # of an array: what every numpy takes
DTYPE_BYTES = 64 << 10              # of a dtype's description as text
ITEM_BYTES = 1 << 30                # of one item
_NESTED = 64                        # brackets within brackets
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True)
class Part:
    """A piece of memory that travels: a region's, or that of an array which is not ours."""

    nbytes: int
    block_bytes: int
    backing: str


@dataclass(frozen=True)
class Array:
    """An array, as a place in a part."""

    name: str
    part: int
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str


@dataclass(frozen=True)
class Layout:
    parts: tuple[Part, ...]
    arrays: tuple[Array, ...]


class Frames:
    """Frames over a connected socket: `send` and `receive`, each within a deadline (time.monotonic) for all of it."""

    def __init__(self, connection: socket.socket, *, limit_bytes: int = FRAME_BYTES) -> None:
        self.connection, self._limit = connection, limit_bytes

    def send(self, kind: str, *, deadline_s: float, **fields: Any) -> None:
        """OSError, TimeoutError; ValueError if it is too long for a frame."""
        body = json.dumps({"type": kind, **fields}, allow_nan=False, separators=(",", ":")).encode()
        if len(body) > self._limit:
            raise ValueError(f"{kind}: {len(body):,} bytes, and a frame has {self._limit:,} at most: migrate fewer "
                             "arrays at once")
        send(self.connection, _LENGTH.pack(len(body)) + body, deadline_s, f"saying {kind!r}")

    def receive(self, *kinds: str, deadline_s: float) -> dict[str, Any]:
        """The next frame, of one of `kinds`. MigrationError: it is another, or malformed; TimeoutError; OSError."""
        what = f"waiting for {' or '.join(map(repr, kinds))}"
        (nbytes,) = _LENGTH.unpack(receive(self.connection, _LENGTH.size, deadline_s, what))
        if not 2 <= nbytes <= self._limit:
            raise _malformed(f"a frame of {nbytes:,} bytes, and {self._limit:,} is the most")
        frame = parse(receive(self.connection, nbytes, deadline_s, what))
        if frame["type"] not in kinds:
            raise _malformed(f"{frame['type']!r} came where {' or '.join(map(repr, kinds))} belongs")
        return frame


def parse(body: bytes | bytearray) -> dict[str, Any]:
    """The object in a frame; MigrationError if there is anything about it that ours would not have sent."""
    try:
        if _depth(body) > _NESTED:
            raise ValueError(f"nested deeper than {_NESTED}")
        frame = json.loads(bytes(body).decode("utf-8", "strict"), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise _malformed(str(error)) from None
    if not isinstance(frame, dict) or not isinstance(frame.get("type"), str):
        raise _malformed("a frame without a type")
    return frame


def whole(frame: dict[str, Any], name: str, least: int, most: int) -> int:
    """A count out of a frame, within its bounds."""
    value = frame.get(name)
    if type(value) is not int or not least <= value <= most:
        raise _malformed(f"{name} = {_shown(value)}, and a whole number from {least:,} to {most:,} belongs there")
    return value


def numbers(frame: dict[str, Any], name: str, end: int) -> list[int]:
    """Different whole numbers below `end` out of a frame, sorted."""
    value = frame.get(name)
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < end for one in value):
        raise _malformed(f"{name} = {_shown(value)}, and a list of numbers below {end} belongs there")
    return sorted(set(value))


def text(frame: dict[str, Any], name: str, choices: tuple[str, ...] | None = None, most_bytes: int = NAME_BYTES) -> str:
    """A text out of a frame: one of choices, or any of so many bytes without control characters."""
    value = frame.get(name)
    if not isinstance(value, str) or len(value.encode("utf-8", "replace")) > most_bytes:
        raise _malformed(f"{name} = {_shown(value)}, and a text of {most_bytes} bytes at most belongs there")
    if choices is not None and value not in choices:
        raise _malformed(f"{name} = {_shown(value)}, and one of {', '.join(choices)} belongs there")
    if not value.isprintable():
        raise _malformed(f"{name} = {_shown(value)}: with characters that can't be printed")
    return value


def described(found: Layout) -> dict[str, Any]:
    """The layout as fields of a frame, for `layout` at the other side."""
    return {"parts": [{"nbytes": part.nbytes, "block_bytes": part.block_bytes, "backing": part.backing}
                      for part in found.parts],
            "arrays": [{"name": array.name, "part": array.part, "offset": array.offset, "order": array.order,
                        "dtype": _description(array.dtype), "shape": list(array.shape)}
                       for array in found.arrays]}


def layout(frame: dict[str, Any], *, page_bytes: int, memory_bytes: int = MEMORY_BYTES) -> Layout:
    """The memory that a source says it will send; MigrationError for what can't be. Makes nothing."""
    parts = tuple(_part(one, page_bytes) for one in _listed(frame, "parts", PARTS))
    total = sum(part.nbytes for part in parts)
    if total > memory_bytes:
        raise _malformed(f"{total:,} bytes in all, and {memory_bytes:,} is the most")
    arrays = tuple(_array(one, parts) for one in _listed(frame, "arrays", ARRAYS))
    names = [array.name for array in arrays]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _malformed(f"two arrays have the name {twice!r}")
    return Layout(parts, arrays)


def _part(one: dict[str, Any], page_bytes: int) -> Part:
    nbytes = whole(one, "nbytes", 1, MEMORY_BYTES)
    block_bytes = whole(one, "block_bytes", 1, 1 << 30)
    if block_bytes & (block_bytes - 1):
        raise _malformed(f"blocks of {block_bytes} bytes, which is no power of two")
    if block_bytes < page_bytes:
        raise _malformed(f"blocks of {block_bytes} bytes, and pages have {page_bytes} here: make the source's region "
                         f"with block_bytes={page_bytes} or more")
    return Part(nbytes, block_bytes, text(one, "backing", ("anon", "shared")))


def _array(one: dict[str, Any], parts: tuple[Part, ...]) -> Array:
    name = text(one, "name")
    part = whole(one, "part", 0, len(parts) - 1)
    dtype = _dtype(one.get("dtype"))
    shape = one.get("shape")
    if not isinstance(shape, list) or len(shape) > DIMENSIONS or not all(
            type(n) is int and 0 <= n <= MEMORY_BYTES for n in shape):
        raise _malformed(f"array {name!r}: shape = {_shown(shape)}")
    nbytes = math.prod(shape) * dtype.itemsize           # of Python's numbers: it can't overflow
    offset = whole(one, "offset", 0, parts[part].nbytes)
    if nbytes > parts[part].nbytes - offset:
        raise _malformed(f"array {name!r}: {nbytes:,} bytes at {offset:,}, and its memory has {parts[part].nbytes:,}")
    # Of no items, numpy still multiplies the others.
    if math.prod(n for n in shape if n) * dtype.itemsize > MEMORY_BYTES:
        raise _malformed(f"array {name!r}: shape = {_shown(shape)} is of no array that numpy can make")
    return Array(name, part, offset, dtype, tuple(shape), text(one, "order", ("C", "F")))


def _description(dtype: np.dtype[Any]) -> Any:
    """As .npy files have it; a type of ml_dtypes, which those can't tell, by its name."""
    if dtype.names is None and dtype.type.__module__.startswith("ml_dtypes"):
        return f"ml_dtypes.{dtype.name}"
    return np.lib.format.dtype_to_descr(dtype)


def _dtype(description: Any) -> np.dtype[Any]:
    """From such a description. Objects are pointers, and pointers are not from another process."""
    if isinstance(description, str) and description.startswith("ml_dtypes."):
        return _of_ml_dtypes(description.removeprefix("ml_dtypes."))
    try:
        if len(json.dumps(description)) > DTYPE_BYTES:
            raise ValueError("its description is too long")
        found = np.dtype(np.lib.format.descr_to_dtype(_tuples(description)))
    except Exception as error:                   # numpy's parser raises of many kinds
        raise _malformed(f"dtype = {_shown(description)}: {error}") from None
    if found.hasobject or not 0 < found.itemsize <= ITEM_BYTES:
        raise _malformed(f"dtype = {_shown(description)}: objects, or items of {found.itemsize} bytes")
    return found


def _of_ml_dtypes(name: str) -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError:
        raise MigrationError(f"migration refused: an array has the type {_shown(name)} of ml_dtypes, which is not "
                             "installed here: pip install 'pyuffd[dtypes]'") from None
    kind = getattr(ml_dtypes, name, None)
    if not isinstance(kind, type) or not issubclass(kind, np.generic):
        raise _malformed(f"dtype = {_shown(name)}: not one of this machine's ml_dtypes")
    return np.dtype(kind)


def _tuples(description: Any) -> Any:
    """JSON has no tuples, and the fields of a structure are such."""
    if isinstance(description, str):
        return description
    if not isinstance(description, list):
        raise ValueError("neither a text nor a list of fields")
    fields = []
    for field in description:
        if not isinstance(field, list) or not 2 <= len(field) <= 3:
            raise ValueError("a field is a name, a type and perhaps a shape")
        title = tuple(field[0]) if isinstance(field[0], list) else field[0]
        if not all(isinstance(word, str) for word in (title if isinstance(title, tuple) else (title,))):
            raise ValueError("a field's name is a text")
        fields.append((title, _tuples(field[1]), *[_shape(shape) for shape in field[2:]]))
    return fields


def _shape(shape: Any) -> tuple[int, ...]:
    sizes = shape if isinstance(shape, list) else [shape]
    if not all(type(n) is int and 0 < n <= ITEM_BYTES for n in sizes) or len(sizes) > DIMENSIONS:
        raise ValueError("a shape is of whole numbers")
    return tuple(sizes)


def _listed(frame: dict[str, Any], name: str, most: int) -> list[dict[str, Any]]:
    value = frame.get(name)
    if not isinstance(value, list) or len(value) > most or not all(isinstance(one, dict) for one in value):
        raise _malformed(f"{name}: a list of at most {most:,} objects belongs there")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _depth(body: bytes | bytearray) -> int:
    """How deep brackets nest, by a look at brackets alone: those within texts count, too."""
    depth = deepest = 0
    for byte in bytes(body).translate(None, delete=_NOT_BRACKETS):
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _malformed(what: str) -> MigrationError:
    return MigrationError(f"migration refused: the other side sent what can't be: {what}")
