"""A PNG of the resident blocks, each in the colour of the step that brought it in."""

import math

import numpy as np

_CELLS_MAX = 128 * 128
_COLOURS = ("#e8e8e8", "#d1495b", "#00798c", "#edae49", "#30638e", "#66a182")


def save(path, steps, title):
    """Write `path`. steps: [(name, resident)], resident a bool array per block as it was after that step.

    Blocks run row by row. Above 16,384 blocks one cell stands for several and shows the first step to fill any.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    cells, blocks_per_cell = _cells([resident for _, resident in steps])
    columns = max(8, math.ceil(math.sqrt(cells.size * 2)))
    rows = math.ceil(cells.size / columns)
    grid = np.full(rows * columns, np.nan)
    grid[:cells.size] = cells
    names = ["not filled"] + [name for name, _ in steps]
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 9 * rows / columns), dpi=110)
    axes.imshow(grid.reshape(rows, columns), cmap=ListedColormap(_COLOURS[:len(names)]),
                vmin=-0.5, vmax=len(names) - 0.5, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("one cell = one block" if blocks_per_cell == 1 else f"one cell = {blocks_per_cell} blocks",
                    fontsize=8)
    handles = [Patch(facecolor=_COLOURS[level], label=f"{name}: {int((cells == level).sum())}")
               for level, name in enumerate(names)]
    figure.legend(handles=handles, loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path)
    pyplot.close(figure)


def _cells(residents):
    """The number of the first step that filled each cell (0: none did), and the blocks in a cell."""
    levels = np.zeros(residents[0].size, dtype=int)
    for number, resident in reversed(list(enumerate(residents, start=1))):
        levels[resident] = number
    blocks_per_cell = math.ceil(levels.size / _CELLS_MAX)
    if blocks_per_cell == 1:
        return levels, 1
    padded = np.full(math.ceil(levels.size / blocks_per_cell) * blocks_per_cell, 0)
    padded[:levels.size] = levels
    unset = len(residents) + 1
    firsts = np.where(padded == 0, unset, padded).reshape(-1, blocks_per_cell).min(axis=1)
    return np.where(firsts == unset, 0, firsts), blocks_per_cell
