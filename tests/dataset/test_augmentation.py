"""Crops against the recorded ones, views against a second implementation."""

import random

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from dataset.augmentation import (
    TEN_CROP_VIEWS,
    UnusableImage,
    center_crop_arr,
    corrected_views,
    random_crop_arr,
    random_view,
    ten_crop_views,
    to_tensor,
)
from tests.helpers import load_golden

CROPS, META = load_golden("crops")
CASES = [(int(name.split("/")[0]), int(name.split("center")[1])) for name in CROPS if "center" in name]


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (70, 90, 3), np.uint8))


@pytest.mark.parametrize("case, size", CASES)
def test_crops_are_the_recorded_ones(case, size):
    image = Image.fromarray(CROPS[f"{case}/input"])
    center = center_crop_arr(image, size)
    random.seed(META["seed"] + case)
    drawn = random_crop_arr(image, size)
    assert isinstance(center, Image.Image) and isinstance(drawn, Image.Image)
    # Recorded with Pillow 13, which rounds some resized pixels otherwise than those before it.
    rounding = 0 if int(PIL.__version__.split(".")[0]) >= 13 else 1
    np.testing.assert_allclose(np.asarray(center).astype(int), CROPS[f"{case}/center{size}"], rtol=0, atol=rounding)
    np.testing.assert_allclose(np.asarray(drawn).astype(int), CROPS[f"{case}/random{size}"], rtol=0, atol=rounding)


def test_extreme_strip_is_refused_before_it_is_blown_up():
    with pytest.raises(UnusableImage, match="1x30000"):
        center_crop_arr(Image.new("RGB", (1, 30000)), 256)


def test_to_tensor_spans_minus_one_to_one(image):
    pixels = np.asarray(image)
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    torch.testing.assert_close(tensor, torch.from_numpy((pixels / 127.5 - 1).transpose(2, 0, 1)).float())
    assert to_tensor(Image.new("RGB", (1, 1), (0, 255, 0))).flatten().tolist() == [-1, 1, -1]


@pytest.mark.parametrize("size, crop_range", [(32, 1.1), (32, 1.05), (48, 1.25), (40, 1.0)])
def test_ten_crops(image, size, crop_range):
    views = ten_crop_views(image, size, crop_range)
    large = int(size * crop_range)
    pixels = np.asarray(center_crop_arr(image, large))
    end, middle = large - size, round((large - size) / 2)
    five = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    crops = [pixels[y : y + size, x : x + size] for y, x in five]
    # torchvision crops the mirrored image: its top left is the top right's mirror image.
    mirrored = pixels[:, ::-1]
    crops += [mirrored[y : y + size, x : x + size] for y, x in five]
    assert len(views) == len(TEN_CROP_VIEWS) == 10
    for view, crop in zip(views, crops):
        assert view.shape == (3, size, size)
        torch.testing.assert_close(view, to_tensor(Image.fromarray(crop)), rtol=0, atol=0)


def test_ten_crop_views_each_flip_is_the_mirror_of_its_name(image):
    views = dict(zip(TEN_CROP_VIEWS, ten_crop_views(image, 32, 1.5), strict=True))
    for name in TEN_CROP_VIEWS[:5]:
        assert torch.equal(views[f"{name}_flip"], views[name].flip(-1)), name


def test_corrected_views_first_edition_names_are_corrected():
    corners = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
    assert corrected_views([*corners, *(f"{name}_flip" for name in corners)]) == list(TEN_CROP_VIEWS)
    assert corrected_views([f"view_{k}" for k in range(5)]) == list(corners)
    for right in (list(TEN_CROP_VIEWS), ["center"], ["a", "b", "c"], ["view_0", "view_1", "view_2"]):
        assert corrected_views(right) == right


def test_random_view_mirrors_about_half(image):
    mirrored = 0
    for seed in range(60):
        random.seed(seed)
        plain = to_tensor(random_crop_arr(image, 32))
        random.seed(seed)
        view = random_view(image, 32)
        assert torch.equal(view, plain) or torch.equal(view, plain.flip(-1))
        mirrored += not torch.equal(view, plain)
    assert 15 < mirrored < 45
