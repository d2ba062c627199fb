"""Provider hosts where something runs out or is in the way: sockets, tables, threads, memory, patience."""

import os
import signal
import time

import numpy as np
import pytest
import uffd
from support import matrix, shim
from support.hosted import BLOCK, Keeps, Pattern, fill_pattern, lines
from support.pattern import pattern
from support.scripts import run_script

pytestmark = pytest.mark.skipif(uffd._core.mode()[0] == "none", reason="no userfaultfd, no provider hosts")


def wait_until(condition, what, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def sessions(engine, count, log=None):
    """Providers that a host has opened, without regions."""
    from uffd import _hosting

    provider = Pattern(BLOCK, log)
    return [_hosting.begin(engine, provider, name="many", block_bytes=BLOCK, retries=0, timeout_s=5)[0]
            for _ in range(count)]


@pytest.mark.deadline(120)
def test_a_flood_of_closes_is_told(tmp_path):
    """Goal: regions that are closed while the host does not listen are all closed there, once it does.
    Method: the host is stopped, more sessions end than its socket has room for, and it goes on."""
    log, count = str(tmp_path / "log"), 1500
    with uffd.Engine(hosts=1) as engine:
        fillers = sessions(engine, count, log)
        (pid,) = engine._threads.host_pids()
        os.kill(pid, signal.SIGSTOP)
        for filler in fillers:
            engine._threads.end_session(filler)
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: sum(line.startswith("close") for line in lines(log)) == count, "closes were lost", 60)
        (last,) = sessions(engine, 1)
        engine._threads.end_session(last)


@pytest.mark.deadline(120)
def test_more_sessions_than_a_table_begins_with():
    """Goal: 5,000 regions over providers in Python are none too many for a host; a second round of them neither."""
    with uffd.Engine(hosts=1) as engine:
        for count in (5000, 100):
            fillers = sessions(engine, count)
            with uffd.Region(BLOCK, fill_pattern, engine=engine, timeout_s=5) as region:
                region.populate()
            for filler in fillers:
                engine._threads.end_session(filler)


def mappings(pid, name):
    with open(f"/proc/{pid}/maps") as file:
        return [line for line in file if name in line]


def test_kept_shared_pages_leave_no_mappings():
    """Goal: a provider that keeps each `out` of a shared region holds these pages and no mapping of the region for
    each; what it writes later reaches nobody; nothing is left when the region is closed."""
    where = next((where for where in matrix.WHERES if where.options["backing"] == "shared" and
                  where.unavailable() is None), None)
    if where is None:
        pytest.skip("no shared backing here")
    with uffd.Engine(hosts=1) as engine:
        region = uffd.Region(64 * BLOCK, Keeps(64 * BLOCK), engine=engine, readahead_bytes=0, **where.options)
        array = region.array()
        for b in range(64):
            assert array[b * BLOCK] == pattern(b * BLOCK, 1)[0]
        (pid,) = engine._threads.host_pids()
        assert len(mappings(pid, "memfd:uffd (")) <= 3
        time.sleep(0.6)
        assert np.array_equal(array, pattern(0, 64 * BLOCK))
        del array
        region.close()
        wait_until(lambda: not mappings(pid, "memfd:uffd ("), "mappings are left")


def buffer_bytes():
    """Of the memory that this process shares with provider hosts."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if "memfd:uffd-host" in os.readlink(f"/proc/self/fd/{name}"):
                found += 512 * os.fstat(int(name)).st_blocks
        except OSError:
            pass
    return found


def test_buffers_of_large_blocks_are_given_back():
    """Goal: what requests of 16 MiB used is free again when they were not used for a while; the next ones are right."""
    size = 6 * (16 << 20)
    with uffd.Engine(hosts=1) as engine:
        region = uffd.Region(size, Pattern(size, concurrency=3), engine=engine, block_bytes=16 << 20)
        region.populate((0, 3 * (16 << 20)))
        assert buffer_bytes() >= 16 << 20
        wait_until(lambda: buffer_bytes() < 8 << 20, "buffers stay")
        region.populate()
        array = region.array()
        for start in range(0, size, 1 << 24):
            assert np.array_equal(array[start:start + (1 << 20)], pattern(start, 1 << 20))
        del array
        region.close()
        wait_until(lambda: buffer_bytes() < 8 << 20, "buffers stay without regions")


HANGS = """
import multiprocessing, stat
from support import hosted
from uffd import _hosting
_hosting.START_S = {start_s}
with open("python", "w") as file:
    file.write(f"#!/bin/sh\\nif {when}; then exec sleep 1000; fi\\nexec {{sys.executable}} \\"$@\\"\\n")
os.chmod("python", 0o755)
multiprocessing.set_executable(os.path.abspath("python"))
begin = time.monotonic()
"""


@pytest.mark.deadline(120)
def test_a_host_that_hangs_at_its_start_is_replaced():
    """Goal: one that never takes a request is stopped, and the next one opens the provider; long before time_out_s."""
    done = run_script(HANGS.format(start_s=4.0, when="mkdir first 2>/dev/null") + """
r = region(BLOCK, hosted.Pattern(BLOCK), timeout_s=300)
r.populate()
assert (r.array() == pattern(0, BLOCK)).all()
assert time.monotonic() - begin < 60
os._exit(0)
""", 80).check()
    assert "was not ready in time and was stopped" in done.stderr


@pytest.mark.deadline(120)
def test_hosts_that_all_hang_at_their_start():
    """Goal: after four of them Region() raises, and says so."""
    done = run_script(HANGS.format(start_s=0.2, when="true") + """
try:
    region(BLOCK, hosted.Pattern(BLOCK), timeout_s=300)
except uffd.ProviderError as error:
    assert error.errno == errno.ECHILD, error
else:
    raise AssertionError("made")
assert time.monotonic() - begin < 60
os._exit(0)
""", 80).check()
    assert done.stderr.count("was not ready in time and was stopped") == 4
    assert "can't be started" in done.stderr


@pytest.mark.parametrize("work", ["populate", "touch", "readahead"])
def test_no_thread_for_a_request(where, work):
    """Goal: where the system gives no more threads, those that are there do the work; right bytes, and an end.
    Method: pthread_create fails from here on; the provider is slow, so that no worker waits for it awake."""
    run_script(f"""
from support import hosted, shim
r = region(64 * BLOCK, hosted.Slow(0.003, 64 * BLOCK), readahead_bytes=None if {work!r} == "readahead" else 0)
rule = shim.Rule("pthread_create", 1, -1, errno.EAGAIN)
if {work!r} == "populate":
    r.populate(timeout_s=15)
assert (r.array() == pattern(0, 64 * BLOCK)).all()
assert rule.fired or WHERE.options["delivery"] == "inline"
shim.clear()
r.prefetch().wait(15)
os._exit(0)
""", 40, where=where, preload=shim.path()).check()
