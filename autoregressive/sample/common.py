"""What the sampling scripts share: from their flags to a pipeline, files of prompts, and many images over processes.

pipeline, gpt_path, vq_path = build_pipeline(args, device)
prompts = read_prompt_table("PartiPrompts.tsv")
mine = share_of_missing(dist, folder, png, count, batch)
save_images(pipeline.batches(labels, indices=mine), png, len(mine), progress=dist.is_main)
"""

import argparse
import csv
import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from autoregressive.models.generate import SamplingConfig
from autoregressive.pipeline import PRECISIONS, ImagePipeline, load_gpt, warn_of_long_features
from tokenizer.tokenizer_image.load import load_tokenizer
from utils.cli import grid_size, layout_numbers
from utils.distributed import Distributed, pick_device
from utils.images import is_whole_png, save_png
from utils.runs import find_checkpoint

if TYPE_CHECKING:
    from language.prompts import PromptFeatures

# A longer cell is a quotation mark that is closed far below, not a prompt.
csv.field_size_limit(1 << 20)


def sampling_settings(args: argparse.Namespace) -> dict:
    """The fields of SamplingConfig that the flags give. Raises ValueError for a value out of range."""
    settings = {
        "cfg_scale": args.cfg_scale,
        "cfg_interval": args.cfg_interval,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "sample_logits": not args.greedy,
    }
    SamplingConfig(**settings)
    return settings


def build_pipeline(
    args: argparse.Namespace, device: torch.device, batch_size: int | None = None
) -> tuple[ImagePipeline, Path, Path]:
    """Loads both models as the flags ask. Returns the pipeline and the paths of the GPT's and the tokenizer's file.

    With --gpt-type t2i the T5 has to be there too, but with --t5-feat-path; it is loaded with the first prompt.
    Raises ValueError where a flag and a file disagree, FileNotFoundError for a file that is not there.
    """
    grid_size(args.image_size, args.downsample_size)
    ar_token_num, spe_token_num = layout_numbers(args)
    for flag, value in (("--gpt-ckpt", args.gpt_ckpt), ("--vq-ckpt", args.vq_ckpt)):
        if value is None:
            raise ValueError(
                f"{flag} is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
            )
    gpt_path, vq_path = find_checkpoint(args.gpt_ckpt), find_checkpoint(args.vq_ckpt)
    text = text_settings(args) if args.gpt_type == "t2i" else {}
    tokenizer = load_tokenizer(
        vq_path,
        vq_model=args.vq_model,
        codebook_size=args.codebook_size,
        codebook_embed_dim=args.codebook_embed_dim,
        device=device,
        use_ema=args.use_ema,
    )
    if args.downsample_size != tokenizer.downsample:
        raise ValueError(
            f"--vq-model {args.vq_model} makes tokens of {tokenizer.downsample} pixels: pass --downsample-size {tokenizer.downsample}"
        )
    gpt = load_gpt(
        gpt_path,
        device=device,
        dtype=PRECISIONS[args.precision],
        use_ema=args.use_ema,
        image_size=args.image_size,
        downsample_size=args.downsample_size,
        gpt_model=args.gpt_model,
        gpt_type=args.gpt_type,
        codebook_size=args.codebook_size,
        num_classes=args.num_classes if args.gpt_type == "c2i" else None,
        cls_token_num=args.cls_token_num,
        ar_token_num=ar_token_num or 1,
        spe_token_num=spe_token_num or 0,
    )
    if args.gpt_type == "t2i" and args.t5_feature_dim != gpt.args.caption_dim:
        raise ValueError(
            f"{gpt_path} takes text features of {gpt.args.caption_dim} numbers: pass --t5-feature-dim {gpt.args.caption_dim}"
        )
    if args.compile and device.type != "cuda":
        print(f"--compile: on {device.type} the plain decode step is used")
    pipeline = ImagePipeline(gpt, tokenizer, batch_size=batch_size, compile=args.compile, **text)
    return pipeline, gpt_path, vq_path


def text_settings(args: argparse.Namespace) -> dict:
    """How prompts are encoded, as ImagePipeline takes it. Raises FileNotFoundError where there is no T5, ValueError."""
    from language.t5 import find_t5

    if args.t5_device:
        pick_device(args.t5_device)  # a device that is not there is told before models are read
    if args.t5_feature_max_len > args.cls_token_num:
        raise ValueError(
            f"--t5-feature-max-len {args.t5_feature_max_len} is more than the model's --cls-token-num {args.cls_token_num}"
        )
    settings = {"t5_tokens": args.t5_feature_max_len, "left_padding": not args.no_left_padding}
    if args.t5_feat_path:
        return settings
    return {
        "t5_path": find_t5(args.t5_path, args.t5_model_type),
        "t5_device": args.t5_device,
        "t5_dtype": PRECISIONS[args.t5_precision or args.precision],
        **settings,
    }


def open_prompt_features(args: argparse.Namespace, file: str | Path, count: int) -> "PromptFeatures | None":
    """What --t5-feat-path has of the file's `count` prompts; None without the flag. Raises as PromptFeatures does."""
    if not args.t5_feat_path:
        return None
    from language.prompts import PromptFeatures

    return PromptFeatures(args.t5_feat_path, file, count, dim=args.t5_feature_dim)


def features_of(stored: "PromptFeatures", numbers: Sequence[int], tokens: int) -> list[torch.Tensor]:
    """The features of the prompts with these numbers, at most `tokens` rows of each. Warns of those that are cut."""
    found = {number: stored[number] for number in numbers}
    warn_of_long_features({number: len(rows) for number, rows in found.items()}, tokens)
    return [found[number][:tokens] for number in numbers]


def read_prompt_lines(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line; blank lines are passed over.

    Raises FileNotFoundError, and ValueError where the file is not UTF-8 or has no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of prompts at {path}: it has a prompt on each line")
    prompts = [line.strip() for line in _lines(path) if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompts: it has a prompt on each line")
    return prompts


def read_prompt_table(path: str | Path) -> list[str]:
    """The column `Prompt` of a table with tabs between its columns and their names in the first line.

    A cell may stand in quotation marks, and then have tabs, line ends and doubled marks in it. Blank lines are passed
    over. Raises FileNotFoundError, and ValueError that names the line: no such column, no rows, an empty prompt, a
    quotation mark that is never closed, or bytes that are not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file of prompts at {path}: --prompt-csv takes any table with tabs between its columns and a column named "
            "Prompt in its first line; PartiPrompts.tsv is in https://github.com/google-research/parti, captions of COCO "
            "are in https://cocodataset.org"
        )
    lines = _lines(path)
    if not any(map(str.strip, lines)):
        raise ValueError(f"{path} is empty: it has a table with a column Prompt")
    try:
        return _prompts_of_table(lines, path)
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a table with tabs between its columns: {error}") from error


def _lines(path: Path) -> list[str]:
    """The lines of a text file with their ends as they are, since within quotation marks they belong to a prompt."""
    try:
        return list(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


def _prompts_of_table(lines: list[str], path: Path) -> list[str]:
    rows = csv.reader(lines, delimiter="\t")
    names = [name.strip() for name in next(row for row in rows if row)]
    if "Prompt" not in names:
        raise ValueError(
            f"{path} has no column Prompt; its columns are {', '.join(map(repr, names))} (with tabs between them, named in "
            "the first line)"
        )
    column, prompts, spread, start = names.index("Prompt"), [], [], rows.line_num
    for row in rows:
        first, last, start = start + 1, rows.line_num, rows.line_num
        prompt = row[column] if len(row) > column else ""
        if prompt.strip():
            prompts.append(prompt)
        elif row:
            raise ValueError(f"line {first} of {path} has an empty Prompt: fill it in, or remove the line")
        if last > first:
            spread.append(f"{first} to {last}")
    if not prompts:
        raise ValueError(f"{path} has no prompts below its first line")
    _require_closed(lines[first - 1 :], first, path)
    if spread:
        listed = ", ".join(spread[:5]) + (", …" if len(spread) > 5 else "")
        warnings.warn(
            f"{path}: quotation marks join several lines into one row (lines {listed}); if that is not meant, double them",
            stacklevel=3,
        )
    return prompts


def _require_closed(lines: list[str], number: int, path: Path) -> None:
    """Raises ValueError where the file ends within quotation marks, which took all its last lines for one prompt."""
    try:
        list(csv.reader(lines, delimiter="\t", strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise ValueError(
                f"line {number} of {path} opens a quotation mark that is never closed: double it"
            ) from error


def share_of_missing(dist: Distributed, folder: Path, png: Callable[[int], Path], count: int, batch: int) -> list[int]:
    """The images of 0 … count - 1 that this process is to draw: those not there whole, dealt out in batches."""
    missing = dist.broadcast([i for i in range(count) if not is_whole_png(png(i))] if dist.is_main else None)
    if dist.is_main:
        print(f"{folder}: {count - len(missing)} of {count} images are there, {len(missing)} to draw")
    shares = [missing[i : i + batch] for i in range(0, len(missing), batch)]
    return [index for share in shares[dist.rank :: dist.world_size] for index in share]


def save_images(
    batches: Iterable[tuple[list[int], np.ndarray]], png: Callable[[int], Path], total: int, *, progress: bool
) -> None:
    """Writes the images of ImagePipeline.batches as they come."""
    with tqdm(total=total, unit="img", disable=not progress) as bar:
        for indices, images in batches:
            for index, image in zip(indices, images, strict=True):
                save_png(image, png(index))
            bar.update(len(indices))
