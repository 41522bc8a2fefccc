"""Image-text pairs listed in jsonl files: {"image_path": ..., "text": [blip, llava, llava_first]} on each line.

    pairs = JsonPairs("laion_coco")                   # all *.jsonl of the folder, by name
    pairs.identity(0), pairs.texts(0)                 # ('part-00000', 0), ['a bee', 'A bee sits on …', …]

Only the place of each line is held in memory: fifty million pairs are 400 MB of offsets, and as strings ten times that.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.lines import digest
from dataset.pairs import PairFiles


class JsonPairs(PairFiles, Sequence[dict]):
    """Decoded lines of a folder's jsonl files.

    Raises as PairFiles does, and ValueError where a file has no lines or does not begin with a JSON object that has an
    `image_path`. A later line that is damaged raises it when read.
    """

    image_kind = "image paths"

    def __init__(self, folder: str | Path):
        super().__init__(folder, ".jsonl")
        # Per file: (lines + 1,), the last is its length.
        self._starts, digests = zip(*map(_line_starts, self.paths))
        self.number([len(starts) - 1 for starts in self._starts], digests)
        for file, (_, lines), end in zip(self.paths, self.files, self._ends):
            if not lines:
                raise ValueError(f"{file} has no lines: remove it, or fill it")
            self[end - lines]

    def __getitem__(self, index: int) -> dict:
        which, line = self.place(index)
        file, starts = self.paths[which], self._starts[which]
        with open(file, "rb") as f:
            f.seek(starts[line])
            text = f.read(starts[line + 1] - starts[line])
        try:
            pair = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where(index)} is not JSON: {error}") from error
        if not isinstance(pair, dict) or not isinstance(pair.get("image_path"), str):
            raise ValueError(f"{self.where(index)} must be an object with a string 'image_path'")
        return pair

    def where(self, index: int) -> str:
        """Return a pair's place, for messages."""
        which, line = self.place(index)
        return f"line {line} (from 0) of {self.paths[which]}"

    def image_file(self, index: int) -> str:
        """Return the path of a pair's image: a relative one is looked for in the folder, then in the working directory.

        Raises ValueError for a damaged line.
        """
        path = self[index]["image_path"]
        inside = os.path.join(self.folder, path)
        return inside if os.path.exists(inside) else path

    def image_digest(self, index: int) -> int:
        """Return what the image's path in the line comes to, from any folder above it. Raises ValueError for a damaged line."""
        path = os.path.normpath(self[index]["image_path"])
        while path.startswith("../"):  # the same image in a list that lies deeper
            path = path[3:]
        return digest(path)

    def texts(self, index: int) -> list[str]:
        """Return a pair's captions. Raises ValueError for a damaged line, or one whose `text` is no string or list of them."""
        texts = self[index].get("text")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{self.where(index)} must have 'text', a string or a list of strings")
        return texts


def _line_starts(file: Path) -> tuple[np.ndarray, str]:
    """Return the offset of every line and of the end of the file, (lines + 1,), and the file's digest.

    Empty lines at the end do not count.
    """
    starts, lines, content = array("q", [0]), 0, hashlib.blake2b(digest_size=16)
    with open(file, "rb") as f:
        for line in f:
            content.update(line)
            starts.append(starts[-1] + len(line))
            if line.strip():
                lines = len(starts) - 1
    return np.append(np.asarray(starts[:lines]), starts[-1]) if lines else np.zeros(1, np.int64), content.hexdigest()
