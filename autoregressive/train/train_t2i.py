"""Trains a GPT on image-text pairs, conditioned on features of T5: stage 1 at 256 pixels, stage 2 at 512 from its weights.

    torchrun --nproc_per_node=8 autoregressive/train/train_t2i.py --data-path laion_coco --t5-feat-path t5_features \\
        --vq-ckpt vq_ds16_t2i.pt --gpt-model GPT-XL --image-size 256
    python3 autoregressive/train/train_t2i.py --dataset t2i_code --code-path codes --data-path laion_coco \\
        --t5-feat-path t5_features --resume                          # codes of extract_codes_t2i.py

With `--dataset t2i` the frozen tokenizer encodes each batch on the device. Pairs are jsonl lists or WebDataset shards.
A pair without features, or whose image cannot be read or is too small, does not count in the loss; the log's `valid` is
the share that does. Recipe: LlamaGen (arXiv 2406.06525, section 3.2); parallel layout: PAR (2412.15119).
"""

import argparse

from autoregressive.train.flags import add_gpt_training_flags
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    PROBABILITY,
    add_flag,
    add_image_size_flags,
    add_reading_flags,
    add_switch,
    add_tokenizer_flags,
    flag_parser,
    grid_size,
    layout_numbers,
    positive_int,
    run_script,
    untold,
)
from utils.training.flags import add_parallel_flags


def main(args: argparse.Namespace) -> None:
    from autoregressive.train.control import ask_control, rotary_grid_to_train
    from autoregressive.train.recipe import fit, join, known_model, known_sizes, new_model
    from autoregressive.train.text_data import TextData, check_flags

    known_sizes(args)
    layout_numbers(args)  # refuses two that do not go together
    if args.gpt_type != "t2i":
        raise ValueError("train_t2i.py trains text-conditional models; for classes there is train_c2i.py")
    check_flags(args)
    ask_control(args)

    dist, plan = join(args)
    resumed = known_model(args)
    args.random_sides = args.random_sides or resumed.get("random_sides")
    data = TextData(args, dist, resumed)
    grid = grid_size(args.image_size, args.downsample_size)
    args.rope_grid, notes = rotary_grid_to_train(args, grid, resumed)
    model = new_model(args, grid, caption_dim=args.t5_feature_dim, rope_grid=args.rope_grid)
    fit(args, plan, data, model, notes=[*data.notes, *notes])


def flags() -> argparse.ArgumentParser:
    added = "--data-parallel --drop-path-rate --ema --grad-precision --no-wandb --t5-feature-dim --wandb-project"
    parser = flag_parser(__doc__, added.split())
    add_flag(parser, "--data-path", None, None, "folder of *.jsonl lists, or of WebDataset *.tar shards", required=True)
    help = "folder of caption features, packed or in the published layout"
    add_flag(parser, "--t5-feat-path", None, None, help, required=True)
    help = "features of shorter captions, taken with probability 0.3"
    add_flag(parser, "--short-t5-feat-path", None, None, help)
    add_flag(parser, "--dataset", None, "t2i", "t2i: images, encoded while training; t2i_code: their codes")
    add_flag(parser, "--code-path", None, None, "folder of codes, for --dataset t2i_code")
    add_flag(parser, "--index-path", None, None, "where the index of WebDataset shards goes (default: beside them)")
    add_flag(parser, "--val-data-path", None, None, "held-out pairs: their loss is reported too")
    add_flag(parser, "--val-t5-feat-path", None, None, "features of the held-out pairs' captions")
    add_flag(parser, "--val-code-path", None, None, "their codes, for --dataset t2i_code")
    add_switch(parser, "--random-crop", False, "a random crop of each image in place of the centred one")
    add_tokenizer_flags(parser, VQ_SIZES)
    help = "encode images in --mixed-precision: faster, but some codes differ from those of float32"
    add_switch(parser, "--half-tokenizer", False, help)
    add_gpt_training_flags(parser, "t2i", sample_cfg_scale=7.5)
    help = "train at several resolutions: each step's images and controls are resized to a height and width from LEAST to MOST"
    add_flag(parser, "--random-sides", positive_int, None, help, nargs=2, metavar=("LEAST", "MOST"))
    add_flag(parser, "--drop-path", PROBABILITY, 0.0, "the same as --drop-path-rate")
    help = "numbers a caption token's feature has; unless given, the features'"
    add_flag(parser, "--t5-feature-dim", positive_int, untold(2048), help)
    add_image_size_flags(parser, 384, of_file=True)
    add_reading_flags(parser)
    add_parallel_flags(parser, "ddp")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
