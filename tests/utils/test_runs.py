"""Run folders: their numbers, where checkpoints go, which run is resumed, and which file a name means."""

import errno
import os
import re
from pathlib import Path

import pytest

from utils.cli import flag_parser
from utils.runs import find_checkpoint, newest_checkpoint, runs_in
from utils.training import run_folder
from utils.training.flags import add_training_flags
from utils.training.run_folder import open_run, prune_checkpoints


def arguments(tmp_path, *more):
    parser = flag_parser(None)
    add_training_flags(parser, epochs=1, batch=4, results_dir="results", num_workers=0)
    return parser.parse_args(["--results-dir", str(tmp_path / "results"), *map(str, more)])


def put(store: Path, *steps: int) -> None:
    store.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (store / f"{step:07d}.pt").write_bytes(b"x")


def put_folders(store: Path, *steps: int) -> None:
    for step in steps:
        (store / f"{step:07d}").mkdir(parents=True)
        (store / f"{step:07d}" / "shard").write_bytes(b"x")


def steps_of(paths):
    return [int(path.stem) for path in paths]


def test_folders_are_numbered(tmp_path):
    names = [open_run(arguments(tmp_path), name)[0].folder.name for name in ("GPT-B", "GPT-L", "GPT-B")]
    assert names == ["000-GPT-B", "001-GPT-L", "002-GPT-B"]
    (tmp_path / "results" / "041-GPT-B").mkdir()
    (tmp_path / "results" / "notes").mkdir()
    (tmp_path / "results" / "099-GPT-B").write_text("a file")
    assert open_run(arguments(tmp_path), "GPT-B")[0].folder.name == "042-GPT-B"


def test_stores(tmp_path):
    run, _ = open_run(arguments(tmp_path), "GPT-B")
    assert run.stores == (tmp_path / "results/000-GPT-B/checkpoints",)
    run, _ = open_run(arguments(tmp_path, "--cloud-save-path", tmp_path / "cloud"), "GPT-B")
    local, cloud = run.stores
    assert local == tmp_path / "results/001-GPT-B/checkpoints"
    assert re.fullmatch(r"\d{4}(-\d\d){5}/001-GPT-B/checkpoints", str(cloud.relative_to(tmp_path / "cloud")))
    run, _ = open_run(arguments(tmp_path, "--cloud-save-path", tmp_path / "cloud", "--no-local-save"), "GPT-B")
    assert len(run.stores) == 1 and run.stores[0].is_relative_to(tmp_path / "cloud")


def test_stores_of_sharded_runs(tmp_path):
    """The second place is the published scripts': `{time}-{name}`, with the folders of the steps right in it."""
    args = arguments(tmp_path, "--cloud-save-path", tmp_path / "cloud")
    run, _ = open_run(args, "GPT-XXL", sharded=True)
    local, cloud = run.stores
    assert local == tmp_path / "results/000-GPT-XXL/checkpoints"
    assert re.fullmatch(r"\d{4}(-\d\d){5}-GPT-XXL", str(cloud.relative_to(tmp_path / "cloud")))
    put_folders(cloud, 5000)
    again, resumed = open_run(arguments(tmp_path, "--resume"), "GPT-XXL", sharded=True)
    assert resumed and again == run and again.checkpoints() == [cloud / "0005000"]


def test_no_place_to_save(tmp_path):
    with pytest.raises(ValueError, match=r"--no-local-save .*--cloud-save-path"):
        open_run(arguments(tmp_path, "--no-local-save"), "GPT-B")
    assert not (tmp_path / "results").exists()


def test_resume_takes_the_newest_run_of_that_name(tmp_path):
    cloud = ["--cloud-save-path", tmp_path / "cloud", "--no-local-save"]
    runs = [
        open_run(arguments(tmp_path, *more), name)[0] for name, more in (("GPT-B", []), ("GPT-B", cloud), ("GPT-L", []))
    ]
    run, resumed = open_run(arguments(tmp_path, "--resume"), "GPT-B")
    assert resumed and run == runs[1] and run.folder.name == "001-GPT-B"
    run, resumed = open_run(arguments(tmp_path, "--resume"), "GPT-XL")
    assert not resumed and run.folder.name == "003-GPT-XL"


def test_open_run_resumed_with_another_cloud_path_saves_there_and_finds_what_was_saved_before(tmp_path):
    sharded, put_at = True, put_folders
    run, _ = open_run(arguments(tmp_path), "GPT-B")
    put_at(run.stores[0], 10)
    words = ["--resume", "--cloud-save-path", tmp_path / "cloud"]
    run, resumed = open_run(arguments(tmp_path, *words), "GPT-B", sharded)
    assert resumed and run.stores[0] == run.folder / "checkpoints" and run.stores[1].is_relative_to(tmp_path / "cloud")
    assert open_run(arguments(tmp_path, *words), "GPT-B", sharded) == (run, True), "the place is made once"
    put_at(run.stores[1], 20)
    words = ["--resume", "--cloud-save-path", tmp_path / "other", "--no-local-save"]
    run, _ = open_run(arguments(tmp_path, *words), "GPT-B", sharded)
    (store,) = run.stores
    assert store.is_relative_to(tmp_path / "other") and steps_of(run.checkpoints()) == [20, 10]
    assert open_run(arguments(tmp_path, "--resume"), "GPT-B", sharded)[0] == run, "flags left out change nothing"
    assert steps_of(runs_in(tmp_path / "results")[0].checkpoints()) == [20, 10]


@pytest.mark.parametrize("flag", ["--results-dir", "--cloud-save-path"])
@pytest.mark.parametrize("resumed", [False, True])
def test_open_run_place_that_cannot_be_written_to_is_refused(tmp_path, flag, resumed):
    (tmp_path / "file").write_text("no folder")
    if resumed:
        open_run(arguments(tmp_path), "GPT-B")
    words = ["--resume"] * resumed + [flag, tmp_path / "file" / "place"]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"file/place.* cannot be written to \(Not a directory\)"):
        open_run(arguments(tmp_path, *words), "GPT-B")
    assert resumed or not [path for path in tmp_path.rglob("*") if path not in before and path.is_file()]


def test_open_run_full_disk_is_refused(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("utils.training.run_folder.os.fsync", full)
    with pytest.raises(ValueError, match=r"cannot be written to \(No space left on device\)"):
        open_run(arguments(tmp_path), "GPT-B")
    assert os.listdir(tmp_path / "results") == []


def test_resume_takes_away_folders_of_killed_saves(tmp_path):
    """In every store: half written ones, and those that were being removed."""
    run, _ = open_run(arguments(tmp_path, "--cloud-save-path", tmp_path / "cloud"), "GPT-B", sharded=True)
    left = [store / name for store in run.stores for name in (".0000020.tmp", ".0000005.removed.tmp")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(b"half")
    for store in run.stores:
        put_folders(store, 10)
    (run.stores[0] / "notes.tmp").mkdir()
    open_run(arguments(tmp_path), "GPT-B")  # another run leaves them alone
    assert all(folder.exists() for folder in left)
    (tmp_path / "results" / "001-GPT-B").rename(tmp_path / "elsewhere")
    assert open_run(arguments(tmp_path, "--resume"), "GPT-B") == (run, True)
    assert not any(folder.exists() for folder in left)
    assert (run.stores[0] / "notes.tmp").exists()
    assert run.checkpoints() == [store / "0000010" for store in run.stores]


def test_folders_are_checkpoints(tmp_path):
    """Of sharded runs; a run that changed its strategy has both. What is not whole does not count."""
    run, _ = open_run(arguments(tmp_path), "GPT-B")
    store = run.stores[0]
    put_folders(store, 20, 5, 12345678)
    put(store, 10)
    for name in (".0000099.tmp", "99", "0000099.x", "samples"):
        (store / name).mkdir()
    (store / "0000077").write_bytes(b"a file without its suffix")
    assert [path.name for path in run.checkpoints()] == ["12345678", "0000020", "0000010.pt", "0000005"]
    for name in (tmp_path / "results", run.folder, store):
        assert find_checkpoint(name) == store / "12345678"
    for path in (store / "0000005", store / "0000010.pt"):
        assert find_checkpoint(path) == path and find_checkpoint(str(path)) == path
    assert newest_checkpoint(store / "0000005") is None, "it is one itself"


def test_newest_first_over_both_stores(tmp_path):
    """Where one disk was full for a while, the newest checkpoint is the other one's."""
    run, _ = open_run(arguments(tmp_path, "--cloud-save-path", tmp_path / "cloud"), "GPT-B")
    put(run.stores[0], 10, 30)
    put(run.stores[1], 10, 30, 9, 40)
    assert steps_of(run.checkpoints()) == [40, 30, 30, 10, 10, 9]
    assert [path.parent == run.stores[0] for path in run.checkpoints()] == [False, True, False, True, False, False]
    assert newest_checkpoint(run.folder) == run.stores[1] / "0000040.pt"


def test_a_folder_that_was_moved_keeps_its_checkpoints(tmp_path):
    run, _ = open_run(arguments(tmp_path), "GPT-B")
    put(run.stores[0], 10)
    (tmp_path / "results").rename(tmp_path / "elsewhere")
    args = arguments(tmp_path, "--resume", "--results-dir", tmp_path / "elsewhere")
    moved, resumed = open_run(args, "GPT-B")
    assert resumed and moved.stores == (tmp_path / "elsewhere/000-GPT-B/checkpoints",)
    assert steps_of(moved.checkpoints()) == [10]


def test_what_a_name_means(tmp_path, monkeypatch):
    results = tmp_path / "results"
    put(results / "000-GPT-B/checkpoints", 10, 20)
    put(results / "001-GPT-B/checkpoints", 5)
    (results / "002-GPT-B/checkpoints").mkdir(parents=True)
    newest, first = results / "001-GPT-B/checkpoints/0000005.pt", results / "000-GPT-B/checkpoints/0000020.pt"
    assert find_checkpoint(results) == newest
    assert find_checkpoint(results / "000-GPT-B") == first
    assert find_checkpoint(results / "000-GPT-B" / "checkpoints") == first
    assert find_checkpoint(str(first.with_name("0000010.pt"))) == first.with_name("0000010.pt")
    monkeypatch.chdir(results)
    assert find_checkpoint("000-GPT-B").resolve() == first
    monkeypatch.chdir(results / "000-GPT-B")
    assert find_checkpoint(".").resolve() == first


def test_no_checkpoint_yet(tmp_path):
    open_run(arguments(tmp_path), "GPT-B")
    with pytest.raises(FileNotFoundError, match=r"no run in .*results has a checkpoint yet"):
        find_checkpoint(tmp_path / "results")


def test_pruning_keeps_the_newest_files_and_folders(tmp_path):
    """Sharded runs have folders; one that was moved between strategies has both."""
    for name in ("0000005", "0000010", "12345678"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").write_bytes(b"x")
    for name in ("0000005.pt", "0000007.pt"):
        (tmp_path / name).write_bytes(b"")
    others = [".0000020.tmp", "123", "0000009.x", "samples"]
    for name in others:
        (tmp_path / name).mkdir()
    prune_checkpoints(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == sorted(["0000010", "12345678", *others])
    assert (tmp_path / "12345678" / "shard").exists()


def test_a_folder_half_removed_no_longer_counts(tmp_path, monkeypatch):
    """The process is killed while it removes the first of a folder's files."""

    def die(path, **kwargs):
        raise KeyboardInterrupt

    for step in (1, 2):
        (tmp_path / f"{step:07d}").mkdir()
    monkeypatch.setattr(run_folder.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == [".0000001.removed.tmp", "0000002"]
