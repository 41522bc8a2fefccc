"""Seconds and memory of a training step: this project's beside a plain one, in one run.

    python3 benchmarks/training_step.py --gpt-model GPT-B --image-size 256 --batch-size 64

Both train the same model on the same random codes, one after the other, each in a process of its own. The plain step is eager,
holds all logits in float32, and its AdamW goes parameter by parameter (on CUDA by `foreach`). This project's takes the loss
in chunks and a fused AdamW, and compiles each block on CUDA.
"""

import argparse
import resource
import statistics
import sys
from collections.abc import Callable
from multiprocessing import get_context
from typing import TYPE_CHECKING

from autoregressive.models.sizes import GPT_SIZES
from utils.cli import add_image_size_flags, flag_parser, grid_size, positive_int, run_script

if TYPE_CHECKING:
    from torch import Tensor

    from autoregressive.models.gpt import Transformer
    from utils.distributed import Distributed

MIB = 2**20


def main(args: argparse.Namespace) -> None:
    import torch

    from autoregressive.models.build import build_gpt
    from autoregressive.train.flops import training_flops_per_image
    from utils.distributed import start
    from utils.flops import peak_flops

    device = start(args.device).device
    grid = grid_size(args.image_size, args.downsample_size)
    with torch.device("meta"):
        model = build_gpt(args.gpt_model, block_size=grid**2)
    peak = peak_flops(device, args.mixed_precision)
    tokens, flops = args.batch_size * grid**2, args.batch_size * training_flops_per_image(model)
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(
        f"{args.gpt_model}, {grid}x{grid} tokens, batch {args.batch_size}, {args.mixed_precision}, {device.type}{threads}, "
        f"median of {args.steps} steps"
    )
    print("| step | s | tokens/s | peak memory (MiB) | MFU |\n|---|---|---|---|---|")
    found = {}
    for name in ("plain", "project"):
        with get_context("spawn").Pool(1) as process:  # whose peak memory is that of one way
            median, memory = found[name] = process.apply(measure, (name, args))
        mfu = f"{flops / median / peak:.1%}" if peak else "–"
        print(f"| {name} | {median:.3f} | {tokens / median:,.0f} | {memory / MIB:,.0f} | {mfu} |", flush=True)
    (plain, plain_memory), (ours, memory) = found.values()
    print(f"speed: {plain / ours:.2f} times; memory: {memory / plain_memory:.2f} times")


def measure(name: str, args: argparse.Namespace) -> tuple[float, int]:
    """Return the median seconds of a step and the peak memory in bytes, less what the libraries take."""
    from importlib import import_module

    import torch

    from benchmarks.measuring import project_step, random_batch, random_gpt, timed
    from utils.distributed import start

    for module in ("autoregressive.train.loss", "utils.training.optim", "utils.training.parallel"):
        import_module(module)
    dist = start(args.device)
    before = resident_peak()
    tokens = grid_size(args.image_size, args.downsample_size) ** 2
    model = random_gpt(args.gpt_model, tokens, dist.device)
    step = (plain_step if name == "plain" else project_step)(model, args.mixed_precision, dist)
    batch = random_batch(args.batch_size, tokens, dist.device)
    taken = [timed(lambda: step(*batch), dist.device) for _ in range(args.warmup + args.steps)][args.warmup :]
    cuda = dist.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(dist.device) if cuda else resident_peak() - before
    return statistics.median(taken), memory


def resident_peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plain_step(model: "Transformer", precision: str, dist: "Distributed") -> "Callable[[Tensor, Tensor], None]":
    """Return a step written down without any care."""
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def step(codes: "Tensor", labels: "Tensor") -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(dist.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(codes[:, :-1], labels)
            loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--gpt-model", choices=list(GPT_SIZES), default="GPT-B", help="size of the transformer")
    add_image_size_flags(parser, 256)
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images a step")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--mixed-precision", choices=["none", "bf16"], default="bf16", help="of the forward pass")
    parser.add_argument("--steps", type=positive_int, default=10, help="steps that are timed")
    parser.add_argument("--warmup", type=positive_int, default=2, help="steps before those")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
