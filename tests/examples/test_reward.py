"""examples/reward.py: its file is an ordinary one, which the sampling scripts and training take."""

import sys

import pytest
import torch
from PIL import Image

from autoregressive.sample import sample_c2i
from autoregressive.train import train_c2i
from tests.examples.conftest import SAMPLE, TRAIN
from tests.helpers import ROOT
from tests.training import load, run_folder, run_here
from utils.registry import import_file

pytestmark = pytest.mark.slow  # through whole scripts and servers


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    results = tmp_path_factory.mktemp("run")
    run_here(train_c2i, "--code-path", digits / "codes", "--results-dir", results, *TRAIN, "--max-steps", 2)
    return results


def reward(digits, run, output, *more):
    import_file(ROOT / "examples/reward.py")
    script = sys.modules["imported_reward"]
    files = ["--gpt-ckpt", run, "--vq-ckpt", digits / "vq.pt", "--output", output, "--device", "cpu"]
    run_here(script, *files, "--batch-size", 20, *more)
    return load(output)


def test_rewarded_model_repeats_and_is_an_ordinary_file(digits, run, tmp_path, capsys):
    first = reward(digits, run, tmp_path / "a.pt", "--steps", 2, "--lr", 1e-3)
    assert capsys.readouterr().out.count("reward 0.") == 2
    again = reward(digits, run, tmp_path / "b.pt", "--steps", 2, "--lr", 1e-3)
    start = load(max((run_folder(run) / "checkpoints").glob("*.pt")))["model"]
    name = "layers.0.attention.wqkv.weight"
    assert torch.equal(first["model"][name], again["model"][name]) and not torch.equal(
        first["model"][name], start[name]
    )
    assert first["config"]["layout"] == {"name": "raster", "grid_size": 8} and first["config"]["tokenizer"]
    output = tmp_path / "x.png"
    run_here(sample_c2i, "--gpt-ckpt", tmp_path / "a.pt", "--vq-ckpt", digits / "vq.pt", *SAMPLE, "--output", output)
    assert Image.open(output).size[0] > 32
