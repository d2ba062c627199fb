"""A zarr array in a torch DataLoader with two forked workers: each child serves its own copy of the region.

Run: python examples/torch_dataloader.py. It needs zarr and PyTorch.
"""

import sys
import tempfile

import numpy as np

import uffd

ROWS, COLUMNS = 4_000, 64


def main():
    try:
        import torch
        import zarr
        from torch.utils.data import DataLoader, Dataset
    except ImportError as error:
        print(f"skipped: {error}")
        return 77

    class Rows(Dataset):
        def __init__(self, table):
            self.table = table

        def __len__(self):
            return len(self.table)

        def __getitem__(self, row):
            return row, torch.from_numpy(self.table[row].copy())

    plain = np.random.default_rng(1).random((ROWS, COLUMNS), np.float32)
    with tempfile.TemporaryDirectory() as folder, uffd.Engine() as engine:
        stored = zarr.open_array(f"{folder}/table.zarr", mode="w", shape=plain.shape, chunks=(500, 32), dtype="f4")
        stored[...] = plain
        table = uffd.open(f"{folder}/table.zarr", engine=engine)

        whole = torch.from_numpy(table)          # no copy: the same memory
        assert whole.data_ptr() == table.ctypes.data
        assert torch.equal(whole[:100], torch.from_numpy(plain[:100]))
        print(f"torch.from_numpy: {tuple(whole.shape)} of {whole.dtype}, no copy")

        loader = DataLoader(Rows(table), batch_size=100, shuffle=True, num_workers=2, multiprocessing_context="fork",
                            timeout=15)
        seen = np.zeros(ROWS, int)
        for rows, batch in loader:
            assert (batch.numpy() == plain[rows.numpy()]).all()
            np.add.at(seen, rows.numpy(), 1)
        assert (seen == 1).all()
        print(f"DataLoader with 2 forked workers: {ROWS} rows, each once, all right")
        del table, whole, loader
    return 0


if __name__ == "__main__":                       # the host imports this file again
    sys.exit(main())
