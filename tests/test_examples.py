"""examples/: each runs by itself from the installed package, checks its own values, and ends."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SKIP = 77

if not EXAMPLES:
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
            "upgrade_in_place", "checkpoint_simulation"} <= names
