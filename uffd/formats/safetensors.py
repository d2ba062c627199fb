"""The safetensors format: one file, or shards named by an index. The header is checked in full before use."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import recognise
from .serving import Serving
from .sources import LocalSource, Source
from .tensors import Tensor, TensorMap, bits_of

HEADER_BYTES_MAX = 100_000_000  # the format's own limit
_INDEX_SUFFIX = ".index.json"
_EXTENT_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Part:
    """One file with tensors: where its data section lies."""

    source: Source
    data_offset: int
    nbytes: int

    @property
    def path(self) -> str:
        return self.source.path


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What a model consists of; `Tensor.part` counts into `parts`."""

    path: str
    parts: tuple[Part, ...]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]


def open_tensors(source: Source, kind: str, serving: Serving) -> TensorMap:
    """The mapping of a file, an index or a directory; headers are read now, regions made when asked for."""
    catalogue = read_catalogue(source, kind)
    if len(catalogue.parts) == 1 and "uffd_snapshot" in catalogue.metadata:
        return _open_image(catalogue, serving)

    def make_region(number: int) -> Any:
        part = catalogue.parts[number]
        return serving.region(part.nbytes, part.source.provider(part.data_offset), part.path)

    return TensorMap(catalogue.path, catalogue.tensors, catalogue.metadata, serving, make_region)


def _open_image(catalogue: Catalogue, serving: Serving) -> TensorMap:
    from ..snapshot import _opening

    part = catalogue.parts[0]
    if isinstance(part.source, LocalSource):
        return _opening.open_local(part.path, serving)
    return _opening.open_parts(part.path, dict(catalogue.metadata), catalogue.tensors, part.nbytes, serving,
                               lambda: part.source.provider(part.data_offset))


def read_catalogue(source: Source, kind: str) -> Catalogue:
    """Read the headers of a .safetensors file, of all shards of an index, or of those in a local directory."""
    if kind == "directory":
        source = LocalSource(_model_in(source.path), isinstance(source, LocalSource) and source.writable)
        kind = recognise.kind_of(source)
    if kind == "index":
        return _read_sharded(source)
    if kind != "safetensors":
        raise ValueError(f"{source.path}: not a safetensors file or index")
    return _read_single(source)


def parse_header(text: bytes, path: str, data_bytes: int, *, gaps: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a JSON header for a data section of `data_bytes`.

    Raises ValueError unless every entry is well formed and the tensors cover the section without overlap, and
    without a gap unless `gaps`.
    """
    header = _load_json(text, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    tensors = {name: _parse_tensor(name, entry, path) for name, entry in header.items()}
    _check_cover(tensors, path, data_bytes, gaps)
    return tensors, metadata


def _read_single(source: Source) -> Catalogue:
    part, tensors, metadata = _read_part(source)
    return Catalogue(source.path, (part,), tensors, metadata)


def _read_part(source: Source) -> tuple[Part, dict[str, Tensor], dict]:
    path = source.path
    with source.open() as file:
        file_bytes = source.size_of(file)
        if file_bytes < 8:
            raise ValueError(f"{path}: truncated: {file_bytes} bytes, a safetensors file begins with a length of 8")
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > HEADER_BYTES_MAX:
            raise ValueError(f"{path}: header of {header_bytes} bytes, the format's limit is {HEADER_BYTES_MAX}")
        if header_bytes > file_bytes - 8:
            raise ValueError(f"{path}: truncated: header of {header_bytes} bytes in a file of {file_bytes}")
        text = file.read(header_bytes)
    if not text.startswith(b"{"):
        raise ValueError(f"{path}: the header must begin with '{{', not with {text[:8]!r}")
    data_bytes = file_bytes - 8 - header_bytes
    tensors, metadata = parse_header(text, path, data_bytes)
    return Part(source, 8 + header_bytes, data_bytes), tensors, metadata


def _read_sharded(source: Source) -> Catalogue:
    path = source.path
    with source.open() as file:
        file_bytes = source.size_of(file)
        if file_bytes > HEADER_BYTES_MAX:
            raise ValueError(f"{path}: index of {file_bytes} bytes, at most {HEADER_BYTES_MAX} are taken")
        index = _load_json(file.read(), path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise ValueError(f"{path}: not a safetensors index: weight_map and metadata must be JSON objects")
    numbers: dict[str, int] = {}
    parts: list[Part] = []
    shards: list[dict[str, Tensor]] = []
    tensors: dict[str, Tensor] = {}
    for name, file_name in weight_map.items():
        _check_shard_name(path, file_name)
        if file_name not in numbers:
            part, shard, _ = _read_part(source.beside(file_name))
            numbers[file_name] = len(parts)
            parts.append(part)
            shards.append(shard)
        number = numbers[file_name]
        if name not in shards[number]:
            raise ValueError(f"{path}: tensor {name!r} is not in {file_name!r}, where weight_map has it")
        tensors[name] = replace(shards[number][name], part=number)
    return Catalogue(path, tuple(parts), tensors, metadata)


def _check_shard_name(index_path: str, file_name: Any) -> None:
    # An index may come from anywhere; its shards lie beside it and nowhere else.
    if not isinstance(file_name, str) or file_name in ("", ".", "..") or os.path.basename(file_name) != file_name:
        raise ValueError(f"{index_path}: weight_map names {file_name!r}, which is no file beside the index")


def _model_in(directory: str) -> str:
    """The one index in a directory, or else the one .safetensors file."""
    names = sorted(os.listdir(directory))
    found = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    found = found or [name for name in names if name.endswith(".safetensors")]
    if len(found) != 1:
        listed = ", ".join(found[:8]) if found else "none"
        raise ValueError(f"{directory}: needs one *{_INDEX_SUFFIX}, or else one *.safetensors; found: {listed}")
    return os.path.join(directory, found[0])


def _load_json(text: bytes, path: str) -> dict[str, Any]:
    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice in one object")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON of UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: the JSON must be an object, not {type(value).__name__}")
    return value


def _parse_tensor(name: str, entry: Any, path: str) -> Tensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: tensor {name!r} must have exactly the keys dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str):
        raise ValueError(f"{path}: tensor {name!r}: dtype {code!r} is no string")
    if not _are_extents(shape):
        raise ValueError(f"{path}: tensor {name!r}: shape must be a list of integers from 0 to 2**63 - 1")
    if not _are_extents(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{path}: tensor {name!r}: data_offsets must be two integers, 0 <= begin <= end")
    nbytes = offsets[1] - offsets[0]
    bits = bits_of(code)
    if bits is not None and math.prod(shape) * bits != nbytes * 8:
        raise ValueError(
            f"{path}: tensor {name!r}: shape {shape} of {code} takes {math.prod(shape) * bits / 8:.0f} bytes,"
            f" its data_offsets span {nbytes}"
        )
    return Tensor(code, tuple(shape), offsets[0], nbytes)


def _are_extents(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _EXTENT_MAX for item in value)


def _check_cover(tensors: Mapping[str, Tensor], path: str, data_bytes: int, gaps: bool) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < end:
            raise ValueError(f"{path}: tensor {name!r} begins at byte {tensor.offset}, inside one that ends at {end}")
        if tensor.offset > end and not gaps:
            raise ValueError(f"{path}: {tensor.offset - end} bytes before tensor {name!r} belong to no tensor")
        end = tensor.offset + tensor.nbytes
    if end > data_bytes:
        raise ValueError(f"{path}: truncated: tensors take {end} bytes, the file holds {data_bytes} after its header")
    if end < data_bytes and not gaps:
        raise ValueError(f"{path}: {data_bytes - end} bytes after the last tensor belong to no tensor")
