"""examples/reward.py through train_grpo.py: its file is an ordinary one, which the sampling scripts take."""

import pytest
from PIL import Image

from autoregressive.sample import sample_c2i
from autoregressive.train import train_c2i, train_grpo
from tests.examples.conftest import SAMPLE, TRAIN
from tests.helpers import ROOT
from tests.training import load, metrics, run_folder, run_here

pytestmark = pytest.mark.slow  # through whole scripts

FILE = ROOT / "examples/reward.py"


def test_rewarded_model_is_an_ordinary_file(digits, tmp_path):
    base, results = tmp_path / "base", tmp_path / "results"
    run_here(train_c2i, "--code-path", digits / "codes", "--results-dir", base, *TRAIN, "--max-steps", 2)
    paths = ["--gpt-ckpt", base, "--vq-ckpt", digits / "vq.pt", "--results-dir", results]
    rewards = [
        "--import",
        FILE,
        "--reward",
        "read_as_asked",
        "--reward",
        "ink,weight=0.1",
        "--recall-features",
        "digits",
    ]
    small = ["--group-size", 4, "--global-batch-size", 2, "--max-steps", 2, "--val-images", 8, "--cfg-scale", 1]
    machine = ["--mixed-precision", "none", "--log-every", 1, "--device", "cpu"]
    run_here(train_grpo, *paths, *rewards, *small, *machine, "--val-code-path", digits / "codes")
    assert 0 < metrics(results, "reward_read_as_asked")[2] < 1 and metrics(results, "val_recall").keys() == {0, 2}
    saved = load(run_folder(results) / "checkpoints/0000002.pt")
    assert saved["config"]["layout"] == {"name": "raster", "grid_size": 8} and str(FILE) in saved["config"]["imports"]
    output = tmp_path / "x.png"
    run_here(sample_c2i, "--gpt-ckpt", results, "--vq-ckpt", digits / "vq.pt", *SAMPLE, "--output", output)
    assert Image.open(output).size[0] > 32
