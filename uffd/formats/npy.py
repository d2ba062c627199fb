"""The .npy format: header to array."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from .serving import Serving
from .sources import Source

_HEADER_BYTES_MAX = 10_000  # of versions whose header we parse; numpy's own limit for the others


@dataclass(frozen=True, slots=True)
class Header:
    dtype: np.dtype
    shape: tuple[int, ...]
    order: str  # "C" or "F"
    data_offset: int
    nbytes: int

    @classmethod
    def made(cls, dtype: np.dtype, shape: tuple[int, ...], order: str = "C", data_offset: int = 0) -> Header:
        # math.prod, since a hostile shape overflows 64 bits
        return cls(dtype, shape, order, data_offset, math.prod(shape) * dtype.itemsize)


def open_array(source: Source, serving: Serving) -> np.ndarray:
    """The array of a .npy file, its region over the data section."""
    with source.open() as file:
        header = read_header(file, source.path)
        check_length(header, source.size_of(file), source.path)
    if header.nbytes == 0:
        return serving.empty(header.dtype, header.shape, header.order)
    region = serving.region(header.nbytes, source.provider(header.data_offset), source.path)
    return region.array(header.dtype, header.shape, order=header.order)


def read_header(file: BinaryIO, path: str) -> Header:
    """Read and check the header at the file's position; ValueError says what is wrong, TypeError if objects."""
    try:
        shape, fortran_order, dtype = _read_versioned(file)
    except OSError:
        raise
    except Exception as error:  # a hostile header reaches the tokenizer, the parser and np.dtype
        raise ValueError(f"{path}: not a valid .npy header: {error}") from error
    check_objects(dtype, path)
    if any(extent < 0 for extent in shape):
        raise ValueError(f"{path}: not a valid .npy header: negative extent in shape {shape}")
    return Header.made(dtype, shape, "F" if fortran_order else "C", file.tell())


def check_objects(dtype: np.dtype, path: str) -> None:
    if dtype.hasobject:
        raise TypeError(f"{path}: arrays of Python objects ({dtype}) cannot be served: their elements are pointers")


def check_length(header: Header, file_bytes: int, path: str) -> None:
    held = file_bytes - header.data_offset
    if held < header.nbytes:
        raise ValueError(
            f"{path}: truncated: shape {header.shape} of {header.dtype} takes {header.nbytes} bytes,"
            f" the file holds {held} after its header of {header.data_offset}"
        )


def _read_versioned(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy_format.read_magic(file)
    if version == (1, 0):
        return npy_format.read_array_header_1_0(file)
    if version == (2, 0):
        return npy_format.read_array_header_2_0(file)
    if version == (3, 0):
        return _read_array_header_3_0(file)
    raise ValueError(f"unknown format version {version}")


def _read_array_header_3_0(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """As version 2, but UTF-8; numpy writes it for field names outside Latin-1 and has no public reader for it."""
    header_bytes = int.from_bytes(_read_exactly(file, 4), "little")
    if header_bytes > _HEADER_BYTES_MAX:
        raise ValueError(f"header of {header_bytes} bytes, at most {_HEADER_BYTES_MAX} are taken")
    fields = ast.literal_eval(_read_exactly(file, header_bytes).decode("utf-8"))
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its dictionary must have the keys descr, fortran_order and shape")
    shape, fortran_order = fields["shape"], fields["fortran_order"]
    if not isinstance(shape, tuple) or not all(type(extent) is int for extent in shape):
        raise ValueError(f"shape {shape!r} is no tuple of integers")
    if not isinstance(fortran_order, bool):
        raise ValueError(f"fortran_order {fortran_order!r} is no boolean")
    return shape, fortran_order, npy_format.descr_to_dtype(fields["descr"])


def _read_exactly(file: BinaryIO, nbytes: int) -> bytes:
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise ValueError(f"expected {nbytes} bytes of header, got {len(data)}")
    return data
