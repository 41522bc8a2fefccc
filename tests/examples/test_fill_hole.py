"""examples/fill_hole.py: known tokens stay, the hole is drawn."""

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.pipeline import ImagePipeline
from tests.helpers import ROOT
from tests.training import run_here
from utils.registry import import_file


@pytest.fixture(scope="module")
def script():
    import sys

    import_file(ROOT / "examples/fill_hole.py")
    return sys.modules["imported_fill_hole"]


def fill(script, small_files, image, output, *more):
    run_here(
        script,
        *(
            "--gpt-ckpt",
            small_files.gpt,
            "--vq-ckpt",
            small_files.vq,
            "--image",
            image,
            "--label",
            3,
            "--device",
            "cpu",
        ),
        *("--output", output, *more),
    )
    return Image.open(output)


def test_hole_is_drawn_and_the_rest_stays(script, small_files, tmp_path):
    pipeline = ImagePipeline.from_pretrained(small_files.gpt, vq=small_files.vq, device="cpu")
    image = tmp_path / "image.png"
    drawn = pipeline.generate_codes(torch.tensor([5]), seed=1)
    Image.fromarray(pipeline.decode(drawn)[0]).save(image)
    codes = pipeline.encode_image(Image.open(image)).view(8, 8)
    filled = fill(script, small_files, image, tmp_path / "filled.png", "--box", 2, 3, 5, 8)
    known = codes.clone()
    known[2:5, 3:8] = -1
    expected = pipeline.generate_codes(torch.tensor([3]), known=known.view(1, -1), cfg_scale=2.0)
    assert np.array_equal(np.asarray(filled), pipeline.decode(expected)[0])
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept[2:5, 3:8] = False
    assert torch.equal(expected.view(8, 8)[kept], codes[kept])


def test_box_outside_the_image_is_refused(script, small_files, tmp_path):
    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    with pytest.raises(ValueError, match="--box 2 3 9 8 is no part of the 8x8 tokens"):
        fill(script, small_files, image, tmp_path / "filled.png", "--box", 2, 3, 9, 8)
