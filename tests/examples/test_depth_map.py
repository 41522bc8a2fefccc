"""examples/depth_map.py through the ordinary scripts: maps stored beside the codes reach the model, and what it draws."""

import shutil

import numpy as np
import pytest

from autoregressive.sample import sample_c2i
from autoregressive.train import train_c2i
from dataset.arrays import write_arrays
from dataset.codes import open_codes
from tests.examples.conftest import SAMPLE, TRAIN
from tests.helpers import ROOT
from tests.training import load, run_folder, run_here, same

IMPORT = ["--import", ROOT / "examples/depth_map.py"]


def brightness(codes) -> np.ndarray:
    """Maps float32 (n, tokens, 1) that tell the codes."""
    return np.stack([item["codes"].numpy()[:, None] / 64 for item in open_codes(codes)]).astype(np.float32)


@pytest.fixture(scope="module")
def maps(digits):
    write_arrays(digits / "depth", "depth", brightness(digits / "codes"), of=digits / "codes")
    return digits / "depth"


def train(digits, maps, results, *more):
    flags = [
        "--code-path",
        digits / "codes",
        "--condition",
        "depth",
        "--condition-path",
        f"depth={maps}",
        "--ckpt-every",
        2,
    ]
    run_here(train_c2i, *flags, "--results-dir", results, *TRAIN, *IMPORT, *more)
    return max((run_folder(results) / "checkpoints").glob("*.pt"))


@pytest.fixture(scope="module")
def trained(digits, maps, tmp_path_factory):
    return train(digits, maps, tmp_path_factory.mktemp("depth"), "--max-steps", 4)


def test_depth_resumes_with_the_same_bits_and_refuses_other_maps(digits, maps, trained, tmp_path):
    saved = load(trained)
    assert "depth" in saved["config"]["conditions"]
    weights = [value for name, value in saved["model"].items() if "depth" in name]
    assert weights and all(value.any() for value in weights)
    shutil.copytree(run_folder(trained.parents[2]), tmp_path / "run" / "000-GPT-XS")
    (tmp_path / "run" / "000-GPT-XS" / "checkpoints" / trained.name).unlink()
    other = tmp_path / "other"
    write_arrays(other, "depth", 1 - brightness(digits / "codes"), of=digits / "codes")
    with pytest.raises(ValueError, match="depth"):
        train(digits, other, tmp_path / "run", "--max-steps", 4, "--resume")
    again = load(train(digits, maps, tmp_path / "run", "--max-steps", 4, "--resume"))
    assert same(again["model"], saved["model"]) and same(again["optimizer"], saved["optimizer"])
    with pytest.raises(
        ValueError, match="--condition-path gives nothing; this model takes --condition-path depth=FOLDER"
    ):
        run_here(train_c2i, "--code-path", digits / "codes", "--condition", "depth", *TRAIN, *IMPORT)


def test_depth_is_asked_for_when_drawing(digits, trained, tmp_path):
    pictures = []
    for name, value in (("dark", 0.0), ("bright", 40.0)):
        np.save(tmp_path / f"{name}.npy", np.full((8, 64, 1), value, np.float32))
        words = [
            "--gpt-ckpt",
            trained,
            "--vq-ckpt",
            digits / "vq.pt",
            "--condition-file",
            f"depth={tmp_path / name}.npy",
        ]
        run_here(sample_c2i, *words, *SAMPLE, *IMPORT, "--output", tmp_path / f"{name}.png")
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] != pictures[1]
    with pytest.raises(ValueError, match="depth"):
        run_here(sample_c2i, *words[:4], *SAMPLE, *IMPORT, "--output", tmp_path / "none.png")
