"""Judge of drawings of people, the nearest of all real drawings by the mean square of the pixels' differences in [0, 1]; its report.

judge = Judge(Path("quickstart/drawings"))
judge.roles_right(images, ["cook", "judge"])             # uint8 (n, H, W, 3) -> share
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from autoregressive.models.trunk import Trunk
from autoregressive.train.evaluation import mean_loss
from dataset.codes import open_codes
from dataset.pixels import load_rgb
from tokenizer.base import Tokenizer
from tools.stages import last_held_out_loss, models_of, newest_file, reconstruct, samples_of_prompts, stage_seconds
from utils.distributed import start
from utils.images import labelled_grid, make_grid, save_png

COLUMNS = 12  # of samples.png


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
        recons, *_ = reconstruct(tokenizer, self.train)
        difference = recons.astype(np.float64) / 255 - self.train.astype(np.float64) / 255
        return float(np.median((difference**2).mean((1, 2, 3))))


def report_of(args: Namespace) -> dict[str, Any]:
    """Return the figures of a model (tools/drawings_report.py); draws reconstructions.png and samples.png."""
    output, judge = Path(args.output), Judge(Path(args.drawings))
    gpt, tokenizer = models_of(args)
    recons, _, psnr = reconstruct(tokenizer, judge.held_out)
    shown = np.linspace(0, len(recons) - 1, 16).astype(int)
    pairs = np.concatenate([judge.held_out[shown], recons[shown]])
    save_png(make_grid(pairs, columns=16), output / "reconstructions.png")
    samples, own = of_prompts(args, judge) if args.prompts else of_classes(args, gpt, judge)
    return {
        "seconds": stage_seconds(output / "seconds.tsv"),
        "psnr_held_out_db": psnr,
        "samples": len(samples),
        **own,
        "reconstructions_right": judge.kinds_right(recons),
        "mean_square_to_nearest_training_drawing": {
            "samples": float(np.median(judge.distances(samples, judge.train).min(1))),
            "reconstructions_of_training": judge.floor(tokenizer),
            "held_out": float(np.median(judge.distances(judge.held_out, judge.train).min(1))),
        },
    }


def of_classes(args: Namespace, gpt: Trunk, judge: Judge) -> tuple[np.ndarray, dict]:
    """Return samples by class, uint8 (n, H, W, 3), and their figures; draws samples.png, one of each class."""
    names = [name.replace("-", " ") for name in gpt.file_config["classes"]]
    with np.load(newest_file(args.samples, "*.npz")) as archive:
        samples, asked = archive["arr_0"], archive["arr_1"]
    first = np.unique(asked, return_index=True)[1][: COLUMNS * 6]
    grid = labelled_grid(samples[first], [names[label] for label in asked[first]], COLUMNS, side=64)
    save_png(grid, Path(args.output) / "samples.png")
    return samples, {
        "nll_held_out_nats_per_token": mean_loss(gpt, open_codes(args.codes, random_view=False), 64, start("cpu")),
        "samples_role_as_asked": judge.roles_right(samples, [names[label] for label in asked]),
        "chance_of_a_role": 1 / len(names),
    }


def of_prompts(args: Namespace, judge: Judge) -> tuple[np.ndarray, dict]:
    """Return samples by name, uint8 (n, H, W, 3), and their figures; draws samples.png, each beside the drawing that was held out."""
    texts = [kind["text"][1] for kind in judge.kinds["held_out"]]
    samples = samples_of_prompts(args.samples, texts)
    shown = np.linspace(0, len(samples) - 1, min(len(samples), COLUMNS * 3)).astype(int)
    pairs = np.concatenate([judge.held_out[shown], samples[shown]], axis=2)
    save_png(labelled_grid(pairs, [texts[i] for i in shown], COLUMNS // 2, side=128), Path(args.output) / "samples.png")
    return samples, {
        "nll_held_out_nats_per_token": last_held_out_loss(args.gpt_ckpt),
        "samples_as_asked": judge.kinds_right(samples),
        "chance": {name: 1 / len({kind[name] for kind in judge.kind}) for name in ("role", "person", "tone")},
    }
