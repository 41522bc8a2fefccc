"""From nothing to a row of the published tables: weights, reference, 50,000 samples, the five figures, and the published
one beside them.

    bash scripts/reproduce.sh --list
    bash scripts/reproduce.sh c2i_L_384 --dry-run
    bash scripts/reproduce.sh c2i_L_384
    bash scripts/reproduce.sh vq_ds16_c2i --data-path /path/to/imagenet/val

The same command again does what is missing. Any flag of the sampling script replaces the row's own (below: default None);
where that changes what is measured, the result says that it is not comparable.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoregressive.sample import sample_c2i_ddp
from evaluations.published import (
    BYTES,
    FIGURES,
    GRAPH,
    REFERENCE,
    REFERENCE_IMAGES,
    ROWS,
    URLS,
    Row,
    find_file,
    find_row,
    gpt_args,
    on_disk,
)
from tools import steps
from utils.cli import PORTION, nonnegative_int, positive_int, run_script
from utils.hub import RELEASED, WEIGHTS, is_released

OWN = {"name", "list", "num_samples", "dry_run", "output", "reference", "graph", "gpu", "utilisation"}
DATA = {"data_path", "dataset", "num_workers"}
# Flags that do not change what is measured: another seed draws other images of the same kind.
NEUTRAL = sample_c2i_ddp.IMMATERIAL | DATA | {"global_seed", "lpips"}
# Estimates of --dry-run: bytes of a parameter, the share of its pixels' bytes that a PNG of a photograph takes, and the
# share of the peak that convolutions reach.
BYTES_PER_PARAMETER, PNG_SHARE, CONVOLUTION_SHARE, GB = 4, 0.65, 0.3, 1e9


def main(args: argparse.Namespace) -> None:
    if args.list:
        print("\n".join(table_of_rows()))
        return
    if args.name is None:
        raise ValueError("which row? reproduce.sh --list prints their names")
    row = find_row(args.name)
    given = given_flags(args)
    check_flags(row, args, given)
    if args.dry_run:
        print("\n".join(describe_plan(row, args, given)))
        return
    steps.require_evaluator()
    graph, processes = find_file(GRAPH, args.graph), steps.local_processes(args.device)
    reference = find_file(REFERENCE, args.reference) if row.gpt else None
    made = commands(row, args, given)
    for script, flags, _ in made:
        steps.run(script, flags, processes)
    *cropped, samples = (steps.newest(folder) for _, _, folder in made)
    report = steps.evaluate(
        reference or cropped[0], samples, processes, graph=graph, task=task_of(row), device=args.device
    )
    write_result(Path(args.output) / row.name, result_of(row, departures(row, args, given), report))


def task_of(row: Row) -> str:
    """Return the evaluator's --task."""
    return "generation" if row.gpt else "reconstruction"


def commands(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> list[tuple[str, list[str], Path]]:
    """Return the scripts that make a row's images, their flags, and the folders in which they leave an .npz.

    Tokenizers' rows share the folder of cropped validation images, which is their reference.
    """
    folder = Path(args.output) / row.name
    if row.gpt:
        made = [(steps.SAMPLER, words(row, given), folder / "samples")]
    else:
        size = given.get("image_size_eval", row.image_size_eval)
        taken = {name: value for name, value in given.items() if name in DATA | {"per_proc_batch_size", "device"}}
        flags = {"data_path": "/path/to/imagenet/val", **taken, "image_size": size}
        cropping = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
        made = [
            (steps.VALIDATION, cropping, Path(args.output) / f"validation_{size}"),
            (steps.RECONSTRUCTOR, words(row, given), folder / "reconstructions"),
        ]
    return [(script, [*flags, "--sample-dir", str(place)], place) for script, flags, place in made]


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the scripts' flags that stand on the command line, by name."""
    found = {name: value for name, value in vars(args).items() if name not in OWN and value is not None}
    return found if args.num_samples is None else {**found, "num_fid_samples": args.num_samples}


def check_flags(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Raises ValueError or FileNotFoundError for what cannot go well, before anything is done."""
    from utils.distributed import pick_device

    if "sample_dir" in given:
        raise ValueError("--sample-dir is chosen here, inside --output: give --output instead")
    if args.device is not None:
        pick_device(args.device)
    for path in filter(None, (args.reference, args.graph)):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} does not exist: give another --reference or --graph, or none")
    for name in ("gpt_ckpt", "vq_ckpt"):
        weights_on_disk(str(given.get(name, row.tokenizer)))
    if row.gpt:
        if args.data_path is not None:
            raise ValueError(f"--data-path is for tokenizers' rows; {row.name} is compared with the reference batch")
        steps.sampling_args(words(row, given))
        return
    if "num_fid_samples" in given:
        raise ValueError(f"{row.name} measures every image of --data-path: for fewer, give a folder of fewer")
    known = vars(script_flags(row).parse_args(words(row, {"data_path": "."})))
    wrong = [f"--{name.replace('_', '-')}" for name in given if name not in known] + ["--reference"] * bool(
        args.reference
    )
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not for {row.name}, a tokenizer's row")
    if args.data_path is None and not args.dry_run:
        raise ValueError(f"{row.name} reconstructs ImageNet's validation set: give --data-path /path/to/imagenet/val")
    if args.data_path is not None and not Path(args.data_path).is_dir():
        raise FileNotFoundError(f"--data-path {args.data_path} is not a folder")


def script_flags(row: Row) -> argparse.ArgumentParser:
    """Return the parser of the script that makes the row's images."""
    from tokenizer.tokenizer_image import reconstruction_vq_ddp

    return sample_c2i_ddp.flags() if row.gpt else reconstruction_vq_ddp.flags()


def words(row: Row, given: dict[str, Any]) -> list[str]:
    """Return the row's flags for its script, the given ones in place of its own."""
    flags = row.flags() if row.gpt else {"--data-path": "/path/to/imagenet/val", **row.flags()}
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if value is False:
            flag, value = flag.replace("--", "--no-", 1), True
        flags[flag] = "" if value is True else str(value)
    return [word for flag, value in flags.items() for word in ([flag, value] if value else [flag])]


def departures(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> list[str]:
    """Return what keeps the result from being comparable with the published figure."""
    parser, found = script_flags(row), []
    published, here = (vars(parser.parse_args(words(row, flags))) for flags in ({}, given))
    if row.gpt and here["num_fid_samples"] != row.samples:
        found.append(f"{here['num_fid_samples']:,} samples instead of {row.samples:,}")
    for name, value in published.items():
        if name not in NEUTRAL and value != here[name]:
            found.append(f"--{name.replace('_', '-')} {here[name]} instead of {value}")
    for flag, released in (("gpt_ckpt", row.gpt), ("vq_ckpt", row.tokenizer)):
        if flag in given and Path(given[flag]).name != RELEASED[released].filename:
            found.append(f"the weights {given[flag]} instead of {RELEASED[released].filename}")
    if args.reference is not None and Path(args.reference).name != REFERENCE:
        found.append(f"the reference {args.reference} instead of {REFERENCE}")
    return found


def result_of(row: Row, reasons: list[str], report: dict[str, Any]) -> dict[str, Any]:
    """Return what result.json holds: the figures beside the published one, and whether they are comparable."""
    protocol = report["protocol"]
    if row.gpt and protocol["reference"]["count"] != REFERENCE_IMAGES:
        reasons = [
            *reasons,
            f"a reference of {protocol['reference']['count']:,} images instead of {REFERENCE_IMAGES:,}",
        ]
    return {
        "row": row.name,
        "system": row.system,
        "model": row.model,
        "parameters": row.parameters,
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


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Prints the table and writes it to result.md, and everything to result.json."""
    from utils.files import atomic_write, write_json

    text = "\n".join(result_lines(result)) + "\n"
    write_json(folder / "result.json", result)
    with atomic_write(folder / "result.md") as f:
        f.write(text.encode())
    print(f"\n{text}\nwrote {folder / 'result.md'} and {folder / 'result.json'}")


def result_lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the result as Markdown."""
    row = ROWS[result["row"]]
    yield from (f"# {row.name}: {row.system}, {row.model}, {row.image_size} pixels", "")
    yield from ("| figure | here | published | difference |", "|---|---|---|---|")
    for name, title in FIGURES.items():
        title = row.figure if name == "fid" else title
        value, published = result["figures"][name], result["published"].get(name)
        here = "left out" if value is None else f"{value:.3f}" if name in ("precision", "recall") else f"{value:.2f}"
        beside = ("", "") if published is None else (f"{published:.2f}", f"{result['difference'][name]:+.2f}")
        yield f"| {title} | {here} | {beside[0]} | {beside[1]} |"
    yield from ("", f"{result['samples']:,} images, evaluated as {result['evaluation']} records.")
    if result["comparable"]:
        yield "Drawn and evaluated by the published protocol."
        return
    yield from ("NOT COMPARABLE with the published figure:", "")
    yield from (f"- {reason}" for reason in result["not_comparable_because"])
    yield from (f"- the evaluator: {warning}" for warning in result["warnings"])


def table_of_rows() -> Iterator[str]:
    """Yield what --list prints."""
    yield f"{'name':<17}{'system':<10}{'model':<9}{'parameters':>14}{'pixels':>8}{'guidance':>10}{'figure':>8}{'published':>11}"
    for row in ROWS.values():
        scale = "" if row.cfg_scale is None else f"{row.cfg_scale:g}"
        yield (
            f"{row.name:<17}{row.system:<10}{row.model:<9}{row.parameters:>14,}{row.image_size:>8}{scale:>10}"
            f"{row.figure:>8}{row.fid:>11.2f}"
        )


def describe_plan(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> Iterator[str]:
    """Yield what --dry-run prints: files, commands, disk, time. Writes and downloads nothing."""
    scale = "" if row.cfg_scale is None else f" at guidance {row.cfg_scale:g}"
    yield f"{row.name}: {row.system}, {row.model}, {row.parameters:,} parameters; published {row.figure} {row.fid:.2f}{scale}"
    reasons = departures(row, args, given)
    if reasons:
        yield "not comparable with it: " + "; ".join(reasons)
    found, downloads = {}, 0.0
    yield from ("", "files")
    for name, path, home, size, address in needed_files(row, args, given):
        found[name], downloads = path or Path(home), downloads + size * (path is None)
        where = (
            f"at {path}, {size / GB:.2f} GB"
            if path
            else f"to download, about {size / GB:.2f} GB (estimated), {address}"
        )
        yield f"  {name:<32} {where}"
    folder, processes = Path(args.output) / row.name, steps.local_processes(args.device)
    yield from ("", "commands")
    made = commands(row, args, given)
    for script, flags, _ in made:
        yield "  " + steps.describe(script, flags, processes)
    *cropped, samples = (place / "*.npz" for _, _, place in made)
    judging = steps.evaluation_words(
        found[REFERENCE] if row.gpt else cropped[0], samples, found[GRAPH], task_of(row), args.device
    )
    yield "  " + steps.describe(steps.EVALUATOR, judging, processes)
    count, size = given.get("num_fid_samples", row.samples), given.get("image_size_eval", row.image_size_eval)
    images = count * size**2 * 3 * (1 + PNG_SHARE) * (1 if row.gpt else 2)  # a tokenizer's row has its reference too
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    yield from ("", "disk (estimated)")
    yield f"  images    {images / GB:8.1f} GB   {count:,} as PNG files and in one .npz" + ", twice" * (row.gpt is None)
    yield f"  downloads {downloads / GB:8.1f} GB"
    yield f"  free      {free / GB:8.1f} GB   at {existing}" + ": NOT ENOUGH" * (free < images + downloads)
    yield from ("", "time (rough: an order of magnitude)", f"  {describe_time(row, args, given, count, processes)}")


def needed_files(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> Iterator[tuple]:
    """Yield name, path (None where it is downloaded), where a download goes, bytes, address of the files of a row."""
    tokenizer_parameters = next(r.parameters for r in ROWS.values() if r.gpt is None and r.tokenizer == row.tokenizer)
    weights = [("gpt_ckpt", row.gpt, row.parameters)] if row.gpt else []
    for flag, released, parameters in (*weights, ("vq_ckpt", row.tokenizer, tokenizer_parameters)):
        name, release = str(given.get(flag, released)), RELEASED[released]
        path = weights_on_disk(name)
        size = path.stat().st_size if path else parameters * BYTES_PER_PARAMETER
        yield name, path, f"{WEIGHTS}/{release.home}", size, release.address
    for name, asked in ((REFERENCE, args.reference), (GRAPH, args.graph)):
        if name == GRAPH or row.gpt:
            path = Path(asked) if asked else on_disk(name)
            yield name, path, f"{WEIGHTS}/{name}", path.stat().st_size if path else BYTES[name], URLS[name]


def weights_on_disk(name: str) -> Path | None:
    """Return where weights are; None for released ones that are not here. Raises FileNotFoundError for others."""
    from unittest.mock import patch

    from utils.runs import find_checkpoint

    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):  # look and do not download
        try:
            return find_checkpoint(name)
        except FileNotFoundError:
            if is_released(name):
                return None
            raise


def describe_time(row: Row, args: argparse.Namespace, given: dict[str, Any], count: int, processes: int) -> str:
    """Return the hours that arithmetic and assumed shares of an accelerator's peak give."""
    import torch

    from utils.flops import find_accelerator, require_accelerator

    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    card = require_accelerator(args.gpu) if args.gpu else find_accelerator(here)
    if card is None:
        return "no estimate without a known accelerator: name one by --gpu"
    gpt, convolutions = flops_per_image(row, given)
    # A step that predicts several tokens reads the weights once for all of them.
    group = int(row.flags().get("--ar-token-num", 1))
    share = min(args.utilisation * group, CONVOLUTION_SHARE)
    half, single = (
        card.peak_flops("bf16") or card.peak_flops("fp16"),
        card.peak_flops("tf32") or card.peak_flops("fp32"),
    )
    seconds = count * (gpt / (half * share) + convolutions / (single * CONVOLUTION_SHARE)) / processes
    return (
        f"about {format_hours(seconds)} for {count:,} images on {processes} x {card.name}, at {share:.0%} of the peak while "
        f"decoding (--utilisation) and {CONVOLUTION_SHARE:.0%} in convolutions (assumed)"
    )


def flops_per_image(row: Row, given: dict[str, Any]) -> tuple[float, float]:
    """Return the FLOPs of an image in the GPT, with guidance twice, and in the tokenizer."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from autoregressive.train.flops import training_flops_per_image
    from tokenizer.tokenizer_image.vq_model import VQ_models

    settings = vars(script_flags(row).parse_args(words(row, given)))
    size = settings["image_size"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        tokenizer = VQ_models[settings["vq_model"] or row.model]()
        grid = size // tokenizer.downsample
        tokenizer.to_pixels(torch.zeros(1, grid, grid, dtype=torch.long))
        if row.gpt is None:
            tokenizer.latents(torch.zeros(1, 3, size, size))
    if row.gpt is None:
        return 0.0, counter.get_total_flops()
    forward = training_flops_per_image(gpt_args(settings)) / 3  # a training step is one forward pass and two backward
    return forward * (2 if settings["cfg_scale"] > 1 else 1), counter.get_total_flops()


def format_hours(seconds: float) -> str:
    """Return 40 minutes, 3.5 hours, 12 days."""
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 3 * 86400 else f"{seconds / 86400:.0f} days"


def flags() -> argparse.ArgumentParser:
    """Return the script's flags: the sampling script's, without defaults since a row has its own, and those here."""
    parser = sample_c2i_ddp.flags()
    parser.description = __doc__
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([]))))
    parser.add_argument("name", nargs="?", help="the row; --list prints them")
    group = parser.add_argument_group("reproducing")
    group.add_argument("--list", action="store_true", help="print the rows")
    group.add_argument("--dry-run", action="store_true", help="print commands, downloads, disk and time; do nothing")
    group.add_argument("--output", default="results_reproduced", help="a folder of the row's name is made in here")
    group.add_argument("--num-samples", type=positive_int, default=None, help="the same as --num-fid-samples")
    steps.add_judge_flags(group)
    group.add_argument("--data-path", default=None, help="ImageNet's validation set, for the tokenizers' rows")
    group.add_argument("--dataset", default=None, help="kind of --data-path, as dataset/build.py names it")
    group.add_argument("--num-workers", type=nonnegative_int, default=None, help="loader processes for --data-path")
    group.add_argument("--gpu", default=None, help="--dry-run: estimate for this accelerator of utils/flops.py")
    group.add_argument(
        "--utilisation", type=PORTION, default=0.03, help="--dry-run: share of the peak while decoding token by token"
    )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
