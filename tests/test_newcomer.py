"""The way from a folder of images to samples: four flags, and what they leave out is found in files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoregressive.sample import sample_c2i
from autoregressive.train import extract_codes_c2i, train_c2i
from tests.training import make_images, run_here
from tokenizer.tokenizer_image import vq_train
from utils.images import labelled_grid

# The flags that have to be given, and those that make the run small.
CHAIN = [
    (vq_train, "--data-path my_images", "--vq-model VQ-4 --codebook-size 64 --image-size 32 --perceptual-weight 0 --max-steps 1"),
    (extract_codes_c2i, "--data-path my_images --code-path my_codes", ""),
    (train_c2i, "--code-path my_codes", "--gpt-model GPT-XS --max-steps 1"),
    (sample_c2i, "", ""),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_samples_from_a_folder_of_images_take_four_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "my_images", per_class=2)
    for script, needed, small in CHAIN:
        run_here(script, *needed.split(), *small.split())
    assert sum(needed.count("--") for _, needed, _ in CHAIN) == 4
    assert json.loads(Path("my_codes/index.json").read_bytes())["image_size"] == 32
    grid = labelled_grid(np.zeros((8, 32, 32, 3), np.uint8), ["class0"] * 8, columns=4)
    assert np.asarray(Image.open("sample_c2i.png")).shape == grid.shape
