"""Features and codes against the lines they were made of: any slip is refused, an edit of what they do not depend on is not."""

import io
import json
import logging
import shutil
import tarfile

import numpy as np
import pytest

from dataset.lines import CaptionLines, ImageLines, compare_before_writing, record_lines, recorded_maker
from dataset.sources import open_pairs
from dataset.t2i import TextCodes, TextImages
from dataset.text_features import Features
from language.prompts import PromptFeatures, PromptList
from tests.dataset.test_t2i import COUNTS, GRID, SIZE, make_codes
from tests.text_training import make_features, make_pairs, make_shards


def record(folder, lines, shard=4):
    """Record shard by shard, as extraction does."""
    for k, (stem, count) in enumerate(lines.files):
        for start in range(0, count, shard):
            here = range(start, min(start + shard, count))
            record_lines(folder / stem, lines, k, here, made=here)
    return folder


@pytest.fixture(params=["pairs", "shards"])
def data(tmp_path, request):
    """Pairs, and features and codes that record them."""
    make = make_pairs if request.param == "pairs" else make_shards
    pairs = open_pairs(make(tmp_path / "data", COUNTS))
    record(make_features(tmp_path / "features", COUNTS), CaptionLines(pairs, "blip"))
    record(make_codes(tmp_path / "codes", without=()), ImageLines(pairs, pairs.image_kind))
    return tmp_path


def edit(data, change, stem="part-a"):
    """Changes a file's lines, or a tar's samples (lists of members and their bytes)."""
    file = data / "data" / f"{stem}.jsonl"
    if file.exists():
        file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
        return
    file = file.with_suffix(".tar")
    with tarfile.open(file) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    samples = change([members[i : i + 2] for i in range(0, len(members), 2)])
    with tarfile.open(file, "w") as tar:
        for member, content in (entry for sample in samples for entry in sample):
            tar.addfile(member, io.BytesIO(content))


def opened(data, features="features", codes=True, **more):
    kinds = {"codes": TextCodes(data / "codes", list(COUNTS), GRID**2, 50)} if codes else {"image_size": SIZE}
    return TextImages(open_pairs(data / "data"), Features(data / features), **kinds, **more)


SLIPS = {
    "removed": lambda lines: lines[:1] + lines[2:],
    "repeated": lambda lines: [*lines[:3], lines[0], *lines[3:]],
    "swapped": lambda lines: [lines[1], lines[0], *lines[2:]],
    "reversed": lambda lines: lines[::-1],
    "last two swapped": lambda lines: [*lines[:-2], lines[-1], lines[-2]],
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slipped_lines_are_refused(data, slip):
    opened(data, codes=False)
    edit(data, SLIPS[slip])
    with pytest.raises(ValueError, match=r"features/part-a was made of other lines: the caption of (line|sample) \d+ "):
        opened(data, codes=False)


@pytest.mark.parametrize("slip", SLIPS)
def test_codes_of_slipped_lines_are_refused_though_features_fit(data, slip):
    edit(data, SLIPS[slip])
    shutil.rmtree(data / "features")
    counts = {**COUNTS, **dict(open_pairs(data / "data").files)}
    make_features(data / "features", counts)
    with pytest.raises(ValueError, match=r"codes/part-a was made of other lines: the image of (line|sample) \d+ "):
        opened(data)


def test_files_that_changed_names_are_refused(data):
    a, b = sorted((data / "data").glob("part-*.*"))
    a.rename(data / "aside")
    b.rename(a)
    (data / "aside").rename(b)
    with pytest.raises(ValueError, match=r"features/part-a was made of other lines"):
        opened(data)


def test_short_features_of_other_lines_are_refused(data):
    pairs = open_pairs(data / "data")
    record(make_features(data / "short", COUNTS), CaptionLines(pairs, "blip truncated"))
    opened(data, short_features=Features(data / "short"))
    edit(data, SLIPS["swapped"])
    record(data / "features", CaptionLines(open_pairs(data / "data"), "blip"))
    with pytest.raises(ValueError, match=r"short/part-a was made of other lines"):
        opened(data, codes=False, short_features=Features(data / "short"))


@pytest.mark.parametrize("data", ["pairs"], indirect=True)
def test_edits_of_what_was_not_read_are_accepted(data):
    """Other captions for features, captions at all for codes; spaces; lines that follow or are gone at the end."""
    lines = (data / "data" / "part-a.jsonl").read_text().splitlines()
    other = [
        json.dumps({**json.loads(line), "text": [json.loads(line)["text"][0], "new"]}, indent=None) for line in lines
    ]
    edit(data, lambda lines: [line + " " for line in other])
    opened(data)
    edit(data, lambda lines: [*lines, lines[0]])
    opened(data)
    nested = data / "data" / "lists"
    nested.mkdir()
    for stem in COUNTS:
        text = (data / "data" / f"{stem}.jsonl").read_text()
        (nested / f"{stem}.jsonl").write_text(text.replace('"images/', '"./../images/'))
    TextImages(
        open_pairs(nested), Features(data / "features"), codes=TextCodes(data / "codes", list(COUNTS), GRID**2, 50)
    )
    edit(data, lambda lines: lines[:-2])
    opened(data)
    edit(data, lambda lines: [line.replace("thing", "cat") for line in lines])
    with pytest.raises(ValueError, match="features/part-a was made of other lines: the caption of line 0"):
        opened(data)
    compare_before_writing(data / "codes", ImageLines(open_pairs(data / "data"), "image paths"), [0, 1])


def test_folders_without_records_are_accepted_unless_their_number_of_lines_differs(data, caplog):
    caplog.set_level(logging.INFO)
    for file in [*data.rglob("lines-*.npz")]:
        file.unlink()
    opened(data)
    assert f"{data / 'features'} does not record the captions of 14 lines" in caplog.text
    assert f"{data / 'codes'} does not record the images of 14 lines" in caplog.text
    edit(data, SLIPS["removed"])
    with pytest.raises(
        ValueError, match=r"features/part-a was made of 9 lines, now there are 8, and it does not record"
    ):
        opened(data)


def test_an_extraction_is_not_continued_with_another_list(data):
    lines = CaptionLines(open_pairs(data / "data"), "blip")
    compare_before_writing(data / "features", lines, [0, 1])
    other = CaptionLines(open_pairs(data / "data"), CaptionLines.kind_of("llava", True))
    with pytest.raises(ValueError, match=r"was made with 'blip', now it is 'llava truncated'"):
        compare_before_writing(data / "features", other, [0])
    edit(data, SLIPS["swapped"])
    lines = CaptionLines(open_pairs(data / "data"), "blip")
    compare_before_writing(data / "features", lines, [1])
    with pytest.raises(ValueError, match=r"the caption of (line|sample) 0 .*is another now, and 1 more are"):
        compare_before_writing(data / "features", lines, [0, 1])


def test_record_lines_keeps_what_earlier_runs_recorded_of_a_shard(data, tmp_path):
    lines = CaptionLines(open_pairs(data / "data"), "blip")
    whole = record(tmp_path / "whole", lines)
    for made in ([0, 2], [3], [1]):
        record_lines(tmp_path / "parts" / "part-a", lines, 0, range(4), made)
    (one, other) = (
        np.load(folder / "part-a" / "lines-00000000.npz")["digests"] for folder in (whole, tmp_path / "parts")
    )
    assert one.all() and one.tolist() == other.tolist() and len(set(one.tolist())) == 4


def test_prompts_that_changed_are_refused(tmp_path):
    prompts = ["a map", "a fox", "two cats"]
    folder = make_features(tmp_path / "features", {"prompts": 3})
    record(folder, CaptionLines(PromptList("prompts.txt", prompts), "blip"))
    PromptFeatures(folder, "prompts.txt", prompts)
    for changed in (prompts[::-1], ["a map", "a fox", "two dogs"]):
        with pytest.raises(
            ValueError, match=r"features/prompts was made of other lines: the caption of prompt \d .from 0"
        ):
            PromptFeatures(folder, "prompts.txt", changed)


def test_damaged_record_is_named(data):
    (file,) = (data / "features" / "part-a").glob("lines-00000004.npz")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"lines-00000004\.npz is damaged"):
        opened(data)


def test_recorded_maker_is_the_one_that_made_all_files(tmp_path):
    pairs = open_pairs(make_pairs(tmp_path / "data", COUNTS))
    folder = record(tmp_path / "codes", CaptionLines(pairs, "blip", "one"))
    assert recorded_maker(folder, COUNTS) == "one" and recorded_maker(tmp_path / "nothing", COUNTS) is None
    compare_before_writing(folder, CaptionLines(pairs, "blip", "one"), [0, 1])
    with pytest.raises(ValueError, match="part-a was made with 'one', now it is 'two'"):
        compare_before_writing(folder, CaptionLines(pairs, "blip", "two"), [0, 1])
    shutil.rmtree(folder / "part-b")
    record_lines(folder / "part-b", CaptionLines(pairs, "blip", "two"), 1, range(5), made=range(5))
    with pytest.raises(ValueError, match=r"part-a was made with one, .*part-b with two"):
        recorded_maker(folder, COUNTS)
