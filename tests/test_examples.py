"""examples/, and the programs in docs/write-a-provider.md: each runs by itself from the installed package, checks its
own values, and ends."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
GUIDE = ROOT / "docs" / "write-a-provider.md"
SKIP = 77

if not EXAMPLES or not GUIDE.exists():
    pytest.skip("no source tree beside the tests: these hold only there", allow_module_level=True)


def run(path, folder):
    return subprocess.run([sys.executable, "-P", str(path)], cwd=folder, capture_output=True, text=True, timeout=50,
                          stdin=subprocess.DEVNULL, check=False)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_example_runs(tmp_path, path):
    """Goal: exit code 0 with something to read, or 77 with the reason. Method: in an empty directory, left empty."""
    done = run(path, tmp_path)
    if done.returncode == SKIP:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert 2 <= len(done.stdout.splitlines()) <= 40
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_all_examples_of_the_plan_are_there():
    names = {path.stem for path in EXAMPLES}
    assert {"three_lines", "mandelbrot", "remote_file", "zarr_to_sklearn", "torch_dataloader", "larger_than_memory",
            "checkpoint_simulation"} <= names


# docs/write-a-provider.md: what each of its programs prints.


PROGRAMS = [
    "1000000000000 40000180000285",
    "(10000, 3) [9999.  4999.5 2499.75] 2499.75",
    "5 16 blocks, of which one was touched",
    "100001 bytes, written and read back in 124 writes",
    "5 True 2 OSError: [Errno 5] the tape is torn\n1",
]


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_the_programs_of_the_guide_run(tmp_path, number):
    """Goal: each prints what it should. Method: as a file of its own, for the host imports it again."""
    programs = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(programs) == len(PROGRAMS)
    path = tmp_path / "program.py"
    path.write_text(programs[number])
    done = run(path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.sub(r" +", " ", done.stdout.strip()) == re.sub(r" +", " ", PROGRAMS[number])


def test_what_the_guide_links_to_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", GUIDE.read_text())
    assert links and [link for link in links if not (GUIDE.parent / link).exists()] == []
