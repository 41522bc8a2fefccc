"""Flags that the scripts which train a GPT share, beside those of utils/cli.py."""

import argparse
from typing import Any

from autoregressive.models.sizes import GPT_SIZES
from utils.cli import (
    CFG_SCALE,
    CONTROL_TYPES,
    PORTION,
    PROBABILITY,
    RESULTS,
    SHARE,
    add_flag,
    add_gpt_flags,
    add_image_size_flags,
    add_store_true,
    add_switch,
    flag_parser,
    named_settings,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
)
from utils.training.flags import add_parallel_flags, add_training_flags


def encoder_or_name(text: str) -> Any:
    """Return the settings of an encoder that is drawn anew, or the name of another one: an argparse type."""
    if not text or text.startswith("-"):
        raise argparse.ArgumentTypeError(
            f"must be an encoder's folder or name, or vit,key=value,…, got {text or 'nothing'}"
        )
    return named_settings(text) if text.split(",")[0] in ("vit", "dinov2") else text


def class_flags(description: str | None, *, sharded: bool = False) -> argparse.ArgumentParser:
    """Return the flags of train_c2i.py, or with `sharded` those of train_c2i_fsdp.py, which has other defaults."""
    added = "--vq-ckpt" if sharded else "--data-parallel --grad-precision --no-wandb --vq-ckpt --wandb-project"
    parser = flag_parser(description, added.split())
    add_flag(parser, "--code-path", None, None, "folder of codes, packed or in the published layout", required=True)
    add_flag(parser, "--val-code-path", None, None, "codes of held-out images: their loss is reported too")
    add_flag(parser, "--dataset", None, "imagenet_code", "kind of data")
    add_flag(parser, "--gpt-resume", None, None, "the same as --gpt-ckpt")
    add_flag(parser, "--vq-ckpt", None, None, "the codes' tokenizer: draws grids of samples with it")
    add_gpt_training_flags(parser, "c2i", sample_cfg_scale=2.0, wandb_project="c2i_fsdp" if sharded else None)
    add_image_size_flags(parser, 256, of_file=True)
    add_parallel_flags(parser, "fsdp" if sharded else "ddp")
    group = parser.add_argument_group("condition contrastive alignment (docs/training.md)")
    help = "train by contrast with this frozen model, from its weights unless --gpt-ckpt is given: sampling then needs no guidance"
    add_flag(group, "--cca-reference", None, None, help, metavar="FILE")
    help = "weight of the negatives (default: as published 300 for GPT-L, 500 for GPT-3B, else 1000); more: as more guidance"
    add_flag(group, "--cca-lambda", nonnegative_float, None, help)
    add_flag(group, "--cca-beta", positive_float, None, "scale of the log-ratios (default: 0.02)")
    add_flag(group, "--cca-uncond", PROBABILITY, None, "probability that a sample loses its class (default: 0.1)")
    group = parser.add_argument_group("next-patch prediction")
    add_flag(group, "--patch-level", positive_int, 1, "stages of coarser to finer patches, 1 for none (NPP's own: 2)")
    add_flag(group, "--epoch-rate", PORTION, 0.5, "share of the epochs left at which a stage of patches ends")
    add_switch(group, "--scheduler", False, "NPP's learning rate: warm-up, constant and decay in each stage")
    add_flag(group, "--warmup-epochs", nonnegative_int, 1, "of each stage, with --scheduler")
    add_flag(group, "--decay-ratio", SHARE, 0.2, "last part of each stage, with --scheduler")
    add_flag(group, "--end-lr", nonnegative_float, 1e-5, "where a stage's decay ends, with --scheduler")
    return parser


def held_out_flag(args: argparse.Namespace) -> tuple[str, str | None]:
    """Return the name of the flag of held-out data, pairs or codes, and its value."""
    name = "val_data_path" if "val_data_path" in args else "val_code_path"
    return f"--{name.replace('_', '-')}", getattr(args, name)


def add_gpt_training_flags(
    parser: argparse.ArgumentParser, gpt_type: str, *, sample_cfg_scale: float, wandb_project: str | None = None
) -> None:
    """Add the model, its objective, the weights to start from, and everything that the trainer reads."""
    help = "start from this file or run: its weights, and where it has them optimizer and step"
    if gpt_type == "t2i":
        help += " if the image size is the same"
    names = ["--gpt-ckpt"] + ["--stage1-ckpt"] * (gpt_type == "t2i")  # NAR's name for it
    parser.add_argument(*names, default=None, help=help)
    help = "data of a --condition, a folder that dataset/arrays.py wrote; repeatable"
    parser.add_argument("--condition-path", action="append", default=None, metavar="NAME=FOLDER", help=help)
    help = "the same of the held-out data"
    parser.add_argument("--val-condition-path", action="append", default=None, metavar="NAME=FOLDER", help=help)
    group = parser.add_argument_group("control images (ControlAR; docs/training.md)")
    help = (
        "a folder of control images or their features (tools/make_controls.py); --dataset t2i can do without, for edges"
    )
    add_flag(group, "--control-path", None, None, help)
    add_flag(group, "--val-control-path", None, None, "the same of the held-out data")
    help = "kind of the control images (default: canny)"
    add_flag(group, "--control-type", None, None, help, choices=CONTROL_TYPES)
    help = (
        "what reads them: a DINOv2 or ViT of transformers, by folder or name, which begins with its weights; or one drawn anew, "
        "as vit,width=64,layers=2,heads=2"
    )
    add_flag(group, "--control-encoder", encoder_or_name, None, help)
    parser.set_defaults(control_of_images=False)
    help = "what each token is trained by (autoregressive/train/objectives/); held-out losses are the cross-entropy"
    parser.add_argument("--objective", default="cross_entropy", help=help)
    add_store_true(parser, "--no-compile", "do not torch.compile each block (it is only on CUDA)")
    add_flag(parser, "--sample-cfg-scale", CFG_SCALE, sample_cfg_scale, "guidance scale of pictures while it trains")
    group = parser.add_argument_group("fine-tuning")
    help = "take only the weights of --gpt-ckpt, and begin at step 0: other data, classes or image size"
    group.add_argument("--finetune", action="store_true", help=help)
    add_store_true(group, "--use-ema", "begin with the averaged weights of --finetune's or --cca-reference's file")
    if gpt_type == "c2i":
        help = (
            "with --finetune, whose row a class begins with: that of the class of its name (the default), of its number, or a "
            "new one"
        )
        group.add_argument("--class-rows", choices=["name", "number", "new"], default=None, help=help)
    help = "train the second exit of --layout neighbours alone, the first stage after --finetune of a raster file (docs/training.md)"
    group.add_argument("--second-exit-only", action="store_true", help=help)
    help = (
        "train additions of this rank to the frozen model's attention and feed-forward matrices (LoRA), and the classes"
    )
    add_flag(group, "--lora-rank", positive_int, None, help)
    add_flag(group, "--lora-alpha", positive_float, None, "the additions count alpha / rank (default: 2 ranks)")
    help = "modules trained whole beside the table of the classes, such as tok_embeddings and output"
    group.add_argument("--lora-whole", nargs="+", default=None, metavar="NAME", help=help)
    add_flag(group, "--lora-dropout", PROBABILITY, 0.0, "dropout of the additions' inputs")
    add_gpt_flags(parser, GPT_SIZES, training=True, gpt_type=gpt_type)
    add_training_flags(parser, epochs=300, batch=256, results_dir=RESULTS, num_workers=24, wandb_project=wandb_project)
