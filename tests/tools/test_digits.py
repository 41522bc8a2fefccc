"""The tools of the quickstart: digits, their captions, a small text encoder, curves."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.folders import class_folders
from tools import digits as known
from tools import make_digit_captions, make_digits, make_text_encoder

pytestmark = pytest.mark.slow  # through whole scripts and servers


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """The first hundred digits with three views each, at 16 pixels."""
    folder = tmp_path_factory.mktemp("captions")
    words = ["--output", str(folder), "--scans", "100", "--image-size", "16", "--prompts", "240"]
    make_digit_captions.main(make_digit_captions.flags().parse_args(words))
    return folder


def test_captions_say_what_is_true(captions):
    """Of the digit, and in thirds by which way it leans: with quantiles and moments of the pictures taken here."""
    from sklearn.datasets import load_digits

    digits = load_digits()

    def slant(scan):
        """The slope of a line through the means of the rows, each as heavy as its row."""
        heights, columns = -np.arange(16.0), np.arange(16.0)
        ink = scan.sum(axis=1)
        means = (scan @ columns) / np.where(ink > 0, ink, 1)
        centre = (ink @ heights) / ink.sum()
        return ink @ ((heights - centre) * means) / (ink @ (heights - centre) ** 2)

    scans = [Image.fromarray((scan * 255 / 16).round().astype(np.uint8)) for scan in digits.images]
    slants = np.asarray([slant(np.asarray(scan.resize((16, 16), Image.BICUBIC), float)) for scan in scans])
    training = np.arange(1797) % 5 != 4
    pairs = lines_of(captions / "train.jsonl") + lines_of(captions / "held_out.jsonl")
    assert len(pairs) == 80 * 3 + 20
    for pair in pairs:
        i = int(pair["image_path"].removeprefix("images/")[:4])
        digit = digits.target[i]
        lower, upper = np.quantile(slants[training & (digits.target == digit)], (1 / 3, 2 / 3))
        side = "leaning left" if slants[i] <= lower else "upright" if slants[i] <= upper else "leaning right"
        short, long, first = pair["text"]
        assert pair["digit"] == digit and pair["slant"] == side
        for text in (short, long):
            named = {
                number
                for number in range(10)
                if re.search(rf"\b({number}|{make_digit_captions.WORDS[number]})\b", text)
            }
            assert named == {digit}, text
            assert sum(words in text for words in known.SLANTS) <= 1
        assert side in long and pair["stroke"] in long
        assert long == f"{first}." and "." not in first and "{" not in short + long


def test_a_digit_that_leans_and_one_that_is_heavy():
    image = np.zeros((8, 8))
    image[np.arange(8), 7 - np.arange(8)] = 255  # from the lower left to the upper right
    assert known.measure(image) == pytest.approx((1.0, 8 / 64))
    assert known.measure(image[:, ::-1])[0] == pytest.approx(-1.0)
    assert known.measure(np.eye(8)[:, :1] @ np.ones((1, 8)))[0] == 0  # of one row
    assert known.measure(np.zeros((8, 8))) == (0, 0)
    thick = image.copy()
    thick[:, 1:] += image[:, :-1]
    assert known.measure(thick)[1] > 8 / 64
    limits = np.tile([[-0.5, 0.5], [0.1, 0.2]], (10, 1, 1))
    assert known.attributes(image, 3, limits) == ("leaning right", "medium")


def test_captions_are_the_same_again(captions):
    """Also where the pictures are there already, and where some are not."""
    before = {path: path.read_bytes() for path in captions.rglob("*") if path.is_file()}
    next(iter(sorted((captions / "images").iterdir()))).unlink()
    make_digit_captions.main(
        make_digit_captions.flags().parse_args(
            ["--output", str(captions), "--scans", "100", "--image-size", "16", "--prompts", "240"]
        )
    )
    assert {path: path.read_bytes() for path in captions.rglob("*") if path.is_file()} == before


def test_splits_and_lists_of_captions(captions):
    """The lists together and each alone name the same images; training scans are those of make_digits.py."""
    for split in ("train", "held_out"):
        together, alone = lines_of(captions / f"{split}.jsonl"), lines_of(captions / split / f"{split}.jsonl")
        assert [pair["text"] for pair in together] == [pair["text"] for pair in alone]
        for one, other in zip(together, alone, strict=True):
            assert (captions / one["image_path"]).samefile(captions / split / other["image_path"])
            number = int(one["image_path"].removeprefix("images/")[:4])
            assert (number % 5 == 4) == (split == "held_out")
    assert Image.open(captions / together[0]["image_path"]).size == (16, 16)
    first, second = (np.asarray(Image.open(captions / "images" / f"0000-{k}.png"), int) for k in (0, 1))
    assert np.abs(first - second).max() > 20  # another view


def test_prompts_are_worded_as_no_caption(captions):
    header, *rows = (line.split("\t") for line in (captions / "prompts.tsv").read_text().splitlines())
    assert header == ["Prompt", "Digit", "Slant", "Stroke"] and len(rows) == 240
    rng = np.random.default_rng(0)
    wordings = {make_digit_captions.wording(rng, whole) for whole in (False, True) for _ in range(20_000)}
    assert len(wordings) > 1500
    possible = {
        make_digit_captions.fill(wording, digit, slant, stroke)
        for wording in wordings
        for digit in range(10)
        for slant in known.SLANTS
        for stroke in known.STROKES
    }
    words = {word for text in possible for word in re.findall(r"\w+", text)}
    for prompt, digit, slant, stroke in rows:
        assert prompt not in possible and set(re.findall(r"\w+", prompt)) <= words, prompt
        assert re.search(rf"\b({digit}|{make_digit_captions.WORDS[int(digit)]})\b", prompt)
        assert slant in prompt and stroke in prompt
    assert {row[1] for row in rows} == set("0123456789") and len({row[0] for row in rows}) > 150


def test_a_text_encoder(captions, tmp_path, capsys):
    from language.t5 import T5Embedder, find_t5

    def make(*words):
        words = ["--data-path", str(captions / "train"), "--output", str(tmp_path / "t5" / "small"), *words]
        make_text_encoder.main(make_text_encoder.flags().parse_args(words))

    make("--dim", "32")
    embedder = T5Embedder("cpu", find_t5(tmp_path / "t5", "small"), model_max_length=12, torch_dtype=torch.float32)
    features, mask = embedder.get_text_embeddings(["the digit three", "three the digit", "the digit four"])
    assert features.shape == (3, 12, 32) and mask.sum(1).tolist() == [4, 4, 4]  # words are pieces, and the end
    assert features.isfinite().all()
    apart = (features[0, 2] - features[2, 2]).norm() / features[0, 2].norm()
    assert apart > 0.5  # three and four, in the same place
    weights = (tmp_path / "t5" / "small" / "model.safetensors").stat()
    capsys.readouterr()
    make("--dim", "32")
    assert "there already" in capsys.readouterr().out
    assert (tmp_path / "t5" / "small" / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    make("--dim", "16")
    assert T5Embedder("cpu", tmp_path / "t5" / "small").dim == 16
    assert sorted(path.name for path in (tmp_path / "t5").iterdir()) == ["small"]
    with pytest.raises(ValueError, match=r"--dim 12 is not a multiple of 8"):
        make("--dim", "12")


def test_digits_are_split_and_complete(tmp_path):
    make_digits.main(make_digits.flags().parse_args(["--output", str(tmp_path)]))
    train, held_out = class_folders(tmp_path / "train"), class_folders(tmp_path / "held_out")
    assert len(train) + len(held_out) == 1797 and len(held_out) == 359
    assert train.classes == held_out.classes == [str(digit) for digit in range(10)]
    image = np.asarray(Image.open(train.paths[0]))
    assert image.shape == (32, 32, 3) and image.min() == 0 and image.max() > 200
    names = {path.name for path in tmp_path.rglob("*.png")}
    assert len(names) == 1797  # no scan is in both
