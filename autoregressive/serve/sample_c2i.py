"""Draws a few images of chosen classes into one grid, their tokens by vLLM.

python3 autoregressive/serve/sample_c2i.py --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt --gpt-model GPT-L

In an environment that has vLLM: `bash scripts/serve.sh` makes one.
"""

import argparse

from autoregressive.models.sizes import GPT_SIZES
from autoregressive.sample.sample_c2i import IMAGENET_CLASSES
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    add_gpt_file_flags,
    add_gpt_flags,
    add_image_size_flags,
    add_run_flags,
    add_sampling_flags,
    add_tokenizer_flags,
    add_vllm_flags,
    flag_parser,
    positive_int,
    run_script,
)


def main(args: argparse.Namespace) -> None:
    from autoregressive.serve.common import draw_grid, open_models
    from autoregressive.serve.engine import ImageRequest

    if args.gpt_type != "c2i":
        raise ValueError("sample_c2i.py draws from class-conditional models; for captions there is sample_t2i.py")
    models = open_models(args)
    labels = args.labels
    if labels is None:
        labels = IMAGENET_CLASSES if args.num_classes >= 1000 else [i % args.num_classes for i in range(8)]
    draw_grid(args, models, [ImageRequest(label=label, **models.settings) for label in labels])


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    add_gpt_flags(parser, GPT_SIZES)
    add_gpt_file_flags(parser, required=True)
    add_tokenizer_flags(parser, VQ_SIZES, required=True)
    add_image_size_flags(parser, 384)
    add_sampling_flags(parser, cfg_scale=4.0, top_k=2000)
    add_run_flags(parser)
    add_vllm_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i is a function of the seed and i")
    parser.add_argument(
        "--labels", type=int, nargs="+", default=None, help="the classes to draw (default: eight of them)"
    )
    parser.add_argument("--columns", type=positive_int, default=4, help="images in a row of the grid")
    parser.add_argument("--output", default="sample_c2i_vllm.png", help="the picture to write")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
