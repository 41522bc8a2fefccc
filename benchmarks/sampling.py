"""Speed of drawing tokens beside what the machine allows: the floor, a plain loop, and `generate`, in one process.

    python3 benchmarks/sampling.py --gpt-model GPT-B --precision bf16 --batches 1 8 32
    python3 benchmarks/sampling.py --gpt-model GPT-B --precision bf16 --batches 1 --groups 1 4 16      # PAR
    python3 benchmarks/sampling.py --gpt-model GPT-B --precision bf16 --layouts neighbours queried     # NAR and LPD

Random weights, guidance 4 (twice as many rows as images), top-k 2000; tokens only. The floor applies each weight matrix
once a step to that many rows, in the fastest way there is here, and does nothing else.
"""

import argparse
from typing import TYPE_CHECKING

from autoregressive.models.sizes import GPT_SIZES
from utils.cli import add_flag, flag_parser, positive_int, run_script

if TYPE_CHECKING:
    from autoregressive.models.gpt import Transformer

SAMPLING = {"cfg_scale": 4.0, "top_k": 2000}
WAYS = ["plain", "eager", "compiled"]


def main(args: argparse.Namespace) -> None:
    import torch

    from autoregressive.pipeline import PRECISIONS
    from benchmarks.measuring import bandwidth, random_gpt
    from utils.distributed import pick_device

    device = pick_device(args.device)
    queries = {"trunk": "lpd", "ffn_width": 4 * GPT_SIZES[args.gpt_model].dim}  # an LPD of that size, which has them
    orders = [{"ar_token_num": group} for group in args.groups]
    orders += [{"layout": {"name": name}, **(queries if name == "queried" else {})} for name in args.layouts]
    for order in orders:
        model = random_gpt(args.gpt_model, args.tokens, torch.device("cpu"), **order)
        model = model.to(device, PRECISIONS[args.precision]).requires_grad_(False).eval()
        cuda, steps = device.type == "cuda", 1 + len(model.layout.steps)
        where = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads"
        shape = f"{args.tokens} tokens in {steps} steps, {args.precision}"
        print(f"\n{args.gpt_model}, {model.layout.name}, {shape}, torch {torch.__version__}, {where}")
        if cuda:
            print(f"memory bandwidth: {bandwidth(device) / 1e9:.0f} GB/s")
        print("| images | way | s | steps/s | images/s | of the plain loop | of the floor | first call s |")
        print("|---|---|---|---|---|---|---|---|")
        for batch in args.batches:
            measure(model, batch, steps, args)


def measure(model: "Transformer", batch: int, steps: int, args: argparse.Namespace) -> None:
    """Print the rows of a number of images: the floor, then each way."""
    import torch

    from autoregressive.models.generate import generate, release_cache
    from benchmarks.measuring import timed
    from benchmarks.plain_loop import plain_generate

    device = model.tok_embeddings.weight.device
    labels, plain = torch.arange(batch, device=device) % 1000, None
    group = -(-sum(len(step.rows) for step in model.layout.steps) // steps)  # rows of a step, on the average
    least = steps * floor(model, 2 * batch, group, args.passes)
    print(f"| {batch} | floor | {least:.2f} | {steps / least:.1f} | {batch / least:.3g} | | | |", flush=True)
    for way in args.ways:
        if way == "plain" and not model.layout.is_raster:
            continue
        release_cache(model)

        def draw(way: str = way) -> None:
            if way == "plain":
                plain_generate(model, labels, **SAMPLING)
            else:
                generate(model, labels, compile=way == "compiled", **SAMPLING)

        eight = lambda: plain_generate(model, labels, steps=8, **SAMPLING)  # noqa: E731
        first = timed(eight if way == "plain" else draw, device)
        seconds = min(timed(draw, device) for _ in range(args.repeats))
        plain = seconds if way == "plain" else plain
        ratio = f"{plain / seconds:.2f}x" if plain else ""
        print(
            f"| {batch} | {way} | {seconds:.2f} | {steps / seconds:.1f} | {batch / seconds:.3g} | {ratio} | "
            f"{least / seconds:.0%} | {max(first - seconds, 0):.1f} |",
            flush=True,
        )
    release_cache(model)


def floor(model: "Transformer", rows: int, group: int, passes: int) -> float:
    """Return seconds of a step of which nothing but the linear layers is left, the best of `passes`; on CUDA recorded as a graph.

    rows: samples, each of `group` rows a step; the head too.
    """
    import torch
    import torch.nn as nn

    from autoregressive.models.on_cpu import packed
    from benchmarks.measuring import timed

    weight = model.tok_embeddings.weight
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    inputs = {
        layer.in_features: torch.randn(rows, group, layer.in_features, device=weight.device, dtype=weight.dtype)
        for layer in layers
    }

    def step() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    with torch.inference_mode():
        plain = min(timed(step, weight.device) for _ in range(passes))
        if weight.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            return min(timed(graph.replay, weight.device) for _ in range(passes))
        with packed(model):
            step()
            return min(plain, *(timed(step, weight.device) for _ in range(passes)))


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--gpt-model", choices=list(GPT_SIZES), default="GPT-B", help="the model's size")
    parser.add_argument("--tokens", type=positive_int, default=256, help="of an image, a square number")
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[1, 8, 32], help="images at once")
    parser.add_argument("--groups", type=positive_int, nargs="+", default=[1], help="tokens of a step, as PAR has them")
    add_flag(parser, "--layouts", None, [], "registered orders of tokens, after those of --groups", nargs="+")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what to time")
    parser.add_argument("--precision", choices=["none", "fp16", "bf16"], default="bf16", help="of the weights")
    parser.add_argument("--repeats", type=positive_int, default=1, help="calls of each way; the fastest counts")
    parser.add_argument("--passes", type=positive_int, default=30, help="of the floor; the fastest counts")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
