"""What the lazy arrays have filled so far: residency and counters over all their regions, read without a touch."""

from pathlib import Path

import numpy as np

import uffd


class Watch:
    """The regions behind a dict of arrays, each counted once; of their blocks, those that hold part of an array."""

    def __init__(self, arrays):
        regions, used = {}, {}
        for array in arrays.values():
            if not array.nbytes:
                continue
            region = uffd.region_of(array)
            regions[region.address] = region
            blocks = used.setdefault(region.address, np.zeros(-(-region.nbytes // region.block_bytes), dtype=bool))
            start = array.ctypes.data - region.address
            blocks[start // region.block_bytes:(start + array.nbytes - 1) // region.block_bytes + 1] = True
        self.regions = list(regions.values())
        # Gaps between arrays (a packed file aligns them) are never touched, and would keep the bar below full.
        self._used = np.concatenate(list(used.values()))
        self.block_nbytes = np.concatenate([_block_nbytes(region) for region in self.regions])[self._used]

    def resident(self) -> np.ndarray:
        """Bool, one per block, all regions one after the other. Touches no managed page, fills nothing."""
        return np.concatenate([np.asarray(region.resident(), dtype=bool) for region in self.regions])[self._used]

    def resident_bytes(self) -> int:
        return int(self.block_nbytes[self.resident()].sum())

    def filled(self) -> dict:
        """Totals since the regions were made: bytes, blocks on demand and ahead of it, faults."""
        totals = {"bytes_filled": 0, "blocks_demand": 0, "blocks_readahead": 0, "faults_read": 0}
        for region in self.regions:
            counters = region.stats().as_dict()
            for key in totals:
                totals[key] += counters[key]
        return totals


def _block_nbytes(region) -> np.ndarray:
    count = -(-region.nbytes // region.block_bytes)
    nbytes = np.full(count, region.block_bytes, dtype=np.int64)
    nbytes[-1] = region.nbytes - (count - 1) * region.block_bytes
    return nbytes


def rss_bytes() -> int:
    """This process's own memory (anonymous and shared, without mapped files), from /proc/self/status."""
    kilobytes = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024
