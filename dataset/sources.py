"""Sources of image-text pairs: a folder of *.jsonl lists, or of WebDataset *.tar shards.

pairs = open_pairs("laion_coco"); pairs.identity(7), pairs.texts(7)
"""

from pathlib import Path
from typing import Any

from dataset.jsonl import JsonPairs
from dataset.webdataset import TarPairs

Pairs = JsonPairs | TarPairs


def open_pairs(folder: str | Path, index_path: str | Path | None = None) -> Pairs:
    """Open the pairs of a folder of *.jsonl lists or of *.tar shards; index_path: see TarPairs.

    Raises FileNotFoundError where the folder is missing, ValueError where it holds neither or both, and as the two do.
    """
    folder = Path(folder)
    lists, shards = (any(folder.glob(pattern)) for pattern in ("*.jsonl", "*.tar*"))
    if lists and shards:
        raise ValueError(f"{folder} holds *.jsonl and *.tar: give each a folder of its own")
    return TarPairs(folder, index_path) if shards else JsonPairs(folder)


def chosen_files(pairs: Any, first: int, last: int | None) -> list[int]:
    """Return the numbers of the files from --data-start to --data-end, both included; None: to the last there is."""
    count = len(pairs.files)
    chosen = [k for k in range(count) if first <= k <= (count if last is None else last)]
    if not chosen:
        numbered = f"the {count} files, which are numbered 0 to {count - 1}"
        raise ValueError(f"--data-start {first} --data-end {last} selects none of {numbered}")
    return chosen
