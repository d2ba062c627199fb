"""The eager side of the comparison: a file read whole by numpy, by code of its own.

Nothing here uses uffd: what the lazy arrays are checked against must not share their mistakes.
"""

import json
from pathlib import Path

import numpy as np

SUFFIXES = (".safetensors", ".npy", ".b2nd")
PACKABLE_SUFFIXES = (".safetensors", ".npy")

# bfloat16 and the 8-bit floats have no numpy type of their own: as integers of that width their bits compare as well.
_NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8",
    "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
}
_HEADER_LIMIT_BYTES = 100_000_000


class DataError(Exception):
    """The file can't be used by the demo; the message says why and what can be done."""


def check(path: Path) -> None:
    """Raise DataError unless `path` is a readable file of a kind the demo knows."""
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path.name}: the demo takes {', '.join(SUFFIXES)}")
    room = _available_bytes()
    # Three copies of the largest kind exist at once: the eager one, the lazy one once all is read, a timed one.
    if room is not None and 3 * path.stat().st_size > room:
        raise DataError(f"{path.name} has {path.stat().st_size:,} bytes; comparing it with a copy loaded whole "
                        f"needs three times that, and {room:,} bytes of memory are available")


def load(path: Path) -> dict[str, np.ndarray]:
    """The file's arrays by name, read whole into memory; a tensor of a type unknown here comes as flat uint8."""
    try:
        if path.suffix == ".safetensors":
            return _views(np.fromfile(path, "u1"), path)
        if path.suffix == ".npy":
            return {path.stem: np.load(path, allow_pickle=False)}
        import blosc2
        return {path.stem: np.asarray(blosc2.open(str(path), mode="r")[...])}
    except (ValueError, EOFError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path.name} can't be read: {error}") from error


def mapped(path: Path) -> dict[str, np.ndarray] | None:
    """The same arrays over np.memmap, nothing read yet; None for a compressed file, which can't be mapped."""
    if path.suffix == ".safetensors":
        return _views(np.memmap(path, "u1", mode="r"), path)
    if path.suffix == ".npy":
        return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)}
    return None


def _views(raw: np.ndarray, path: Path) -> dict[str, np.ndarray]:
    """Arrays by name over the bytes of a .safetensors file: length of the header (u64), JSON header, tensors."""
    header_nbytes = int(raw[:8].view("<u8")[0]) if raw.size >= 8 else -1
    if not 0 < header_nbytes <= min(raw.size - 8, _HEADER_LIMIT_BYTES):
        raise DataError(f"{path.name} is not a .safetensors file: its header would have {header_nbytes:,} bytes")
    body_offset = 8 + header_nbytes
    views = {}
    for name, entry in json.loads(raw[8:body_offset].tobytes()).items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        tensor = raw[body_offset + start:body_offset + stop]
        if tensor.size != stop - start:
            raise DataError(f"{path.name}: tensor {name} ends past the end of the file")
        kind = _NUMPY_TYPES.get(entry["dtype"])
        views[name] = tensor if kind is None else tensor.view(kind).reshape(entry["shape"])
    return views


def flat_bytes(array: np.ndarray) -> np.ndarray:
    """A flat uint8 view of a contiguous array in the order it lies in memory; touches nothing."""
    flat = array.reshape(-1, order="F") if array.flags.f_contiguous and array.ndim > 1 else array.reshape(-1)
    return flat.view("u1") if flat.size else np.empty(0, "u1")


def _available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
