"""Files that folders of images are made with are known by their content, wherever they lie."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from utils.files import content_of, write_json
from utils.sample_folder import claim_folder, file_identity


def weights(path, value=1.0, **more):
    torch.save({"model": {"a": torch.full((4, 3), value)}, **more}, path)
    return path


def shards(folder, value=0):
    """A folder as a sharded run writes it."""
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"x" * 100)
    write_json(folder / "0.crc32.json", {"__0_0.distcp": value})
    return folder


def safe(path, value):
    save_file({"a": torch.full((4, 3), value)}, path)
    return path


def images(folder, value):
    folder.mkdir()
    for i in range(600):
        (folder / f"{i}.npy").write_bytes(bytes([value]) * 10)
    return folder


@pytest.mark.parametrize(
    "make, suffix",
    [(weights, ".pt"), (safe, ".safetensors"), (shards, ""), (images, "")],
    ids=["pt", "safe", "shards", "many"],
)
def test_content_of_moved_copied_and_renamed_is_the_same_and_of_other_values_another(tmp_path, make, suffix):
    path = make(tmp_path / f"0000100{suffix}", 1)
    expected, copy = content_of(path), tmp_path / "elsewhere" / f"0000200{suffix}"
    copy.parent.mkdir()
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    os.utime(copy, ns=(1, 1))
    assert content_of(copy) == expected
    moved = path.rename(tmp_path / f"moved{suffix}")
    assert content_of(moved) == expected
    assert content_of(make(tmp_path / f"0000100{suffix}", 2)) != expected


def test_content_of_a_state_saved_twice_is_the_same(tmp_path):
    assert content_of(weights(tmp_path / "one.pt", steps=3)) == content_of(weights(tmp_path / "other.pt", steps=3))
    assert content_of(weights(tmp_path / "one.pt", steps=4)) != content_of(tmp_path / "other.pt")
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, arr_0=np.arange(3))
    assert content_of(tmp_path / "a.npz") == content_of(tmp_path / "b.npz")


def test_content_of_shards_does_not_read_what_their_checksums_vouch_for(tmp_path):
    folder = shards(tmp_path / "0000100")
    expected = content_of(folder)
    (folder / "__0_0.distcp").write_bytes(b"y" * 100)
    assert content_of(folder) == expected
    (folder / "__0_0.distcp").write_bytes(b"y" * 101)
    assert content_of(folder) != expected


def claim(folder, path, **more):
    folder.mkdir(exist_ok=True)
    (folder / "000000.png").touch()
    claim_folder(folder, {"cfg_scale": 1.5, "gpt_ckpt": file_identity(path), **more})


def test_claim_folder_moved_weights_are_accepted_and_others_of_that_name_refused(tmp_path):
    (tmp_path / "one").mkdir()
    path = weights(tmp_path / "one" / "0000100.pt")
    claim(tmp_path / "samples", path)
    (tmp_path / "one").rename(tmp_path / "two")
    os.utime(tmp_path / "two" / "0000100.pt", ns=(5, 5))
    claim(tmp_path / "samples", tmp_path / "two" / "0000100.pt")
    assert "/two/" in json.loads((tmp_path / "samples" / "settings.json").read_text())["gpt_ckpt"]["file"]
    with pytest.raises(ValueError, match=r"gpt_ckpt: .*0000100\.pt \(content \w+\), now .*0000100\.pt \(content \w+\)"):
        claim(tmp_path / "samples", weights(tmp_path / "two" / "0000100.pt", 2.0))


@pytest.mark.parametrize("folder", [False, True])
def test_claim_folder_record_of_the_first_edition_is_known_by_its_time(tmp_path, folder):
    path = shards(tmp_path / "0000100") if folder else weights(tmp_path / "0000100.pt")
    status = path.stat()
    old = {"file": str(path), "bytes": status.st_size, "modified": status.st_mtime_ns}
    write_json(tmp_path / "samples" / "settings.json", {"cfg_scale": 1.5, "gpt_ckpt": old, "note": 1})
    moved = path.rename(tmp_path / f"moved{path.suffix}")
    claim(tmp_path / "samples", moved)
    record = json.loads((tmp_path / "samples" / "settings.json").read_text())
    assert record["gpt_ckpt"] == file_identity(moved) and record["note"] == 1
    write_json(tmp_path / "samples" / "settings.json", {"cfg_scale": 1.5, "gpt_ckpt": {**old, "modified": 7}})
    with pytest.raises(ValueError, match="gpt_ckpt: "):
        claim(tmp_path / "samples", moved)


def test_file_identity_of_a_shard_or_an_index_covers_all_shards(tmp_path):
    shards = [tmp_path / f"model-{number:05d}-of-00002.bin" for number in (1, 2)]
    for shard in shards:
        shard.write_bytes(b"1")
    index = tmp_path / "model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0].name, "b": shards[1].name}}))
    before = [file_identity(path)["content"] for path in (shards[0], index)]
    shards[1].write_bytes(b"2")
    assert all(file_identity(path)["content"] != old for path, old in zip((shards[0], index), before, strict=True))


def test_claim_folder_without_an_image_takes_other_settings(tmp_path):
    claim_folder(tmp_path, {"cfg_scale": 1.5})
    claim_folder(tmp_path, {"cfg_scale": 2.0})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000.png").touch()
    with pytest.raises(ValueError, match="cfg_scale"):
        claim_folder(tmp_path, {"cfg_scale": 1.5})
