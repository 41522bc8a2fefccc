"""What next-patch prediction saves: the wall time of a run with patches against raster training of the same epochs.

    python3 benchmarks/next_patch.py --patch-level 2 --epoch-rate 0.5

Steps with patches of each side are timed in turn on one model at one batch size, and each side's time counts by the
epochs that the schedule gives it. Reading data, logs and checkpoints, which are the same for both, are left out.
"""

import argparse
import statistics

from benchmarks.training_step import add_step_flags, project_step, random_batch, random_model, timed
from utils.cli import PORTION, flag_parser, grid_size, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import torch

    from autoregressive.train.next_patch import PatchSchedule
    from utils.distributed import start

    schedule = PatchSchedule(args.epochs, args.patch_level, args.epoch_rate)
    grid = grid_size(args.image_size, args.downsample_size)
    schedule.check_grid(grid)
    dist = start(args.device)
    step = project_step(random_model(args, dist), args, dist)
    codes, labels = random_batch(args, dist)
    sides = sorted({1, *(stage.patch_side for stage in schedule.stages)})
    seconds: dict[int, list[float]] = {side: [] for side in sides}
    for number in range(args.warmup + args.steps):
        for side in sides:  # in turn, so that another job on the machine slows all alike
            taken = timed(lambda side=side: step(codes, labels, side), dist.device)
            if number >= args.warmup:
                seconds[side].append(taken)

    median = {side: statistics.median(taken) for side, taken in seconds.items()}
    epochs = {side: sum(s.end - s.start for s in schedule.stages if s.patch_side == side) for side in sides}
    threads = "" if dist.device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(
        f"{args.gpt_model}, {grid}x{grid} tokens, batch {args.batch_size}, {args.mixed_precision}, "
        f"{dist.device.type}{threads}, median of {args.steps} steps"
    )
    print(f"| patches | rows | s a step | of raster | epochs of {args.epochs} |\n|---|---|---|---|---|")
    for side in sides:
        share = f"{median[side] / median[1]:.2f}"
        print(f"| {side}x{side} | {(grid // side) ** 2} | {median[side]:.3f} | {share} | {epochs[side]} |")
    total = sum(epochs[side] * median[side] for side in sides) / (args.epochs * median[1])
    print(f"wall time of the run: {total:.2f} of raster's")


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    add_step_flags(parser)
    parser.add_argument("--epochs", type=positive_int, default=300, help="of the whole run")
    parser.add_argument("--patch-level", type=positive_int, default=2, help="stages of coarser to finer patches")
    parser.add_argument(
        "--epoch-rate", type=PORTION, default=0.5, help="share of the epochs left at which a stage ends"
    )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
