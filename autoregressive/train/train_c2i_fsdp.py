"""Trains a class-conditional GPT whose weights, gradients and optimizer state are sharded over the processes (FSDP2).

    torchrun --nproc_per_node=8 autoregressive/train/train_c2i_fsdp.py --code-path codes --gpt-model GPT-XXL --image-size 384

It is train_c2i.py with other defaults: `--data-parallel fsdp` (or sdp, hsdp), bf16 weights in the forward and backward pass.
A checkpoint is a folder with `consolidated.pth` for sampling (`--from-fsdp`); a run resumes with any number of processes.
"""

import argparse

from autoregressive.train.flags import class_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from autoregressive.train.class_data import train_classes

    train_classes(args)


def flags() -> argparse.ArgumentParser:
    return class_flags(__doc__, sharded=True)


if __name__ == "__main__":
    run_script(main, flags())
