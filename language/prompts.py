"""Prompts of a file and their features: made once by language/extract_t5_feature.py, then drawn from without the T5.

    pairs = PromptList("parti.tsv", prompts)                      # what extraction reads where --data-path is a file
    features = PromptFeatures("t5_features", "parti.tsv", len(prompts), dim=2048)
    rows = features[17]                                           # (length, 2048), of prompt 17

Features lie under the file's name without its ending and the prompt's number from 0.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dataset.text_features import EXTRACTION, open_features


class PromptList(Sequence[str]):
    """A file's prompts as extraction takes captions: one file of pairs that have a text and no image."""

    def __init__(self, path: str | Path, prompts: Sequence[str]):
        self.path, self.prompts = Path(path), prompts
        self.files = [(self.path.stem, len(prompts))]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> str:
        return self.prompts[index]

    def texts(self, index: int) -> list[str]:
        """The prompt as the only text."""
        return [self.prompts[index]]

    def where(self, index: int) -> str:
        """A prompt's place, for messages."""
        return f"prompt {index} (from 0) of {self.path}"


class PromptFeatures:
    """The features of every prompt of a file, packed or in the published layout, by the prompt's number.

    folder: as extraction wrote it of the file at `path`, or of a list of the same name. count: how many prompts there are.
    Raises FileNotFoundError where the folder is missing, ValueError where it has no features of such a file, of another
    number of prompts, not of each of them, or of another width than `dim`.
    """

    def __init__(self, folder: str | Path, path: str | Path, count: int, dim: int | None = None):
        self.stem, self.store = Path(path).stem, open_features(folder, dim=dim)
        self.folder = self.store.folder / self.stem
        there = self.store.present(self.stem)
        again = f"extract them anew\n  python3 {EXTRACTION} --data-path {path} --t5-path ANOTHER_FOLDER"
        if not len(there):
            raise ValueError(
                f"{folder} has no features of {path}: a folder {self.stem}/ is looked for. To get them, {again}"
            )
        if len(there) != count:
            raise ValueError(f"{self.folder} has features of {len(there)} prompts and {path} has {count}: {again}")
        missing = (~there).nonzero()[0].tolist()
        if missing:
            listed = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
            raise ValueError(
                f"{self.folder} has no features of {len(missing)} of {count} prompts ({listed}, from 0): {again}"
            )

    def __getitem__(self, index: int) -> Tensor:
        return self.store.get(self.stem, index)
