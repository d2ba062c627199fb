"""Array files to open: tables of arrays, a safetensors writer that can also lie, exact comparison."""

import json
import time

import numpy as np

# One of each kind that numpy can store without pickling; sizes that do not divide a block are among them.
DTYPES = ("?", "i1", "u1", "<i2", ">i2", "<u4", "<i8", "<f2", "<f4", ">f8", "<c8", "<c16", "g", "<U5", "S3", "V7",
          "<M8[ns]", "<m8[s]", [("a", "<i2"), ("b", "<f8", (2,))])
SHAPES = ((), (1,), (0,), (3, 0, 2), (7,), (129, 65), (2, 3, 4, 5), (70001,))

# safetensors type codes that numpy has, and those for which ml_dtypes is needed
PLAIN_CODES = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4",
               "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8"}
ML_CODES = {"BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
            "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}


def some_array(dtype, shape, seed=0, order="C"):
    """An array whose bytes are all kinds of bits (NaN payloads among them), valid for its type."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        flat = rng.integers(0, 2, count).astype(dtype)
    elif dtype.kind == "U":
        flat = np.array([chr(97 + i % 26) * (i % 6) for i in range(count)], dtype)
    else:
        flat = np.frombuffer(rng.bytes(count * dtype.itemsize), dtype) if count else np.empty(0, dtype)
    return np.array(flat.reshape(shape), order=order, copy=True)


def assert_same_bits(found, expected):
    """Same type, shape and bits, in the same order in memory."""
    assert isinstance(found, np.ndarray) and type(found) is np.ndarray
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if expected.size:
        assert found.strides == expected.strides
    assert found.tobytes("A") == expected.tobytes("A")


def safetensors_header(arrays, metadata=None):
    """(header, data) of `arrays`, name to (code, array), in the order given."""
    header, data = {}, b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, (code, array) in arrays.items():
        raw = array.tobytes()
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def write_raw_safetensors(path, header, data, header_bytes=None):
    """Write any header (an object, or its bytes as they are) with any stated length."""
    text = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    path.write_bytes((len(text) if header_bytes is None else header_bytes).to_bytes(8, "little") + text + data)
    return path


def write_safetensors(path, arrays, metadata=None):
    return write_raw_safetensors(path, *safetensors_header(arrays, metadata))


def write_sharded(directory, shards, metadata=None):
    """Write each dict of `shards` to a file, and the index of them all; the path of the index."""
    weight_map = {}
    for number, arrays in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / name, arrays, {"format": "np"})
        weight_map |= dict.fromkeys(arrays, name)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": metadata or {}, "weight_map": weight_map}, indent=2))
    return index


def settled_bytes_filled(region, timeout_s=5.0):
    """bytes_filled of a region, once its block counters are in: a worker counts after it has let the toucher go."""
    deadline = time.monotonic() + timeout_s
    while region.stats().bytes_filled == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    return region.stats().bytes_filled
