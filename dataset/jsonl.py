"""Image-text pairs listed in jsonl files: {"image_path": ..., "text": [blip, llava, llava_first]} on each line.

    lines = JsonLines("laion_coco")      # all *.jsonl of the folder, by name
    stem, number, pair = lines[0]        # ('part-00000', 0, {'image_path': ..., 'text': [...]})

Only the place of each line is held in memory: fifty million pairs are 400 MB of offsets, and as strings ten times that.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.images import ImageList
from utils.files import require_regular

_CHUNK = 1 << 24


class JsonLines(Sequence[tuple[str, int, dict]]):
    """Items (file stem, line number from 0, decoded line): the pair's identity and what the line says.

    Raises FileNotFoundError where the folder is missing, ValueError where it has no *.jsonl, or a file has no lines or
    does not begin with a JSON object that has an `image_path`. A later line that is damaged raises it when read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"the folder of jsonl files {self.folder} does not exist: check --data-path")
        self._files = sorted(p for p in self.folder.glob("*.jsonl") if not p.name.startswith("."))
        if not self._files:
            raise ValueError(f"no *.jsonl files in {self.folder}")
        for file in self._files:
            require_regular(file)
        # Per file: (lines + 1,), the last is its length.
        self._starts, self._digests = zip(*[_line_starts(file) for file in self._files])
        self._ends = np.cumsum([len(starts) - 1 for starts in self._starts])
        for file, starts, end in zip(self._files, self._starts, self._ends):
            if len(starts) < 2:
                raise ValueError(f"{file} has no lines: remove it, or fill it")
            self[int(end) - len(starts) + 1]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[str, int, dict]:
        index = range(len(self))[index]
        which = int(np.searchsorted(self._ends, index, side="right"))
        file, starts = self._files[which], self._starts[which]
        number = index - int(self._ends[which]) + len(starts) - 1
        with open(file, "rb") as f:
            f.seek(starts[number])
            text = f.read(starts[number + 1] - starts[number])
        try:
            pair = json.loads(text)
        except ValueError as error:
            raise ValueError(f"line {number} (from 0) of {file} is not JSON: {error}") from error
        if not isinstance(pair, dict) or not isinstance(pair.get("image_path"), str):
            raise ValueError(f"line {number} (from 0) of {file} must be an object with a string 'image_path'")
        return file.stem, number, pair

    def image_path(self, pair: dict) -> str:
        """Where a pair's image is: a relative path is looked for in the folder, then in the working directory."""
        inside = os.path.join(self.folder, pair["image_path"])
        return inside if os.path.exists(inside) else pair["image_path"]


class _ImagePaths(Sequence[str]):
    def __init__(self, lines: JsonLines):
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> str:
        return self.lines.image_path(self.lines[index][2])


def jsonl_images(folder: str | Path) -> ImageList:
    """The images of a folder's jsonl files without their texts, all with label 0. Raises as JsonLines does."""
    return ImageList(_ImagePaths(JsonLines(folder)))


def _line_starts(file: Path) -> tuple[np.ndarray, str]:
    """Return the offset of every line and of the end of the file, (lines + 1,), and the file's digest.

    Empty lines at the end do not count.
    """
    starts, position, last_text, digest = [np.zeros(1, np.int64)], 0, 0, hashlib.blake2b(digest_size=16)
    with open(file, "rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            starts.append(ends + position + 1)
            if text := chunk.rstrip():
                last_text = position + len(text)
            position += len(chunk)
    starts = np.concatenate(starts)
    starts = starts[starts < last_text]
    return np.append(starts, position) if last_text else np.zeros(1, np.int64), digest.hexdigest()
