"""Draws an image for each of a few prompts into one grid.

python3 autoregressive/sample/sample_t2i.py --gpt-ckpt t2i_XL_stage2_512.pt --vq-ckpt vq_ds16_t2i.pt --prompt "a red lantern"

With --t5-feat-path, features that were made of --prompt-file, no T5 is needed.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autoregressive.models.sizes import GPT_SIZES
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    SEED,
    add_batch_size_flag,
    add_decode_precision_flag,
    add_gpt_file_flags,
    add_gpt_flags,
    add_image_size_flags,
    add_quantize_flag,
    add_run_flags,
    add_sampling_flags,
    add_text_flags,
    add_tokenizer_flags,
    flag_parser,
    positive_int,
    run_script,
)

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = [
    "A lighthouse on a rocky coast at dusk, its lamp just lit, oil painting.",
    "A wooden bowl of ripe persimmons on a linen cloth in soft window light.",
    "An orange tram crosses a stone bridge in heavy snow.",
    "A paper crane stands on a stack of old books, close-up photograph.",
]


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from autoregressive.sample.common import build_pipeline, encode, extra_conditions, sampling_settings
    from utils.distributed import pick_device
    from utils.images import make_grid, save_png

    prompts, stored = prompts_to_draw(args)
    settings = sampling_settings(args)
    pipeline, _, _ = build_pipeline(args, pick_device(args.device), args.batch_size)
    features, negative = (stored, None) if stored else encode(pipeline, prompts, args.negative_prompt, progress=True)
    extra = extra_conditions(args, range(len(features)))
    images = pipeline(features=features, negative_features=negative, extra_conditions=extra, seed=args.seed, **settings)
    save_png(make_grid(np.stack([np.asarray(image) for image in images]), columns=args.columns), args.output)
    print(f"wrote {args.output}: {len(images)} images of {pipeline.image_size}x{pipeline.image_size}")
    print_prompts(prompts)


def prompts_to_draw(args: argparse.Namespace) -> "tuple[list[str], list[Tensor]]":
    """The prompts that the flags name, and their features where those are stored (else none).

    Raises ValueError for flags that do not go together, and for a prompt of which nothing would be read.
    """
    from autoregressive.pipeline import check_prompts
    from autoregressive.sample.common import features_of, open_prompt_features
    from language.prompts import read_prompt_lines

    if args.gpt_type != "t2i":
        raise ValueError("sample_t2i.py draws from text-conditional models; for classes there is sample_c2i.py")
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
    """Tells which image of the grid is of which prompt."""
    for i, prompt in enumerate(prompts):
        print(f"{i}: {' '.join(prompt.split())}")


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = grid_flags(__doc__, "sample_t2i.png")
    add_batch_size_flag(parser)
    add_quantize_flag(parser)
    return parser


def grid_flags(description: str, output: str, *, files_required: bool = False) -> argparse.ArgumentParser:
    """The flags of a script that draws a grid of prompts, whatever draws it. output: the picture's default name."""
    parser = flag_parser(description, added=["--cfg-interval"])
    add_gpt_flags(parser, GPT_SIZES, gpt_type="t2i", gpt_model="GPT-XL")
    add_gpt_file_flags(parser, required=files_required)
    add_tokenizer_flags(parser, VQ_SIZES, required=files_required)
    add_text_flags(parser)
    add_image_size_flags(parser, 512)
    add_sampling_flags(parser, cfg_scale=7.5, top_k=1000, negative="prompt")
    add_run_flags(parser)
    add_decode_precision_flag(parser)
    parser.add_argument("--seed", type=SEED, default=0, help="image i is a function of the seed, i and its prompt")
    parser.add_argument(
        "--prompt",
        action="append",
        default=None,
        help="what to draw; may be given several times (default: four prompts)",
    )
    parser.add_argument("--prompt-file", default=None, help="a text file with a prompt on each line, after those")
    parser.add_argument("--columns", type=positive_int, default=4, help="images in a row of the grid")
    parser.add_argument("--output", default=output, help="the picture to write")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
