"""Files of images: what is in them against np.save and the safetensors library, chains, damage refused by name, the
command line. Everything here is taken by fork, which works without a userfaultfd."""

import json
import mmap
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.arrayfiles import DTYPES, ML_CODES, assert_same_bits, some_array
from uffd.__main__ import main

import uffd
from uffd import snapshot

PAGE = uffd._core.PAGE_BYTES
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def taken(arrays, path, **options):
    """The report of an image by fork."""
    return snapshot.take(arrays, path, method="fork", **options).wait(20)


def of_all_types():
    out = {f"{number}{order}": some_array(dtype, shape, order=order)
           for number, dtype in enumerate(DTYPES) for shape, order in (((129, 65), "C"), ((7, 3), "F"))}
    return {**out, "empty": np.empty((3, 0, 2)), "point": np.array(3.5), "one": np.ones(1), "ünï": np.arange(5)}


@pytest.fixture
def image(tmp_path):
    """(path, arrays): a small whole image."""
    arrays = {"a": some_array("<f8", (30_000,)), "b": some_array("<i4", (50, 7), order="F"), "c": np.zeros(100_000)}
    taken(arrays, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors", arrays


def assert_has(path, arrays):
    """By lazy and by plain reading, bit for bit, types and orders too."""
    for found in (uffd.open(path), snapshot.load(path), snapshot.load(path, lazy=False)):
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert_same_bits(found[name], array)


def test_all_types_as_np_save_has_them(tmp_path):
    arrays = of_all_types()
    taken(arrays, tmp_path / "all")
    for name, array in arrays.items():
        np.save(tmp_path / "one.npy", array)
        assert_same_bits(uffd.open(tmp_path / "all")[name], np.load(tmp_path / "one.npy"))
    assert_has(tmp_path / "all", arrays)


def test_the_safetensors_library_reads_a_whole_image(tmp_path):
    """Goal: every tensor it knows has the array's values; the others are their bytes; data begin at pages."""
    numpy_of = pytest.importorskip("safetensors.numpy")
    arrays = of_all_types()
    taken(arrays, tmp_path / "all.safetensors")
    found = numpy_of.load_file(tmp_path / "all.safetensors")
    for name, array in arrays.items():
        if found[name].dtype == array.dtype and found[name].shape == array.shape:
            assert found[name].tobytes() == array.tobytes()
        else:
            assert found[name].dtype == np.uint8 and found[name].tobytes() == array.tobytes("A")
    assert {name for name in found if name not in arrays} == {n for n in found if n.startswith(("__pad_", "__uffd_"))}
    text = (tmp_path / "all.safetensors").read_bytes()
    begin = 8 + int.from_bytes(text[:8], "little")
    header = json.loads(text[8:begin])
    assert begin % PAGE == 0 and all(header[name]["data_offsets"][0] % PAGE == 0 for name in arrays)


def test_types_of_ml_dtypes(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = {code: np.arange(40).astype(getattr(ml_dtypes, name)) for code, name in ML_CODES.items()
              if hasattr(ml_dtypes, name)}
    arrays["int4"] = np.arange(-8, 8).astype(ml_dtypes.int4)
    taken(arrays, tmp_path / "ml")
    assert_has(tmp_path / "ml", arrays)


def test_what_can_not_be_imaged_is_refused_with_the_reason(tmp_path):
    file = np.memmap(tmp_path / "f", np.uint8, "w+", shape=(PAGE,))
    for arrays, error, words in (
            ({"o": np.array([None])}, TypeError, "Python objects"),
            ({"v": np.zeros((10, 10))[:, ::2]}, ValueError, "not contiguous"),
            ({"__pad_1": np.zeros(1)}, ValueError, "images use it"),
            ({1: np.zeros(1)}, TypeError, "strings"),
            ({"l": [1, 2]}, TypeError, "not a numpy array"),
            ([np.zeros(1)], TypeError, "mapping"),
            ({"m": file}, uffd.SnapshotError, "mapping of the file")):
        with pytest.raises(error, match=words):
            taken(arrays, tmp_path / "x")
    for options, words in (({"method": "magic"}, "'auto'"), ({"compress": "rar"}, "not one of")):
        with pytest.raises(ValueError, match=words):
            snapshot.take(np.zeros(1), tmp_path / "x", **options)
    with pytest.raises(IsADirectoryError):
        taken(np.zeros(1), tmp_path)
    with pytest.raises(FileNotFoundError):
        taken(np.zeros(1), tmp_path / "none" / "x")
    assert os.listdir(tmp_path) == ["f"]


def test_never_written_memory_costs_nothing(tmp_path):
    """Goal: 16 GiB of which three pages were written are a file of a few pages, taken and opened at once."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000       # MAP_NORESERVE, which Python 3.11 has no name for
    array = np.frombuffer(mmap.mmap(-1, 1 << 34, flags=flags))
    array[[5, 1 << 20, -1]] = 1, 2, 3
    report = taken(array, tmp_path / "huge")
    assert report.nbytes == 1 << 34 and report.disk_bytes < 1 << 20 and report.blocks == 3
    found = snapshot.load(tmp_path / "huge")["array"]
    assert [found[5], found[1 << 20], found[-1], found[1 << 30]] == [1, 2, 3, 0]


def test_a_report_in_words_and_numbers(image, tmp_path):
    report = taken(image[1], tmp_path / "b", base=image[0])
    numbers = json.loads(json.dumps(report.as_dict()))
    assert numbers["method"] == "fork" and numbers["base"] == "a.safetensors" and numbers["data_bytes"] == 0
    assert 0 < numbers["pause_ns"] < numbers["total_ns"] and "pause" in str(report) and "a.safetensors" in str(report)


# ---- chains


def chain_of(tmp_path, n=5):
    """(paths, what the arrays were at each), the first one whole."""
    rng = np.random.default_rng(7)
    arrays = {"a": rng.random(40_000), "z": np.zeros(50_000), "f": np.asfortranarray(rng.random((60, 70)))}
    paths, states = [], []
    for number in range(n):
        path = tmp_path / f"{number}.safetensors"
        report = taken(arrays, path, base=paths[-1] if paths else None)
        assert not paths or report.data_bytes <= 8 * PAGE
        paths.append(path)
        states.append({name: array.copy("A") for name, array in arrays.items()})
        arrays["a"][rng.integers(0, 40_000, 2)] = number
        arrays["z"][rng.integers(0, 50_000)] = number + 1
        arrays["f"][number, :3] = -1
        arrays["z"][:100] = 0                                    # zeros again where something was
    return paths, states


def test_a_chain_is_the_arrays_as_they_were_at_each(tmp_path):
    paths, states = chain_of(tmp_path)
    for path, state in zip(paths, states):
        assert_has(path, state)
        assert snapshot.verify(path) > 0
    snapshot.export(paths[-1], tmp_path / "whole")
    assert_has(tmp_path / "whole", states[-1])
    assert len(snapshot.info(paths[-1]).chain) == 5 and len(snapshot.info(tmp_path / "whole").chain) == 1
    assert snapshot.diff(paths[-1], tmp_path / "whole") == {}
    different = snapshot.diff(paths[0], paths[1])
    for name, rows in different.items():
        mine, theirs = (states[k][name].tobytes("A") for k in (0, 1))
        flags = np.zeros(len(mine), bool)
        for low, high in rows:
            assert mine[low:high] != theirs[low:high]
            flags[low:high] = True
        assert not (np.frombuffer(mine, "u1") != np.frombuffer(theirs, "u1"))[~flags].any()


def test_a_chain_that_does_not_fit_is_refused(tmp_path):
    paths, states = chain_of(tmp_path, 3)
    arrays = states[-1]
    with pytest.raises(ValueError, match="names, types, shapes"):
        taken({"other": np.zeros(3)}, tmp_path / "x", base=paths[0])
    with pytest.raises(ValueError, match="part of the chain"):
        taken(arrays, paths[1], base=paths[2])
    with pytest.raises(ValueError, match="beside its base"):
        (tmp_path / "sub").mkdir()
        taken(arrays, tmp_path / "sub" / "x", base=paths[0])
    with pytest.raises(ValueError, match="don't go together"):
        taken(arrays, tmp_path / "x", base=paths[0], compress="zstd")
    os.rename(paths[1], tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="1.safetensors, which is not there"):
        uffd.open(paths[2])
    taken(arrays, paths[1])
    with pytest.raises(ValueError, match="is another one now"):
        uffd.open(paths[2])


def test_an_image_is_not_written_to(image):
    with pytest.raises(ValueError, match="checksums"):
        uffd.open(image[0], mode="r+")
    array = uffd.open(image[0])["a"]
    array[:] = 1
    assert_has(*image)


# ---- compressed


def test_compressed_images(tmp_path, image, blosc2):
    path, arrays = image
    taken(arrays, tmp_path / "c.b2frame", compress="lz4")
    assert_has(tmp_path / "c.b2frame", arrays)
    assert snapshot.info(tmp_path / "c.b2frame").compressed and snapshot.verify(tmp_path / "c.b2frame") > 0
    assert snapshot.diff(tmp_path / "c.b2frame", path) == {}
    snapshot.export(tmp_path / "c.b2frame", tmp_path / "plain")
    assert_has(tmp_path / "plain", arrays)
    with pytest.raises(ValueError):
        taken(arrays, tmp_path / "x", base=tmp_path / "c.b2frame")


def test_a_flipped_bit_of_a_compressed_image_is_never_data(tmp_path, blosc2):
    """Goal: what Blosc2 stores as it is, or decodes all the same, is found when it is opened and touched."""
    rng = np.random.default_rng(8)
    arrays = {"noise": rng.integers(0, 256, 300_000).astype("u1"), "rows": np.arange(60_000).reshape(300, 200)}
    path = tmp_path / "c"
    taken(arrays, path, compress="lz4")
    right = path.read_bytes()
    refused = 0
    for at in rng.integers(0, len(right), 60).tolist():
        damaged = bytearray(right)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            found = uffd.open(path)
            for name in list(found):
                uffd.populate(found[name])
            copies = {name: np.array(found[name]) for name in found}
        except (ValueError, OSError):
            refused += 1
            continue
        assert copies.keys() == arrays.keys(), at
        for name, array in arrays.items():
            np.testing.assert_array_equal(copies[name], array)
        del found
    assert refused > 30
    path.write_bytes(right)
    assert_has(path, arrays)


# ---- damage


def test_each_truncation_is_refused_by_name(image):
    path, _ = image
    whole = path.read_bytes()
    for n in [0, 7, 8, 100, PAGE - 1, PAGE, PAGE + 1, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="a.safetensors"):
            uffd.open(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="a.safetensors"):
        uffd.open(path)


def test_another_version_is_refused_by_name(image):
    path, _ = image
    path.write_bytes(path.read_bytes().replace(b'"uffd_snapshot":"1"', b'"uffd_snapshot":"2"'))
    with pytest.raises(ValueError, match="version '2'"):
        uffd.open(path)


def test_a_flipped_bit_is_never_data(image):
    """Goal: in header or seal it is refused at once; in the data `verify` and plain loading name the file, populate
    raises, and the rest is as it was."""
    path, arrays = image
    whole = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(whole[:8], "little")
    for at in (9, 200, begin - 1, len(whole) - 1, len(whole) - 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(ValueError, match="a.safetensors"):
            uffd.open(path)
    at = begin + 100_000
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    with pytest.raises(ValueError, match=f"1 of its pieces.*byte {begin + 65536}"):
        snapshot.verify(path)
    with pytest.raises(ValueError, match="damaged"):
        snapshot.load(path, lazy=False)
    found = uffd.open(path)["a"]
    assert found[:8192].tobytes() == arrays["a"][:8192].tobytes()
    with pytest.raises(uffd.ProviderError, match="checksum"):
        uffd.populate(found)
    hole = begin + (256 << 10) + 300_000                         # zeros have no checksum but "zeros"
    path.write_bytes(whole[:hole] + b"\1" + whole[hole + 1:])
    with pytest.raises(ValueError, match="1 of its pieces"):
        snapshot.verify(path)


@FUZZ
@given(data=st.data())
def test_a_hostile_header_is_refused(image, data):
    """Goal: whatever stands in the table of arrays or the seal, ValueError and nothing else. Method: the digest is made
    right again, so that what is behind it is reached."""
    path, _ = image
    from uffd.snapshot import _files

    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:begin])
    some = st.one_of(st.integers(-2, 2**70), st.text(max_size=8), st.none(), st.lists(st.integers(), max_size=3))
    value = data.draw(some)
    key = data.draw(st.sampled_from(["uffd_arrays", "uffd_id", "uffd_created", "uffd_base", "data_offsets", "dtype",
                                     "row", "seal"]))
    seal = header[_files._SUMS]["data_offsets"]
    tail = bytearray(whole[begin + seal[0]:])
    if key == "row":
        table = json.loads(header["__metadata__"]["uffd_arrays"])
        table["arrays"][0][data.draw(st.integers(0, 4))] = value
        header["__metadata__"]["uffd_arrays"] = json.dumps(table)
    elif key == "seal":
        at = data.draw(st.integers(0, _files._SEAL.size - 1))
        tail[at] ^= data.draw(st.integers(1, 255))
    elif key in ("data_offsets", "dtype"):
        header["a"][key] = value
    else:
        header["__metadata__"][key] = str(value)
    text = json.dumps(header).encode().ljust(begin - 8)
    front = len(text).to_bytes(8, "little") + text
    parts = bytes(tail[:_files._SEAL.size]), bytes(tail[_files._SEAL.size:-16])
    changed = path.with_name("changed.safetensors")
    changed.write_bytes(front + whole[begin:begin + seal[0]] + parts[0] + parts[1]
                        + _files._digest(front, b"", *parts))
    if changed.read_bytes() != whole and key not in ("uffd_id", "uffd_created"):
        with pytest.raises((ValueError, FileNotFoundError, TypeError)):
            _ = uffd.open(changed)["a"]
            snapshot.verify(changed)


# ---- working sets


def test_a_working_set_is_replayed_by_another_load(image):
    """Goal: the blocks that were touched are there without a touch; a damaged set, or one of another image, is none."""
    path, arrays = image
    first = snapshot.load(path, readahead_bytes=0)
    assert first.replay() is None
    _ = first["a"][25_000], first["a"][0]
    assert first.save_working_set() == 2
    second = snapshot.load(path, readahead_bytes=0)
    second.replay().wait(10)
    region = uffd.region_of(second["a"])
    assert region.resident()[[0, 3]].all() and region.resident().sum() == 2 and region.stats().blocks_demand == 0
    _ = second["c"][70_000]
    assert second.save_working_set() == 3 and snapshot.info(path).working_set == 3
    stored = path.with_name(path.name + ".touched")
    whole = stored.read_bytes()
    for text in (whole[:-1], whole[:60] + b"\xff" + whole[61:], b""):
        stored.write_bytes(text)
        assert snapshot.load(path).replay() is None
    stored.write_bytes(whole)
    taken(arrays, path)
    assert snapshot.load(path).replay() is None


def test_copies_of_a_working_set_are_read_in_the_images_place_and_never_believed(tmp_path):
    """Goal: a start reads the copies; those that are damaged, cut or gone are read from the image; of a chain, too."""
    rng = np.random.default_rng(6)
    array = rng.integers(0, 256, 40 * 65536 + 777).astype("u1")
    taken(array, tmp_path / "0")
    array[7 * 65536:9 * 65536] = rng.integers(0, 256, 2 * 65536)
    taken(array, tmp_path / "a", base=tmp_path / "0")
    stored = tmp_path / "a.touched"
    order = [39, 7, 40, 3, 8, 4, 20]
    arrays = snapshot.load(tmp_path / "a", readahead_bytes=0)
    for block in order:
        assert arrays["array"][block * 65536] == array[block * 65536]
    assert arrays.save_working_set() == len(order)
    whole = stored.read_bytes()
    begin = len(whole) - len(order) * 65536
    assert begin == 4096
    for damage in ("none", "flipped", "cut", "gone"):
        stored.write_bytes(whole)
        arrays = snapshot.load(tmp_path / "a", readahead_bytes=0) if damage == "none" else None
        if damage == "flipped":
            text = bytearray(whole)
            for block in range(len(order)):
                text[begin + block * 65536 + 100] ^= 4
            stored.write_bytes(text)
        elif damage == "cut":
            stored.write_bytes(whole[:-1])
        elif damage == "gone":
            stored.unlink()
        arrays = snapshot.load(tmp_path / "a", readahead_bytes=0) if arrays is None else arrays
        replayed = arrays.replay()
        assert (replayed is None) == (damage in ("cut", "gone"))
        if replayed is not None:
            replayed.wait(10)
        np.testing.assert_array_equal(arrays["array"], array)
    stored.write_bytes(whole)
    chain = snapshot._tools.image_at(tmp_path / "a")
    with open(tmp_path / "0", "r+b") as file:            # what has a copy needs no original
        file.seek(chain.files[1].data_offset + 3 * 65536)
        file.write(b"damage" * 100)
    arrays = snapshot.load(tmp_path / "a", readahead_bytes=0)
    arrays.replay().wait(10)
    assert (arrays["array"][3 * 65536:5 * 65536] == array[3 * 65536:5 * 65536]).all()


# ---- the command line


def test_the_command_line(tmp_path, capsys):
    paths, states = chain_of(tmp_path, 2)
    def run(*words):
        code = main(["snapshot", *map(str, words)])
        return code, capsys.readouterr()

    code, said = run("info", paths[1])
    assert code == 0 and "incremental" in said.out and "builds upon" in said.out
    assert json.loads(run("info", paths[1], "--json")[1].out)["arrays"]["f"]["order"] == "F"
    assert run("verify", paths[1])[0] == 0
    assert run("export", paths[1], tmp_path / "e", "--json")[0] == 0
    assert run("diff", paths[1], tmp_path / "e")[0] == 0
    code, said = run("diff", paths[0], paths[1])
    assert code == 1 and "bytes in" in said.out
    text = bytearray(paths[0].read_bytes())
    text[PAGE + 50] ^= 4
    paths[0].write_bytes(text)
    code, said = run("verify", paths[1])
    assert code == 1 and "0.safetensors" in said.err
    shutil.copy(__file__, tmp_path / "other")
    assert run("info", tmp_path / "other")[0] == 1
    for bad in ("other", "none"):                       # not "they differ"
        code, said = run("diff", paths[1], tmp_path / bad)
        assert code == 2 and bad in said.err and not said.out
