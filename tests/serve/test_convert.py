"""A checkpoint as vLLM's folder: what is in it, made once, by several processes at once, and made anew where it is damaged."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest
import safetensors.torch
import torch

from autoregressive.models.gpt import GPT_models
from autoregressive.pipeline import load_gpt
from autoregressive.serve import convert
from autoregressive.serve.convert import CONFIG_FILE, WEIGHTS_FILE, is_whole, model_folder, read_config
from autoregressive.serve.plugin import ARCHITECTURE
from tests.helpers import ROOT, randomize


@pytest.fixture(scope="module")
def t2i_file(tmp_path_factory):
    shape = {"vocab_size": 64, "block_size": 64, "cls_token_num": 120, "caption_dim": 32, "model_type": "t2i"}
    path = tmp_path_factory.mktemp("text") / "t2i.pt"
    args = Namespace(gpt_model="GPT-XS", gpt_type="t2i", image_size=32, downsample_size=4)
    gpt = randomize(GPT_models["GPT-XS"](**shape), seed=4).state_dict()
    torch.save({"model": gpt, "optimizer": {}, "steps": 7, "args": args}, path)
    return path


def test_a_class_conditional_file(small_files, tmp_path):
    folder = model_folder(small_files.gpt, dtype=torch.float32, cache=tmp_path)
    config, weights = read_config(folder), safetensors.torch.load_file(folder / WEIGHTS_FILE)
    assert config["architectures"] == [ARCHITECTURE] and config["model_type"] == "llama"
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (8, 8, 32)
    assert (config["vocab_size"], config["max_position_embeddings"], config["image_size"]) == (64 + 11, 65, 32)
    gpt = load_gpt(small_files.gpt)
    classes = gpt.cls_embedding.embedding_table.weight
    assert torch.equal(weights["embed.weight"], torch.cat([gpt.tok_embeddings.weight, classes]))
    assert torch.equal(weights["null_condition"], classes[10:])
    assert torch.equal(weights["layers.2.attention.wqkv.weight"], gpt.layers[2].attention.wqkv.weight)
    assert not list(tmp_path.glob(".*")) and folder.stat().st_mode & 0o777 == 0o755


def test_a_text_conditional_file(t2i_file, tmp_path):
    folder = model_folder(t2i_file, dtype=torch.bfloat16, cache=tmp_path)
    config, weights = read_config(folder), safetensors.torch.load_file(folder / WEIGHTS_FILE)
    assert (config["vocab_size"], config["max_position_embeddings"], config["prefix"]) == (64 + 1, 120 + 64, 120)
    assert config["rope_parameters"]["mrope_section"] == [16, 0, 0]
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    gpt = load_gpt(t2i_file, dtype=torch.bfloat16)
    null = gpt.cls_embedding(torch.zeros(1, 120, 32), drop=torch.tensor([True]))[0]
    torch.testing.assert_close(weights["null_condition"], null)
    assert torch.equal(weights["caption.fc1"], gpt.cls_embedding.cap_proj.fc1.weight)


def test_made_once_and_anew_where_it_must_be(small_files, tmp_path, monkeypatch):
    file = tmp_path / "gpt.pt"
    file.write_bytes(small_files.gpt.read_bytes())
    first = model_folder(file, dtype=torch.float32, cache=tmp_path / "cache")
    written = (first / WEIGHTS_FILE).stat().st_mtime_ns
    assert model_folder(file, dtype=torch.float32, cache=tmp_path / "cache") == first
    assert (first / WEIGHTS_FILE).stat().st_mtime_ns == written
    other = model_folder(file, dtype=torch.bfloat16, cache=tmp_path / "cache")
    smaller = model_folder(small_files.bare, image_size=64, downsample_size=8, cache=tmp_path / "cache")
    os.utime(file, ns=(1, 1))
    newer = model_folder(file, dtype=torch.float32, cache=tmp_path / "cache")
    assert len({first, other, smaller, newer}) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert tmp_path / "home" in model_folder(file).parents


@pytest.mark.parametrize("damage", ["cut", "no weights", "no config", "half a config", "of another version", "a file"])
def test_a_damaged_folder_is_made_anew(damage, small_files, tmp_path):
    folder = model_folder(small_files.gpt, dtype=torch.float32, cache=tmp_path)
    whole = (folder / WEIGHTS_FILE).read_bytes()
    config = (folder / CONFIG_FILE).read_text()
    if damage == "cut":
        (folder / WEIGHTS_FILE).write_bytes(whole[:1000])
    elif damage == "no weights":
        (folder / WEIGHTS_FILE).unlink()
    elif damage == "no config":
        (folder / CONFIG_FILE).unlink()
    elif damage == "half a config":
        (folder / CONFIG_FILE).write_text(config[:100])
    elif damage == "of another version":
        (folder / CONFIG_FILE).write_text(json.dumps(json.loads(config) | {"image_gpt_format": 0}))
    else:
        os.rename(folder, tmp_path / "aside")
        folder.write_text("")
    assert not is_whole(folder)
    assert model_folder(small_files.gpt, dtype=torch.float32, cache=tmp_path) == folder
    assert (folder / WEIGHTS_FILE).read_bytes() == whole and (folder / CONFIG_FILE).read_text() == config
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_several_processes_at_once(small_files, tmp_path):
    script = (
        "import sys, torch\n"
        "from autoregressive.serve.convert import is_whole, model_folder\n"
        "folder = model_folder(sys.argv[1], dtype=torch.float32, cache=sys.argv[2])\n"
        "assert is_whole(folder)\n"
        "print(folder)\n"
    )
    command = [sys.executable, "-c", script, str(small_files.gpt), str(tmp_path)]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0] * 3
    assert [str(path) for path in tmp_path.iterdir()] == list(folders)


def test_a_process_that_comes_second_takes_the_first_ones(small_files, tmp_path, monkeypatch):
    gpt = load_gpt(small_files.gpt)
    folder = model_folder(small_files.gpt, dtype=torch.float32, cache=tmp_path)
    before = (folder / WEIGHTS_FILE).stat().st_ino
    convert._place(folder, gpt, torch.float32, 32, "gpt.pt")
    assert (folder / WEIGHTS_FILE).stat().st_ino == before
    assert list(tmp_path.iterdir()) == [folder]


def test_what_is_refused(small_files, tmp_path):
    with pytest.raises(ValueError, match=r"predicts 4 tokens a step.*vLLM decodes one token a step.*--engine native"):
        model_folder(small_files.par, cache=tmp_path)
    with pytest.raises(ValueError, match="--gpt-model"):
        model_folder(small_files.gpt, cache=tmp_path, gpt_model="GPT-L")
    with pytest.raises(FileNotFoundError):
        model_folder(tmp_path / "nothing.pt", cache=tmp_path)
    (tmp_path / "closed").write_text("")
    with pytest.raises(OSError, match="XDG_CACHE_HOME"):
        model_folder(small_files.gpt, cache=tmp_path / "closed" / "in")
    with pytest.raises(ValueError, match="is not of this version"):
        (tmp_path / CONFIG_FILE).write_text("{}")
        read_config(tmp_path)
