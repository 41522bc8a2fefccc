"""examples/z_loss.py through the ordinary scripts: trained, resumed, sampled from."""

import math

import pytest

from autoregressive.sample import sample_c2i
from autoregressive.train import train_c2i
from tests.examples.conftest import SAMPLE, TRAIN
from tests.helpers import ROOT
from tests.training import load, metrics, run_folder, run_here, same
from utils.errors import AgreedError

pytestmark = pytest.mark.slow  # through whole scripts and servers

FILE = ROOT / "examples/z_loss.py"
EXAMPLE = ["--import", FILE, "--objective", "z_loss"]


def train(digits, results, *more):
    run_here(train_c2i, *TRAIN, "--code-path", digits / "codes", "--results-dir", results, "--lr", 2e-3, *more)
    return load(max((run_folder(results) / "checkpoints").iterdir()))


def test_z_loss_trains_resumes_to_the_same_bits_and_is_sampled_from(digits, tmp_path):
    whole = train(digits, tmp_path / "whole", *EXAMPLE, "--max-steps", 4, "--val-code-path", digits / "codes")
    entropy = math.log(64)  # of logits that are all alike
    assert metrics(tmp_path / "whole", "loss")[1] == pytest.approx(entropy + 1e-4 * entropy**2)
    assert metrics(tmp_path / "whole", "val_loss")[4] < entropy
    assert whole["config"]["objective"] == "z_loss" and str(FILE) in whole["config"]["imports"]
    train(digits, tmp_path / "parts", *EXAMPLE, "--max-steps", 2)
    parts = train(digits, tmp_path / "parts", *EXAMPLE, "--max-steps", 4, "--resume")
    assert same(parts["model"], whole["model"]) and same(parts["optimizer"], whole["optimizer"])
    plain = train(digits, tmp_path / "plain", "--max-steps", 4)
    assert plain["config"]["objective"] == "cross_entropy" and not same(plain["model"], whole["model"])

    picture = tmp_path / "drawn.png"
    files = ["--gpt-ckpt", tmp_path / "whole", "--vq-ckpt", digits / "vq.pt", "--output", picture]
    run_here(sample_c2i, *SAMPLE, *files, "--labels", 1)
    assert picture.exists()

    with pytest.raises(AgreedError, match="objective 'z_loss' and 'cross_entropy'"):
        train(digits, tmp_path / "parts", "--max-steps", 6, "--resume")


def test_train_objective_that_is_not_registered_is_refused_with_the_flag_that_brings_it(digits, tmp_path):
    with pytest.raises(ValueError, match=r"no objective is called 'z_los'.*--import FILE\.py"):
        train(digits, tmp_path / "results", "--objective", "z_los")
    assert not (tmp_path / "results").exists()
