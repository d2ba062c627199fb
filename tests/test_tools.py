"""What `make test` says of a run of pytest: tools/dev.py is told the truth, or the suite's verdict is worth nothing."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")
DEV = Path(__file__).resolve().parent.parent / "tools" / "dev.py"
# Fails the first time, and leaves a mark by which it passes the next time.
ONCE = """
def once(number):
    mark = Path(MARKS, str(number))
    seen = mark.exists()
    mark.touch()
    assert seen
"""


@pytest.fixture
def dev(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # it adds its own directory
    spec = importlib.util.spec_from_file_location("dev", DEV)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dev", module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def result_of(dev, folder, body):
    """What two processes make of these tests."""
    for name in ("tests", "marks"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (folder / "tests" / "test_it.py").write_text(
        f"import os\nimport pytest\nfrom pathlib import Path\nMARKS = {str(folder / 'marks')!r}\n{ONCE}\n{body}")
    return dev.run_pytest(dev.Suite("inner", Path(sys.executable), folder, deadline_s=120, processes=2))


def test_what_fails_beside_others_runs_once_more_and_is_named(dev, tmp_path, capsys):
    result = result_of(dev, tmp_path, "def test_a(): once(1)\ndef test_b(): pass\n")
    assert result.code == 0 and result.count("failed") == 1 and result.count("passed") == 1
    (name,) = result.at_second_try
    assert name.endswith("test_it.py::test_a")
    assert dev.conclude([result]) == 0
    assert f"at the second try: {name}" in capsys.readouterr().out


def test_what_fails_alone_too_has_failed(dev, tmp_path, monkeypatch):
    """And so do more tests than may be run again, though they would pass then."""
    result = result_of(dev, tmp_path, "def test_a(): once(1)\ndef test_b(): assert not 1\n")
    assert result.code == dev.TESTS_FAILED and not result.at_second_try and dev.conclude([result])
    monkeypatch.setattr(dev, "SECOND_TRIES", 0)
    result = result_of(dev, tmp_path, "def test_a(): once(2)\n")
    assert result.code == dev.TESTS_FAILED and result.count("failed") == 1


def test_a_crash_has_no_second_try(dev, tmp_path, capsys):
    """Of a test that kills its process once, and would pass then."""
    result = result_of(dev, tmp_path, """
def test_a():
    if not Path(MARKS, "1").exists():
        Path(MARKS, "1").touch()
        os.kill(os.getpid(), 9)
""")
    assert result.code == dev.TESTS_FAILED and "once more" not in capsys.readouterr().out


def test_a_run_that_hangs_is_killed(dev, tmp_path, monkeypatch):
    suite = dev.Suite
    monkeypatch.setattr(dev, "Suite", lambda *given, deadline_s, **named: suite(*given, deadline_s=3, **named))
    result = result_of(dev, tmp_path, "import time\ndef test_a(): time.sleep(100)\n")
    assert result.code == -9 and not result.closing
    assert dev.conclude([result]) == 1
