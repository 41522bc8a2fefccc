"""A run in which one process meets a loss that is no number, for tests of several processes.

main(flags().parse_args([…, "--broken-rank", "1", "--broken-step", "5"]))
"""

import argparse

import torch
from torch import nn
from torch.utils.data import TensorDataset

from utils.cli import flag_parser
from utils.distributed import start
from utils.training.flags import add_training_flags
from utils.training.job import Job, Phase
from utils.training.optim import adamw
from utils.training.parallel import Parallel
from utils.training.trainer import Trainer


def main(args: argparse.Namespace) -> None:
    dist = start("cpu")
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    wrapped = Parallel(dist).apply(model)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(64, 4, generator=generator), torch.randn(64, 3, generator=generator))

    def loss(batch, place):
        value = nn.functional.mse_loss(wrapped(batch[0]), batch[1])
        if (dist.rank, place.step, place.number) == (args.broken_rank, args.broken_step, 1):
            value = value * float("nan")
        return value, {"loss": value}

    phases = [Phase("optimizer", wrapped, adamw(model, args), loss)]
    Trainer(args, Parallel(dist), Job("tiny", {"model": model}, phases, data)).fit()
    dist.close()


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    add_training_flags(parser, epochs=4, batch=16, results_dir="results", num_workers=0)
    parser.add_argument("--broken-rank", type=int, required=True)
    parser.add_argument("--broken-step", type=int, required=True)
    return parser
