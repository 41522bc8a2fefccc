"""tools/convert_codes.py: both ways, stopped and resumed, and what it refuses."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from dataset.augmentation import FLIP_VIEWS, TEN_CROP_VIEWS
from dataset.code_files import ShardFolder, write_published
from dataset.codes import open_codes
from dataset.conversion import lines_to_packed, packed_to_published, published_to_packed
from tests import forkserver
from tests.dataset.test_codes import SETTINGS, codes_of, publish, write
from tests.helpers import ROOT
from tools.convert_codes import flags, main

pytestmark = pytest.mark.slow  # through whole scripts and servers


def files(folder):
    """Return the files of the published scripts; the record is beside them."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.npy")}


@pytest.mark.parametrize("views", [1, 2, 10])
def test_there_and_back(tmp_path, views):
    publish(tmp_path / "flip", 11, views=views)
    published_to_packed(tmp_path / "flip", tmp_path / "packed", 64, shard_size=4, num_classes=3)
    packed = open_codes(tmp_path / "packed", seed=2)
    packed.sources[0].verify()
    expected = {1: ["center"], 2: list(FLIP_VIEWS), 10: list(TEN_CROP_VIEWS)}[views]
    assert packed.settings.views == expected and packed.settings.num_classes == 3
    published = open_codes(tmp_path / "flip", 64, seed=2)
    for one, other in zip(packed, published, strict=True):
        np.testing.assert_array_equal(one["codes"], other["codes"])
        assert one["label"] == other["label"]
    packed_to_published(tmp_path / "packed", tmp_path / "back", 64)
    assert files(tmp_path / "back") == files(tmp_path / "flip")


def jsonl(path, count, tokens=4):
    lines = [{"class_id": i % 3, "tokens": [(i + t) % 7 for t in range(tokens)]} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_lines_of_codes_become_packed_and_resume(tmp_path):
    """RAR's published codes."""
    path, target = tmp_path / "maskgitvq.jsonl", tmp_path / "packed"
    lines = jsonl(path, 11)
    words = f"--from {path} --to {target} --image-size 32 --codebook-size 8 --num-classes 3 --shard-size 4"
    main(flags().parse_args(words.split()))
    packed = open_codes(target)
    packed.sources[0].verify()
    assert packed.settings.codebook_size == 8 and packed.settings.num_classes == 3
    for sample, line in zip(packed, lines, strict=True):
        assert sample["codes"].tolist() == line["tokens"] and sample["label"] == line["class_id"]
    whole = files(target)
    (target / "shard-000001.json").unlink()
    main(flags().parse_args(words.split()))
    assert files(target) == whole


def test_archives_in_class_folders_become_packed_and_resume(tmp_path):
    """LPD's codes."""
    source, target = tmp_path / "cached", tmp_path / "packed"
    rng, written = np.random.default_rng(0), []
    for label, name in enumerate(("n01", "n02")):
        (source / name).mkdir(parents=True)
        for image in range(3):
            views = rng.integers(8, size=(2, 16))
            np.savez(source / name / f"{image}.npz", indices=views[0].reshape(4, 4), indices_flip=views[1])
            written.append((views.tolist(), label))
    words = f"--from {source} --to {target} --image-size 64 --codebook-size 8 --shard-size 4"
    main(flags().parse_args(words.split()))
    packed = open_codes(target)
    packed.sources[0].verify()
    settings = packed.settings
    assert (settings.num_classes, list(settings.classes)) == (2, ["n01", "n02"])
    stored = [
        (codes.tolist(), label) for part in packed.sources[0].parts() for codes, label in zip(*part[:2], strict=True)
    ]
    assert stored == written
    whole = files(target)
    (target / "shard-000001.json").unlink()
    main(flags().parse_args(words.split()))
    assert files(target) == whole
    np.savez(source / "n01" / "0.npz", indices=np.zeros(16, int))
    with pytest.raises(ValueError, match=r"0\.npz has no indices and indices_flip"):
        main(flags().parse_args([*words.split()[:2], "--to", str(tmp_path / "other"), *words.split()[4:]]))


def test_other_and_broken_lines_are_refused(tmp_path):
    path, target = tmp_path / "codes.jsonl", tmp_path / "packed"
    jsonl(path, 5)
    lines_to_packed(path, target, 32, shard_size=4)
    path.write_text(path.read_text().replace("[0, 1", "[1, 1", 1))
    with pytest.raises(ValueError, match=r"shard 0 .* is not of the codes"):
        lines_to_packed(path, target, 32, shard_size=4)
    for broken in ('{"class_id": 1, "tokens": [1, 2]}', "no line", '{"tokens": [1, 2, 3, 4]}'):
        jsonl(path, 2)
        path.write_text(path.read_text() + broken + "\n")
        with pytest.raises(ValueError, match="line 3 is not"):
            lines_to_packed(path, tmp_path / "other", 32)


def test_gaps_are_kept(tmp_path):
    write(tmp_path / "packed", skipped=[0, 4, 5, 6, 7])
    packed_to_published(tmp_path / "packed", tmp_path / "flip", 64)
    published_to_packed(tmp_path / "flip", tmp_path / "again", 64, shard_size=4)
    first, second = ShardFolder(tmp_path / "packed"), ShardFolder(tmp_path / "again")
    np.testing.assert_array_equal(first.numbers, second.numbers)
    for one, other in zip(first.parts(), second.parts(), strict=True):
        for a, b in zip(one, other):
            np.testing.assert_array_equal(a, b)


def test_resuming_to_packed(tmp_path):
    publish(tmp_path / "flip", 11)
    published_to_packed(tmp_path / "flip", tmp_path / "packed", 64, shard_size=4)
    whole = files(tmp_path / "packed")
    (tmp_path / "packed" / "shard-000001.json").unlink()
    kept = (tmp_path / "packed" / "shard-000000.npy").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"2 of 3 .*tools/convert_codes\.py"):
        open_codes(tmp_path / "packed")
    published_to_packed(tmp_path / "flip", tmp_path / "packed", 64, shard_size=4)
    assert files(tmp_path / "packed") == whole
    assert (tmp_path / "packed" / "shard-000000.npy").stat().st_mtime_ns == kept


def test_resuming_to_published(tmp_path):
    write(tmp_path / "packed")
    packed_to_published(tmp_path / "packed", tmp_path / "flip", 64)
    whole = files(tmp_path / "flip")
    (tmp_path / "flip" / "imagenet64_labels" / "3.npy").unlink()
    (tmp_path / "flip" / "imagenet64_codes" / "9.npy").unlink()
    kept = (tmp_path / "flip" / "imagenet64_codes" / "0.npy").stat().st_mtime_ns
    packed_to_published(tmp_path / "packed", tmp_path / "flip", 64)
    assert files(tmp_path / "flip") == whole
    assert (tmp_path / "flip" / "imagenet64_codes" / "0.npy").stat().st_mtime_ns == kept


def test_other_sources_are_refused(tmp_path):
    publish(tmp_path / "flip", 11)
    publish(tmp_path / "other_flip", 11, shift=1)
    published_to_packed(tmp_path / "flip", tmp_path / "packed", 64, shard_size=4)
    with pytest.raises(ValueError, match=r"shard 0 .*is not of the codes in .*other_flip"):
        published_to_packed(tmp_path / "other_flip", tmp_path / "packed", 64, shard_size=4)
    with pytest.raises(ValueError, match="codebook_size: 16384 there, 8192 now"):
        published_to_packed(tmp_path / "flip", tmp_path / "packed", 64, codebook_size=8192, shard_size=4)
    with pytest.raises(ValueError, match="outside a codebook of 100"):
        published_to_packed(tmp_path / "flip", tmp_path / "small", 64, codebook_size=100)
    with pytest.raises(ValueError, match=r"0\.npy differs"):
        packed_to_published(tmp_path / "packed", tmp_path / "other_flip", 64)
    write_published(tmp_path / "flip", 64, 11, codes_of(SETTINGS, 11), 0)
    with pytest.raises(ValueError, match=r"1 samples that .* has not \(11\.npy\)"):
        packed_to_published(tmp_path / "packed", tmp_path / "flip", 64)
    with pytest.raises(ValueError, match="--image-size 64, not 128"):
        packed_to_published(tmp_path / "packed", tmp_path / "new", 128)


def test_damaged_sources_are_refused(tmp_path):
    write(tmp_path / "packed", replace(SETTINGS, num_images=4))
    file = tmp_path / "packed" / "shard-000000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="checksum differs"):
        packed_to_published(tmp_path / "packed", tmp_path / "flip", 64)
    assert not (tmp_path / "flip").exists()


def test_command_line_goes_either_way(tmp_path):
    publish(tmp_path / "flip", 5)
    names = [("flip", "packed"), ("packed", "back")]
    for source, target in names:
        main(
            flags().parse_args(["--from", str(tmp_path / source), "--to", str(tmp_path / target), "--image-size", "64"])
        )
    assert files(tmp_path / "back") == files(tmp_path / "flip")


def test_command_line_errors_are_one_line(tmp_path):
    publish(tmp_path / "flip", 1)
    (tmp_path / "empty").mkdir()
    for source, target, size, message in [
        ("nowhere", "x", 64, "does not exist"),
        ("empty", "x", 64, "holds no codes"),
        ("flip", "flip", 64, "the same folder"),
        ("flip", "x", 128, "--image-size 64, not 128"),
    ]:
        arguments = ["--from", str(tmp_path / source), "--to", str(tmp_path / target), "--image-size", str(size)]
        with pytest.raises((ValueError, OSError), match=message):
            main(flags().parse_args(arguments))
    command = [sys.executable, "tools/convert_codes.py", *arguments]
    done = forkserver.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "not 128" in done.stderr
