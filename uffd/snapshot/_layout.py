"""Where each array lies in an image, and how its type is written down.

An image is the arrays one after another, each from a page on. In an uncompressed file these are the tensors of a valid
.safetensors: that format allows no gap, so what lies between is in tensors of bytes, `__pad_0`, `__pad_1` ...
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from .._coreless import core as _core
from ..formats import tensors

ALIGN_BYTES = _core.PAGE_BYTES
PAD_PREFIX = "__pad_"
OWN_PREFIX = "__uffd_"
_ML_PREFIX = "ml_dtypes."
_NBYTES_MAX = 1 << 46              # as a region's
_ALIGNS = tuple(1 << shift for shift in range(12, 22))


@dataclass(frozen=True, slots=True)
class Entry:
    """An array in an image."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    order: str                     # "C" or "F"
    offset: int                    # in the image, in bytes
    nbytes: int

    @property
    def code(self) -> str:
        """Its type in a .safetensors; U8, its bytes, where that format has no such type or would permute its axes."""
        return (_code_of(self.dtype) if self.order == "C" else None) or "U8"

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return self.shape if self.order == "C" and _code_of(self.dtype) else (self.nbytes,)


@dataclass(frozen=True, slots=True)
class Layout:
    entries: tuple[Entry, ...]
    nbytes: int
    align: int                     # each array begins at a multiple of it: the page of the machine that wrote it

    @property
    def key(self) -> str:
        """The same for images that can be in one chain."""
        return table_of(self)


def plan(arrays: Mapping[str, np.ndarray]) -> Layout:
    """Where these arrays go. TypeError and ValueError for those that can't be imaged."""
    entries, offset = [], 0
    for name, array in arrays.items():
        _check_name(name)
        order = _order_of(name, array)
        dtype_text(array.dtype)
        entries.append(Entry(name, array.dtype, array.shape, order, offset, array.nbytes))
        offset += round_up(array.nbytes)
    if offset > _NBYTES_MAX:
        raise ValueError(f"the arrays take {offset} bytes, an image holds at most 2**46")
    return Layout(tuple(entries), offset, ALIGN_BYTES)


def round_up(nbytes: int, align: int = ALIGN_BYTES) -> int:
    return -(-nbytes // align) * align


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"names of arrays are strings, not {name!r}")
    if name == "__metadata__" or name.startswith((PAD_PREFIX, OWN_PREFIX)):
        raise ValueError(f"{name!r} can't be an array's name: images use it themselves")


def _order_of(name: str, array: np.ndarray) -> str:
    if array.dtype.hasobject:
        raise TypeError(f"array {name!r}: dtype {array.dtype} holds Python objects, whose bytes are pointers")
    if array.flags.c_contiguous:
        return "C"
    if array.flags.f_contiguous:
        return "F"
    raise ValueError(f"array {name!r}: not contiguous (strides {array.strides} of shape {array.shape}): give the array "
                     "that it is a view of")


# ---- types --------------------------------------------------------------------------------------------------------


def _code_of(dtype: np.dtype) -> str | None:
    for code, text in tensors._NUMPY.items():
        if dtype == np.dtype(text) and dtype.names is None:
            return code
    for code, name in tensors._ML_DTYPES.items():
        if dtype.name == name and dtype.type.__module__ == "ml_dtypes":
            return code
    return None


def dtype_text(dtype: np.dtype) -> str:
    """A type as it stands in an image: numpy's description, or the name of one of ml_dtypes."""
    if dtype.type.__module__ == "ml_dtypes":
        return _ML_PREFIX + dtype.name
    return repr(npy_format.dtype_to_descr(dtype))


def dtype_from(text: str) -> np.dtype:
    """The other way. ValueError for what is no type, TypeError where ml_dtypes is needed."""
    if text.startswith(_ML_PREFIX):
        try:
            import ml_dtypes
        except ImportError as error:
            raise TypeError(f'type {text} needs the package ml_dtypes: pip install "pyuffd[dtypes]"') from error
        found = getattr(ml_dtypes, text.removeprefix(_ML_PREFIX), None)
        if not isinstance(found, type):
            raise TypeError(f"type {text} needs a newer ml_dtypes")
        return np.dtype(found)
    try:
        dtype = npy_format.descr_to_dtype(ast.literal_eval(text))
    except Exception as error:     # a hostile text reaches the tokenizer, the parser and np.dtype
        raise ValueError(f"{text!r} describes no type") from error
    if dtype.hasobject:
        raise ValueError(f"{text!r} holds Python objects")
    return dtype


# ---- the table of arrays ------------------------------------------------------------------------------------------


def table_of(layout: Layout) -> str:
    """The arrays as text: the metadata of every file of an image has it."""
    rows = [[e.name, dtype_text(e.dtype), list(e.shape), e.order, e.offset] for e in layout.entries]
    return json.dumps({"align": layout.align, "arrays": rows}, separators=(",", ":"))


def layout_from(text: Any, path: str) -> Layout:
    """The other way; ValueError for what no writer of ours has written."""
    try:
        table = json.loads(text)
        align = table["align"]
        if align not in _ALIGNS:
            raise ValueError(f"arrays aligned to {align!r}")
        entries = tuple(_entry_from(row) for row in table["arrays"])
    except TypeError as error:
        if "ml_dtypes" in str(error):
            raise TypeError(f"{path}: {error}") from error
        raise ValueError(f"{path}: damaged: the table of arrays: {error}") from error
    except (ValueError, LookupError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path}: damaged: the table of arrays: {error}") from error
    offset = 0
    for entry in entries:
        if entry.offset != offset:
            raise ValueError(f"{path}: damaged: array {entry.name!r} at {entry.offset} instead of {offset}")
        offset += round_up(entry.nbytes, align)
    if offset > _NBYTES_MAX or len({entry.name for entry in entries}) != len(entries):
        raise ValueError(f"{path}: damaged: {len(entries)} arrays of {offset} bytes, or a name occurs twice")
    return Layout(entries, offset, align)


def _entry_from(row: Any) -> Entry:
    name, text, shape, order, offset = row
    _check_name(name)
    if (not isinstance(text, str) or order not in ("C", "F") or type(offset) is not int
            or not 0 <= offset <= _NBYTES_MAX):
        raise ValueError(f"array {name!r}: type {text!r}, order {order!r}, offset {offset!r}")
    if not _is_shape(shape):
        raise ValueError(f"array {name!r}: shape {shape!r}")
    dtype = dtype_from(text)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > _NBYTES_MAX:
        raise ValueError(f"array {name!r}: {nbytes} bytes")
    return Entry(name, dtype, tuple(shape), order, offset, nbytes)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
