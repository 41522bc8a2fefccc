"""Draws extracted codes back as images, so that you can see that they are the right ones.

    python3 tools/check_image_codes.py --code-path my_codes
    python3 tools/check_image_codes.py --code-path imagenet_code_c2i_flip_ten_crop --vq-ckpt vq_ds16_c2i.pt --image-size 384

Each row of the picture is a sample and each column one of its views. What the rows are is printed, with the range of the
codes and how much of the codebook they use. Either layout is read; `--verify` also reads the whole folder.
"""

import argparse
from typing import TYPE_CHECKING

from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    SEED,
    add_flag,
    add_image_size_flags,
    add_store_true,
    add_tokenizer_flags,
    flag_parser,
    given,
    grid_size,
    nonnegative_int,
    positive_int,
    run_script,
    tokenizer_beliefs,
)

if TYPE_CHECKING:
    import numpy as np

# Pixels that go through the decoder at once, 8 views of 256x256.
DECODED_PIXELS = 8 * 256 * 256


def main(args: argparse.Namespace) -> None:
    from math import isqrt
    from pathlib import Path

    import numpy as np
    import torch

    from dataset.codes import open_codes
    from tokenizer.load import find_tokenizer, load_tokenizer
    from utils.distributed import start
    from utils.images import make_grid, save_png, to_uint8
    from utils.runs import find_checkpoint

    asked = given(args.image_size)
    if asked:
        grid_size(asked, args.downsample_size)
    codes_folder = open_codes(args.code_path, asked, args.downsample_size, random_view=False)
    source = codes_folder.sources[0]
    side, settings = isqrt(source.tokens), codes_folder.settings
    made_by = settings and settings.tokenizer
    print(f"{args.code_path}: {len(source)} samples of {len(source.view_names)} views and {source.tokens} tokens")
    if args.verify:
        print(f"verified: {source.verify(args.codebook_size or (settings.codebook_size if settings else 16384))}")
    if args.vq_ckpt is None and args.verify:
        return
    if not (args.vq_ckpt or made_by):
        raise ValueError(
            "--vq-ckpt is missing: give the tokenizer that made the codes, or --verify to check files only"
        )

    dist = start(args.device)
    beside = Path(args.code_path, "index.json")
    path = find_checkpoint(args.vq_ckpt) if args.vq_ckpt else find_tokenizer(beside, made_by)
    known = {**tokenizer_beliefs(args), "fingerprint": made_by}
    tokenizer = load_tokenizer(path, device=dist.device, use_ema=args.use_ema or None, **known)
    codebook_size = tokenizer.codebook_size
    if given(args.downsample_size) not in (None, tokenizer.downsample):
        what = f"--downsample-size {args.downsample_size} is not that of {path}"
        raise ValueError(f"{what}, whose tokens are {tokenizer.downsample} pixels a side")
    positions = choose(source.numbers, args.indices, args.count, args.seed)
    views = len(source.view_names)
    codes = source.rows(np.repeat(positions, views), np.tile(np.arange(views), len(positions)))  # (n*views, N)
    codes = codes.astype(np.int64)
    if not 0 <= codes.min() <= codes.max() < codebook_size:
        what = f"the samples drawn from {args.code_path} have codes from {codes.min()} to {codes.max()}"
        raise ValueError(f"{what}, outside a codebook of {codebook_size}: extract them again")
    labels = source.labels(positions).tolist()
    classes = settings.classes if settings else None
    for row, (number, label) in enumerate(zip(source.numbers[positions].tolist(), labels, strict=True)):
        name = f" ({classes[label]})" if classes else ""
        print(f"row {row}: sample {number}, label {label}{name}")
    print(f"columns: {', '.join(source.view_names)}")
    used = len(np.unique(codes))
    print(
        f"codes from {codes.min()} to {codes.max()}; {used} of {codebook_size} are used "
        f"({100 * used / codebook_size:.1f}%) by the {codes.size} drawn"
    )
    at_once = max(1, DECODED_PIXELS // (side * tokenizer.downsample) ** 2)
    parts = torch.from_numpy(codes).view(-1, side, side).split(at_once)
    pictures = np.concatenate([to_uint8(tokenizer.to_pixels(part.to(tokenizer.device))) for part in parts])
    save_png(make_grid(pictures, columns=views), args.output)
    print(f"wrote {args.output}")


def choose(numbers: "np.ndarray", asked: list[int] | None, count: int, seed: int) -> "np.ndarray":
    """Positions of the samples to draw: those `asked` for by number, or `count` that follow from the seed, ascending.

    numbers: the samples' numbers in the data set, (n,) ascending. Raises ValueError where one asked for is not there.
    """
    import numpy as np

    if asked is None:
        return np.sort(np.random.default_rng(seed).choice(len(numbers), min(count, len(numbers)), replace=False))
    absent = sorted(set(asked) - set(numbers[np.isin(numbers, asked)].tolist()))
    if absent:
        raise ValueError(
            f"--indices {' '.join(map(str, absent))}: no such samples; there are {len(numbers)} with numbers from "
            f"{numbers[0]} to {numbers[-1]}, less the images that could not be read"
        )
    return np.searchsorted(numbers, asked)


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--code-path", required=True, help="folder of codes, packed or in the published layout")
    add_tokenizer_flags(parser, VQ_SIZES, default="the one that the codes record, found near them")
    add_store_true(parser, "--use-ema", "the codes were made with the averaged weights of the file")
    add_image_size_flags(parser, 256, of_file=True)
    parser.add_argument("--count", type=positive_int, default=8, help="samples to draw")
    parser.add_argument("--seed", type=SEED, default=0, help="decides which")
    add_flag(parser, "--indices", nonnegative_int, None, "these samples instead, by number", nargs="+")
    parser.add_argument("--output", default="check_image_codes.png", help="the picture to write")
    add_store_true(parser, "--verify", "read the whole folder and compare checksums; needs no --vq-ckpt")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
