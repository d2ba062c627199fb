"""A proxy between source and destination that cuts, resets, silences, changes bytes: wherever it does, the migration is
recovered and every byte is right, or it ends with a verdict; no touch hangs, none sees zeros."""

from support.pattern import stress_seconds
from support.scripts import run_script

START = """
from support.migration import *
from support.pattern import stress_seconds
from support.proxy import Proxy, Rule
"""


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


# A destination that takes one migration after the other, says "k" for each whose bytes are right, and goes on after all
# others; a source that recovers whatever may be recovered. What both have in common:
BOTH = """
N = 3 * 65536 + 8
A, R = filled(N, 1), filled(N, 2)
said, tell = os.pipe()
def destination(incoming):
    last = None
    while True:
        try:
            arrival = incoming.accept(60)
        except uffd.MigrationError as error:
            assert error.owner == "source", error
            continue
        if last is not None:
            last.close()                    # not before: its source may have to be told once more that all is there
        last = arrival
        try:
            arrival.wait(20)
        except uffd.MigrationError:
            continue
        right = (arrival.arrays["a"] == A).all() and (arrival.arrays["r"] == R).all() and arrival.state == b"s"
        os.write(tell, b"k" if right else b"!")
def went_through(url):
    "Whether it came to be at all; if so, it came to its end, with every byte. Memory of its own: it stays stopped."
    arrays = {"a": A.copy(), "r": uffd.zeros(N // 8, np.int64)}
    arrays["r"][:] = R
    try:
        outgoing = migrate.connect(url, arrays)
    except (OSError, uffd.MigrationError) as error:
        assert getattr(error, "owner", "source") == "source"
        arrays["a"][0] = A[0]               # nobody stops writers
        return False
    with outgoing:
        for turn in range(10):
            try:
                if outgoing.status in ("SETUP", "PRECOPY"):
                    outgoing.precopy()
                    outgoing.switchover(b"s")
                outgoing.wait(20)
                break
            except uffd.MigrationError:
                if outgoing.status != "PAUSED":
                    raise
                try:
                    outgoing.recover()
                except (OSError, uffd.MigrationError):
                    pass
    assert outgoing.status == "COMPLETED", outgoing
    assert os.read(said, 1) == b"k"
    return True
"""


def test_cut_at_each_byte():
    """Goal: wherever a connection ends, the migration goes on after recover() with every byte in its place, or never
    came to be, and the next one works. Method: one migration is measured, then others are cut after each number of
    bytes of each connection and direction, in random order for as long as there is time (UFFD_STRESS_SECONDS); bytes
    of blocks are sampled."""
    result = script(BOTH + """
import random
seed = os.environ.get("UFFD_SEED", "1")
rng = random.Random(seed)
pid, url = start(destination)
with Proxy(url) as proxy:
    assert went_through(proxy.url)
    lengths = [dict(counted) for counted in proxy.counts[:2]]
    places = []
    for connection, directions in enumerate(lengths):
        for direction, nbytes in directions.items():
            places += [(connection, direction, at) for at in range(min(nbytes, 1500))]
            places += [(connection, direction, rng.randrange(1500, nbytes)) for _ in range(40) if nbytes > 1500]
    rng.shuffle(places)
    ends_at, done, refused = time.monotonic() + stress_seconds(), 0, 0
    for connection, direction, at in places:
        if time.monotonic() > ends_at:
            break
        what = rng.choice(("cut", "reset"))
        proxy.rules[:] = [Rule(what, direction, at, len(proxy.counts) + connection)]
        try:
            refused += not went_through(proxy.url)
        except BaseException:
            print("seed", seed, "place", connection, direction, at, what, lengths, flush=True)
            raise
        done += 1
    proxy.rules.clear()
    assert went_through(proxy.url)
print(done, "of", len(places), "places,", refused, "before it came to be")
assert done > 20 and refused < done
os.kill(pid, 9)
ended(pid)
os._exit(0)
""", 60 + 2 * stress_seconds())
    print(result.stdout)
