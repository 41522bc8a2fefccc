"""Samples and evaluates a model at several guidance scales, and draws its figures against them.

bash scripts/sweep_guidance.sh --scales "1.5 1.75 2.0" -- --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --image-size 384 \\
    --vq-ckpt vq_ds16_c2i.pt

What stands behind -- goes to autoregressive/sample/sample_c2i_ddp.py. Rerun the command to resume it,
with more scales to add those. A folder beside the samples, its name with `cfg-sweep`, gets the table and the picture.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluations.published import FIGURES, GRAPH, LOWER_IS_BETTER, REFERENCE, find_file
from tools import steps
from utils.cli import flag_parser, positive_float, run_script


def main(args: argparse.Namespace) -> None:
    from utils.files import atomic_write, write_json
    from utils.runs import find_checkpoint

    scales, given = read_scales(args.scales), steps.given_flags(args.flags)
    if "--cfg-scale" in given:
        raise ValueError("--cfg-scale comes from --scales: leave it out behind --")
    for flag in ("--gpt-ckpt", "--vq-ckpt"):
        if flag not in given:
            raise ValueError(f"{flag} is missing behind --: give a file, a run's folder, or a released file's name")
    steps.require_evaluator()
    processes = steps.local_processes(given.get("--device"))
    reference, graph = find_file(REFERENCE, args.reference), find_file(GRAPH, args.graph)
    # Once for all scales: the newest checkpoint of a run may be another one by the time of the last.
    weights = [word for flag in ("--gpt-ckpt", "--vq-ckpt") for word in (flag, str(find_checkpoint(given[flag])))]
    reports = {}
    for scale in scales:
        steps.run(steps.SAMPLER, [*args.flags, *weights, "--cfg-scale", str(scale)], processes)
        samples = steps.newest(Path(given.get("--sample-dir", "samples")))
        if f"-cfg-{scale}-" not in samples.name:
            raise ValueError(f"{samples} is another run's: give a --sample-dir that no other run writes to meanwhile")
        reports[scale] = steps.evaluate(reference, samples, processes, graph=graph, device=given.get("--device"))
    folder = samples.with_name(samples.stem.replace(f"cfg-{scale}", "cfg-sweep"))
    reports = dict(sorted(reports.items()))
    text = "\n".join(table(reports, args.metric)) + "\n"
    with atomic_write(folder / "sweep.md") as f:
        f.write(text.encode())
    named = [{"cfg_scale": scale, "report": one["path"], **figures(one)} for scale, one in reports.items()]
    write_json(folder / "sweep.json", named)
    print(f"\n{text}\nwrote {folder / 'sweep.md'} and sweep.json")
    picture = ["--output", folder / "sweep.png", "--metric", args.metric]
    steps.run("tools/draw_figure.py", ["--results", *(one["path"] for one in reports.values()), *picture], 1)


def read_scales(text: str) -> list[float]:
    """Return the numbers of --scales, each once, in their order. Raises ValueError for what is no guidance scale."""
    scales = []
    for word in text.replace(",", " ").split():
        try:
            scales.append(positive_float(word))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--scales {text!r}: {word} is not a guidance scale ({error})") from error
    if not scales:
        raise ValueError('--scales is empty: give them as one word, --scales "1.5 1.75 2.0"')
    return list(dict.fromkeys(scales))


def table(reports: dict[float, dict[str, Any]], metric: str) -> Iterator[str]:
    """Yield the figures of each scale as Markdown, the best of `metric` in bold."""
    known = [scale for scale in reports if reports[scale].get(metric) is not None]
    pick = min if metric in LOWER_IS_BETTER else max
    best = pick(known, key=lambda scale: reports[scale][metric], default=None)
    yield "| guidance scale | " + " | ".join(FIGURES.values()) + " |"
    yield "|---" * (len(FIGURES) + 1) + "|"
    for scale, report in reports.items():
        values = ["left out" if value is None else f"{value:.4g}" for value in figures(report).values()]
        yield f"| {f'**{scale:g}**' if scale == best else f'{scale:g}'} | " + " | ".join(values) + " |"
    warnings = dict.fromkeys(warning for report in reports.values() for warning in report["warnings"])
    if warnings:
        yield from ("", "NOT COMPARABLE with published figures:", "")
        yield from (f"- the evaluator: {warning}" for warning in warnings)


def figures(report: dict[str, Any]) -> dict[str, float | None]:
    """Return the five figures of a report, None for one that was left out."""
    return {name: report.get(name) for name in FIGURES}


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--scales", required=True, help='guidance scales in one word: "1.5 1.75 2.0"')
    steps.add_judge_flags(parser)
    parser.add_argument("--metric", choices=list(FIGURES), default="fid", help="which figure is drawn")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags of sample_c2i_ddp.py, all behind --")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
