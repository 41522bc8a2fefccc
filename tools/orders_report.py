"""Compares models that read the same codes in other orders: a table, report.json and orders.png.

    python3 tools/orders_report.py --runs quickstart/orders/* --drawings quickstart/drawings \\
        --codes quickstart/codes_held_out --vq-ckpt quickstart/tokenizer --output quickstart/orders

Each run is a folder of scripts/compare_orders.sh, named as its model is to be called. Drawings are judged as
tools/drawings_report.py does. Seconds are of the tokens alone, of one call after another on this machine.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import flag_parser, positive_int, run_script

if TYPE_CHECKING:
    from autoregressive.pipeline import ImagePipeline
    from tools.drawings import Judge

# The model's own distribution, and the sharper one of the quickstart's drawings.
SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "guided": {"cfg_scale": 1.5, "temperature": 0.6}}


def main(args: argparse.Namespace) -> None:
    import torch

    from autoregressive.pipeline import ImagePipeline, load_gpt
    from autoregressive.train.evaluation import mean_loss
    from dataset.codes import open_codes
    from tokenizer.load import load_tokenizer
    from tools.drawings import Judge
    from utils.distributed import start
    from utils.files import write_json
    from utils.runs import find_checkpoint

    judge, dist = Judge(Path(args.drawings)), start("cpu")
    tokenizer = load_tokenizer(find_checkpoint(args.vq_ckpt))
    report: dict[str, dict[str, Any]] = {}
    for run in args.runs:
        gpt = load_gpt(find_checkpoint(run))
        torch.manual_seed(0)
        report[Path(run).name] = {
            "parameters": gpt.num_parameters,
            "nll_held_out": mean_loss(gpt, open_codes(args.codes, random_view=False), 64, dist),
            "passes": len(gpt.layout.passes),
            **figures(ImagePipeline(gpt, tokenizer, batch_size=args.batch_size, window=0), judge, args),
        }
        print(row(Path(run).name, report[Path(run).name]), flush=True)
    write_json(Path(args.output) / "report.json", report)
    print("\n".join([HEAD, *(row(name, each) for name, each in report.items())]))
    draw(report, Path(args.output) / "orders.png")


def figures(pipeline: "ImagePipeline", judge: "Judge", args: argparse.Namespace) -> dict[str, float]:
    """Return the share of drawings as asked for under each of SETTINGS, and images a second."""
    import numpy as np
    import torch

    from autoregressive.models.generate import generate

    names = [name.replace("-", " ") for name in pipeline.gpt.file_config["classes"]]
    labels = np.arange(len(names)).repeat(args.images_per_class)
    first = torch.from_numpy(labels[: args.batch_size])
    found = {}
    for setting, values in SETTINGS.items():
        images = np.stack([np.asarray(image) for image in pipeline(labels.tolist(), seed=0, progress=False, **values)])
        found[f"as_asked_{setting}"] = judge.roles_right(images, [names[label] for label in labels])
        found[f"distance_to_training_{setting}"] = float(np.median(judge.distances(images, judge.train).min(1)))
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            generate(pipeline.gpt, first, **values)
            seconds.append(time.perf_counter() - began)
        found[f"images_per_second_{setting}"] = len(first) / min(seconds)
    return found


HEAD = (
    "| order | parameters | held-out NLL | as asked, plain | guided | distance to training drawings, plain | passes | images/s |\n"
    "|---|---|---|---|---|---|---|---|"
)


def row(name: str, of: dict[str, Any]) -> str:
    """Return a model's line of the table."""
    return (
        f"| {name} | {of['parameters'] / 1e6:.2f}M | {of['nll_held_out']:.3f} | {of['as_asked_plain']:.1%} | "
        f"{of['as_asked_guided']:.1%} | {of['distance_to_training_plain']:.4f} | {of['passes']} | {of['images_per_second_guided']:.1f} |"
    )


def draw(report: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw a row of dots a model: drawings as asked for, held-out loss, images a second."""
    from matplotlib.figure import Figure

    from utils.files import atomic_write

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    rows = range(len(report), 0, -1)
    for color, setting in zip(("C0", "C1"), SETTINGS, strict=True):
        axes[0].plot([100 * of[f"as_asked_{setting}"] for of in report.values()], rows, "o", color=color, label=setting)
    axes[1].plot([of["nll_held_out"] for of in report.values()], rows, "o", color="0.3")
    axes[2].plot([of["images_per_second_guided"] for of in report.values()], rows, "o", color="0.3")
    axes[0].set_yticks(rows, [f"{name}, {of['passes']} passes" for name, of in report.items()])
    axes[0].legend(frameon=False, loc="lower left")
    titles = ("drawings as asked for, %", "held-out loss, nats a token", "images a second")
    for axis, title, left in zip(axes, titles, (0, None, 0), strict=True):
        axis.set(xlabel=title, xlim=(left, None))
        axis.grid(axis="y", color="0.9")
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--runs", nargs="+", required=True, help="results folders, one a model")
    parser.add_argument("--drawings", required=True, help="folder of make_drawings.py")
    parser.add_argument("--codes", required=True, help="packed codes of the held-out drawings")
    parser.add_argument("--vq-ckpt", required=True, help="tokenizer")
    parser.add_argument("--images-per-class", type=positive_int, default=10, help="drawings to judge")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images at once")
    parser.add_argument("--output", required=True, help="folder for report.json and orders.png")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
