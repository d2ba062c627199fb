"""Named tensors and the lazy, read-only mapping that serves them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .serving import Serving

# Type codes of the safetensors format: bits per element, the numpy name, or else the ml_dtypes name.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_NUMPY = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    code: str  # the safetensors name of its type
    shape: tuple[int, ...]
    offset: int  # in bytes, in the region of its part
    nbytes: int
    part: int = 0  # index of the file that holds it


def bits_of(code: str) -> int | None:
    """Bits per element, None for a type that is not known."""
    return _BITS.get(code)


def dtype_of(code: str, name: str) -> np.dtype:
    """The numpy dtype of a type code; TypeError, naming the tensor and the cure, where there is none."""
    if code in _NUMPY:
        return np.dtype(_NUMPY[code])
    if code not in _ML_DTYPES:
        why = "packs elements below the byte" if code in _BITS else "is not known"
        raise TypeError(f"tensor {name!r}: type {code} {why}; numpy has no dtype for it")
    try:
        import ml_dtypes
    except ImportError as error:
        raise TypeError(
            f'tensor {name!r}: type {code} needs the package ml_dtypes: pip install "pyuffd[dtypes]"'
        ) from error
    scalar = getattr(ml_dtypes, _ML_DTYPES[code], None)
    if scalar is None:
        raise TypeError(
            f"tensor {name!r}: type {code} needs a newer ml_dtypes than {ml_dtypes.__version__}:"
            f" it lacks {_ML_DTYPES[code]}"
        )
    return np.dtype(scalar)


class TensorMap(Mapping[str, np.ndarray]):
    """Read-only mapping of tensor name to ndarray; the region of a part is made when a tensor of it is asked for.

    Each access gives a new array over the same memory. `metadata` is the file's own. Safe to use from any thread.
    """

    def __init__(
        self,
        path: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        serving: Serving,
        make_region: Callable[[int], Any],
    ) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self._tensors = dict(tensors)
        self._serving = serving
        self._make_region = make_region
        self._regions: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        dtype = dtype_of(tensor.code, name)
        if tensor.nbytes == 0:
            return self._serving.empty(dtype, tensor.shape)
        return self._region(tensor.part).array(dtype, tensor.shape, offset=tensor.offset)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # Mapping's own would open the region to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        shown = [f"{name!r}: {t.code}{list(t.shape)}" for name, t in list(self._tensors.items())[:8]]
        if len(self) > len(shown):
            shown.append(f"... {len(self) - len(shown)} more")
        return f"<tensors of {self.path!r}: {{{', '.join(shown)}}}>"

    def _region(self, part: int) -> Any:
        with self._lock:
            region = self._regions.get(part)
            if region is None:
                region = self._regions[part] = self._make_region(part)
            return region
