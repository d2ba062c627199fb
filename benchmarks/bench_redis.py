"""The memory node: blocks in a Redis server on loopback, beside what redis-py alone does with the same ones."""
from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_stream import timed
from harness import MIB, Side, compare, scaled

import uffd

BLOCK_BYTES = 64 << 10
VALUE_HEAD_BYTES = 56
NBYTES = scaled(256 * MIB)
SERVER = shutil.which("redis-server") or shutil.which("valkey-server")


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    if SERVER is None:
        pytest.skip("no redis-server (on Debian: apt-get install redis-server)")
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    process = subprocess.Popen([SERVER, "--port", str(port), "--save", "", "--bind", "127.0.0.1"], cwd=tmp_path,
                               stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_redis_prefetch(benchmark: Any, engine: Any, url: str) -> None:
    redis = pytest.importorskip("redis")
    data = np.random.default_rng(8).integers(0, 255, NBYTES, dtype=np.uint8)
    expected = int(data.view("u8").sum())
    provider = uffd.providers.Redis(url, "bench", nbytes=NBYTES)
    provider.open()
    provider.write(0, data)
    keys = [provider._space.keys.block(block) for block in range(NBYTES // BLOCK_BYTES)]
    provider.close()

    def through(prefetch: bool) -> Side:
        @contextmanager
        def side() -> Iterator[Callable[[], float]]:
            with uffd.Region(None, uffd.providers.Redis(url, "bench"), engine=engine) as region:
                array = region.array("u8")
                results = [int(array[0])]             # the host is up, and has it open

                def work() -> None:
                    if prefetch:
                        region.prefetch()
                    results.append(int(array.sum()))
                yield timed(NBYTES, work)
                assert results[1] == expected
                array = None                          # `work` still names it
        return side

    def loop(at_once: int) -> Side:
        @contextmanager
        def side() -> Iterator[Callable[[], float]]:
            with redis.Redis.from_url(url) as client:
                client.get(keys[0])
                results = []

                def work() -> None:
                    total = 0
                    for first in range(0, len(keys), at_once):
                        with client.pipeline(transaction=False) as pipeline:
                            for key in keys[first:first + at_once]:
                                pipeline.get(key)
                            for value in pipeline.execute():
                                total += int(np.frombuffer(value, "u8", offset=VALUE_HEAD_BYTES).sum())
                    results.append(total % (1 << 64))
                yield timed(NBYTES, work)
                assert results == [expected]
        return side

    compare(benchmark, "redis-prefetch", through(True), {"16 at once": loop(16), "128 at once": loop(128)},
            beside={"without prefetch": through(False)}, warm_nbytes=2 * NBYTES)
