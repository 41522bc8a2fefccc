"""Run folders: `{results_dir}/{index:03d}-{name}/` with log.txt and checkpoints/, and how to find them again."""

import json
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.hub import resolve

_STEP = re.compile(r"(\d{7,})(\.pt)?")
_RUN = re.compile(r"(\d{3,})-(.+)$")


@dataclass(frozen=True)
class Run:
    """A run's folder, and where its checkpoints go."""

    folder: Path
    stores: tuple[Path, ...]
    earlier: Path | None = None  # of a new run, the newest checkpoint of the run of this name before it
    former: tuple[Path, ...] = ()  # where its checkpoints went before it was resumed with other flags

    def checkpoints(self) -> list[Path]:
        """Return its checkpoints, newest first: files `{step:07d}.pt`, and folders `{step:07d}` of sharded runs."""
        found = [path for store in (*self.stores, *self.former) for path in checkpoints_in(store)]
        return sorted(found, key=lambda path: int(path.stem), reverse=True)

    def flags(self) -> dict[str, Any]:
        """Return the flags that the run began with."""
        record = self.folder / "run.json"
        return json.loads(record.read_text())["args"] if record.exists() else {}

    def changed_flags(self, args: Namespace) -> list[str]:
        """Return the flags that differ from those the run began with, as "--lr 0.0001 (was 0.0002)"."""
        began, now = self.flags(), vars(args)
        return [
            f"--{name.replace('_', '-')} {now[name]} (was {began[name]})"
            for name in began
            if name in now and now[name] != began[name] and name != "resume"
        ]


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the files `{step:07d}.pt` and folders `{step:07d}` of a folder, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and (path.suffix or path.is_dir())]
    return sorted(found, key=lambda path: int(path.stem), reverse=True)


def runs_in(results_dir: str | Path, name: str | None = None) -> list[Run]:
    """Return the runs in a results folder (those called `name`, where given), newest first."""
    folder = Path(results_dir)
    found = []
    for child in folder.iterdir() if folder.is_dir() else ():
        match = _RUN.fullmatch(child.name)
        if match and child.is_dir() and (name is None or match[2] == name):
            found.append((int(match[1]), child))
    runs = []
    for _, child in sorted(found, reverse=True):
        file = child / "run.json"
        record = json.loads(file.read_text()) if file.exists() else {"stores": ["checkpoints"]}
        stores, former = (tuple(child / store for store in record.get(key, [])) for key in ("stores", "former"))
        runs.append(Run(child, stores, former=former))
    return runs


def find_checkpoint(name: str | Path, repo_id: str | None = None) -> Path:
    """Find the checkpoint that a flag names: a file, a folder of one, a run or results folder (its newest), a saved pipeline's
    GPT, or a released file.

    Raises FileNotFoundError that says what was looked for.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        newest = newest_checkpoint(folder)
        if newest is not None:
            return newest
        if runs_in(folder):
            raise FileNotFoundError(f"no run in {folder} has a checkpoint yet")
        if (folder / "model_index.json").is_file():
            return folder / "gpt" / "model.safetensors"
    return resolve(name, repo_id)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint of a checkpoints folder, a run, or the newest run of a results folder; None for none."""
    folder = Path(folder)
    itself = [run for run in runs_in(folder.parent) if run.folder == folder]
    runs = [run.checkpoints() for run in itself or runs_in(folder)]
    for found in (checkpoints_in(folder), *runs, checkpoints_in(folder / "checkpoints")):
        if found:
            return found[0]
    return None
