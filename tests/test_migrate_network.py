"""Migration over networks that are slow or not to be trusted: a link of 1 Gbit/s between two network namespaces, and a
tunnel with encryption."""

import json
import os
import shutil
import socket
import subprocess
import time

import pytest
import uffd
from support import matrix, netns
from support.scripts import deadline_scale, finish_script, run_script, start_script, wait_for_line

pytestmark = pytest.mark.skipif(matrix.filled_whole() or uffd.probe(self_test=False).mode != "full",
                                reason="no userfaultfd that serves the kernel's accesses")
START = "from support.migration import *\nimport json\n"
NBYTES = 48 << 20

DESTINATION = START + f"""
def waits(blocks):
    "Seconds that each touch of a block waits that has yet to come."
    found = []
    for i in blocks:
        before = time.perf_counter()
        assert a[i * 8192] == i * 8192 * 3
        found.append(time.perf_counter() - before)
    return sorted(found)
with migrate.listen("tcp://{netns.DESTINATION}:0", key=b"k") as incoming:
    print("url", incoming.url, flush=True)
    arrival = incoming.accept(30)
    a = arrival.arrays["a"]
    order = np.random.default_rng(1).permutation({NBYTES} // 65536)
    alone = waits(order[:60])
    print("alone", flush=True)
    time.sleep(0.05)
    loaded = [one for one in waits(order[60:180]) if one > 50e-6]     # others had come by then
    status = arrival.status
    arrival.wait(30)
    assert (a == filled({NBYTES})).all()
    print(json.dumps({{"alone": alone, "loaded": loaded, "status": str(status)}}))
    arrival.close()
"""

SOURCE = START + f"""
url, sign = sys.argv[1:]
with migrate.connect(url, {{"a": filled({NBYTES})}}, key=b"k", postcopy_bytes_per_s=100000) as outgoing:
    outgoing.switchover()
    wait_until(lambda: os.path.exists(sign), "the word that it goes on", 20)
    began = time.monotonic()
    outgoing._wire.limit(0, 0)
    report = outgoing.wait(30)
    print(report.blocks.pushed * 65536 / (time.monotonic() - began))
"""


@pytest.mark.deadline(90)
def test_a_requested_block_does_not_wait_behind_the_push_on_a_slow_link(tmp_path):
    """Goal: while the push fills a link of 1 Gbit/s, a touched block comes behind a few ms of it, and not behind what
    the link's queue takes (20 ms). Method: touches before the push may begin, then while it runs."""
    reason = netns.reason()
    if reason:
        pytest.skip(reason)
    with netns.two_hosts(rate="1gbit") as (one, other):
        there = start_script(DESTINATION, wrapper=other)
        wait_for_line(there, "url")
        url = (there.directory / "stdout").read_text().split()[1]
        sign = tmp_path / "sign"
        here = start_script(SOURCE, argv=(url, sign), wrapper=one)
        wait_for_line(there, "alone")
        sign.write_text("")
        told = json.loads(finish_script(there, 40).check().stdout.splitlines()[-1])
        pushed = float(finish_script(here, 40).check().stdout)
    alone, loaded = told["alone"], told["loaded"]
    p50, p50_loaded = alone[len(alone) // 2], loaded[len(loaded) // 2]
    p90_loaded, p99_loaded = (loaded[int(len(loaded) * share)] for share in (0.9, 0.99))
    print(f"p50 alone {p50 * 1e3:.2f} ms; while {pushed / 1e6:.0f} MB/s are pushed p50 {p50_loaded * 1e3:.2f} ms, p99 "
          f"{p99_loaded * 1e3:.2f} ms")
    assert told["status"] == "POSTCOPY", "the push was over before the touches were"
    # Far from what is printed, since machines that test are busy: behind the whole push it would be hundreds of ms.
    assert p50_loaded < 0.060 * deadline_scale() and p90_loaded < 0.150 * deadline_scale(), "it waited for the push"


STUNNEL = """
foreground = yes
pid =
syslog = no
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[move]
client = {client}
accept = 127.0.0.1:{accept}
connect = 127.0.0.1:{connect}
ciphers = PSK
PSKsecrets = {secrets}
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port, process):
    deadline_s = time.monotonic() + 10
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None and time.monotonic() < deadline_s, "stunnel does not listen"
        time.sleep(0.02)


def test_through_a_tunnel(tmp_path):
    """Goal: what docs/migration.md says of stunnel works, both ends on loopback without a key, broken and recovered."""
    program = os.environ.get("UFFD_STUNNEL") or shutil.which("stunnel")
    if not program:
        pytest.skip("no stunnel (on Debian: apt-get install stunnel4; UFFD_STUNNEL names another)")
    secrets = tmp_path / "psk"
    secrets.write_text("move:" + "5a" * 32 + "\n")
    secrets.chmod(0o600)
    destination, between, source = free_port(), free_port(), free_port()
    tunnels = []
    try:
        for client, accept, connect in (("no", between, destination), ("yes", source, between)):
            config = tmp_path / f"{client}.conf"
            config.write_text(STUNNEL.format(client=client, accept=accept, connect=connect, secrets=secrets))
            with open(tmp_path / f"{client}.log", "wb") as log:
                tunnels.append(subprocess.Popen([program, config], stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            wait_for_port(accept, tunnels[-1])
        run_script(START + f"""
N = 4 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    assert (arrival.arrays["0"] == filled(N)).all() and arrival.state == b"s"
    arrival.wait(20)
    arrival.close()
pid, url = start(destination, "tcp://127.0.0.1:{destination}")
with migrate.connect("tcp://127.0.0.1:{source}", [filled(N)], postcopy_bytes_per_s=20e6) as outgoing:
    outgoing.switchover(b"s")
    outgoing.pause()
    outgoing.recover()
    outgoing.wait(20)
assert ended(pid) == 0
""", 40).check()
    except AssertionError as error:
        logs = "\n".join(log.read_text(errors="replace")[-2000:] for log in tmp_path.glob("*.log"))
        raise AssertionError(f"{error}\n{logs}") from None
    finally:
        for tunnel in tunnels:
            tunnel.kill()
            tunnel.wait()
