"""Text features on disk: packed ones written, resumed, damaged; the published layout; both read alike."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch

from dataset.store import Loose
from dataset.text_features import Features, FeatureWriter
from tests.text_training import write_stem

DIM = 6
LINES = {"part-0": 11, "part-1": 4, "odd.name": 1}
NONE = {("part-0", 2), ("part-0", 3), ("part-1", 0)}


def rows(stem, line):
    """The features of a line: as many rows as its name and number say, whole numbers that every dtype holds."""
    length = 1 + (line * 3 + len(stem)) % 5
    return (torch.arange(length * DIM).reshape(length, DIM) + 8 * line).float()


def lines_of(stem):
    return [None if (stem, line) in NONE else rows(stem, line) for line in range(LINES[stem])]


def make_writer(folder, **changes):
    settings = {"dim": DIM, "max_length": 8, "dtype": "float32", "settings": {"model": "none"}, "shard_size": 4}
    return FeatureWriter(folder, **{**settings, **changes})


def write(folder, **changes):
    writer = make_writer(folder, **changes)
    for stem in LINES:
        write_stem(writer, stem, lines_of(stem))
    return folder


def publish(folder):
    for stem in LINES:
        for line, features in enumerate(lines_of(stem)):
            if features is not None:
                Loose(folder / stem, "floats", ()).write(line, features.numpy())
    return folder


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# What comes back


@pytest.mark.parametrize("make", [write, publish])
def test_round_trip(tmp_path, make):
    store = Features(make(tmp_path / "features"), dim=DIM)
    assert store.packed == (make is write)
    assert len(store) == 13 and store.dim == DIM
    for stem, count in LINES.items():
        for line in range(count):
            found = store.get(stem, line)
            if (stem, line) in NONE:
                assert found is None
            else:
                assert found.dtype == torch.float32 and torch.equal(found, rows(stem, line))


@pytest.mark.parametrize("make", [write, publish])
def test_which_lines_have_features(tmp_path, make):
    store = Features(make(tmp_path / "features"))
    for stem in LINES:
        assert store.present(stem).tolist() == [rows is not None for rows in lines_of(stem)]
    assert store.present("part-9").shape == (0,) and store.present("part-9").dtype == bool


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(tmp_path, dtype):
    features = torch.randn(5, DIM, generator=torch.Generator().manual_seed(0))
    write_stem(make_writer(tmp_path, dtype=dtype), "a", [features])
    found = Features(tmp_path).get("a", 0)
    assert found.dtype == getattr(torch, dtype) and torch.equal(found, features.to(found.dtype))
    bytes_each = (tmp_path / "a" / "shard-000000.npy").stat().st_size - 128
    assert bytes_each == 5 * DIM * (4 if dtype == "float32" else 2)


def test_bfloat16_is_stored_as_its_bits(tmp_path):
    """Any numpy reads the files: the upper half of a float32."""
    features = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    write_stem(make_writer(tmp_path, dtype="bfloat16"), "a", [features])
    bits = np.load(tmp_path / "a" / "shard-000000.npy")
    assert bits.dtype == np.uint16
    np.testing.assert_array_equal((bits.astype(np.uint32) << 16).view(np.float32), features.float())


def test_files_say_what_they_are(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index == {
        "format": 1,
        "dim": 6,
        "max_length": 8,
        "dtype": "float32",
        "shard_size": 4,
        "settings": {"model": "none"},
    }
    sidecar = json.loads((tmp_path / "part-0" / "shard-000000.json").read_text())
    assert sidecar["lines"] == 11 and sidecar["captions"] == 2
    ends = np.load(tmp_path / "part-0" / "shard-000000.ends.npy")
    lengths = [0 if features is None else len(features) for features in lines_of("part-0")[:4]]
    np.testing.assert_array_equal(ends, np.cumsum(lengths))
    assert Features(tmp_path).settings == {"model": "none"} and Features(tmp_path).max_length == 8


def test_pickles_without_the_maps(tmp_path):
    store = Features(write(tmp_path))
    before = len(pickle.dumps(store))
    assert torch.equal(pickle.loads(pickle.dumps(store)).get("part-0", 9), rows("part-0", 9))
    store.get("part-0", 9)
    assert len(pickle.dumps(store)) == before


# Written again, resumed


def test_missing_shards(tmp_path):
    writer = make_writer(tmp_path)
    assert writer.missing_shards("part-0", 11) == [0, 1, 2]
    writer.write_shard("part-0", 1, lines_of("part-0")[4:8], 11)
    assert writer.missing_shards("part-0", 11) == [0, 2]
    with pytest.raises(ValueError, match=r"part-0 is incomplete: 1 of 3 shards(.|\n)*extract_t5_feature\.py"):
        Features(tmp_path)
    for shard in (0, 2):
        writer.write_shard("part-0", shard, lines_of("part-0")[4 * shard : 4 * shard + 4], 11)
    assert make_writer(tmp_path).missing_shards("part-0", 11) == []
    assert writer.skipped("part-0", 11) == 2
    assert torch.equal(Features(tmp_path).get("part-0", 10), rows("part-0", 10))


@pytest.mark.parametrize("left", ["shard-000001.npy", "shard-000001.ends.npy", ".shard-000001.npy.x1.tmp"])
def test_what_a_killed_run_left(tmp_path, left):
    """Files without their sidecar count for nothing and are replaced."""
    write(tmp_path / "whole")
    writer = make_writer(tmp_path / "killed")
    for stem in LINES:
        write_stem(writer, stem, lines_of(stem))
    folder = tmp_path / "killed" / "part-0"
    (folder / "shard-000001.json").unlink()
    (folder / left).write_bytes(b"half of it")
    writer = make_writer(tmp_path / "killed")
    assert writer.missing_shards("part-0", 11) == [1]
    with pytest.raises(ValueError, match="part-0 is incomplete: 2 of 3 shards"):
        Features(tmp_path / "killed")
    writer.write_shard("part-0", 1, lines_of("part-0")[4:8], 11)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_other_settings(tmp_path):
    write(tmp_path)
    before = digests(tmp_path)
    for changes, message in [
        ({"dim": 7}, "dim: 6 there, 7 now"),
        ({"dtype": "float16"}, "dtype: 'float32' there, 'float16' now"),
        ({"settings": {"model": "other"}}, "model: 'none' there, 'other' now"),
        ({"settings": {}}, "model: 'none' there, None now"),
        ({"shard_size": 5}, "shard_size: 4 there, 5 now"),
    ]:
        with pytest.raises(ValueError, match=rf"holds features of other settings(.|\n)*{message}"):
            make_writer(tmp_path, **changes)
    assert digests(tmp_path) == before


def test_a_list_that_has_grown(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="of a file part-0 of 11 lines; now it has 12"):
        make_writer(tmp_path).missing_shards("part-0", 12)


# What is wrong


@pytest.mark.parametrize(
    "features, message",
    [
        (torch.full((2, 6), torch.nan), "line 1 of a are not finite as float16"),
        (torch.full((2, 6), 1e5), "not finite as float16(.|\n)*bfloat16 does not"),
    ],
)
def test_wrong_features(tmp_path, features, message):
    writer = make_writer(tmp_path, dtype="float16")
    with pytest.raises(ValueError, match=message):
        write_stem(writer, "a", [torch.ones(1, 6), features])
    assert writer.missing_shards("a", 2) == [0]
    assert not list(tmp_path.rglob("*.tmp"))


def test_folders_without_features(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; language/extract_t5_feature\.py makes one"):
        Features(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no text features: neither index\.json .* nor STEM/LINE\.npy"):
        Features(tmp_path)
    make_writer(tmp_path)
    with pytest.raises(ValueError, match="has no features yet"):
        Features(tmp_path)


@pytest.mark.parametrize("make", [write, publish])
def test_another_width(tmp_path, make):
    with pytest.raises(ValueError, match="features of width 6, but 2048 are needed"):
        Features(make(tmp_path), dim=2048)


def test_damaged_shards(tmp_path):
    write(tmp_path)
    folder = tmp_path / "part-0"
    for name in ("shard-000000.npy", "shard-000000.ends.npy"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-3])
        with pytest.raises(ValueError, match=rf"{name} is damaged(.|\n)*extract_t5_feature"):
            Features(tmp_path)
        assert make_writer(tmp_path).missing_shards("part-0", 11) == [0]  # the same command again mends it
        (folder / name).write_bytes(content)
    (folder / "shard-000000.json").write_text("{")
    with pytest.raises(ValueError, match=r"shard-000000\.json is damaged"):
        Features(tmp_path)
    assert len(Features(write(tmp_path))) == 13


def test_a_damaged_index(tmp_path):
    write(tmp_path)
    for content in (b"", b"[]", b"{}", b'{"format": 1, "dim": 6}', b'{"format": 2}'):
        (tmp_path / "index.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"index\.json"):
            Features(tmp_path)


def test_damaged_published_files(tmp_path):
    store = Features(publish(tmp_path))
    file = tmp_path / "part-0" / "5.npy"
    for content in (b"", file.read_bytes()[:-4]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"part-0/5\.npy is damaged"):
            store.get("part-0", 5)
    for array in (
        np.ones((1, 3, 7), np.float32),
        np.ones((3, 6), np.float32),
        np.ones((1, 3, 6), np.int64),
        np.ones((1, 0, 6)),
    ):
        np.save(file, array)
        with pytest.raises(ValueError, match=r"part-0/5\.npy holds .*, expected floats \(1, length, 6\)"):
            store.get("part-0", 5)
    assert torch.equal(store.get("part-0", 6), rows("part-0", 6))
