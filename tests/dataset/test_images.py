"""Image data sets: what is found where, the same draws with any workers, and files that cannot be read."""

import json
import logging
import os
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dataset.augmentation import center_view, code_views, random_view
from dataset.folders import class_folders, find_images, flat_folder, listed_images, nested_folder
from dataset.image_build import jsonl_images
from dataset.images import ImageDataset, collate_present, present_batches
from dataset.jsonl import JsonPairs
from dataset.pixels import load_rgb

SIZE = 16


def save(path, color=None, size=(24, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if color is None:
        pixels = np.random.RandomState(len(str(path))).randint(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(path, **options)
    else:
        Image.new("RGB", size, color).save(path, **options)
    return path


def names(images, root):
    return [path.removeprefix(f"{root}/") for path in images.paths]


@pytest.fixture
def classes(tmp_path):
    """Two classes of 6 images; the red channel tells which image it is."""
    for label, name in enumerate(["ant", "bee"]):
        for i in range(6):
            save(tmp_path / "data" / name / f"{i}.png", (20 * (6 * label + i), 0, 0))
    return tmp_path / "data"


# What is found


def test_class_folders(tmp_path):
    for name in ["b/2.JPG", "b/10.png", "a/nested/x.webp", "a/y.bmp", "c/z.ppm", ".hidden/h.png", "a/.thumb.png"]:
        save(tmp_path / name.replace("JPG", "jpg")).rename(tmp_path / name)
    (tmp_path / "a" / "readme.txt").write_text("not an image")
    images = class_folders(tmp_path)
    assert images.classes == ["a", "b", "c"]
    assert names(images, tmp_path) == ["a/y.bmp", "a/nested/x.webp", "b/10.png", "b/2.JPG", "c/z.ppm"]
    assert images.labels.tolist() == [0, 0, 1, 1, 2]
    assert find_images(tmp_path / "a") == ["y.bmp", "nested/x.webp"]


def test_paths_of_any_bytes_survive(tmp_path):
    name = b"caf\xe9 \xff".decode("utf-8", "surrogateescape")
    save(tmp_path / "å ü" / f"{name}.png")
    images = pickle.loads(pickle.dumps(class_folders(tmp_path)))
    assert load_rgb(images.paths[0]).size == (24, 20)


@pytest.mark.parametrize("read", [class_folders, flat_folder, nested_folder, listed_images, jsonl_images])
def test_missing_folder(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("read", [class_folders, flat_folder, nested_folder])
def test_folder_without_images(tmp_path, read):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"no images in .*1 \.txt"):
        read(tmp_path)


def test_class_folders_given_a_flat_folder(tmp_path):
    save(tmp_path / "7.png")
    with pytest.raises(ValueError, match=r"directly in .*7\.png.*--dataset coco"):
        class_folders(tmp_path)


def test_class_folders_mixed_with_loose_images(tmp_path):
    save(tmp_path / "7.png")
    save(tmp_path / "ant" / "1.png")
    with pytest.raises(ValueError, match=r"mixes loose images \(7\.png\) with class folders \(ant\)"):
        class_folders(tmp_path)


def test_empty_class_folder(tmp_path):
    save(tmp_path / "ant" / "1.png")
    (tmp_path / "bee").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*bee has no images"):
        class_folders(tmp_path)


def test_parent_of_the_splits(tmp_path):
    save(tmp_path / "train" / "ant" / "1.png")
    save(tmp_path / "val" / "ant" / "1.png")
    with pytest.raises(ValueError, match="holds the splits train, val"):
        class_folders(tmp_path)


def test_flat_folder(tmp_path):
    save(tmp_path / "b.png")
    save(tmp_path / "a.png")
    images = flat_folder(tmp_path)
    assert names(images, tmp_path) == ["a.png", "b.png"]
    assert images.label(1) == 0 and images.classes == []


def test_flat_folder_given_class_folders(tmp_path):
    save(tmp_path / "ant" / "1.png")
    with pytest.raises(ValueError, match=r"sub-folders \(ant\).*--dataset imagenet"):
        flat_folder(tmp_path)


def test_listed_images(tmp_path):
    save(tmp_path / "b" / "1.png")
    (tmp_path / "image_paths.json").write_text(json.dumps(["b/1.png"]))
    assert names(listed_images(tmp_path), tmp_path) == ["b/1.png"]


@pytest.mark.parametrize(
    "content, message",
    [("[", "not JSON"), ("{}", "list of paths"), ("[]", "list of paths"), ('["a.png", 3]', "list of paths")],
)
def test_listed_images_of_a_bad_list(tmp_path, content, message):
    (tmp_path / "image_paths.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        listed_images(tmp_path)


# jsonl


def test_json_lines(tmp_path):
    save(tmp_path / "in" / "a.png", (0, 255, 0))
    save(tmp_path / "elsewhere.png", (0, 0, 255))
    pairs = [{"image_path": "in/a.png", "text": ["é"]}, {"image_path": str(tmp_path / "elsewhere.png"), "text": ["b"]}]
    (tmp_path / "2.jsonl").write_text(json.dumps(pairs[0], ensure_ascii=False))
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs) + "\n  \n")
    lines = pickle.loads(pickle.dumps(JsonPairs(tmp_path)))
    assert [lines.identity(i) for i in range(3)] == [("1", 0), ("1", 1), ("2", 0)]
    assert lines[2] == pairs[0] and lines[1] == pairs[1]
    data = ImageDataset(jsonl_images(tmp_path), partial(center_view, image_size=SIZE))
    assert [data[i][0][:, 0, 0].tolist() for i in range(3)] == [[-1, 1, -1], [-1, -1, 1], [-1, 1, -1]]
    before = data.images.identity()
    (tmp_path / "2.jsonl").write_text(json.dumps(pairs[1]))
    assert jsonl_images(tmp_path).identity() != before


def test_json_lines_with_carriage_returns_and_blank_ends(tmp_path):
    texts = [json.dumps({"image_path": "x" * n}) for n in range(1, 30)]
    (tmp_path / "a.jsonl").write_text("\r\n".join(texts) + "\n\n\n")
    assert [pair["image_path"] for pair in JsonPairs(tmp_path)] == ["x" * n for n in range(1, 30)]


@pytest.mark.parametrize(
    "content, message",
    [("", "a.jsonl has no lines"), ("\n \n", "no lines"), ("{", "line 0 .*not JSON"), ("[1]", "line 0 .*image_path")],
)
def test_json_lines_of_a_bad_file(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        JsonPairs(tmp_path)


def test_a_pipe_among_the_lists_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl is not a regular file"):
        JsonPairs(tmp_path)


def test_damaged_line_is_skipped_like_a_damaged_image(tmp_path, caplog):
    save(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text('{"image_path": "a.png"}\n{"image\n')
    data = ImageDataset(jsonl_images(tmp_path), partial(center_view, image_size=SIZE))
    torch.testing.assert_close(data[1][0], data[0][0])
    assert data.skipped == 1 and "line 1 (from 0)" in caplog.text


# Draws


def passes(data, workers, epochs=(0, 1), **options):
    out = []
    loader = DataLoader(data, batch_size=5, num_workers=workers, persistent_workers=workers > 0, **options)
    for epoch in epochs:
        data.set_epoch(epoch)
        out.append(torch.cat([pixels for pixels, _ in loader]))
    return out


@pytest.fixture
def noisy(tmp_path):
    for i in range(12):
        save(tmp_path / "noisy" / f"{i:02d}{'x' * i}.png")
    return ImageDataset(flat_folder(tmp_path / "noisy"), partial(random_view, image_size=SIZE), seed=3)


def test_draws_are_a_function_of_seed_epoch_and_index(noisy, tmp_path):
    first, second = passes(noisy, 0)
    assert not torch.equal(first, second)
    again, other_epoch = passes(noisy, 2)  # persistent workers hear of the new epoch
    assert torch.equal(first, again) and torch.equal(second, other_epoch)
    noisy.set_epoch(1)
    torch.testing.assert_close(noisy[7][0], second[7], rtol=0, atol=0)
    other_seed = ImageDataset(noisy.images, noisy.transform, seed=4)
    assert not torch.equal(passes(other_seed, 0)[0], first)


def test_items_do_not_disturb_other_draws(noisy):
    random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), torch.rand(1)
    random.seed(1)
    torch.manual_seed(1)
    noisy[0]
    assert (random.random(), torch.rand(1)) == expected


# Files that cannot be read


def damage(folder):
    """Four of twelve images: cut off, empty, no image at all, gone."""
    cut = folder / "ant" / "0.png"
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[:3000])
    (folder / "ant" / "1.png").write_bytes(b"")
    (folder / "bee" / "2.png").write_bytes(b"nothing to see")
    (folder / "bee" / "3.png").unlink()
    return [0, 1, 8, 9]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced(classes, workers, caplog):
    images = class_folders(classes)
    bad = damage(classes)
    data = ImageDataset(images, partial(center_view, image_size=SIZE), seed=1)
    for _ in range(2):
        batches = list(DataLoader(data, batch_size=4, num_workers=workers))
    reds = torch.cat([pixels[:, 0, 0, 0] for pixels, _ in batches])
    sources = ((reds + 1) * 127.5 / 20).round().long().tolist()
    labels = torch.cat([labels for _, labels in batches]).tolist()
    good = sorted(set(range(12)) - set(bad))
    assert len(sources) == 12 and [sources[i] for i in good] == good
    assert set(sources) <= set(good) and labels == [source // 6 for source in sources]
    assert data.skipped == 4 and data.skipped_indices == bad
    if workers == 0:
        lines = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len(lines) == 4  # once per path, in two passes
        assert "ant/0.png (OSError: " in lines[0] and lines[0].endswith("; 1 so far") and "4 so far" in lines[3]


def test_unreadable_images_are_omitted(classes):
    images = class_folders(classes)
    bad = damage(classes)
    data = ImageDataset(images, partial(code_views, image_size=SIZE, ten_crop=False, crop_range=1.1), unreadable="omit")
    assert data[0] is None
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate_present)
    batches = list(loader)
    assert batches[0] is None  # both of the first batch
    assert batches[1][0].shape == (2, 2, 3, SIZE, SIZE)
    indices = torch.cat([batch[2] for batch in batches if batch])
    labels = torch.cat([batch[1] for batch in batches if batch])
    assert indices.tolist() == sorted(set(range(12)) - set(bad))
    assert labels.tolist() == [i // 6 for i in indices.tolist()]
    assert data.skipped == 4


def test_a_folder_of_unreadable_images_stops_the_run(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"x")
    images = flat_folder(tmp_path)
    data = ImageDataset(images, partial(center_view, image_size=SIZE))
    with pytest.raises(ValueError, match=r"none of 20 images(.|\n)*\d\d\.jpg \(UnidentifiedImageError"):
        data[5]


@pytest.mark.parametrize("workers", [0, 2])
def test_present_batches_unreadable_images_in_a_row_end_the_pass_with_any_number_of_workers(tmp_path, workers):
    """Twenty, however they fall into batches; nineteen are accidents."""
    for i in range(46):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"x")
    for i in (19, 20, 40):
        save(tmp_path / f"{i:02d}.jpg")
    data = ImageDataset(flat_folder(tmp_path), partial(center_view, image_size=SIZE), unreadable="omit")
    batches = [range(first, min(first + 3, 46)) for first in range(0, 46, 3)]
    found = [batch[2].tolist() for batch in present_batches(data, batches, workers, pin_memory=False) if batch]
    assert found == [[19, 20], [40]]
    (tmp_path / "40.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of 20 images in a row(.|\n)*40\.jpg \(Unid[^\n]*$"):
        list(present_batches(data, batches, workers, pin_memory=False))


def test_the_one_good_image_of_a_small_folder_is_found(tmp_path):
    for i in range(19):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"x")
    save(tmp_path / "99.png", (255, 0, 0))
    data = ImageDataset(flat_folder(tmp_path), partial(center_view, image_size=SIZE))
    assert all(data[i][0][0, 0, 0] == 1 for i in range(20))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_and_strips_are_skipped(tmp_path, monkeypatch):
    save(tmp_path / "0.png", (255, 0, 0))
    save(tmp_path / "1.png", size=(300, 300))
    save(tmp_path / "2.png", size=(1, 70000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 44000)  # an error above twice as many
    data = ImageDataset(flat_folder(tmp_path), partial(center_view, image_size=64))
    assert all(data[i][0][0, 0, 0] == 1 for i in range(3))
    assert data.skipped_indices == [1, 2]
