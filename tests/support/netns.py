"""Two network namespaces joined by a veth pair, with the link's rate limited by a token bucket (TBF).

`reason()` says why it can't be had here; ip and tc are the system's own (iproute2).
"""

import functools
import os
import shutil
import subprocess
from contextlib import contextmanager

SOURCE, DESTINATION = "198.18.0.1", "198.18.0.2"  # a range kept free for tests of networks


def run(*words):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=20, check=False)


def must(*words):
    done = run(*words)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip() or done.stdout.strip()}")


@functools.lru_cache(maxsize=None)
def reason():
    """None where namespaces, veth and TBF work; else why not."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc") if not shutil.which(name)]
    if missing:
        return f"{' and '.join(missing)} of iproute2 {'is' if len(missing) == 1 else 'are'} not installed"
    try:
        with two_hosts(rate="1gbit") as (one, _):
            must(*one, "ping", "-c1", "-W2", DESTINATION) if shutil.which("ping") else None
    except OSError as error:
        return f"no namespaces with a limited veth pair here: {error}"
    return None


@contextmanager
def two_hosts(rate=None, burst="256kb", latency="20ms"):
    """Words to put before a command that is to run on the one host, and on the other. rate: as tc takes it."""
    names = [f"uffd-{os.getpid()}-{side}" for side in ("a", "b")]
    links = [f"u{os.getpid() % 100000}{side}" for side in ("a", "b")]
    try:
        for name in names:
            must("ip", "netns", "add", name)
        must("ip", "link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns",
             names[1])
        for name, link, address in zip(names, links, (SOURCE, DESTINATION), strict=True):
            must("ip", "-n", name, "addr", "add", f"{address}/30", "dev", link)
            must("ip", "-n", name, "link", "set", "lo", "up")
            must("ip", "-n", name, "link", "set", link, "up")
            if rate:
                must("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", link, "root", "tbf", "rate", rate,
                     "burst", burst, "latency", latency)
        yield tuple(("ip", "netns", "exec", name) for name in names)
    finally:
        for name in names:
            run("ip", "netns", "del", name)
