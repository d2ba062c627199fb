"""A function of three lines as memory: an array of 2**37 squares (1 TiB), of which nobody stores any.

Run: python examples/three_lines.py. It needs nothing but uffd.
"""

import numpy as np

import uffd

COUNT = 1 << 37


def squares(offset, out):
    """The bytes from `offset` on of 0, 1, 4, 9, ... as 64-bit integers; runs in the provider host."""
    first = offset // 8
    numbers = np.arange(first, first + out.nbytes // 8, dtype=np.int64)
    np.multiply(numbers, numbers, out=out.view(np.int64))


def main():
    array = uffd.from_provider(squares, COUNT, np.int64)
    region = uffd.region_of(array)
    print(f"{array.nbytes >> 30} GiB of memory at {region.address:#x}, {type(array).__name__} of {array.dtype}")

    assert array[3] == 9
    assert array[1 << 30] == 1 << 60
    assert array[-1] == (COUNT - 1) ** 2 % 2**64 - (2**64 if (COUNT - 1) ** 2 % 2**64 >= 2**63 else 0)
    print(f"array[3] = {array[3]}, array[2**30] = {array[1 << 30]}")

    piece = array[1_000_000:1_100_000]
    assert piece.sum() == sum(n * n for n in range(1_000_000, 1_100_000))
    print(f"the sum of 100,000 of them: {piece.sum()}")

    filled = int(region.resident().sum())
    print(f"{filled} of {len(region.resident()):,} blocks were filled")


if __name__ == "__main__":                       # the host imports this file again
    main()
