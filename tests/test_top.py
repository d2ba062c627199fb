"""`uffd top`: frames of any size, the command against an engine of another process, and against all that is none."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import pytest
import uffd
from support.scripts import deadline_scale
from uffd import _rates, _top, providers
from uffd.__main__ import main

rich = pytest.importorskip("rich", reason="top needs the extra 'ui'")

from rich.console import Console  # noqa: E402
from uffd import _frame  # noqa: E402

BLOCK = 65536
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def histogram(**counts):
    return {"counts": [counts.get(f"k{k}", 0) for k in range(40)], "n": 0, "p50_ns": 0, "p99_ns": 0}


def stats(**numbers):
    return {**uffd.Stats().as_dict(), "queue": histogram(), "fill": histogram(), "resolve": histogram(), **numbers}


def region(number=1, cells=64, **values):
    resident = [cell / max(1, cells - 1) for cell in range(cells)]
    about = {"id": number, "name": f"region {number}", "nbytes": cells * BLOCK, "block_bytes": BLOCK, "mode": "c",
             "delivery": "thread", "backing": "anon", "blocks": cells, "resident_blocks": cells // 2,
             "resident_bytes": cells * BLOCK // 2, "dirty_blocks": 1, "dirty_bytes": BLOCK, "stats": stats(),
             "map": {"blocks_per_cell": 1, "resident": resident, "dirty": [0.0] * (cells - 1) + [1.0] * (cells > 0)}}
    return {**about, **values}


def figures(regions, moment_ns=10**9, **engine):
    about = {"closed": False, "workers": 2, "fills_whole": False, "budget_bytes": None, "pinned_bytes": None,
             "resident_bytes": sum(one["resident_bytes"] for one in regions), "stats": stats()}
    return {"format": 1, "pid": 4242, "monotonic_ns": moment_ns, "engine": {**about, **engine}, "regions": regions}


def drawn(*taken, columns=80, lines=24, encoding="utf-8"):
    """The lines of a frame after these figures."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=columns, height=lines or 25, highlight=False)
    watch = _frame.Watch("/run/socket", console)
    for one in taken:
        watch.take(one)
    console.print(watch.frame(lines))
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()


# A frame


@pytest.mark.parametrize("columns, lines", [(80, 24), (200, 60), (110, 30), (60, 15), (40, 10)])
@pytest.mark.parametrize("count", [0, 1, 3, 100])
@pytest.mark.parametrize("cells", [1, 21, 4096])
def test_a_frame_fits(columns, lines, count, cells):
    """Goal: on no screen is anything cut at the bottom or broken over lines."""
    regions = [region(number, cells) for number in range(count)]
    shown = drawn(figures(regions), figures(regions, 2 * 10**9), columns=columns, lines=lines)
    assert len(shown) <= lines
    assert all(len(line) <= columns for line in shown)
    if columns >= 60:
        assert "pid 4242" in shown[0]
    if count == 100:
        assert any("more, less busy" in line for line in shown)
    if count == 0:
        assert "no region is open" in shown[-1]


def test_rates_and_latencies_are_those_of_the_interval():
    before = region(stats=stats(faults_read=1000, blocks_demand=1000, fill=histogram(k10=1000)))
    now = region(stats=stats(faults_read=1500, faults_wp=100, blocks_demand=1400, blocks_prefetch=100,
                             fill=histogram(k10=1000, k20=100)))
    engine = [{"stats": {**one["stats"], "bytes_filled": size, "evicted": size // 1000, "bytes_written": size // 2}}
              for one, size in ((before, 0), (now, 5_000_000))]
    shown = drawn(figures([before], 10**9, **engine[0]), figures([now], 3 * 10**9, **engine[1]))
    row = next(line for line in shown if line.startswith("region 1"))
    assert re.search(r" 300 +250 +0 +1\.57 ms +2\.09 ms$", row), row
    now_line = next(line for line in shown if line.startswith("now"))
    assert "faults 300/s" in now_line
    assert "filled 2.50 MB/s" in now_line
    assert "evicted 2.50k/s" in now_line
    assert "written 1.25 MB/s" in now_line


def test_the_same_figures_twice_change_nothing():
    one, two = (figures([region(stats=stats(faults_read=count))], moment, stats=stats(faults_read=count))
                for count, moment in ((0, 10**9), (500, 2 * 10**9)))
    assert drawn(one, two, two)[2] == drawn(one, two)[2]
    assert "500/s" in drawn(one, two, two)[2]


def test_the_budget():
    line = drawn(figures([region()], budget_bytes=3 * 10**6, resident_bytes=1_500_000, pinned_bytes=1000))[1]
    assert line.startswith("budget")
    assert "1.50 MB of 3.00 MB" in line
    assert "pinned 1.00 kB" in line
    bar = re.search("[█░]+", line)[0]
    assert abs(bar.count("█") - bar.count("░")) <= 1
    assert "no budget" in drawn(figures([region()]))[1]


def test_the_map_shows_each_block():
    """Goal: a single resident block is seen in a large region, and a single missing one."""
    one = region(map={"blocks_per_cell": 9, "resident": [0.0] * 2000 + [0.0001] + [0.0] * 2000, "dirty": [0.0] * 4001})
    lines = drawn(figures([one]))
    last = [line for line in lines if set(line) <= set("·░▒▓█") and line]
    assert "".join(last).count("░") == 1
    assert set("".join(last)) == {"·", "░"}
    one["map"]["resident"] = [1.0] * 2000 + [0.9999] + [1.0] * 2000
    last = [line for line in drawn(figures([one])) if set(line) <= set("·░▒▓█") and line]
    assert "".join(last).count("▓") == 1
    assert set("".join(last)) == {"█", "▓"}


def test_the_busiest_region_is_mapped():
    quiet, busy = region(1, resident_bytes=10**9), region(2)
    later = region(2, stats=stats(faults_read=100))
    lines = drawn(figures([quiet, busy]), figures([quiet, later], 2 * 10**9))
    assert any(line.startswith("region 2") and "resident" in line for line in lines)
    assert not any(line.startswith("region 1") and "resident" in line for line in lines)


def test_names_can_not_speak_to_the_terminal():
    """Goal: neither escape sequences nor rich's own markup in names are obeyed."""
    text = "\n".join(drawn(figures([region(name="\x1b]0;title\x07[red]x[/]\r\n\x9b2J")]), columns=120))
    assert "[red]x[/]" in text
    assert not CONTROL.search(text)
    assert "\x9b" not in text


def test_a_terminal_of_ascii():
    text = "\n".join(drawn(figures([region()]), figures([region()], 2 * 10**9), encoding="ascii"))
    assert "budget" in text or "resident" in text
    assert "#" in text


def test_words_for_numbers():
    assert [_rates.bytes_text(n) for n in (None, 0, 999, 1000, 65536, 999_600, 1.07e9, 1 << 40, 3e18)] == \
        ["-", "0 B", "999 B", "1.00 kB", "65.5 kB", "1.00 MB", "1.07 GB", "1.10 TB", "3000 PB"]
    assert [_rates.count_text(n) for n in (0, 0.4, 12, 12_345, 4.2e6)] == ["0", "0", "12", "12.3k", "4.20M"]
    assert [_rates.time_text(n) for n in (0, 33, 33_400, 1.57e6, 2e9)] == ["-", "33 ns", "33.4 us", "1.57 ms", "2.00 s"]


# The command


@pytest.fixture
def tmp_path():
    """In place of pytest's: a socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="s-") as folder:
        yield Path(folder)


@pytest.fixture
def served(engine, tmp_path):
    """An engine with a region, at a path."""
    with uffd.Region(20 * BLOCK, providers.Zero(), engine=engine, name="the table") as made:
        made.populate((0, 10 * BLOCK))
        engine.serve(tmp_path / "s")
        yield str(tmp_path / "s")


def run_top(*arguments, **options):
    return subprocess.run([sys.executable, "-P", "-m", "uffd", "top", *arguments], capture_output=True, text=True,
                          timeout=40 * deadline_scale(), check=False, **options)


def test_once(served):
    done = run_top(served, "--once", "--interval", "0.2", env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("uffd top")
    assert f"pid {os.getpid()}" in lines[0]
    assert any(re.match(r"the table +1\.31 MB +655 kB", line) for line in lines)
    assert any("50.0 % resident" in line for line in lines)
    assert not CONTROL.search(done.stdout)


def test_json_once_and_in_lines(served):
    done = run_top(served, "--once", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["regions"][0]["name"] == "the table"
    process = subprocess.Popen([sys.executable, "-P", "-m", "uffd", "top", served, "--json", "--interval", "0.1"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    moments = [json.loads(process.stdout.readline())["monotonic_ns"] for _ in range(3)]
    assert moments == sorted(moments)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (0, "")


def one_line(capsys, *arguments):
    """What `uffd top` says on stderr when it fails."""
    code = main(["top", *arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    return err


def test_nobody_there(tmp_path, capsys):
    path = str(tmp_path / "s")
    assert "nobody listens here" in one_line(capsys, path, "--once")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    assert "nobody listens here" in one_line(capsys, path)
    assert path in one_line(capsys, path, "--json")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in one_line(capsys, str(tmp_path / "file"))
    assert "path too long" in one_line(capsys, "/" + "x" * 200)
    assert "--interval must be" in one_line(capsys, path, "--interval", "0.01")
    assert "--interval must be" in one_line(capsys, path, "--interval", "nan")


@contextlib.contextmanager
def foreign(path, answer, keep_open=False):
    """A server that gives each client this answer, whatever it asks."""
    kept = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with contextlib.suppress(OSError):
                        client.sendall(answer)
                    kept.append(client) if keep_open else client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for client in kept:
                client.close()


HTTP = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s"


FOREIGN = [
    (b"", "not the socket"), (b"SSH-2.0-OpenSSH_9\r\n", "not the socket"), (b"\x00" * 1000, "not the socket"),
    (HTTP % (2, b"{}"), "not the socket"), (HTTP % (5, b"hello"), "not the socket"),
    (HTTP % (2, b"[]"), "not the socket"), (HTTP % (100, b"{"), "not the socket"),
    (b"HTTP/1.0 404 Not Found\r\n\r\n", "status 404"), (HTTP % (26, b'{"format": 7, "engine": 1}'), "format 7"),
    (b"HTTP/1.0 503 x\r\n\r\n8 clients\n", "8 clients"),
    (b"HTTP/1.0 200 OK\r\n" + b"a: b\r\n" * 1000 + b"\r\n", "not the socket")]


@pytest.mark.parametrize("number", range(len(FOREIGN)))
def test_somebody_else_listens(tmp_path, capsys, number):
    answer, text = FOREIGN[number]
    with foreign(str(tmp_path / "s"), answer):
        assert text in one_line(capsys, str(tmp_path / "s"), "--once")


def test_an_answer_that_does_not_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_top, "_ANSWER_S", 0.5)
    with foreign(str(tmp_path / "s"), b"HTTP/1.0 200 OK\r\n\r\n{", keep_open=True):
        began = time.monotonic()
        assert "no answer within 0.5 s" in one_line(capsys, str(tmp_path / "s"), "--once")
        assert time.monotonic() - began < 5
    monkeypatch.setattr(_top, "_ANSWER_BYTES", 1000)
    with foreign(str(tmp_path / "t"), HTTP % (2000, b"x" * 2000)):
        assert "more than 1000 bytes" in one_line(capsys, str(tmp_path / "t"), "--once")


def test_without_rich(served, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert 'pip install "pyuffd[ui]"' in one_line(capsys, served, "--once")
    assert main(["top", served, "--once", "--json"]) == 0


# On a terminal


class Terminal:
    """`uffd top` on a terminal of 80x24."""

    def __init__(self, *arguments):
        leader, follower = pty.openpty()
        self.fd = leader
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen([sys.executable, "-P", "-m", "uffd", "top", *arguments], stdin=follower,
                                        stdout=follower, stderr=follower, env=environment, start_new_session=True)
        os.close(follower)
        self.text = ""

    def read_until(self, wanted, timeout_s=20.0):
        """wanted: a text, or None for the end."""
        deadline = time.monotonic() + timeout_s * deadline_scale()
        while wanted is None or wanted not in self.text:
            assert time.monotonic() < deadline, f"no {wanted!r} in {self.text[-2000:]!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.fd, 65536).decode("utf-8", "replace")
                except OSError:                  # EIO: the other end is closed
                    break
        return self.text

    def end(self):
        self.read_until(None)
        os.close(self.fd)
        return self.process.wait(10)


def test_live_until_ctrl_c(served):
    """Goal: the screen is taken, drawn, given back with its cursor; Ctrl-C is the way to end it, and no error."""
    terminal = Terminal(served, "--interval", "0.1")
    terminal.read_until("the table")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 0
    assert terminal.text.index("\x1b[?1049h") < terminal.text.index("the table") < terminal.text.index("\x1b[?1049l")
    assert terminal.text.rstrip().endswith("\x1b[?25h")
    assert "Traceback" not in terminal.text


def test_live_until_the_engine_is_gone(tmp_path):
    engine = uffd.Engine(workers=1)
    with uffd.Region(BLOCK, providers.Zero(), engine=engine, name="short-lived"):
        engine.serve(tmp_path / "s")
        terminal = Terminal(str(tmp_path / "s"), "--interval", "0.1")
        terminal.read_until("short-lived")
    engine.close()
    assert terminal.end() == 0
    assert "is gone" in terminal.text.partition("\x1b[?1049l")[2]


def test_a_program_that_is_stopped(tmp_path):
    """Goal: that no answer comes is said on the screen within seconds, and the view goes on when it comes again."""
    program = subprocess.Popen([sys.executable, "-P", "-c", "import sys, uffd; engine = uffd.Engine(workers=1); "
                                "engine.serve(sys.argv[1]); print(flush=True); sys.stdin.read()", str(tmp_path / "s")],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdout.readline() == b"\n"
    terminal = Terminal(str(tmp_path / "s"), "--interval", "0.1")
    terminal.read_until("no region is open")
    program.send_signal(signal.SIGSTOP)
    terminal.read_until("no news")
    terminal.text = ""
    program.send_signal(signal.SIGCONT)
    terminal.read_until("evicted")             # that line is there again
    program.communicate(timeout=20)
    assert terminal.end() == 0
    assert "is gone" in terminal.text
    assert program.returncode == 0
