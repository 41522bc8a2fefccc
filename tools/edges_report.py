"""Judges a model of control images on held-out pictures: whether what it draws has the edges that were asked for.

    python3 tools/edges_report.py --data-path quickstart/drawings/held_out --gpt-ckpt quickstart/control \\
        --vq-ckpt quickstart/tokenizer --ten-crop --no-flip --output quickstart/control_report

A picture of each one's class, or of its caption where the model is text-conditional, is drawn by its edges: at full strength,
at half, without them (strength 0), and as a check by those of another picture. An edge pixel is right where one of the other
picture's is at most a pixel away; F1 is the harmonic mean of the right shares of both. What it is of the tokenizer's
reconstructions is the bound. Writes report.json and edges.png, whose rows are pictures, their edges, what is drawn by them
with two seeds, and what is drawn without.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from autoregressive.sample.flags import add_sampling_flags, sampling_config
from dataset.pairs import CAPTION_KEYS, caption_of
from utils.cli import SEED, add_flag, add_switch, flag_parser, positive_float, positive_int, run_script

if TYPE_CHECKING:
    from torch import Tensor


def main(args: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from autoregressive.models.canny import canny
    from autoregressive.pipeline import ImagePipeline
    from dataset.augmentation import code_views
    from dataset.folders import class_folders
    from dataset.pixels import load_rgb
    from dataset.sources import open_pairs
    from tools.stages import reconstruct
    from utils.files import write_json
    from utils.images import make_grid, save_png

    pipeline = ImagePipeline.from_pretrained(args.gpt_ckpt, vq=args.vq_ckpt)
    if pipeline.text:
        pairs = open_pairs(args.data_path)
        total, file = len(pairs), pairs.image_file
        words = partial(caption_of, pairs, key=args.caption_key, truncated=False)
    else:
        images = class_folders(args.data_path, classes=pipeline.gpt.file_config.get("classes"))
        total, file, words = len(images), images.paths.__getitem__, images.label
    count = min(args.images, total)
    chosen = np.linspace(0, total - 1, count).astype(int).tolist()
    crops = (pipeline.image_size, args.ten_crop, args.crop_range, args.flip)
    views = [code_views(load_rgb(file(i)), *crops) for i in chosen]
    views = [each[i % len(each) if args.ten_crop else 0] for i, each in zip(chosen, views)]  # in turn, or the centre
    pictures = ((torch.stack(views) + 1) * 127.5).round().to(torch.uint8)  # (n, 3, H, W)
    edges, asked = canny(pictures), [words(i) for i in chosen]
    ways = {
        "with": {},
        "again": {"seed": args.seed + 1},
        "half": {"control_strength": args.control_strength / 2},
        "without": {"control_strength": 0.0},
        "shuffled": {"control_images": list(edges.roll(count // 2, 0))},
    }
    settings = {**vars(sampling_config(args)), "seed": args.seed, "control_images": list(edges)}
    drawn = {
        name: np.stack([np.asarray(image) for image in pipeline(asked, **settings | way)]) for name, way in ways.items()
    }
    originals = pictures.permute(0, 2, 3, 1).numpy()
    judged = {**drawn, "reconstructions": reconstruct(pipeline.tokenizer, originals)[0]}
    f1 = {name: edge_f1(canny(torch.from_numpy(each).permute(0, 3, 1, 2)), edges) for name, each in judged.items()}
    report = {"images": count, "settings": vars(sampling_config(args)), "edge_f1": f1}
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    lines = edges.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    shown = np.linspace(0, count - 1, min(count, args.columns)).astype(int)
    rows = np.concatenate([each[shown] for each in (originals, lines, drawn["with"], drawn["again"], drawn["without"])])
    save_png(make_grid(rows, columns=len(shown)), output / "edges.png")
    write_json(output / "report.json", report)
    print(json.dumps(report, indent=2))


def edge_f1(drawn: "Tensor", asked: "Tensor", reach: int = 1) -> float:
    """Return the mean F1 of edges, uint8 (n, 1, H, W) twice, that may be `reach` pixels off; 1 where neither has any."""
    import torch.nn.functional as F

    one, other = ((each > 0).float() for each in (drawn, asked))
    near = [F.max_pool2d(each, 2 * reach + 1, stride=1, padding=reach) for each in (one, other)]
    right = (one * near[1]).sum((1, 2, 3)), (other * near[0]).sum((1, 2, 3))
    there = one.sum((1, 2, 3)), other.sum((1, 2, 3))
    precision, recall = (a / b.clamp(min=1) for a, b in zip(right, there, strict=True))
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
    return float(f1.where((there[0] + there[1]) > 0, 1.0).mean())


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    help = "held out: class folders of pictures, or a folder of pairs of a text model"
    add_flag(parser, "--data-path", None, None, help, required=True)
    add_flag(parser, "--caption-key", None, "blip", "which of a pair's three captions", choices=CAPTION_KEYS)
    parser.add_argument("--gpt-ckpt", required=True, help="a model of control images: its file or run")
    parser.add_argument("--vq-ckpt", required=True, help="its tokenizer")
    parser.add_argument("--output", required=True, help="folder to write report.json and edges.png to")
    add_flag(parser, "--images", positive_int, 200, "pictures to draw, spread over the folder")
    help = "judge one of ten crops of each picture, in turn, cut as extract_codes_c2i.py cuts them"
    parser.add_argument("--ten-crop", action="store_true", help=help)
    add_switch(parser, "--flip", True, "mirrored crops too")
    add_flag(parser, "--crop-range", positive_float, 1.1, "as --crop-range of extract_codes_c2i.py")
    add_flag(parser, "--columns", positive_int, 12, "of edges.png")
    add_flag(parser, "--seed", SEED, 0, "image i is a function of the seed, i, its class or caption, and its edges")
    add_sampling_flags(parser)
    return parser


if __name__ == "__main__":
    run_script(main, flags())
