"""Trains a class-conditional GPT on image codes: raster, parallel layout, or next-patch prediction.

    torchrun --nproc_per_node=8 autoregressive/train/train_c2i.py --code-path codes --gpt-model GPT-B --image-size 256
    python3 autoregressive/train/train_c2i.py --code-path codes --resume          # one process, resuming where it stopped

Codes come from extract_codes_c2i.py. Recipe: LlamaGen (arXiv 2406.06525, section 3.1); parallel layout: PAR
(2412.15119); patches: NPP (2412.15321). train_c2i_fsdp.py is this script with the defaults of sharded training.
"""

import argparse

from autoregressive.train.flags import class_flags
from utils.cli import run_script


def main(args: argparse.Namespace) -> None:
    from autoregressive.train.class_data import train_classes

    train_classes(args)


def flags() -> argparse.ArgumentParser:
    return class_flags(__doc__)


if __name__ == "__main__":
    run_script(main, flags())
