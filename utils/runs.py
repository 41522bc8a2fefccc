"""Run folders: `{results_dir}/{index:03d}-{name}/` with log.txt and checkpoints/, and how to find them again.

run, resumed = open_run(args, "GPT-B"); run.checkpoints(); find_checkpoint("results")
"""

import json
import os
import re
import shutil
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.files import write_json
from utils.hub import resolve

_STEP = re.compile(r"(\d{7,})(\.pt)?")
_RUN = re.compile(r"(\d{3,})-(.+)$")


@dataclass(frozen=True)
class Run:
    """A run's folder, and where its checkpoints go.

    earlier: of a new run, the newest checkpoint of the run of this name before it. former: where its checkpoints went before
    it was resumed with other flags.
    """

    folder: Path
    stores: tuple[Path, ...]
    earlier: Path | None = None
    former: tuple[Path, ...] = ()

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


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints of a folder."""
    assert keep > 0
    for path in checkpoints_in(folder)[keep:]:
        # Under another name first: a folder half removed must not look like a checkpoint.
        _remove(path.rename(path.with_name(f".{path.name}.removed.tmp")))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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


def open_run(args: Namespace, name: str, sharded: bool = False) -> tuple[Run, bool]:
    """Open the run to write to: the newest one of this name with --resume where there is one, else a new one.

    sharded: its checkpoints are folders, which the published scripts put at `{cloud_save_path}/{time}-{name}/{step:07d}`.
    Returns the run and whether it is an old one. Raises ValueError where --no-local-save leaves no place to save to, or a
    place cannot be written to.
    """
    if args.no_local_save and not args.cloud_save_path:
        raise ValueError("--no-local-save leaves no place for the checkpoints: give --cloud-save-path too")
    runs = runs_in(args.results_dir, name)
    resumed = bool(args.resume and runs)
    for place in (runs[0].folder if resumed else args.results_dir, args.cloud_save_path):
        if place:
            require_writable(Path(place))
    if resumed:
        run = runs[0]
    else:
        folder = _new_folder(Path(args.results_dir), name)
        write_json(folder / "run.json", {"stores": [], "args": vars(args)})
        stores = () if args.no_local_save else (folder / "checkpoints",)
        run = Run(folder, stores, earlier=next(iter(runs[0].checkpoints()), None) if runs else None)
    run = _with_stores(run, args, sharded)
    for store in run.stores if resumed else ():
        require_writable(store)
        for leftover in store.glob(".*.tmp"):  # of a save that was killed
            _remove(leftover)
    _record_stores(run)
    return run, resumed


def _with_stores(run: Run, args: Namespace, sharded: bool) -> Run:
    """Return the run as --cloud-save-path and --no-local-save have it; without them a resumed one keeps its places."""
    local, stores = run.folder / "checkpoints", list(run.stores)
    if args.cloud_save_path:
        cloud, now = Path(args.cloud_save_path).absolute(), time.strftime("%Y-%m-%d-%H-%M-%S")
        if not any(store != local and store.is_relative_to(cloud) for store in stores):
            name = run.folder.name.split("-", 1)[1]
            added = cloud / f"{now}-{name}" if sharded else cloud / now / run.folder.name / "checkpoints"
            stores = [*(store for store in stores if store == local), added]
    if args.no_local_save:
        stores = [store for store in stores if store != local]
    former = [store for store in dict.fromkeys((*run.former, *run.stores)) if store not in stores]
    return replace(run, stores=tuple(stores), former=tuple(former))


def _record_stores(run: Run) -> None:
    """Write down in run.json where checkpoints go from now on."""
    file = run.folder / "run.json"
    record = json.loads(file.read_text()) if file.exists() else {"args": {}}
    # Inside the folder, which may be moved, by relative paths.
    places = {
        key: ["checkpoints" if store == run.folder / "checkpoints" else str(store) for store in stores]
        for key, stores in (("stores", run.stores), ("former", run.former))
    }
    if record != (record := {**record, **places}):
        write_json(file, record)


def require_writable(folder: Path) -> None:
    """Write a small file and remove it. Raises ValueError where the folder is read-only, its disk full, or it is no folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable.", suffix=".tmp") as f:
            f.write(bytes(2**16))
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        what = f"{folder} cannot be written to ({reason})"
        raise ValueError(f"{what}: make it writable, or give another --results-dir or --cloud-save-path") from error


def _new_folder(results: Path, name: str) -> Path:
    """Make the folder with the next free number, also where another run does so at the same time."""
    results.mkdir(parents=True, exist_ok=True)
    number = max((int(run.folder.name.partition("-")[0]) for run in runs_in(results)), default=-1) + 1
    while True:
        folder = results / f"{number:03d}-{name}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


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
