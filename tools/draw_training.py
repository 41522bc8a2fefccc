"""Draws the curves of runs over each other, one panel a metric, from their metrics.jsonl.

python3 tools/draw_training.py --runs results/000-GPT-B results_npp/000-GPT-B --output training.png

A curve is named by its run's folder and by the flags in which the runs of its panel differ.
"""

import argparse
import json
from pathlib import Path

from utils.cli import flag_parser, run_script

SHOWN = ("generator_loss", "reconstruction_loss", "discriminator_loss", "loss", "val_loss")
# Flags that name a place or a machine, not an experiment.
UNNAMED = {"results_dir", "cloud_save_path", "resume", "device", "num_workers", "log_every", "ckpt_every", "import"}
# So many flags are named at most.
NAMED = 4


def main(args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    from utils.files import atomic_write
    from utils.runs import runs_in

    # A results folder stands for its newest run.
    folders = [found[0].folder if (found := runs_in(name)) else Path(name) for name in args.runs]
    curves = {folder: read_curves(folder / "metrics.jsonl") for folder in folders}
    # A loss that is switched off is 0 throughout.
    panels = {name: [one for one in curves if any(v for _, v in curves[one].get(name, ()))] for name in args.metrics}
    panels = {name: runs for name, runs in panels.items() if runs}
    if not panels:
        there = ", ".join(sorted(set().union(*curves.values()))) or "nothing yet"
        raise ValueError(f"no run has {' or '.join(args.metrics)}; --metrics takes {there}")
    figure = Figure(figsize=(6 * len(panels), 4), layout="tight")
    for (name, runs), axis in zip(panels.items(), figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for folder, label in zip(runs, labels(runs), strict=True):
            points = curves[folder][name]
            axis.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 20 else None, markersize=3)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small")
    with atomic_write(args.output) as f:
        figure.savefig(f, format="png", dpi=100)
    print(f"wrote {args.output}")


def labels(folders: list[Path]) -> list[str]:
    """Return a name for each run: its folder, with its parent where two are called alike, and the flags that differ."""
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.resolve().parent.name}/{folder.name}" for folder in folders]
    flags = [flags_of(folder) for folder in folders]
    shared = set.intersection(*map(set, flags)) - UNNAMED
    differing = sorted(name for name in shared if any(one[name] != flags[0][name] for one in flags))
    said = [[f"--{name.replace('_', '-')} {one[name]}" for name in differing[:NAMED]] for one in flags]
    more = ["…"] * (len(differing) > NAMED)
    return [" ".join([name, *words, *more]) for name, words in zip(names, said, strict=True)]


def flags_of(folder: Path) -> dict:
    """Return the flags that a run began with; none of a folder that records none."""
    record = folder / "run.json"
    return json.loads(record.read_text()).get("args", {}) if record.exists() else {}


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
    parser = flag_parser(__doc__)
    parser.add_argument("--runs", nargs="+", required=True, help="run folders, or results folders (their newest run)")
    help = "a panel for each of these that a run has, as metrics.jsonl names them"
    parser.add_argument("--metrics", nargs="+", default=list(SHOWN), help=help)
    parser.add_argument("--output", default="training.png", help="the picture to write")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
