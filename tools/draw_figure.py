"""Draws figures of evaluated samples, against parameters and against guidance scale, beside the published ones.

python3 tools/draw_figure.py --results samples --output figure.png

--results are .json files that evaluations/c2i/evaluator.py leaves beside the samples, and folders to search for them. A
model whose samples it warned about is marked as not comparable.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluations.published import ROWS, Row, gpt_args
from utils.cli import add_switch, flag_parser, run_script

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
}
LOWER_IS_BETTER = {"fid", "sfid"}
# What samples are drawn with besides the guidance scale: samples that differ in one of these are on different lines.
APART = ("image_size", "image_size_eval", "top_k", "top_p", "temperature", "cfg_interval", "precision", "use_ema")
# Published systems: marker, and where their notes go (points right and up), so that neighbours do not cover each other.
_PUBLISHED = {
    "LlamaGen 256": ("o", (6, 3)),
    "LlamaGen 384": ("s", (6, -9)),
    "NPP 256": ("^", (-7, 6)),
    "PAR 384": ("D", (0, -16)),
    "PAR 384, 16x": ("P", (6, 4)),
}


@dataclass(frozen=True)
class Result:
    """An evaluator's report: the guidance scale and the figures, and `series`, which results of one line share."""

    path: Path
    checkpoint: str
    series: tuple[tuple[str, Any], ...]
    parameters: int
    cfg_scale: float
    figures: dict[str, float]
    comparable: bool  # the evaluator had no warnings


def main(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from utils.files import atomic_write

    results, skipped = read_results([Path(name) for name in args.results])
    for line in skipped:
        print(f"skipped {line}")
    shown = [result for result in results if result.figures.get(args.metric) is not None]
    if not shown:
        found = f"{len(results)} without {args.metric}" if results else "no .json file"
        raise ValueError(
            f"{' '.join(args.results)}: {found} of evaluations/c2i/evaluator.py about samples of sample_c2i_ddp.py: "
            "evaluate some first, or give another folder"
        )
    lines = lines_of(shown)
    rows = [row for row in ROWS.values() if row.gpt] if args.published and args.metric == "fid" else []
    figure, (by_size, by_scale) = plt.subplots(1, 2, figsize=(13, 6), sharey=True)
    draw_against_parameters(by_size, lines, rows, args.metric)
    draw_against_scale(by_scale, lines, rows, args.metric)
    finish((by_size, by_scale), args.metric)
    handles, labels = by_scale.get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    figure.tight_layout()
    with atomic_write(args.output) as f:
        figure.savefig(f, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(f"wrote {args.output}: {len(shown)} results of {len(lines)} models, {len(rows)} published")


def read_results(places: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """The evaluator's reports among files, in folders and those below them, and for every other .json file what it is not.

    Raises FileNotFoundError where there is no such file or folder.
    """
    paths: dict[Path, None] = {}
    for place in places:
        if not place.exists():
            raise FileNotFoundError(
                f"--results {place} does not exist: give the folder that samples and reports are in"
            )
        paths |= dict.fromkeys(sorted(place.rglob("*.json")) if place.is_dir() else [place])
    results, skipped = [], []
    for path in paths:
        try:
            results.append(read_result(path))
        except (OSError, ValueError) as error:
            skipped.append(f"{path}: {error}")
    return results, skipped


def read_result(path: Path) -> Result:
    """One report. Raises ValueError that says why a file is none, or none of samples."""
    try:
        report = json.loads(path.read_text())
        figures, protocol = {name: report[name] for name in ("fid", "sfid", "inception_score")}, report["protocol"]
        figures |= {name: report.get(name) for name in ("precision", "recall")}
        settings, count = protocol["samples"]["settings"], protocol["samples"]["count"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("not a report of the evaluator") from error
    try:
        scale, parameters = float(settings["cfg_scale"]), count_parameters(settings)
        checkpoint = settings["gpt_ckpt"]["file"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("a report without the settings that its samples were drawn with") from error
    series = {"checkpoint": checkpoint, "samples": count} | {name: settings.get(name) for name in APART}
    comparable = not report.get("warnings")
    return Result(path, checkpoint, tuple(series.items()), parameters, scale, figures, comparable)


def count_parameters(settings: dict[str, Any]) -> int:
    """Numbers in the model that sample_c2i_ddp.py's settings describe. Raises KeyError, ValueError."""
    import torch

    from autoregressive.models.gpt import Transformer

    with torch.device("meta"):
        return Transformer(gpt_args(settings)).num_parameters


def lines_of(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Label → results by rising guidance scale; a label says as much as tells its line from the others."""
    groups = defaultdict(list)
    for result in results:
        groups[result.series].append(result)
    names = {series: checkpoint_name(group[0].checkpoint) for series, group in groups.items()}
    lines = {}
    for series, group in groups.items():
        name = names[series]
        others = [dict(other) for other in groups if names[other] == name and other != series]
        if any(other["checkpoint"] != dict(series)["checkpoint"] for other in others):
            name = f"{Path(group[0].checkpoint).parent.name}/{name}"
        differing = [key for key in dict(series) if any(other[key] != dict(series)[key] for other in others)]
        details = [f"{key.replace('_', ' ')} {dict(series)[key]}" for key in differing if key != "checkpoint"]
        label = ", ".join([name, *details])
        while label in lines:  # files of the same name in folders of the same name
            label += "'"
        lines[label] = sorted(group, key=lambda result: result.cfg_scale)
    return dict(sorted(lines.items(), key=lambda item: (item[1][0].parameters, item[0])))


def checkpoint_name(path: str) -> str:
    """What a person calls the weights: the file's name, or for a checkpoint of a run the run's and the step."""
    file = Path(path)
    if file.stem.isdigit() and file.parent.name == "checkpoints":
        return f"{file.parent.parent.name} at {int(file.stem):,}"
    return file.parent.name if file.stem.startswith("consolidated") else file.stem


def draw_against_parameters(axis: "Axes", lines: dict[str, list[Result]], rows: Sequence[Row], metric: str) -> None:
    """Each model at its best guidance scale, published systems as lines over their sizes."""
    for kind, group in _kinds(rows).items():
        group = sorted(group, key=lambda row: row.parameters)
        style = {"marker": _PUBLISHED[kind][0], "linestyle": "--" if len(group) > 1 else "none"}
        axis.plot([row.parameters for row in group], [row.fid for row in group], **style, **_published_style())
    for number, group in enumerate(lines.values()):
        best = (min if metric in LOWER_IS_BETTER else max)(group, key=lambda result: result.figures[metric])
        color, place = f"C{number % 10}", (best.parameters, best.figures[metric])
        axis.plot(*place, "o", color=color, markersize=6, zorder=3)
        _note(axis, f"at {best.cfg_scale:g}", place, (8, -3), color)
    axis.set_xscale("log")
    sizes = sorted({row.parameters for row in rows} | {group[0].parameters for group in lines.values()})
    apart = [size for i, size in enumerate(sizes) if i == 0 or size > 1.05 * sizes[i - 1]]
    axis.set_xticks(apart, [format_parameters(size) for size in apart])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("parameters (each model at its best guidance scale)")


def draw_against_scale(axis: "Axes", lines: dict[str, list[Result]], rows: Sequence[Row], metric: str) -> None:
    """A line a model over its guidance scales, published figures as points with their size."""
    for number, (label, group) in enumerate(lines.items()):
        means = defaultdict(list)  # of the same samples drawn with several seeds, say
        for result in group:
            means[result.cfg_scale].append(result.figures[metric])
        color = f"C{number % 10}"
        axis.plot(list(means), [sum(values) / len(values) for values in means.values()], "-", color=color)
        if rows and not all(result.comparable for result in group):
            label += " (not comparable)"
        scales, values = [r.cfg_scale for r in group], [r.figures[metric] for r in group]
        axis.plot(scales, values, "o", color=color, markersize=6, zorder=3, label=label)
    for kind, group in _kinds(rows).items():
        marker, offset = _PUBLISHED[kind]
        style = {"marker": marker, "linestyle": "none", "label": f"{kind}, published"}
        axis.plot([row.cfg_scale for row in group], [row.fid for row in group], **style, **_published_style())
        for row in group:
            _note(axis, row.model.removeprefix("GPT-"), (row.cfg_scale, row.fid), offset)
    axis.set_xlabel("guidance scale")


def finish(axes: Sequence["Axes"], metric: str) -> None:
    """What both pictures share; a logarithmic scale where the figures are far apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low = min(axis.dataLim.ymin for axis in axes)
    high = max(axis.dataLim.ymax for axis in axes)
    if metric in LOWER_IS_BETTER and low > 0 and high > 3 * low:
        axes[0].set_yscale("log")
        subs = (1.0, 2.0, 3.0, 5.0, 7.0) if high < 30 * low else (1.0, 2.0, 5.0)
        axes[0].yaxis.set_major_locator(LogLocator(subs=subs))
        axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    axes[0].set_ylabel(f"{TITLES[metric]} ({better} is better)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.margins(0.08)
        axis.tick_params(labelleft=True)


def format_parameters(count: int) -> str:
    """111M, 1.4B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            value = count / unit
            return f"{value:.{max(0, 1 - int(math.log10(value))) if name == 'B' else 0}f}{name}"
    return str(count)


def _kinds(rows: Sequence[Row]) -> dict[str, list[Row]]:
    kinds = defaultdict(list)
    for row in rows:
        kinds[f"{row.system} {row.image_size}" + ", 16x" * row.name.endswith("16x")].append(row)
    return kinds


def _published_style() -> dict[str, Any]:
    return {"color": "0.45", "markerfacecolor": "white", "markersize": 7, "linewidth": 0.9}


def _note(
    axis: "Axes", text: str, place: tuple[float, float], offset: tuple[float, float], color: str = "0.35"
) -> None:
    side = "center" if not offset[0] else "left" if offset[0] > 0 else "right"
    axis.annotate(text, place, offset, textcoords="offset points", fontsize=7.5, color=color, ha=side)


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--results", nargs="+", required=True, help="folders, or the evaluator's .json files")
    parser.add_argument("--output", default="figure.png", help="the picture to write")
    parser.add_argument("--metric", choices=list(TITLES), default="fid", help="which of the figures")
    add_switch(parser, "--published", True, "show the published points too (there are FIDs)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
