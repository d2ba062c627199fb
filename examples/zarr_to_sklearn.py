"""A zarr array, compressed and chunked both ways, given to scipy and scikit-learn as it is: to them it is an ndarray.

Run: python examples/zarr_to_sklearn.py. It needs zarr, scipy and scikit-learn: pip install "pyuffd[zarr]" scipy
scikit-learn.
"""

import sys
import tempfile

import numpy as np

import uffd

ROWS, COLUMNS = 20_000, 64


def main():
    try:
        import zarr
        from scipy import linalg, stats
        from sklearn.decomposition import PCA
        from sklearn.linear_model import Ridge
    except ImportError as error:
        print(f"skipped: {error}")
        return 77
    rng = np.random.default_rng(1)
    plain = rng.normal(size=(ROWS, 8)) @ rng.normal(size=(8, COLUMNS)) + 0.1 * rng.normal(size=(ROWS, COLUMNS))
    with tempfile.TemporaryDirectory() as folder, uffd.Engine() as engine:
        stored = zarr.open_array(f"{folder}/table.zarr", mode="w", shape=plain.shape, chunks=(1000, 16), dtype="f8")
        stored[...] = plain

        table = uffd.open(f"{folder}/table.zarr", engine=engine)
        region = uffd.region_of(table)
        assert type(table) is np.ndarray and table.flags.c_contiguous
        print(f"{table.shape} of {table.dtype}, chunks of {stored.chunks}: {type(table).__name__}, "
              f"{region.resident().sum()} of {len(region.resident())} blocks filled")

        assert table[12_345, 17] == plain[12_345, 17]
        print(f"one item touched: {region.resident().sum()} blocks filled")

        assert np.allclose(stats.skew(table), stats.skew(plain))
        assert np.allclose(linalg.svdvals(table), linalg.svdvals(plain))
        print("scipy: skewness and singular values are those of the plain array")

        spread = PCA(n_components=8, svd_solver="full").fit(table).explained_variance_ratio_
        assert np.allclose(spread, PCA(n_components=8, svd_solver="full").fit(plain).explained_variance_ratio_)
        score = Ridge().fit(table[:, 1:], table[:, 0]).score(table[:, 1:], table[:, 0])
        assert np.isclose(score, Ridge().fit(plain[:, 1:], plain[:, 0]).score(plain[:, 1:], plain[:, 0]))
        print(f"scikit-learn: 8 components explain {spread.sum():.1%}, Ridge scores {score:.4f}, as of the plain array")
        assert (table == plain).all()
        del table
    return 0


if __name__ == "__main__":                       # the host imports this file again
    sys.exit(main())
