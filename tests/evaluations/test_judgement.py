"""Warnings: each trap is told, and what is as published is not."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from evaluations.image_sets import ImageSet
from evaluations.judgement import Inspection, judge, same_images, was_jpeg
from evaluations.metrics import Statistics
from tests.helpers import ROOT
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.images import to_uint8


class Images(ImageSet):
    """A description without images."""

    def __init__(self, **values):
        self.path, self.kind, self.count, self.size = Path("images.npz"), "npz", 50_000, (256, 256)
        for name, value in values.items():
            setattr(self, name, value)


STATISTICS = [Statistics(np.zeros(1), np.eye(1))]
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


def photographs() -> np.ndarray:
    """Crops of a photograph, 256x256, off the blocks of the file it is in."""
    photo = Image.open(ROOT / "assets/example.jpg").convert("RGB").resize((500, 500), Image.BICUBIC)
    return np.stack([np.asarray(photo.crop((x, x // 2, x + 256, x // 2 + 256))) for x in range(3, 240, 64)])


def compressed(images: np.ndarray, quality: int, **options) -> np.ndarray:
    """The images decoded from JPEG files."""
    out = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality, **options)
        out.append(np.asarray(Image.open(file)))
    return np.stack(out)


def resized(images: np.ndarray, size: int, filter: int) -> np.ndarray:
    """The images with `size` pixels a side."""
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), filter)) for image in images])


def tokens_of_8_pixels(images: np.ndarray) -> np.ndarray:
    """The images with another brightness in each 8x8 square, as tokens of 8 pixels leave them."""
    steps = np.random.RandomState(0).randint(-25, 26, (32, 32)).repeat(8, 0).repeat(8, 1)
    return (images.astype(int) + steps[..., None]).clip(0, 255).astype(np.uint8)


def of_vq_8(images: np.ndarray) -> np.ndarray:
    """Pictures of random codes by a VQ-8 with random weights."""
    torch.manual_seed(0)
    tokenizer = VQ_models["VQ-8"](ch=32).eval()
    with torch.inference_mode():
        return to_uint8(tokenizer.decode_code(torch.randint(0, 16384, (2 * 16 * 16,)), (2, 8, 16, 16)))


def drawn(images: np.ndarray) -> np.ndarray:
    """Digits of 17 greys, each pixel 4x4: values that lie on multiples without JPEG."""
    digits = np.stack([load_digits().images[16 * i : 16 * i + 16] * 15.9 for i in range(4)])
    sheets = digits.reshape(4, 4, 4, 8, 8).swapaxes(2, 3).reshape(4, 32, 32)
    return sheets.repeat(4, 1).repeat(4, 2)[..., None].repeat(3, 3).astype(np.uint8)


@pytest.mark.parametrize("quality", [30, 50, 75, 85])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_was_jpeg_of_decoded_jpeg_is_true(quality, subsampling):
    assert all(map(was_jpeg, compressed(photographs(), quality, subsampling=subsampling)))
    assert all(map(was_jpeg, compressed(tokens_of_8_pixels(photographs()), quality, subsampling=subsampling)))


@pytest.mark.parametrize(
    "make",
    [
        lambda images: images,
        tokens_of_8_pixels,
        of_vq_8,
        drawn,
        lambda images: resized(compressed(images, 75), 240, Image.BICUBIC),
        lambda images: resized(resized(images, 32, Image.BOX), 256, Image.NEAREST),
        lambda images: resized(resized(images, 64, Image.BOX), 256, Image.NEAREST),
        lambda images: images // 32 * 32,
        lambda images: np.random.RandomState(0).randint(0, 256, (4, 128, 128, 3), np.uint8),
        lambda images: np.zeros((2, 64, 64, 3), np.uint8),
        lambda images: images[:, :4, :4],
    ],
    ids=["png", "tokens", "vq8", "digits", "made smaller", "squares", "squares of 4", "greys", "noise", "flat", "tiny"],
)
def test_was_jpeg_of_other_images_is_false(make):
    assert not any(map(was_jpeg, make(photographs())))


def test_inspection_of_mostly_jpeg_warns_over_processes():
    inspection, other = Inspection(), Inspection()
    inspection.look(compressed(photographs()[:3], 75))
    other.look(photographs()[3:])
    inspection.merge(other)
    (warning,) = inspection.warnings("samples")
    assert "3 of 4 samples" in warning and "8x8 blocks of JPEG" in warning
    assert inspection.warnings("samples", lossy=1) == []  # known from the files' names already
    assert other.warnings("samples") == []


@pytest.mark.parametrize("shared", [0, 1, 4])
def test_same_images_counts_the_samples_in_the_reference(shared):
    images = np.random.RandomState(0).randint(0, 256, (12, 16, 16, 3), np.uint8)
    reference, samples = Inspection(), Inspection()
    reference.look(images[:6][::-1])
    samples.look(images[6 - shared : 12 - shared])
    found = same_images(reference, samples, fid=3.0, scale=100)
    assert bool(found) == bool(shared)
    assert not shared or f"{shared} of the 6 samples are exact copies of images of the reference" in found[0]


@pytest.mark.parametrize(("fid", "told"), [(1e-7, True), (-1e-7, True), (0.02, False)])
def test_same_images_of_statistics_alone_is_told_by_the_distance(fid, told):
    assert bool(same_images(None, Inspection(), fid, scale=300)) == told


def test_judge_of_one_file_twice_and_of_exchanged_files_warns(tmp_path):
    (tmp_path / "a.npz").touch()
    (tmp_path / "b.npz").symlink_to("a.npz")
    one = judge(Images(**{**ADM, "path": tmp_path / "a.npz"}), Images(path=tmp_path / "b.npz"))
    assert len(one) == 1 and "against itself" in one[0]
    exchanged = judge(Images(), Images(**{**ADM, "count": 50_000}))
    assert "REF comes first" in exchanged[0]


def test_copies_are_counted_over_processes():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 16, 16, 3), np.uint8)
    first, second = Inspection(), Inspection()
    first.look(images[:6])
    second.look(images[4:])
    assert not first.warnings("samples")
    first.merge(second)
    assert "2 of the 12 samples are exact copies" in first.warnings("samples")[0]
