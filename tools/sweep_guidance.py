"""Samples and evaluates a model at several guidance scales, and powers of a rising one, and draws its figures against them.

bash scripts/sweep_guidance.sh --scales "1.5 1.75 2.0" -- --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --image-size 384 \\
    --vq-ckpt vq_ds16_c2i.pt

With --powers "1.5 2.75" every scale is drawn with each power of `--cfg-schedule power-cosine`. What stands behind -- goes to autoregressive/sample/sample_c2i_ddp.py. Rerun the command to resume it,
with more scales or powers to add those. A folder beside the samples, its name with `cfg-sweep`, gets the table and the picture.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from typing import Any

from evaluations.published import FIGURES, GRAPH, LOWER_IS_BETTER, REFERENCE, find_file
from tools import steps
from tools.stages import newest_file
from utils.cli import flag_parser, positive_float, run_script

SCHEDULE = ("--cfg-schedule", "--cfg-power")


def main(args: argparse.Namespace) -> None:
    from utils.files import atomic_write, write_json
    from utils.runs import find_checkpoint

    scales, given = read_numbers("--scales", args.scales), steps.given_flags(args.flags)
    powers: list[float | None] = [None] if args.powers is None else [*read_numbers("--powers", args.powers)]
    for flag, source in (("--cfg-scale", "--scales"), *((flag, "--powers") for flag in SCHEDULE if args.powers)):
        if flag in given:
            raise ValueError(f"{flag} comes from {source}: leave it out behind --")
    for flag in ("--gpt-ckpt", "--vq-ckpt"):
        if flag not in given:
            raise ValueError(f"{flag} is missing behind --: give a file, a run's folder, or a released file's name")
    steps.require_evaluator()
    processes = steps.local_processes(given.get("--device"))
    reference, graph = find_file(REFERENCE, args.reference), find_file(GRAPH, args.graph)
    # Once for all scales: the newest checkpoint of a run may be another one by the time of the last.
    weights = [word for flag in ("--gpt-ckpt", "--vq-ckpt") for word in (flag, str(find_checkpoint(given[flag])))]
    reports = {}
    for power, scale in product(powers, scales):
        schedule = [] if power is None else [SCHEDULE[0], "power-cosine", SCHEDULE[1], str(power)]
        steps.run(steps.SAMPLER, [*args.flags, *weights, "--cfg-scale", str(scale), *schedule], processes)
        samples = newest_file(given.get("--sample-dir", "samples"), "*.npz")
        if f"-cfg-{scale}-" not in samples.name:
            raise ValueError(f"{samples} is another run's: give a --sample-dir that no other run writes to meanwhile")
        report = steps.evaluate(reference, samples, processes, graph=graph, device=given.get("--device"))
        reports[scale, power] = report
    last = f"cfg-{scale}" + ("" if power is None else f"-power-cosine-{power}")
    folder = samples.with_name(samples.stem.replace(last, "cfg-sweep"))
    reports = dict(sorted(reports.items(), key=lambda item: (item[0][1] or 0, item[0][0])))
    text = "\n".join(table(reports, args.metric)) + "\n"
    with atomic_write(folder / "sweep.md") as f:
        f.write(text.encode())
    named = [
        {"cfg_scale": scale, **({} if power is None else {"cfg_power": power}), "report": one["path"], **figures(one)}
        for (scale, power), one in reports.items()
    ]
    write_json(folder / "sweep.json", named)
    print(f"\n{text}\nwrote {folder / 'sweep.md'} and sweep.json")
    picture = ["--output", folder / "sweep.png", "--metric", args.metric]
    steps.run("tools/draw_figure.py", ["--results", *(one["path"] for one in reports.values()), *picture], 1)


def read_numbers(flag: str, text: str) -> list[float]:
    """Return the numbers of a flag's word, each once, in their order. Raises ValueError for what is no number above 0."""
    numbers = []
    for word in text.replace(",", " ").split():
        try:
            numbers.append(positive_float(word))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{flag} {text!r}: {word} is not a guidance {flag[2:-1]} ({error})") from error
    if not numbers:
        raise ValueError(f'{flag} is empty: give them as one word, {flag} "1.5 1.75 2.0"')
    return list(dict.fromkeys(numbers))


def table(reports: dict[tuple[float, float | None], dict[str, Any]], metric: str) -> Iterator[str]:
    """Yield the figures of each scale and power as Markdown, the best of `metric` in bold."""
    known = [setting for setting in reports if reports[setting].get(metric) is not None]
    pick = min if metric in LOWER_IS_BETTER else max
    best = pick(known, key=lambda setting: reports[setting][metric], default=None)
    powers = any(power is not None for _, power in reports)
    yield "| guidance scale | " + "power | " * powers + " | ".join(FIGURES.values()) + " |"
    yield "|---" * (len(FIGURES) + 1 + powers) + "|"
    for (scale, power), report in reports.items():
        values = ["left out" if value is None else f"{value:.4g}" for value in figures(report).values()]
        setting = f"**{scale:g}**" if (scale, power) == best else f"{scale:g}"
        yield f"| {setting} | " + f"{power} | " * powers + " | ".join(values) + " |"
    warnings = dict.fromkeys(warning for report in reports.values() for warning in report["warnings"])
    if warnings:
        yield from ("", "NOT COMPARABLE with published figures:", "")
        yield from (f"- the evaluator: {warning}" for warning in warnings)


def figures(report: dict[str, Any]) -> dict[str, float | None]:
    """Return the five figures of a report, None for one that was left out."""
    return {name: report.get(name) for name in FIGURES}


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--scales", required=True, help='guidance scales in one word: "1.5 1.75 2.0"')
    parser.add_argument("--powers", default=None, help='powers of guidance that rises by power-cosine: "1.5 2.75"')
    steps.add_judge_flags(parser)
    parser.add_argument("--metric", choices=list(FIGURES), default="fid", help="which figure is drawn")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="flags of sample_c2i_ddp.py, all behind --")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
