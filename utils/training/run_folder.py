"""Folder of a run that is written: made or found again, where its checkpoints go, and which of them stay."""

import json
import os
import shutil
import tempfile
import time
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from utils.files import write_json
from utils.runs import Run, checkpoints_in, runs_in


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
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


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
