"""tools/export_checkpoint.py: every format from every kind of source, read back and loaded as scripts that sample do."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from autoregressive.models.gpt import GPT_models
from autoregressive.pipeline import load_gpt
from tests.training import load, run_here, same
from tools import export_checkpoint
from utils.checkpoint import read_checkpoint
from utils.distributed import start
from utils.runs import Run
from utils.training.ema import EMA
from utils.training.optim import adamw
from utils.training.parallel import Parallel, SeededNormal, materialize
from utils.training.state import Saver, TrainingState

pytestmark = pytest.mark.slow  # through whole scripts and servers

FLAGS = {"gpt_model": "GPT-XS", "image_size": 32, "downsample_size": 8, "num_classes": 10, "lr": 0.01}
RUN = "000-GPT-XS/checkpoints"


class Silent:
    def info(self, message):
        pass

    warning = info


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results/000-GPT-XS with 0000003 (shards) and shards of the same state as a file, plain.pt. Read-only."""
    folder = tmp_path_factory.mktemp("results")
    dist = start("cpu", group=True)
    args = Namespace(**FLAGS, weight_decay=0.0, beta1=0.9, beta2=0.95, keep_last=0)
    try:
        for strategy in ("fsdp", "ddp"):
            with torch.device("meta"):
                model = GPT_models["GPT-XS"](vocab_size=64, block_size=16, num_classes=10)
            Parallel(dist, strategy).apply(model, blocks=model.layers)
            materialize(model, dist.device, 0)
            ema = EMA(model, 0.5)
            with torch.no_grad():
                SeededNormal(9)(model.output.weight, 0.1)
            ema.update()
            optimizers = {"optimizer": (model, adamw(model, args))}
            state = TrainingState({"model": model}, optimizers, ema, torch.amp.GradScaler("cpu", enabled=False))
            state.step, state.samples_seen = 3, 24
            saver = Saver(state, Run(folder, (folder / RUN,)), args, dist, Silent())
            saver.save()
            saver.wait(final=True)
            saver.finish()
    finally:
        dist.close()
    (folder / RUN / "0000003.pt").rename(folder / "plain.pt")
    (folder / RUN).mkdir(exist_ok=True)
    return folder


@pytest.fixture
def copy(results, tmp_path):
    """A copy to write into: the sources by what they are called below."""
    folder = Path(shutil.copytree(results, tmp_path / "results"))
    return {
        "a folder": folder / RUN / "0000003",
        "a file": folder / "plain.pt",
        "a run": folder / "000-GPT-XS",
        "results": folder,
    }


@pytest.fixture(scope="module")
def expected(results):
    """The state dicts "model" and "ema"."""
    return load(results / "plain.pt")


def export(source, format, *more):
    run_here(export_checkpoint, "--checkpoint", source, "--format", format, *more)


@pytest.mark.parametrize("averaged", [False, True], ids=["", "averaged"])
@pytest.mark.parametrize("source", ["a folder", "a file", "a run"])
def test_every_format(copy, expected, tmp_path, source, averaged):
    weights = expected["ema" if averaged else "model"]
    assert not same(expected["ema"], expected["model"])
    for format, suffix in (("pt", ".pt"), ("consolidated", ".pth"), ("safetensors", ".safetensors")):
        target = tmp_path / f"out{suffix}"
        export(copy[source], format, "--output", target, *(["--use-ema"] if averaged else []))
        got = read_checkpoint(target)
        assert same(dict(sorted(got.model.items())), dict(sorted(weights.items())))
        assert got.format == {"pt": "ddp", "consolidated": "fsdp", "safetensors": "safetensors"}[format]
        if format == "consolidated":
            assert list(load(target)) == list(weights), "a bare state dict"
            continue
        assert got.steps == 3 and got.args["image_size"] == 32 and got.args["keep_last"] == 0
        if format == "pt":
            assert same(got.ema, None if averaged else expected["ema"]) and got.optimizer is None
            assert isinstance(load(target)["args"], Namespace)


@pytest.mark.parametrize("source", ["a folder", "a file"])
@pytest.mark.parametrize("format", ["consolidated", "safetensors"])
def test_exports_are_loaded_for_sampling(copy, tmp_path, source, format):
    """They draw what the checkpoint itself draws."""
    tokens, labels = torch.arange(15)[None], torch.tensor([4])
    expected = load_gpt(copy["a file"])(tokens, labels)
    assert expected.std() > 0.01
    target = tmp_path / f"out{export_checkpoint.SUFFIX[format]}"
    export(copy[source], format, "--output", target)
    size = {} if format == "safetensors" else {"image_size": 32, "downsample_size": 8}  # a bare state says neither
    model = load_gpt(target, **size)
    assert model.args.block_size == 16 and torch.equal(model(tokens, labels), expected)


def test_a_folder_s_consolidated_weights_know_their_flags(copy, expected):
    """Also where they were not written beside the shards, or were lost."""
    folder = copy["a folder"]
    for file in folder.glob("consolidated*.pth"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"export_checkpoint\.py"):
        load_gpt(folder)
    export(folder, "consolidated")
    export(folder, "consolidated", "--use-ema")
    assert same(load(folder / "consolidated.pth"), expected["model"])
    tokens, labels = torch.arange(15)[None], torch.tensor([4])
    for averaged in (False, True):
        model = load_gpt(folder, use_ema=averaged)
        assert torch.equal(model(tokens, labels), load_gpt(copy["a file"], use_ema=averaged)(tokens, labels))


@pytest.mark.parametrize(
    "source, format, more, written",
    [
        ("a folder", "pt", [], f"{RUN}/0000003-export.pt"),
        ("a folder", "safetensors", [], f"{RUN}/0000003.safetensors"),
        ("a folder", "consolidated", ["--use-ema"], f"{RUN}/0000003/consolidated_ema.pth"),
        ("a run", "safetensors", ["--use-ema"], f"{RUN}/0000003-ema.safetensors"),
        ("results", "safetensors", [], f"{RUN}/0000003.safetensors"),
        ("a file", "consolidated", [], "plain.pth"),
        ("a file", "pt", ["--use-ema"], "plain-ema-export.pt"),
    ],
)
def test_where_an_export_goes(copy, capsys, source, format, more, written):
    target = copy["results"] / written
    target.unlink(missing_ok=True)
    export(copy[source], format, *more)
    assert read_checkpoint(target).model
    assert capsys.readouterr().out.startswith(f"{target}: {sum(t.numel() for t in load_weights(target)):,} numbers of ")
    names = {path.name for path in (copy["a run"] / "checkpoints").iterdir()} - {target.name}
    assert names == {"0000003"}, "nothing that could pass for a checkpoint of the run"


def load_weights(path):
    return read_checkpoint(path).model.values()


def test_into_a_folder_that_is_there(copy, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for format in ("pt", "consolidated", "safetensors"):
        export(copy["a folder"], format, "--output", out)
    assert sorted(os.listdir(out)) == ["0000003-export.pt", "0000003.safetensors", "consolidated.pth"]


def test_the_source_is_not_overwritten(copy):
    folder, file = copy["a folder"], copy["a file"]
    alone = file.with_name("alone")
    alone.mkdir()
    (folder / "consolidated.pth").rename(alone / "consolidated.pth")
    for source, more in (
        (file, ["pt", "--output", file]),
        (file, ["consolidated", "--output", file.parent / "." / file.name]),
        (alone, ["consolidated"]),
        (alone / "consolidated.pth", ["consolidated"]),
    ):
        before = {path: path.stat().st_mtime_ns for path in file.parent.rglob("*")}
        with pytest.raises(ValueError, match="is the checkpoint itself: give another --output"):
            export(source, *more)
        assert {path: path.stat().st_mtime_ns for path in file.parent.rglob("*")} == before


def test_no_average(copy, tmp_path):
    export(copy["a file"], "consolidated", "--output", tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"bare\.pth has no averaged weights; leave out --use-ema"):
        export(tmp_path / "bare.pth", "pt", "--use-ema")


def test_what_the_source_does_not_say_is_left_out(copy, tmp_path):
    torch.save({"model": load(copy["a file"])["model"], "steps": 9}, tmp_path / "a.pt")
    export(tmp_path / "a.pt", "safetensors")
    got = read_checkpoint(tmp_path / "a.safetensors")
    assert got.steps == 9 and got.args is None


@pytest.mark.parametrize("source", ["a folder", "a file"])
def test_damage_is_not_passed_on(copy, tmp_path, source):
    file = copy[source] / "__0_0.distcp" if copy[source].is_dir() else copy[source]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*checksum"):
        export(copy[source], "safetensors", "--output", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
