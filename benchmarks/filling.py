"""Likelihood of what is kept after a hole, by the number of particles that fill it.

    python3 benchmarks/filling.py --gpt-ckpt quickstart/gpt --code-path quickstart/codes_held_out --images 6

Holes are cut into images that the model has not seen, and filled with their class, without guidance; 1 particle is copying
known tokens. Of `truth` the hole has the image's own tokens.
"""

import argparse
import time

from utils.cli import flag_parser, positive_int, run_script

# Rows and columns of a hole, in eighths of a side.
HOLES = {
    "centre, half a side": (2, 2, 6, 6),
    "centre, a quarter": (3, 3, 5, 5),
    "left half": (0, 0, 8, 4),
    "right half": (0, 4, 8, 8),
    "upper half": (0, 0, 4, 8),
}


def main(args: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from autoregressive.models.particles import fill
    from autoregressive.pipeline import load_gpt
    from dataset.codes import open_codes
    from utils.runs import find_checkpoint

    model = load_gpt(find_checkpoint(args.gpt_ckpt), device="cpu")
    grid, layout = model.layout.grid_size, model.layout
    data = open_codes(args.code_path, random_view=False)
    chosen = [data[i] for i in np.linspace(0, len(data) - 1, args.images).astype(int)]
    codes = torch.stack([torch.as_tensor(item["codes"]).view(-1) for item in chosen]).long()
    labels = torch.tensor([int(item["label"]) for item in chosen])
    print(
        "| hole | particles | kept after the hole, nats | the hole | sd of log-evidence over seeds | effective | s an image |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (top, left, bottom, right) in HOLES.items():
        hole = torch.zeros(grid, grid, dtype=torch.bool)
        hole[top * grid // 8 : bottom * grid // 8, left * grid // 8 : right * grid // 8] = True
        hole = hole.flatten()
        behind = layout.raster > layout.raster[hole].min()  # in the layout's order, from the hole's first token on
        kept = behind & ~hole
        for particles in (None, *args.particles):
            runs, began = [], time.perf_counter()
            for seed in range(1 if particles is None else args.seeds):
                known = codes if particles is None else codes.masked_fill(hole, -1)
                images = [(seed, i) for i in range(len(codes))]
                runs.append(fill(model, labels, known, images, particles=particles or 1))
            seconds = (time.perf_counter() - began) / len(runs) / len(codes)
            after, inside = (
                np.mean([float(run.scores[:, part].sum(1).mean()) for run in runs]) for part in (kept, hole)
            )
            spread = np.std([run.log_evidence for run in runs], axis=0).mean()
            effective = np.mean([run.effective for run in runs])
            row = (name, particles or "truth", f"{after:.1f}", f"{inside:.1f}", f"{spread:.2f}", f"{effective:.1f}")
            print("|", " | ".join(map(str, row)), f"| {seconds:.2f} |", flush=True)


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--gpt-ckpt", required=True, help="a class-conditional model: a file, or a run's folder")
    parser.add_argument("--code-path", required=True, help="codes that it was not trained on")
    parser.add_argument("--images", type=positive_int, default=6, help="images, spread over the codes")
    parser.add_argument("--seeds", type=positive_int, default=4, help="fills of each image")
    parser.add_argument("--particles", type=positive_int, nargs="+", default=[1, 4, 16, 64], help="of each image")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
