"""A proxy between source and destination that cuts, resets, silences, changes bytes: wherever it does, the migration is
recovered and every byte is right, or it ends with a verdict; no touch hangs, none sees zeros."""

from support.scripts import run_script

START = "from support.migration import *\nfrom support.proxy import Proxy, Rule\n"


def script(text, deadline_s=40.0, **options):
    return run_script(START + text, deadline_s, **options).check()


def test_a_block_sent_again_and_lost_on_its_way_is_sent_a_third_time():
    """Goal: in a later round of precopy, a break loses blocks of which the destination has an older state; it can't
    tell that they are missing. Method: a slow link, cut while a round's blocks lie in its buffers; zeros among them."""
    script("""
N = 8 << 20
def destination(incoming):
    arrival = incoming.accept(20)
    arrival.wait(20)
    assert (arrival.arrays["0"] == filled(N, 5)).all() and not arrival.arrays["1"].any()
    arrival.close()
pid, url = start(destination)
a, b = uffd.zeros(N // 8, np.int64), uffd.zeros(N // 8, np.int64)
a[:] = b[:] = filled(N)
with Proxy(url) as proxy, migrate.connect(proxy.url, [a, b]) as outgoing:
    outgoing.precopy()
    a[:] = filled(N, 5)
    b[:] = 0
    for turn in range(3):
        proxy.rate_bytes_per_s = 20e6
        threading.Timer(0.05, proxy.cut_all, ["reset"]).start()
        try:
            outgoing.precopy()
        except uffd.MigrationError as error:
            assert error.owner == "source"
        proxy.rate_bytes_per_s = None
        status_is(outgoing, "PAUSED")
        outgoing.recover()
    outgoing.switchover()
    outgoing.wait(20)
assert ended(pid) == 0
""")
