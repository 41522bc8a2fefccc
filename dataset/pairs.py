"""Numbering of image-text pairs through several files: what lists and tar shards have in common, and choice of captions."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from utils.files import require_regular

CAPTION_KEYS = ("blip", "llava", "llava_first")
"""The captions of a line, in the order of its `text`."""


class TextSource(Protocol):
    """Files of lines with texts: image-text pairs, or a file of prompts."""

    files: list[tuple[str, int]]

    def texts(self, index: int) -> list[str]: ...
    def where(self, index: int) -> str: ...
    def list_digest(self, k: int) -> str: ...


def caption_of(source: TextSource, index: int, key: str, truncated: bool) -> str:
    """Return a line's caption as it is written there; truncated: up to the first full stop.

    Raises ValueError where the line is damaged or has no caption of this key.
    """
    texts, place = source.texts(index), CAPTION_KEYS.index(key)
    if place >= len(texts):
        raise ValueError(f"{source.where(index)} has {len(texts)} texts, --caption-key {key} is number {place + 1}")
    return texts[place].split(".")[0] if truncated else texts[place]


class PairFiles:
    """Pairs in files of one ending, numbered through. A pair is known by its file's stem and its number there, from 0.

    Raises FileNotFoundError where the folder is missing, ValueError where it has no such files or one is no regular file.
    """

    image_kind: str

    def __init__(self, folder: str | Path, ending: str, hint: str = ""):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"the folder of *{ending} files {folder} does not exist: check --data-path")
        self.paths = sorted(path for path in self.folder.glob(f"*{ending}") if not path.name.startswith("."))
        if not self.paths:
            raise ValueError(f"no *{ending} files in {folder}{hint}")
        for path in self.paths:
            require_regular(path)

    def number(self, counts: Sequence[int], digests: Sequence[str]) -> None:
        """Take how many pairs the files have, and what the content of each comes to."""
        self.files = [(path.stem, count) for path, count in zip(self.paths, counts, strict=True)]
        self._ends, self._digests = list(accumulate(counts)), digests

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, index: int) -> tuple[int, int]:
        """Return the number of a pair's file, and the pair's there."""
        index = range(len(self))[index]
        which = bisect_right(self._ends, index)
        return which, index - self._ends[which] + self.files[which][1]

    def identity(self, index: int) -> tuple[str, int]:
        """Return a pair's (file stem, number in the file): what its features and codes are kept by."""
        which, number = self.place(index)
        return self.files[which][0], number

    def list_digest(self, k: int) -> str:
        """Return what the content of file number `k` comes to."""
        return self._digests[k]
