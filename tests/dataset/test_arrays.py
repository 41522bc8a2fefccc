"""Arrays stored beside codes: which array comes with which codes, and what is refused."""

import json
import shutil
from argparse import Namespace
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset.arrays import ANY_VIEW, ArrayFolder, collate, condition_folders, left_padded, prefix_mask, write_arrays
from dataset.build import build_dataset
from dataset.codes import open_codes
from tests.dataset.test_codes import SETTINGS, drawn_view, publish, write
from tests.dataset.test_t2i import COUNTS, TOKENS, make_codes
from tests.text_training import DIM, make_features, make_pairs

SKIPPED = (4, 5, 24)
PRESENT = [i for i in range(25) if i not in SKIPPED]


def map_of(index, view=0):
    return np.full((2, 2), 10 * index + view, np.float32)


@pytest.fixture
def codes(tmp_path):
    write(tmp_path / "codes", replace(SETTINGS, images="a" * 16), skipped=SKIPPED)
    return tmp_path / "codes"


def both_views(folder, codes, **more):
    maps = np.stack([[map_of(i, view) for view in (0, 1)] for i in PRESENT])
    write_arrays(folder, "depth", maps, **{"of": codes, "views": SETTINGS.views, "shard_size": 8, **more})
    return folder


def opened(codes, *folders, **more):
    args = Namespace(dataset="imagenet_code", code_path=codes, image_size=64, condition_path=[*map(str, folders)])
    return build_dataset(args, **more)


def test_items_have_the_array_of_their_image_and_view(codes, tmp_path):
    both_views(tmp_path / "depth", codes)
    data = opened(codes, f"depth={tmp_path / 'depth'}")
    seen = set()
    for epoch in range(3):
        data.set_epoch(epoch)
        for index, item in zip(PRESENT, data, strict=True):
            view = drawn_view(item["codes"], index)
            np.testing.assert_array_equal(item["depth"], map_of(index, view))
            seen.add(view)
    assert seen == {0, 1}
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert list(batch) == ["codes", "label", "depth"] and batch["depth"].shape == (4, 2, 2)
    plain = open_codes(codes)
    plain.set_epoch(2)
    assert all(torch.equal(one["codes"], other["codes"]) for one, other in zip(plain, data, strict=True))


def test_one_view_of_published_codes(tmp_path):
    publish(tmp_path / "codes", 5, views=1)
    write_arrays(tmp_path / "depth", "depth", [map_of(i) for i in range(5)], of=tmp_path / "codes")
    data = opened(tmp_path / "codes", f"depth={tmp_path / 'depth'}")
    assert [int(item["depth"][0, 0]) for item in data] == [0, 10, 20, 30, 40]


def test_arrays_of_any_view_and_of_different_lengths(codes, tmp_path):
    boxes = [np.full((i % 3 + 1, 4), i, np.int64) for i in PRESENT]
    write_arrays(tmp_path / "boxes", "boxes", boxes, of=codes, views=ANY_VIEW, shard_size=8)
    data = opened(codes, f"boxes={tmp_path / 'boxes'}")
    for item, box in zip(data, boxes, strict=True):
        np.testing.assert_array_equal(item["boxes"], box)
    assert data.rows() == {"boxes": 3}
    batch = next(iter(DataLoader(data, batch_size=5, collate_fn=partial(collate, rows=data.rows()))))
    assert batch["boxes"].shape == (5, 3, 4) and batch["boxes_length"].tolist() == [i % 3 + 1 for i in PRESENT[:5]]


def test_written_again_nothing_of_before_is_left(codes, tmp_path):
    folder = both_views(tmp_path / "depth", codes)
    identity = opened(codes, f"depth={folder}").identity()
    both_views(folder, codes)
    assert opened(codes, f"depth={folder}").identity() == identity
    write_arrays(folder, "depth", np.zeros((len(PRESENT), 2, 2, 2)), of=codes, views=SETTINGS.views, shard_size=8)
    assert opened(codes, f"depth={folder}").identity() != identity
    assert not opened(codes, f"depth={folder}")[3]["depth"].any()
    next(folder.glob("shard-000001.json")).unlink()
    with pytest.raises(ValueError, match=r"depth is incomplete: 3 of 4 shards .*: write it again"):
        ArrayFolder(folder, "depth")


def test_arrays_that_are_not_of_these_codes_are_refused(codes, tmp_path):
    folder = both_views(tmp_path / "depth", codes)
    one = tmp_path / "one"
    write_arrays(one, "depth", [map_of(i) for i in PRESENT], of=codes)
    write_arrays(tmp_path / "few", "depth", [map_of(i) for i in range(9)], views=ANY_VIEW)
    other = tmp_path / "other"
    shutil.copytree(codes, other)
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps(index | {"images": "b" * 16}))
    cropped = shutil.copytree(codes, tmp_path / "cropped")
    (cropped / "index.json").write_text(json.dumps(index | {"crop_range": 1.1}))
    for place, words, message in (
        (codes, f"depth={one}", r"depth in \S*one has the views center, and \S*codes center_flip too"),
        (codes, f"depth={tmp_path / 'few'}", r"few has no depth of image 9 \(and 14 more\) of \S*codes"),
        (other, f"depth={folder}", r"depth in \S*depth and \S*other are of other images"),
        (cropped, f"depth={folder}", r"depth in \S*depth is of --crop-range None, \S*cropped of 1\.1"),
        (codes, f"control={folder}", r"holds depth, not control: check --condition-path"),
        (codes, f"depth={codes}", r"holds codes or features, not depth"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(place, words)
    with pytest.raises(FileNotFoundError, match=r"nowhere/index\.json is missing"):
        opened(codes, f"depth={tmp_path / 'nowhere'}")
    opened(codes, f"depth={one}", random_view=False)


def test_a_second_crop_is_refused(tmp_path):
    for name in ("ten_crop", "ten_crop_105"):
        write(tmp_path / name)
    both = np.zeros((25, 2, 2, 2))
    write_arrays(tmp_path / "depth", "depth", both, of=tmp_path / "ten_crop", views=SETTINGS.views)
    with pytest.raises(ValueError, match=r"is of one crop, and \S*ten_crop and \S*ten_crop_105 are drawn from"):
        opened(tmp_path / "ten_crop", f"depth={tmp_path / 'depth'}")


@pytest.mark.parametrize(
    ("arrays", "more", "message"),
    [
        ([map_of(0)], {}, "1 arrays of depth for 22 samples"),
        ([np.zeros((2, i % 2 + 1)) for i in range(22)], {}, "only the first axis may differ"),
        (np.zeros((22, 3, 3)), {"views": SETTINGS.views}, r"the first axis has to go through center, center_flip"),
    ],
)
def test_arrays_are_checked_when_written(codes, tmp_path, arrays, more, message):
    with pytest.raises(ValueError, match=message):
        write_arrays(tmp_path / "depth", "depth", arrays, of=codes, **more)
    with pytest.raises(ValueError, match="holds codes or features: give depth a folder of its own"):
        write_arrays(codes, "depth", [map_of(i) for i in PRESENT], of=codes)
    assert len(open_codes(codes)) == 22


@pytest.mark.parametrize("word", ["depth", "=x", "depth=", "codes=x", "label=x", "caption=x"])
def test_condition_path_names_a_folder(word):
    with pytest.raises(ValueError, match=f"--condition-path {word}: give NAME=FOLDER"):
        condition_folders([word])
    with pytest.raises(ValueError, match=r"--condition-path a=2: .*a name other than .*, a"):
        condition_folders(["a=1", "a=2"])


def test_pairs_have_the_array_of_their_line(tmp_path):
    make_pairs(tmp_path / "pairs", COUNTS)
    make_features(tmp_path / "features", COUNTS)
    make_codes(tmp_path / "codes")
    number = 0
    for stem, count in COUNTS.items():
        lines = [line for line in range(count) if number + line != 4]
        maps = [map_of(number + line) for line in lines]
        write_arrays(tmp_path / "depth" / stem, "depth", maps, of=tmp_path / "codes" / stem)
        number += count
    args = Namespace(dataset="t2i_code", data_path=tmp_path / "pairs", t5_feat_path=tmp_path / "features")
    args.code_path, args.image_size, args.downsample_size, args.t5_feature_dim = tmp_path / "codes", 16, 4, DIM
    args.condition_path = [f"depth={tmp_path / 'depth'}"]
    data = build_dataset(args)
    for index in range(14):
        item = data[index]
        assert item["valid"] == (index != 4)
        np.testing.assert_array_equal(item["depth"], map_of(index if index != 4 else 0))
    batch = collate([data[i] for i in range(14)], data.rows(TOKENS))
    assert batch["depth"].shape == (14, 2, 2) and batch["caption"].shape == (14, TOKENS, DIM)
    assert len(data.identity()) == 2
    with pytest.raises(FileNotFoundError, match=r"has no depth of these pairs"):
        args.condition_path = [f"depth={tmp_path / 'depth' / 'part-a'}"]
        build_dataset(args)


def test_left_padded_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(length, 4, generator=generator) for length in (3, 0, 6, 9, 1)]
    padded, lengths = left_padded(features, 6)
    expected = np.zeros((5, 6, 4), np.float32)
    for i, caption in enumerate(features):
        kept = min(len(caption), 6)
        for row in range(kept):
            expected[i, 6 - kept + row] = caption[row]
    np.testing.assert_array_equal(padded, expected)
    assert lengths.tolist() == [3, 0, 6, 6, 1] and lengths.dtype == torch.int64
    mask = prefix_mask(lengths, 6)
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask, (expected != 0).any(-1))


def test_left_padded_takes_the_dtype_of_the_first_with_rows():
    half, none = torch.ones(2, 4, dtype=torch.bfloat16), torch.zeros(0, 4)
    assert left_padded([none, half], 3)[0].dtype == left_padded([half, none], 3)[0].dtype == torch.bfloat16
    assert left_padded([none], 3)[0].dtype == torch.float32
