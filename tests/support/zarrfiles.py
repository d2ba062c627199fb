"""Zarr arrays to serve, made by whichever zarr is installed, 2.18 or 3."""

import numpy as np

CODECS = ("none", "zlib", "zstd", "blosc", "filter")


def formats(zarr):
    """The format versions that it writes."""
    return (2,) if zarr.__version__.startswith("2.") else (2, 3)


def make(zarr, path, array, chunks, *, version=2, order="C", codec="none", shards=None, fill_value=0, name=None):
    """Write `array` (None: nothing, so that all of it is the fill value; then a tuple (shape, dtype))."""
    shape, dtype = (array.shape, array.dtype) if isinstance(array, np.ndarray) else array
    chunks = tuple(chunks)
    if zarr.__version__.startswith("2."):
        made = zarr.open_array(str(path), mode="w", shape=shape, dtype=dtype, chunks=chunks or True, order=order,
                               fill_value=fill_value, path=name, **old_codec(codec, np.dtype(dtype)))
    else:
        options = old_codec(codec, np.dtype(dtype)) if version == 2 else new_codec(zarr, codec, np.dtype(dtype))
        if order == "F" and version == 3:
            options["filters"] = [zarr.codecs.TransposeCodec(order=tuple(reversed(range(len(shape)))))]
        elif version == 2:
            options["order"] = order
        if "compressor" in options:
            options["compressors"] = options.pop("compressor")
        made = zarr.create_array(str(path), name=name, shape=shape, dtype=dtype, chunks=chunks, shards=shards,
                                 zarr_format=version, fill_value=fill_value, overwrite=True, **options)
    if isinstance(array, np.ndarray):
        made[...] = array
    return made


def old_codec(codec, dtype):
    import numcodecs

    compressor = {"none": None, "zlib": numcodecs.Zlib(1), "zstd": numcodecs.Zstd(1), "blosc": numcodecs.Blosc(),
                  "filter": numcodecs.Zlib(1)}[codec]
    filters = [numcodecs.Delta(dtype=dtype.str)] if codec == "filter" and dtype.kind in "iuf" else None
    return {"compressor": compressor, "filters": filters}


def new_codec(zarr, codec, dtype):
    del dtype
    codecs = zarr.codecs
    return {"compressors": {"none": (), "zlib": codecs.GzipCodec(level=1), "zstd": codecs.ZstdCodec(level=1),
                            "blosc": codecs.BloscCodec(), "filter": (codecs.ZstdCodec(level=1), codecs.Crc32cCodec())}[
                                codec]}
