"""The frame itself: a test that hangs is killed and named, a test that leaks fails. The tests must be able to fail."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.scripts import python_path


def run_pytest(tmp_path, body, timeout_s=60):
    """Run `body` as a test file in a pytest of its own, under this suite's conftest."""
    file = tmp_path / "test_inner.py"
    file.write_text("import os, sys, threading, time, pytest\nimport numpy as np\nimport uffd\n" + body)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir",
               str(tmp_path), "-p", "conftest", str(file)]
    environment = {**os.environ, "PYTHONPATH": python_path(), "UFFD_SETTLE_S": "0.5"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                               env=environment, start_new_session=True)
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # what a leaking test left behind
        except ProcessLookupError:
            pass
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_a_hang_is_killed_and_named(tmp_path):
    """Goal: a test that hangs with the GIL held ends the run by SIGKILL, with its name and stacks on stderr."""
    started = time.monotonic()
    result = run_pytest(tmp_path, """
@pytest.mark.deadline(2)
def test_hangs():
    import ctypes
    ctypes.PyDLL(None).sleep(50)  # PyDLL keeps the GIL
""")
    assert result.returncode == -signal.SIGKILL and time.monotonic() - started < 45
    assert "test_hangs" in result.stderr and "overran" in result.stderr, result.stderr
    assert "test_inner.py" in result.stderr  # the stacks


def test_descendants_are_killed_too(tmp_path):
    result = run_pytest(tmp_path, f"""
@pytest.mark.deadline(2)
def test_hangs():
    import subprocess
    child = subprocess.Popen(["sleep", "50"], start_new_session=True)
    open({str(tmp_path / 'pid')!r}, "w").write(str(child.pid))
    child.wait()
""")
    assert result.returncode == -signal.SIGKILL
    pid = (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and Path(f"/proc/{pid}/cmdline").exists():
        if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}/cmdline").exists()


@pytest.mark.parametrize("leak, word", [
    ("kept.append(os.open('/dev/null', 0))", "descriptor"),
    ("threading.Thread(target=time.sleep, args=(4,), daemon=True).start()", "thread"),
    ("kept.append(uffd.Region(1 << 20, uffd.providers.Zero()))", "managed mapping"),
    ("import subprocess; kept.append("
     "subprocess.Popen(['sleep', '4'], stdout=-3, stderr=-3))", "child process"),
], ids=["descriptor", "thread", "region", "child"])
def test_a_leak_fails(tmp_path, leak, word):
    result = run_pytest(tmp_path, f"kept = []\ndef test_leaks():\n    {leak}\n")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "left over after the test" in result.stdout and word in result.stdout


def test_a_clean_test_passes(tmp_path):
    result = run_pytest(tmp_path, """
def test_clean(make):
    array = make(1 << 20, uffd.providers.Zero()).array()
    assert not array.any()
    del array
""")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 passed" in result.stdout or "skipped" in result.stdout
