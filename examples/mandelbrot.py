"""The Mandelbrot set as an array of 2**36 pixels (64 GiB) that nobody stores: what is looked at is computed.

A block of the region is a tile of 256 x 256 pixels, so that a window of the picture needs few of them. Two provider
hosts compute tiles side by side. Run: python examples/mandelbrot.py. It needs nothing but uffd.
"""

import numpy as np

import uffd

TILE = 256                                       # pixels on a side: 64 KiB, one block
TILES = 1024                                     # on a side of the picture
LEFT, TOP, WIDTH = -2.25, 1.5, 3.0               # of the picture, in the plane
STEPS = 160
ROW, COLUMN = 476, 509                           # of the window: the valley of seahorses


class Mandelbrot(uffd.Provider):
    """Pixel: after how many steps z * z + c leaves the circle of radius 2, STEPS if it stays."""

    nbytes = TILE * TILE * TILES * TILES

    def read(self, offset, out):
        tiles = out.reshape(-1, TILE, TILE)
        for number, tile in enumerate(tiles, offset // (TILE * TILE)):
            tile[...] = steps_outside(*divmod(number, TILES))


def steps_outside(row, column):
    """The tile at that row and column of tiles."""
    at = (np.arange(TILE) + 0.5) * (WIDTH / (TILE * TILES))
    c = (LEFT + column * WIDTH / TILES + at)[None, :] + 1j * (TOP - row * WIDTH / TILES - at)[:, None]
    steps, z = np.zeros(c.shape, np.uint8), np.zeros_like(c)
    inside = np.ones(c.shape, bool)
    for _ in range(STEPS):
        z[inside] = z[inside] ** 2 + c[inside]
        inside &= z.real**2 + z.imag**2 <= 4
        steps += inside
    return steps


def pixel(y, x):
    """The same by itself, without numpy."""
    c = complex(LEFT + (x + 0.5) * WIDTH / (TILE * TILES), TOP - (y + 0.5) * WIDTH / (TILE * TILES))
    z = 0j
    for step in range(STEPS):
        z = z * z + c
        if abs(z) > 2:
            return step
    return STEPS


def main():
    with uffd.Engine(hosts=2) as engine:
        tiles = uffd.from_provider(Mandelbrot(), (TILES, TILES, TILE, TILE), np.uint8, engine=engine,
                                   block_bytes=TILE * TILE, readahead_bytes=0)
        region = uffd.region_of(tiles)
        print(f"{tiles.size:,} pixels, {tiles.nbytes >> 30} GiB; computed so far: {region.resident().sum()} tiles")

        window = tiles[ROW:ROW + 4, COLUMN:COLUMN + 6]
        uffd.prefetch(window).wait()             # all of its tiles at once, not one after the other
        picture = window.swapaxes(1, 2).reshape(4 * TILE, 6 * TILE)
        for line in picture[::40, ::20]:
            print("".join(" .:-=+*%@#"[min(9, max(0, int(steps) - 30) // 14)] for steps in line))

        rng = np.random.default_rng(1)
        wrong = 0
        for y, x in zip(rng.integers(0, picture.shape[0], 300), rng.integers(0, picture.shape[1], 300)):
            wrong += abs(int(picture[y, x]) - pixel(ROW * TILE + int(y), COLUMN * TILE + int(x))) > 0
        assert wrong <= 3, f"{wrong} of 300 pixels differ: more than rounding at the circle explains"
        assert region.resident().sum() == window.shape[0] * window.shape[1]
        print(f"a window of {picture.shape[1]} x {picture.shape[0]} pixels took {region.resident().sum()} of "
              f"{len(region.resident()):,} tiles")


if __name__ == "__main__":                       # the hosts import this file again
    main()
