"""`uffd migrate demo`, as a user runs it."""

import json
import subprocess
import sys

import pytest
import uffd
from support import matrix

pytestmark = pytest.mark.skipif(matrix.filled_whole() or uffd.probe(self_test=False).mode == "none",
                                reason="no userfaultfd to be had here")


def run(*arguments, cwd):
    return subprocess.run([sys.executable, "-P", "-m", "uffd", "migrate", "demo", *arguments], cwd=cwd, text=True,
                          capture_output=True, timeout=60, check=False)


def test_it_moves_memory_that_is_written_to_all_the_time(tmp_path):
    done = run("--mib", "16", "--mb-per-s", "100", "--seconds", "0.2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["right"] and told["blocks"] == 256 and told["written_here"] > 256 < told["written_there"]
    source = told["source"]
    assert source["status"] == told["destination"]["status"] == "COMPLETED" and source["rounds"] == 3
    assert source["blocks"]["precopy"] > 512, "the second and third round had much to send, too"
    assert source["blocks"]["pushed"] + source["blocks"]["requested"] > 0, "it never converges: postcopy ended it"
    assert source["requests"]["n"] == told["destination"]["requests"]["n"]
    program = source["program"]
    assert program[0][0] < 0 < source["total_s"] < program[-1][0], "before, during, after"
    assert (tmp_path / "uffd-migrate.png").read_bytes().startswith(b"\x89PNG")


def test_it_tells_what_happened_in_lines(tmp_path):
    done = run("--mib", "8", "--mb-per-s", "0", "--seconds", "0.1", "--no-png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("right: 128 blocks, written to ") and "downtime" in done.stdout
    assert not [line for line in lines if len(line) > 120]
    assert list(tmp_path.iterdir()) == []


def test_it_compares_the_ways(tmp_path):
    """Goal: each way moves the memory right; who hands it over at once sends each block once, and after the program
    goes on; who stops the program before it copies lets it stand still for as long as that takes."""
    done = run("--mib", "16", "--mb-per-s", "100", "--seconds", "0.2", "--compare", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert list(told) == ["stop-and-copy", "precopy", "postcopy"] and all(one["right"] for one in told.values())
    blocks = {way: one["source"]["blocks"] for way, one in told.items()}     # zero: not written to yet
    late = {way: one["pushed"] + one["requested"] for way, one in blocks.items()}
    assert blocks["postcopy"]["precopy"] == 0 and late["postcopy"] + blocks["postcopy"]["zero"] == 256, blocks
    assert blocks["stop-and-copy"]["precopy"] + blocks["stop-and-copy"]["zero"] == 256, blocks
    assert late["stop-and-copy"] == late["precopy"] == 0 and blocks["precopy"]["precopy"] > 256, blocks
    assert all(one["full_speed_s"] >= one["still_s"] > 0 for one in told.values())
    assert (tmp_path / "uffd-migrate.png").read_bytes().startswith(b"\x89PNG")
    done = run("--mib", "8", "--mb-per-s", "0", "--seconds", "0.1", "--no-png", "--compare", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == list(told) and not [line for line in lines if len(line) > 120]


@pytest.mark.parametrize("wrong", [("--mib", "0"), ("--mb-per-s", "-1"), ("--seconds", "0")])
def test_wrong_options_are_named(tmp_path, wrong):
    done = run(*wrong, cwd=tmp_path)
    assert done.returncode == 1 and "--mib takes 1 or more" in done.stderr
