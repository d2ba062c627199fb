"""Servers, providers and bytes for the tests of providers.Redis. Its fixtures come with
`pytest_plugins = ("support.redisblocks",)`."""

import contextlib
import io
import subprocess

import numpy as np
import pytest

from support import redisserver

SMALL = 512                                      # a block size: many blocks, short messages


def skip_without_redis():
    """At the head of a test file: redis-py, xxhash and a server program, or the file is skipped with the reason."""
    pytest.importorskip("redis", reason="providers.Redis needs redis-py")
    pytest.importorskip("xxhash", reason="providers.Redis needs xxhash")
    if redisserver.why_not():
        pytest.skip(redisserver.why_not(), allow_module_level=True)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    with redisserver.Server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared_server):
    """Empty, and as it was at the beginning."""
    shared_server.do("FLUSHALL")
    return shared_server


@pytest.fixture
def own_server(tmp_path):
    """own_server(**options): one that the test may stop, restart and configure."""
    made = []

    def start(**options):
        made.append(redisserver.Server(tmp_path, **options))
        return made[-1].start()
    yield start
    for one in made:
        one.kill()


@contextlib.contextmanager
def opening(**defaults):
    """build(url, namespace, **options): a provider, open; all are closed at the end."""
    from uffd.providers.redis import Redis

    made = []

    def build(url, namespace="space", **options):
        provider = Redis(url, namespace, **{"block_bytes": SMALL, **defaults, **options})
        provider.open()
        made.append(provider)
        return provider
    yield build
    for provider in made:
        with contextlib.suppress(OSError):       # its server is gone, or a shard of it lost its data
            provider.close()


@pytest.fixture
def opened():
    with opening(timeout_s=3.0, lease_s=2.0) as build:
        yield build


def some_bytes(count, seed=1):
    return np.random.default_rng(seed).integers(1, 256, count, dtype=np.uint8)


def read(provider, offset, count):
    out = np.full(count, 0xAA, np.uint8)
    assert provider.read(offset, out) is None
    return out


def failing(number, call, *arguments):
    """The OSError that call(*arguments) raises, which has this errno."""
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == number, caught.value
    return str(caught.value)


def key_of(provider, block):
    return provider._space.keys.block(block)


def group_keys(provider, block):
    """The keys that fail over together with the block's."""
    return [provider._space.keys.index(0)[:-len("index")].replace("/0}", f"/{block // 16 % 256}}}") + rest
            for rest in ("index", str(block))]


def uffd_command(*words):
    """What the command `uffd` does, here: returncode, stdout, stderr."""
    from uffd.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(list(words))
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())
