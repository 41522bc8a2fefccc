"""The quickstart's recipe, with fewer steps and samples, and the tools it uses."""

import json

import numpy as np
import pytest
from PIL import Image

from dataset.folders import class_folders
from tests.quickstart import small_recipe
from tools import draw_training, make_digits


@pytest.mark.slow
def test_digits_are_split_and_complete(tmp_path):
    make_digits.main(make_digits.flags().parse_args(["--output", str(tmp_path)]))
    train, held_out = class_folders(tmp_path / "train"), class_folders(tmp_path / "held_out")
    assert len(train) + len(held_out) == 1797 and len(held_out) == 359
    assert train.classes == held_out.classes == [str(digit) for digit in range(10)]
    image = np.asarray(Image.open(train.paths[0]))
    assert image.shape == (32, 32, 3) and image.min() == 0 and image.max() > 200
    names = {path.name for path in tmp_path.rglob("*.png")}
    assert len(names) == 1797  # no scan is in both


def test_curves_of_a_resumed_and_killed_run(tmp_path):
    run = tmp_path / "results" / "000-GPT-XS"
    run.mkdir(parents=True)
    lines = [
        {"step": 10, "loss": 3.0},
        {"step": 20, "loss": 9.0},
        {"step": 20, "loss": 2.0},
        {"step": 20, "val_loss": 2.5},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 30, "lo')
    assert draw_training.read_curves(run / "metrics.jsonl") == {"loss": [(10, 3.0), (20, 2.0)], "val_loss": [(20, 2.5)]}
    arguments = ["--runs", str(tmp_path / "results"), "--output", str(tmp_path / "curves.png")]
    draw_training.main(draw_training.flags().parse_args(arguments))
    assert Image.open(tmp_path / "curves.png").size[0] > 300
    with pytest.raises(FileNotFoundError, match=r"nowhere.*metrics\.jsonl does not exist"):
        draw_training.main(draw_training.flags().parse_args(["--runs", str(tmp_path / "nowhere")]))


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_recipe(tmp_path):
    """Every stage runs, a second run finds nothing to do, an interrupted one goes on."""
    out, run = small_recipe(tmp_path)
    run()
    for name in ("samples.png", "reconstructions.png", "training.png"):
        assert Image.open(out / name).size[0] > 100
    report = json.loads((out / "report.json").read_text())
    assert set(report["seconds"]) == {"digits", "tokenizer", "codes", "gpt", "samples", "curves", "total"}
    assert report["samples"] == 20
    assert report["held_out_digits_read_right"] > 0.95
    assert 0 <= report["samples_read_as_asked"] <= 1
    assert report["psnr_held_out_db"] > 5 and 0 < report["codebook_usage_held_out"] <= 1
    held_out, samples = report["train_against_held_out"], report["train_against_samples"]
    assert held_out["frechet_distance"] < samples["frechet_distance"]  # hardly trained
    assert held_out["precision"] > 0.5 and held_out["recall"] > 0.5 and 0 <= samples["precision"] <= 1
    assert report["nll_held_out_nats_per_token"] == pytest.approx(np.log(256), abs=0.5)  # hardly trained
    pictures = sorted(out.glob("samples/*/*.png"))
    assert len(pictures) == 20
    first = pictures[0].read_bytes()
    pictures[0].unlink()
    again = run()
    assert again.count("nothing left to do") == 2
    assert pictures[0].read_bytes() == first
