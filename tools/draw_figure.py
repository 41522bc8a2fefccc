"""Draws figures of evaluated samples, against parameters and against guidance scale, beside the published ones.

    python3 tools/draw_figure.py --results samples --output figure.png

--results are .json files that evaluations/c2i/evaluator.py leaves beside the samples, and folders to search for them. A
model whose samples it warned about is marked as not comparable.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from autoregressive.models.settings import SamplingConfig
from evaluations.published import FIGURES, LOWER_IS_BETTER, ROWS, Row
from utils.cli import add_switch, flag_parser, grid_size, run_script

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from autoregressive.models.gpt import ModelArgs

# Samples that differ in one of these settings, or in their checkpoint, are on different lines.
APART = (
    "image_size",
    "image_size_eval",
    *(name for name in SamplingConfig.fields() if name not in ("cfg_scale", "draw")),
    "precision",
    "use_ema",
)
MARKERS = "os^DvP*Xh<>p"  # of the published systems in their order
GREY = {"color": "0.45", "markerfacecolor": "white", "markersize": 7, "linewidth": 0.9}


class Result(NamedTuple):
    """An evaluator's report: what results of one line share, the size, the guidance scale, the figures."""

    series: tuple[Any, ...]
    parameters: int
    scale: float
    figures: dict[str, float]
    comparable: bool  # the evaluator had no warnings


def main(args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    from utils.files import atomic_write

    shown = [result for result in read_results(args.results) if result.figures.get(args.metric) is not None]
    if not shown:
        raise ValueError(
            f"{' '.join(args.results)}: no report of evaluations/c2i/evaluator.py about samples of sample_c2i_ddp.py "
            f"with {args.metric}: evaluate some first, or give another folder"
        )
    lines = lines_of(shown)
    rows = [row for row in ROWS.values() if row.gpt] if args.published and args.metric == "fid" else []
    figure = Figure(figsize=(13, 6), layout="tight")
    axes = figure.subplots(1, 2, sharey=True)
    draw_published(axes, rows)
    draw_lines(axes, lines, args.metric, mark=bool(rows))
    axes[0].set(xscale="log", xlabel="parameters (each model at its best guidance scale)")
    axes[1].set_xlabel("guidance scale")
    better = "lower" if args.metric in LOWER_IS_BETTER else "higher"
    axes[0].set_ylabel(f"{FIGURES[args.metric]} ({better} is better)")
    values = [result.figures[args.metric] for result in shown] + [row.fid for row in rows]
    if args.metric in LOWER_IS_BETTER and min(values) > 0 and max(values) > 3 * min(values):
        axes[0].set_yscale("log")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.margins(0.08)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    with atomic_write(args.output) as f:
        figure.savefig(f, format="png", dpi=120, bbox_inches="tight")
    print(f"wrote {args.output}: {len(shown)} results of {len(lines)} models, {len(rows)} published")


def read_results(places: Sequence[str]) -> list[Result]:
    """Return the evaluator's reports among files, in folders and below; prints what every other .json file is not."""
    paths: dict[Path, None] = {}
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"--results {place} does not exist: give the folder of samples and reports")
        paths |= dict.fromkeys(sorted(place.rglob("*.json")) if place.is_dir() else [place])
    results = []
    for path in paths:
        try:
            results.append(read_result(path))
        except (ValueError, KeyError, TypeError) as error:
            print(f"skipped {path}: not a report with the settings of its samples ({error!r})")
    return results


def read_result(path: Path) -> Result:
    """Return one report. Raises ValueError, KeyError or TypeError for a file that is none, or none of samples."""
    import torch

    from autoregressive.models.build import build_model

    report = json.loads(path.read_text())
    samples = report["protocol"]["samples"]
    settings = samples["settings"]
    series = (settings["gpt_ckpt"]["file"], samples["count"], *(settings.get(name) for name in APART))
    with torch.device("meta"):
        parameters = build_model(gpt_args(settings)).num_parameters
    figures = {name: report.get(name) for name in FIGURES}
    return Result(series, parameters, float(settings["cfg_scale"]), figures, not report.get("warnings"))


def gpt_args(settings: Mapping[str, Any]) -> "ModelArgs":
    """Return the model that flags of sample_c2i_ddp.py describe, from their values or a sample folder's settings.json.

    Raises ValueError for a size that is not known, KeyError where a setting is missing.
    """
    from autoregressive.models.gpt import ModelArgs
    from autoregressive.models.sizes import GPT_SIZES

    if settings["gpt_model"] not in GPT_SIZES:
        raise ValueError(f"--gpt-model {settings['gpt_model']} is in no table; known are {', '.join(GPT_SIZES)}")
    special = settings.get("spe_token_num")
    group = settings.get("ar_token_num") or (1 if special is None else special + 1)
    size = GPT_SIZES[settings["gpt_model"]].fields
    codes = settings["codebook_size"] or size.pop("vocab_size")
    return ModelArgs(
        **size | {"vocab_size": codes},
        block_size=grid_size(settings["image_size"], settings["downsample_size"]) ** 2,
        num_classes=settings["num_classes"] or 1000,
        cls_token_num=settings["cls_token_num"],
        ar_token_num=group,
        spe_token_num=group - 1,
        layout={"name": name} if (name := settings.get("layout")) not in (None, "raster", "parallel") else None,
    )


def lines_of(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return label → results by rising guidance scale; a label says what tells its line from the others."""
    groups = defaultdict(list)
    for result in results:
        groups[result.series].append(result)
    differing = [place for place in range(1, len(APART) + 2) if len({series[place] for series in groups}) > 1]
    files = {series[0] for series in groups}
    lines = {}
    for series, group in groups.items():
        names = [name_of(Path(file)) for file in files]
        name = name_of(Path(series[0]))
        parts = [name if names.count(name) == 1 else series[0]]
        parts += [f"{('samples', *APART)[place - 1].replace('_', ' ')} {series[place]}" for place in differing]
        lines[", ".join(parts)] = sorted(group, key=lambda result: result.scale)
    return dict(sorted(lines.items(), key=lambda item: (item[1][0].parameters, item[0])))


def name_of(file: Path) -> str:
    """Return what a person calls weights: the file's name, or for a checkpoint of a run the run's and the step."""
    if file.stem.isdigit() and file.parent.name == "checkpoints":
        return f"{file.parent.parent.name} at {int(file.stem):,}"
    return file.parent.name if file.stem.startswith("consolidated") else file.stem


def draw_published(axes: "Sequence[Axes]", rows: Sequence[Row]) -> None:
    """Draws the published systems: lines over their sizes, and points over guidance scales with the size beside."""
    kinds = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.parameters):
        kinds[f"{row.system} {row.image_size}"].append(row)
    for marker, (kind, group) in zip(cycle(MARKERS), kinds.items()):
        figures = [row.fid for row in group]
        axes[0].plot([row.parameters for row in group], figures, "--", marker=marker, **GREY)
        axes[1].plot([row.cfg_scale for row in group], figures, marker, label=f"{kind}, published", **GREY)
        for row in group:
            text = row.model.split("-", 1)[1] + " 16x" * row.name.endswith("16x")
            axes[1].annotate(text, (row.cfg_scale, row.fid), (6, 3), textcoords="offset points", fontsize=7.5)


def draw_lines(axes: "Sequence[Axes]", lines: dict[str, list[Result]], metric: str, mark: bool) -> None:
    """Draws each model: its best guidance scale over its size, and its line over guidance scales."""
    pick = min if metric in LOWER_IS_BETTER else max
    for number, (label, group) in enumerate(lines.items()):
        color = f"C{number % 10}"
        best = pick(group, key=lambda result: result.figures[metric])
        place = (best.parameters, best.figures[metric])
        axes[0].plot(*place, "o", color=color)
        axes[0].annotate(f"at {best.scale:g}", place, (8, -3), textcoords="offset points", fontsize=7.5, color=color)
        if mark and not all(result.comparable for result in group):
            label += " (not comparable)"
        scales, values = zip(*((result.scale, result.figures[metric]) for result in group))
        axes[1].plot(scales, values, "o-", color=color, label=label)


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--results", nargs="+", required=True, help="folders, or the evaluator's .json files")
    parser.add_argument("--output", default="figure.png", help="the picture to write")
    parser.add_argument("--metric", choices=list(FIGURES), default="fid", help="which of the figures")
    add_switch(parser, "--published", True, "show the published points too (there are FIDs)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
