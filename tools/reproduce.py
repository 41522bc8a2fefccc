"""A row of the published tables from nothing: weights, reference, 50,000 samples, the five figures, and the published
one beside them.

    bash scripts/reproduce.sh --list
    bash scripts/reproduce.sh c2i_L_384 --dry-run
    bash scripts/reproduce.sh c2i_L_384
    bash scripts/reproduce.sh vq_ds16_c2i --data-path /path/to/imagenet/val

Rerun a command to resume it. Flags that are not listed below go to the row's script (sample_c2i_ddp.py, for tokenizers
reconstruction_vq_ddp.py) and replace the row's own; where one changes what is measured, the result says that it is not
comparable.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluations.published import BYTES, FIGURES, GRAPH, REFERENCE_IMAGES, ROWS, URLS, Row, find_file, find_row, on_disk
from tools import steps
from tools.stages import newest_file
from utils.cli import flag_parser, nonnegative_int, positive_int, run_script
from utils.files import atomic_write, write_json
from utils.hub import RELEASED, WEIGHTS

# Flags of the scripts that do not change what is measured: another seed draws other images of the same kind.
NEUTRAL = {"--global-seed", "--lpips", "--device", "--per-proc-batch-size", "--compile", "--no-compile", "--from-fsdp"}
# Of an estimate: the share of its pixels' bytes that a PNG of a photograph takes, and the share of an accelerator's peak
# that decoding one token a step reaches.
PNG_SHARE, UTILISATION, GB = 0.65, 0.03, 1e9


def main(args: argparse.Namespace) -> None:
    if args.list:
        print("\n".join(table_of_rows()))
        return
    if args.name is None:
        raise ValueError("which row? reproduce.sh --list prints their names")
    row, given = find_row(args.name), steps.given_flags(args.rest)
    if args.num_samples:
        given["--num-fid-samples"] = str(args.num_samples)
    check_flags(row, args, given)
    commands, processes = commands_of(row, args, given), steps.local_processes(given.get("--device"))
    if args.dry_run:
        print("\n".join(describe_plan(row, args, given, commands, processes)))
        return
    steps.require_evaluator()
    graph = find_file(GRAPH, args.graph)
    reference = find_file(row.reference, args.reference) if row.gpt else None
    for script, words, _ in commands:
        steps.run(script, words, processes)
    samples, *cropped = (newest_file(folder, "*.npz") for *_, folder in commands)
    report = steps.evaluate(
        reference or cropped[0], samples, processes, graph=graph, task=row.task, device=given.get("--device")
    )
    folder, result = Path(args.output) / row.name, result_of(row, departures(row, args, given), report)
    text = "\n".join(result_lines(row, result)) + "\n"
    write_json(folder / "result.json", result)
    with atomic_write(folder / "result.md") as f:
        f.write(text.encode())
    print(f"\n{text}\nwrote {folder / 'result.md'} and {folder / 'result.json'}")


def check_flags(row: Row, args: argparse.Namespace, given: dict[str, str]) -> None:
    """Raise ValueError or FileNotFoundError for what cannot go well."""
    if "--sample-dir" in given:
        raise ValueError("--sample-dir is chosen here, inside --output: give --output instead")
    for path in filter(None, (args.reference, args.graph)):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} does not exist: give another --reference or --graph, or none")
    if row.gpt:
        if args.data_path is not None:
            raise ValueError(f"--data-path is for tokenizers' rows; {row.name} is compared with the reference batch")
        return
    if args.reference or "--num-fid-samples" in given:
        raise ValueError(f"{row.name} compares every image of --data-path with itself: give a folder of fewer")
    if not args.dry_run and not (args.data_path and Path(args.data_path).is_dir()):
        raise ValueError(f"{row.name} reconstructs ImageNet's validation set: give --data-path /path/to/imagenet/val")


def commands_of(row: Row, args: argparse.Namespace, given: dict[str, str]) -> list[tuple[str, list[str], Path]]:
    """Return the scripts that make a row's images, their flags, and the folders in which they leave an .npz.

    The second script of a tokenizer's row crops the validation images, which are its reference.
    """
    folder, words = Path(args.output) / row.name, as_words(row.flags() | given)
    if row.gpt:
        return [(steps.SAMPLER, [*words, "--sample-dir", str(folder / "samples")], folder / "samples")]
    asked = {"--data-path": args.data_path or "/path/to/imagenet/val", "--dataset": args.dataset}
    asked |= {"--num-workers": args.num_workers}
    data = as_words({flag: str(value) for flag, value in asked.items() if value is not None})
    size = given.get("--image-size-eval", str(row.image_size_eval))
    shared = as_words({flag: given[flag] for flag in ("--per-proc-batch-size", "--device") if flag in given})
    made, cropped = folder / "reconstructions", Path(args.output) / f"validation_{size}"
    cropping = [*data, *shared, "--image-size", size, "--sample-dir", str(cropped)]
    return [
        (steps.RECONSTRUCTOR, [*data, *words, "--sample-dir", str(made)], made),
        (steps.VALIDATION, cropping, cropped),
    ]


def as_words(flags: dict[str, str]) -> list[str]:
    """Return flags as words of a command line; a switch has an empty value."""
    return [word for flag, value in flags.items() for word in (flag, *value.split())]


def departures(row: Row, args: argparse.Namespace, given: dict[str, str]) -> list[str]:
    """Return what keeps the result from being comparable with the published figure."""
    found, own = [], row.flags()
    for flag, value in given.items():
        if flag in ("--gpt-ckpt", "--vq-ckpt"):
            released = RELEASED[row.tokenizer if flag == "--vq-ckpt" else row.gpt or row.tokenizer].filename
            if Path(value).name != Path(released).name:
                found.append(f"the weights {value} instead of {released}")
        elif flag not in NEUTRAL and not same_value(value, own.get(flag)):
            found.append(f"{flag} {value} instead of {own.get(flag, 'none')}")
    if args.reference is not None and Path(args.reference).name != row.reference:
        found.append(f"the reference {args.reference} instead of {row.reference}")
    return found


def same_value(given: str, own: str | None) -> bool:
    """Tell whether two values of a flag are equal, as numbers where they are some."""
    try:
        return own is not None and float(given) == float(own)
    except ValueError:
        return given == own


def result_of(row: Row, reasons: list[str], report: dict[str, Any]) -> dict[str, Any]:
    """Return what result.json holds: the figures beside the published one, and whether they are comparable."""
    protocol = report["protocol"]
    count = protocol["reference"]["count"]
    if row.gpt and count != REFERENCE_IMAGES:
        reasons = [*reasons, f"a reference of {count:,} images instead of {REFERENCE_IMAGES:,}"]
    return {
        **{name: getattr(row, name) for name in ("system", "model", "parameters")},
        "row": row.name,
        "figures": {name: report[name] for name in FIGURES},
        "published": {"fid": row.fid},
        "difference": {"fid": report["fid"] - row.fid},
        "comparable": not (reasons or report["warnings"]),
        "not_comparable_because": reasons,
        "warnings": report["warnings"],
        "samples": protocol["samples"]["count"],
        "evaluation": report["path"],
        "protocol": protocol,
    }


def result_lines(row: Row, result: dict[str, Any]) -> Iterator[str]:
    """Yield the result as Markdown."""
    yield from (f"# {row.name}: {row.system}, {row.model}, {row.image_size} pixels", "")
    yield from ("| figure | here | published | difference |", "|---|---|---|---|")
    for name, title in FIGURES.items():
        value, digits = result["figures"][name], 3 if name in ("precision", "recall") else 2
        here = "left out" if value is None else f"{value:.{digits}f}"
        published = f"{row.fid:.2f} | {result['difference']['fid']:+.2f}" if name == "fid" else " | "
        yield f"| {row.figure if name == 'fid' else title} | {here} | {published} |"
    yield from ("", f"{result['samples']:,} images, evaluated as {result['evaluation']} records.")
    if result["comparable"]:
        yield "Drawn and evaluated by the published protocol."
        return
    yield from ("NOT COMPARABLE with the published figure:", "")
    yield from (f"- {reason}" for reason in result["not_comparable_because"])


def table_of_rows() -> Iterator[str]:
    """Yield what --list prints."""
    yield f"{'name':<21}{'system':<14}{'model':<15}{'parameters':>14}{'pixels':>8}{'guidance':>10}{'figure':>8}{'published':>11}"
    for row in ROWS.values():
        scale = "" if row.cfg_scale is None else f"{row.cfg_scale:g}"
        yield (
            f"{row.name:<21}{row.system:<14}{row.model:<15}{row.parameters:>14,}{row.image_size:>8}{scale:>10}"
            f"{row.figure:>8}{row.fid:>11.2f}"
        )


def describe_plan(
    row: Row,
    args: argparse.Namespace,
    given: dict[str, str],
    commands: list[tuple[str, list[str], Path]],
    processes: int,
) -> Iterator[str]:
    """Yield what --dry-run prints: files, commands, disk, time. Writes and downloads nothing."""
    scale = "" if row.cfg_scale is None else f" at guidance {row.cfg_scale:g}"
    yield f"{row.name}: {row.system}, {row.model}, {row.parameters:,} parameters; published {row.figure} {row.fid:.2f}{scale}"
    reasons = departures(row, args, given)
    if reasons:
        yield "not comparable with it: " + "; ".join(reasons)
    yield from ("", "files that are not here yet and are downloaded")
    judged_by = [(row.reference, args.reference)] * bool(row.gpt) + [(GRAPH, args.graph)]
    files = {name: (given_path or on_disk(name), BYTES[name], URLS[name]) for name, given_path in judged_by}
    for flag, name in (("--gpt-ckpt", row.gpt), ("--vq-ckpt", row.tokenizer)):
        if name and flag not in given:
            release = RELEASED[name]
            parameters = row.parameters if name == (row.gpt or row.tokenizer) else 72e6
            files[name] = on_disk(release.home, release.name), 4 * parameters, release.address
    absent = {name: found for name, found in files.items() if found[0] is None}
    for name, (_, size, address) in absent.items():
        yield f"  {name:<32} about {size / GB:.2f} GB, {address}"
    yield from ("", "commands")
    for script, words, _ in commands:
        yield "  " + steps.describe(script, words, processes)
    samples, *cropped = (folder / "*.npz" for *_, folder in commands)
    reference, graph = (
        Path(files[name][0] or Path(WEIGHTS, name)) if name in files else None for name in (row.reference, GRAPH)
    )
    judging = steps.evaluation_words(reference or cropped[0], samples, graph, row.task, given.get("--device"))
    yield "  " + steps.describe(steps.EVALUATOR, judging, processes)
    count = int(given.get("--num-fid-samples", row.samples))
    images = count * row.image_size_eval**2 * 3 * (1 + PNG_SHARE) * len(commands)
    needed = images + sum(size for _, size, _ in absent.values())
    free = shutil.disk_usage(Path.cwd()).free
    yield from ("", f"disk: {needed / GB:.1f} GB (estimated), {images / GB:.1f} of them for {count:,} images")
    yield f"  free {free / GB:.1f} GB" + ": NOT ENOUGH" * (free < needed)
    if row.gpt:
        yield describe_time(row, args.gpu, count, processes)


def describe_time(row: Row, gpu: str | None, count: int, processes: int) -> str:
    """Return the hours that arithmetic and an assumed share of an accelerator's peak give."""
    from autoregressive.models.layouts import build_layout
    from utils.flops import require_accelerator

    if gpu is None:
        return "time: name an accelerator by --gpu for an estimate"
    flags, side = row.flags(), row.image_size // 16
    layout: dict[str, Any] = {"name": flags.get("--layout", "raster")}
    if "--ar-token-num" in flags:
        layout = {"name": "parallel", "group_size": int(flags["--ar-token-num"])}
    tokens, passes = side**2, int(flags.get("--steps") or len(build_layout(layout, side).groups))
    # Two FLOPs a weight and token, with guidance twice; a step of several tokens reads the weights once for all of them.
    card, flops = require_accelerator(gpu), 2 * (1 if row.cfg_scale == 1 else 2) * row.parameters * tokens
    peak = card.peak_flops("bf16") or card.peak_flops("fp16")
    used = UTILISATION * tokens / passes
    hours = count * flops / (peak * used * processes) / 3600
    share = f"{used:.0%} of the peak (assumed)"
    return f"time: about {hours:.1f} hours of decoding on {processes} x {card.name} at {share}, an order of magnitude"


def flags() -> argparse.ArgumentParser:
    """Return the script's flags; those of the row's script are left in `rest`."""
    parser = flag_parser(__doc__, rest=True)
    parser.add_argument("name", nargs="?", help="the row; --list prints them")
    parser.add_argument("--list", action="store_true", help="print the rows")
    parser.add_argument("--dry-run", action="store_true", help="print commands, downloads, disk and time; do nothing")
    parser.add_argument("--output", default="results_reproduced", help="a folder of the row's name is made in here")
    parser.add_argument("--num-samples", type=positive_int, default=None, help="the same as --num-fid-samples")
    steps.add_judge_flags(parser)
    parser.add_argument("--data-path", default=None, help="ImageNet's validation set, for the tokenizers' rows")
    parser.add_argument("--dataset", default=None, help="kind of --data-path, as dataset/image_build.py names it")
    parser.add_argument("--num-workers", type=nonnegative_int, default=None, help="loader processes for --data-path")
    parser.add_argument("--gpu", default=None, help="--dry-run: estimate for this accelerator of utils/flops.py")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
