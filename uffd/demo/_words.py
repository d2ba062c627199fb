"""Words to rows of an embedding table, by the vocabulary file that lies beside a model."""

from pathlib import Path

UNKNOWN = "[UNK]"
_WORD_LIMIT_CHARS = 200


class Vocabulary:
    """A WordPiece vocabulary (one piece a line, the line's number is the row; continuations begin with ##)."""

    def __init__(self, path: Path):
        self.rows = {piece: row for row, piece in enumerate(path.read_text(encoding="utf-8").splitlines())}

    def __len__(self):
        return len(self.rows)

    def tokenise(self, word: str) -> list[int]:
        """Rows of the word's pieces: the longest piece that fits first, as WordPiece does (Wu et al. 2016)."""
        word = word.lower()
        rows, start = [], 0
        while start < len(word) <= _WORD_LIMIT_CHARS:
            for stop in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:stop]
                if piece in self.rows:
                    rows.append(self.rows[piece])
                    start = stop
                    break
            else:
                break
        if not rows or start < len(word):
            return [self.rows[UNKNOWN]] if UNKNOWN in self.rows else []
        return rows


def beside(path: Path) -> Vocabulary | None:
    """The vocabulary in the same directory as a model file, if there is one."""
    candidate = path.parent / "vocab.txt"
    return Vocabulary(candidate) if candidate.is_file() else None
