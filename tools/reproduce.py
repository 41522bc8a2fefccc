"""From nothing to a row of the published tables: weights, reference, 50,000 samples, the five figures, and the published
one beside them.

bash scripts/reproduce.sh --list
bash scripts/reproduce.sh c2i_L_384 --dry-run
bash scripts/reproduce.sh c2i_L_384
bash scripts/reproduce.sh vq_ds16_c2i --data-path /path/to/imagenet/val

The same command again goes on where it was ended. Any flag of the sampling script is taken in the place of the row's
own (below: default None); where that changes what is measured, the result says that it is not comparable.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoregressive.sample import sample_c2i_ddp
from evaluations.published import GRAPH, REFERENCE, REFERENCE_IMAGES, REFERENCE_URL, ROWS, Row, find_row, gpt_args
from tools.stages import (
    Stage,
    Stages,
    evaluation_stage,
    find_reference,
    local_processes,
    on_disk,
    planned_sampling,
    reconstruction_stage,
    sampling_flags,
    sampling_stage,
)
from utils.cli import PORTION, nonnegative_int, positive_int, run_script
from utils.hub import RELEASED, WEIGHTS, is_released

FIGURES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
}
# Flags that do not change what is measured: another seed draws other images of the same kind.
NEUTRAL = sample_c2i_ddp.IMMATERIAL | {"global_seed", "data_path", "dataset", "num_workers", "lpips"}
OWN = (
    "name",
    "list",
    "num_samples",
    "dry_run",
    "output",
    "reference",
    "graph",
    "data_path",
    "dataset",
    "num_workers",
    "gpu",
    "utilisation",
)

GB = 1e9
# Estimates, for --dry-run alone. The files hold float32 numbers; PNG files of photographs take about two thirds of their
# pixels' bytes; the reference has 10,000 images and their statistics; the graph is 96 MB.
BYTES_PER_PARAMETER, PNG_SHARE = 4, 0.65
REFERENCE_BYTES, GRAPH_BYTES = 2.03e9, 0.096e9
# Of the Inception network at 299 x 299, two a multiply-add.
INCEPTION_FLOPS = 11.4e9
# Shares of the peak in convolutions (assumed), and of a CPU's speed in large matrix products while it decodes GPT-B and in
# VQ-16's convolutions (measured on one core: 0.24 to 0.35, and 0.4 to 0.6).
CONVOLUTION_SHARE = 0.3
CPU_DECODING_SHARE, CPU_CONVOLUTION_SHARE = 0.3, 0.5


@dataclass(frozen=True)
class Need:
    """A file that a row takes. path: where it is, None where it is downloaded from `address` to `home`. size in bytes."""

    name: str
    path: Path | None
    size: float
    address: str
    home: str


def main(args: argparse.Namespace) -> None:
    if args.list:
        for line in table_of_rows():
            print(line)
        return
    if args.name is None:
        raise ValueError("which row? reproduce.sh --list prints their names")
    row = find_row(args.name)
    given = given_flags(args)
    check_flags(row, args, given)
    if args.dry_run:
        for line in describe_plan(row, args, given):
            print(line, flush=True)
        return
    from evaluations import metrics  # noqa: F401 - the evaluator's packages, told before hours of sampling
    from evaluations.c2i import frozen_graph  # noqa: F401

    folder = Path(args.output) / row.name
    with Stages(folder) as stages:
        report = reproduce(row, args, given, stages)
        write_result(folder, report)


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling script's flags that stand on the command line, by name."""
    found = {name: value for name, value in vars(args).items() if name not in OWN and value is not None}
    return found if args.num_samples is None else {**found, "num_fid_samples": args.num_samples}


def check_flags(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Raises ValueError or FileNotFoundError for what cannot go well, before anything is done."""
    if "sample_dir" in given:
        raise ValueError("--sample-dir is chosen here, inside --output: give --output instead")
    if given.get("npz") is False:
        raise ValueError("--no-npz leaves nothing to evaluate: leave it out")
    for flag, path in (("--reference", args.reference), ("--graph", args.graph)):
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"{flag} {path} does not exist")
    if row.gpt:
        if args.data_path is not None:
            raise ValueError(f"--data-path is for tokenizers' rows; {row.name} is compared with the reference batch")
        return
    if args.num_samples is not None or "num_fid_samples" in given:
        raise ValueError(f"{row.name} measures every image of --data-path: for fewer, give a folder of fewer")
    known = vars(script_flags(row).parse_args(words(row, args, {})))
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
    """Those of the script that makes the row's images."""
    from tokenizer.tokenizer_image import reconstruction_vq_ddp

    return sample_c2i_ddp.flags() if row.gpt else reconstruction_vq_ddp.flags()


def words(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> list[str]:
    """The row's flags for its script, with the given ones in their place."""
    flags = row.flags()
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if value is False:
            flag, value = flag.replace("--", "--no-", 1), True
        flags[flag] = "" if value is True else str(value)
    found = [word for flag, value in flags.items() for word in ([flag, value] if value else [flag])]
    return found if row.gpt else [*data_words(args), *found]


def data_words(args: argparse.Namespace) -> list[str]:
    """Where a tokenizer's images are."""
    where = args.data_path or "/path/to/imagenet/val"
    return ["--data-path", where, "--dataset", args.dataset, "--num-workers", str(args.num_workers)]


def settings_of(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> argparse.Namespace:
    """What the script reads from those flags."""
    return script_flags(row).parse_args(words(row, args, given))


def departures(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> list[str]:
    """What keeps the result from being comparable with the published figure."""
    found = []
    published, here = (vars(settings_of(row, args, flags)) for flags in ({}, given))
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


def reproduce(row: Row, args: argparse.Namespace, given: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """Runs what is not done yet and returns the report that `write_result` writes."""
    import json

    from evaluations.c2i.inception import find_graph
    from utils.runs import find_checkpoint

    device = given.get("device")
    processes = local_processes(device)
    not_comparable = departures(row, args, given)
    # What is downloaded comes first: hours of drawing should not end at a missing file.
    graph = find_graph(args.graph)
    if row.gpt:
        reference = find_reference(args.reference)
        drawing = [*words(row, args, given), "--sample-dir", str(stages.folder / "samples")]
        samples = stages.run(sampling_stage(drawing, processes))
    else:
        weights = find_checkpoint(str(given.get("vq_ckpt", row.tokenizer)))
        validation = reference_stage(row, args, given, processes)
        with Stages(Path(validation.output).parent) as shared:
            reference = shared.run(validation)
        samples = stages.run(tokenizer_stage(row, args, given, processes, weights))
    task = "generation" if row.gpt else "reconstruction"
    judged = stages.run(evaluation_stage(reference, samples, processes, graph=graph, task=task, device=device))
    evaluated = json.loads(judged.read_text())
    protocol = evaluated["protocol"]
    if row.gpt and protocol["reference"]["count"] != REFERENCE_IMAGES:
        not_comparable.append(
            f"a reference of {protocol['reference']['count']:,} images instead of {REFERENCE_IMAGES:,}"
        )
    return {
        "row": row.name,
        "system": row.system,
        "model": row.model,
        "parameters": row.parameters,
        "figures": {name: evaluated[name] for name in FIGURES},
        "published": {"fid": row.fid},
        "difference": {"fid": evaluated["fid"] - row.fid},
        "comparable": not (not_comparable or evaluated["warnings"]),
        "not_comparable_because": not_comparable,
        "warnings": evaluated["warnings"],
        "samples": protocol["samples"]["count"],
        "seconds": stages.seconds(),
        "evaluation": str(judged),
        "protocol": protocol,
    }


def reference_stage(row: Row, args: argparse.Namespace, given: dict[str, Any], processes: int) -> Stage:
    """The validation set's crops, in a folder that the tokenizers' rows share."""
    size = str(given.get("image_size_eval", row.image_size_eval))
    flags = [*data_words(args), "--image-size", size, "--sample-dir", str(Path(args.output) / f"validation_{size}")]
    for name in ("per_proc_batch_size", "device"):
        flags += ["--" + name.replace("_", "-"), str(given[name])] if name in given else []
    return reconstruction_stage("reference", flags, processes)


def tokenizer_stage(row: Row, args: argparse.Namespace, given: dict[str, Any], processes: int, weights: Path) -> Stage:
    """The same images through the tokenizer."""
    folder = Path(args.output) / row.name / "reconstructions"
    flags = words(row, args, {**given, "vq_ckpt": weights, "sample_dir": folder})
    return reconstruction_stage("reconstructions", flags, processes, weights)


def write_result(folder: Path, report: dict[str, Any]) -> None:
    """Prints the table and writes it to result.md, and everything to result.json."""
    from utils.files import atomic_write, write_json

    text = "\n".join(result_lines(report)) + "\n"
    write_json(folder / "result.json", report)
    with atomic_write(folder / "result.md") as f:
        f.write(text.encode())
    print(f"\n{text}\nwrote {folder / 'result.md'} and {folder / 'result.json'}")


def result_lines(report: dict[str, Any]) -> Iterator[str]:
    """The result as Markdown."""
    row = ROWS[report["row"]]
    yield f"# {row.name}: {row.system}, {row.model}, {row.image_size} pixels"
    yield ""
    yield "| figure | here | published | difference |"
    yield "|---|---|---|---|"
    for name, title in FIGURES.items():
        title = row.figure if name == "fid" else title
        value, published = report["figures"][name], report["published"].get(name)
        here = "left out" if value is None else f"{value:.3f}" if name in ("precision", "recall") else f"{value:.2f}"
        beside = ("", "") if published is None else (f"{published:.2f}", f"{report['difference'][name]:+.2f}")
        yield f"| {title} | {here} | {beside[0]} | {beside[1]} |"
    yield ""
    yield f"{report['samples']:,} images, evaluated as {report['evaluation']} records."
    if report["comparable"]:
        yield "Drawn and evaluated by the published protocol."
        return
    yield "NOT COMPARABLE with the published figure:"
    yield ""
    for reason in report["not_comparable_because"]:
        yield f"- {reason}"
    for warning in report["warnings"]:
        yield f"- the evaluator: {warning}"


def table_of_rows() -> Iterator[str]:
    """What --list prints."""
    yield f"{'name':<17}{'system':<10}{'model':<9}{'parameters':>14}{'pixels':>8}{'guidance':>10}{'figure':>8}{'published':>11}"
    for row in ROWS.values():
        scale = "" if row.cfg_scale is None else f"{row.cfg_scale:g}"
        yield (
            f"{row.name:<17}{row.system:<10}{row.model:<9}{row.parameters:>14,}{row.image_size:>8}{scale:>10}"
            f"{row.figure:>8}{row.fid:>11.2f}"
        )


def describe_plan(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> Iterator[str]:
    """What --dry-run prints: files, commands, disk, time. Writes and downloads nothing."""
    scale = "" if row.cfg_scale is None else f" at guidance {row.cfg_scale:g}"
    yield f"{row.name}: {row.system}, {row.model}, {row.parameters:,} parameters; published {row.figure} {row.fid:.2f}{scale}"
    reasons = departures(row, args, given)
    if reasons:
        yield "not comparable with it: " + "; ".join(reasons)
    needs = list(needed_files(row, args, given))
    yield ""
    yield "files"
    for need in needs:
        if need.path is not None:
            yield f"  {need.name:<32} at {need.path}, {need.size / GB:.2f} GB"
        else:
            yield f"  {need.name:<32} to download, about {need.size / GB:.2f} GB (estimated), {need.address}"
    folder, processes = Path(args.output) / row.name, local_processes(given.get("device"))
    found = {need.name: need.path or Path(need.home) for need in needs}
    yield ""
    yield "commands"
    for stages, stage in planned_stages(row, args, given, found, processes):
        yield f"  {stage.describe()}" + "    (done before)" * stages.is_done(stage)
    yield ""
    yield from describe_disk(row, given, needs, folder)
    yield ""
    yield from describe_time(row, args, given, processes)


def needed_files(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> Iterator[Need]:
    """The files a row takes, with what they measure or are thought to."""
    tokenizer_parameters = next(r.parameters for r in ROWS.values() if r.gpt is None and r.tokenizer == row.tokenizer)
    weights = [("gpt_ckpt", row.gpt, row.parameters)] if row.gpt else []
    for flag, released, parameters in (*weights, ("vq_ckpt", row.tokenizer, tokenizer_parameters)):
        name = str(given.get(flag, released))
        path = weights_on_disk(name)
        size = parameters * BYTES_PER_PARAMETER if path is None else path.stat().st_size
        release = RELEASED[released]
        yield Need(name, path, size, release.address, f"{WEIGHTS}/{release.home}")
    if row.gpt:
        path = Path(args.reference) if args.reference else on_disk(REFERENCE)
        size = path.stat().st_size if path else REFERENCE_BYTES
        yield Need(REFERENCE, path, size, REFERENCE_URL, f"{WEIGHTS}/{REFERENCE}")
    path = Path(args.graph) if args.graph else on_disk(GRAPH)
    address = REFERENCE_URL.replace(f"imagenet/256/{REFERENCE}", GRAPH)
    yield Need(GRAPH, path, path.stat().st_size if path else GRAPH_BYTES, address, f"{WEIGHTS}/{GRAPH}")


def weights_on_disk(name: str) -> Path | None:
    """Where weights are; None for released ones that are not on this disk. Raises FileNotFoundError for others."""
    from utils.runs import find_checkpoint

    with _offline():
        try:
            return find_checkpoint(name)
        except FileNotFoundError:
            if is_released(name):
                return None
            raise


@contextmanager
def _offline() -> Iterator[None]:
    """Has utils/hub.py look and not download, whatever the environment said when the hub's client was imported."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def planned_stages(
    row: Row, args: argparse.Namespace, given: dict[str, Any], found: dict[str, Path], processes: int
) -> Iterator[tuple[Stages, Stage]]:
    """The stages with the folders that keep their records; files that are not there yet stand in them by name."""
    stages = Stages(Path(args.output) / row.name)
    gpt, vq = (
        found.get(str(given.get(flag, name))) for flag, name in (("gpt_ckpt", row.gpt), ("vq_ckpt", row.tokenizer))
    )
    if row.gpt:
        flags = [*words(row, args, given), "--sample-dir", str(stages.folder / "samples")]
        drawing, reference = planned_sampling(flags, sampling_flags(flags), gpt, vq, processes), found[REFERENCE]
    else:
        cropping = reference_stage(row, args, given, processes)
        yield Stages(cropping.output.parent), cropping
        drawing, reference = tokenizer_stage(row, args, given, processes, vq), cropping.result
    yield stages, drawing
    task, device = "generation" if row.gpt else "reconstruction", given.get("device")
    yield stages, evaluation_stage(reference, drawing.result, processes, graph=found[GRAPH], task=task, device=device)


def describe_disk(row: Row, given: dict[str, Any], needs: list[Need], folder: Path) -> Iterator[str]:
    """What will lie on the disk, and what is free."""
    count, size = int(given.get("num_fid_samples", row.samples)), int(given.get("image_size_eval", row.image_size_eval))
    pixels = count * size**2 * 3
    images = pixels * (1 + PNG_SHARE) * (1 if row.gpt else 2)  # a tokenizer's row has its reference too
    downloads = sum(need.size for need in needs if need.path is None)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    yield "disk (estimated)"
    yield f"  images    {images / GB:8.1f} GB   {count:,} as PNG files and in one .npz" + ", twice" * (row.gpt is None)
    yield f"  downloads {downloads / GB:8.1f} GB"
    yield f"  free      {free / GB:8.1f} GB   at {existing}" + ": NOT ENOUGH" * (free < images + downloads)


def describe_time(row: Row, args: argparse.Namespace, given: dict[str, Any], processes: int) -> Iterator[str]:
    """Hours from arithmetic and assumed shares of a peak: the order of magnitude."""
    count = int(given.get("num_fid_samples", row.samples))
    yield "time (rough: an order of magnitude)"
    gpt, convolutions = flops_per_image(row, args, given)
    judged = count + (REFERENCE_IMAGES if row.gpt else count)
    total = (gpt * count, convolutions * count + INCEPTION_FLOPS * judged)
    group = int(given.get("ar_token_num") or row.flags().get("--ar-token-num", 1)) if row.gpt else 1
    speed = rates(args, given, group)
    if speed is None:
        yield "  no estimate: the peak of this accelerator is not in utils/flops.py; name a similar one with --gpu"
        return
    machine, decoding, convolving, how = speed
    seconds = (total[0] / decoding + total[1] / convolving) / processes
    if row.gpt:
        passes = "guided and unguided" if float(given.get("cfg_scale", row.cfg_scale)) > 1 else "unguided"
        yield f"  GPT        {gpt:9.3g} FLOPs an image, {passes}"
    yield f"  tokenizer  {convolutions:9.3g} FLOPs an image; Inception {INCEPTION_FLOPS:.3g}"
    yield f"  about {format_hours(seconds)} for {count:,} images on {processes} x {machine}"
    yield f"  ({how})"


def flops_per_image(row: Row, args: argparse.Namespace, given: dict[str, Any]) -> tuple[float, float]:
    """Of the GPT, with guidance twice, and of the tokenizer, for one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from autoregressive.train.flops import training_flops_per_image
    from tokenizer.tokenizer_image.vq_model import VQ_models

    size = int(given.get("image_size", row.image_size))
    vq = given.get("vq_model", RELEASED[row.tokenizer].flags["--vq-model"])
    with torch.device("meta"), FlopCounterMode(display=False) as decoding, torch.inference_mode():
        tokenizer = VQ_models[vq]()
        grid = size // tokenizer.downsample
        tokenizer.to_pixels(torch.zeros(1, grid, grid, dtype=torch.long))
    tokenizer_flops = decoding.get_total_flops()
    if row.gpt is None:
        with torch.device("meta"), FlopCounterMode(display=False) as encoding, torch.inference_mode():
            tokenizer.latents(torch.zeros(1, 3, size, size))
        return 0.0, tokenizer_flops + encoding.get_total_flops()
    settings = vars(settings_of(row, args, given))
    forward = training_flops_per_image(gpt_args(settings)) / 3  # a training step is one forward pass and two backward
    return forward * (2 if settings["cfg_scale"] > 1 else 1), tokenizer_flops


def rates(args: argparse.Namespace, given: dict[str, Any], group: int) -> tuple[str, float, float, str] | None:
    """Machine, FLOPs a second of decoding and of convolutions, and how they were found; None where no peak is known."""
    import torch

    from utils.distributed import pick_device
    from utils.flops import ACCELERATORS, find_accelerator

    device = None if args.gpu else pick_device(given.get("device"))
    if device is not None and device.type == "cpu":
        measured = matrix_speed()
        shares = f"{CPU_DECODING_SHARE:.0%} of it while decoding, {CPU_CONVOLUTION_SHARE:.0%} in convolutions"
        how = f"{measured / 1e9:.0f} GFLOPs a second in a matrix product measured just now; {shares}"
        return "CPU process", measured * CPU_DECODING_SHARE, measured * CPU_CONVOLUTION_SHARE, how
    name = args.gpu or (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    card = find_accelerator(name)
    if card is None and args.gpu:
        raise ValueError(f"--gpu {args.gpu} is not known; known are {', '.join(a.name for a in ACCELERATORS)}")
    if card is None:
        return None
    # A step that predicts several tokens reads the weights once for all of them.
    share = min(args.utilisation * group, CONVOLUTION_SHARE)
    half, single = (
        card.peak_flops("bf16") or card.peak_flops("fp16"),
        card.peak_flops("tf32") or card.peak_flops("fp32"),
    )
    how = f"assumed: {share:.0%} of the {card.name}'s peak while decoding (--utilisation), {CONVOLUTION_SHARE:.0%} in convolutions"
    return card.name, half * share, single * CONVOLUTION_SHARE, how


def matrix_speed(side: int = 1024, seconds: float = 0.5) -> float:
    """FLOPs a second of float32 matrix products on this CPU, with the threads that torch takes."""
    import time

    import torch

    a, b = torch.ones(side, side), torch.ones(side, side)
    a @ b
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        a @ b
        count += 1
    return 2 * side**3 * count / (time.perf_counter() - begin)


def format_hours(seconds: float) -> str:
    """40 minutes, 3.5 hours, 12 days."""
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 3 * 86400 else f"{seconds / 86400:.0f} days"


def flags() -> argparse.ArgumentParser:
    """The script's flags: the sampling script's, without defaults since a row has its own, and those of the chain."""
    parser = sample_c2i_ddp.flags()
    parser.description = __doc__
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([]))))
    parser.add_argument("name", nargs="?", help="the row; --list prints them")
    group = parser.add_argument_group("reproducing")
    group.add_argument("--list", action="store_true", help="print the rows")
    group.add_argument("--dry-run", action="store_true", help="print commands, downloads, disk and time; do nothing")
    group.add_argument("--output", default="results_reproduced", help="a folder of the row's name is made in here")
    group.add_argument(
        "--num-samples", type=positive_int, default=None, help="draw fewer than 50,000 (the same as --num-fid-samples)"
    )
    group.add_argument("--reference", default=None, help=f"the reference batch (default: {REFERENCE}, looked for)")
    group.add_argument("--graph", default=None, help=f"the evaluator's graph (default: {GRAPH}, looked for)")
    group.add_argument("--data-path", default=None, help="ImageNet's validation set, for the tokenizers' rows")
    group.add_argument("--dataset", default="imagenet", help="kind of --data-path, as dataset/build.py names it")
    group.add_argument("--num-workers", type=nonnegative_int, default=4, help="loader processes for --data-path")
    group.add_argument(
        "--gpu", default=None, help="--dry-run: estimate for this accelerator, as utils/flops.py names it"
    )
    group.add_argument(
        "--utilisation",
        type=PORTION,
        default=0.03,
        help="--dry-run: share of the peak assumed while decoding token by token",
    )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
