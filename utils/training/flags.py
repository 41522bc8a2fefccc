"""Flags of scripts that train: what utils/training/trainer.py and utils/training/parallel.py read."""

import argparse

from utils.cli import (
    DEVICE,
    PROBABILITY,
    SEED,
    SHARE,
    WORKERS,
    Flags,
    Number,
    add_flag,
    add_store_true,
    add_switch,
    nonnegative_float,
    nonnegative_int,
    positive_int,
    untold,
)


class StoreGiven(argparse.Action):
    """Stores a value, and as `…_given` that the command line has it."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: object = None) -> None:
        setattr(namespace, self.dest, values)
        setattr(namespace, f"{self.dest}_given", True)


def add_training_flags(
    parser: Flags,
    *,
    epochs: int,
    batch: int,
    results_dir: str,
    num_workers: int,
    wandb_project: str | None = None,
    decays: bool = True,
) -> None:
    """Add everything that utils/training/trainer.py reads. decays: whether --weight-decay is used where it is not given."""
    group = parser.add_argument_group("training")
    add_flag(group, "--epochs", positive_int, epochs, "passes over the data")
    add_flag(group, "--max-steps", positive_int, None, "stop after this many steps, if sooner")
    add_flag(group, "--lr", nonnegative_float, 1e-4, "learning rate")
    help = "after the warm-up; steps: times 0.2 after 1/2, 2/3 and 5/6 of the epochs"
    add_flag(group, "--lr-schedule", None, "constant", help, choices=["constant", "cosine", "steps"])
    add_flag(group, "--min-lr", nonnegative_float, 0.0, "where the cosine ends")
    help = "epoch at which the cosine begins, if that is after the warm-up (LPD: 400 of 450)"
    add_flag(group, "--lr-decay-start-epoch", nonnegative_float, 0.0, help)
    add_flag(group, "--warmup-steps", nonnegative_int, 0, "steps of linear warm-up")
    add_store_true(group, "--warmup-from-zero", "the first step of a warm-up has the rate 0, as in RAR and LPD")
    if decays:
        add_flag(group, "--weight-decay", nonnegative_float, 0.05, "of tensors with two or more dimensions")
    else:
        help = "of all tensors, where it is given; published runs have none"
        add_flag(group, "--weight-decay", nonnegative_float, 0.05, help, action=StoreGiven)
    add_flag(group, "--beta1", PROBABILITY, 0.9, "Adam's first moment")
    add_flag(group, "--beta2", PROBABILITY, 0.95, "Adam's second moment")
    add_flag(group, "--max-grad-norm", nonnegative_float, 1.0, "gradient clipping, 0 for none")
    help = "samples a step, over all processes; unless given, no more than there are"
    add_flag(group, "--global-batch-size", positive_int, untold(batch), help)
    help = "parts a process's share of a batch is split into"
    add_flag(group, "--gradient-accumulation-steps", positive_int, 1, help)
    help = (
        "of the forward and backward pass; none and fp32: float32 without TF32, tf32: float32 rounded to TF32 on the GPU; "
        "weights are kept in float32"
    )
    add_flag(group, "--mixed-precision", None, "bf16", help, choices=["none", "fp32", "tf32", "fp16", "bf16"])
    add_store_true(group, "--ema", "keep an exponential moving average of the weights")
    add_flag(group, "--ema-decay", SHARE, 0.9999, "of that average")
    help = (
        "begin with a smaller decay, (1 + step) / (10 + step), without which the average of a short run is its initial weights "
        "(default: on; averages that began without it stay without it)"
    )
    add_switch(group, "--ema-warmup", None, help)
    add_flag(group, "--global-seed", SEED, 0, "fixes every random choice")
    help = "on CUDA take kernels that add up in one order, so that equal runs end with equal bits; slower"
    add_store_true(group, "--deterministic", help)
    add_flag(group, "--num-workers", nonnegative_int, num_workers, WORKERS)

    group = parser.add_argument_group("files")
    add_flag(group, "--results-dir", None, results_dir, "runs go to numbered folders in here")
    add_flag(group, "--cloud-save-path", None, None, "a second place for the checkpoints")
    add_store_true(group, "--no-local-save", "checkpoints go to --cloud-save-path only")
    add_store_true(group, "--resume", "continue the newest run in --results-dir, if there is one")
    add_flag(group, "--log-every", positive_int, 100, "steps between log lines")
    add_flag(group, "--ckpt-every", positive_int, 5000, "steps between checkpoints")
    add_flag(group, "--keep-last", nonnegative_int, 0, "checkpoints to keep, 0 for all")
    help = "steps between grids of pictures (default: those of checkpoints)"
    add_flag(group, "--sample-every", positive_int, None, help)
    add_flag(group, "--wandb-project", None, wandb_project, "also log to this Weights & Biases project")
    add_store_true(group, "--no-wandb", "never log to Weights & Biases")
    add_flag(group, "--device", None, None, DEVICE)


def add_parallel_flags(parser: Flags, default: str) -> None:
    """Add --data-parallel and what utils/training/parallel.py does with it."""
    group = parser.add_argument_group("processes")
    help = (
        "ddp: each process holds everything; fsdp: weights, gradients and optimizer in shards; sdp: weights gathered "
        "during a step; hsdp: shards within a group of processes, copies across groups"
    )
    add_flag(group, "--data-parallel", None, default, help, choices=["ddp", "fsdp", "sdp", "hsdp"])
    add_flag(group, "--shard-size", positive_int, None, "processes of an hsdp group (default: a machine's)")
    help = "in which gradients are summed over processes (default: fp32 with ddp, else that of --mixed-precision)"
    add_flag(group, "--grad-precision", None, None, help, choices=["fp32", "fp16", "bf16"])
    help = "sum gradients after each accumulation step: with shards less memory, more traffic"
    add_store_true(group, "--sync-every-micro-batch", help)
    add_store_true(group, "--activation-checkpointing", "recompute each block: less memory, a third more work")
    help = "how long a process waits for the others before it gives up"
    add_flag(group, "--timeout-minutes", Number(float, above=0, most=525_600), 30, help)
