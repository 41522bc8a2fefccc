"""OpenMoji's people as a data set: which there are, how they are split, and the files."""

import json
from collections import Counter

import pytest

from dataset.folders import class_folders
from dataset.pixels import load_rgb
from tests.training import run_here
from tools import make_drawings


@pytest.mark.parametrize(
    "name, found",
    [
        ("woman cook", ("woman", "cook")),
        ("cook", ("person", "cook")),
        ("person: bald", ("person", "bald")),
        ("man", ("man", "face")),
        ("men wrestling", ("person", "men wrestling")),
    ],
)
def test_person_and_role_of_an_emoji(name, found):
    assert make_drawings.parts(name) == found


def test_held_out_compositions_are_new_and_their_parts_are_not():
    drawings = list(make_drawings.drawings())
    assert (len(drawings), sum(held_out for _, held_out in drawings)) == (1368, 152)
    train = [drawing for drawing, held_out in drawings if not held_out]
    seen = Counter(pair for d in train for pair in ((d.role, d.person), (d.role, d.tone), (d.person, d.tone)))
    for drawing, held_out in drawings:
        if held_out:
            pairs = ((drawing.role, drawing.person), (drawing.role, drawing.tone), (drawing.person, drawing.tone))
            assert all(seen[pair] >= 2 for pair in pairs), drawing.name
    assert len({drawing.name for drawing, _ in drawings}) == 1368


@pytest.mark.slow
def test_drawings_are_class_folders_and_pairs(tmp_path):
    run_here(make_drawings, "--output", tmp_path, "--image-size", 16)
    folders = class_folders(tmp_path / "held_out")
    assert (len(folders.classes), len(folders.paths)) == (76, 152)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(lines) == 1216 and all((tmp_path / line["image_path"]).is_file() for line in lines)
    cook = next(line for line in lines if line["text"][1] == "woman cook, dark skin tone")
    assert cook["image_path"] == "train/cook/woman-dark.png" and cook["text"][0] == "cook"
    image = load_rgb(tmp_path / cook["image_path"])
    assert image.size == (16, 16) and image.getpixel((0, 0)) == (255, 255, 255)
    assert "CC BY-SA 4.0" in (tmp_path / "ATTRIBUTION.txt").read_text()
