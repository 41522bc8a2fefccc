"""Neon's two tools: codes that a model draws of itself, and weights beyond it, away from where training on them leads."""

import numpy as np
import pytest
import torch

from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.train import train_c2i
from dataset.codes import open_codes
from tests.training import load, run_folder, run_here
from tools import extrapolate, sample_codes

SAMPLE = ["--precision", "none", "--device", "cpu"]


def draw(small_files, folder, *more):
    files = ["--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq, "--code-path", folder]
    run_here(sample_codes, *files, *SAMPLE, "--num-samples", 14, "--batch-size", 4, "--shard-size", 6, *more)
    return open_codes(folder, random_view=False)


def test_drawn_codes_are_the_pipelines_and_train_a_model(small_files, tmp_path):
    codes = draw(small_files, tmp_path / "codes")
    pipeline = ImagePipeline.from_pretrained(small_files.gpt, vq=small_files.vq, device="cpu")
    assert [item["label"] for item in (codes[i] for i in range(14))] == [i % 10 for i in range(14)]
    drawn = pipeline.generate_codes([3, 4], indices=[3, 4], seed=0, cfg_scale=1.0)
    assert np.array_equal(drawn, torch.stack([torch.as_tensor(codes[i]["codes"]) for i in (3, 4)]))
    shard = tmp_path / "codes" / "shard-000001.npy"
    before = shard.read_bytes()
    shard.with_suffix(".json").unlink()
    draw(small_files, tmp_path / "codes")
    assert shard.read_bytes() == before, "a shard that is missing is drawn again, and is the same"
    with pytest.raises(ValueError, match="holds codes of other settings"):
        draw(small_files, tmp_path / "codes", "--temperature", 0.5)

    results = tmp_path / "results"
    flags = ["--gpt-model", "GPT-XS", "--finetune", "--gpt-ckpt", small_files.gpt, "--class-rows", "number"]
    flags += ["--global-batch-size", 7, "--num-workers", 0, "--mixed-precision", "none", "--device", "cpu"]
    run_here(train_c2i, "--code-path", tmp_path / "codes", "--results-dir", results, *flags, "--max-steps", 2)
    output = tmp_path / "neon.pt"
    run_here(extrapolate, small_files.gpt, results, "--weight", 0.5, "--output", output)
    base, tuned, made = (
        load(path)["model"] for path in (small_files.gpt, next(run_folder(results).rglob("*.pt")), output)
    )
    name = "layers.0.attention.wqkv.weight"
    torch.testing.assert_close(made[name], 1.5 * base[name] - 0.5 * tuned[name])
    assert not torch.equal(made[name], base[name])
    load_gpt(output, image_size=32, downsample_size=4)


def test_weights_0_and_minus_1_are_the_two_models(small_files, tmp_path):
    other = tmp_path / "other.pt"
    saved = load(small_files.gpt)
    other_model = {name: tensor + 1 for name, tensor in saved["model"].items()}
    torch.save({**saved, "model": other_model}, other)
    for weight, expected in ((0, saved["model"]), (-1, other_model)):
        run_here(extrapolate, small_files.gpt, other, "--weight", weight, "--output", tmp_path / "made.pt")
        made = load(tmp_path / "made.pt")
        assert all(torch.equal(made["model"][name], tensor) for name, tensor in expected.items())
        assert vars(made["args"])["image_size"] == 32


def test_models_that_do_not_belong_together_are_refused(small_files, tmp_path):
    for other, more, message in (
        (small_files.par, [], "does not fit the model"),
        (small_files.vq, [], "does not fit the model"),
        (small_files.gpt, ["--use-ema"], "has no averaged weights"),
    ):
        with pytest.raises(ValueError, match=message):
            words = [small_files.gpt, other, "--weight", 1, "--output", tmp_path / "made.pt", *more]
            run_here(extrapolate, *words)
    assert not (tmp_path / "made.pt").exists()
