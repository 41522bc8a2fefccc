"""Judges models trained on make_digits.py's digits: pictures and report.json.

    python3 tools/digits_report.py --digits quickstart/digits --codes quickstart/codes_held_out --gpt-ckpt quickstart/gpt \\
        --vq-ckpt quickstart/tokenizer --samples quickstart/samples --output quickstart

The judge of generated digits is a support vector classifier fitted on the real training digits; what it makes of the
real held-out digits stands beside it. Distances between sets of digits are those of evaluations/metrics.py, over the hidden
layer of a small perceptron that was taught to read the training digits.
"""

import argparse
import json
from pathlib import Path

from utils.cli import flag_parser, run_script


def main(args: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from sklearn.neural_network import MLPClassifier
    from sklearn.svm import SVC

    from autoregressive.pipeline import load_gpt
    from autoregressive.train.loss import mean_loss
    from dataset.codes import PackedCodes
    from dataset.folders import class_folders
    from dataset.images import load_rgb
    from evaluations.metrics import RunningStatistics, frechet_distance, precision_recall
    from tokenizer.reconstruction import reconstruct
    from tokenizer.tokenizer_image.load import load_tokenizer
    from utils.distributed import start
    from utils.files import write_json
    from utils.images import make_grid, peak_signal_to_noise_ratio, save_png
    from utils.runs import find_checkpoint

    output = Path(args.output)
    dist = start("cpu")

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        images = class_folders(Path(args.digits) / split)
        return np.stack([np.asarray(load_rgb(path)) for path in images.paths]), np.asarray(images.labels)

    train_images, train_labels = read("train")
    held_images, held_labels = read("held_out")

    tokenizer = load_tokenizer(find_checkpoint(args.vq_ckpt))
    pixels = torch.from_numpy(held_images).permute(0, 3, 1, 2).float() / 127.5 - 1
    parts = list(reconstruct(tokenizer, ((batch, batch) for batch in pixels.split(64)), dist.device))
    originals, recons, codes = (np.concatenate(part) for part in zip(*parts, strict=True))
    shown = np.random.default_rng(0).permutation(len(originals))[:16]
    save_png(make_grid(np.concatenate([originals[shown], recons[shown]]), columns=16), output / "reconstructions.png")

    gpt = load_gpt(find_checkpoint(args.gpt_ckpt))
    nll = mean_loss(gpt, PackedCodes(args.codes, random_view=False), 64, dist)

    archives = sorted(Path(args.samples).glob("*.npz"), key=lambda path: path.stat().st_mtime)
    if not archives:
        raise FileNotFoundError(
            f"{args.samples} has no .npz: run sample_c2i_ddp.py with --sample-dir {args.samples} first"
        )
    with np.load(archives[-1]) as archive:
        samples, asked = archive["arr_0"], archive["arr_1"]
    rows = [np.flatnonzero(asked == digit)[:10] for digit in range(10)]
    save_png(make_grid(samples[np.concatenate(rows)], columns=10), output / "samples.png")

    def pixels_of(images: np.ndarray) -> np.ndarray:
        return images[..., 0].reshape(len(images), -1) / 255.0

    judge = SVC(C=10, gamma="scale").fit(pixels_of(train_images), train_labels)
    perceptron = MLPClassifier((64,), max_iter=500, random_state=0).fit(pixels_of(train_images), train_labels)

    def features_of(images: np.ndarray) -> np.ndarray:
        """The hidden layer: (n, 64)."""
        return np.maximum(pixels_of(images) @ perceptron.coefs_[0] + perceptron.intercepts_[0], 0)

    def distances(images: np.ndarray) -> dict[str, float]:
        """How far a set of images is from the training digits."""
        statistics = []
        for part in (train_images, images):
            running = RunningStatistics(64)
            running.update(features_of(part))
            statistics.append(running.result())
        precision, recall = precision_recall(features_of(train_images), features_of(images))
        return {"frechet_distance": frechet_distance(*statistics), "precision": precision, "recall": recall}

    seconds: dict[str, float] = {}
    times = output / "seconds.tsv"
    for line in times.read_text().splitlines() if times.exists() else ():
        stage, value = line.split("\t")
        seconds[stage] = seconds.get(stage, 0) + float(value)
    report = {
        "seconds": {**seconds, "total": sum(seconds.values())},
        "psnr_held_out_db": float(
            np.mean([peak_signal_to_noise_ratio(a, b) for a, b in zip(originals, recons, strict=True)])
        ),
        "codebook_usage_held_out": len(np.unique(codes)) / tokenizer.config.codebook_size,
        "nll_held_out_nats_per_token": nll,
        "samples": len(samples),
        "samples_read_as_asked": float(judge.score(pixels_of(samples), asked)),
        "held_out_digits_read_right": float(judge.score(pixels_of(held_images), held_labels)),
        "train_against_held_out": distances(held_images),
        "train_against_samples": distances(samples),
    }
    write_json(output / "report.json", report)
    print(json.dumps(report, indent=2))


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--digits", required=True, help="folder with train/ and held_out/ from make_digits.py")
    parser.add_argument("--codes", required=True, help="packed codes of the held-out digits")
    parser.add_argument("--vq-ckpt", required=True, help="tokenizer")
    parser.add_argument("--gpt-ckpt", required=True, help="GPT")
    parser.add_argument("--samples", required=True, help="folder with the .npz of sample_c2i_ddp.py")
    parser.add_argument("--output", required=True, help="folder for report.json and the pictures")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
