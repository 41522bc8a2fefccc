"""examples/spiral_order.py through the ordinary scripts: a new order is one file, and survives its way through files."""

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.layouts import build_layout
from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.sample import sample_c2i
from autoregressive.serve.engine import NOT_DRAWN
from autoregressive.train import train_c2i
from tests.examples.conftest import SAMPLE, SIZE, TRAIN
from tests.helpers import ROOT
from tests.serve.small import image
from tests.serve.test_native import decoded, serve
from tests.training import load, run_folder, run_here, run_script, same
from utils.registry import import_file

pytestmark = pytest.mark.slow  # through whole scripts and servers

IMPORT = ["--import", ROOT / "examples/spiral_order.py"]


def train(digits, results, *more):
    run_here(
        train_c2i,
        "--code-path",
        digits / "codes",
        "--results-dir",
        results,
        *TRAIN,
        *IMPORT,
        "--layout",
        "spiral",
        *more,
    )
    return max((run_folder(results) / "checkpoints").glob("*.pt"))


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    return train(digits, tmp_path_factory.mktemp("spiral"), "--max-steps", 4, "--ckpt-every", 2)


def test_spiral_reads_from_the_border_inwards():
    import_file(ROOT / "examples/spiral_order.py")
    assert build_layout({"name": "spiral"}, 3).order.tolist() == [0, 1, 2, 5, 8, 7, 6, 3, 4]


def test_spiral_file_says_its_layout_and_draws_by_it(digits, trained, tmp_path):
    saved = load(trained)
    assert saved["config"]["layout"] == {"name": "spiral", "grid_size": 8}
    assert str(ROOT / "examples/spiral_order.py") in saved["config"]["imports"]
    gpt = load_gpt(trained)
    assert gpt.layout.name == "spiral" and gpt.layout.order[:9].tolist() == [*range(8), 15]
    image = tmp_path / "sample.png"
    run_here(
        sample_c2i,
        "--gpt-ckpt",
        trained,
        "--vq-ckpt",
        digits / "vq.pt",
        *SAMPLE,
        *IMPORT,
        "--output",
        image,
        "--seed",
        3,
    )
    assert Image.open(image).width >= SIZE
    pipeline = ImagePipeline.from_pretrained(trained, vq=digits / "vq.pt", device="cpu")
    steps = []
    pipeline.generate_codes(torch.tensor([3]), on_step=lambda done, tokens: steps.append(done))
    assert steps == sorted(steps) and steps[-1] == 64


def test_spiral_run_resumes_bit_identically(digits, trained, tmp_path):
    train(digits, tmp_path, "--max-steps", 2, "--ckpt-every", 2)
    resumed = train(digits, tmp_path, "--max-steps", 4, "--ckpt-every", 2, "--resume")
    assert same(load(resumed)["model"], load(trained)["model"])


def test_spiral_run_does_not_resume_in_raster_order(digits, trained):
    with pytest.raises(ValueError, match=r"layout.*spiral.*raster"):
        run_here(
            train_c2i,
            *(
                "--code-path",
                digits / "codes",
                "--results-dir",
                trained.parents[2],
                *TRAIN,
                "--max-steps",
                5,
                "--resume",
            ),
        )


def test_spiral_file_begins_a_run_of_another_order_only_as_asked(digits, trained, tmp_path):
    flags = [
        "--code-path",
        digits / "codes",
        "--results-dir",
        tmp_path,
        *TRAIN,
        "--max-steps",
        5,
        "--gpt-ckpt",
        trained,
    ]
    with pytest.raises(
        ValueError, match="is of the layout spiral, and this run of raster: give --layout spiral, or --fine"
    ):
        run_here(train_c2i, *flags)
    run_here(train_c2i, *flags, "--finetune")
    (log,) = tmp_path.glob("*/log.txt")
    assert "its layout was spiral, now raster" in log.read_text()


def test_spiral_file_without_import_is_refused_with_the_flag(digits, trained, tmp_path):
    said = run_script(
        "autoregressive.sample.sample_c2i",
        *("--gpt-ckpt", trained, "--vq-ckpt", digits / "vq.pt", *SAMPLE, "--output", tmp_path / "x.png"),
        fails=True,
    )
    assert "no layout is called 'spiral'" in said and "--import" in said and "spiral_order.py" in said
    assert len(said.strip().splitlines()) == 1 and not (tmp_path / "x.png").exists()


def test_spiral_images_of_the_native_engine_are_the_pipelines(digits, trained):
    pipeline = ImagePipeline.from_pretrained(trained, vq=digits / "vq.pt", device="cpu", batch_size=2)
    requests = [image(label=label, seed=4, cfg_scale=2.0) for label in (1, 2, 3)]
    for request, tokens in zip(requests, serve(pipeline, requests), strict=True):
        shown = np.array(tokens)  # growing: each number is a token where it stands, or NOT_DRAWN
        assert all(((row == NOT_DRAWN) | (row == shown[-1])).all() for row in shown) and NOT_DRAWN in shown[0]
        assert (np.diff((shown != NOT_DRAWN).sum(1)) >= 0).all() and NOT_DRAWN not in shown[-1]
        drawn = pipeline([request.conditions["label"]], seed=4, cfg_scale=2.0, progress=False)[0]
        assert np.array_equal(np.asarray(drawn), decoded(pipeline, tokens[-1]))
