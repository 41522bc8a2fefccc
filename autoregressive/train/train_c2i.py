"""Trains a class-conditional GPT on image codes: raster, parallel layout, or next-patch prediction.

    torchrun --nproc_per_node=8 autoregressive/train/train_c2i.py --code-path codes --gpt-model GPT-B --image-size 256
    python3 autoregressive/train/train_c2i.py --code-path codes --resume          # one process, resuming where it stopped

Codes come from extract_codes_c2i.py. Recipe: LlamaGen (arXiv 2406.06525, section 3.1); parallel layout: PAR
(2412.15119); patches: NPP (2412.15321). train_c2i_fsdp.py is this script with the defaults of sharded training.
"""

import argparse
from typing import TYPE_CHECKING

from autoregressive.train.flags import add_gpt_training_flags
from utils.cli import (
    PORTION,
    SHARE,
    add_flag,
    add_image_size_flags,
    add_parallel_flags,
    add_switch,
    flag_parser,
    grid_size,
    layout_numbers,
    nonnegative_float,
    nonnegative_int,
    positive_int,
    run_script,
)

if TYPE_CHECKING:
    from autoregressive.models.layouts import Layout
    from autoregressive.train.next_patch import PatchSchedule


def main(args: argparse.Namespace) -> None:
    from autoregressive.train.class_data import ClassData
    from autoregressive.train.next_patch import PatchSchedule
    from autoregressive.train.recipe import fit, join, new_model

    grid = grid_size(args.image_size, args.downsample_size)
    layout_numbers(args)  # refuses two that do not go together
    if args.gpt_type != "c2i":
        raise ValueError("train_c2i.py trains class-conditional models; for captions there is train_t2i.py")
    if args.scheduler and (args.lr_schedule != "constant" or args.warmup_steps):
        raise ValueError(
            "--scheduler is a learning-rate schedule of its own: leave out --lr-schedule and --warmup-steps"
        )
    patches = PatchSchedule.from_args(args)
    patches.check_grid(grid)

    dist, plan = join(args)
    data = ClassData(args, dist)
    patches = patches.for_run(len(data.train), args)
    if args.scheduler:
        patches.check_scheduler()
    model = new_model(args, grid)
    fit(args, plan, data, model, patches, notes=order_in_words(patches, model.layout))


def order_in_words(patches: "PatchSchedule", layout: "Layout") -> list[str]:
    """Return lines on what is predicted together and when, beside what PAR's and NPP's own scripts do without a flag."""
    if not layout.is_raster:
        most, steps = max(layout.groups), len(layout.groups)
        return [f"layout {layout.config['name']}: {most} tokens a step at most, {steps} steps"]
    if patches.patch_level > 1:
        skipped = [
            f"patches of {side}x{side} tokens get no part of the training: --patch-level {patches.patch_level} skips them"
            for side in patches.skipped_sides
        ]
        return [f"next-patch prediction: {patches.describe()}", *skipped]
    return [
        "raster order, single tokens; PAR's own default is --ar-token-num 4 --image-size 384, NPP's own is --patch-level 2 "
        "(its train_c2i_fsdp.py: --patch-level 4 --epoch-rate 0.67)"
    ]


def flags(sharded: bool = False) -> argparse.ArgumentParser:
    """Return the script's flags. sharded: with the defaults of train_c2i_fsdp.py."""
    added = "--vq-ckpt" if sharded else "--data-parallel --grad-precision --no-wandb --vq-ckpt --wandb-project"
    parser = flag_parser(__doc__, added.split())
    add_flag(parser, "--code-path", None, None, "folder of codes, packed or in the published layout", required=True)
    add_flag(parser, "--val-code-path", None, None, "codes of held-out images: their loss is reported too")
    add_flag(parser, "--dataset", None, "imagenet_code", "kind of data")
    add_flag(parser, "--gpt-resume", None, None, "the same as --gpt-ckpt")
    add_flag(parser, "--vq-ckpt", None, None, "the codes' tokenizer: draws grids of samples with it")
    add_gpt_training_flags(parser, "c2i", sample_cfg_scale=2.0, wandb_project="c2i_fsdp" if sharded else None)
    add_image_size_flags(parser, 256)
    add_parallel_flags(parser, "fsdp" if sharded else "ddp")
    group = parser.add_argument_group("next-patch prediction")
    add_flag(group, "--patch-level", positive_int, 1, "stages of coarser to finer patches, 1 for none (NPP's own: 2)")
    add_flag(group, "--epoch-rate", PORTION, 0.5, "share of the epochs left at which a stage of patches ends")
    add_switch(group, "--scheduler", False, "NPP's learning rate: warm-up, constant and decay in each stage")
    add_flag(group, "--warmup-epochs", nonnegative_int, 1, "of each stage, with --scheduler")
    add_flag(group, "--decay-ratio", SHARE, 0.2, "last part of each stage, with --scheduler")
    add_flag(group, "--end-lr", nonnegative_float, 1e-5, "where a stage's decay ends, with --scheduler")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
