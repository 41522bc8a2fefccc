"""Flags, warnings and files that both evaluators share.

report = Report(output_path, strict=True)                 # raises where it could not be written
report.warn(["140 samples; published figures are of 50,000"])
report.write({"fid": 2.1}, {"fid": "FID"}, protocol)      # to .txt and .json
"""

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import add_reading_flags, add_store_true
from utils.files import atomic_write, write_json

# Folders of a text-to-image reference: COCO's, and what --ref_type says where the folder is the reference itself.
COCO, ANY_TYPE = "val2014", "train/valid/test"

if TYPE_CHECKING:
    from evaluations.c2i.inception import Inception
    from evaluations.image_sets import ImageSet
    from utils.distributed import Distributed


class Report:
    """The two files of an evaluation, its warnings, and its seconds so far.

    Raises OSError where the files could not be written: before the work and not after it.
    """

    def __init__(self, output: str, strict: bool):
        self.output, self.strict, self.warnings = output, strict, []
        self.begin = time.perf_counter()
        another = f"the reports {output}.txt and .json cannot be written there: give another place by --output"
        for file in (f"{output}.txt", f"{output}.json"):
            if os.path.isdir(file):
                raise IsADirectoryError(f"{file} is a folder; {another}")
        folder = next(parent for parent in Path(output).absolute().parents if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder; {another}")
        if not os.access(folder, os.W_OK):
            raise PermissionError(another)

    def warn(self, found: Iterable[str], late: bool = False) -> None:
        """Add warnings; with --strict they are an error. late: the figures are written already."""
        found = list(found)
        self.warnings += [] if late else found
        if found and self.strict:
            text = "; ".join(f"({number}) {warning}" for number, warning in enumerate(found, start=1))
            raise ValueError(f"--strict: {text}" + f" (the figures are in {self.output}.json)" * late)

    def print_inputs(self, lines: Iterable[str]) -> None:
        """Print what is compared, and the warnings: before hours are spent is a good time to know."""
        for line in (*lines, *(f"warning: {warning}" for warning in self.warnings)):
            print(line, flush=True)

    def write(self, figures: dict[str, float | None], titles: dict[str, str], protocol: dict[str, Any]) -> None:
        """Print the figures, write them as published to .txt, and with the protocol to .json."""
        lines = [f"{title}: {figures[key]}" for key, title in titles.items() if figures.get(key) is not None]
        print("\n".join([f"warning: {warning}" for warning in self.warnings] + lines))
        with atomic_write(f"{self.output}.txt") as f:
            f.write(("\n".join(lines) + "\n").encode())
        seconds = round(time.perf_counter() - self.begin, 1)
        entries = {**figures, "warnings": self.warnings, "protocol": protocol, "seconds": seconds}
        write_json(f"{self.output}.json", entries)
        print(f"wrote {self.output}.txt and {self.output}.json")


def open_backend(args: argparse.Namespace, dist: "Distributed") -> "Inception":
    """Return the Inception graph, run by what --backend names."""
    from evaluations.c2i.inception import TensorFlowInception, TorchInception
    from evaluations.published import GRAPH, find_file

    path = find_file(GRAPH, args.graph)
    return TensorFlowInception(path) if args.backend == "tensorflow" else TorchInception(path, dist.device)


def require_same_graph(images: "ImageSet", backend: "Inception") -> None:
    """Raise ValueError where recorded statistics are of another network's features."""
    dim = len(images.statistics[0].mean) if images.statistics else backend.pool_dim
    if dim != backend.pool_dim:
        what = f"{images.path} has statistics of {dim} features and the graph {backend.path} makes {backend.pool_dim}"
        raise ValueError(f"{what}: they were recorded with another graph")


def describe_run(backend: "Inception | None", dist: "Distributed", *packages: str) -> dict[str, Any]:
    """Return what figures may depend on besides the images, JSON values."""
    from importlib.metadata import version
    from platform import python_version

    versions = {"python": python_version()} | {name: version(name) for name in ("numpy", "scipy", "torch", *packages)}
    made = {"device": str(dist.device), "processes": dist.world_size, "versions": versions}
    if backend:
        made["graph"] = {"path": str(backend.path), "sha256": backend.sha256}
        made |= {"backend": backend.name, "device": backend.device, "versions": versions | backend.versions}
    return made


def sample_settings(folder: str | Path) -> dict | None:
    """Return the flags that a sampling script recorded, where the folder of its images is still there."""
    try:
        return json.loads((Path(folder) / "settings.json").read_text())
    except (OSError, ValueError):
        return None


def add_evaluation_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the flags that both evaluators have. default: where the reports go without --output."""
    help = "what runs the Inception graph; tensorflow is the reference, torch agrees with it to 1e-5 of the largest feature"
    parser.add_argument("--backend", choices=["torch", "tensorflow"], default="torch", help=help)
    help = "classify_image_graph_def.pb (default: in the working directory or pretrained_models/, else downloaded)"
    parser.add_argument("--graph", default=None, help=help)
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--output", default=None, help=f"path of the reports, without .txt (default: {default})")
    add_store_true(parser, "--strict", "what makes figures incomparable is an error, not a warning")
    add_reading_flags(parser)
