"""A state on its way to the disk and back, in shards and in one file, on disks that are damaged, full or slow.

One process stands for all here; several: tests/autoregressive/test_training_processes.py.
"""

import json
import os
import pickle
import shutil
import threading
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from autoregressive.models.gpt import GPT_models
from tests.training import load, same
from utils.checkpoint import read_checkpoint
from utils.distributed import start
from utils.runs import Run, checkpoints_in
from utils.training import shards
from utils.training import state as state_module
from utils.training.ema import EMA, local
from utils.training.optim import adamw
from utils.training.parallel import Parallel, SeededNormal, materialize
from utils.training.shards import ChecksummedWriter, whole_weights
from utils.training.state import Saver, TrainingState

FLAGS = {"lr": 0.01, "weight_decay": 0.05, "beta1": 0.9, "beta2": 0.95, "keep_last": 0, "path": Path("x"), "note": None}
SHARDED = {"fsdp", "sdp", "hsdp"}


@pytest.fixture(autouse=True)
def alone():
    """A process group of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist = start("cpu", group=True)
    yield dist
    dist.close()
    torch.set_num_threads(threads)


@dataclass
class Log:
    """What a run's log was told."""

    told: list = field(default_factory=list)
    warned: list = field(default_factory=list)

    def info(self, message):
        self.told.append(message)

    def warning(self, message):
        self.warned.append(message)


def make(dist, strategy="fsdp", ema=True, seed=0, **size):
    """A small GPT's state at its beginning."""
    with torch.device("meta"):
        size = {"n_layer": 2, "n_head": 2, "dim": 32, "multiple_of": 32, "num_classes": 10} | size
        model = GPT_models["GPT-XS"](vocab_size=64, block_size=16, **size)
    plan = Parallel(dist, strategy)
    if plan.sharded:
        plan.apply(model, blocks=model.layers)
    materialize(model, dist.device, seed)
    with torch.no_grad():
        SeededNormal(seed)(model.output.weight, 0.1)
    average = EMA(model, 0.5) if ema else None
    optimizers = {"optimizer": (model, adamw(model, Namespace(**FLAGS)))}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainingState({"model": model}, optimizers, average, scaler, {"classes": ["a", "b"]})


def train(state, steps=2):
    """Some steps on batches that are a function of the step."""
    model, optimizer = state.optimizers["optimizer"]
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        tokens = torch.randint(64, (2, 15), generator=generator)
        torch.manual_seed(state.step)
        optimizer.zero_grad()
        model(tokens, torch.randint(10, (2,), generator=generator)).log_softmax(-1)[..., 7].mean().neg().backward()
        optimizer.step()
        if state.ema:
            state.ema.update()
        state.step += 1
        state.samples_seen += 8
    return state


def content(state, averaged=True):
    """Everything of a state as plain tensors and values, copied."""
    model, optimizer = state.optimizers["optimizer"]
    moments = get_optimizer_state_dict(model, optimizer)["state"]
    found = {
        "model": dict(model.state_dict()),
        "ema": state.ema.state_dict() if state.ema and averaged else {},
        "optimizer": {f"{name}.{key}": value for name, entry in moments.items() for key, value in entry.items()},
    }
    plain = {part: {name: local(t.detach()).clone() for name, t in tree.items()} for part, tree in found.items()}
    return plain | {"place": (state.step, state.samples_seen)}


@pytest.fixture
def saver(alone, tmp_path):
    """Makes savers of a state into tmp_path/"checkpoints" (and other stores), and ends their threads."""
    made = []

    def make_saver(state, stores=("checkpoints",), **flags):
        log = Log()
        run = Run(tmp_path, tuple(tmp_path / name for name in stores))
        made.append(Saver(state, run, Namespace(**FLAGS | flags), alone, log))
        return made[-1], log

    yield make_saver
    for each in made:
        each.finish()


def saved(saver, state):
    """A state's checkpoint, complete."""
    writer, _ = saver(state)
    writer.save()
    writer.wait(final=True)
    return writer.run.checkpoints()[0]


def taken(state, path, dist):
    assert state.take(state.read(path, dist), 8)
    return state


# There and back


@pytest.mark.parametrize("there, back", [("fsdp", "ddp"), ("ddp", "fsdp"), ("sdp", "hsdp")])
def test_a_state_comes_back_whole_and_goes_on_alike(alone, saver, there, back):
    """Folder or file, into shards or plain; the next steps are those of the state that was never saved."""
    state = train(make(alone, there))
    path = saved(saver, state)
    assert path.name == ("0000002" if there in SHARDED else "0000002.pt") and path.is_dir() == (there in SHARDED)
    got = taken(make(alone, back, seed=1), path, alone)
    assert same(content(got), content(state)) and content(got)["place"] == (2, 16)
    assert same(content(train(got)), content(train(state)))


@pytest.mark.parametrize("there, back", [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_an_average_begins_with_the_weights_where_there_was_none(alone, saver, there, back):
    state = train(make(alone, there, ema=False))
    got = taken(make(alone, back, ema=True, seed=1), saved(saver, state), alone)
    assert same(content(got, averaged=False), content(state))
    assert same(content(got)["ema"], content(got)["model"])


@pytest.mark.parametrize("there, back", [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_an_average_that_is_not_asked_for_is_left(alone, saver, there, back):
    state = train(make(alone, there, ema=True))
    got = taken(make(alone, back, ema=False, seed=1), saved(saver, state), alone)
    assert same(content(got), content(state, averaged=False))


def test_moments_of_a_plain_file_are_the_plain_optimizer_s(alone, saver):
    state = train(make(alone, "ddp"))
    path = saved(saver, state)
    got = taken(make(alone, "fsdp", seed=1), path, alone)
    (plain_model, plain), (model, optimizer) = (s.optimizers["optimizer"] for s in (state, got))
    for (name, p), (other, q) in zip(plain_model.named_parameters(), model.named_parameters(), strict=True):
        assert name == other and plain.state[p].keys() == optimizer.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert isinstance(optimizer.state[q]["exp_avg"], DTensor)
        for key, value in plain.state[p].items():
            assert torch.equal(local(optimizer.state[q][key]), value) and value.any(), (name, key)
    groups = [[g["weight_decay"] for g in o.param_groups] for o in (plain, optimizer)]
    assert groups[0] == groups[1] == [0.05, 0.0]


def test_weights_alone_are_no_whole_state(alone, saver, tmp_path):
    state = train(make(alone, "fsdp"))
    path = saved(saver, state)
    for file in (path / "consolidated.pth", tmp_path / "bare.pt"):
        if not file.exists():
            torch.save({"model": read_checkpoint(path).model}, file)
        got = make(alone, "fsdp", seed=1)
        assert not got.take(got.read(file, alone, whole=False), 8)
        assert content(got)["place"] == (0, 0)
        assert same(content(got)["model"], content(state)["model"])


def test_published_files_say_steps_and_no_samples(alone, tmp_path):
    state = train(make(alone, "ddp", ema=False))
    whole = state.file_content(Namespace(global_batch_size=32))
    whole.pop("trainer")
    got = make(alone, "fsdp", ema=False, seed=1)
    for args, samples in ((Namespace(global_batch_size=32), 64), (None, 16)):
        torch.save(whole | {"args": args}, tmp_path / "a.pt")
        assert got.take(got.read(tmp_path / "a.pt", alone), 8)
        assert (got.step, got.samples_seen) == (2, samples)


def test_the_scale_of_losses_comes_back_from_shards(alone, saver):
    state, got = train(make(alone, ema=False)), make(alone, ema=False)
    state.scaler, got.scaler = torch.amp.GradScaler("cpu", init_scale=512.0), torch.amp.GradScaler("cpu")
    state.scaler.scale(torch.ones(()))
    assert taken(got, saved(saver, state), alone).scaler.get_scale() == 512.0


@pytest.mark.parametrize("there", ["fsdp", "ddp"])
def test_another_model_is_refused_with_the_names_and_nothing_is_taken(alone, saver, there):
    path = saved(saver, train(make(alone, there)))
    for back in ("fsdp", "ddp"):
        got = make(alone, back, num_classes=12, n_layer=1, seed=1)
        before = content(got)
        with pytest.raises(ValueError) as caught:
            got.take(got.read(path, alone), 8)
        message = str(caught.value)
        assert message.startswith(f"{path} does not fit the model:\n  unexpected (7): layers.1.")
        assert message.endswith("other shape (1): cls_embedding.embedding_table.weight (11, 32) (model: (13, 32))")
        assert same(content(got), before)


# What a folder holds


def test_a_folder_and_its_record(alone, saver):
    state = train(make(alone))
    path = saved(saver, state)
    assert {file.name for file in path.iterdir()} == {
        *(".metadata", "0.crc32.json", "__0_0.distcp", "consolidated.pth", "consolidated_ema.pth"),
        *("resume_step.txt", "training.json"),
    }
    assert (path / "resume_step.txt").read_text() == "2\n"
    flags = FLAGS | {"path": "x"}
    assert json.loads((path / "training.json").read_text()) == {
        "steps": 2,
        "samples_seen": 16,
        "scaler": {},
        "processes": 1,
        "args": flags,
        "config": {"classes": ["a", "b"]},
    }
    assert os.listdir(path.parent) == ["0000002"], "nothing unfinished is left"


def test_consolidated_files_are_the_weights(alone, saver):
    state = train(make(alone))
    path, expected = saved(saver, state), content(state)
    assert not same(expected["model"], expected["ema"])
    for part, name in (("model", "consolidated.pth"), ("ema", "consolidated_ema.pth")):
        assert same(load(path / name), expected[part]) and list(load(path / name)) == list(expected[part])
        assert same(whole_weights(path, part), expected[part])
    read = read_checkpoint(path, prefer_ema=True)
    assert same(read.model, expected["ema"]) and read.steps == 2 and read.args["lr"] == 0.01
    assert read.config == state.config
    assert whole_weights(path, "discriminator") == {}


def test_only_the_newest_folders_are_kept_in_every_store(alone, saver, tmp_path):
    state = make(alone, ema=False)
    writer, log = saver(state, stores=("checkpoints", "cloud"), keep_last=2)
    for _ in range(4):
        train(state, 1)
        writer.save()
    writer.wait(final=True)
    for store in (tmp_path / "checkpoints", tmp_path / "cloud"):
        assert sorted(os.listdir(store)) == ["0000003", "0000004"]
    files = {
        store: {file.name: file.read_bytes() for file in (tmp_path / store / "0000004").iterdir()}
        for store in ("checkpoints", "cloud")
    }
    assert files["checkpoints"] == files["cloud"] and len(files["cloud"]) == 6
    assert [line for line in log.told if "0000004" in line] == [
        f"saved {tmp_path / store / '0000004'}" for store in ("checkpoints", "cloud")
    ]
    got = taken(make(alone, ema=False, seed=1), tmp_path / "cloud" / "0000004", alone)
    assert same(content(got), content(state))


def test_a_run_that_was_set_back_replaces_what_it_had_written(alone, saver):
    first, second = train(make(alone, ema=False)), train(make(alone, ema=False, seed=1))
    path = saved(saver, first)
    assert saved(saver, second) == path and os.listdir(path.parent) == [path.name]
    assert same(load(path / "consolidated.pth"), content(second)["model"])


# In the background


def test_a_folder_has_the_weights_of_its_step(alone, saver, monkeypatch):
    """While it is written training goes on; the next save waits."""
    state, free, begun = train(make(alone)), threading.Event(), threading.Event()
    write = ChecksummedWriter.write_data

    def slow(self, plan, planner):
        begun.set()
        assert free.wait(120)
        return write(self, plan, planner)

    monkeypatch.setattr(ChecksummedWriter, "write_data", slow)
    writer, log = saver(state)
    expected = content(state)
    writer.save()
    assert begun.wait(120)
    train(state)
    writer.poll()
    assert log.told == [] and not same(content(state), expected)
    timer = threading.Timer(0.1, free.set)
    timer.start()
    writer.save()
    assert free.is_set() and (writer.run.stores[0] / "0000002").is_dir(), "the first is complete"
    writer.wait(final=True)
    assert same(content(taken(make(alone, seed=1), writer.run.stores[0] / "0000002", alone)), expected)
    assert same(content(taken(make(alone, seed=1), writer.run.stores[0] / "0000004", alone)), content(state))
    assert writer.saved_step == 4


# Disks


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_no_folder_and_is_a_warning_until_the_last(alone, saver, monkeypatch):
    state = train(make(alone, ema=False))
    kept = saved(saver, state)
    writer, log = saver(train(state))
    with monkeypatch.context() as patched:
        patched.setattr(ChecksummedWriter, "write_data", full)
        writer.save()
        writer.wait()
        (line,) = log.warned
        assert f"could not write {kept.with_name('0000004')} (" in line and "No space left on device" in line
        assert line.endswith("; training continues, the next checkpoint tries again") and "\n" not in line
        assert os.listdir(kept.parent) == ["0000002"]
        train(state, 1)
        writer.save()
        with pytest.raises(OSError, match=r"could not write \S*0000005 \(.*No space left on device"):
            writer.wait(final=True)
        assert os.listdir(kept.parent) == ["0000002"]
    writer.save()
    writer.wait(final=True)
    assert sorted(os.listdir(kept.parent)) == ["0000002", "0000005"]


def test_one_full_store_does_not_keep_the_other_from_a_folder(alone, saver, tmp_path):
    (tmp_path / "cloud").write_text("a place where nothing can be written")
    state = train(make(alone, ema=False))
    writer, log = saver(state, stores=("checkpoints", "cloud"))
    writer.save()
    with pytest.raises(OSError, match=r"could not write \S*cloud/0000002 \("):
        writer.wait(final=True)
    assert log.told == [f"saved {tmp_path / 'checkpoints' / '0000002'}"]
    assert same(content(taken(make(alone, ema=False, seed=1), writer.run.checkpoints()[0], alone)), content(state))


def test_shards_that_cannot_be_read_are_an_ordinary_error(alone, folder):
    """A process's part of the checksums says nothing of the other files."""
    read = TrainingState.read(folder, alone)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"0000002 cannot be read \(.*__0_0\.distcp"):
        make(alone, seed=1).take(read, 8)


class Killed(BaseException):
    """What ends a process is here."""


@pytest.mark.parametrize("moment", ["write_json", "save_bare_weights", "_copy_folder", "_rename_folder"])
@pytest.mark.slow
def test_a_run_killed_before_the_renaming_leaves_nothing_that_counts(alone, saver, monkeypatch, moment):
    """At whatever moment; the next run takes the checkpoint before, and writes this one anew."""

    module = shards if moment == "save_bare_weights" else state_module
    original = getattr(module, moment)

    def die(path, *args):
        if path.name == "0.crc32.json":  # of the shards, before the record
            return original(path, *args)
        raise Killed

    state = train(make(alone))
    kept = saved(saver, state)
    writer, _ = saver(train(state), stores=("checkpoints", "cloud"))
    with monkeypatch.context() as patched:
        patched.setattr(module, moment, die)
        writer.save()
        with pytest.raises(Killed):
            writer.wait()
    assert checkpoints_in(writer.run.stores[1]) == []
    if moment == "_copy_folder":  # the first store has it
        assert checkpoints_in(kept.parent) == [kept.with_name("0000004"), kept]
        return
    assert checkpoints_in(kept.parent) == [kept] and (kept.parent / ".0000004.tmp").is_dir()
    got = train(taken(make(alone, seed=1), writer.run.checkpoints()[0], alone))
    again, _ = saver(got)
    again.save()
    again.wait(final=True)
    assert sorted(os.listdir(kept.parent)) == ["0000002", "0000004"]
    assert same(content(taken(make(alone, seed=2), kept.with_name("0000004"), alone)), content(state))


# Damage


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    """A complete folder, read-only."""
    folder = tmp_path_factory.mktemp("whole")
    dist = start("cpu", group=True)
    try:
        writer = Saver(train(make(dist)), Run(folder, (folder,)), Namespace(**FLAGS), dist, Log())
        writer.save()
        writer.wait(final=True)
        writer.finish()
    finally:
        dist.close()
    return folder / "0000002"


@pytest.fixture
def folder(whole_folder, tmp_path):
    """A copy to damage. (A fixture of the module has its group closed before this one's is made.)"""
    return Path(shutil.copytree(whole_folder, tmp_path / whole_folder.name))


def flip(file, at=None):
    """Changes one byte, in the middle."""
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2 if at is None else at] ^= 1
    file.write_bytes(whole)


DAMAGE = {
    "a shard cut": (
        lambda f: os.truncate(f / "__0_0.distcp", 1000),
        r"__0_0\.distcp is damaged \(its checksum differs",
    ),
    "a byte flipped": (lambda f: flip(f / "__0_0.distcp"), r"__0_0\.distcp is damaged \(its checksum differs\)"),
    "a shard missing": (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0\.distcp is damaged \(missing\)"),
    "a shard and its sum missing": (
        lambda f: [file.unlink() for file in (f / "__0_0.distcp", f / "0.crc32.json")],
        r"__0_0\.distcp is damaged \(missing\)",
    ),
    "the table missing": (lambda f: (f / ".metadata").unlink(), r"0000002 is damaged \(its \.metadata is missing\)"),
    "no record": (lambda f: (f / "training.json").unlink(), r"training\.json is damaged or missing"),
    "no sums to read": (lambda f: os.truncate(f / "0.crc32.json", 3), r"0\.crc32\.json is damaged or missing"),
    "half a table": (lambda f: os.truncate(f / ".metadata", 500), r"\.metadata is damaged \("),
    "no table at all": (lambda f: (f / ".metadata").write_bytes(b"not a pickle"), r"\.metadata is damaged \("),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_before_anything_is_taken(alone, folder, kind):
    harm, message = DAMAGE[kind]
    assert TrainingState.read(folder, alone).record["steps"] == 2
    harm(folder)
    with pytest.raises(ValueError, match=message):
        TrainingState.read(folder, alone)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_table_that_asks_to_run_something_is_refused_and_nothing_is_run(alone, folder, tmp_path):
    trace = tmp_path / "trace"
    table = pickle.dumps(Harmful(trace))
    (folder / ".metadata").write_bytes(table)
    got = make(alone, seed=1)
    for read in (lambda: got.take(got.read(folder, alone), 8), lambda: whole_weights(folder, "model")):
        with pytest.raises(
            ValueError, match=r"refused: \S*\.metadata asks for (posix|os)\.system, which no checkpoint"
        ):
            read()
    assert not trace.exists()
    pickle.loads(table)
    assert trace.exists(), "it is as harmful as it claims to be"


def test_a_table_may_not_reach_beyond_what_it_is_made_of(alone, folder):
    """Neither torch's own functions nor a class beside those of a table."""
    for name in (
        b"ctorch\nload\n.",
        b"ctorch.distributed.checkpoint.filesystem\nFileSystemWriter\n.",
        b"cbuiltins\neval\n.",
    ):
        (folder / ".metadata").write_bytes(name)
        with pytest.raises(ValueError, match=r"asks for .*, which no checkpoint needs; nothing was run"):
            TrainingState.read(folder, alone)


def test_an_optimizer_of_other_groups_is_refused(alone, saver, tmp_path):
    state = train(make(alone, "ddp", ema=False))
    whole = state.file_content(Namespace(lr=1))
    whole["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(whole, tmp_path / "a.pt")
    got = make(alone, "fsdp", ema=False)
    with pytest.raises(ValueError, match=r"a\.pt: its optimizer has groups of \[\d+, 5\] tensors, this model's has \["):
        got.take(got.read(tmp_path / "a.pt", alone), 8)
