"""Judge of drawings of people: the nearest of all real drawings, by the mean square of the pixels' differences in [0, 1].

judge = Judge(Path("quickstart/drawings"))
judge.roles_right(images, ["cook", "judge"])             # uint8 (n, H, W, 3) -> share
"""

import json
from pathlib import Path

import numpy as np

from dataset.pixels import load_rgb
from tokenizer.base import Tokenizer
from tools.stages import reconstruct


class Judge:
    """The real drawings of make_drawings.py's folder, and how near others are to them."""

    def __init__(self, folder: Path):
        self.kinds = {
            split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
            for split in ("train", "held_out")
        }
        self.train, self.held_out = (self._read(folder, split) for split in ("train", "held_out"))
        self.every = np.concatenate([self.train, self.held_out])
        self.kind = [*self.kinds["train"], *self.kinds["held_out"]]

    def _read(self, folder: Path, split: str) -> np.ndarray:
        return np.stack([np.asarray(load_rgb(folder / kind["image_path"])) for kind in self.kinds[split]])

    def distances(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return the mean square of differences: uint8 (n, H, W, 3), (m, H, W, 3) -> (n, m)."""
        a, b = (part.reshape(len(part), -1).astype(np.float64) / 255 for part in (images, others))
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return squares.clip(0) / a.shape[1]

    def roles_right(self, images: np.ndarray, roles: list[str]) -> float:
        """Return the share of images next to a real drawing of the role."""
        nearest = self.distances(images, self.every).argmin(1)
        return sum(self.kind[i]["role"] == role for i, role in zip(nearest, roles, strict=True)) / len(roles)

    def kinds_right(self, images: np.ndarray) -> dict[str, float]:
        """Return the shares of role, person and tone that fit, of images of the first held-out drawings in order."""
        nearest, asked = self.distances(images, self.every).argmin(1), self.kinds["held_out"][: len(images)]
        return {
            name: sum(self.kind[i][name] == kind[name] for i, kind in zip(nearest, asked, strict=True)) / len(asked)
            for name in ("role", "person", "tone")
        }

    def floor(self, tokenizer: Tokenizer) -> float:
        """Return the median distance of training drawings from their own reconstructions."""
        recons, _ = reconstruct(tokenizer, self.train)
        difference = recons.astype(np.float64) / 255 - self.train.astype(np.float64) / 255
        return float(np.median((difference**2).mean((1, 2, 3))))
