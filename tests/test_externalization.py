"""docs/externalization.md: each of its programs prints what it should, and what it links to is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "externalization.md"

if not GUIDE.exists():
    pytest.skip("no source tree beside the tests: these hold only there", allow_module_level=True)

PRINTED = [
    "True True True",
    "True",
    "r+ 80 blocks are dirty\n0 560.0",
    "True 1.0\n0.0\nTrue 819200.0\n4096000.0",
    "1000000.0 True 1000000.0",
]


@pytest.mark.parametrize("number", range(len(PRINTED)))
def test_the_programs_of_the_guide_run(tmp_path, number):
    """Goal: each prints what it should. Method: as a file of its own, in an empty directory, which spills too."""
    programs = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(programs) == len(PRINTED)
    path = tmp_path / "program.py"
    path.write_text(programs[number])
    done = subprocess.run([sys.executable, "-P", str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=50,
                          stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PRINTED[number]
    warnings = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert all("DegradedWarning" in line for line in warnings), done.stderr


def test_what_the_guide_links_to_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", GUIDE.read_text())
    assert links and [link for link in links if not (GUIDE.parent / link).exists()] == []
