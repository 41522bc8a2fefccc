"""Filling a hole in a picture: the tokens around the hole are known, the tokens in it are drawn.

    python3 examples/fill_hole.py --gpt-ckpt c2i_B_256.pt --vq-ckpt vq_ds16_c2i.pt --image dog.png --label 207 --box 4 4 12 12

A raster model sees what is above and left of a token, so the hole's lower right edge may show.
"""

import argparse

from autoregressive.sample.flags import add_sampling_flags, sampling_config
from utils.cli import SEED, add_run_flags, flag_parser, nonnegative_int, run_script


def main(args: argparse.Namespace) -> None:
    import torch
    from PIL import Image

    from autoregressive.pipeline import ImagePipeline

    pipeline = ImagePipeline.from_pretrained(args.gpt_ckpt, vq=args.vq_ckpt, device=args.device)
    side = pipeline.gpt.layout.grid_size
    top, left, bottom, right = args.box
    if not (top < bottom <= side and left < right <= side):
        raise ValueError(f"--box {top} {left} {bottom} {right} is no part of the {side}x{side} tokens")
    known = pipeline.encode_image(Image.open(args.image)).view(1, side, side).clone()
    known[:, top:bottom, left:right] = -1
    drawn = pipeline.generate_codes(
        torch.tensor([args.label]), known=known.flatten(1), seed=args.seed, **vars(sampling_config(args))
    )
    Image.fromarray(pipeline.decode(drawn)[0]).save(args.output)
    print(f"wrote {args.output}: {int((known < 0).sum())} of {side**2} tokens drawn")


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument(
        "--gpt-ckpt", required=True, help="GPT weights: a file, a run's folder, or a released file's name"
    )
    parser.add_argument("--vq-ckpt", required=True, help="the tokenizer's weights")
    parser.add_argument("--image", required=True, help="the picture with the hole")
    parser.add_argument(
        "--box", type=nonnegative_int, nargs=4, required=True, help="top, left, bottom, right, in tokens"
    )
    parser.add_argument("--label", type=nonnegative_int, required=True, help="class to draw the hole as")
    parser.add_argument("--seed", type=SEED, default=0, help="fixes what is drawn")
    parser.add_argument("--output", default="filled.png", help="the picture to write")
    add_sampling_flags(parser, cfg_scale=2.0, top_k=0)
    add_run_flags(parser, precision=False)
    return parser


if __name__ == "__main__":
    run_script(main, flags())
