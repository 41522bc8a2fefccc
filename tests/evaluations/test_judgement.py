"""Warnings: each trap is told, and what is as published is not."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluations.image_sets import ImageSet
from evaluations.judgement import Inspection, judge
from tests.helpers import ROOT


class Images(ImageSet):
    """A description without images."""

    def __init__(self, **values):
        self.path, self.kind, self.count, self.size = Path("images.npz"), "npz", 50_000, (256, 256)
        for name, value in values.items():
            setattr(self, name, value)

    def batches(self, start, stop, batch_size):
        raise NotImplementedError


STATISTICS = {"mu": np.zeros(1)}
ADM = {"path": Path("VIRTUAL_imagenet256_labeled.npz"), "count": 10_000, "statistics": STATISTICS}
EVEN = np.random.default_rng(0).integers(0, 1000, 50_000)


def test_the_published_protocols_pass():
    assert judge(Images(**ADM), Images(labels=EVEN)) == []
    assert judge(Images(**ADM), Images(labels=np.arange(50_000) % 1000)) == []
    assert judge(Images(path=Path("val_imagenet.npz")), Images(), "reconstruction") == []


@pytest.mark.parametrize(
    ("reference", "samples", "told"),
    [
        ({}, {"count": 1000}, "1,000 samples; published figures are of 50,000"),
        ({"statistics": None, "count": 10_000}, {}, "10,000 images and no recorded statistics: published"),
        ({"statistics": None, "count": 50_000}, {}, "it looks like the validation set"),
        ({"statistics": None, "path": Path("imagenet-val.npz")}, {}, "it looks like the validation set"),
        ({"count": 0, "size": None}, {}, "precision and recall are left out"),
        ({"size": (512, 512)}, {}, "the samples are 256x256 and the reference 512x512"),
        ({}, {"size": (384, 384)}, "the samples are 384x384 and the reference 256x256"),
        ({"size": (64, 64)}, {"size": (64, 64)}, "the samples are 64x64; published figures are of 256x256"),
        ({}, {"lossy": 7}, "7 of the 50,000 files of the samples are JPEG"),
        ({"lossy": 7}, {}, "7 of the 10,000 files of the reference are JPEG"),
        ({}, {"labels": np.arange(50_000) % 999}, None),
        ({}, {"labels": np.where(EVEN == 7, 8, EVEN)}, "classes are unbalanced: from 0 to"),
        ({}, {"labels": EVEN // 2 + EVEN // 3}, "classes are unbalanced"),
    ],
)
def test_each_trap_of_generation(reference, samples, told):
    found = judge(Images(**{**ADM, **reference}), Images(**samples))
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


@pytest.mark.parametrize(
    ("reference", "samples", "told"),
    [
        ({}, {"count": 49_000}, "49,000 reconstructions for 50,000 reference images"),
        ({"statistics": STATISTICS}, {}, "has statistics of its own"),
        ({"count": 10}, {"count": 10}, "the reference has 10 images; published rFID"),
        ({}, {"labels": np.zeros(50_000, np.int64)}, None),
    ],
)
def test_each_trap_of_reconstruction(reference, samples, told):
    found = judge(Images(**reference), Images(**samples), "reconstruction")
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


def photographs(quality: int | None, after: int | None = None) -> np.ndarray:
    """Crops of a photograph, 128x128; through JPEG of a quality, or a JPEG made smaller."""
    photo = Image.open(ROOT / "assets/example.jpg").convert("RGB")
    crops = []
    for x in range(0, 385, 96):
        image = photo.resize((512, 512)).crop((x, x // 2, x + 128, x // 2 + 128))
        for compress, size in ((quality, None), (after, 96)):
            if compress:
                file = io.BytesIO()
                image.save(file, "JPEG", quality=compress)
                image = Image.open(file).convert("RGB")
                if size:
                    image = image.resize((size, size), Image.BICUBIC)
        crops.append(np.asarray(image))
    return np.stack(crops)


@pytest.mark.parametrize(("images", "told"), [((None,), False), ((50,), True), ((30,), True), ((None, 75), False)])
def test_blocks_of_jpeg_are_seen_in_pixels(images, told):
    inspection = Inspection()
    pixels = photographs(*images)
    inspection.look(pixels[:3])
    other = Inspection()
    other.look(pixels[3:])
    inspection.merge(other)
    found = inspection.warnings("samples")
    assert bool(found) == told, inspection.blockiness
    assert not told or "8x8 blocks" in found[0]
    assert inspection.warnings("samples", lossy=1) == []  # known from the files' names already


def test_copies_are_counted_over_processes():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 16, 16, 3), np.uint8)
    first, second = Inspection(), Inspection()
    first.look(images[:6])
    second.look(images[4:])
    assert (first.copies, first.blockiness) == (0, 1.0)
    first.merge(second)
    assert first.copies == 2
    assert "2 of the 12 samples are exact copies" in first.warnings("samples")[0]


def test_flat_and_tiny_images_are_no_jpeg():
    inspection = Inspection()
    inspection.look(np.zeros((2, 64, 64, 3), np.uint8))
    inspection.look(np.zeros((2, 4, 4, 3), np.uint8))
    assert inspection.blockiness == 1.0
