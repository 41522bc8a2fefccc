"""Codes, tokenizers, classes and GPTs that do not belong together are refused, with both names; those that do go together."""

import json
from pathlib import Path

import pytest
import torch

from autoregressive.hub import TransformerHF
from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.serve.convert import model_folder, read_config
from autoregressive.train import extract_codes_c2i, train_c2i
from dataset.codes import open_codes
from tests.helpers import randomize
from tests.training import make_images, quiet_loggers, run_folder, run_here
from tokenizer.tokenizer_image.fingerprint import tokenizer_fingerprint
from tokenizer.tokenizer_image.load import load_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models
from tools import export_checkpoint, push_gpt_to_hf
from utils.checkpoint import read_checkpoint

NAMES = ["class1", "class2", "class10"]
EXTRACT = ["--vq-model", "VQ-4", "--image-size", 16, "--num-workers", 0, "--shard-size", 4, "--device", "cpu"]
TRAIN = ["--gpt-model", "GPT-XS", "--image-size", 16, "--downsample-size", 4, "--global-batch-size", 4]
TRAIN += ["--num-workers", 0, "--mixed-precision", "none", "--max-steps", 1, "--device", "cpu"]
SAMPLE = ["--gpt-model", "GPT-XS", "--vq-model", "VQ-4", "--image-size", 16, "--downsample-size", 4, "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread():
    with quiet_loggers():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Images of three classes, two tokenizers of equal shape, codes by the first, a run on them."""
    folder = tmp_path_factory.mktemp("home")
    make_images(folder / "images", classes=3, per_class=3, size=20)
    for label in (2, 1, 0):
        (folder / "images" / f"class{label}").rename(folder / "images" / NAMES[label])
    for name, seed in (("a.pt", 1), ("b.pt", 2)):
        torch.save({"model": randomize(VQ_models["VQ-4"](codebook_size=64), seed=seed).state_dict()}, folder / name)
    with quiet_loggers():
        extract(folder, "a.pt", folder / "codes")
        train(folder / "codes", folder / "run")
    return folder


def extract(home, tokenizer, target, *more, images="images"):
    run_here(
        extract_codes_c2i,
        *("--data-path", home / images, "--vq-ckpt", home / tokenizer, "--code-path", target, *EXTRACT, *more),
    )
    return target


def train(codes, results, *more):
    run_here(train_c2i, "--code-path", codes, "--results-dir", results, *TRAIN, *more)
    return results


def fingerprint(path) -> str:
    return tokenizer_fingerprint(load_tokenizer(path))


def edit_index(folder, file="index.json", **values):
    """The record as if it had been written so; None removes an entry."""
    record = json.loads((folder / file).read_text())
    record |= values
    record = {key: value for key, value in record.items() if key != "images" or value is not None}
    (folder / file).write_text(json.dumps(record))
    return folder


# What is recorded


def test_training_records_tokenizer_classes_and_codes(home):
    saved = read_checkpoint(next((run_folder(home / "run") / "checkpoints").glob("*.pt")))
    assert saved.config["version"] == 1 and saved.config["tokenizer"] == fingerprint(home / "a.pt")
    assert saved.config["classes"] == NAMES
    assert saved.config["codes"] == open_codes(home / "codes", 16, 4).identity()
    assert saved.args["num_classes"] == 3 and saved.args["vocab_size"] == 64  # no flag said so
    assert saved.model["cls_embedding.embedding_table.weight"].shape[0] == 4


def test_training_prints_the_classes_once(home, tmp_path, capfd):
    train(home / "codes", tmp_path)
    assert capfd.readouterr().out.count("classes: 0 class1, 1 class2, 2 class10") == 1


# Sampling


@pytest.mark.parametrize("script", [sample_c2i, sample_c2i_ddp])
def test_sampling_by_another_tokenizer_is_refused(home, tmp_path, script):
    more = (
        ["--output", tmp_path / "x.png"] if script is sample_c2i else ["--sample-dir", tmp_path, "--num-fid-samples", 2]
    )
    run_here(script, "--gpt-ckpt", home / "run", "--vq-ckpt", home / "a.pt", *SAMPLE, *more)
    a, b = fingerprint(home / "a.pt"), fingerprint(home / "b.pt")
    with pytest.raises(ValueError, match=rf"b\.pt is the tokenizer {b}, and the codes are of the tokenizer {a}"):
        run_here(script, "--gpt-ckpt", home / "run", "--vq-ckpt", home / "b.pt", *SAMPLE, *more)


def test_pipeline_of_another_tokenizer_is_refused(home):
    gpt = load_gpt(next((run_folder(home / "run") / "checkpoints").glob("*.pt")), image_size=16)
    with pytest.raises(ValueError, match=r"speaks the codes of the tokenizer .*, and the tokenizer given is"):
        ImagePipeline(gpt, load_tokenizer(home / "b.pt"))
    with pytest.raises(ValueError, match=r"b\.pt is the tokenizer"):
        ImagePipeline.from_pretrained(home, gpt=home / "run", vq=home / "b.pt")
    gpt.file_config = {}  # as in files of the first edition
    ImagePipeline(gpt, load_tokenizer(home / "b.pt"))


def test_sampling_prints_and_takes_the_names_of_classes(home, tmp_path, capsys):
    words = ["--gpt-ckpt", home / "run", "--vq-ckpt", home / "a.pt", *SAMPLE, "--output", tmp_path / "x.png"]
    run_here(sample_c2i, *words, "--labels", "class10", 0)
    assert "classes: 2: class10, 0: class1\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no class is called 'class3'"):
        run_here(sample_c2i, *words, "--labels", "class3")


# Exports


def test_exports_keep_the_record(home, tmp_path):
    path = next((run_folder(home / "run") / "checkpoints").glob("*.pt"))
    config = read_checkpoint(path).config
    for kind, suffix in (("pt", ".pt"), ("safetensors", ".safetensors")):
        run_here(export_checkpoint, "--checkpoint", path, "--format", kind, "--output", tmp_path / f"x{suffix}")
        assert read_checkpoint(tmp_path / f"x{suffix}").config == config
    words = [
        "--gpt-ckpt",
        path,
        "--gpt-model",
        "GPT-XS",
        "--image-size",
        16,
        "--downsample-size",
        4,
        "--precision",
        "none",
    ]
    run_here(push_gpt_to_hf, *words, "--output", tmp_path / "hub")
    assert TransformerHF.from_pretrained(tmp_path / "hub").file_config == config
    assert "0 class1, 1 class2, 2 class10" in (tmp_path / "hub" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"b\.pt is the tokenizer"):
        run_here(push_gpt_to_hf, *words, "--vq-ckpt", home / "b.pt", "--vq-model", "VQ-4", "--output", tmp_path / "no")
    served = model_folder(path, image_size=16, downsample_size=4, dtype=torch.float32, cache=tmp_path / "cache")
    assert read_config(served)["origin"] == config
