"""Flags that the scripts which train a GPT share, beside those of utils/cli.py."""

import argparse

from autoregressive.models.sizes import GPT_SIZES
from utils.cli import CFG_SCALE, add_gpt_flags, add_training_flags


def add_gpt_training_flags(
    parser: argparse.ArgumentParser, gpt_type: str, *, sample_cfg_scale: float, wandb_project: str | None = None
) -> None:
    """Add the model, its objective, the weights to start from, and everything that the trainer reads."""
    help = "start from this file or run: its weights, and where it has them optimizer and step"
    if gpt_type == "t2i":
        help += " if the image size is the same"
    parser.add_argument("--gpt-ckpt", default=None, help=help)
    help = "data of a --condition, a folder that dataset/arrays.py wrote; repeatable"
    parser.add_argument("--condition-path", action="append", default=None, metavar="NAME=FOLDER", help=help)
    help = "the same of the held-out data"
    parser.add_argument("--val-condition-path", action="append", default=None, metavar="NAME=FOLDER", help=help)
    help = "what each token is trained by (autoregressive/train/objectives/); held-out losses are the cross-entropy"
    parser.add_argument("--objective", default="cross_entropy", help=help)
    help = "do not torch.compile each block (it is only on CUDA)"
    parser.add_argument("--no-compile", action="store_true", help=help)
    help = "guidance scale of pictures while it trains"
    parser.add_argument("--sample-cfg-scale", type=CFG_SCALE, default=sample_cfg_scale, help=help)
    add_finetune_flags(parser, classes=gpt_type == "c2i")
    add_gpt_flags(parser, GPT_SIZES, training=True, gpt_type=gpt_type)
    add_training_flags(
        parser, epochs=300, batch=256, results_dir="results", num_workers=24, wandb_project=wandb_project
    )


def add_finetune_flags(parser: argparse.ArgumentParser, *, classes: bool) -> None:
    """Add --finetune and --use-ema; with `classes` --class-rows too."""
    group = parser.add_argument_group("fine-tuning")
    help = "take only the weights of --gpt-ckpt, and begin at step 0: other data, classes or image size"
    group.add_argument("--finetune", action="store_true", help=help)
    group.add_argument("--use-ema", action="store_true", help="with --finetune: begin with the file's averaged weights")
    if classes:
        help = (
            "with --finetune, whose row a class begins with: that of the class of its name (the default), of its number, or a "
            "new one"
        )
        group.add_argument("--class-rows", choices=["name", "number", "new"], default=None, help=help)
