"""Extraction: the codes of every view of every image, once, whatever happens on the way."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.pipeline import load_tokenizer
from autoregressive.train import extract_codes_c2i
from autoregressive.train.extraction import encode_views, shard_batches
from dataset.augmentation import FLIP_VIEWS, TEN_CROP_VIEWS, code_views
from dataset.code_files import CodeSettings, PublishedFolder, ShardFolder
from dataset.codes import open_codes
from dataset.folders import class_folders
from dataset.pixels import Reading, load_rgb
from tests.training import check_published_flags, flag_defaults, make_images, run_here
from tokenizer.tokenizer_image.quantizers.vq import VectorQuantizer
from tokenizer.tokenizer_image.vq_model import VQ_models

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]  # through whole scripts and servers

SCRIPT = "autoregressive.train.extract_codes_c2i"
SETTINGS = ["--vq-model", "VQ-4", "--codebook-size", 64, "--image-size", 16, "--num-workers", 0]
COUNT, TOKENS = 18, 16


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three class folders of six images."""
    return make_images(tmp_path_factory.mktemp("images") / "train", classes=3, per_class=6, size=24)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A file of random weights and, as "ema", others."""
    torch.manual_seed(0)
    state, averaged = (VQ_models["VQ-4"](codebook_size=64).state_dict() for _ in range(2))
    path = tmp_path_factory.mktemp("tokenizer") / "vq.pt"
    torch.save({"model": state, "ema": averaged}, path)
    return path


def extract(images, codes, tokenizer, *more):
    """Extracts in this process; returns the folder of codes."""
    words = ["--data-path", images, "--code-path", codes, "--vq-ckpt", tokenizer]
    run_here(extract_codes_c2i, *words, *SETTINGS, "--shard-size", 5, "--batch-size", 4, *more)
    return codes


def directly(images, tokenizer, use_ema=False, **views):
    """The codes of each view, encoded one at a time: (images, views, tokens), and the labels."""
    model = load_tokenizer(tokenizer, use_ema=use_ema)
    listed = class_folders(images)
    transform = partial(code_views, image_size=16, **{"ten_crop": False, "crop_range": 1.1, **views})
    codes = []
    with torch.inference_mode():
        for path in listed.paths:
            pixels = transform(load_rgb(path))
            codes.append(torch.stack([model.to_codes(view[None]).flatten() for view in pixels]))
    return torch.stack(codes).numpy(), listed.labels


def read(folder):
    """Codes (n, views, tokens), labels (n,) and data set indices (n,) of a folder of shards."""
    return tuple(np.concatenate(arrays) for arrays in zip(*ShardFolder(folder).parts(), strict=True))


def digests(folder):
    """Every file of a folder with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def extracted(images, tokenizer, tmp_path_factory):
    return extract(images, tmp_path_factory.mktemp("codes") / "flip", tokenizer)


# What comes out


def test_two_views_of_every_image(extracted, images, tokenizer):
    codes, labels, indices = read(extracted)
    expected, classes = directly(images, tokenizer)
    assert codes.shape == (COUNT, 2, TOKENS) and len(np.unique(codes)) > 8
    assert np.array_equal(codes, expected)
    assert labels.tolist() == classes.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert indices.tolist() == list(range(COUNT))
    assert not np.array_equal(codes[:, 0], codes[:, 1])


def test_what_the_index_records(extracted, tokenizer):
    settings = ShardFolder(extracted).settings
    assert (settings.image_size, settings.tokens, settings.codebook_size) == (16, TOKENS, 64)
    assert settings.views == list(FLIP_VIEWS) and settings.classes == ["class0", "class1", "class2"]
    assert settings.num_images == COUNT and settings.vq_model == "VQ-4" and settings.shard_size == 5
    assert len(list(extracted.glob("shard-*.json"))) == 4


def test_ten_crops(images, tokenizer, tmp_path):
    folder = extract(images, tmp_path / "ten", tokenizer, "--ten-crop", "--crop-range", 1.25)
    codes, _, _ = read(folder)
    assert codes.shape == (COUNT, 10, TOKENS)
    assert np.array_equal(codes, directly(images, tokenizer, ten_crop=True, crop_range=1.25)[0])
    assert ShardFolder(folder).settings.views == list(TEN_CROP_VIEWS)
    assert ShardFolder(folder).settings.crop_range == 1.25


def test_without_mirror_images(images, tokenizer, extracted, tmp_path):
    codes, _, _ = read(extract(images, tmp_path / "one", tokenizer, "--no-flip"))
    assert np.array_equal(codes, read(extracted)[0][:, :1])


def test_the_averaged_weights(images, tokenizer, extracted, tmp_path):
    codes, _, _ = read(extract(images, tmp_path / "ema", tokenizer, "--use-ema"))
    assert np.array_equal(codes, directly(images, tokenizer, use_ema=True)[0])
    assert not np.array_equal(codes, read(extracted)[0])


def test_batches_and_workers_change_nothing(images, tokenizer, extracted, tmp_path):
    folder = extract(images, tmp_path / "codes", tokenizer, "--batch-size", 3, "--num-workers", 2)
    assert digests(folder) == digests(extracted)


def test_the_published_layout(images, tokenizer, extracted, tmp_path):
    folder = extract(images, tmp_path / "flip", tokenizer, "--published-layout")
    codes, labels, _ = read(extracted)
    assert sorted(os.listdir(folder)) == ["imagenet16.json", "imagenet16_codes", "imagenet16_labels"]
    for i in range(COUNT):
        array, label = (np.load(folder / f"imagenet16_{kind}" / f"{i}.npy") for kind in ("codes", "labels"))
        assert array.dtype == label.dtype == np.int64 and array.shape == (1, 2, TOKENS) and label.shape == (1,)
        assert np.array_equal(array[0], codes[i]) and label[0] == labels[i]
    data = open_codes(folder, 16, 4)
    assert isinstance(data.sources[0], PublishedFolder) and len(data) == COUNT


def test_published_layout_again_encodes_what_is_missing(images, tokenizer, tmp_path, capsys):
    folder = extract(images, tmp_path / "flip", tokenizer, "--published-layout")
    whole = digests(folder)
    (folder / "imagenet16_labels" / "7.npy").unlink()  # the second batch of 4 images of the second shard of 5
    capsys.readouterr()
    extract(images, folder, tokenizer, "--published-layout")
    assert "encoded 4 images" in capsys.readouterr().out and digests(folder) == whole
    (folder / "imagenet16.json").unlink()  # whose codes these are is not known then
    np.save(folder / "imagenet16_codes" / "3.npy", np.zeros((1, 2, TOKENS), np.int64))
    extract(images, folder, tokenizer, "--published-layout")
    assert "encoded 18 images" in capsys.readouterr().out and digests(folder) == whole


def test_many_views_are_encoded_in_parts(tokenizer, monkeypatch):
    model = load_tokenizer(tokenizer)
    encode, sizes = model.to_codes, []

    def counted(views):
        sizes.append(len(views))
        return encode(views)

    monkeypatch.setattr(model, "to_codes", counted)
    pixels = torch.rand(3, 10, 3, 16, 16) * 2 - 1
    whole = encode_views(model, pixels)
    assert whole.shape == (3, 10, TOKENS) and whole.dtype == torch.int64 and sizes == [30]
    assert torch.equal(encode_views(model, pixels, pixels_at_once=8 * 16 * 16), whole)
    assert sizes[1:] == [8, 8, 8, 6]
    encode_views(model, pixels[:1, :2], pixels_at_once=1)  # less than a single view
    assert sizes[5:] == [1, 1]


def test_mixed_precision_is_of_the_encoder_alone(images, tokenizer, extracted, tmp_path, monkeypatch):
    searched, precision = [], "bf16"
    nearest = VectorQuantizer._distances

    def search(self, latents, codebook):
        assert latents.dtype == codebook.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        searched.append(len(latents))
        return nearest(self, latents, codebook)

    monkeypatch.setattr(VectorQuantizer, "_distances", search)
    folder = extract(images, tmp_path / "codes", tokenizer, "--mixed-precision", precision)
    assert sum(searched) == COUNT * 2 * TOKENS
    codes, _, _ = read(folder)
    same = (codes == read(extracted)[0]).mean()
    assert 0.5 < same < 1
    assert ShardFolder(folder).settings.extra == {"mixed_precision": precision, **Reading().record()}
    with pytest.raises(
        ValueError, match=r"holds codes of other settings(.|\n)*extra: .*'mixed_precision'.* there, \{[^m]*\} now"
    ):
        extract(images, folder, tokenizer)


def test_latents_that_are_not_finite(images, tokenizer, tmp_path):
    state = torch.load(tokenizer)["model"]
    state["encoder.conv_in.weight"].fill_(float("nan"))
    torch.save({"model": state}, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"latents are not finite.*--vq-ckpt"):
        extract(images, tmp_path / "codes", tmp_path / "broken.pt")
    assert [path.name for path in (tmp_path / "codes").iterdir()] == ["index.json"]


def test_debug_writes_nothing(images, tokenizer, tmp_path, capsys):
    extract(images, tmp_path / "codes", tokenizer, "--debug")
    assert os.listdir(tmp_path) == []
    printed = capsys.readouterr().out
    assert "nothing written; codes (4, 2, 16)" in printed and "labels [0, 0, 0, 0]" in printed


# What happens on the way


def test_batches_end_with_their_shard():
    settings = CodeSettings("imagenet", 16, TOKENS, FLIP_VIEWS, 64, COUNT, shard_size=5)
    batches = shard_batches(settings, [1, 3], 2)
    assert batches == [(1, range(5, 7)), (1, range(7, 9)), (1, range(9, 10)), (3, range(15, 17)), (3, range(17, 18))]
    assert shard_batches(settings, [], 2) == []


def test_missing_shards_are_dealt_out(images, tokenizer, extracted, tmp_path, monkeypatch):
    """Shards that the second of two processes writes, where the first found shards 0, 2 and 3 to be missing."""
    settings = CodeSettings("imagenet", 16, TOKENS, FLIP_VIEWS, 64, COUNT, shard_size=5)
    found = [((0, shard), items) for shard, items in shard_batches(settings, [0, 2, 3], 4)]

    class Second:
        device, rank, world_size, local_rank, local_world_size, is_main = torch.device("cpu"), 1, 2, 1, 2, False
        barrier = close = lambda self: None
        broadcast = lambda self, value: found  # noqa: E731
        gather = lambda self, value: [value]  # noqa: E731
        main_first = lambda self: nullcontext()  # noqa: E731

    folder = shutil.copytree(extracted, tmp_path / "codes")
    for path in folder.glob("shard-*"):
        path.unlink()
    monkeypatch.setattr("utils.distributed.start", lambda device: Second())
    extract(images, folder, tokenizer)
    assert sorted(int(path.stem[-6:]) for path in folder.glob("shard-*.json")) == [2]
    assert digests(folder).items() <= digests(extracted).items()


def test_a_full_disk_leaves_whole_shards(images, tokenizer, extracted, tmp_path, monkeypatch):
    fsync, left = os.fsync, [20]  # of about eight calls a shard: a file and its folder

    def full(handle):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    folder = tmp_path / "codes"
    with pytest.raises(OSError, match=r"could not write .*shard-00000[1-3].*No space left"):
        extract(images, folder, tokenizer)
    monkeypatch.undo()
    finished = sorted(path.stem for path in folder.glob("shard-*.json"))
    assert 0 < len(finished) < 4 and (folder / "index.json").exists()
    there = digests(folder)
    assert all(digests(extracted)[f"{name}.npy"] == there[f"{name}.npy"] for name in finished)
    extract(images, folder, tokenizer)
    assert digests(folder) == digests(extracted)


@pytest.fixture
def damaged(images, tmp_path):
    """The images with two that cannot be read, in the second and the last shard."""
    folder = shutil.copytree(images, tmp_path / "damaged")
    (folder / "class1" / "2.png").write_bytes(b"not a picture")
    (folder / "class2" / "5.png").write_bytes((folder / "class2" / "5.png").read_bytes()[:100])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_left_out_and_counted(damaged, tokenizer, extracted, tmp_path, capsys, workers):
    folder = extract(damaged, tmp_path / "codes", tokenizer, "--num-workers", workers)
    codes, labels, indices = read(folder)
    kept = [i for i in range(COUNT) if i not in (8, 17)]
    whole_codes, whole_labels, _ = read(extracted)
    assert indices.tolist() == kept
    assert np.array_equal(codes, whole_codes[kept]) and np.array_equal(labels, whole_labels[kept])
    printed = capsys.readouterr().out
    if workers == 0:  # what another process prints is not captured here
        assert "class1/2.png" in printed and "class2/5.png" in printed
    assert "codes of 16 images, 2 unreadable ones skipped" in printed
    assert [json.loads((folder / f"shard-00000{k}.json").read_text())["skipped"] for k in range(4)] == [
        [],
        [8],
        [],
        [17],
    ]
    assert len(open_codes(folder, 16, 4)) == 16


def test_what_an_earlier_run_left_out_is_counted_too(damaged, tokenizer, tmp_path, capsys):
    folder = extract(damaged, tmp_path / "codes", tokenizer)
    (folder / "shard-000000.json").unlink()
    capsys.readouterr()
    extract(damaged, folder, tokenizer)
    assert "codes of 16 images, 2 unreadable ones skipped" in capsys.readouterr().out


# What a user gets wrong


@pytest.mark.parametrize(
    "more, message",
    [(["--ten-crop"], r"views: .* there"), (["--use-ema"], r"tokenizer: ")],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_other_settings_into_the_same_folder(images, tokenizer, extracted, more, message):
    before = digests(extracted)
    with pytest.raises(ValueError, match=rf"holds codes of other settings(.|\n)*{message}"):
        extract(images, extracted, tokenizer, *more)
    assert digests(extracted) == before


@pytest.mark.parametrize(
    "more, message",
    [
        (["--image-size", 18], r"--image-size 18 is not a multiple of 4, the pixels a side of a token"),
        (["--codebook-size", 128], r"does not fit the flags --codebook-size 128; it holds --codebook-size 64"),
        (["--vq-model", "VQ-16"], r"does not fit the flags --vq-model VQ-16; it holds --vq-model VQ-4"),
        (["--dataset", "coco"], r"it has sub-folders"),
        (["--dataset", "imagenette"], r"unknown --dataset"),
        (["--ten-crop", "--crop-range", 0.9], r"--crop-range must be at least 1, got 0\.9"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_do_not_fit(images, tokenizer, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        extract(images, tmp_path / "codes", tokenizer, *more)
    assert not (tmp_path / "codes").exists()


# Flags

FLAGS = """
`--data-path` str = required; `--code-path` str = required; `--vq-model` str ∈ [VQ-8, VQ-16] = VQ-16;
`--vq-ckpt` str = required; `--codebook-size` int = 16384; `--codebook-embed-dim` int = 8;
`--dataset` str = imagenet; `--image-size` int ∈ [256, 384, 448, 512] = 256; `--ten-crop` switch = –;
`--crop-range` float = 1.1; `--global-seed` int = 0; `--num-workers` int = 24; `--debug` switch = –
"""


def test_published_flags():
    check_published_flags(extract_codes_c2i, FLAGS, without_default=("--vq-ckpt",))
    assert flag_defaults(extract_codes_c2i)["--published-layout"] is False


# How files are read


@pytest.fixture
def turned(images, tmp_path):
    """The images with one that EXIF turns and one with transparency, as two more files of the first class."""
    data = shutil.copytree(images, tmp_path / "data")
    exif = Image.Exif()
    exif[0x0112] = 3
    noise = np.random.RandomState(5).randint(0, 256, (24, 24, 4), np.uint8)
    Image.fromarray(noise[..., :3]).save(data / "class0" / "y.png", exif=exif)
    Image.fromarray(noise).save(data / "class0" / "z.png")
    return data


def test_extraction_reads_upright_on_white_or_as_published(turned, tokenizer, tmp_path):
    usual, published = tmp_path / "usual", tmp_path / "published"
    extract(turned, usual, tokenizer)
    extract(turned, published, tokenizer, "--no-exif", "--background", "none")
    different = (read(usual)[0] != read(published)[0]).any(axis=(1, 2)).nonzero()[0].tolist()
    assert different == [6, 7]
    assert CodeSettings.read(usual).extra == {"exif": True, "background": "#ffffff"}
    for folder, words in ((usual, ["--no-exif"]), (usual, ["--background", "black"]), (published, [])):
        with pytest.raises(ValueError, match=r"codes of other settings.*extra"):
            extract(turned, folder, tokenizer, *words)


def test_extraction_begun_by_the_first_edition_goes_on_as_published(turned, tokenizer, tmp_path, capsys):
    folder = tmp_path / "codes"
    extract(turned, folder, tokenizer, "--no-exif", "--background", "none")
    expected = read(folder)[0]
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "extra": {}}))
    (folder / "shard-000001.json").unlink()
    with pytest.raises(ValueError, match="codes of other settings"):
        extract(turned, folder, tokenizer, "--exif")
    capsys.readouterr()
    extract(turned, folder, tokenizer)
    assert "images are read as published, as it was begun" in capsys.readouterr().out
    assert np.array_equal(read(folder)[0], expected)


def test_ten_crop_sibling_read_in_another_way_is_refused(turned, tokenizer, tmp_path):
    extract(turned, tmp_path / "ten_crop", tokenizer, "--ten-crop")
    extract(turned, tmp_path / "ten_crop_105", tokenizer, "--ten-crop", "--crop-range", 1.05, "--no-exif")
    with pytest.raises(ValueError, match="do not belong together: exif True and False"):
        open_codes(tmp_path / "ten_crop", 16, 4)
