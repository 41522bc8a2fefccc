"""Editing pictures: what is kept, what is drawn, and what is no hole."""

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.editing import continued, feathered, hole_in, next_window
from autoregressive.models.build import build_model
from autoregressive.models.trunk import ModelArgs
from autoregressive.pipeline import ImagePipeline, load_gpt
from tests.helpers import randomize

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:the effective sample size")]

BOX = (8, 4, 20, 16)


@pytest.fixture(scope="module")
def pipeline(small_files):
    return ImagePipeline.from_pretrained(small_files.gpt, vq=small_files.vq, device="cpu")


@pytest.fixture(scope="module")
def picture(pipeline) -> Image.Image:
    return pipeline([4], seed=3, progress=False)[0]


def masked(size, box, mode="RGBA") -> Image.Image:
    """Return a mask of a box: transparent pixels, or white ones in a mode without transparency."""
    mask = Image.new(mode, size, (0, 0, 0, 255) if mode == "RGBA" else 0)
    mask.paste((9, 9, 9, 0) if mode == "RGBA" else 255, box)
    return mask


def test_edit_keeps_the_pixels_outside_the_hole_and_its_feather(pipeline, picture):
    side, unit = pipeline.image_size, pipeline.tokenizer.downsample
    edited = np.asarray(pipeline.edit(picture, None, 2, box=BOX, particles=4)[0])
    far = np.ones((side, side), bool)
    far[BOX[1] - unit // 2 : BOX[3] + unit // 2, BOX[0] - unit // 2 : BOX[2] + unit // 2] = False
    assert np.array_equal(edited[far], np.asarray(picture)[far])
    assert not np.array_equal(edited, np.asarray(picture))


@pytest.mark.parametrize("name", ["par", "nar", "lpd"])
def test_models_of_other_layouts_edit_and_extend(name, small_files, pipeline, picture):
    if name == "lpd":
        shape = {"trunk": "lpd", "dim": 16, "n_layer": 1, "n_head": 1, "ffn_width": 32, "num_classes": 10}
        gpt = randomize(build_model(ModelArgs(**shape, vocab_size=64, block_size=64)))
    else:
        gpt = load_gpt(getattr(small_files, name), image_size=32, downsample_size=4)
    other = ImagePipeline(gpt, pipeline.tokenizer)
    edited = other.edit(picture, None, 2, box=BOX, particles=4, cfg_scale=2.0)[0]
    assert edited.crop((0, 20, 32, 32)).tobytes() == picture.crop((0, 20, 32, 32)).tobytes()
    assert edited.info["particles"] == (1 if name == "lpd" else 4)
    wide = other.extend(picture, 2, right=8, particles=2)[0]
    assert wide.size == (40, 32) and wide.crop((0, 0, 32, 32)).tobytes() == picture.tobytes()


def test_edit_without_keeping_pixels_is_the_model_s_own_decoding(pipeline, picture):
    kept, own = (
        np.asarray(pipeline.edit(picture, None, 2, box=BOX, particles=2, keep_pixels=keep)[0]) for keep in (True, False)
    )
    hole = hole_in(picture, box=BOX)
    assert np.array_equal(kept[hole], own[hole]) and not np.array_equal(kept, own)


@pytest.mark.parametrize("mode", ["RGBA", "L", "1", "array", "own"])
def test_hole_is_the_same_by_mask_and_by_box(picture, mode):
    expected = hole_in(picture, box=BOX)
    if mode == "own":
        own = picture.convert("RGBA")
        own.putalpha(masked(picture.size, BOX).getchannel("A"))
        assert np.array_equal(hole_in(own), expected)
    else:
        mask = expected if mode == "array" else masked(picture.size, BOX, mode)
        assert np.array_equal(hole_in(picture, mask), expected)


def test_edit_of_the_whole_picture_is_the_ordinary_image(pipeline, picture):
    whole = np.ones((pipeline.image_size, pipeline.image_size), bool)
    edited = pipeline.edit(picture, whole, 2, n=2, seed=5, cfg_scale=2.0)
    ordinary = pipeline([2, 2], seed=5, cfg_scale=2.0, progress=False)
    assert [image.tobytes() for image in edited] == [image.tobytes() for image in ordinary]


def test_edit_with_an_empty_mask_leaves_the_picture_and_says_so(pipeline, picture):
    with pytest.warns(UserWarning, match="the mask is empty"):
        (edited,) = pipeline.edit(picture, masked(picture.size, (0, 0, 0, 0), "L"), 2)
    assert edited.tobytes() == picture.tobytes()


def test_edits_are_the_same_in_every_batch(small_files, pipeline, picture):
    one_by_one = ImagePipeline.from_pretrained(small_files.gpt, vq=small_files.vq, device="cpu", batch_size=1)
    several, single = (
        each.edit(picture, None, 2, box=BOX, n=3, particles=2, cfg_scale=2.0, top_k=5)
        for each in (pipeline, one_by_one)
    )
    assert [image.tobytes() for image in several] == [image.tobytes() for image in single]
    assert [image.info for image in several] == [image.info for image in single]
    assert len({image.tobytes() for image in several}) > 1


@pytest.mark.filterwarnings("default:the effective sample size")
def test_edit_tells_of_the_luck_of_one_particle(pipeline, picture):
    with pytest.warns(UserWarning, match=r"effective sample size is 1\.\d of 4 particles"):
        images = [
            image for seed in range(6) for image in pipeline.edit(picture, None, 2, box=BOX, particles=4, seed=seed)
        ]
    assert any(1 <= image.info["effective"] < 2 and image.info["log_evidence"] < 0 for image in images)


def test_edit_of_a_larger_picture_has_the_model_s_size(pipeline, picture):
    large = picture.resize((97, 60))
    edited = pipeline.edit(large, None, 2, box=(40, 20, 60, 40), particles=2)[0]
    assert edited.size == (pipeline.image_size, pipeline.image_size)


def test_ring_draws_tokens_beside_the_hole(pipeline, picture, monkeypatch):
    holes = []
    fill = ImagePipeline.fill
    monkeypatch.setattr(
        ImagePipeline,
        "fill",
        lambda self, requests, **more: holes.append(requests[0].known < 0) or fill(self, requests, **more),
    )
    for ring in (0, 1):
        pipeline.edit(picture, None, 2, box=(12, 12, 16, 16), ring=ring, rounds=1, particles=2)
    grid = pipeline.gpt.layout.grid_size
    one, more = (hole.view(grid, grid) for hole in holes)
    assert one.sum() == 1 and more.sum() == 9 and more[2:5, 2:5].all()


@pytest.mark.parametrize(
    "margins, size", [({"left": 8}, (40, 32)), ({"right": 4, "up": 8}, (36, 40)), ({"down": 40}, (32, 72))]
)
def test_extend_keeps_the_picture_within_a_larger_one(pipeline, picture, margins, size):
    (wide,) = pipeline.extend(picture, 2, particles=2, **margins)
    assert wide.size == size
    left, up = margins.get("left", 0), margins.get("up", 0)
    assert wide.crop((left, up, left + 32, up + 32)).tobytes() == picture.tobytes()
    assert np.asarray(wide).std() > 0


def test_windows_of_an_extension_go_outwards_from_what_is_known():
    known = np.zeros((32, 96), bool)
    known[:, 64:] = True
    places = []
    while not known.all():
        places.append(next_window(known, 32, 4)[1].start)
        known[next_window(known, 32, 4)] = True
    assert places == [48, 32, 16, 0]


def test_hole_is_continued_from_its_border():
    pixels = np.full((32, 32, 3), 40, np.uint8)
    pixels[:, 16:] = 200
    hole = np.zeros((32, 32), bool)
    hole[8:24, 2:30] = True
    pixels[hole] = 0
    smooth = continued(pixels, hole)
    assert np.array_equal(smooth[~hole], pixels[~hole])
    assert smooth[16, 4].max() < 90 and smooth[16, 27].min() > 150


def test_feather_falls_from_the_hole_to_the_pixels_around_it():
    hole = np.zeros((9, 9), bool)
    hole[4, 4] = True
    assert feathered(hole, 4)[4].tolist() == [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"box": BOX, "mask": np.ones((32, 32), bool)}, "given twice"),
        ({}, "nothing says what to fill"),
        ({"mask": Image.new("L", (16, 32))}, "the mask has 16x32 pixels and the picture 32x32"),
        ({"box": (4, 4, 40, 8)}, "no part of a picture of 32x32"),
        ({"box": (4, 8, 12, 8)}, "no part of a picture"),
        ({"box": BOX, "particles": 0}, "particles is 0"),
        ({"box": BOX, "rounds": 0}, "rounds is 0"),
        ({"box": BOX, "n": 0}, "n is 0"),
        ({"box": BOX, "ring": -1}, "ring is -1"),
        ({"box": BOX, "ring": 1.5}, "ring is 1.5"),
        ({"box": (4, 8, 12)}, r"the box is \(4, 8, 12\): give left"),
        ({"box": (4, 8, 12.5, 16)}, "in whole pixels"),
        ({"mask": np.ones((32, 32, 3), bool)}, r"the mask has the shape \(32, 32, 3\)"),
        ({"mask": Image.fromarray(np.zeros((32, 32), np.uint16))}, "the mask has pixels of mode I;16"),
        ({"image": Image.fromarray(np.zeros((32, 32), np.uint16)), "box": BOX}, "the picture has pixels of mode I;16"),
        ({"image": Image.new("RGB", (32, 96)), "box": (4, 4, 12, 20)}, "outside the middle square"),
        ({"box": BOX, "asked": None}, "give what the picture shows: a class"),
        ({"box": BOX, "asked": 99}, "label 99 is out of range"),
    ],
)
def test_edit_of_what_is_no_hole_raises(pipeline, picture, given, message):
    with pytest.raises(ValueError, match=message):
        pipeline.edit(**{"image": picture, "asked": 2, **given})


def test_picture_of_16_bits_is_not_clipped_to_white(pipeline):
    with pytest.raises(ValueError, match="mode I;16: give a picture of 8 bits"):
        pipeline.encode_image(Image.fromarray(np.full((32, 32), 300, np.uint16)))


@pytest.mark.parametrize("margins", [{}, {"left": 5}, {"down": -4}, {"up": 4.0}])
def test_extend_by_no_whole_tokens_raises(pipeline, picture, margins):
    with pytest.raises(ValueError, match=r"nothing is to be added|whole tokens of 4 pixels|a whole number, at least 0"):
        pipeline.extend(picture, 2, **margins)


def test_requests_with_particles_are_drawn_by_every_way_to_draw(pipeline, picture):
    known = pipeline.encode_image(picture)[0].masked_fill(torch.arange(64) % 8 == 3, -1).repeat(2, 1)
    requests = pipeline.read(pipeline.requests([1, 2], known=known, particles=3, seed=4))
    filled = pipeline.fill(requests)
    assert torch.equal(filled.tokens, pipeline.draw(requests))
    (numbers, images) = next(pipeline.batches(requests))
    assert numbers == [0, 1] and np.array_equal(images, pipeline.decode(filled.tokens))
