"""Handwritten digits as the examples' tests use them: images in class folders, a tokenizer with random weights, codes."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from autoregressive.train import extract_codes_c2i
from tests.helpers import randomize
from tests.training import quiet_loggers, run_here
from tokenizer.tokenizer_image.vq_model import VQ_models

IMAGES = 48
SIZE, TOKENS = 32, 64  # pixels a side, tokens an image
MODEL = ["--gpt-model", "GPT-XS", "--image-size", SIZE, "--downsample-size", 4, "--device", "cpu"]
TRAIN = [*MODEL, "--global-batch-size", 8, "--num-workers", 0, "--mixed-precision", "none", "--log-every", 1]
SAMPLE = [*MODEL, "--vq-model", "VQ-4", "--precision", "none"]


@pytest.fixture(autouse=True)
def one_thread():
    with quiet_loggers():
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A folder with `images`, `vq.pt` and `codes`."""
    home, data = tmp_path_factory.mktemp("digits"), load_digits()
    for i in range(IMAGES):
        file = home / "images" / str(data.target[i]) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15.9).astype("uint8")).resize((SIZE, SIZE)).convert("RGB").save(file)
    torch.save({"model": randomize(VQ_models["VQ-4"](codebook_size=64), seed=1).state_dict()}, home / "vq.pt")
    with quiet_loggers():
        run_here(
            extract_codes_c2i,
            *("--data-path", home / "images", "--vq-ckpt", home / "vq.pt", "--code-path", home / "codes"),
            *("--vq-model", "VQ-4", "--image-size", SIZE, "--num-workers", 0, "--no-flip", "--device", "cpu"),
        )
    return home
