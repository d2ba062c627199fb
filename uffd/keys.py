"""From ``array[key]`` to the blocks of memory that it touches, by arithmetic alone.

No function here reads or writes one byte of the array, so none can fault: they look at shape, strides, dtype and data
pointer. Index arrays and masks are the caller's own memory and are read.

How it stays exact and small. The bytes of ``array[key]`` are a Minkowski sum: the bytes of an item, plus a progression
``i * step`` for each axis, plus the offsets that the index arrays and masks choose. The sum is built term by term as a
sorted set of half-open byte intervals. Between two terms, intervals less than one block apart are joined: a hole
shorter than a block never contains a whole block, wherever the set is shifted to, so joining changes no answer, and no
set can outgrow the number of blocks that it spans. Large terms are taken in chunks, so neither ten million row numbers
nor a view of very many tiny runs costs more than some tens of megabytes beside the answer.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["block_runs", "byte_run", "span_runs"]

CHUNK_LEN = 1 << 20  # offsets or intervals made at once: 8 MiB for each array of them

# Starts and ends in bytes (or blocks), int64, both ascending.
Intervals = tuple[np.ndarray, np.ndarray]
# Steps in bytes, and how many.
Progression = tuple[int, int]

_INVALID_INDEX = (
    "only integers, slices (`:`), ellipsis (`...`), numpy.newaxis (`None`) and integer or boolean arrays are valid "
    "indices"
)
_INVALID_ARRAY = "arrays used as indices must be of integer (or boolean) type"


def block_runs(array: np.ndarray, key: Any, address: int, nbytes: int, block_bytes: int) -> np.ndarray:
    """The blocks that ``array[key]`` reads or writes: int64, shape (n, 2), rows ``[first_block, last_block)``.

    Rows ascend, are disjoint and do not adjoin. The blocks are exactly those touched. Padding inside an item counts
    (``tobytes`` and system calls read it), except that a list of field names takes the bytes of those fields alone.

    array: any ndarray whose chosen items lie in the region: any strides, 0-d, broadcast, empty, unaligned.
    key: whatever ``array[key]`` takes; ``...`` and None mean the whole array.
    address, nbytes, block_bytes: where the region starts, its size and its block size, in bytes.

    Touches no byte of the array, copies none of it, waits for nothing, may be called from any thread.
    Errors: what numpy raises for the key (IndexError, TypeError, ValueError, KeyError); ValueError where the chosen
    items reach out of the region; TypeError for an array that is no ndarray.
    """
    if not isinstance(array, np.ndarray):
        raise TypeError(f"an ndarray is needed, to know its memory, not {type(array).__name__}")
    view, free_axes, choices = _split(array.view(np.ndarray), key)
    reach = _item_intervals(view.dtype, key, block_bytes)
    if view.size == 0 or reach[0].size == 0 or any(0 in choice.shape for choice in choices):
        return _no_runs()
    origin = view.__array_interface__["data"][0] - address
    advances = [(view.strides[axis], view.shape[axis]) for axis in free_axes]
    origin += sum(step * (count - 1) for step, count in advances if step < 0)
    progressions = _merged_progressions(advances)
    while progressions and reach[0].size == 1 and progressions[0][0] - int(reach[1][0] - reach[0][0]) < block_bytes:
        step, count = progressions.pop(0)
        reach = reach[0], reach[1] + step * (count - 1)
    for offsets in _choice_offsets(choices):
        reach = _summed(reach, offsets, block_bytes)
    for progression in progressions:
        reach = _summed(reach, _progression_offsets(*progression), block_bytes)
    return _touched(reach[0] + origin, reach[1] + origin, nbytes, block_bytes)


def span_runs(view: np.ndarray, address: int, nbytes: int, block_bytes: int) -> np.ndarray:
    """The blocks of all items of `view`: as `block_runs` of the whole array, with its shapes, units and errors."""
    return block_runs(view, ..., address, nbytes, block_bytes)


def byte_run(where: Any, address: int, nbytes: int, block_bytes: int) -> np.ndarray:
    """The blocks of `where`, widened to whole blocks: int64, shape (n, 2), rows ``[first_block, last_block)``.

    where: None for the whole region, ``(start, stop)`` in bytes from its start, or an ndarray whose memory lies in it.

    Touches no byte of the region, waits for nothing, may be called from any thread.
    Errors: ValueError outside the region; TypeError for anything else.
    """
    if isinstance(where, np.ndarray):
        return span_runs(where, address, nbytes, block_bytes)
    if where is None:
        start, stop = 0, nbytes
    elif isinstance(where, (tuple, list)) and len(where) == 2:
        start, stop = operator.index(where[0]), operator.index(where[1])
    else:
        raise TypeError(f"where must be None, (start, stop) in bytes or an ndarray, not {type(where).__name__}")
    if not 0 <= start <= stop <= nbytes:
        raise ValueError(f"bytes [{start}, {stop}) are not a range of a region of {nbytes} bytes")
    if start == stop:
        return _no_runs()
    return np.array([[start // block_bytes, -(-stop // block_bytes)]], np.int64)


# What the key says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """One index array or mask of a key, with the axes that it picks from."""

    index: np.ndarray  # integers of any shape; or booleans, one axis of `index` for each axis picked from
    array_axis: int  # the first axis picked from
    lengths: tuple[int, ...]  # of the axes picked from; none for a 0-d boolean
    steps: tuple[int, ...]  # their strides in bytes
    shape: tuple[int, ...]  # what it contributes to the broadcast of all choices


def _split(array: np.ndarray, key: Any) -> tuple[np.ndarray, list[int], list[_Choice]]:
    """A view in which only index arrays and masks remain to be applied; the axes they leave alone; and they themselves.

    numpy makes the view, from the basic part of the key with an Ellipsis in it: that reads no item, not even of a 0-d
    result, and raises numpy's own errors.
    """
    if _names_fields(key):
        view = array[key][...]
        return view, list(range(view.ndim)), []
    parts = [_classified(part) for part in (key if isinstance(key, tuple) else (key,))]
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)
    basic: list[Any] = []
    for part in parts:
        basic.extend([slice(None)] * _width(part) if isinstance(part, np.ndarray) else [part])
    view = array[tuple(basic)]

    left_over = array.ndim - sum(part is not None and part is not Ellipsis for part in basic)
    free_axes: list[int] = []
    choices: list[_Choice] = []
    axis = array_axis = 0
    for part in parts:
        if isinstance(part, np.ndarray):
            made = used = _width(part)
            picked = slice(axis, axis + made)
            choices.append(_choice(part, view.shape[picked], view.strides[picked], array_axis))
        else:
            made = left_over if part is Ellipsis else int(not isinstance(part, int))
            used = left_over if part is Ellipsis else int(part is not None)
            free_axes.extend(range(axis, axis + made))
        axis += made
        array_axis += used
    _check_bounds(choices)
    return view, free_axes, choices


def _names_fields(key: Any) -> bool:
    """Whether numpy is to take the key as names of fields or to refuse it; it reads no item for either."""
    if isinstance(key, np.ndarray):
        return key.dtype.kind == "U"
    return isinstance(key, str) or (isinstance(key, list) and len(key) > 0 and isinstance(key[0], str))


def _classified(part: Any) -> Any:
    """None, Ellipsis, a slice, an int; or an ndarray: of integers with one axis or more, or of booleans."""
    if part is None or part is Ellipsis or isinstance(part, slice):
        return part
    given_array = isinstance(part, np.ndarray)
    if not given_array and not isinstance(part, (bool, np.bool_)):
        try:
            return operator.index(part)
        except TypeError:
            pass  # a sequence, or something that is an array by protocol
    index = np.asarray(part)
    if not given_array and index.size == 0 and index.ndim > 0:
        index = index.astype(np.intp)  # as in numpy, an empty list chooses nothing
    if index.dtype.kind not in "biu":
        raise IndexError(_INVALID_ARRAY if given_array else _INVALID_INDEX)
    if index.dtype.kind == "u" and index.itemsize == 8:
        index = index.astype(np.intp)  # wraps round as numpy's own conversion does
    return int(index) if index.ndim == 0 and index.dtype.kind != "b" else index


def _width(index: np.ndarray) -> int:
    """The number of axes that an index array or a mask picks from."""
    return index.ndim if index.dtype.kind == "b" else 1


def _choice(index: np.ndarray, lengths: tuple[int, ...], steps: tuple[int, ...], array_axis: int) -> _Choice:
    if index.dtype.kind != "b":
        return _Choice(index, array_axis, lengths, steps, index.shape)
    for offset, (length, mask_length) in enumerate(zip(lengths, index.shape, strict=True)):
        if mask_length not in (length, 0):  # numpy lets an axis of no length pass: it chooses nothing
            raise IndexError(
                f"boolean index did not match indexed array along axis {array_axis + offset}; size of axis is {length} "
                f"but size of corresponding boolean axis is {mask_length}"
            )
    return _Choice(index, array_axis, lengths, steps, (int(np.count_nonzero(index)),))


def _check_bounds(choices: list[_Choice]) -> None:
    shapes = [choice.shape for choice in choices]
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError:
        listed = " ".join(str(shape) for shape in shapes)
        raise IndexError(
            f"shape mismatch: indexing arrays could not be broadcast together with shapes {listed}"
        ) from None
    if 0 in shape:
        return  # numpy too looks at no index when they are broadcast to nothing
    for choice in choices:
        if choice.index.dtype.kind == "b":
            continue
        length = choice.lengths[0]
        for extreme in (int(choice.index.min()), int(choice.index.max())):
            if not -length <= extreme < length:
                raise IndexError(f"index {extreme} is out of bounds for axis {choice.array_axis} with size {length}")


# What the parts add: offsets in bytes, in chunks ------------------------------------------------------------------


def _item_intervals(dtype: np.dtype, key: Any, block_bytes: int) -> Intervals:
    spans = [(0, dtype.itemsize)]
    if dtype.fields is not None and _names_fields(key) and not isinstance(key, str):
        spans = [(field[1], field[1] + field[0].itemsize) for field in dtype.fields.values()]
    starts, ends = np.array([span for span in spans if span[0] < span[1]], np.int64).reshape(-1, 2).T
    return _joined(starts, ends, block_bytes)


def _merged_progressions(advances: list[tuple[int, int]]) -> list[Progression]:
    """The same sum of (step, count) progressions by fewer of them, steps positive and ascending.

    Contiguous axes, and the overlapping ones of a sliding window, become one.
    """
    merged: list[Progression] = []
    for step, count in sorted((abs(step), count) for step, count in advances if step != 0 and count > 1):
        if merged:
            inner_step, inner_count = merged[-1]
            ratio, rest = divmod(step, inner_step)
            if rest == 0 and ratio <= inner_count:
                merged[-1] = inner_step, ratio * (count - 1) + inner_count
                continue
        merged.append((step, count))
    return merged


def _progression_offsets(step: int, count: int) -> Iterator[np.ndarray]:
    for first in range(0, count, CHUNK_LEN):
        yield np.arange(first, min(first + CHUNK_LEN, count), dtype=np.int64) * step


def _choice_offsets(choices: list[_Choice]) -> Iterator[Iterator[np.ndarray]]:
    """One series of offsets for each set of choices that vary together; the sets are independent, as for np.ix_."""
    groups: list[tuple[set[int], list[_Choice]]] = []
    for choice in choices:
        varying = {i - len(choice.shape) for i, length in enumerate(choice.shape) if length > 1}
        together = [choice]
        apart = []
        for group in groups:
            if varying.isdisjoint(group[0]):
                apart.append(group)
            else:
                varying |= group[0]
                together += group[1]
        groups = [*apart, (varying, together)]
    for _, together in groups:
        if len(together) == 1 and together[0].index.dtype.kind == "b":
            yield _mask_offsets(together[0])
        else:
            yield _index_offsets(together)


def _mask_offsets(choice: _Choice) -> Iterator[np.ndarray]:
    mask = choice.index
    if mask.ndim == 0:
        yield np.zeros(1, np.int64)  # True: chooses no place, adds an axis of length one
        return
    rows = max(1, CHUNK_LEN * len(mask) // mask.size)
    for first in range(0, len(mask), rows):
        places = mask[first : first + rows].nonzero()
        if places[0].size:
            offsets = np.full(places[0].size, first * choice.steps[0], np.int64)
            for place, step in zip(places, choice.steps, strict=True):
                offsets += place * step
            yield offsets


def _index_offsets(choices: list[_Choice]) -> Iterator[np.ndarray]:
    indices: list[np.ndarray] = []
    for choice in choices:
        indices.extend(choice.index.nonzero() if choice.index.dtype.kind == "b" else [choice.index])
    lengths = [length for choice in choices for length in choice.lengths]
    steps = [step for choice in choices for step in choice.steps]
    chunks: Any = np.nditer(
        indices,
        flags=["external_loop", "buffered"],
        op_flags=[["readonly"]] * len(indices),
        op_dtypes=[np.dtype(np.int64)] * len(indices),
        casting="same_kind",
        buffersize=CHUNK_LEN,
    )
    for chunk in chunks:
        offsets: Any = 0
        for index, length, step in zip(chunk if len(indices) > 1 else [chunk], lengths, steps, strict=True):
            wrapped = np.where(index < 0, index + length, index) if index.min() < 0 else index
            offsets = offsets + wrapped * step
        yield offsets


# Sets of intervals ------------------------------------------------------------------------------------------------


def _summed(reach: Intervals, offsets: Iterable[np.ndarray], block_bytes: int) -> Intervals:
    """Every interval shifted by every offset. Takes len(reach) times the number of offsets, in pieces of CHUNK_LEN."""
    starts, ends = reach
    piece_len = max(1, CHUNK_LEN // starts.size)
    parts: list[Intervals] = []
    held = 0
    limit = CHUNK_LEN
    for chunk in offsets:
        for first in range(0, chunk.size, piece_len):
            shifts = chunk[first : first + piece_len, np.newaxis]
            parts.append(_joined((shifts + starts).ravel(), (shifts + ends).ravel(), block_bytes))
            held += parts[-1][0].size
            if held > limit:
                parts = [_concatenated(parts, block_bytes)]
                held = parts[0][0].size
                limit = max(CHUNK_LEN, 2 * held)  # so that joining again and again stays linear in all
    return _concatenated(parts, block_bytes)


def _concatenated(parts: list[Intervals], least_gap: int) -> Intervals:
    if len(parts) == 1:
        return parts[0]
    return _joined(np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), least_gap)


def _joined(starts: np.ndarray, ends: np.ndarray, least_gap: int) -> Intervals:
    """The union of non-empty intervals in any order, those closer than `least_gap` joined.

    Starts and ends may be sorted apart: the union has a hole before the (i + 1)-th start exactly where as many ends as
    starts lie before it, that is where the i-th end is not after it.
    """
    if starts.size < 2:
        return starts, ends
    starts, ends = _ascending(starts), _ascending(ends)
    holes = np.flatnonzero(starts[1:] - ends[:-1] >= least_gap)
    if holes.size == starts.size - 1:
        return starts, ends
    return starts[np.concatenate(([0], holes + 1))], ends[np.concatenate((holes, [-1]))]


def _ascending(values: np.ndarray) -> np.ndarray:
    return np.sort(values) if (values[1:] < values[:-1]).any() else values


def _touched(starts: np.ndarray, ends: np.ndarray, nbytes: int, block_bytes: int) -> np.ndarray:
    """The runs of blocks of ascending intervals, which count from the start of the region."""
    if starts[0] < 0 or ends[-1] > nbytes:
        raise ValueError(f"bytes [{starts[0]}, {ends[-1]}) of the array are not within a region of {nbytes} bytes")
    runs = _joined(starts // block_bytes, (ends - 1) // block_bytes + 1, 1)
    return np.stack(runs, axis=1)


def _no_runs() -> np.ndarray:
    return np.empty((0, 2), np.int64)
