"""build_dataset: every name, and what is said where one is wrong or a path is missing."""

import json
from argparse import Namespace

import pytest
import torch
from PIL import Image

from dataset.build import build_dataset
from dataset.images import ImageDataset


@pytest.fixture
def images(tmp_path):
    for name in ["ant/1.png", "bee/1.png", "bee/2.png", "flat/1.png"]:
        file = tmp_path / ("flat" if name.startswith("flat") else "classes") / name.removeprefix("flat/")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (0, 0, 255)).save(file)
    (tmp_path / "classes" / "image_paths.json").write_text(json.dumps(["bee/2.png", "ant/1.png"]))
    (tmp_path / "classes" / "a.jsonl").write_text(json.dumps({"image_path": "bee/1.png", "text": ["a bee"]}))
    return tmp_path


@pytest.mark.parametrize(
    "name, folder, labels",
    [
        ("imagenet", "classes", [0, 1, 1]),
        ("pexels", "classes", [0, 1, 1]),
        ("coco", "flat", [0]),
        ("openimage", "classes", [0, 0]),
        ("t2i_image", "classes", [0]),
    ],
)
def test_images(images, name, folder, labels):
    data = build_dataset(Namespace(dataset=name, data_path=str(images / folder), image_size=16))
    assert isinstance(data, ImageDataset)
    assert [label for _, label in data] == labels
    pixels = data[0][0]
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert pixels[:, 0, 0].tolist() == [-1, -1, 1]


def test_faces_are_mixed_in(images):
    args = Namespace(dataset="imagenet", data_path=images / "classes", data_face_path=images / "flat", image_size=16)
    data = build_dataset(args)
    assert len(data) == 4 and data[3][1] == 0
    args.data_face_path = images / "nowhere"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_dataset(args)


@pytest.mark.parametrize("name", ["imagenet", "coco", "openimage", "t2i_image"])
def test_build_dataset_reads_as_the_flags_say(images, name, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3
    halves = Image.new("RGBA", (16, 16), (0, 0, 255, 255))
    halves.paste((255, 0, 0, 0), (0, 0, 16, 8))
    for place in ("classes/ant/1.png", "classes/bee/1.png", "classes/bee/2.png", "flat/1.png"):
        halves.save(images / place, exif=exif)
    args = Namespace(dataset=name, data_path=images / ("flat" if name == "coco" else "classes"), image_size=16)
    corners = {}
    with caplog.at_level("INFO", logger="dataset"):
        for words in ({}, {"exif": False, "background": "none"}, {"background": "#00ff00"}):
            pixels = build_dataset(Namespace(**vars(args), **words))[0][0]
            corners[str(words)] = [pixels[:, y, 0].tolist() for y in (0, 15)]
    blue, white, red, green = [-1, -1, 1], [1, 1, 1], [1, -1, -1], [-1, 1, -1]
    assert list(corners.values()) == [[blue, white], [red, blue], [blue, green]]
    assert "images are turned as EXIF says; transparency is laid on #ffffff" in caplog.text
    assert "images are as they lie in the file, whatever EXIF says; transparency is dropped" in caplog.text


@pytest.mark.parametrize("name", ["cifar", None])
def test_unknown_names(name):
    listed = "imagenet, pexels, coco, openimage, t2i_image, imagenet_code, t2i, t2i_code"
    with pytest.raises(ValueError, match=f"unknown --dataset {name!r}; choose one of {listed}"):
        build_dataset(Namespace(dataset=name))


@pytest.mark.parametrize("name, flag", [("imagenet", "--data-path"), ("imagenet_code", "--code-path")])
def test_missing_paths(name, flag):
    with pytest.raises(ValueError, match=f"--dataset {name} needs {flag}"):
        build_dataset(Namespace(dataset=name, image_size=64))
