"""Bytes that tell where they belong: a page from the wrong place, or of zeros, is seen at once."""

import os
import random

import numpy as np

MULTIPLIER_1 = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9)


def pattern(offset, nbytes, seed=0):
    """uint8 array: the bytes [offset, offset + nbytes) of the endless sequence that native.c fills, too."""
    first, last = offset // 8, -(-(offset + nbytes) // 8)
    words = np.arange(first, last, dtype=np.uint64)
    words += np.uint64(seed + 1)
    words *= MULTIPLIER_1
    words ^= words >> np.uint64(29)
    words *= MULTIPLIER_2
    words ^= words >> np.uint64(32)
    return words.view(np.uint8)[offset - first * 8:][:nbytes]


def seeded(name):
    """A random.Random from UFFD_SEED or a fresh seed; prints it, so that the run can be repeated."""
    seed = int(os.environ.get("UFFD_SEED") or random.SystemRandom().randrange(2**32))
    print(f"{name}: UFFD_SEED={seed}", flush=True)
    return random.Random(seed)


def stress_seconds():
    return float(os.environ.get("UFFD_STRESS_SECONDS", "5"))
