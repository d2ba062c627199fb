"""A .npy file behind HTTP as an array: only the byte ranges that are touched are fetched.

The server (aiohttp's, which knows ranges) is another process, on loopback. Run: python examples/remote_file.py.
It needs the extra fsspec: pip install "pyuffd[fsspec]".
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import uffd

ROWS, COLUMNS = 200_000, 64                      # float64: 98 MiB


def serve(folder):
    """Serves the folder until standard input ends; prints the port. Runs in a process of its own."""
    import asyncio

    from aiohttp import web

    async def run():
        app = web.Application()
        app.router.add_static("/", folder)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await runner.cleanup()

    asyncio.run(run())


@contextlib.contextmanager
def served(folder):
    """The URL of the folder."""
    server = subprocess.Popen([sys.executable, __file__, "--serve", folder], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.stdin.close()
        server.wait(10)
        server.stdout.close()


def main():
    try:
        import aiohttp  # noqa: F401
        import fsspec  # noqa: F401
    except ImportError as error:
        print(f'skipped: {error}; pip install "pyuffd[fsspec]"')
        return 77
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        expected = rng.random((ROWS, COLUMNS))
        np.save(Path(folder, "table.npy"), expected)
        with served(folder) as url, uffd.Engine() as engine:
            array = uffd.open(f"{url}/table.npy", engine=engine, readahead_bytes=0)
            region = uffd.region_of(array)
            print(f"{array.shape} of {array.dtype}, {array.nbytes >> 20} MiB behind {url}/table.npy")

            few = rng.choice(ROWS, 100, replace=False)
            begin = time.perf_counter()
            assert (array[few] == expected[few]).all()
            seconds = time.perf_counter() - begin
            fetched = int(region.resident().sum()) * region.block_bytes
            print(f"{len(few)} random rows, touched one after another: {fetched >> 20} MiB fetched, "
                  f"{seconds / len(few) * 1e3:.2f} ms for each")

            many = rng.choice(ROWS, 10_000, replace=False)
            begin = time.perf_counter()
            uffd.prefetch(array, many).wait()
            assert (array[many] == expected[many]).all()
            seconds = time.perf_counter() - begin
            print(f"{len(many)} random rows, prefetched: {seconds / len(many) * 1e3:.2f} ms for each")

            assert np.allclose(array.mean(axis=0), expected.mean(axis=0))
            print("the mean over all rows is right")
            del array
    return 0


if __name__ == "__main__":                       # the host imports this file again
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        sys.exit(main())
