"""What the demo does with a file: which table to look up in, which rows, which layer to multiply by."""

from dataclasses import dataclass

import numpy as np

from . import _eager, _words

_ROWS = 8
_ROW_LIMIT_ITEMS = 16384
_MULTIPLY_TYPES = "efd"


@dataclass
class Plan:
    table: str                      # name of the array looked up in
    layer: str | None               # name of the array multiplied by; None: no array of a fitting shape
    rows: dict[str, list[int]]      # what is looked up: label -> rows of the table (several for a word in pieces)
    pairs: list[tuple[str, str]]    # labels compared by cosine
    vocabulary_size: int = 0        # 0: rows were chosen evenly, there are no words

    def row_numbers(self):
        return [row for rows in self.rows.values() for row in rows]

    def row(self, array, number):
        """A copy of one row, of its first 16,384 items where it is longer."""
        return np.asarray(array[number]).reshape(-1)[:_ROW_LIMIT_ITEMS].copy()


def make(path, arrays, pairs) -> Plan:
    """A plan for the arrays of a file. pairs: [(word, word)], used where a vocabulary fits one of the arrays."""
    filled = {name: array for name, array in arrays.items() if array.ndim and array.size}
    if not filled:
        raise _eager.DataError(f"{path.name} holds no array with elements")
    vocabulary = _words.beside(path)
    table = _word_table(filled, vocabulary)
    if table is not None:
        rows = {word: vocabulary.tokenise(word) for pair in pairs for word in pair}
        unknown = [word for word, numbers in rows.items() if not numbers]
        if unknown:
            raise _eager.DataError(f"not in the vocabulary: {', '.join(unknown)}")
        return Plan(table, _layer(filled, table), rows, pairs, len(vocabulary))
    table = max(filled, key=lambda name: (filled[name].ndim > 1, filled[name].nbytes))
    numbers = np.unique(np.linspace(0, filled[table].shape[0] - 1, _ROWS).astype(int)).tolist()
    labels = [f"row {number}" for number in numbers]
    comparable = filled[table].ndim == 2 and filled[table].dtype.char in _MULTIPLY_TYPES
    even = list(zip(labels[0::2], labels[1::2])) if comparable else []
    return Plan(table, _layer(filled, table) if comparable else None,
                {label: [number] for label, number in zip(labels, numbers)}, even)


def _word_table(arrays, vocabulary):
    """The largest two-dimensional float array with one row per piece of the vocabulary."""
    fitting = [name for name, array in arrays.items()
               if vocabulary and array.ndim == 2 and array.shape[0] == len(vocabulary)
               and array.dtype.char in _MULTIPLY_TYPES]
    return max(fitting, key=lambda name: arrays[name].nbytes, default=None)


def _layer(arrays, table):
    """A weight (outputs, inputs) whose inputs are the table's columns: a query projection, else square, else any."""
    width = arrays[table].shape[1]
    fitting = [name for name, array in arrays.items()
               if name != table and array.ndim == 2 and array.shape[1] == width and array.shape[0] > 1
               and array.dtype.char in _MULTIPLY_TYPES]
    return min(fitting, key=lambda name: ("query" not in name, arrays[name].shape[0] != width), default=None)


def vectors(plan, looked_up):
    """One vector per label, the mean of its pieces' rows. looked_up: row number -> row."""
    return {label: np.mean([looked_up[number] for number in numbers], axis=0)
            if len(numbers) > 1 else looked_up[numbers[0]] for label, numbers in plan.rows.items()}


def cosine(left, right) -> float:
    left, right = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(left) * np.linalg.norm(right)
    return float(left @ right / norms) if norms else 0.0
