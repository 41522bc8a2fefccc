"""Codes on disk: packed shards written, killed, resumed, damaged; the published layout; which views are drawn."""

import json
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset.augmentation import FLIP_VIEWS, TEN_CROP_VIEWS
from dataset.code_files import CodeSettings, CodeWriter, PublishedFolder, ShardFolder, write_published
from dataset.codes import open_codes

SETTINGS = CodeSettings(
    dataset="imagenet",
    image_size=64,
    tokens=16,
    views=FLIP_VIEWS,
    codebook_size=16384,
    num_images=25,
    classes=["ant", "bee", "cat"],
    vq_model="VQ-16",
    shard_size=4,
)


def codes_of(settings, index, shift=0):
    """(views, tokens), each value telling the image, the view and the token."""
    views, tokens = len(settings.views), settings.tokens
    return np.arange(views * tokens).reshape(views, tokens) + index * 400 + shift


def write(folder, settings=SETTINGS, shards=None, skipped=(), shift=0):
    writer = CodeWriter(folder, settings)
    for shard in writer.missing_shards() if shards is None else shards:
        images = settings.images_of(shard)
        indices = [i for i in images if i not in skipped]
        codes = [codes_of(settings, i, shift) for i in indices]
        codes = np.asarray(codes).reshape(-1, len(settings.views), settings.tokens)
        labels = np.asarray(indices, np.int64) % 3
        writer.write_shard(shard, codes, labels, np.asarray(indices, np.int64), [i for i in images if i in skipped])
    return writer


def publish(folder, count=25, views=2, image_size=64, shift=0):
    settings = replace(SETTINGS, views=[str(v) for v in range(views)])
    for i in range(count):
        write_published(folder, image_size, i, codes_of(settings, i, shift), i % 3)


def drawn_view(codes, index, shift=0):
    return int(codes[0] - index * 400 - shift) // SETTINGS.tokens


# Packed


def test_round_trip(tmp_path):
    write(tmp_path)
    data = open_codes(tmp_path, seed=1)
    assert len(data) == 25 and data.tokens == 16 and data.settings == SETTINGS
    assert data.settings.num_classes == 3
    for i in range(25):
        codes, label = data[i].values()
        assert codes.dtype == torch.int64 and codes.shape == (16,) and label == i % 3 and isinstance(label, int)
        view = drawn_view(codes, i)
        np.testing.assert_array_equal(codes, codes_of(SETTINGS, i)[view])
    assert {drawn_view(data[i]["codes"], i) for i in range(25)} == {0, 1}
    assert np.load(tmp_path / "shard-000000.npy").dtype == np.uint16
    data.sources[0].verify()


def test_batches_are_the_items(tmp_path):
    write(tmp_path)
    data = open_codes(tmp_path)
    order = np.random.RandomState(0).permutation(25).tolist()
    order += [3, 3]
    for item, i in zip(data.__getitems__(order), order):
        assert torch.equal(item["codes"], data[i]["codes"]) and item["label"] == data[i]["label"]
    assert torch.equal(data[-1]["codes"], data[24]["codes"])
    for outside in ([25], [-1], [0, 30]):
        with pytest.raises(IndexError):
            data.__getitems__(outside)
    with pytest.raises(IndexError):
        data[25]


@pytest.mark.slow
def test_views_are_a_function_of_seed_epoch_and_index(tmp_path):
    write(tmp_path)
    data = open_codes(tmp_path, seed=1)

    def read(workers, data=data, **options):
        out = []
        loader = DataLoader(data, batch_size=4, num_workers=workers, persistent_workers=workers > 0, **options)
        for epoch in (0, 1):
            data.set_epoch(epoch)
            out.append(torch.cat([batch["codes"] for batch in loader]))
        return out

    expected = read(0)
    assert not torch.equal(*expected)
    for other in (read(2), read(1, multiprocessing_context="spawn")):
        assert all(torch.equal(a, b) for a, b in zip(expected, other))
    assert not torch.equal(read(0, open_codes(tmp_path, seed=2))[0], expected[0])


def test_pickles_without_the_maps(tmp_path):
    write(tmp_path)
    data = open_codes(tmp_path)
    assert torch.equal(data[0]["codes"], pickle.loads(pickle.dumps(data))[0]["codes"])
    before = len(pickle.dumps(data))
    data.__getitems__(range(25))
    assert len(pickle.dumps(data)) == before < 5000


def test_large_codebooks_get_four_bytes(tmp_path):
    settings = replace(SETTINGS, codebook_size=70000)
    write(tmp_path, settings, shift=60000 - 24 * 400)
    assert np.load(tmp_path / "shard-000006.npy").dtype == np.uint32
    assert open_codes(tmp_path)[24]["codes"].max() >= 60000
    assert replace(SETTINGS, codebook_size=65536).dtype == np.uint16


def test_skipped_images_close_the_gap(tmp_path):
    write(tmp_path, skipped=[4, 5, 6, 7, 9, 24])  # all of shards 1 and 6
    data = open_codes(tmp_path, random_view=False)
    present = [i for i in range(25) if i not in (4, 5, 6, 7, 9, 24)]
    assert data.sources[0].numbers.tolist() == present
    assert [int(item["codes"][0]) // 400 for item in data] == present
    assert [item["label"] for item in data] == [i % 3 for i in present]
    data.sources[0].verify()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codes": np.full((4, 2, 16), 16384)}, "from 16384 to 16384, outside a codebook of 16384"),
        ({"codes": np.full((4, 2, 16), -1)}, "outside a codebook"),
        ({"labels": np.arange(4)}, "labels from 0 to 3, outside 3 classes"),
    ],
)
def test_shards_are_checked_when_written(tmp_path, change, message):
    shard = {"codes": np.zeros((4, 2, 16), int), "labels": np.zeros(4, int), "indices": np.arange(4, 8), **change}
    with pytest.raises(ValueError, match=message):
        CodeWriter(tmp_path, SETTINGS).write_shard(1, **shard)
    assert not list(tmp_path.glob("shard*"))


def test_other_settings_are_refused(tmp_path):
    write(tmp_path, shards=[0])
    with pytest.raises(
        ValueError, match=r"(?s)another folder.*image_size: 64 there, 128 now.*tokens: 16 there, 64 now"
    ):
        CodeWriter(tmp_path, replace(SETTINGS, image_size=128, tokens=64))
    with pytest.raises(ValueError, match="tokenizer: None there, 'abc' now") as error:
        CodeWriter(tmp_path, replace(SETTINGS, tokenizer="abc"))
    assert "image_size" not in str(error.value)
    CodeWriter(tmp_path, SETTINGS)


def test_index_is_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        ShardFolder(tmp_path)
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    for content, message in [
        ("{", "index.json is damaged"),
        (json.dumps({**index, "format": 9}), "format"),
        (json.dumps({k: v for k, v in index.items() if k != "tokens"}), "lacks or has unknown settings: tokens"),
    ]:
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            ShardFolder(tmp_path)


def test_damaged_shards(tmp_path):
    write(tmp_path)
    file = tmp_path / "shard-000003.npy"
    whole = file.read_bytes()
    for size in (0, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"shard-000003\.npy is damaged \({size} bytes"):
            open_codes(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-000003\.npy is damaged \(missing"):
        open_codes(tmp_path)
    (tmp_path / "shard-000005.json").rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"6 of 7 shards .*: run autoregressive/train/extract_codes_c2i.py again"):
        open_codes(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "shard-000005.json")
    assert CodeWriter(tmp_path, SETTINGS).missing_shards() == [3]  # so running again mends it
    write(tmp_path)
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"(?s)shard-000003\.npy \(checksum.*remove shard-000003\.json"):
        ShardFolder(tmp_path).verify()
    file.write_bytes(b"x" * len(whole))
    data = open_codes(tmp_path)
    with pytest.raises(ValueError, match=r"shard-000003\.npy is damaged \(not an array"):
        data[13]
    (tmp_path / "shard-000003.json").write_text("{}")
    with pytest.raises(ValueError, match=r"shard-000003\.json is damaged"):
        open_codes(tmp_path)


# Published


def test_published_layout_is_the_recorded_one(tmp_path):
    write_published(tmp_path, 64, 7, torch.arange(32).reshape(2, 16), torch.tensor(5))
    codes, label = (np.load(tmp_path / f"imagenet64_{kind}" / "7.npy") for kind in ("codes", "labels"))
    assert codes.dtype == label.dtype == np.int64
    assert codes.shape == (1, 2, 16) and label.tolist() == [5]


def test_published_items(tmp_path):
    publish(tmp_path / "flip")
    data = open_codes(tmp_path / "flip", 64)
    views = []
    for i in range(25):  # in numeric order, not 0, 1, 10, 11
        codes, label = data[i].values()
        views.append(drawn_view(codes, i))
        assert codes.dtype == torch.int64 and label == i % 3
        np.testing.assert_array_equal(codes, codes_of(SETTINGS, i)[views[-1]])
    assert set(views) == {0, 1}
    batch = torch.cat([part["codes"] for part in DataLoader(data, batch_size=4, num_workers=2)])
    assert [drawn_view(codes, i) for i, codes in enumerate(batch)] == views


def test_published_name_without_random_views(tmp_path, caplog):
    folder = tmp_path / "plain"
    publish(folder)
    data = open_codes(folder, 64)
    assert {drawn_view(data[i]["codes"], i) for i in range(25)} == {0}
    assert "2 views" in caplog.text and "'flip'" in caplog.text
    data = open_codes(folder, 64, random_view=True)
    assert {drawn_view(data[i]["codes"], i) for i in range(25)} == {0, 1}


def test_published_codes_and_labels_must_match(tmp_path):
    publish(tmp_path)
    (tmp_path / "imagenet64_labels" / "3.npy").unlink()
    with pytest.raises(ValueError, match=r"25 samples.*24 in .*missing in .*imagenet64_labels: 3\.npy"):
        open_codes(tmp_path, 64)
    (tmp_path / "imagenet64_codes" / "3.npy").unlink()
    (tmp_path / "imagenet64_codes" / "4.npy").unlink()
    with pytest.raises(ValueError, match=r"missing in .*imagenet64_codes: 4\.npy"):
        open_codes(tmp_path, 64)
    (tmp_path / "imagenet64_labels" / "4.npy").unlink()
    data = open_codes(tmp_path, 64)  # numbers may have gaps
    assert len(data) == 23 and int(data[3]["codes"][0]) == 5 * 400


def test_published_files_are_checked(tmp_path):
    publish(tmp_path, count=3)
    file = tmp_path / "imagenet64_codes" / "1.npy"
    data = open_codes(tmp_path, 64)
    for array in [np.zeros((1, 2, 9), int), np.zeros((2, 16), int), np.zeros((1, 2, 16))]:
        np.save(file, array)
        with pytest.raises(ValueError, match=r"1\.npy holds .*expected integers \(1, 2, 16\)"):
            data[1]
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"1\.npy is damaged"):
        data[1]
    with pytest.raises(FileNotFoundError, match="imagenet128_codes does not exist"):
        PublishedFolder(tmp_path, 128)


# ten_crop and ten_crop_105


@pytest.mark.parametrize(
    ("layout", "name", "sibling"),
    [
        ("packed", "flip_ten_crop", "flip_ten_crop_105"),
        ("published", "ten_crop/flip_ten_crop", "ten_crop/flip_ten_crop_105"),
        ("packed", "flip_ten_crop/codes", "flip_ten_crop_105/codes"),
    ],
)
def test_ten_crop_draws_from_its_sibling_too(tmp_path, layout, name, sibling):
    settings = replace(SETTINGS, views=TEN_CROP_VIEWS, num_images=50)
    for folder, shift in ((name, 0), (sibling, 160)):
        if layout == "packed":
            write(tmp_path / folder, replace(settings, codebook_size=65536, crop_range=1.05), shift=shift)
        else:
            publish(tmp_path / folder, 50, views=10, shift=shift)
    data = open_codes(tmp_path / name, 64)
    drawn = Counter()
    for epoch in range(4):
        data.set_epoch(epoch)
        for i, (codes, label) in enumerate(map(dict.values, data)):
            drawn[drawn_view(codes, i)] += 1  # 0 to 9 here, 10 to 19 in the sibling
            assert label == i % 3
    assert set(drawn) == set(range(20))
    assert 75 < sum(drawn[view] for view in range(10)) < 125
    assert str(tmp_path / sibling) in data.describe()
    alone = open_codes(tmp_path / sibling, 64)
    assert len(alone.sources) == 1
    assert len(open_codes(tmp_path / name, 64, random_view=False).sources) == 1


@pytest.mark.parametrize("layout", ["packed", "published"])
def test_siblings_must_hold_the_same_images(tmp_path, layout):
    for folder, count in (("flip_ten_crop", 25), ("flip_ten_crop_105", 24)):
        if layout == "packed":
            write(tmp_path / folder, replace(SETTINGS, num_images=count))
        else:
            publish(tmp_path / folder, count)
    with pytest.raises(ValueError, match=r"25 samples.*24 .*hold other images"):
        open_codes(tmp_path / "flip_ten_crop", 64)


# Which layout, which size


def test_open_codes_says_what_it_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="--code-path"):
        open_codes(tmp_path / "nowhere", 64)
    with pytest.raises(ValueError, match=r"neither index\.json.*imagenet64_codes/.*In it: nothing"):
        open_codes(tmp_path, 64)
    (tmp_path / "holiday").mkdir()
    with pytest.raises(ValueError, match="In it: holiday"):
        open_codes(tmp_path, 64)
    publish(tmp_path, 1)
    with pytest.raises(ValueError, match="--image-size 64, not 256"):
        open_codes(tmp_path, 256)


def test_open_codes_compares_the_tokens_per_image(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(ValueError, match=r"16 tokens per image, which fits --image-size 64; --image-size 256 .* 256"):
        open_codes(tmp_path / "a", 256)
    with pytest.raises(ValueError, match=r"16 tokens .*--image-size 32; --image-size 64 with --downsample-size 8.* 64"):
        open_codes(tmp_path / "a", 64, downsample_size=8)
    write(tmp_path / "b", replace(SETTINGS, tokens=15))
    with pytest.raises(ValueError, match="15 tokens per image; --image-size 64"):
        open_codes(tmp_path / "b", 64)
    with pytest.raises(ValueError, match="--image-size 64, not 32"):
        open_codes(tmp_path / "a", 32, downsample_size=8)
