"""Passes and seconds of an image by window, and the cost of a pass by rows.

    python3 benchmarks/windows.py --gpt-model GPT-B --precision bf16                       # random weights
    python3 benchmarks/windows.py --gpt-ckpt quickstart/gpt --images 1 4 8

Guidance 2, top-k 2000. Random weights accept few drafts: of them the cost of a pass counts, of a trained model the seconds.
"""

import argparse
import time
from itertools import pairwise

from autoregressive.models.sizes import GPT_SIZES
from utils.cli import add_flag, flag_parser, nonnegative_int, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import torch

    from autoregressive.models.generate import generate
    from autoregressive.pipeline import PRECISIONS, load_gpt
    from benchmarks.measuring import random_gpt
    from utils.distributed import pick_device
    from utils.rng import image_noise
    from utils.runs import find_checkpoint

    device, dtype = pick_device(args.device), PRECISIONS[args.precision]
    if args.gpt_ckpt:
        model = load_gpt(find_checkpoint(args.gpt_ckpt), device=device, dtype=dtype)
    else:
        model = random_gpt(args.gpt_model, args.tokens, torch.device("cpu")).to(device, dtype).eval()
    draft = load_gpt(find_checkpoint(args.draft_gpt), device=device, dtype=dtype) if args.draft_gpt else None
    tokens = model.layout.tokens
    print(
        f"{args.gpt_ckpt or args.gpt_model}, {tokens} tokens, {args.precision}, {torch.get_num_threads()} threads, {device}"
    )
    print("| images | window | passes | ms a pass, median | s | of window 0 |\n|---|---|---|---|---|---|")
    settings = {"cfg_scale": 2.0, "top_k": 2000, "compile": args.compile, "draft_model": draft}
    for images in args.images:
        labels = torch.arange(images, device=device) % model.args.num_classes
        noise = image_noise(0, range(images), tokens)
        sequential = None
        generate(model, labels, model.layout.passes[1].outputs.stop, noise=noise, cfg_scale=2.0)  # weights are packed
        for window in args.windows:
            best: list[float] = []
            for _ in range(args.repeats):
                times: list[float] = [time.perf_counter()]
                step = lambda done, _, times=times: times.append(time.perf_counter())  # noqa: E731
                drawn = generate(model, labels, noise=noise, window=window, on_step=step, **settings)
                times.append(time.perf_counter() + 0 * int(drawn[0, 0]))
                best = min(best or times, times, key=lambda each: each[-1] - each[0])
            passes = sorted(b - a for a, b in pairwise(best[1:-1]))
            seconds = best[-1] - best[0]
            sequential = sequential or seconds
            row = (images, window, len(best) - 2, f"{passes[len(passes) // 2] * 1e3:.2f}", f"{seconds:.2f}")
            print("|", " | ".join(map(str, row)), f"| {sequential / seconds:.2f}x |", flush=True)


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--gpt-model", choices=list(GPT_SIZES), default="GPT-B", help="size, with random weights")
    parser.add_argument("--gpt-ckpt", default=None, help="a class-conditional model in its place")
    parser.add_argument("--draft-gpt", default=None, help="a smaller one of the same codes, which draws the drafts")
    parser.add_argument("--tokens", type=positive_int, default=256, help="of an image, a square number")
    parser.add_argument("--images", type=positive_int, nargs="+", default=[1, 4, 8], help="images at once")
    help = "0 first: it is what others compare with"
    add_flag(parser, "--windows", nonnegative_int, [0, 1, 2, 4, 8, 16, 32, 64], help, nargs="+")
    parser.add_argument("--precision", choices=["none", "fp16", "bf16"], default="bf16", help="of the weights")
    parser.add_argument("--repeats", type=positive_int, default=2, help="calls; the fastest counts")
    parser.add_argument("--compile", action="store_true", help="compiled passes, on CUDA recorded")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
