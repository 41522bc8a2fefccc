"""tools/check_image_codes.py: what it draws, what it prints, and what it refuses."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.pipeline import load_tokenizer
from autoregressive.train import extract_codes_c2i
from dataset.codes import open_codes
from tests.training import check_published_flags, make_images, run_here
from tokenizer.tokenizer_image.vq_model import VQ_models
from tools import check_image_codes
from tools.check_image_codes import choose
from utils.images import make_grid, to_uint8

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]  # through whole scripts and servers

SIZES = ["--vq-model", "VQ-4", "--codebook-size", 64, "--image-size", 16]
COUNT = 12


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A file of random weights and, as "ema", others."""
    torch.manual_seed(0)
    state, averaged = (VQ_models["VQ-4"](codebook_size=64).state_dict() for _ in range(2))
    path = tmp_path_factory.mktemp("tokenizer") / "vq.pt"
    torch.save({"model": state, "ema": averaged}, path)
    return path


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Codes of twelve images in both layouts; number 4 could not be read."""
    folder = tmp_path_factory.mktemp("codes")
    images = make_images(folder / "images", classes=3, per_class=4, size=24)
    (images / "class1" / "0.png").write_bytes(b"not a picture")
    for layout in ("packed", "published"):
        words = ["--data-path", images, "--code-path", folder / layout, "--vq-ckpt", tokenizer, *SIZES]
        words += ["--num-workers", 0, "--shard-size", 5]
        run_here(extract_codes_c2i, *words, *(["--published-layout"] if layout == "published" else []))
    return folder


def check(codes, tokenizer, output, *more):
    """Runs the checker; returns the picture."""
    words = ["--code-path", codes, "--output", output, "--downsample-size", 4, "--device", "cpu"]
    run_here(check_image_codes, *words, *SIZES, *(["--vq-ckpt", tokenizer] if tokenizer else []), *more)
    return np.asarray(Image.open(output))


def directly(codes, tokenizer, numbers):
    """The picture that is expected: a row for each of these numbers, a column for each view."""
    model = load_tokenizer(tokenizer)
    source = open_codes(codes, 16, 4).sources[0]
    positions = np.searchsorted(source.numbers, numbers)
    images = []
    for position in positions:
        for view in range(2):
            drawn = torch.from_numpy(source.rows(np.asarray([position]), np.asarray([view])).astype(np.int64))
            with torch.inference_mode():
                images.append(to_uint8(model.decode_code(drawn, (1, 8, 4, 4)))[0])
    return make_grid(np.stack(images), columns=2)


@pytest.mark.parametrize("layout", ["packed", "published"])
def test_every_view_of_the_samples_is_drawn(folders, tokenizer, tmp_path, capsys, layout):
    picture = check(folders / layout, tokenizer, tmp_path / "out" / "x.png", "--indices", 7, 0, 11)
    assert picture.shape == (3 * 18 + 2, 2 * 18 + 2, 3)
    expected = directly(folders / layout, tokenizer, [7, 0, 11])
    assert np.abs(picture.astype(int) - expected).max() <= 1  # encoded alone, decoded together
    printed = capsys.readouterr().out
    assert "11 samples of 2 views and 16 tokens" in printed
    assert "row 0: sample 7, label 1 (class1)\nrow 1: sample 0, label 0" in printed
    assert "row 2: sample 11, label 2" in printed and "columns: center, center_flip" in printed
    assert re.search(r"codes from \d+ to \d+; \d+ of 64 are used \(\d+\.\d%\) by the 96 drawn", printed)
    assert f"wrote {tmp_path / 'out' / 'x.png'}" in printed


def test_the_samples_follow_from_the_seed():
    numbers = np.delete(np.arange(1000), [3, 4])
    drawn = choose(numbers, None, 8, 0)
    assert len(set(drawn.tolist())) == 8 and drawn.tolist() == sorted(drawn.tolist())
    assert np.array_equal(drawn, choose(numbers, None, 8, 0))
    assert not np.array_equal(drawn, choose(numbers, None, 8, 1))
    assert choose(numbers[:5], None, 8, 0).tolist() == [0, 1, 2, 3, 4]
    assert choose(numbers, [999, 5, 5], 8, 0).tolist() == [997, 3, 3]
    with pytest.raises(ValueError, match=r"--indices 3 1000: no such samples; there are 998 .* from 0 to 999"):
        choose(numbers, [1000, 3, 5], 8, 0)


def test_many_views_are_decoded_in_parts(folders, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(check_image_codes, "DECODED_PIXELS", 3 * 16 * 16)
    picture = check(folders / "packed", tokenizer, tmp_path / "x.png", "--indices", 1, 2)
    assert np.abs(picture.astype(int) - directly(folders / "packed", tokenizer, [1, 2])).max() <= 1


def test_the_sibling_of_ten_crops_is_left_out(folders, tokenizer, tmp_path, capsys):
    for name in ("ten_crop", "ten_crop_105"):
        shutil.copytree(folders / "packed", tmp_path / name)
    check(tmp_path / "ten_crop", tokenizer, tmp_path / "x.png", "--count", 1)
    assert "columns: center, center_flip\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "layout, said", [("packed", "the checksums of all 3 shards are right"), ("published", "all 11 samples can be read")]
)
def test_verify(folders, tmp_path, capsys, layout, said):
    with pytest.raises(FileNotFoundError):  # no picture: there is no tokenizer to draw it with
        check(folders / layout, None, tmp_path / "x.png", "--verify")
    assert said in capsys.readouterr().out


def test_verify_finds_damage(folders, tokenizer, tmp_path):
    codes = shutil.copytree(folders / "packed", tmp_path / "packed")
    content = bytearray((codes / "shard-000001.npy").read_bytes())
    content[-1] ^= 1
    (codes / "shard-000001.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-000001\.npy \(checksum differs\)"):
        check(codes, tokenizer, tmp_path / "x.png", "--verify")
    codes = shutil.copytree(folders / "published", tmp_path / "published")
    file = codes / "imagenet16_codes" / "9.npy"
    np.save(file, np.load(file) + 64)
    with pytest.raises(ValueError, match=r"sample 9: codes from \d+ to \d+, outside a codebook of 64"):
        check(codes, tokenizer, tmp_path / "x.png", "--verify")
    with pytest.raises(ValueError, match=r"the samples drawn from .* outside a codebook of 64: extract"):
        check(codes, tokenizer, tmp_path / "x.png", "--indices", 9)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--codebook-size", 128], r"does not fit the flags --codebook-size 128"),
        (["--vq-model", "VQ-8"], r"does not fit the flags --vq-model VQ-8"),
        (["--image-size", 32], r"16 tokens per image, which fits --image-size 16"),
        (["--image-size", 18], r"--image-size 18 is not a multiple of --downsample-size 4"),
        (["--image-size", 32, "--downsample-size", 8], r"holds codes of --image-size 16, not 32"),
        (["--indices", 4], r"--indices 4: no such samples; there are 11"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_do_not_fit(folders, tokenizer, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        check(folders / "packed", tokenizer, tmp_path / "x.png", *more)
    assert not (tmp_path / "x.png").exists()


def test_another_tokenizer(folders, tokenizer, tmp_path):
    averaged = torch.load(tokenizer)["ema"]
    torch.save({"model": averaged}, tmp_path / "other.pt")
    for layout in ("packed", "published"):
        with pytest.raises(ValueError, match=r"other\.pt is the tokenizer \w{32}, and the codes are of"):
            check(folders / layout, tmp_path / "other.pt", tmp_path / "x.png")
    first_edition = shutil.copytree(folders / "published", tmp_path / "first_edition")
    (first_edition / "imagenet16.json").unlink()
    check(first_edition, tmp_path / "other.pt", tmp_path / "x.png")  # which does not say whose it is


def test_flags_of_a_published_folder_that_do_not_fit(folders, tokenizer, tmp_path):
    published = folders / "published"
    renamed = tmp_path / "codes"
    for kind in ("codes", "labels"):
        shutil.copytree(published / f"imagenet16_{kind}", renamed / f"imagenet32_{kind}")
    with pytest.raises(ValueError, match=r"--downsample-size 8 is not that of .*vq\.pt, .* 4 pixels a side"):
        check(renamed, tokenizer, tmp_path / "x.png", "--image-size", 32, "--downsample-size", 8)


def test_codes_alone_find_their_size_and_tokenizer(folders, tokenizer, tmp_path):
    codes = shutil.copytree(folders / "packed", tmp_path / "codes")
    words = ["--code-path", codes, "--device", "cpu", "--indices", 7, 0, "--output", tmp_path / "x.png"]
    with pytest.raises(FileNotFoundError, match=r"no tokenizer .* give --vq-ckpt"):
        run_here(check_image_codes, *words)
    shutil.copy(tokenizer, tmp_path / "vq.pt")
    run_here(check_image_codes, *words)
    expected = check(codes, tokenizer, tmp_path / "y.png", "--indices", 7, 0)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), expected)


def test_a_tokenizer_has_to_be_given_where_codes_record_none(folders, tmp_path):
    published = shutil.copytree(folders / "published", tmp_path / "published")
    (published / "imagenet16.json").unlink()
    with pytest.raises(ValueError, match=r"--vq-ckpt is missing: .* or --verify"):
        check(published, None, tmp_path / "x.png")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        check(tmp_path / "nowhere", None, tmp_path / "x.png", "--verify")


FLAGS = """
`--code-path` str = required; `--vq-model` str ∈ [VQ-8, VQ-16] = VQ-16; `--vq-ckpt` str = None;
`--codebook-size` int = 16384; `--codebook-embed-dim` int = 8; `--image-size` int ∈ [256, 384, 448, 512] = 256;
`--downsample-size` int ∈ [8, 16] = 16; `--seed` int = 0
"""


def test_published_flags():
    check_published_flags(check_image_codes, FLAGS)
