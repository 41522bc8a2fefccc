"""Draws the loss curves of runs side by side, from their metrics.jsonl.

python3 tools/draw_training.py --runs results_tokenizer_image/000-VQ-16 results/000-GPT-B --output training.png
"""

import argparse
import json
from pathlib import Path

from utils.cli import flag_parser, run_script

SHOWN = ("generator_loss", "reconstruction_loss", "discriminator_loss", "loss", "val_loss")


def main(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from utils.files import atomic_write
    from utils.runs import runs_in

    folders = []
    for name in args.runs:
        newest = runs_in(name)  # a results folder stands for its newest run
        folders.append(newest[0].folder if newest else Path(name))
    figure, axes = plt.subplots(1, len(folders), figsize=(6 * len(folders), 4), squeeze=False)
    for folder, axis in zip(folders, axes[0], strict=True):
        curves = read_curves(folder / "metrics.jsonl")
        for name in SHOWN:
            if name in curves and any(value for _, value in curves[name]):
                axis.plot(
                    *zip(*curves[name], strict=True),
                    label=name,
                    marker="o" if name == "val_loss" else None,
                    markersize=3,
                )
        axis.set_title(folder.name)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.tight_layout()
    with atomic_write(args.output) as f:
        figure.savefig(f, format="png", dpi=100)
    print(f"wrote {args.output}")


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Points (step, value) by name. What a resumed run logged again replaces the first. Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give the folders of runs, or of their results")
    points: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed
            continue
        step = record.pop("step")
        for name, value in record.items():
            points.setdefault(name, {})[step] = value
    return {name: sorted(values.items()) for name, values in points.items()}


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--runs", nargs="+", required=True, help="run folders, or results folders (their newest run)")
    parser.add_argument("--output", default="training.png", help="the picture to write")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
