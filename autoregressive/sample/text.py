"""Part of the sampling scripts that is of prompts: which are drawn, their features or the T5 that makes them."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from autoregressive.pipeline import PRECISIONS, ImagePipeline
from autoregressive.released import find_identity, flags_of
from autoregressive.request import Request
from autoregressive.sample.common import find_gpt, requests_of
from autoregressive.text import check_prompts, warn_of_long_features, with_encoder
from language.prompts import PromptFeatures, read_prompt_lines
from language.t5 import find_t5
from utils.checkpoint import read_checkpoint
from utils.cli import given
from utils.distributed import pick_device
from utils.logger import console_logger
from utils.origin import require_encoder

PROMPTS = [
    "A lighthouse on a rocky coast at dusk, its lamp just lit, oil painting.",
    "A wooden bowl of ripe persimmons on a linen cloth in soft window light.",
    "An orange tram crosses a stone bridge in heavy snow.",
    "A paper crane stands on a stack of old books, close-up photograph.",
]


def prompts_to_draw(args: argparse.Namespace) -> tuple[list[str], list[torch.Tensor]]:
    """Return the prompts that the flags name, and their features where those are stored (else none).

    Raises ValueError for flags that do not go together, and for a prompt of which nothing would be read.
    """
    if args.gpt_type != "t2i":
        raise ValueError(
            "--gpt-type t2i draws from text-conditional models; for classes there are sample_c2i.py and edit_c2i.py"
        )
    if args.t5_feat_path and (args.prompt or not args.prompt_file):
        raise ValueError(
            f"--t5-feat-path {args.t5_feat_path} has features of a file's prompts: give that file as --prompt-file, and no "
            "--prompt"
        )
    prompts = list(args.prompt or [])
    if args.prompt_file:
        prompts += read_prompt_lines(args.prompt_file)
    prompts = prompts or PROMPTS
    check_prompts(prompts)
    stored = open_prompt_features(args, args.prompt_file, prompts)
    return prompts, features_of(stored, range(len(prompts)), args.t5_feature_max_len) if stored else []


def print_prompts(prompts: Sequence[str]) -> None:
    """Print which image of the grid is of which prompt."""
    for i, prompt in enumerate(prompts):
        print(f"{i}: {' '.join(prompt.split())}")


def prompt_requests(
    args: argparse.Namespace,
    pipeline: ImagePipeline,
    prompts: Sequence[str] | Sequence[torch.Tensor],
    numbers: Sequence[int],
    seed: int,
    *,
    progress: bool = True,
    sides: tuple[int, int] | None = None,
) -> list[Request]:
    """Return the requests that the flags make of prompts or their features, encoded; the text encoder's memory is given back.

    sides: height and width, where they are given.
    """
    negative = {"caption": args.negative_prompt} if (args.negative_prompt or "").strip() else {}
    requests = requests_of(args, "caption", prompts, negative, numbers, seed)
    if sides:
        requests = [pipeline.rectangle(request, *sides) for request in requests]
    requests = pipeline.read(requests, progress=progress)
    pipeline.release_text_encoder()
    return requests


def text_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of ImagePipeline for encoding prompts. Raises FileNotFoundError where there is no T5, ValueError."""
    if args.t5_device:
        pick_device(args.t5_device)  # a device that is not there is told before models are read
    settings = {"t5_tokens": given(args.t5_feature_max_len), "left_padding": not args.no_left_padding}
    if args.t5_feat_path:
        return settings
    asked = {name: given(getattr(args, name)) for name in ("t5_path", "t5_model_type")}
    near = with_encoder(find_gpt(args), asked)
    path = find_t5(near["t5_path"] or args.t5_path, near["t5_model_type"] or args.t5_model_type)
    if near != asked:
        print(f"--t5-path {path}: the text encoder of the GPT's captions")
    return {
        "t5_path": path,
        "t5_device": args.t5_device,
        "t5_dtype": PRECISIONS[args.t5_precision or args.precision],
        **settings,
    }


def open_prompt_features(args: argparse.Namespace, file: str | Path, prompts: Sequence[str]) -> PromptFeatures | None:
    """Return the features that --t5-feat-path has of the file's prompts; None without the flag. Raises as PromptFeatures does."""
    if not args.t5_feat_path:
        return None
    if args.negative_prompt:
        raise ValueError("--negative-prompt needs a T5, and --t5-feat-path draws without: leave one of the two out")
    console_logger("dataset", os.environ.get("RANK", "0") == "0")  # which tells what could not be compared
    gpt = read_checkpoint(find_gpt(args))
    dim = given(args.t5_feature_dim) or flags_of(find_identity(gpt))["caption_dim"]
    stored = PromptFeatures(args.t5_feat_path, file, prompts, dim=dim)
    require_encoder(gpt.config, stored.store.encoder, args.t5_feat_path)
    return stored


def features_of(stored: PromptFeatures, numbers: Sequence[int], tokens: int) -> list[torch.Tensor]:
    """The features of the prompts with these numbers, at most `tokens` rows of each. Warns of those that are cut."""
    found = [stored[number] for number in numbers]
    warn_of_long_features(list(zip(numbers, map(len, found), strict=True)), tokens)
    return [rows[:tokens] for rows in found]
