"""Image-text pairs as items: what is read, what does not count, what is drawn, and what is said where data is wrong."""

import json
import pickle
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset.arrays import collate
from dataset.augmentation import center_view, random_crop_arr, to_tensor
from dataset.build import build_dataset
from dataset.code_files import TEXT_EXTRACTION, CodeSettings, CodeWriter
from dataset.images import drawing_from
from dataset.sources import PairViews, chosen_files, open_pairs
from dataset.store import Loose
from dataset.t2i import TextCodes, TextImages
from dataset.text_features import Features
from tests.text_training import DIM, TOKENS, caption_features, make_features, make_pairs, make_shards, picture, png
from utils.rng import item_seed

COUNTS = {"part-a": 9, "part-b": 5}
SIZE, GRID = 16, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs, the same as shards, and features; read-only."""
    folder = tmp_path_factory.mktemp("pairs")
    make_pairs(folder / "pairs", COUNTS)
    make_shards(folder / "shards", COUNTS)
    make_features(folder / "features", COUNTS)
    make_features(folder / "short", COUNTS, missing=(4,), shift=100)
    return folder


def batched(read):
    return collate(read, {"caption": TOKENS})


def items(data, pairs="pairs", **more):
    features = more.pop("features", data / "features")
    return TextImages(open_pairs(data / pairs), Features(features), image_size=SIZE, **more)


# What is read


@pytest.mark.parametrize("pairs", ["pairs", "shards"])
def test_an_item_is_the_centre_crop_and_the_features_of_its_line(data, pairs):
    text_images = items(data, pairs)
    assert len(text_images) == 14
    for index in range(14):
        item = text_images[index]
        assert item["valid"] and torch.equal(item["image"], center_view(picture(index), SIZE))
        assert torch.equal(item["caption"], caption_features(index))
    with pytest.raises(IndexError):
        text_images[14]


@pytest.mark.parametrize("pairs", ["pairs", "shards"])
def test_identities_count_from_the_beginning_of_each_file(data, pairs):
    opened = open_pairs(data / pairs)
    expected = [(stem, line) for stem, count in COUNTS.items() for line in range(count)]
    assert [opened.identity(i) for i in range(len(opened))] == expected
    assert opened.files == list(COUNTS.items())
    assert opened.texts(2)[0] == "a blue thing" and opened.texts(9)[0] == "a green thing"
    assert "part-b" in opened.where(9) and "0" in opened.where(9)


def test_build_dataset(data, tmp_path):
    args = Namespace(dataset="t2i", data_path=data / "shards", t5_feat_path=data / "features", image_size=SIZE)
    args.t5_feature_dim, args.short_t5_feat_path = DIM, data / "short"
    built = build_dataset(args)
    assert built.short_features.dim == DIM and built[13]["image"].shape == (3, SIZE, SIZE)
    args.t5_feature_dim = 2048
    with pytest.raises(ValueError, match=r"features.*6.*2048"):
        build_dataset(args)
    args.t5_feature_dim, args.t5_feat_path = DIM, None
    with pytest.raises(ValueError, match=r"--dataset t2i needs --t5-feat-path"):
        build_dataset(args)
    with pytest.raises(ValueError, match=r"--dataset t2i_code needs --code-path"):
        build_dataset(Namespace(**{**vars(args), "dataset": "t2i_code", "t5_feat_path": data / "features"}))


def test_features_in_the_published_layout(data, tmp_path):
    for line in range(9):
        (tmp_path / "part-a").mkdir(exist_ok=True)
        np.save(tmp_path / "part-a" / f"{line}.npy", caption_features(line).numpy()[None])
    text_images = items(data, features=tmp_path)
    assert torch.equal(text_images[7]["caption"], caption_features(7)) and text_images[7]["valid"]
    assert not text_images[9]["valid"], "part-b has no features"


# What does not count


def test_pairs_that_do_not_count_have_the_shape_of_others(data, tmp_path, caplog):
    """Damaged and missing images, small ones, damaged lines and missing features."""
    folder = shutil.copytree(data / "pairs", tmp_path / "pairs")
    (folder / "images" / "1.png").write_bytes(b"no picture")
    (folder / "images" / "2.png").write_bytes(png(picture(2))[:60])
    (folder / "images" / "3.png").unlink()
    (folder / "images" / "4.png").write_bytes(png(picture(4, size=SIZE - 1)))
    lines = (folder / "part-a.jsonl").read_text().splitlines()
    lines[5], lines[6] = '{"image_path": "ima', json.dumps({"text": ["no image_path"]})
    (folder / "part-a.jsonl").write_text("\n".join(lines))
    make_features(tmp_path / "features", COUNTS, missing=(7,))
    text_images = TextImages(open_pairs(folder), Features(tmp_path / "features"), image_size=SIZE)
    found = [text_images[i] for i in range(14)]
    assert [i for i, item in enumerate(found) if not item["valid"]] == [1, 2, 3, 4, 5, 6, 7]
    for item in found:
        pixels, features = item["image"], item["caption"]
        assert pixels.shape == (3, SIZE, SIZE) and pixels.dtype == torch.float32 and features.shape[1] == DIM
        assert item["valid"] or (not pixels.any() and len(features) == 0)
    assert text_images.skipped == 7
    text_images[4]
    told = [record.message for record in caplog.records if "does not count" in record.message]
    assert len(told) == 7, "each is told once"
    assert any("line 4 (from 0)" in line and "19x15 pixels, smaller than --image-size 16" in line for line in told)
    assert any("line 7" in line and "no caption features" in line for line in told)
    batch = batched(found)
    assert batch["image"].shape == (14, 3, SIZE, SIZE) and batch["caption"].shape == (14, TOKENS, DIM)
    assert batch["caption_length"][1:8].tolist() == [0] * 7 and batch["valid"].sum() == 7


def test_nothing_that_counts_is_an_error(data, tmp_path):
    """A wrong folder of features must not pass for a data set of which nothing counts."""
    make_features(tmp_path / "features", {"other": 3})
    text_images = items(data, features=tmp_path / "features")
    with pytest.raises(
        ValueError, match=r"none of 14 pairs in a row could be used; are the paths right(.|\n)*line 4 .*no cap"
    ):
        [text_images[i] for i in range(14)]
    for _ in range(3):  # the same few again and again are not many
        mixed = items(data, features=data / "short")
        [mixed[i] for i in [4] * 20]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_that_counts_is_an_error_in_loader_processes(data, workers):
    text_images = TextImages(open_pairs(data / "pairs"), Features(data / "features"), image_size=64)
    loader = DataLoader(text_images, batch_size=2, num_workers=workers, collate_fn=list)
    with pytest.raises(ValueError, match=r"none of 14 pairs in a row could be used(.|\n)*smaller than --image-size 64"):
        list(loader)
    told = text_images.none_usable("nothing").splitlines()[1:]
    assert len(told) == 5 and all("smaller than --image-size 64" in line for line in told) and "line 4" in told[-1]


def test_views_for_extraction(data, tmp_path):
    folder = shutil.copytree(data / "pairs", tmp_path / "pairs")
    (folder / "images" / "3.png").unlink()
    views = PairViews(open_pairs(folder), SIZE)
    (pixels,), label, index = views[8]
    assert torch.equal(pixels, center_view(picture(8), SIZE)) and (label, index) == (0, 8)
    assert views[3] is None and views.skipped == 1


# What is drawn


def test_short_captions_are_a_function_of_seed_epoch_and_index(data):
    text_images = items(data, short_features=Features(data / "short"))
    taken = []
    for epoch in range(20):
        text_images.set_epoch(epoch)
        for index in range(14):
            features = text_images[index]["caption"]
            is_short = torch.equal(features, caption_features(index + 100))
            assert is_short or torch.equal(features, caption_features(index))
            drawn = item_seed(0, epoch, index, 1) / 2**63 < 0.3
            assert is_short == (drawn and index != 4), "pair 4 has no short one"
            taken.append(is_short)
    assert 0.22 < np.mean(taken) < 0.34


def test_random_crops_repeat(data):
    text_images = items(data, random_crop=True, seed=3)
    text_images.set_epoch(2)
    with drawing_from(item_seed(3, 2, 5)):
        expected = to_tensor(random_crop_arr(picture(5), SIZE))
    assert torch.equal(text_images[5]["image"], expected)
    text_images.set_epoch(3)
    assert not torch.equal(text_images[5]["image"], expected)


@pytest.mark.parametrize("pairs", ["pairs", "shards"])
def test_workers_read_the_same(data, pairs):
    text_images = items(data, pairs, short_features=Features(data / "short"), random_crop=True)
    text_images.set_epoch(1)
    batches = [list(DataLoader(text_images, batch_size=5, num_workers=n, collate_fn=batched)) for n in (0, 2)]
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    again = pickle.loads(pickle.dumps(text_images))
    assert torch.equal(again[3]["image"], text_images[3]["image"])


# Batches


def test_half_precision_features_stay_half():
    """Also beside a pair that has none."""
    read = [{"caption": torch.zeros(0, DIM)}, {"caption": caption_features(1).bfloat16()}]
    assert batched(read)["caption"].dtype == torch.bfloat16


# Codes


def codes_of(number):
    return (np.arange(GRID**2) + number) % 50


def make_codes(folder, published=False, without=(4,), **more):
    number = 0
    for stem, count in COUNTS.items():
        lines = [line for line in range(count) if number + line not in without]
        codes = np.stack([codes_of(number + line) for line in lines])
        if published:
            for line, row in zip(lines, codes):
                Loose(folder / stem, "integers", ()).write(line, row)
        else:
            shape = {
                "image_size": SIZE,
                "tokens": GRID**2,
                "codebook_size": 50,
                "shard_size": 4,
                "made_by": TEXT_EXTRACTION,
                **more,
            }
            settings = CodeSettings(dataset="t2i", views=("center",), num_images=count, vq_model="VQ-4", **shape)
            writer = CodeWriter(folder / stem, settings)
            for shard in writer.missing_shards():
                chosen = [i for i, line in enumerate(lines) if line in settings.images_of(shard)]
                there = [lines[i] for i in chosen]
                missing = sorted(set(settings.images_of(shard)) - set(there))
                writer.write_shard(shard, codes[chosen][:, None], np.zeros(len(chosen), int), there, missing)
        number += count
    return folder


@pytest.mark.parametrize("published", [False, True])
def test_codes_by_stem_and_line(data, tmp_path, published):
    make_codes(tmp_path / "codes", published)
    codes = TextCodes(tmp_path / "codes", list(COUNTS), GRID**2, 50)
    text_images = TextImages(open_pairs(data / "pairs"), Features(data / "features"), codes=codes)
    for index in range(14):
        found, features, valid = (text_images[index][name] for name in ("codes", "caption", "valid"))
        assert found.dtype == torch.int64 and found.shape == (GRID**2,)
        assert valid == (index != 4)
        if valid:
            assert found.tolist() == codes_of(index).tolist() and torch.equal(features, caption_features(index))
    assert codes.get("part-a", 99) is None and codes.get("part-z", 0) is None
    assert pickle.loads(pickle.dumps(codes)).get("part-b", 1).tolist() == codes_of(10).tolist()


def test_codes_of_some_files_only(data, tmp_path, caplog):
    make_codes(tmp_path / "codes")
    shutil.rmtree(tmp_path / "codes" / "part-a")
    codes = TextCodes(tmp_path / "codes", list(COUNTS), GRID**2, 50)
    assert codes.get("part-a", 0) is None and codes.get("part-b", 0).tolist() == codes_of(9).tolist()
    TextImages(open_pairs(data / "pairs"), Features(data / "features"), codes=codes)
    assert f"{codes.folder} has a folder of 1 of 2 files" in caplog.text


def test_text_codes_of_two_tokenizers_are_refused(tmp_path):
    folder = make_codes(tmp_path)
    for stem, tokenizer in (("part-a", "a" * 32), ("part-b", "a" * 16 + "b" * 16)):
        index = folder / stem / "index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": tokenizer}))
    with pytest.raises(ValueError, match=r"do not belong together: tokenizer a{32} and a{16}b{16}"):
        TextCodes(folder, list(COUNTS), GRID**2)
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": "a" * 16}))  # as the first edition has it
    codes = TextCodes(folder, list(COUNTS), GRID**2)
    assert codes.tokenizer == "a" * 32 and codes.vocab_size == 50


def test_codes_that_do_not_fit(tmp_path):
    def opened(folder, vocab=50, tokens=GRID**2):
        return TextCodes(folder, list(COUNTS), tokens, vocab)

    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist(.|\n)*extract_codes_t2i\.py"):
        opened(tmp_path / "nowhere")
    (tmp_path / "empty" / "other").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds no codes of these pairs: a folder part-a/ .*in it: other"):
        opened(tmp_path / "empty")
    packed, published = make_codes(tmp_path / "packed"), make_codes(tmp_path / "published", published=True)
    with pytest.raises(ValueError, match=r"are of --image-size 16 and have 16 tokens an image; 64 are needed"):
        opened(packed, tokens=64)
    with pytest.raises(ValueError, match=r"made with 50 codes; pass --vocab-size 50"):
        opened(packed, vocab=49)
    with pytest.raises(ValueError, match=r"6\.npy holds int64 \(1, 16\), expected integers \(1, 64\)"):
        opened(published, tokens=64).get("part-a", 6)
    with pytest.raises(ValueError, match=r"part-a has codes to 21 in line 6, not below --vocab-size 21"):
        opened(published, vocab=21).get("part-a", 6)
    (published / "part-a" / "6.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"6\.npy is damaged"):
        opened(published).get("part-a", 6)
    (packed / "part-a" / "shard-000001.json").unlink()
    with pytest.raises(ValueError, match=r"part-a is incomplete: 2 of 3 shards.*extract_codes_t2i\.py"):
        opened(packed)


# Lists


def test_lists_that_are_not_as_they_should_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: check --data-path"):
        open_pairs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \*\.jsonl files"):
        open_pairs(tmp_path)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": ["a bee"]}))
    with pytest.raises(
        ValueError, match=r"line 0 \(from 0\) of .*a\.jsonl must be an object with a string 'image_path'"
    ):
        open_pairs(tmp_path)
    file.write_text("\n".join(json.dumps({"image_path": "x", **more}) for more in ({"text": "one"}, {}, {"text": [7]})))
    pairs = open_pairs(tmp_path)
    assert pairs.texts(0) == ["one"]
    for line in (1, 2):
        with pytest.raises(ValueError, match=rf"line {line} \(from 0\) of .*a\.jsonl must have 'text'"):
            pairs.texts(line)
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"line 0 \(from 0\) of .*a\.jsonl is not JSON: maximum recursion depth"):
        open_pairs(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds \*\.jsonl and \*\.tar"):
        open_pairs(tmp_path)


@pytest.mark.parametrize(("first", "last", "chosen"), [(0, None, [0, 1]), (0, 0, [0]), (1, 9, [1]), (-3, 1, [0, 1])])
def test_files_are_chosen_by_number(data, first, last, chosen):
    assert chosen_files(open_pairs(data / "pairs"), first, last) == chosen
