"""Flags, warnings and files that both evaluators share.

report = Report(output_path, strict=True)                 # raises where it could not be written
report.warn(["140 samples; published figures are of 50,000"])
report.write({"fid": 2.1}, {"fid": "FID"}, protocol)      # to .txt and .json
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import add_reading_flags

if TYPE_CHECKING:
    from evaluations.c2i.inception import TensorFlowInception, TorchInception
    from utils.distributed import Distributed

    Inception = TorchInception | TensorFlowInception


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
        folder = Path(output).absolute().parent
        while not folder.exists():  # the folders that are missing are made below the first that is there
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is no folder; {another}")
        if not os.access(folder, os.W_OK):
            raise PermissionError(another)

    def warn(self, found: Iterable[str], late: bool = False) -> None:
        """Adds warnings; with --strict they are an error. late: the figures are written already."""
        found = list(found)
        self.warnings += [] if late else found
        if found and self.strict:
            text = "; ".join(f"({number}) {warning}" for number, warning in enumerate(found, start=1))
            raise ValueError(f"--strict: {text}" + f" (the figures are in {self.output}.json)" * late)

    def print_inputs(self, lines: Iterable[str]) -> None:
        """Prints what is compared, and the warnings: before hours are spent is a good time to know."""
        for line in (*lines, *(f"warning: {warning}" for warning in self.warnings)):
            print(line, flush=True)

    def write(self, figures: dict[str, float | None], titles: dict[str, str], protocol: dict[str, Any]) -> None:
        """Prints the figures, writes them as published to .txt, and with the protocol to .json."""
        from utils.files import atomic_write, write_json

        seconds = round(time.perf_counter() - self.begin, 1)
        lines = [f"{title}: {figures[key]}" for key, title in titles.items() if figures.get(key) is not None]
        print("\n".join([f"warning: {warning}" for warning in self.warnings] + lines))
        with atomic_write(f"{self.output}.txt") as f:
            f.write(("\n".join(lines) + "\n").encode())
        write_json(
            f"{self.output}.json", {**figures, "warnings": self.warnings, "protocol": protocol, "seconds": seconds}
        )
        print(f"wrote {self.output}.txt and {self.output}.json")


def open_backend(args: argparse.Namespace, dist: "Distributed") -> "Inception":
    """Return the Inception graph, run by what --backend names."""
    from evaluations.c2i.inception import TensorFlowInception, TorchInception
    from evaluations.published import GRAPH, find_file
    from utils.download import sha256_of

    path = find_file(GRAPH, args.graph)
    backend = TensorFlowInception(path) if args.backend == "tensorflow" else TorchInception(path, dist.device)
    backend.path, backend.sha256 = path, sha256_of(path)
    return backend


def sample_settings(folder: str | Path) -> dict | None:
    """Return the flags that a sampling script recorded, where the folder of its images is still there."""
    try:
        return json.loads((Path(folder) / "settings.json").read_text())
    except (OSError, ValueError):
        return None


def versions(backend: "Inception | None", *packages: str) -> dict[str, str]:
    """Return the versions that figures may depend on."""
    from importlib.metadata import version

    names = ("numpy", "scipy", "torch", *packages)
    found = {"python": platform.python_version()} | {name: version(name) for name in names}
    return found | (backend.versions if backend else {})


def add_evaluation_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the flags that both evaluators have. default: where the reports go without --output."""
    help = "what runs the Inception graph; tensorflow is the reference, torch agrees with it to 1e-5 of the largest feature"
    parser.add_argument("--backend", choices=["torch", "tensorflow"], default="torch", help=help)
    help = "classify_image_graph_def.pb (default: in the working directory or pretrained_models/, else downloaded)"
    parser.add_argument("--graph", default=None, help=help)
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--output", default=None, help=f"path of the reports, without .txt (default: {default})")
    help = "what makes figures incomparable is an error, not a warning"
    parser.add_argument("--strict", action="store_true", help=help)
    add_reading_flags(parser)
