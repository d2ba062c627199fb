"""What comes from the other side in JSON: believed in nothing. Fuzzed, and each rule by an example."""

import copy
import json
import math
import socket
import struct
import threading
import time

import numpy as np
import pytest
import uffd
from hypothesis import given, settings
from hypothesis import strategies as st
from uffd.migrate import _frames
from uffd.migrate._frames import Array, Frames, Layout, Part, described, layout, parse

PAGE = uffd._core.PAGE_BYTES
DTYPES = ["<f8", "?", "S7", "U3", "M8[ns]", [("a", "<f4"), ("b", "<i2", (2, 3))],
          [("x", [("y", "<f8"), ("z", "u1", (2,))])],
          {"names": ["a"], "formats": ["i4"], "offsets": [4], "itemsize": 16}]
PARTS = (Part(1 << 20, 65536, "anon"), Part(100, 65536, "shared"))
GOOD = {"type": "offer", **described(Layout(PARTS, (Array("a", 0, 8, np.dtype("<f8"), (3, 5), "C"),
                                                    Array("b", 1, 0, np.dtype("u1"), (100,), "F"))))}


def read(frame):
    return layout(parse(json.dumps(frame).encode()), page_bytes=PAGE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layout_arrives_as_it_was(dtype):
    sent = Layout(PARTS, (Array("é", 0, 64, np.dtype(dtype), (4, 0, 2), "F"),
                          Array("n", 1, 0, np.dtype(dtype), (), "C")))
    assert read({"type": "offer", **described(sent)}) == sent


def test_types_of_ml_dtypes_go_by_name():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="an extra")
    sent = Layout(PARTS, (Array("a", 0, 0, np.dtype(ml_dtypes.bfloat16), (9,), "C"),))
    assert read({"type": "offer", **described(sent)}) == sent


def changed(path, value):
    frame = copy.deepcopy(GOOD)
    place = frame
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return frame


@pytest.mark.parametrize(("path", "value", "says"), [
    (("parts", 0, "nbytes"), 0, "nbytes = 0"), (("parts", 0, "nbytes"), -1, "nbytes = -1"),
    (("parts", 0, "nbytes"), 1 << 48, "nbytes"), (("parts", 0, "nbytes"), 1e6, "whole number"),
    (("parts", 0, "nbytes"), True, "whole number"), (("parts", 0, "nbytes"), "9", "whole number"),
    (("parts", 0, "block_bytes"), 65535, "power of two"), (("parts", 0, "block_bytes"), 512, "block_bytes="),
    (("parts", 0, "block_bytes"), 1 << 31, "block_bytes"), (("parts", 0, "backing"), "disk", "anon, shared"),
    (("parts",), {}, "list of at most"), (("parts",), [3], "list of at most"), (("arrays",), None, "list of at most"),
    (("parts",), [GOOD["parts"][0]] * (_frames.PARTS + 1), "at most"),
    (("arrays", 0, "part"), 2, "part = 2"), (("arrays", 0, "part"), -1, "part = -1"),
    (("arrays", 0, "offset"), (1 << 20) - 8, "bytes at"), (("arrays", 0, "offset"), 1 << 63, "offset"),
    (("arrays", 0, "shape"), [1 << 40, 1 << 40], "bytes at"), (("arrays", 0, "shape"), [-1], "shape"),
    (("arrays", 0, "shape"), [0, 1 << 46, 1 << 46], "no array that numpy can make"),
    (("arrays", 0, "shape"), [1] * 33, "shape"), (("arrays", 0, "shape"), [1.0], "shape"),
    (("arrays", 0, "name"), "b", "two arrays have the name 'b'"), (("arrays", 0, "name"), "x" * 2000, "text of"),
    (("arrays", 0, "name"), "a\x1b[2J", "can't be printed"), (("arrays", 0, "name"), None, "text of"),
    (("arrays", 0, "order"), "A", "C, F"), (("arrays", 0, "dtype"), "|O", "objects"),
    (("arrays", 0, "dtype"), [["a", "|O"]], "objects"), (("arrays", 0, "dtype"), "nonsense", "dtype"),
    (("arrays", 0, "dtype"), 5, "dtype"), (("arrays", 0, "dtype"), [["a"]], "dtype"),
    (("arrays", 0, "dtype"), [["a", "<f8", [1 << 40]]], "dtype"), (("arrays", 0, "dtype"), "V0", "dtype"),
    (("arrays", 0, "dtype"), "ml_dtypes.finfo", "ml_dtypes"),
    (("arrays", 0, "dtype"), "ml_dtypes.__doc__", "ml_dtypes"),
])
def test_what_can_not_be_is_refused_and_named(path, value, says):
    with pytest.raises(uffd.MigrationError, match=says) as caught:
        read(changed(path, value))
    assert caught.value.owner == "source" and len(str(caught.value)) < 400


def test_more_than_the_memory_that_may_be_is_refused():
    with pytest.raises(uffd.MigrationError, match="in all"):
        layout(copy.deepcopy(GOOD), page_bytes=PAGE, memory_bytes=1 << 20)


@pytest.mark.parametrize("body", [
    b"", b"{}", b"[]", b"1", b"null", b"{", b'{"type": 1}', b'{"type": "a", "type": "b"}', b'{"type": "a", "x": NaN}',
    b'{"type": "a", "x": Infinity}', b'{"type": "a"} ', b'\xff{"type": "a"}', b'{"type": "a", "x": ' + b"[" * 100000,
    b'{"type": "a", "x": ' + b'{"y":' * 1000, b'{"type": "a", "x": ' + b"9" * 5000 + b"}",
], ids=lambda body: repr(body[:20]))
def test_json_that_ours_would_not_say_is_refused(body):
    if body.endswith(b" "):
        assert parse(body) == {"type": "a"}      # white space is JSON
        return
    with pytest.raises(uffd.MigrationError, match="can't be"):
        parse(body)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(alphabet='{}[]",:0123456789.eE-+truefalsn\\u type', max_size=100)))
def test_any_bytes_are_a_frame_or_refused(data):
    try:
        assert isinstance(parse(data if isinstance(data, bytes) else data.encode())["type"], str)
    except uffd.MigrationError:
        pass


WORDS = ("", "a", "|O", "<f8", "f8,f8", "(3,)f4", "anon", "C", "M8[ns]", "V9", "é\n")
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-2, 1 << 70), st.sampled_from(WORDS),
                   st.floats(allow_nan=False, allow_infinity=False))
JSON = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["nbytes", "name", "part"]), inner, max_size=3)),
    max_leaves=6)
PLACES = [("parts",), ("arrays",),
          *((kind, i, name) for kind in ("parts", "arrays") for i in (0, 1) for name in GOOD[kind][i])]
MEMORY = memoryview(bytes(1 << 20))


@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), JSON), min_size=1, max_size=3))
def test_a_layout_with_anything_in_any_place_is_right_or_refused(changes):
    frame = copy.deepcopy(GOOD)
    for path, value in changes:
        place = frame
        try:
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
        except (TypeError, IndexError, KeyError):
            continue
    try:
        found = read(frame)
    except uffd.MigrationError:
        return
    for array in found.arrays:
        part = found.parts[array.part]
        assert 0 <= array.offset <= array.offset + math.prod(array.shape) * array.dtype.itemsize <= part.nbytes
        assert not array.dtype.hasobject
        if part.nbytes <= len(MEMORY):
            np.ndarray(array.shape, array.dtype, MEMORY[array.offset:part.nbytes], order=array.order)
    assert all(part.block_bytes >= PAGE and part.nbytes > 0 for part in found.parts)


# Over a socket


@pytest.fixture
def ends():
    a, b = socket.socketpair()
    with a, b:
        yield Frames(a), Frames(b)


def soon(seconds=5.0):
    return time.monotonic() + seconds


def test_frames_go_and_come_whole(ends):
    one, other = ends
    thread = threading.Thread(target=one.send, args=("layout",), kwargs={"deadline_s": soon(), "text": "x" * 3_000_000})
    thread.start()
    assert other.receive("layout", "refused", deadline_s=soon()) == {"type": "layout", "text": "x" * 3_000_000}
    thread.join()
    with pytest.raises(ValueError, match="migrate fewer arrays at once"):
        one.send("layout", deadline_s=soon(), text="x" * _frames.FRAME_BYTES)


def test_a_frame_of_another_kind_is_refused(ends):
    ends[0].send("accepted", deadline_s=soon())
    with pytest.raises(uffd.MigrationError, match="'accepted' came where 'offer' or 'refused' belongs"):
        ends[1].receive("offer", "refused", deadline_s=soon())


def test_a_length_alone_takes_no_memory_and_no_longer_than_its_deadline(ends):
    import tracemalloc

    ends[0].connection.sendall(struct.pack("!I", _frames.FRAME_BYTES) + b"x")
    tracemalloc.start()
    with pytest.raises(TimeoutError, match="waiting for 'offer': 1 of 4,194,304 bytes"):
        ends[1].receive("offer", deadline_s=soon(0.1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_end_within_a_frame_is_an_oserror(ends):
    ends[0].connection.sendall(struct.pack("!I", 10) + b"x")
    ends[0].connection.close()
    with pytest.raises(ConnectionResetError, match="after 1 of 10 bytes"):
        ends[1].receive("offer", deadline_s=soon())
