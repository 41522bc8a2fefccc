"""Judges models trained on scikit-learn's digits: pictures and report.json.

    python3 tools/digits_report.py --digits quickstart/tiny/digits --codes quickstart/tiny/codes_held_out \\
        --gpt-ckpt quickstart/tiny/gpt --vq-ckpt quickstart/tiny/tokenizer --samples quickstart/tiny/samples --output quickstart/tiny
    python3 tools/digits_report.py --digits quickstart/tiny/digits --prompts quickstart/tiny/text/digits/prompts.tsv \\
        --runs quickstart/tiny/text/stage1 quickstart/tiny/text/stage2 --samples quickstart/tiny/text/samples --output quickstart/tiny/text

The judge of generated digits is a support vector classifier fitted on the real training digits; what it makes of the
real held-out digits stands beside it. Distances between sets of digits are those of evaluations/metrics.py, over the hidden
layer of a small perceptron that was taught to read the training digits. With --prompts the digits were asked for in
words, and which way they lean and how heavy they are is measured as make_digit_captions.py measures scans.
"""

import argparse
import csv
import json
from pathlib import Path

from utils.cli import flag_parser, run_script


def main(args: argparse.Namespace) -> None:
    from tools.stages import stage_seconds
    from utils.files import write_json

    figures = of_prompts(args) if args.prompts else of_classes(args)
    report = {"seconds": stage_seconds(Path(args.output) / "seconds.tsv"), **figures}
    write_json(Path(args.output) / "report.json", report)
    print(json.dumps(report, indent=2))


def of_classes(args: argparse.Namespace) -> dict:
    """Return the figures of a tokenizer and of samples by class; draws reconstructions.png and samples.png."""
    import numpy as np

    from autoregressive.train.evaluation import mean_loss
    from dataset.codes import open_codes
    from tools.digits import Judge
    from tools.stages import models_of, newest_file, reconstruct
    from utils.distributed import start
    from utils.images import make_grid, save_png

    for flag in ("codes", "gpt_ckpt", "vq_ckpt"):
        if getattr(args, flag) is None:
            raise ValueError(f"--{flag.replace('_', '-')} is needed, or --prompts for digits asked for in words")
    output, dist, judge = Path(args.output), start("cpu"), Judge(args.digits)
    gpt, tokenizer = models_of(args)
    originals = judge.held_images
    recons, codes, psnr = reconstruct(tokenizer, originals)
    shown = np.random.default_rng(0).permutation(len(originals))[:16]
    save_png(make_grid(np.concatenate([originals[shown], recons[shown]]), columns=16), output / "reconstructions.png")

    with np.load(newest_file(args.samples, "*.npz")) as archive:
        samples, asked = archive["arr_0"], archive["arr_1"]
    rows = [np.flatnonzero(asked == digit)[:10] for digit in range(10)]
    save_png(make_grid(samples[np.concatenate(rows)], columns=10), output / "samples.png")
    return {
        "psnr_held_out_db": psnr,
        "codebook_usage_held_out": len(np.unique(codes)) / tokenizer.codebook_size,
        "nll_held_out_nats_per_token": mean_loss(gpt, open_codes(args.codes, random_view=False), 64, dist),
        **judge.figures(samples, asked),
    }


def of_prompts(args: argparse.Namespace) -> dict:
    """Return the figures of samples by prompt; draws samples.png and prompts.png, each sample below its words."""
    import numpy as np
    from PIL import Image

    from tools.digits import Judge, attribute_limits, attributes
    from tools.stages import last_held_out_loss, samples_of_prompts
    from utils.images import labelled_grid, make_grid, save_png

    if not args.runs:
        raise ValueError("--runs is needed with --prompts: the results folders of the stages")
    with open(args.prompts, newline="", encoding="utf-8") as f:
        asked = list(csv.DictReader(f, delimiter="\t"))
    samples = samples_of_prompts(args.samples, [row["Prompt"] for row in asked])
    asked = asked[: len(samples)]
    digits = np.asarray([int(row["Digit"]) for row in asked])
    rows = [np.flatnonzero(digits == digit)[:16] for digit in range(10)]
    save_png(make_grid(samples[np.concatenate(rows)], columns=16), Path(args.output) / "samples.png")
    # Prompts come in tens, a digit each: steps that are no multiple of ten meet all digits and all wordings.
    shown = np.unique(np.linspace(0, len(samples) - 1, 20).round().astype(int))
    grid = labelled_grid(samples[shown], [asked[i]["Prompt"] for i in shown], columns=5, side=128)
    save_png(grid, Path(args.output) / "prompts.png")

    judge = Judge(args.digits)
    side = judge.held_images.shape[1]
    # At the size of the class-conditional digits, so that the figures can be laid side by side.
    resized = np.stack([np.asarray(Image.fromarray(image).resize((side, side), Image.BOX)) for image in samples])
    limits = attribute_limits(judge.train_images[..., 0], judge.train_labels)
    found = [attributes(image[..., 0], digit, limits) for image, digit in zip(samples, digits, strict=True)]
    right = {
        f"{name.lower()}_as_asked": [
            one[place] == row[name] for one, row in zip(found, asked, strict=True) if row[name]
        ]
        for place, name in enumerate(("Slant", "Stroke"))
    }
    return {
        "nll_held_out_nats_per_token": {Path(name).name: last_held_out_loss(name) for name in args.runs},
        "prompts": len({row["Prompt"] for row in asked}),
        **judge.figures(resized, digits),
        **{name: float(np.mean(values)) if values else None for name, values in right.items()},
    }


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--digits", required=True, help="folder with train/ and held_out/ from make_digits.py")
    parser.add_argument("--samples", required=True, help="--sample-dir of sample_c2i_ddp.py or sample_t2i_ddp.py")
    parser.add_argument("--output", required=True, help="folder for report.json and the pictures")
    group = parser.add_argument_group("digits by class")
    group.add_argument("--codes", default=None, help="packed codes of the held-out digits")
    group.add_argument("--vq-ckpt", default=None, help="tokenizer")
    group.add_argument("--gpt-ckpt", default=None, help="GPT")
    group = parser.add_argument_group("digits by prompt")
    group.add_argument("--prompts", default=None, help="prompts.tsv of make_digit_captions.py")
    group.add_argument("--runs", nargs="+", default=None, help="--results-dir of each stage of train_t2i.py")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
