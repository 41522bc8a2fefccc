"""WebDataset shards by offset: the samples that the webdataset package reads, an index that is kept, files that are damaged."""

import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import webdataset

from dataset import webdataset as shards
from dataset.pixels import load_rgb
from dataset.webdataset import INDEX_NAME, TarPairs, shard_rows
from tests.text_training import make_shards, picture, png

COUNTS = {"00000": 6, "00001": 3}


@pytest.fixture
def folder(tmp_path):
    return make_shards(tmp_path / "shards", COUNTS)


def write_tar(file, members):
    """A tar of (name, content) in this order."""
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def indexed(monkeypatch):
    """The names of the shards that are read through from now on."""
    seen, read = [], shards.shard_rows
    monkeypatch.setattr(shards, "shard_rows", lambda shard: seen.append(shard.name) or read(shard))
    return seen


# The format


def test_what_the_webdataset_package_writes_and_reads(tmp_path):
    """Same samples in the same order, byte for byte: nested and dotted paths, several parts, capitals, notes."""
    folder = tmp_path / "shards"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"{number:06d}.tar")) as tar:
            for i in range(5):
                key = f"v1.2/deep/{number}-{i:04d}" if i % 2 else f"{number}-{i:04d}"
                noise = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                sample = {"__key__": key, "jpg": noise, "cls": i, "seg.png": noise[..., 0]}
                sample |= {"json": {"caption": f"caption {number} {i}"}} if i < 3 else {"txt": f"text {number} {i}"}
                tar.write(sample)
    theirs = []
    for number in range(2):
        theirs += list(webdataset.WebDataset(str(folder / f"{number:06d}.tar"), shardshuffle=False))
    mine = TarPairs(folder)
    assert len(mine) == len(theirs) == 10
    for index, sample in enumerate(theirs):
        assert mine.image_file(index).getvalue() == sample["jpg"]
        text = json.loads(sample["json"])["caption"] if "json" in sample else sample["txt"].decode()
        assert mine.texts(index) == [text]
        assert mine.identity(index) == (f"{index // 5:06d}", index % 5)


def test_a_sample_is_members_that_follow_each_other(tmp_path):
    image = png(picture(0))
    members = [
        ("__notes__", b"x"), ("a/1.JPG", image), ("a/1.txt", b"one"), ("b/1.png", image), ("README", b"no extension"),
        ("b/1.json", b'{"text": ["two", "three"]}'), ("b/1.txt", b"not this"), ("c/2.txt", b"no image"),
        ("a/1.webp", image),
    ]  # fmt: skip
    write_tar(tmp_path / "x.tar", members)
    pairs = TarPairs(tmp_path)
    assert pairs.files == [("x", 4)]
    assert pairs.texts(0) == ["one"] and pairs.texts(1) == ["two", "three"]
    assert load_rgb(pairs.image_file(1)).size == picture(0).size
    with pytest.raises(ValueError, match=r"sample 2 of .*x\.tar has no image"):
        pairs.image_file(2)
    with pytest.raises(ValueError, match=r"sample 3 of .*x\.tar has no caption"):
        pairs.texts(3)


# The index


def test_shards_are_indexed_once(folder, monkeypatch):
    seen = indexed(monkeypatch)
    first = TarPairs(folder)
    assert sorted(seen) == ["00000.tar", "00001.tar"] and len(first) == 9
    again = TarPairs(folder)
    assert len(seen) == 2 and again.texts(8) == first.texts(8) and again.files == [("00000", 6), ("00001", 3)]


def test_new_changed_and_removed_shards(folder, tmp_path, monkeypatch):
    TarPairs(folder)
    seen = indexed(monkeypatch)
    more = make_shards(tmp_path / "more", {"00002": 2, "00000": 4})
    shutil.copy(more / "00002.tar", folder)
    assert len(TarPairs(folder)) == 11 and seen == ["00002.tar"]
    shutil.copy(more / "00000.tar", folder)
    pairs = TarPairs(folder)
    assert len(pairs) == 9 and seen == ["00002.tar", "00000.tar"]
    assert pairs.image_file(1).getvalue() == png(picture(3))
    (folder / "00001.tar").unlink()
    assert TarPairs(folder).files == [("00000", 4), ("00002", 2)] and len(seen) == 2


@pytest.mark.parametrize("what", ["rows", "record", "another edition's"])
def test_a_damaged_index_is_made_again(folder, monkeypatch, what):
    TarPairs(folder)
    index = folder / INDEX_NAME
    if what == "another edition's":
        np.save(index, np.load(index))
    else:
        index.write_bytes(index.read_bytes()[: 100 if what == "rows" else -5])
    seen = indexed(monkeypatch)
    pairs = TarPairs(folder)
    assert len(seen) == 2 and len(pairs) == 9 and pairs.image_file(8).getvalue() == png(picture(8))


def test_an_index_elsewhere(folder, tmp_path):
    pairs = TarPairs(folder, tmp_path / "index")
    assert sorted(os.listdir(folder)) == ["00000.tar", "00001.tar"] and os.listdir(tmp_path / "index") == [INDEX_NAME]
    assert pickle.loads(pickle.dumps(pairs)).texts(1) == pairs.texts(1) and len(pickle.dumps(pairs)) < 4000
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"give --index-path a folder that can be written to"):
        TarPairs(folder, tmp_path / "file" / "index")


# What is wrong with files


def test_a_shard_that_is_cut_off(folder):
    whole = (folder / "00001.tar").read_bytes()
    for length in (560, 700, 1024, 1300):  # in an image, in a header, between members
        (folder / "00001.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"00001\.tar is (cut off|damaged)"):
            TarPairs(folder)


def test_a_shard_that_changes_while_it_is_read(folder):
    pairs = TarPairs(folder)
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:600])
    with pytest.raises(ValueError, match=r"00001\.tar is shorter than when it was indexed"):
        pairs.image_file(8)


def test_files_that_are_no_shards(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: check --data-path"):
        TarPairs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \*\.tar files"):
        TarPairs(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.tar\.gz is compressed.*unpack it"):
        TarPairs(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"b\.tar is damaged or not an uncompressed tar"):
        TarPairs(tmp_path)
    write_tar(tmp_path / "b.tar", [("1.txt", b"text")])
    with pytest.raises(ValueError, match=r"b\.tar has no images: 1 samples"):
        TarPairs(tmp_path)
    write_tar(tmp_path / "b.tar", [("1.png", b"x"), ("1.PNG", b"y")])
    with pytest.raises(ValueError, match=r"b\.tar has two members 1\.PNG"):
        shard_rows(tmp_path / "b.tar")


# Captions in either place, names with dots


@pytest.mark.parametrize("content", [b"{}", b'{"width": 3}', b'{"text": null}', b'{"caption": []}', b"[1]"])
def test_texts_of_a_json_without_a_caption_are_those_of_the_txt(tmp_path, content):
    write_tar(tmp_path / "x.tar", [("1.json", content), ("1.png", png(picture(0))), ("1.txt", b"a bee")])
    assert TarPairs(tmp_path).texts(0) == ["a bee"]


def test_members_with_dotted_names_are_pairs_up_to_the_last_dot(tmp_path, caplog):
    members = []
    for i, name in enumerate(["a.b", "a.c", "d/v1.0/e.f.g", "plain"]):
        members += [(f"{name}.png", png(picture(i))), (f"{name}.txt", name.encode())]
    write_tar(tmp_path / "x.tar", members)
    pairs = TarPairs(tmp_path)
    assert [pairs.texts(i) for i in range(len(pairs))] == [["a.b"], ["a.c"], ["d/v1.0/e.f.g"], ["plain"]]
    assert [pairs.image_file(i).getvalue() for i in range(4)] == [png(picture(i)) for i in range(4)]
    assert not caplog.records or "rename" not in caplog.text


def test_parts_of_a_sample_stay_parts_beside_its_image(tmp_path, caplog):
    """As the webdataset package reads them; a part that looks like a pair is told."""
    image, other = png(picture(0)), png(picture(1))
    members = [("1.png", image), ("1.seg.png", other), ("1.txt", b"one"), ("2.png", image), ("2.txt", b"two")]
    write_tar(tmp_path / "x.tar", [*members, ("2.old.png", other), ("2.old.txt", b"old")])
    pairs = TarPairs(tmp_path)
    assert [pairs.texts(i) for i in range(len(pairs))] == [["one"], ["two"]]
    assert pairs.image_file(1).getvalue() == image
    assert (
        "image and text of 2.old (and 0 more) count as parts" in caplog.text and caplog.text.count("rename them") == 1
    )


def test_image_and_text_of_different_dotted_names_are_no_pair(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.b.png", png(picture(0))), ("a.c.txt", b"another's"), ("b.png", b"x")])
    pairs = TarPairs(tmp_path)
    with pytest.raises(ValueError, match="has no image"):
        pairs.image_file(0)


def test_digests_tell_shards_with_other_images_or_texts(folder, tmp_path):
    pairs = TarPairs(folder)
    same = make_shards(tmp_path / "same", COUNTS)
    assert TarPairs(same).list_digest(0) == pairs.list_digest(0) != pairs.list_digest(1)
    members = [("1.png", png(picture(0))), ("1.txt", b"one")]
    digests = set()
    for changed in (members, [members[0], ("1.txt", b"two")], [("1.png", png(picture(1))), members[1]], members[::-1]):
        write_tar(tmp_path / "x.tar", changed)
        opened = shard_rows(tmp_path / "x.tar")
        digests.add((opened[1], int(opened[0][0, 6])))
    assert len(digests) == 3 and len({image for _, image in digests}) == 2


def test_shard_rows_of_several_images_takes_the_first_of_the_kinds_and_says_so(tmp_path, caplog):
    members = [("a.tif", b"tif"), ("a.png", b"png"), ("a.jpg", b"jpg"), ("a.gif", b"gif"), ("b.tif", b"tif")]
    rows, _ = shard_rows(write_tar(tmp_path / "a.tar", members))
    with open(tmp_path / "a.tar", "rb") as f:
        contents = [(f.seek(offset), f.read(size))[1] for offset, size in rows[:, :2].tolist()]
    assert contents == [b"jpg", b"tif"]
    assert "1 samples with several images" in caplog.text
