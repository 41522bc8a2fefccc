"""examples/lookup_free.py through the ordinary scripts: a new quantiser is one file, and survives its way through files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.pipeline import load_gpt
from autoregressive.sample import sample_c2i
from autoregressive.train import extract_codes_c2i, train_c2i
from dataset.codes import open_codes
from tests.examples.conftest import SAMPLE, SIZE
from tests.examples.conftest import TRAIN as GPT_TRAIN
from tests.helpers import ROOT
from tests.training import load, metrics, run_folder, run_here, same
from tokenizer.base import QUANTIZERS
from tokenizer.load import load_tokenizer
from tokenizer.tokenizer_image import reconstruction_vq_ddp, vq_demo, vq_train
from tokenizer.tokenizer_image.hub import VQModelHF
from tools import export_checkpoint, push_vae_to_hf
from utils.registry import import_file

pytestmark = pytest.mark.slow  # through whole scripts and servers

FILE = ROOT / "examples/lookup_free.py"
IMPORT = ["--import", FILE]
TRAIN = ["--vq-model", "VQ-4", "--image-size", SIZE, "--global-batch-size", 8, "--num-workers", 0, "--log-every", 1]
TRAIN += ["--mixed-precision", "none", "--perceptual-weight", 0, "--disc-weight", 0, "--lr", 1e-3, "--device", "cpu"]
LOOKUP_FREE = ["--quantizer", "lookup-free", "--codebook-size", 64, "--entropy-loss-ratio", 0.1]


def train(digits, results, *more):
    run_here(vq_train, "--data-path", digits / "images", "--results-dir", results, *TRAIN, *IMPORT, *more)
    return max((run_folder(results) / "checkpoints").glob("*.pt"))


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    flags = [*LOOKUP_FREE, "--max-steps", 4, "--ckpt-every", 2]
    return train(digits, tmp_path_factory.mktemp("lookup_free"), *flags)


@pytest.fixture
def pixels():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_codes_are_the_signs_of_the_latents():
    import_file(FILE)
    quantizer = QUANTIZERS["lookup-free"](8)
    codes = torch.arange(8).view(1, 2, 4)
    latents = quantizer.lookup(codes)
    assert latents.shape == (1, 3, 2, 4) and latents[0, :, 1, 2].tolist() == [-1, 1, 1]  # 6 = 0b110
    assert torch.equal(quantizer.nearest(0.1 * latents), codes)
    with pytest.raises(ValueError, match="--codebook-size 48 is no power of two"):
        QUANTIZERS["lookup-free"](48)


def test_file_says_its_quantiser_and_what_registers_it(trained):
    saved = load(trained)
    assert saved["config"]["quantizer"] == {"name": "lookup-free", "codebook_size": 64}
    assert str(FILE) in saved["config"]["imports"]
    assert (saved["args"].quantizer, saved["args"].codebook_size) == ("lookup-free", 64)
    assert not any(name.startswith("quantize.") for name in saved["model"])
    for line in metrics(trained.parents[2]):
        parts = line["reconstruction_loss"] + line["commit_loss"] + line["entropy_loss"]
        assert line["generator_loss"] == pytest.approx(parts, rel=1e-5) and "vq_loss" not in line
        assert 0 < line["codebook_usage"] <= 1


@pytest.fixture(scope="module")
def codes(digits, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    words = ["--vq-ckpt", trained, "--image-size", SIZE, *IMPORT, "--device", "cpu", "--num-workers", 0, "--no-flip"]
    run_here(extract_codes_c2i, *words, "--data-path", digits / "images", "--code-path", folder)
    return folder


def test_extracted_codes_are_of_its_tokenizer(trained, codes):
    settings = open_codes(codes, SIZE, 4).settings
    fingerprint = load_tokenizer(trained).fingerprint()
    assert (settings.codebook_size, settings.vq_model, settings.tokenizer) == (64, "VQ-4", fingerprint)


def test_gpt_of_its_codes_draws_with_it(trained, codes, tmp_path):
    words = [*GPT_TRAIN, "--max-steps", 1, "--results-dir", tmp_path, "--vq-ckpt", trained, *IMPORT]
    run_here(train_c2i, "--code-path", codes, *words)
    gpt = max((run_folder(tmp_path) / "checkpoints").glob("*.pt"))
    image = tmp_path / "sample.png"
    run_here(sample_c2i, "--gpt-ckpt", gpt, "--vq-ckpt", trained, *SAMPLE, *IMPORT, "--output", image)
    assert Image.open(image).width >= SIZE


def test_images_are_reconstructed(digits, trained, tmp_path, capsys):
    common = ["--vq-ckpt", trained, "--image-size", SIZE, *IMPORT, "--device", "cpu"]
    data = ["--data-path", digits / "images", "--num-workers", 0, "--sample-dir", tmp_path, "--image-size-eval", SIZE]
    run_here(reconstruction_vq_ddp, *common, *data, "--no-lpips", "--no-use-ema")
    (found,) = tmp_path.glob("*_results.json")
    assert found.name.startswith("VQ-4-imagenet-size-32-size-32-codebook-size-64-dim-6")
    assert json.loads(found.read_text())["codebook_size"] == 64
    assert np.load(found.with_name(found.name.replace("_results.json", ".npz")))["arr_0"].shape[1:] == (SIZE, SIZE, 3)
    run_here(vq_demo, *common, "--output-dir", tmp_path)
    assert "from 64 codes" in capsys.readouterr().out


def test_copies_in_other_formats_give_the_same_codes(trained, tmp_path, pixels):
    expected = load_tokenizer(trained)
    codes = expected.to_codes(pixels)
    for form in ("pt", "consolidated", "safetensors"):
        run_here(export_checkpoint, "--checkpoint", trained, "--format", form, "--output", tmp_path / form, *IMPORT)
    run_here(push_vae_to_hf, "--vq-ckpt", trained, "--output", tmp_path / "hub", *IMPORT)
    for copy in ("pt", "consolidated", "safetensors", "hub"):
        loaded = load_tokenizer(tmp_path / copy)
        assert loaded.fingerprint() == expected.fingerprint() and torch.equal(loaded.to_codes(pixels), codes)
    assert torch.equal(VQModelHF.from_pretrained(tmp_path / "hub").to_codes(pixels), codes)


def test_run_resumes_bit_identically_and_with_its_own_quantiser(digits, trained, tmp_path):
    train(digits, tmp_path, *LOOKUP_FREE, "--max-steps", 2)
    resumed = train(digits, tmp_path, "--entropy-loss-ratio", 0.1, "--max-steps", 4, "--resume")
    assert same(load(resumed)["model"], load(trained)["model"])
    with pytest.raises(
        ValueError, match=r"--quantizer vq: \S+ was trained with --quantizer lookup-free; leave the flag"
    ):
        train(digits, tmp_path, "--max-steps", 5, "--resume", "--quantizer", "vq")


def test_finetune_takes_the_quantiser_of_its_file(digits, trained, tmp_path):
    path = train(digits, tmp_path, "--finetune", "--vq-ckpt", trained, "--max-steps", 1, "--lr", 0)
    assert load(path)["config"]["quantizer"] == load(trained)["config"]["quantizer"]
    assert load_tokenizer(path).fingerprint() == load_tokenizer(trained).fingerprint()


def test_file_in_the_place_of_a_gpt_is_told_apart(trained):
    with pytest.raises(
        ValueError, match=r"it looks like an image tokenizer without a codebook \(give it as --vq-ckpt\)"
    ):
        load_gpt(trained)


def test_file_without_import_is_refused_with_the_flag(trained, digits, tmp_path, monkeypatch):
    monkeypatch.delitem(QUANTIZERS._known, "lookup-free")
    with pytest.raises(
        ValueError, match=r"no quantizer is called 'lookup-free'; known are .*vq, .*--import \S+lookup_free\.py"
    ):
        load_tokenizer(trained)
    with pytest.raises(ValueError, match=r"no quantizer is called 'lookup-free'; known are .*vq, .*--import FILE\.py"):
        train(digits, tmp_path, *LOOKUP_FREE, "--max-steps", 1)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--codebook-embed-dim", 6], r"quantizer lookup-free takes codebook_size, .*got codebook_size, codebook_embed_dim"),
        (["--no-codebook-l2-norm"], r"quantizer lookup-free takes codebook_size, .*got codebook_size, l2_norm"),
        (["--codebook-size", 48], r"--codebook-size 48 is no power of two"),
    ],
)  # fmt: skip
def test_options_that_the_quantiser_lacks_are_refused(digits, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train(digits, tmp_path, *LOOKUP_FREE, "--max-steps", 1, *more)
    assert not list(tmp_path.iterdir())
