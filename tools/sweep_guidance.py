"""Samples and evaluates a model at several guidance scales, and draws its figures against them.

bash scripts/sweep_guidance.sh --scales "1.5 1.75 2.0" -- --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --image-size 384 \\
    --vq-ckpt vq_ds16_c2i.pt

What stands behind -- goes to autoregressive/sample/sample_c2i_ddp.py. The same command again goes on where it was ended,
and with more scales adds those. A folder beside the samples, its name with `cfg-sweep`, gets the table and the picture.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoregressive.sample import sample_c2i_ddp
from evaluations.published import REFERENCE
from tools import draw_figure
from tools.stages import (
    Stages,
    evaluation_stage,
    find_reference,
    local_processes,
    sampling_flags,
    sampling_stage,
)
from utils.cli import flag_parser, run_script


def main(args: argparse.Namespace) -> None:
    from evaluations import metrics  # noqa: F401 - the evaluator's packages, told before hours of sampling
    from evaluations.c2i import frozen_graph  # noqa: F401
    from evaluations.c2i.inception import find_graph
    from utils.files import atomic_write, write_json
    from utils.runs import find_checkpoint

    scales = read_scales(args.scales)
    drawn = checked_flags(args.flags)
    for flag, path in (("--reference", args.reference), ("--graph", args.graph)):
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"{flag} {path} does not exist")
    processes = local_processes(drawn.device)
    # Once for all scales: the newest checkpoint of a run may be another one by the time of the last.
    gpt, vq = find_checkpoint(drawn.gpt_ckpt), find_checkpoint(drawn.vq_ckpt)
    reference, graph = find_reference(args.reference), find_graph(args.graph)
    drawn.cfg_scale = "sweep"
    folder = Path(drawn.sample_dir) / sample_c2i_ddp.folder_name(drawn, gpt, vq)
    reports: dict[float, Path] = {}
    with Stages(folder) as stages:
        for scale in scales:
            words = [*args.flags, "--gpt-ckpt", str(gpt), "--vq-ckpt", str(vq), "--cfg-scale", str(scale)]
            samples = stages.run(sampling_stage(words, processes, name=f"samples at {scale:g}"))
            evaluation = evaluation_stage(
                reference, samples, processes, graph=graph, device=drawn.device, name=f"evaluation at {scale:g}"
            )
            reports[scale] = stages.run(evaluation)
        figures = {scale: json.loads(path.read_text()) for scale, path in sorted(reports.items())}
        text = "\n".join(table(figures, args.metric)) + "\n"
        with atomic_write(folder / "sweep.md") as f:
            f.write(text.encode())
        named = [{"cfg_scale": scale, "report": str(reports[scale]), **_figures(figures[scale])} for scale in figures]
        write_json(folder / "sweep.json", named)
        print(f"\n{text}\nwrote {folder / 'sweep.md'} and sweep.json")
        picture = ["--results", *map(str, reports.values()), "--output", str(folder / "sweep.png")]
        draw_figure.main(draw_figure.flags().parse_args([*picture, "--metric", args.metric]))


def read_scales(text: str) -> list[float]:
    """The numbers of --scales, each once, in their order. Raises ValueError for what is no guidance scale."""
    scales = []
    for word in text.replace(",", " ").split():
        try:
            scale = float(word)
        except ValueError:
            scale = math.nan
        if not 0 < scale < math.inf:
            raise ValueError(f"--scales {text!r}: {word} is not a guidance scale (a number above 0, 1 for no guidance)")
        scales.append(scale)
    if not scales:
        raise ValueError('--scales is empty: give them as one word, --scales "1.5 1.75 2.0"')
    return list(dict.fromkeys(scales))


def checked_flags(words: list[str]) -> argparse.Namespace:
    """What the flags behind -- mean. Raises ValueError where they set what the sweep sets, or a file is missing."""
    if any(word.partition("=")[0] == "--cfg-scale" for word in words):
        raise ValueError("--cfg-scale comes from --scales: leave it out behind --")
    args = sampling_flags(words)
    for flag, value in (("--gpt-ckpt", args.gpt_ckpt), ("--vq-ckpt", args.vq_ckpt)):
        if value is None:
            raise ValueError(f"{flag} is missing: flags of sample_c2i_ddp.py stand behind --, as in -- {flag} FILE")
    return args


def table(reports: dict[float, dict[str, Any]], metric: str) -> Iterator[str]:
    """The figures of each scale as Markdown, the best of `metric` in bold."""
    titles = draw_figure.TITLES
    best = (min if metric in draw_figure.LOWER_IS_BETTER else max)(
        (scale for scale in reports if reports[scale].get(metric) is not None),
        key=lambda scale: reports[scale][metric],
        default=None,
    )
    yield "| guidance scale | " + " | ".join(titles.values()) + " |"
    yield "|---" * (len(titles) + 1) + "|"
    for scale, report in reports.items():
        values = ["left out" if value is None else f"{value:.4g}" for value in _figures(report).values()]
        yield f"| {f'**{scale:g}**' if scale == best else f'{scale:g}'} | " + " | ".join(values) + " |"
    warnings = dict.fromkeys(warning for report in reports.values() for warning in report["warnings"])
    if warnings:
        yield ""
        yield "NOT COMPARABLE with published figures:"
        yield ""
        yield from (f"- the evaluator: {warning}" for warning in warnings)


def _figures(report: dict[str, Any]) -> dict[str, float | None]:
    return {name: report.get(name) for name in draw_figure.TITLES}


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--scales", required=True, help='guidance scales in one word: "1.5 1.75 2.0"')
    parser.add_argument("--reference", default=None, help=f"the reference batch (default: {REFERENCE}, looked for)")
    parser.add_argument("--graph", default=None, help="the evaluator's graph (default: looked for)")
    parser.add_argument("--metric", choices=list(draw_figure.TITLES), default="fid", help="which figure is drawn")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags of sample_c2i_ddp.py, all behind --")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
