"""Every published layout at a small size, files that are not what they seem, and flags that do not fit."""

import argparse
import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.helpers import golden_state, load_golden
from tests.tokenizer.taming import lightning_class, save_lightning
from tests.utils.test_files import largest_file
from utils.checkpoint import load_into, read_checkpoint, save_checkpoint, save_safetensors


def golden(name: str) -> dict[str, torch.Tensor]:
    meta = load_golden(name)[1]
    return golden_state(meta["state_dict"], meta["config"]["seed"])


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return golden("c2i")


class Tree(torch.nn.Module):
    """A module with the given state-dict names."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in state.items():
            *folders, leaf = name.split(".")
            module: torch.nn.Module = self
            for folder in folders:
                if folder not in module._modules:
                    module.add_module(folder, torch.nn.Module())
                module = module._modules[folder]
            module.register_parameter(leaf, torch.nn.Parameter(torch.zeros_like(tensor), requires_grad=False))


def assert_same(actual: dict, expected: dict) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


# Layouts


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_ddp(tmp_path, state, suffix, zipped):
    path = tmp_path / ("a" + suffix)
    ema = {name: tensor + 1 for name, tensor in state.items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], fused=False).state_dict()
    args = argparse.Namespace(gpt_model="GPT-B", image_size=384, lr=1e-4, ema=True, note=None)
    content = {"model": state, "optimizer": optimizer, "steps": 50, "args": args, "ema": ema, "discriminator": {"d": 1}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    got = read_checkpoint(path)
    assert (got.path, got.format, got.steps, got.args) == (path, "ddp", 50, vars(args))
    assert got.extra == {"discriminator": {"d": 1}}
    assert got.optimizer["param_groups"] == optimizer["param_groups"]
    assert_same(got.model, state)
    assert_same(got.ema, ema)
    assert_same(read_checkpoint(path, prefer_ema=True, mmap=False).model, ema)


@pytest.mark.parametrize(
    ("content", "layout", "steps"),
    [
        (lambda s: {"model": prefixed(s, "module."), "optimizer": {}, "steps": 1, "args": None}, "ddp", 1),
        (lambda s: {"model": prefixed(s, "_orig_mod."), "steps": 2}, "ddp", 2),
        (lambda s: {"model": prefixed(s, "module._orig_mod."), "steps": 2}, "ddp", 2),
        (lambda s: {"model": prefixed(s, "_orig_mod.module."), "steps": 2}, "ddp", 2),
        (lambda s: {"module": s, "global_steps": 3}, "deepspeed", 3),
        (lambda s: {"state_dict": prefixed(s, "model."), "global_step": 4, "epoch": 1}, "lightning", 4),
        (lambda s: {"state_dict": s}, "lightning", None),
        (lambda s: s, "fsdp", None),
        (lambda s: {n.replace("layers.1.", "layers.1._fsdp_wrapped_module."): t for n, t in s.items()}, "fsdp", None),
        (lambda s: {n.replace("layers.1.", "layers.1._orig_mod."): t for n, t in s.items()}, "fsdp", None),
        (lambda s: {**s, "freqs_cis": torch.zeros(2)}, "fsdp", None),
        (lambda s: {"model": {**prefixed(s, "module."), "module.freqs_cis": torch.zeros(2)}}, "tokenizer", None),
        (lambda s: {"model": s}, "tokenizer", None),
        (lambda s: {"ema": s}, "tokenizer", None),
        (lambda s: {"model": s, "ema": None}, "tokenizer", None),
    ],
)
def test_layouts_and_prefixes(tmp_path, state, content, layout, steps):
    torch.save(content(state), tmp_path / "a.pt")
    got = read_checkpoint(tmp_path / "a.pt")
    assert (got.format, got.steps) == (layout, steps)
    assert_same(got.model, state)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_lightning_file_with_its_callbacks(tmp_path, state, zipped):
    """Their state is kept under Lightning's class itself: its name is read, Lightning is not needed."""
    got = read_checkpoint(save_lightning(tmp_path / "last.ckpt", state, zipped))
    assert (got.format, got.steps) == ("lightning", 3456)
    assert_same(got.model, state)
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "name", ["pytorch_lightning.callbacks.model_checkpoint.Other", "another.callbacks.model_checkpoint.ModelCheckpoint"]
)
def test_other_classes_in_a_lightning_file_stay_refused(tmp_path, state, name, zipped):
    with lightning_class(name) as other:
        save_lightning(tmp_path / "last.ckpt", state, zipped, more={other: 1})
    with pytest.raises(ValueError, match=rf"refused: .*last\.ckpt asks to run {re.escape(name)}"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_code_behind_lightnings_callback_is_refused(tmp_path, state):
    save_lightning(tmp_path / "last.ckpt", state, hyper_parameters=Harmful(tmp_path / "trace"))
    with pytest.raises(ValueError, match=r"refused: .*last\.ckpt asks to run \w+\.mkdir while loading"):
        read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "trace").exists()


def test_folders(tmp_path, state):
    folder = tmp_path / "0005000"
    folder.mkdir()
    (folder / "optimizer.00000-of-00002.pth").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"0005000 is a folder without .* it holds: optimizer\.00000"):
        read_checkpoint(folder)
    torch.save(state, folder / "consolidated.pth")
    got = read_checkpoint(folder)
    assert (got.format, got.path) == ("fsdp", folder / "consolidated.pth")
    assert_same(got.model, state)
    pushed = tmp_path / "pushed"
    save_safetensors(pushed / "model.safetensors", state)
    assert_same(dict(sorted(read_checkpoint(pushed).model.items())), dict(sorted(state.items())))
    with pytest.raises(FileNotFoundError, match="it holds: nothing"):
        empty = tmp_path / "empty"
        empty.mkdir()
        read_checkpoint(empty)


def consolidated(folder: Path, state: dict, **files: str) -> Path:
    """A sharded run's step folder as far as sampling is concerned: the weights, and files of text beside them."""
    save_checkpoint(folder / "consolidated.pth", state)
    for name, text in files.items():
        (folder / name.replace("_json", ".json")).write_text(text)
    return folder


@pytest.mark.parametrize("whole", [False, True], ids=["mapped", "compared"])
def test_consolidated_weights_have_their_average_and_flags_beside_them(tmp_path, state, whole):
    record = '{"steps": 7, "samples_seen": 56, "args": {"image_size": 384, "gpt_model": "GPT-B"}}'
    folder = consolidated(tmp_path / "0000007", state, training_json=record)
    ema = {name: tensor + 1 for name, tensor in state.items()}
    save_checkpoint(folder / "consolidated_ema.pth", ema)
    for path in (folder, folder / "consolidated.pth"):
        got = read_checkpoint(path, mmap=not whole)
        assert (got.path, got.format, got.steps) == (folder / "consolidated.pth", "fsdp", 7)
        assert got.args == {"image_size": 384, "gpt_model": "GPT-B"}
        assert_same(got.model, state)
        assert_same(got.ema, ema)
        assert_same(read_checkpoint(path, prefer_ema=True, mmap=not whole).model, ema)
    alone = read_checkpoint(folder / "consolidated_ema.pth")
    assert_same(alone.model, ema)
    assert alone.ema is None and alone.args is None


@pytest.mark.parametrize("text", ["", '{"steps": 7}', '{"steps": null, "args": {}}'])
def test_a_damaged_record_beside_consolidated_weights_is_named(tmp_path, state, text):
    folder = consolidated(tmp_path / "a", state, training_json=text)
    with pytest.raises(ValueError, match=r"training\.json is damaged or not a checkpoint"):
        read_checkpoint(folder)


def test_shards_without_consolidated_weights_say_how_to_get_them(tmp_path):
    folder = tmp_path / "0000007"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"tools/export_checkpoint\.py --checkpoint \S*0000007 --format consol"):
        read_checkpoint(folder)


def test_one_flipped_byte_is_found_where_the_whole_file_is_compared(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"model": {"a": torch.full((1000,), 1.5)}})
    content = bytearray(path.read_bytes())
    content[content.find(torch.full((100,), 1.5).numpy().tobytes()) + 50] ^= 1
    path.write_bytes(content)
    assert read_checkpoint(path).model["a"].sum() != 1500, "reading as needed compares nothing"
    with pytest.raises(ValueError, match=r"a\.pt is damaged .*: the checksum of \S+ differs"):
        read_checkpoint(path, mmap=False)


def test_safetensors_keep_flags_and_steps(tmp_path, state):
    torch.save({"model": prefixed(state, "module."), "steps": 1}, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt").model
    flags = argparse.Namespace(image_size=384, path=Path("x"))
    save_safetensors(tmp_path / "a.safetensors", read, {"args": flags, "steps": 7, "note": "n"})
    got = read_checkpoint(tmp_path / "a.safetensors")
    assert (got.format, got.steps) == ("safetensors", 7)
    assert got.args == {"image_size": 384, "path": "x"}
    assert got.extra == {"format": "pt", "note": "n"}
    assert set(got.model) == set(state)
    assert all(torch.equal(got.model[name], state[name]) for name in state)


def test_a_pickle_called_safetensors_is_refused(tmp_path, state):
    torch.save({"model": state}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "a.safetensors")


# Files that are not what they seem


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "c2i_L_384.pt").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*c2i_L_386\.pt; that folder has c2i_L_384\.pt$"):
        read_checkpoint(tmp_path / "c2i_L_386.pt")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere$"):
        read_checkpoint(tmp_path / "nowhere" / "a.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(FileNotFoundError, match=r"link\.pt is a link to .*gone\.pt, which does not exist"):
        read_checkpoint(tmp_path / "link.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [1, 40, 0.6, -1])
def test_truncated_files(tmp_path, state, kind, kept):
    path = tmp_path / "whole"
    if kind == "safetensors":
        save_safetensors(path, state)
    else:
        torch.save({"model": state, "steps": 1}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    cut = whole[: kept if isinstance(kept, int) else int(kept * len(whole))]
    path.write_bytes(cut)
    expected = rf"whole is damaged or not a checkpoint \({len(cut):,} bytes\): .*Download or copy it again"
    with pytest.raises(ValueError, match=expected):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1371234567\n",
            r"Git LFS pointer \(13\d bytes\), not the weights of 1,371,234,567 bytes: run `git lfs pull`",
        ),
        (b"<!DOCTYPE html><html><head>", "is a web page"),
        (b"\n  <HTML>", "is a web page"),
        (b'{"error": "Repository not found"}', "damaged or not a checkpoint"),
        (b"PK\x03\x04 but not a zip", "damaged or not a checkpoint"),
        (bytes(range(256)) * 9, "damaged or not a checkpoint"),
        (pickle.dumps({"a": 1}, protocol=2), "damaged or not a checkpoint"),
    ],
)
def test_files_that_are_no_weights(tmp_path, content, expected):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=expected) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert "a.pt" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "holds no weights: .* and found nothing"),
        ({"model": {}, "steps": 3}, r"found model \(dict\), steps \(int\)"),
        ({"model": {"a": torch.zeros(1), "b": 1}}, r"found model \(dict\)"),
        ([torch.zeros(1)], "its content is a list"),
        (torch.zeros(1), "its content is a Tensor"),
        ({0: torch.zeros(1)}, r"found 0 \(Tensor\)"),
        ({"module.a": torch.zeros(1), "module._orig_mod.a": torch.zeros(1)}, "have the same name"),
    ],
)
def test_files_without_weights(tmp_path, content, expected):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=expected):
        read_checkpoint(tmp_path / "a.pt")


def test_safetensors_without_tensors_or_with_odd_metadata(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {})
    with pytest.raises(ValueError, match="holds no tensors"):
        read_checkpoint(tmp_path / "a.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", {"args": "{oops"})
    with pytest.raises(ValueError, match=r"b\.safetensors: its metadata"):
        read_checkpoint(tmp_path / "b.safetensors")


class Harmful:
    """Creates a file when it is unpickled by a reader that runs what it is told to."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["zip", "legacy", "raw"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, how):
    path, trace = tmp_path / "a.pt", tmp_path / "trace"
    content = {"model": {"a": torch.zeros(1)}, "x": Harmful(trace)}
    if how == "raw":
        path.write_bytes(pickle.dumps({"x": Harmful(trace)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"refused: .*a\.pt asks to run \w+\.mkdir while loading|a\.pt is damaged"):
        read_checkpoint(path)
    assert not trace.exists()
    # The file is as harmful as it claims to be.
    if how == "zip":
        torch.load(path, weights_only=False)
        assert trace.is_dir()


# Into a model


def test_load_into(state):
    model = Tree(state)
    parameter = model.get_parameter("norm.weight")
    load_into(model, state, "a.pt")
    assert model.get_parameter("norm.weight") is parameter
    assert_same(dict(model.state_dict()), state)


def test_load_into_a_model_without_memory(state):
    with torch.device("meta"):
        model = Tree({name: tensor.to("meta") for name, tensor in state.items()})
    load_into(model, state, "a.pt")
    assert_same(dict(model.state_dict()), state)
    assert model.get_parameter("norm.weight").data_ptr() == state["norm.weight"].data_ptr()
    assert not model.get_parameter("norm.weight").requires_grad


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded(state):
    model = Tree(state)
    wrong = {name: tensor for name, tensor in state.items() if name != "norm.weight"}
    wrong |= {"extra.weight": torch.zeros(1), "output.weight": torch.zeros(95, 64)}
    with pytest.raises(ValueError) as caught:
        load_into(model, wrong, "runs/a.pt")
    assert str(caught.value).splitlines() == [
        "runs/a.pt does not fit the model:",
        "  missing (1): norm.weight",
        "  unexpected (1): extra.weight",
        "  other shape (1): output.weight (95, 64) (model: (96, 64))",
    ]
    assert not model.get_parameter("tok_embeddings.weight").any()


# What other programs write


@pytest.mark.parametrize("prefix", ["model.", "module.model.", "model._orig_mod."])
@pytest.mark.parametrize("entry", [None, "model", "model_state_dict", "ema_model"])
def test_read_checkpoint_of_wrapped_weights_gives_the_models_names(tmp_path, state, prefix, entry):
    wrapped = prefixed(state, prefix)
    content = {entry: wrapped, "epoch": 3} if entry else {**wrapped, f"{prefix}freqs_cis": torch.zeros(2)}
    torch.save(content, tmp_path / "a.pt")
    assert_same(read_checkpoint(tmp_path / "a.pt").model, state)


@pytest.mark.parametrize("outer, inner", [("model", "state_dict"), ("state_dict", "model"), ("module", "module")])
def test_read_checkpoint_of_a_model_within_a_model_gives_the_models_names(tmp_path, state, outer, inner):
    torch.save({outer: {inner: state, "epoch": 3}, "ema": {"model": {"a": torch.ones(1)}}}, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert_same(found.model, state)
    assert_same(found.ema, {"a": torch.ones(1)})


@pytest.mark.parametrize("name", ["ema_model", "model_ema", "ema_state_dict"])
def test_read_checkpoint_with_averages_of_another_name_knows_them(tmp_path, state, name):
    torch.save({"model": {key: value * 0 for key, value in state.items()}, name: state}, tmp_path / "a.pt")
    assert_same(read_checkpoint(tmp_path / "a.pt", prefer_ema=True).model, state)


@pytest.mark.parametrize("odd", [{"args": [1, 2]}, {"args": "GPT-B"}, {"steps": "many"}, {"steps": float("nan")}])
def test_read_checkpoint_with_an_odd_record_reads_the_weights(tmp_path, state, odd):
    torch.save({"model": state, **odd}, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert (found.args, found.steps) == (None, None)
    assert_same(found.model, state)


def test_load_into_of_whole_numbers_is_refused():
    with pytest.raises(ValueError, match="has whole numbers for weights"):
        load_into(torch.nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2).long()}, "a.pt")


def save_shards(folder: Path, state: dict, name: str, suffix: str, index: bool, metadata: dict | None = None) -> None:
    """Writes a state dict in three shards, as transformers and diffusers name them."""
    folder.mkdir()
    keys, where = list(state), {}
    for number in range(3):
        file = f"{name}-{number + 1:05d}-of-00003{suffix}"
        part = {key: state[key] for key in keys[number::3]}
        where |= dict.fromkeys(part, file)
        if suffix == ".safetensors":
            safetensors.torch.save_file(part, folder / file, metadata)
        else:
            torch.save(part, folder / file)
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
        (folder / f"{name}{suffix}.index.json").write_text(text)


SHARDED = [
    ("model", ".safetensors"),
    ("pytorch_model", ".bin"),
    ("diffusion_pytorch_model", ".safetensors"),
    ("diffusion_pytorch_model", ".bin"),
]


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name, suffix", SHARDED)
def test_read_checkpoint_of_shards_takes_folder_index_or_any_shard(tmp_path, state, name, suffix, prefix):
    folder = tmp_path / "sharded"
    save_shards(folder, prefixed(state, prefix), name, suffix, index=True)
    files = sorted(folder.glob(f"*{suffix}"))
    for given in (folder, folder / f"{name}{suffix}.index.json", *files):
        found = read_checkpoint(given)
        assert found.files == files and found.model.keys() == state.keys()
        assert_same({key: found.model[key] for key in state}, state)
    (folder / f"{name}{suffix}.index.json").unlink()
    assert read_checkpoint(folder).model.keys() == state.keys(), "their names tell that they belong together"


@pytest.mark.parametrize("name, suffix", SHARDED[:2])
def test_read_checkpoint_without_one_of_its_shards_names_it(tmp_path, state, name, suffix):
    save_shards(tmp_path / "a", state, name, suffix, index=True)
    absent = tmp_path / "a" / f"{name}-00002-of-00003{suffix}"
    absent.unlink()
    for given in (tmp_path / "a", tmp_path / "a" / f"{name}-00003-of-00003{suffix}"):
        with pytest.raises(FileNotFoundError, match=f"of 3 files, and these are not beside it: {absent.name}"):
            read_checkpoint(given)


def test_read_checkpoint_of_shards_that_repeat_a_weight_is_refused(tmp_path, state):
    save_shards(tmp_path / "a", state, "model", ".safetensors", index=False)
    second = tmp_path / "a" / "model-00002-of-00003.safetensors"
    safetensors.torch.save_file({next(iter(state)): torch.zeros(2)}, second)
    with pytest.raises(ValueError, match="another shard has too"):
        read_checkpoint(tmp_path / "a")


def test_read_checkpoint_of_an_index_of_other_shards_names_what_they_lack(tmp_path, state):
    save_shards(tmp_path / "a", state, "model", ".safetensors", index=True)
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("00002-of", "00001-of"))
    with pytest.raises(ValueError, match=f"which lack .*{list(state)[1]}"):
        read_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("content", ["[]", '{"weight_map": {}}', '{"weight_map": {"a": 7}}'])
def test_read_checkpoint_of_a_damaged_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        read_checkpoint(tmp_path)


def test_read_checkpoint_of_an_optimizer_says_so(tmp_path):
    torch.save(torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="is the state of an optimizer and holds no weights"):
        read_checkpoint(tmp_path / "optimizer.pt")


# Writing


def test_what_is_written_is_read(tmp_path, state):
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    path = tmp_path / "checkpoints" / "0000001.pt"
    content = {
        "model": state,
        "ema": state,
        "optimizer": optimizer.state_dict(),
        "steps": 1,
        "args": {"image_size": 256, "out": Path("x"), "betas": (0.9, 0.95)},
        "generators": {"cpu": torch.get_rng_state(), "draws": [1, (2.0, "3")]},
    }
    save_checkpoint(path, content)
    published = torch.load(path, weights_only=False)
    assert published["args"] == argparse.Namespace(image_size=256, out="x", betas=(0.9, 0.95))
    got = read_checkpoint(path)
    assert (got.format, got.steps, got.args) == ("ddp", 1, vars(published["args"]))
    assert got.extra["generators"]["draws"] == [1, (2.0, "3")]
    assert_same(got.model, state)
    assert_same(got.ema, state)
    optimizer.load_state_dict(got.optimizer)
    assert content["args"]["out"] == Path("x")


@pytest.mark.parametrize("value", [np.float64(1), Path("x"), Harmful(Path("x"))])
def test_what_could_not_be_read_is_not_written(tmp_path, value):
    with pytest.raises(TypeError, match=r"checkpoint\['optimizer'\]\['groups'\]\[0\] is a .*could not be read back"):
        save_checkpoint(tmp_path / "a.pt", {"model": {}, "optimizer": {"groups": [value]}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("save", [save_checkpoint, save_safetensors])
@pytest.mark.parametrize("limit", [0, 10_000])
def test_a_full_disk_keeps_the_last_good_file(tmp_path, save, limit):
    path = tmp_path / "0000001.pt"
    save(path, {"a": torch.ones(1)})
    with largest_file(limit), pytest.raises(OSError, match=r"could not write .*0000001\.pt .*before is untouched"):
        save(path, {"a": torch.zeros(100_000), "b": torch.zeros(100_000)})
    assert os.listdir(tmp_path) == ["0000001.pt"]
    assert read_checkpoint(path).model["a"].tolist() == [1]
