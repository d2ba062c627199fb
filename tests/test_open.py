"""uffd.open: every format against the eager load of the same file, bit for bit; what is damaged is refused by name."""

import importlib.util
import json
import os
import sys
import threading
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.arrayfiles import (
    DTYPES,
    ML_CODES,
    PLAIN_CODES,
    SHAPES,
    assert_same_bits,
    settled_bytes_filled,
    some_array,
    write_raw_safetensors,
    write_safetensors,
    write_sharded,
)

import uffd

HAVE_ML_DTYPES = importlib.util.find_spec("ml_dtypes") is not None
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BLOCK_BYTES = 1 << 16


@pytest.fixture(scope="module", autouse=True)
def warm_files(tmp_path_factory):
    """What is loaded once per process, numpy's random numbers among it, is there before anything is counted."""
    path = tmp_path_factory.mktemp("warm") / "a.npy"
    np.save(path, some_array("<f8", (1 << 18,)))
    assert_same_bits(uffd.open(path), np.load(path))


def pair(path):
    """Two tensors, the second at a block of its own."""
    arrays = {"a": ("F32", some_array("<f4", (1000, 40))), "b": ("I64", some_array("<i8", (3, 5), 1))}
    return write_safetensors(path, arrays, {"format": "np"}), arrays


# ---- .npy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_npy_equals_np_load(tmp_path, dtype):
    for number, shape in enumerate(SHAPES):
        for order in "CF":
            path = tmp_path / f"{number}{order}.npy"
            np.save(path, some_array(dtype, shape, order=order))
            assert_same_bits(uffd.open(path), np.load(path))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_of_each_version(tmp_path, version):
    path, array = tmp_path / "a.npy", some_array("<f8", (50, 3), order="F")
    with open(path, "wb") as file:
        np.lib.format.write_array(file, array, version=version)
    assert_same_bits(uffd.open(path), array)


def test_npy_with_field_names_outside_latin_1(tmp_path):
    path, array = tmp_path / "a.npy", some_array([("größe", "<f4"), ("長さ", "<i2")], (300,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # numpy warns of readers older than version 3
        np.save(path, array)
    assert path.read_bytes()[6:8] == b"\x03\x00"
    assert_same_bits(uffd.open(path), array)


def test_npy_of_objects_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}, None], dtype=object), allow_pickle=True)
    with pytest.raises(TypeError, match="Python objects"):
        uffd.open(path)


def test_truncated_npy_names_the_sizes(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(1000.0))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"truncated.*8000 bytes.*holds 7999"):
        uffd.open(path)
    for length in (7, 8, 9, 10, 40, len(whole) - 8000 - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.npy"):
            uffd.open(path)


@FUZZ
@given(st.integers(6, 127), st.binary(min_size=1, max_size=12))
def test_npy_with_a_damaged_header(tmp_path, at, noise):
    """What opens must be what np.load reads; everything else is a ValueError or, for objects, a TypeError."""
    path = tmp_path / "a.npy"
    np.save(path, np.arange(40, dtype="<f4").reshape(8, 5))
    whole = bytearray(path.read_bytes())
    whole[at : at + len(noise)] = noise
    path.write_bytes(whole)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = uffd.open(path)
    except (ValueError, TypeError):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_bits(found, np.load(path))


@pytest.mark.parametrize("shape", ["(-4, -2)", "(-8,)", "(2**70,)", "(1.5,)", "[8]", "8"])
@pytest.mark.parametrize("version", [1, 3])
def test_npy_with_an_impossible_shape(tmp_path, shape, version):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".replace("2**70", str(2**70)).encode()
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + header + bytes(32))
    with pytest.raises(ValueError, match=r"a\.npy"):
        uffd.open(path)


# ---- modes, options, recognition


def test_mode_c_is_private(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100_000))
    before = path.read_bytes()
    array = uffd.open(path)
    assert uffd.region_of(array).mode == "c"
    array[::1000] = -1
    array += 1
    assert path.read_bytes() == before
    assert uffd.open(path)[1000] == 1000


@pytest.mark.parametrize("shape", [(1000,), (0, 4)])
def test_mode_r_is_not_writeable(tmp_path, shape):
    np.save(tmp_path / "a.npy", some_array("<f4", shape))
    array = uffd.open(tmp_path / "a.npy", mode="r")
    assert not array.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 1


@pytest.mark.parametrize("mode, match", [("w", "not one of"), (None, "not one of")])
def test_other_modes_are_refused(tmp_path, mode, match):
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(ValueError, match=match):
        uffd.open(tmp_path / "a.npy", mode=mode)


@pytest.mark.parametrize("order", ["C", "F"])
def test_mode_rplus_writes_a_npy(tmp_path, order):
    """Goal: what was written is in the file after a flush and after the array's region was left, where np.load finds
    it; header and size stay, and so do bytes behind the array."""
    path = tmp_path / "a.npy"
    expected = np.array(some_array("<i4", (300, 500)), order=order)
    np.save(path, expected)
    with open(path, "ab") as file:
        file.write(b"behind")
    file_bytes = path.stat().st_size
    array = uffd.open(path, mode="r+")
    with uffd.region_of(array) as region:
        assert region.mode == "r+"
        array[7:9] = expected[7:9] = -1
        array[-1, -1] = expected[-1, -1] = 5
        region.flush()
        assert_same_bits(np.load(path), expected)
        array[100] = expected[100] = 17
        del array
    assert_same_bits(np.load(path), expected)
    assert path.stat().st_size == file_bytes
    assert path.read_bytes().endswith(b"behind")


@pytest.mark.parametrize("kind", ["file", "sharded", "directory"])
def test_mode_rplus_writes_safetensors(tmp_path, kind):
    """Goal: each tensor reaches its own shard, others and the headers stay. Method: read back by a fresh open."""
    arrays = {"a": ("F32", some_array("<f4", (1000, 40))), "b": ("I64", some_array("<i8", (3, 5), 1))}
    if kind == "file":
        path = write_safetensors(tmp_path / "m.safetensors", arrays)
    else:
        path = write_sharded(tmp_path, [{name: entry} for name, entry in arrays.items()])
        path = tmp_path if kind == "directory" else path
    files = sorted(tmp_path.glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    tensors = uffd.open(path, mode="r+")
    b = tensors["b"]
    b[1] = 99
    uffd.region_of(b).flush()
    again = uffd.open(path, mode="r")
    assert (again["b"][1] == 99).all()
    assert_same_bits(again["b"][::2], arrays["b"][1][::2])
    assert_same_bits(again["a"], arrays["a"][1])
    assert [file.stat().st_size for file in files] == sizes


def test_mode_rplus_of_an_empty_array(tmp_path):
    np.save(tmp_path / "a.npy", np.empty((0, 3)))
    assert uffd.open(tmp_path / "a.npy", mode="r+").flags.writeable


def test_mode_rplus_is_refused_for_all_else(tmp_path, blosc2):
    """Goal: a ValueError that says what the thing is, before anything is made."""
    np.save(tmp_path / "a.npy", some_array("<f8", (1000,)))
    uffd.pack(tmp_path / "a.npy", tmp_path / "a.b2frame")
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "zarr.json").write_text("{}")
    for thing, what in (("a.b2frame", "a Blosc2 frame"), ("z", "a zarr store")):
        with pytest.raises(ValueError, match=f"this is {what}: use 'c'"):
            uffd.open(tmp_path / thing, mode="r+")
    with pytest.raises(ValueError, match="this is a URL: use 'c'"):
        uffd.open("https://127.0.0.1:1/a.npy", mode="r+")


def test_mode_rplus_of_a_file_that_may_not_be_written(tmp_path):
    np.save(tmp_path / "a.npy", some_array("<f8", (1000,)))
    (tmp_path / "a.npy").chmod(0o400)
    if os.access(tmp_path / "a.npy", os.W_OK):
        pytest.skip("root may write to any file")
    with pytest.raises(PermissionError):
        uffd.open(tmp_path / "a.npy", mode="r+")


def test_options_reach_the_region(tmp_path, engine):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100_000))
    region = uffd.region_of(uffd.open(path))
    assert (region.name, region.nbytes) == (str(path), 800_000)
    array = uffd.open(path, engine=engine, name="mine", block_bytes=1 << 18)
    region = uffd.region_of(array)
    assert (region.name, region.block_bytes, region.engine) == ("mine", 1 << 18, engine)
    assert array[99_999] == 99_999
    for clash in ({"nbytes": 3}, {"provider": None}, {"no_such_option": 1}):
        with pytest.raises(TypeError):
            uffd.open(path, **clash)
    del array, region


def test_only_what_is_touched_is_filled(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(1 << 21))
    array = uffd.open(path, readahead_bytes=0)
    region = uffd.region_of(array)
    assert region.stats().bytes_filled == 0
    assert array[1 << 20] == 1 << 20
    assert settled_bytes_filled(region) == BLOCK_BYTES


def test_content_decides_not_the_suffix(tmp_path):
    path, arrays = pair(tmp_path / "weights.bin")
    assert set(uffd.open(path)) == set(arrays)
    os.symlink(path, tmp_path / "link.npy")
    assert set(uffd.open(tmp_path / "link.npy")) == set(arrays)
    np.save(tmp_path / "a.npy", np.arange(9))
    os.rename(tmp_path / "a.npy", tmp_path / "a.safetensors")
    assert uffd.open(str(tmp_path / "a.safetensors")).sum() == 36


@pytest.mark.parametrize("content, match", [(b"", "0 bytes"), (b"\x93NUM", "4 bytes"), (b"hello, world", "not a .npy")])
def test_unknown_content_is_refused(tmp_path, content, match):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        uffd.open(tmp_path / "a.npy")


def test_what_cannot_be_opened_here(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", b"x")
    with pytest.raises(ValueError, match="zip"):
        uffd.open(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError):
        uffd.open(tmp_path / "missing.npy")
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(ValueError, match="storage_options"):
        uffd.open(tmp_path / "a.npy", storage_options={"anon": True})
    with pytest.raises(ValueError, match="of this process"):
        uffd.open("memory://a.npy")


def test_a_file_url_is_a_local_path(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    assert_same_bits(uffd.open(f"file://{tmp_path}/a.npy"), np.arange(3))


# ---- .safetensors


def test_safetensors_of_every_plain_type(tmp_path):
    shapes = ((), (3,), (0, 2), (200, 130), (2, 3, 4))
    arrays = {f"{code} {shape} ü/ключ": (code, some_array(dtype, shape, number))
              for number, shape in enumerate(shapes) for code, dtype in PLAIN_CODES.items()}
    path = write_safetensors(tmp_path / "m.safetensors", arrays, {"note": "größer"})
    opened = uffd.open(path)
    assert list(opened) == list(arrays) and len(opened) == len(arrays)
    assert opened.metadata == {"note": "größer"}
    for name, (_, array) in arrays.items():
        assert_same_bits(opened[name], array)


def test_safetensors_equals_its_own_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is the oracle")
    path = tmp_path / "m.safetensors"
    arrays = {f"{dtype}{shape}": some_array(dtype, shape, 3)
              for dtype in PLAIN_CODES.values() if dtype != "<c8" for shape in ((), (0,), (5, 7), (301, 11))}
    library.save_file(arrays, path, {"format": "np"})
    opened, expected = uffd.open(path), library.load_file(path)
    assert set(opened) == set(expected)
    for name, array in expected.items():
        assert_same_bits(opened[name], array)


def test_tensors_of_a_file_share_one_region(tmp_path):
    path, _ = pair(tmp_path / "m.safetensors")
    opened = uffd.open(path, mode="r")
    a, b = opened["a"], opened["b"]
    assert uffd.region_of(a) is uffd.region_of(b)
    assert uffd.region_of(a).name == str(path)
    assert not a.flags.writeable and not b.flags.writeable


def test_writes_to_a_tensor_are_seen_in_its_next_view_only(tmp_path):
    path, arrays = pair(tmp_path / "m.safetensors")
    opened, other = uffd.open(path), uffd.open(path)
    opened["a"][...] = 7
    assert (opened["a"] == 7).all()
    assert_same_bits(opened["b"], arrays["b"][1])
    assert_same_bits(other["a"], arrays["a"][1])


def test_arrays_outlive_their_mapping(tmp_path):
    path, arrays = pair(tmp_path / "m.safetensors")
    array = uffd.open(path)["a"]
    assert_same_bits(array, arrays["a"][1])


def test_the_mapping_is_lazy_and_read_only(tmp_path):
    path, _ = pair(tmp_path / "m.safetensors")
    opened = uffd.open(path)
    path.unlink()  # so that any attempt to make the region fails
    assert "a" in opened and "no such" not in opened and len(opened) == 2
    assert "a': F32[1000, 40]" in repr(opened)
    with pytest.raises(FileNotFoundError):
        opened["a"]
    with pytest.raises(KeyError):
        opened["no such"]
    with pytest.raises(TypeError):
        opened["a"] = 1


def test_many_threads_ask_for_the_first_tensor(tmp_path):
    path, arrays = pair(tmp_path / "m.safetensors")
    opened, found, barrier = uffd.open(path), [], threading.Barrier(8)

    def ask():
        barrier.wait(10)
        found.append(opened["a"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len({id(uffd.region_of(array)) for array in found}) == 1 and len(found) == 8
    for array in found:
        assert_same_bits(array, arrays["a"][1])


def test_unaligned_tensors_are_right(tmp_path):
    arrays = {"one": ("U8", some_array("u1", (1,))), "f4": ("F32", some_array("<f4", (300, 90))),
              "three": ("U8", some_array("u1", (3,))), "f8": ("F64", np.arange(6.0).reshape(2, 3))}
    opened = uffd.open(write_safetensors(tmp_path / "m.safetensors", arrays))
    assert not opened["f4"].flags.aligned
    for name, (_, array) in arrays.items():
        assert_same_bits(opened[name], array)
    assert (opened["f8"] @ np.ones(3)).tolist() == [3.0, 12.0]


@pytest.mark.skipif(not HAVE_ML_DTYPES, reason="ml_dtypes is not installed")
def test_types_of_ml_dtypes(tmp_path):
    import ml_dtypes

    arrays = {code: (code, some_array("u1", (31, 64), 5).view(getattr(ml_dtypes, name)))
              for code, name in ML_CODES.items() if hasattr(ml_dtypes, name)}
    opened = uffd.open(write_safetensors(tmp_path / "m.safetensors", arrays))
    for code, (_, array) in arrays.items():
        assert_same_bits(opened[code], array)
    ones = np.ones((4,), ml_dtypes.bfloat16)
    opened = uffd.open(write_safetensors(tmp_path / "ones.safetensors", {"ones": ("BF16", ones)}))
    assert opened["ones"].astype("f4").sum() == 4


def test_without_ml_dtypes_only_its_own_keys_fail(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    arrays = {code: (code, some_array("<u2" if code == "BF16" else "u1", (4,))) for code in ML_CODES}
    arrays["f"] = ("F32", some_array("<f4", (4,)))
    opened = uffd.open(write_safetensors(tmp_path / "m.safetensors", arrays))
    assert len(opened) == len(arrays)
    for code in ML_CODES:
        with pytest.raises(TypeError, match=rf"'{code}'.*ml_dtypes.*pip install"):
            opened[code]
    assert_same_bits(opened["f"], arrays["f"][1])


def test_types_that_have_no_dtype(tmp_path):
    header = {"f4": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]},
              "new": {"dtype": "Q5_K", "shape": [9], "data_offsets": [3, 8]},
              "u": {"dtype": "U8", "shape": [2], "data_offsets": [8, 10]}}
    opened = uffd.open(write_raw_safetensors(tmp_path / "m.safetensors", header, bytes(range(10))))
    for name in ("f4", "new"):
        with pytest.raises(TypeError, match=name):
            opened[name]
    assert opened["u"].tolist() == [8, 9]


def entry(dtype="U8", shape=(4,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BAD_HEADERS = {
    "not an object": (b"{]", "JSON"),
    "not UTF-8": (b'{"\xff": 1}', "UTF-8"),
    "a name twice": (b'{"a": {}, "a": {}}', "twice"),
    "nested without end": (b'{"a":' + b"[" * 100_000, "JSON"),
    "metadata not of strings": ({"__metadata__": {"a": 1}, "a": entry()}, "__metadata__"),
    "metadata a list": ({"__metadata__": [], "a": entry()}, "__metadata__"),
    "entry a number": ({"a": 1}, "exactly the keys"),
    "a key missing": ({"a": {"dtype": "U8", "shape": [4]}}, "exactly the keys"),
    "dtype a number": ({"a": entry(dtype=3)}, "no string"),
    "shape negative": ({"a": entry(shape=(-2, -2))}, "shape"),
    "shape of floats": ({"a": entry(shape=(4.0,))}, "shape"),
    "shape of booleans": ({"a": entry(shape=(True, 4))}, "shape"),
    "shape beyond 64 bits": ({"a": entry(shape=(2**64,))}, "shape"),
    "product beyond 64 bits": ({"a": entry(shape=(2**62, 2**62, 4))}, "takes"),
    "offsets reversed": ({"a": entry(begin=4, end=0)}, "begin <= end"),
    "offsets negative": ({"a": entry(begin=-4, end=0)}, "begin <= end"),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 2, 4]}}, "two integers"),
    "size of another shape": ({"a": entry(shape=(3,))}, "takes 3 bytes"),
    "overlap": ({"a": entry(), "b": entry(begin=2, end=6)}, "inside"),
    "doubled": ({"a": entry(), "b": entry()}, "inside"),
    "a hole": ({"a": entry(shape=(1,), end=1), "b": entry(shape=(2,), begin=2, end=4)}, "belong to no tensor"),
    "a tail": ({"a": entry(shape=(2,), end=2)}, "after the last tensor"),
    "past the end": ({"a": entry(), "b": entry(begin=4, end=8)}, "take 8 bytes, the file holds 4"),
    "far past the end": ({"a": entry(shape=(2**62,), end=2**62)}, "truncated"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_safetensors_with_a_bad_header(tmp_path, case):
    header, match = BAD_HEADERS[case]
    path = write_raw_safetensors(tmp_path / "m.safetensors", header, bytes(4))
    with pytest.raises(ValueError, match=match) as caught:
        uffd.open(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("header_bytes, match", [(2**64 - 1, "limit"), (100_000_001, "limit"), (10**6, "truncated"),
                                                 (0, "begin with"), (30, "JSON")])
def test_safetensors_with_a_bad_length(tmp_path, header_bytes, match):
    path = write_raw_safetensors(tmp_path / "m.safetensors", {"a": entry()}, bytes(4), header_bytes)
    with pytest.raises(ValueError, match=match):
        uffd.open(path)


def test_safetensors_truncated_anywhere(tmp_path):
    path, _ = pair(tmp_path / "m.safetensors")
    whole = path.read_bytes()
    for length in (0, 3, 7, 8, 9, 50, 150, len(whole) - 160_000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"m\.safetensors.*(truncated|bytes)"):
            uffd.open(path)


def agrees_with_the_library(path):
    """If uffd takes the file, so does the safetensors library, with the same bits; else it was a ValueError."""
    try:
        opened = uffd.open(path)
    except ValueError:
        return
    safetensors = pytest.importorskip("safetensors", reason="safetensors is the oracle")
    try:
        expected = dict(safetensors.deserialize(path.read_bytes()))
    except safetensors.SafetensorError as error:
        assert "unknown variant" in str(error)  # a type it does not know fails the whole file there, one key here
        return
    assert set(opened) == set(expected)
    for name, tensor in expected.items():
        try:
            array = opened[name]
        except TypeError:
            continue
        assert list(array.shape) == list(tensor["shape"]) and array.tobytes() == bytes(tensor["data"])


@FUZZ
@given(st.data())
def test_safetensors_damaged_at_random(tmp_path, data):
    whole = bytearray(pair(tmp_path / "m.safetensors")[0].read_bytes())
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_end - 1))
        whole[at] = data.draw(st.sampled_from(b'0123456789-,"[]{}:FIUB\x00\xff '))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(whole[: data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))])
    agrees_with_the_library(path)


EXTENT = st.one_of(st.integers(-2, 12), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 2**70]))


@FUZZ
@given(st.dictionaries(st.text(max_size=6), st.fixed_dictionaries({
    "dtype": st.sampled_from(["U8", "F32", "BF16", "F4", "X"]),
    "shape": st.lists(EXTENT, max_size=3),
    "data_offsets": st.lists(EXTENT, min_size=2, max_size=2),
}), max_size=3))
def test_safetensors_with_invented_headers(tmp_path, header):
    text = json.dumps(header).encode()
    agrees_with_the_library(write_raw_safetensors(tmp_path / "m.safetensors", text, bytes(range(12))))


@FUZZ
@given(st.lists(st.tuples(st.text(max_size=8), st.sampled_from(sorted(PLAIN_CODES)),
                          st.lists(st.integers(0, 6), max_size=3)), max_size=6, unique_by=lambda item: item[0]))
def test_safetensors_of_any_names_and_shapes(tmp_path, entries):
    arrays = {name: (code, some_array(PLAIN_CODES[code], shape, number))
              for number, (name, code, shape) in enumerate(entries) if name != "__metadata__"}
    opened = uffd.open(write_safetensors(tmp_path / "m.safetensors", arrays))
    assert set(opened) == set(arrays)
    for name, (_, array) in arrays.items():
        assert_same_bits(opened[name], array)


# ---- shards


def shards():
    return [{"a": ("F32", some_array("<f4", (100, 30))), "b": ("I8", some_array("i1", (5,), 1))},
            {"c": ("F64", some_array("<f8", (2, 2), 2))}]


def test_shards_by_index_and_by_directory(tmp_path):
    index = write_sharded(tmp_path, shards(), {"total_size": 12037})
    for path in (index, str(tmp_path)):
        opened = uffd.open(path)
        assert sorted(opened) == ["a", "b", "c"]
        assert opened.metadata == {"total_size": 12037}
        for arrays in shards():
            for name, (_, array) in arrays.items():
                assert_same_bits(opened[name], array)
        assert uffd.region_of(opened["a"]) is uffd.region_of(opened["b"])
        assert uffd.region_of(opened["a"]) is not uffd.region_of(opened["c"])
        assert uffd.region_of(opened["c"]).name.endswith("00002-of-00002.safetensors")


def test_a_directory_with_one_file_or_too_many(tmp_path):
    with pytest.raises(ValueError, match="none"):
        uffd.open(tmp_path)
    _, arrays = pair(tmp_path / "m.safetensors")
    assert set(uffd.open(tmp_path)) == set(arrays)
    pair(tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors, n\.safetensors"):
        uffd.open(tmp_path)


@pytest.mark.parametrize("change, error, match", [
    ({"weight_map": {"a": "gone.safetensors"}}, FileNotFoundError, "gone"),
    ({"weight_map": {"a": "../m.safetensors"}}, ValueError, "beside the index"),
    ({"weight_map": {"a": "/etc/passwd"}}, ValueError, "beside the index"),
    ({"weight_map": {"a": ".."}}, ValueError, "beside the index"),
    ({"weight_map": {"a": 3}}, ValueError, "beside the index"),
    ({"weight_map": {"a": ["x"]}}, ValueError, "beside the index"),
    ({"weight_map": []}, ValueError, "weight_map"),
    ({"metadata": 3}, ValueError, "metadata"),
])
def test_an_index_that_lies(tmp_path, change, error, match):
    index = write_sharded(tmp_path, shards())
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(error, match=match):
        uffd.open(index)


def test_an_index_that_misplaces_a_tensor(tmp_path):
    index = write_sharded(tmp_path, shards())
    text = json.loads(index.read_text())
    text["weight_map"]["a"] = text["weight_map"]["c"]
    index.write_text(json.dumps(text))
    with pytest.raises(ValueError, match="'a' is not in"):
        uffd.open(index)


# ---- Blosc2 files that others wrote


GRIDS = {  # shape, chunks, blocks
    "one dimension": ((100_001,), (30_000,), (5_000,)),
    "whole rows": ((301, 64), (100, 64), (20, 64)),
    "grid with padding": ((123, 77), (50, 30), (20, 7)),
    "three dimensions": ((13, 21, 34), (5, 8, 13), (2, 3, 5)),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", ["<f4", "<i8", "u1"])
def test_b2nd_equals_eager(tmp_path, blosc2, grid, dtype):
    shape, chunks, blocks = GRIDS[grid]
    array, path = some_array(dtype, shape), str(tmp_path / "a.b2nd")
    blosc2.asarray(array, chunks=chunks, blocks=blocks, urlpath=path, mode="w")
    assert_same_bits(uffd.open(path), array)
    assert_same_bits(uffd.open(path, mode="r"), blosc2.open(path, mode="r")[:])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_b2nd_of_little(tmp_path, blosc2, shape):
    array, path = some_array("<f8", shape), str(tmp_path / "a.b2nd")
    blosc2.asarray(array, urlpath=path, mode="w")
    assert_same_bits(uffd.open(path), array)


def test_a_plain_frame_is_its_bytes(tmp_path, blosc2):
    path, data = str(tmp_path / "a.b2frame"), some_array("u1", (3_000_001,))
    blosc2.SChunk(chunksize=1 << 20, data=data, urlpath=path, contiguous=True, cparams={"typesize": 1})
    assert_same_bits(uffd.open(path), data)


def test_region_blocks_follow_the_frame(tmp_path, blosc2):
    path = str(tmp_path / "a.b2nd")
    blosc2.asarray(np.arange(1 << 18), chunks=(1 << 17,), blocks=(1 << 15,), urlpath=path, mode="w")
    assert uffd.region_of(uffd.open(path)).block_bytes == 1 << 18
    assert uffd.region_of(uffd.open(path, block_bytes=1 << 16)).block_bytes == 1 << 16


def test_truncated_frames_are_refused(tmp_path, blosc2):
    path = tmp_path / "a.b2nd"
    blosc2.asarray(some_array("<f4", (50_000,)), urlpath=str(path), mode="w")
    whole = path.read_bytes()
    for length in (10, 24, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            uffd.open(path)


@FUZZ
@given(st.sampled_from(["b2nd", "packed"]), st.data())
def test_damaged_frames(tmp_path, blosc2, kind, data):
    """Damage in the head or the trailer ends in a ValueError or an OSError of ours, or does not matter."""
    path = tmp_path / "a.b2nd"
    array = np.arange(5000, dtype="<f4")
    if kind == "packed":
        np.save(tmp_path / "a.npy", array)
        uffd.pack(tmp_path / "a.npy", path)
    else:
        blosc2.asarray(array, urlpath=str(path), mode="w")
    whole = bytearray(path.read_bytes())
    at = data.draw(st.one_of(st.integers(24, 86), st.integers(len(whole) - 200, len(whole) - 1)))
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    try:
        uffd.open(path)
    except (ValueError, OSError, TypeError):
        pass


def test_without_blosc2_the_cure_is_named(tmp_path, blosc2, monkeypatch):
    path = str(tmp_path / "a.b2nd")
    blosc2.asarray(np.arange(10), urlpath=path, mode="w")
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(ImportError, match=r'pip install "pyuffd\[blosc2\]"'):
        uffd.open(path)
