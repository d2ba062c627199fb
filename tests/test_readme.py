"""README.md: its ten lines are ten and do what it says, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
LINES = 10
FILLED = re.compile(r"([\d,]+) of ([\d,]+) bytes were filled, (\d+) block")

if not README.exists():
    pytest.skip("README.md is not in this distribution", allow_module_level=True)


def first_lines():
    return re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]


def test_the_ten_lines_are_ten():
    code = [line for line in first_lines().splitlines() if line.strip()]
    assert 0 < len(code) <= LINES
    assert "blosc2" not in first_lines() and "pack(" not in first_lines(), "they need nothing but numpy"


def test_the_ten_lines_work(tmp_path):
    """Goal: they run as they stand, give the right sum, and fill a small part. Method: in an empty directory."""
    done = subprocess.run([sys.executable, "-P", "-c", first_lines()], cwd=tmp_path, capture_output=True, text=True,
                          timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    total, filled = done.stdout.splitlines()
    row = range(4_123_400, 4_123_500)
    assert float(total) == sum(row)
    found = [int(number.replace(",", "")) for number in FILLED.match(filled).groups()]
    assert found[1] == 48_000_000
    assert 0 < found[0] < found[1] // 20
    assert found[2] == 1
    warnings = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(warnings) <= 1 and all("DegradedWarning" in line for line in warnings), done.stderr
    assert (tmp_path / "head.npy").stat().st_size == 128 + 1000 * 100 * 8


def test_the_array_larger_than_memory_works(tmp_path):
    """Goal: 320 GB under a budget, as it says. Method: the example as it stands, spilling into an empty directory."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
               if "budget_bytes" in block]
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=50,
                          env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert done.returncode == 0, done.stderr
    total, resident = re.fullmatch(r"([\d.]+) (\d+) MiB in memory", done.stdout.strip()).groups()
    assert float(total) == 100 and 0 < int(resident) <= 256
    assert not list(tmp_path.iterdir())
