"""Leftovers of the stages of scripts/quickstart.sh, for the reports: the samples, losses, and the seconds of each stage."""

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.files import atomic_write

if TYPE_CHECKING:
    import numpy as np

    from autoregressive.models.trunk import Trunk
    from tokenizer.base import Tokenizer


def newest_file(folder: str | Path, pattern: str) -> Path:
    """Return the newest file of a pattern. Raises FileNotFoundError where there are no finished samples."""
    found = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} has no {pattern}: run the sampling script with --sample-dir {folder} first")
    return found[-1]


def samples_of_prompts(folder: str, prompts: list[str]) -> "np.ndarray":
    """Return the newest samples of sample_t2i_ddp.py, uint8 (n, H, W, 3). Raises ValueError where they are of other prompts."""
    import numpy as np

    from dataset.pixels import load_rgb

    drawn = newest_file(folder, "*/result.jsonl")
    texts = [json.loads(line)["text"] for line in drawn.read_text().splitlines()]
    if texts != prompts[: len(texts)]:
        raise ValueError(f"{drawn} is of other prompts: draw the samples again")
    files = sorted((drawn.parent / "images").glob("*.png"))[: len(texts)]
    return np.stack([np.asarray(load_rgb(path)) for path in files])


def write_pairs(folder: Path, split: str, lines: list[dict]) -> None:
    """Write image-text pairs to `{split}.jsonl`, and again in a folder of their own, `{split}/{split}.jsonl`."""
    for file, up in ((f"{split}.jsonl", ""), (f"{split}/{split}.jsonl", "../")):
        with atomic_write(folder / file) as f:
            f.writelines(f"{json.dumps({**line, 'image_path': up + line['image_path']})}\n".encode() for line in lines)


def stage_seconds(path: Path) -> dict[str, float]:
    """Return the seconds of each stage over all calls, and their total."""
    seconds: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        stage, value = line.split("\t")
        seconds[stage] = seconds.get(stage, 0) + float(value)
    return {**seconds, "total": sum(seconds.values())}


def models_of(args: Namespace) -> "tuple[Trunk, Tokenizer]":
    """Load the GPT of --gpt-ckpt, and its tokenizer of --vq-ckpt."""
    from autoregressive.pipeline import load_gpt
    from tokenizer.load import load_tokenizer
    from utils.runs import find_checkpoint

    gpt = load_gpt(find_checkpoint(args.gpt_ckpt))
    return gpt, load_tokenizer(find_checkpoint(args.vq_ckpt), fingerprint=gpt.file_config.get("tokenizer"))


def reconstruct(tokenizer: "Tokenizer", images: "np.ndarray") -> "tuple[np.ndarray, np.ndarray, float]":
    """Return what a tokenizer makes of images, uint8 (n, H, W, 3), their codes (n, h, w), and the mean PSNR in dB."""
    import numpy as np
    import torch

    from utils.images import peak_signal_to_noise_ratio, to_uint8

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = torch.cat([tokenizer.to_codes(part) for part in pixels.split(64)])
    recons = np.concatenate([to_uint8(tokenizer.to_pixels(part)) for part in codes.split(64)])
    ratios = [peak_signal_to_noise_ratio(a, b) for a, b in zip(images, recons, strict=True)]
    return recons, codes.numpy(), float(np.mean(ratios))


def last_held_out_loss(results: str) -> float:
    """Return the last val_loss that the newest run of a results folder logged."""
    from utils.runs import runs_in

    lines = map(json.loads, (runs_in(results)[0].folder / "metrics.jsonl").read_text().splitlines())
    return [line["val_loss"] for line in lines if "val_loss" in line][-1]
