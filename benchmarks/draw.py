"""Cost of drawing a token from its logits: the race beside the draw off the cumulative distribution, in one process.

    python3 benchmarks/draw.py --rows 1 4 16 64 --codes 16384 1024

Microseconds, the fastest of many calls; `compiled` is the race through torch.compile, as --compile takes it.
"""

import argparse
from functools import partial
from itertools import product

from utils.cli import flag_parser, nonnegative_int, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import torch

    from autoregressive.models.compiled import compiled_race
    from autoregressive.models.sampling import choose, draw_race
    from autoregressive.models.settings import SamplingConfig
    from benchmarks.measuring import timed
    from utils.distributed import pick_device
    from utils.rng import image_noise

    device = pick_device(args.device)
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, us a call")
    print("| codes | top-k | rows | cdf | race | of cdf | compiled | of cdf |\n|---|---|---|---|---|---|---|---|")
    ways = {"cdf": ("cdf", draw_race), "race": ("race1", draw_race), "compiled": ("race1", compiled_race())}
    for codes, top_k, rows in product(args.codes, args.top_k, args.rows):
        logits = 3 * torch.randn(rows, codes, generator=torch.Generator().manual_seed(0)).to(device)
        works = {}
        for way, (draw, race) in ways.items():
            noise = image_noise(0, range(rows), 1, draw)[:, 0].to(device)
            works[way] = partial(choose, logits, SamplingConfig(top_k=top_k, draw=draw), noise, draw=race)
        least = dict.fromkeys(works, float("inf"))
        with torch.inference_mode():
            for _ in range(args.rounds):  # in turn, so that a busy moment is of all of them
                least = {way: min(least[way], timed(work, device)) for way, work in works.items()}
        cdf, race, compiled = (seconds * 1e6 for seconds in least.values())
        print(
            f"| {codes} | {top_k} | {rows} | {cdf:.0f} | {race:.0f} | {race / cdf:.2f} | {compiled:.0f} | "
            f"{compiled / cdf:.2f} |",
            flush=True,
        )


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--codes", type=positive_int, nargs="+", default=[16384, 1024], help="of the codebook")
    parser.add_argument("--top-k", type=nonnegative_int, nargs="+", default=[0, 2000], help="tokens kept, 0 for all")
    parser.add_argument("--rows", type=positive_int, nargs="+", default=[1, 4, 16, 64], help="tokens drawn at once")
    parser.add_argument("--rounds", type=positive_int, default=100, help="calls of each; the fastest counts")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
