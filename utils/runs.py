"""Run folders: `{results_dir}/{index:03d}-{name}/` with log.txt and checkpoints/, and how to find them again.

run, resumed = open_run(args, "GPT-B"); run.checkpoints(); find_checkpoint("results")
"""

import json
import re
import shutil
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.files import write_json
from utils.hub import resolve

_STEP = re.compile(r"(\d{7,})(\.pt)?")
_RUN = re.compile(r"(\d{3,})-(.+)$")


@dataclass(frozen=True)
class Run:
    """A run's folder, and where its checkpoints go: the first of `stores` is the one read back.

    earlier: of a new run, the newest checkpoint of the run of this name before it.
    """

    folder: Path
    stores: tuple[Path, ...]
    earlier: Path | None = None

    def checkpoints(self) -> list[Path]:
        """Its checkpoints, newest first: files `{step:07d}.pt`, and folders `{step:07d}` of sharded runs."""
        found = [path for store in self.stores for path in checkpoints_in(store)]
        return sorted(found, key=lambda path: int(path.stem), reverse=True)

    def flags(self) -> dict[str, Any]:
        """The flags that the run began with."""
        record = self.folder / "run.json"
        return json.loads(record.read_text())["args"] if record.exists() else {}

    def changed_flags(self, args: Namespace) -> list[str]:
        """What `args` has otherwise than the run began with, as "--lr 0.0001 (was 0.0002)"."""
        began, now = self.flags(), vars(args)
        return [
            f"--{name.replace('_', '-')} {now[name]} (was {began[name]})"
            for name in began
            if name in now and now[name] != began[name] and name != "resume"
        ]


def checkpoints_in(folder: Path) -> list[Path]:
    """Files `{step:07d}.pt` and folders `{step:07d}` of a folder, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and (path.suffix or path.is_dir())]
    return sorted(found, key=lambda path: int(path.stem), reverse=True)


def runs_in(results_dir: str | Path, name: str | None = None) -> list[Run]:
    """The runs in a results folder (those called `name`, where given), newest first."""
    folder = Path(results_dir)
    found = []
    for child in folder.iterdir() if folder.is_dir() else ():
        match = _RUN.fullmatch(child.name)
        if match and child.is_dir() and (name is None or match[2] == name):
            found.append((int(match[1]), child))
    runs = []
    for _, child in sorted(found, reverse=True):
        record = child / "run.json"
        stores = json.loads(record.read_text())["stores"] if record.exists() else ["checkpoints"]
        runs.append(Run(child, tuple(child / store for store in stores)))
    return runs


def open_run(args: Namespace, name: str, sharded: bool = False) -> tuple[Run, bool]:
    """The run to write to: the newest one of this name with --resume where there is one, else a new one.

    sharded: its checkpoints are folders, which the published scripts put at `{cloud_save_path}/{time}-{name}/{step:07d}`.
    Returns the run and whether it is an old one. Raises ValueError where --no-local-save leaves no place to save to.
    """
    if args.no_local_save and not args.cloud_save_path:
        raise ValueError("--no-local-save leaves no place for the checkpoints: give --cloud-save-path too")
    runs = runs_in(args.results_dir, name)
    if args.resume and runs:
        for store in runs[0].stores:
            for leftover in store.glob(".*.tmp"):  # of a save that was killed
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
        return runs[0], True
    folder = _new_folder(Path(args.results_dir), name)
    stores = [] if args.no_local_save else ["checkpoints"]  # inside the folder, which may be moved
    if args.cloud_save_path:
        cloud, now = Path(args.cloud_save_path).absolute(), time.strftime("%Y-%m-%d-%H-%M-%S")
        stores.append(str(cloud / f"{now}-{name}" if sharded else cloud / now / folder.name / "checkpoints"))
    write_json(folder / "run.json", {"stores": stores, "args": vars(args)})
    before = runs[0].checkpoints() if runs else []
    return Run(folder, tuple(folder / store for store in stores), before[0] if before else None), False


def _new_folder(results: Path, name: str) -> Path:
    """Makes the folder with the next free number, also where another run does so at the same time."""
    results.mkdir(parents=True, exist_ok=True)
    number = max((int(_RUN.fullmatch(run.folder.name)[1]) for run in runs_in(results)), default=-1) + 1
    while True:
        folder = results / f"{number:03d}-{name}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def find_checkpoint(name: str | Path, repo_id: str | None = None) -> Path:
    """The checkpoint a flag names: a file, a folder of one, a run or results folder (its newest), or a released file.

    Raises FileNotFoundError that says what was looked for.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        newest = newest_checkpoint(folder)
        if newest is not None:
            return newest
        if runs_in(folder):
            raise FileNotFoundError(f"no run in {folder} has a checkpoint yet")
    return resolve(name, repo_id)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint of a checkpoints folder, a run, or the newest run of a results folder; None for none."""
    folder = Path(folder)
    itself = [run for run in runs_in(folder.parent) if run.folder == folder]
    runs = [run.checkpoints() for run in itself or runs_in(folder)]
    for found in (checkpoints_in(folder), *runs, checkpoints_in(folder / "checkpoints")):
        if found:
            return found[0]
    return None
