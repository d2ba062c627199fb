"""Engine.serve: what is told at its socket, to whom, for how long; and what no client can do to the program."""

import errno
import gc
import http.client
import json
import os
import signal
import socket
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest
import uffd
from support import fallback, matrix
from support.native import controlled
from support.pattern import pattern
from support.scripts import run_script
from uffd import monitor, providers

PAGE = uffd._core.PAGE_BYTES
BLOCK = 65536
NBYTES = 20 * BLOCK + 777


@pytest.fixture
def tmp_path():
    """In place of pytest's: a socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="s-") as folder:
        yield Path(folder)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "socket")


def connect(path, timeout_s=10.0):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(timeout_s)
    client.connect(path)
    return client


def read_all(client):
    pieces = []
    try:
        while piece := client.recv(1 << 16):
            pieces.append(piece)
    except ConnectionResetError:  # it was closed with something of ours unread
        pass
    return b"".join(pieces)


def ask(path, target="/stats", method="GET", headers=""):
    """(status, headers, body) of a whole answer."""
    with connect(path) as client:
        client.sendall(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())
        head, _, body = read_all(client).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:]), body


def stats_of(path):
    status, _, body = ask(path)
    assert status == 200, body
    return json.loads(body)


def fresh_stats(path):
    """Gathered after this call began: figures are told again for a while."""
    deadline, since = time.monotonic() + 10, time.monotonic_ns()
    while (told := stats_of(path))["monotonic_ns"] < since:
        assert time.monotonic() < deadline, "the same figures for 10 s"
        time.sleep(0.02)
    return told


def nobody_listens(path):
    try:
        connect(path).close()
    except (FileNotFoundError, ConnectionRefusedError):
        return True
    return False


def dead_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)


# What is told


def test_figures_are_those_of_engine_and_regions(path, engine, make):
    """Goal: sizes, counts and the map are exact, the short last block included, and asking touches nothing."""
    provider, _ = controlled()
    region = make(NBYTES, provider, name="exact", readahead_bytes=0)
    with engine.serve(path) as served:
        assert served.path == path
        assert fresh_stats(path)["regions"][0]["resident_blocks"] == 0
        region.populate((2 * BLOCK, 4 * BLOCK))
        region.populate((NBYTES - 1, NBYTES))
        array = region.array()
        array[3 * BLOCK] = 1
        told = fresh_stats(path)
    dirty = region.dirty()
    about = told["regions"][0]
    resident = [float(block in (2, 3, 20)) for block in range(21)]
    assert about["map"] == {"blocks_per_cell": 1, "resident": resident, "dirty": dirty.astype(float).tolist()}
    assert {name: about[name] for name in ("name", "nbytes", "block_bytes", "mode", "blocks", "resident_blocks",
                                           "resident_bytes", "dirty_blocks")} == \
        {"name": "exact", "nbytes": NBYTES, "block_bytes": BLOCK, "mode": "c", "blocks": 21, "resident_blocks": 3,
         "resident_bytes": 2 * BLOCK + 777, "dirty_blocks": int(dirty.sum())}
    assert about["stats"] == region.stats().as_dict()
    assert told["engine"]["stats"] == engine.stats().as_dict()
    assert told["engine"]["resident_bytes"] == 2 * BLOCK + PAGE      # an engine counts whole pages
    assert (told["format"], told["pid"], told["engine"]["workers"]) == (1, os.getpid(), 2)
    assert region.resident().sum() == 3
    del array


def test_what_is_pinned_is_told(path, engine, make):
    """Goal: the bytes that are pinned, in both formats, and none of them afterwards."""
    pytest.importorskip("prometheus_client")
    if matrix.filled_whole():
        pytest.skip("the fallback counts no pins")
    region = make(NBYTES, providers.Zero(), block_bytes=BLOCK)
    with engine.serve(path):
        assert fresh_stats(path)["engine"]["pinned_bytes"] == 0
        with region.pinned((BLOCK, 3 * BLOCK)):
            assert fresh_stats(path)["engine"]["pinned_bytes"] == 2 * BLOCK
            assert f"uffd_pinned_bytes {float(2 * BLOCK)}".encode() in ask(path, "/metrics")[2]
        assert fresh_stats(path)["engine"]["pinned_bytes"] == 0


@pytest.mark.parametrize("blocks", [1, 4095, 4097, 20000])
def test_a_map_has_a_bounded_number_of_cells(path, engine, blocks):
    """Goal: fractions are 0 only for none and 1 only for all, at any size. Method: one block resident; then one not."""
    with uffd.Region(blocks * PAGE, providers.Zero(), engine=engine, block_bytes=PAGE) as region:
        engine.serve(path)
        region.populate((0, 1))
        about = fresh_stats(path)["regions"][0]
        per_cell, cells = about["map"]["blocks_per_cell"], about["map"]["resident"]
        assert len(cells) == len(about["map"]["dirty"]) == -(-blocks // per_cell) <= 4096
        assert (cells[0] == 1) == (per_cell == 1)
        assert cells[0] > 0
        assert not any(cells[1:])
        if blocks > 1:
            region.populate((PAGE, 2 * PAGE))
            region.populate((2 * PAGE, (blocks - 1) * PAGE + (blocks == 4095)))
            last = fresh_stats(path)["regions"][0]["map"]["resident"]
            assert set(last[:-1]) == {1.0}


def test_maps_of_many_regions_are_small_together(path, engine):
    """Goal: an answer does not grow with regions times cells; a region keeps its id; a closed one is no longer told."""
    regions = [uffd.Region(5000 * PAGE, providers.Zero(), engine=engine, block_bytes=PAGE) for _ in range(40)]
    engine.serve(path)
    told = fresh_stats(path)["regions"]
    assert len({about["id"] for about in told}) == 40
    assert sum(len(about["map"]["resident"]) for about in told) <= 1 << 14
    regions.pop(7).close()
    again = {about["id"] for about in fresh_stats(path)["regions"]}
    assert len(again) == 39
    assert again < {about["id"] for about in told}


def test_figures_are_shared_while_fresh(path, engine):
    """Goal: clients that ask in a loop can't keep the program busy, neither with gathering nor with answering."""
    engine.serve(path)
    began = time.monotonic()
    moments = {stats_of(path)["monotonic_ns"] for _ in range(30)}
    took_s = time.monotonic() - began
    assert len(moments) <= 1 + took_s / 0.1
    assert took_s >= 29 * 0.005
    fresh_stats(path)


def test_a_name_may_have_any_bytes(path, engine):
    name = "a\"b\\c\n\x1b[31m{é}" + os.fsdecode(b"\xff")
    with uffd.Region(BLOCK, providers.Zero(), engine=engine, name=name):
        engine.serve(path)
        assert stats_of(path)["regions"][0]["name"].startswith("a\"b\\c\n\x1b[31m{é}")
        assert ask(path, "/metrics")[0] == 200


def test_it_answers_while_a_touch_waits(path, engine, make):
    """Goal: a fault that is not served for a while delays no answer."""
    provider, control = controlled()
    control.close_gate(0, BLOCK)
    region = make(4 * BLOCK, provider, retries=0)
    fetch = region.prefetch((0, 1))
    engine.serve(path)
    assert fresh_stats(path)["regions"][0]["resident_blocks"] == 0
    control.open_gate()
    fetch.wait(10)
    assert fresh_stats(path)["regions"][0]["resident_blocks"] == 1


def test_an_engine_that_fills_whole(path, monkeypatch):
    """Goal: the fallback tells the same, of regions that are all there."""
    for _ in fallback.ask_for_it(monkeypatch):
        with uffd.Engine() as engine, uffd.Region(NBYTES, providers.Zero(), engine=engine, mode="r"):
            assert engine.fills_whole
            engine.serve(path)
            told = fresh_stats(path)
            assert told["engine"]["fills_whole"]
            assert told["engine"]["resident_bytes"] == told["regions"][0]["resident_bytes"] == NBYTES
            assert set(told["regions"][0]["map"]["resident"]) == {1.0}
            assert told["regions"][0]["dirty_blocks"] == 0
        assert nobody_listens(path)


# Prometheus


def samples(body):
    parser = pytest.importorskip("prometheus_client.parser")
    return {(sample.name, *sorted(sample.labels.items())): sample.value
            for family in parser.text_string_to_metric_families(body.decode()) for sample in family.samples}


def test_metrics_are_what_stats_are(path, engine):
    """Goal: Prometheus's own parser reads it; regions of one name are one series; histograms are cumulative."""
    pytest.importorskip("prometheus_client")
    options = {"engine": engine, "readahead_bytes": 0}
    with uffd.Region(NBYTES, providers.Zero(), name="twice", **options) as one, \
            uffd.Region(NBYTES, providers.Zero(), name="twice", **options) as two, \
            uffd.Region(BLOCK, providers.Zero(), name="once", **options):
        one.populate((0, 3 * BLOCK))
        two.populate((0, 2 * BLOCK))
        engine.serve(path)
        status, headers, body = ask(path, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    found = samples(body)
    assert body.count(b'uffd_region_resident_bytes{region="twice"}') == 1
    assert found["uffd_region_resident_bytes", ("region", "twice")] == 5 * BLOCK
    assert found["uffd_region_size_bytes", ("region", "once")] == BLOCK
    assert found["uffd_region_blocks_prefetch_total", ("region", "twice")] == 5
    assert found["uffd_resident_bytes",] == 5 * BLOCK
    stats = engine.stats()
    for name, value in stats.as_dict().items():
        if isinstance(value, dict):
            buckets = sorted((float(dict(key[1:])["le"]), count) for key, count in found.items()
                             if key[0] == "uffd_stage_seconds_bucket" and ("stage", name) in key)
            counts = [count for _, count in buckets]
            assert counts == sorted(counts)
            assert counts[-1] == value["n"]
            assert buckets[-1][0] == float("inf")
            assert buckets[0][0] == pytest.approx(2e-9)
        else:
            assert found[f"uffd_{name}_total",] == value


def test_metrics_in_the_format_that_is_accepted(path, engine):
    openmetrics = pytest.importorskip("prometheus_client.openmetrics.parser")
    with uffd.Region(BLOCK, providers.Zero(), engine=engine):
        engine.serve(path)
        _, headers, body = ask(path, "/metrics", headers="Accept: application/openmetrics-text; version=1.0.0\r\n")
    assert "openmetrics" in headers["Content-Type"]
    assert len(list(openmetrics.text_string_to_metric_families(body.decode()))) > 10


def test_metrics_without_the_library():
    run_script("""
import socket
sys.modules["prometheus_client"] = None
engine = uffd.Engine(workers=1)
engine.serve("s")
for target, status, text in (("metrics", b"501", b'pip install "pyuffd[prometheus]"'), ("stats", b"200", b"regions")):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect("s")
        client.sendall(f"GET /{target} HTTP/1.0\\r\\n\\r\\n".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.split()[1] == status and text in answer, answer
""").check()


# HTTP


@pytest.mark.parametrize("target, method, status", [
    ("/", "GET", 200), ("/nothing", "GET", 404), ("/stats?x=1", "GET", 200), ("/stats", "POST", 501),
    ("/stats", "HEAD", 200), ("/../stats", "GET", 404), ("http://localhost/stats", "GET", 404)])
def test_targets(path, engine, target, method, status):
    engine.serve(path)
    answer = ask(path, target, method)
    assert answer[0] == status
    assert (not answer[2]) == (method == "HEAD")
    if method != "HEAD":
        assert int(answer[1]["Content-Length"]) == len(answer[2])


def test_the_librarys_client(path, engine):
    """Goal: it is HTTP, for others than these tests."""
    engine.serve(path)
    connection = http.client.HTTPConnection("localhost")
    connection.sock = connect(path)
    connection.request("GET", "/stats")
    assert json.loads(connection.getresponse().read())["pid"] == os.getpid()
    connection.close()


GARBAGE = [b"\r\n\r\n", b"\x00" * 100 + b"\r\n\r\n", bytes(range(256)) * 8 + b"\n\n", b"GET\r\n\r\n",
           b"GET /stats\r\n\r\n", b"GET /stats HTTP/9.9\r\n\r\n", b"GET /stats HTTP/x\r\n\r\n",
           b"GET / HTTP/1.0\r\n" + b"a: b\r\n" * 500 + b"\r\n", b"GET /" + b"x" * 200_000,
           b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
           b"GET /stats HTTP/1.0\r\n: \r\n \r\nx\r\n\r\n", b"SUMMARIZE /\xff\xfe HTTP/1.0\r\n\r\n"]


@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_garbage(path, engine, number, capfd):
    """Goal: whatever comes, the next client is served, and nothing is printed into the program."""
    engine.serve(path)
    with connect(path) as client:
        try:
            client.sendall(GARBAGE[number])
            client.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):  # it had read enough
            pass
        answer = read_all(client)
    assert not answer or answer.startswith(b"HTTP/1.") or b"\n" in answer
    assert stats_of(path)["pid"] == os.getpid()
    assert capfd.readouterr() == ("", "")


def test_a_head_that_is_too_long(path, engine):
    engine.serve(path)
    with connect(path) as client:
        client.sendall(b"GET /stats HTTP/1.0\r\ncookie: " + b"x" * 9000)
        assert b" 431 " in read_all(client).splitlines()[0]


# Clients that are slow, or many


def test_a_client_that_drips(path, engine, monkeypatch):
    """Goal: a byte now and then keeps no connection beyond its time, which is that of all of it; others are served."""
    monkeypatch.setattr(monitor, "_TALK_S", 0.6)
    engine.serve(path)
    began = time.monotonic()
    with connect(path) as client:
        while time.monotonic() - began < 10:
            try:
                client.sendall(b"G")
            except (BrokenPipeError, ConnectionResetError):
                break
            assert stats_of(path)
            time.sleep(0.05)
        took = time.monotonic() - began
    assert 0.5 < took < 5


def test_a_client_that_does_not_read(path, engine, monkeypatch):
    """Goal: an answer larger than the socket's buffers waits for its client only so long."""
    monkeypatch.setattr(monitor, "_TALK_S", 0.6)
    regions = [uffd.Region(BLOCK, providers.Zero(), engine=engine) for _ in range(600)]
    served = engine.serve(path)
    with connect(path) as client:
        client.sendall(b"GET /stats HTTP/1.0\r\n\r\n")
        deadline = time.monotonic() + 10
        while served._connections or time.monotonic() < deadline - 9.8:
            assert time.monotonic() < deadline, "still waiting for it"
            time.sleep(0.02)
        got = read_all(client)
    assert 0 < len(got) < len(ask(path)[2])
    for region in regions:
        region.close()


def test_too_many_clients(path, engine):
    """Goal: the ninth is told so at once, and not before; when one goes, the next is served."""
    served = engine.serve(path)
    clients = [connect(path) for _ in range(8)]
    deadline = time.monotonic() + 10
    while len(served._connections) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    threads = threading.active_count()
    with connect(path) as ninth:
        answer = read_all(ninth)
    assert answer.startswith(b"HTTP/1.0 503")
    assert b"8 clients" in answer
    assert threading.active_count() == threads
    clients.pop().close()
    while len(served._connections) == 8:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert stats_of(path)
    for client in clients:
        client.close()


def test_regions_come_and_go_meanwhile(path, engine):
    """Goal: figures are whole and right while other threads make, use and close regions."""
    engine.serve(path)
    stop, failed = threading.Event(), []

    def churn(number):
        try:
            while not stop.is_set():
                with uffd.Region(8 * BLOCK, providers.Zero(), engine=engine, name=f"region {number}") as region:
                    region.populate((0, 2 * BLOCK))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        for about in stats_of(path)["regions"]:
            assert about["resident_blocks"] in range(3)
            assert about["resident_blocks"] == sum(about["map"]["resident"])
        assert ask(path, "/metrics")[0] in (200, 501)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed


# Its place


def test_it_is_for_its_user_alone(path, engine):
    """Method: with a umask that would leave it open to all."""
    umask = os.umask(0)
    try:
        engine.serve(path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    assert stat.S_ISSOCK(os.lstat(path).st_mode)


def test_a_path_in_use_is_left_alone(tmp_path, engine):
    """Goal: nothing is removed but dead sockets of ours. Method: whatever else may be there."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    dead_socket(str(tmp_path / "dead"))
    (tmp_path / "link to a dead socket").symlink_to(tmp_path / "dead")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(str(tmp_path / "datagrams"))
        for name in ("file", "folder", "link", "fifo", "link to a dead socket", "datagrams"):
            before = os.lstat(tmp_path / name)
            with pytest.raises(FileExistsError, match="choose another path") as info:
                engine.serve(tmp_path / name)
            assert info.value.filename == str(tmp_path / name)
            assert os.lstat(tmp_path / name) == before
    assert (tmp_path / "file").read_text() == "precious"


def test_a_live_socket_is_named_by_its_process(path, engine):
    engine.serve(path)
    with pytest.raises(FileExistsError, match=f"process {os.getpid()} listens"):
        engine.serve(path)
    assert stats_of(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket to somebody else")
def test_a_dead_socket_of_somebody_else(path, engine):
    dead_socket(path)
    os.chown(path, 65534, 65534)
    with pytest.raises(FileExistsError, match="user 65534"):
        engine.serve(path)
    assert os.path.lexists(path)


def test_a_dead_socket_is_replaced(path, engine):
    dead_socket(path)
    before = os.lstat(path).st_ino, os.lstat(path).st_ctime_ns
    engine.serve(path)
    assert (os.lstat(path).st_ino, os.lstat(path).st_ctime_ns) != before
    assert stats_of(path)


def test_many_start_over_one_dead_socket(path):
    """Goal: one of them gets it, and keeps it. Method: threads at a barrier, an engine each, often."""
    engines = [uffd.Engine(workers=1) for _ in range(4)]
    for _ in range(15):
        dead_socket(path)
        start, served, refused = threading.Barrier(4), [], []

        def attempt(engine, start=start, served=served, refused=refused):
            start.wait()
            try:
                served.append(engine.serve(path))
            except FileExistsError as error:
                refused.append(error)

        threads = [threading.Thread(target=attempt, args=(engine,)) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(served), len(refused)) == (1, 3)
        assert stats_of(path)
        served[0].close()
    for engine in engines:
        engine.close()


def test_paths_that_can_not_be(tmp_path, engine):
    with pytest.raises(OSError, match="107 bytes at most") as info:
        engine.serve(tmp_path / ("x" * 120))
    assert info.value.errno == errno.ENAMETOOLONG
    with pytest.raises(FileNotFoundError):
        engine.serve(tmp_path / "no" / "folder")
    assert list(engine._monitors) == []


def test_a_relative_path_is_kept_whole(tmp_path, engine, monkeypatch):
    monkeypatch.chdir(tmp_path)
    served = engine.serve("here")
    monkeypatch.chdir("/")
    assert served.path == str(tmp_path / "here")
    served.close()
    assert not (tmp_path / "here").exists()


def test_what_took_its_place_is_not_removed(path, engine):
    served = engine.serve(path)
    os.unlink(path)
    dead_socket(path)
    served.close()
    assert os.path.lexists(path)


# Its end


def test_it_ends_with_the_engine(path, tmp_path):
    """Goal: close ends all of an engine's sockets, with clients connected and asking, in a moment."""
    engine = uffd.Engine(workers=1)
    served = [engine.serve(path), engine.serve(tmp_path / "second")]
    clients = [connect(one.path) for one in served for _ in range(3)]
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 3
    for client in clients:
        assert read_all(client) == b""
        client.close()
    assert all(one.closed and nobody_listens(one.path) for one in served)
    assert not os.path.lexists(path)
    with pytest.raises(ValueError, match="closed"):
        engine.serve(path)
    served[0].close()


def test_a_close_that_fails_leaves_it(path):
    engine = uffd.Engine(workers=1)
    region = uffd.Region(NBYTES, providers.Memory(pattern(0, NBYTES).copy()), engine=engine)
    array = region.array()
    engine.serve(path)
    with pytest.raises(BufferError):
        engine.close()
    assert stats_of(path)
    with engine:
        pass  # left while an array lives
    assert nobody_listens(path)
    assert array[BLOCK] == pattern(BLOCK, 1)[0]
    del array


def test_it_ends_with_an_engine_that_nobody_has(path):
    """Goal: a socket keeps no engine alive."""
    uffd.Engine(workers=1).serve(path)
    gc.collect()
    assert nobody_listens(path)
    assert not os.path.lexists(path)


def test_a_monitor_can_be_closed_alone(path, engine):
    with engine.serve(path) as served:
        assert "socket" in repr(served)
    assert served.closed
    assert nobody_listens(path)
    engine.serve(path)
    assert stats_of(path)


def test_exit_with_clients_connected():
    """Goal: neither a silent client nor one that asks all the time holds up the end; the path is gone."""
    result = run_script(EXIT).check()
    words = result.stdout.split()
    assert words == ["answered", "gone"], result.describe()


EXIT = """
import socket
code = '''
import os, sys, uffd
from uffd import providers
engine = uffd.Engine(workers=1)
region = uffd.Region(1 << 20, providers.Zero(), engine=engine)
engine.serve("s")
print("ready", flush=True)
sys.stdin.readline()
'''
process = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
assert process.stdout.readline() == b"ready\\n"
silent = [socket.socket(socket.AF_UNIX) for _ in range(3)]
for one in silent:
    one.connect("s")
stop, answers = threading.Event(), []
def ask():
    while not stop.is_set():
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                client.connect("s")
                client.sendall(b"GET /stats HTTP/1.0\\r\\n\\r\\n")
                answers.append(client.recv(65536))
        except OSError:
            time.sleep(0.001)
thread = threading.Thread(target=ask)
thread.start()
wait_until(lambda: len(answers) > 20, "no answers")
say("answered")
began = time.monotonic()
process.stdin.close()
assert process.wait(5) == 0
assert time.monotonic() - began < 3, time.monotonic() - began
stop.set()
thread.join()
say("left there" if os.path.lexists("s") else "gone")
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left(end):
    """Goal: its socket is dead, and the next one takes the path."""
    run_script("""
pid = os.fork()
if not pid:
    uffd.Engine(workers=1).serve("s")
    engine = uffd.Engine(workers=1)
    engine.serve("s")
    with open("ready", "w"):
        pass
    time.sleep(30)
    os._exit(1)
wait_until(lambda: os.path.exists("ready"), "not ready")
os.kill(pid, int(sys.argv[1]))
assert wait_for_child(pid) == -int(sys.argv[1])
assert os.path.lexists("s")
with uffd.Engine(workers=1) as engine:
    engine.serve("s")
assert not os.path.lexists("s")
""", argv=[int(end)]).check()
