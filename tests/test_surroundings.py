"""Providers in Python where programs are run in ways of their own: pytest-xdist, a Jupyter kernel."""

import importlib.util
import re
import subprocess
import sys
import time

import pytest
import uffd

pytestmark = pytest.mark.skipif(uffd._core.mode()[0] == "none", reason="no userfaultfd, no provider hosts")


def needs(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def is_there(pid):
    """A zombie that waits for its parent is not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone(pids):
    deadline = time.monotonic() + 10
    while any(map(is_there, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)


SUITE = """
import os
import numpy as np
import pytest
import uffd

class Numbers(uffd.Provider):
    nbytes = 1 << 20

    def read(self, offset, out):
        out[:] = np.arange(offset, offset + len(out)) >> 16

def squares(offset, out):
    out.view("i8")[:] = np.arange(offset // 8, (offset + len(out)) // 8) ** 2

@pytest.fixture(scope="module")
def numbers():
    return uffd.Region(None, Numbers())

@pytest.mark.parametrize("block", range(16))
def test_blocks(numbers, block):
    assert (numbers.array()[block << 16:(block + 1) << 16] == block).all()
    with open("pids", "a") as file:
        file.write(f"{os.getpid()} {numbers.engine._threads.host_pids()[0]}\\n")

@pytest.mark.parametrize("n", [1000, 99999])
def test_functions(n):
    array = uffd.from_provider(squares, n, "i8")
    assert (array == np.arange(n) ** 2).all()
"""


@pytest.mark.deadline(120)
@needs("xdist")
def test_pytest_xdist(tmp_path):
    """Goal: tests of a program pass in xdist's workers, whose main module is none and whose test modules are found by
    a path of pytest's; each worker has hosts of its own, and they end with it."""
    (tmp_path / "test_it.py").write_text(SUITE)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "test_it.py"],
                          cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0 and "18 passed" in done.stdout, done.stdout + done.stderr
    pairs = {tuple(map(int, line.split())) for line in (tmp_path / "pids").read_text().splitlines()}
    assert len({worker for worker, _ in pairs}) == 2 and len({host for _, host in pairs}) == 2, pairs
    assert_gone([host for _, host in pairs])


CELLS = [
    ("import os, numpy as np, uffd\nscale = 7", r""),
    ("""
def scaled(offset, out):
    if offset >= 1 << 20:
        raise ValueError("beyond the notebook's end")
    out[:] = scale

array = uffd.from_provider(scaled, 2 << 20, "u1", retries=0)
print(array[:1 << 20].sum(), uffd.default_engine()._threads.host_pids()[0])
""", r"7340032 (\d+)"),
    ("""
try:
    uffd.populate(array)
except uffd.ProviderError as error:
    print(error.provider_traceback)
""", r"raise ValueError\(\"beyond the notebook's end\"\)"),
    ("%timeit -n1 -r1 array[:1 << 20].max()\nprint(array[5])", r"7"),
    ("""
class Slow(uffd.Provider):
    nbytes = 1 << 20
    def read(self, offset, out):
        import time
        time.sleep(0.2)
        out[:] = 3

slow = uffd.Region(None, Slow(), readahead_bytes=0)
print(slow.array().sum())
""", r"3145728"),
]


@pytest.mark.deadline(180)
@needs("ipykernel", "jupyter_client")
@pytest.mark.keeps("jupyter_client leaves its event loop in this process")
def test_jupyter(tmp_path):
    """Goal: functions and classes of a notebook are providers; a failure shows the cell's line; an interrupt of the
    kernel is not the host's end; the host ends with the kernel."""
    from jupyter_client.manager import start_new_kernel

    pytest.importorskip("cloudpickle")
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path), startup_timeout=60)
    host = None
    try:
        for code, expected in CELLS:
            told = run_cell(client, code)
            found = re.search(expected, told)
            assert found, told
            host = int(found[1]) if found.groups() else host
        manager.interrupt_kernel()
        assert "7" in run_cell(client, "print(array[9])") and is_there(host)
        assert str(host) in run_cell(client, "print(uffd.default_engine()._threads.host_pids())")
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    assert_gone([host])


def run_cell(client, code):
    """What it prints; an exception fails the test."""
    told = []

    def note(message):
        content = message["content"]
        told.append(content.get("text") or "\n".join(content.get("traceback", ())))

    reply = client.execute_interactive(code, timeout=60, output_hook=note)
    assert reply["content"]["status"] == "ok", told
    return "".join(told)
