"""Codes of image-text pairs: a folder a file, packed or published, whatever happens on the way."""

import hashlib
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from autoregressive.pipeline import load_tokenizer
from autoregressive.train import extract_codes_t2i
from dataset.augmentation import center_view
from dataset.code_files import ShardFolder
from dataset.sources import PairViews
from dataset.t2i import TextCodes
from tests.text_training import make_pairs, make_shards, picture
from tests.training import check_published_flags, live, quiet_loggers, run_here
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.cli import run_script

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]  # through whole scripts and servers

COUNTS = {"part-a": 9, "part-b": 5, "part-c": 4}
TOKENS = 16
SETTINGS = ["--vq-model", "VQ-4", "--codebook-size", 64, "--image-size", 16, "--num-workers", 0]
SETTINGS += ["--shard-size", 4, "--batch-size", 2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs as lists and as shards, and a tokenizer; read-only."""
    folder = tmp_path_factory.mktemp("pairs")
    make_pairs(folder / "pairs", COUNTS)
    make_shards(folder / "shards", COUNTS)
    torch.manual_seed(0)
    torch.save({"model": VQ_models["VQ-4"](codebook_size=64).state_dict()}, folder / "vq.pt")
    return folder


def words(data, codes, *more, pairs=None):
    return ["--data-path", pairs or data / "pairs", "--code-path", codes, "--vq-ckpt", data / "vq.pt", *SETTINGS, *more]


def extract(data, codes, *more, pairs=None):
    run_here(extract_codes_t2i, *words(data, codes, *more, pairs=pairs))
    return codes


@pytest.fixture(scope="module")
def extracted(data, tmp_path_factory):
    return extract(data, tmp_path_factory.mktemp("codes") / "packed")


@pytest.fixture(scope="module")
def published(data, tmp_path_factory):
    return extract(data, tmp_path_factory.mktemp("codes") / "published", "--published-layout")


def digests(folder, but="."):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(but))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def all_codes(folder):
    """The codes of every pair in order, None where there are none."""
    codes = TextCodes(folder, list(COUNTS), TOKENS, 64)
    return [codes.get(stem, line) for stem, count in COUNTS.items() for line in range(count)]


# What comes out


def test_the_codes_of_the_centre_crop(data, extracted):
    tokenizer = load_tokenizer(data / "vq.pt")
    found = all_codes(extracted)
    assert len(found) == 18
    with torch.inference_mode():
        for number, codes in enumerate(found):
            expected = tokenizer.to_codes(center_view(picture(number), 16)[None]).flatten()
            assert torch.equal(codes, expected.flatten())
    assert len(torch.stack(found).unique()) > 4


def test_a_folder_for_each_file(extracted, published):
    assert sorted(os.listdir(extracted)) == list(COUNTS)
    settings = ShardFolder(extracted / "part-a").settings
    assert (settings.dataset, settings.image_size, settings.tokens, settings.views) == ("t2i", 16, TOKENS, ["center"])
    assert (settings.num_images, settings.codebook_size, settings.vq_model) == (9, 64, "VQ-4")
    names = {path.relative_to(published).as_posix() for path in published.rglob("*.npy")}
    assert names == {f"{stem}/{line}.npy" for stem, count in COUNTS.items() for line in range(count)}
    array = np.load(published / "part-b" / "3.npy")
    assert array.dtype == np.int64 and array.shape == (1, TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(all_codes(extracted), all_codes(published), strict=True))


def test_shards_give_the_same(data, extracted, tmp_path):
    folder = extract(data, tmp_path / "codes", "--num-workers", 2, pairs=data / "shards")
    assert digests(folder, "lines-") == digests(extracted, "lines-")


@pytest.mark.parametrize("layout", [[], ["--published-layout"]], ids=["packed", "published"])
def test_some_of_the_files(data, extracted, published, tmp_path, layout):
    """In parts, as several machines do, it comes to the same."""
    folder, whole = tmp_path / "codes", published if layout else extracted
    extract(data, folder, *layout, "--data-start", 1, "--data-end", 1)
    assert os.listdir(folder) == ["part-b"]
    extract(data, folder, *layout, "--data-start", 2)
    extract(data, folder, *layout, "--data-end", 0)
    assert digests(folder) == digests(whole)


def test_pairs_without_codes(data, tmp_path, capsys):
    """Unreadable, missing, too small, and a damaged line: left out, counted, and None when read."""
    pairs = shutil.copytree(data / "pairs", tmp_path / "pairs")
    (pairs / "images" / "1.png").write_bytes(b"no picture")
    (pairs / "images" / "10.png").unlink()
    Image.new("RGB", (40, 15)).save(pairs / "images" / "17.png")
    lines = (pairs / "part-a.jsonl").read_text().splitlines()
    (pairs / "part-a.jsonl").write_text("\n".join([*lines[:4], "{}", *lines[5:]]))
    without = {1, 4, 10, 17}
    for layout in ([], ["--published-layout"]):
        folder = extract(data, tmp_path / f"codes{len(layout)}", *layout, pairs=pairs)
        assert {i for i, codes in enumerate(all_codes(folder)) if codes is None} == without
        assert "4 are unreadable or too small and have no codes" in capsys.readouterr().out
    sidecars = [json.loads((tmp_path / "codes0" / f"part-a/shard-00000{k}.json").read_text()) for k in range(3)]
    assert [sidecar["skipped"] for sidecar in sidecars] == [[1], [4], []]


# What happens on the way


@pytest.mark.parametrize("layout", [[], ["--published-layout"]], ids=["packed", "published"])
def test_again_does_what_is_missing(data, extracted, published, tmp_path, layout, monkeypatch, capsys):
    whole = published if layout else extracted
    folder = shutil.copytree(whole, tmp_path / "codes")
    capsys.readouterr()
    extract(data, folder, *layout)
    assert "encoded" not in capsys.readouterr().out
    if layout:
        (folder / "part-b" / "2.npy").unlink()
    else:
        (folder / "part-b" / "shard-000000.json").unlink()
        (folder / "part-a" / "shard-000001.npy").write_bytes(b"short")
    extract(data, folder, *layout)
    assert f"encoded {2 if layout else 8} images" in capsys.readouterr().out
    assert digests(folder) == digests(whole)


def test_killed_and_taken_up_by_others(data, extracted, published, tmp_path):
    """Two processes killed -9 in the middle, one killed, then two: the same bytes as of one that was let be."""
    lives = []
    for layout, first, second in (
        ([], "shard-000000.json", "shard-000001.json"),
        (["--published-layout"], "0.npy", "5.npy"),
    ):
        folder = tmp_path / f"codes{len(layout)}"
        life = {
            "module": "autoregressive.train.extract_codes_t2i",
            "args": list(map(str, words(data, folder, *layout))),
        }
        lives += [{**life, "world": 2, "kill_at": f"{folder}/part-a/{first}"}]
        lives += [{**life, "world": 1, "kill_at": f"{folder}/part-*/{second}"}, {**life, "world": 2}]
    assert live(*lives).count("life: killed") >= 2
    assert digests(tmp_path / "codes0") == digests(extracted) and digests(tmp_path / "codes1") == digests(published)


# What a user gets wrong


@pytest.mark.parametrize(
    "more, message",
    [
        (["--data-start", 3], r"--data-start 3 --data-end None selects none of the 3 files, which are numbered 0 to 2"),
        (["--data-start", 2, "--data-end", 1], r"--data-start 2 --data-end 1 selects none of the 3 files"),
        (["--image-size", 18], r"--image-size 18 is not a multiple of 4"),
        (["--vq-model", "VQ-16"], r"vq\.pt does not fit the flags --vq-model VQ-16"),
        (["--image-size", 64], r"none of 18 pairs in a row could be used(.|\n)*smaller than --image-size 64"),
    ],
)
def test_flags_that_do_not_fit(data, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        extract(data, tmp_path / "codes", *more)


def test_images_that_are_all_too_small_with_loader_processes(data, tmp_path, capsys, monkeypatch):
    """Counted over both, and told in its own words without a traceback of theirs."""
    monkeypatch.setattr("utils.loading.os.sched_getaffinity", lambda pid: range(4), raising=False)
    flags = words(data, tmp_path / "codes", "--image-size", 64, "--num-workers", 2, "--batch-size", 2)
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
    with quiet_loggers(), pytest.raises(SystemExit):
        run_script(extract_codes_t2i.main, extract_codes_t2i.flags())
    told = capsys.readouterr().err
    told = told[told.index("error: ") :]
    assert told.startswith("error: none of 18 pairs in a row could be used") and told.count("\n") <= 6
    assert "smaller than --image-size 64" in told and "Traceback" not in told


def test_another_size_in_the_same_folder(data, extracted, published, tmp_path):
    folder = shutil.copytree(extracted, tmp_path / "packed")
    with pytest.raises(ValueError, match=r"holds codes of other settings(.|\n)*image_size: 16 there, 20 now"):
        extract(data, folder, "--image-size", 20)
    folder = shutil.copytree(published, tmp_path / "published")
    with pytest.raises(
        ValueError, match=r"holds int64 \(1, 16\), expected integers \(1, 25\): write to another folder"
    ):
        extract(data, folder, "--image-size", 20, "--published-layout")


@pytest.mark.parametrize("layout", [[], ["--published-layout"]], ids=["packed", "published"])
def test_extraction_resumed_in_another_precision_is_refused(data, extracted, published, tmp_path, layout):
    folder = shutil.copytree(published if layout else extracted, tmp_path / "codes")
    with pytest.raises(ValueError, match=r"codes of other settings(.|\n)*mixed_precision|extra: .* there"):
        extract(data, folder, "--mixed-precision", "bf16", *layout)
    for record in folder.glob("*/extraction.json"):
        record.write_text("{")
    if layout:
        with pytest.raises(ValueError, match=r"extraction\.json is damaged"):
            extract(data, folder, *layout)


def test_published_codes_of_another_tokenizer_are_refused(data, published, tmp_path):
    """A continued extraction refuses them; training knows whose they are."""
    torch.save({"model": VQ_models["VQ-4"](codebook_size=64).state_dict()}, tmp_path / "other.pt")
    folder = shutil.copytree(published, tmp_path / "codes")
    (folder / "part-b" / "2.npy").unlink()
    with pytest.raises(ValueError, match=r"part-a was made with '[0-9a-f]{32}', now it is '[0-9a-f]{32}'"):
        extract(data, folder, "--published-layout", "--vq-ckpt", tmp_path / "other.pt")
    assert TextCodes(folder, list(COUNTS), TOKENS, 64).tokenizer == load_tokenizer(data / "vq.pt").fingerprint()


def killed_at(index, view):
    """A read that ends its loader process at one pair."""

    def read(self, at):
        if at == index and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return view(self, at)

    return read


def test_extraction_keeps_what_is_finished_when_a_loader_process_is_killed(
    data, extracted, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("utils.loading.os.sched_getaffinity", lambda pid: range(4), raising=False)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    flags = words(data, tmp_path / "codes", "--num-workers", 2)
    with monkeypatch.context() as patched:
        patched.setattr(PairViews, "__getitem__", killed_at(13, PairViews.__getitem__))
        patched.setattr(sys, "argv", ["script.py", *map(str, flags)])
        with quiet_loggers(), pytest.raises(SystemExit):
            run_script(extract_codes_t2i.main, extract_codes_t2i.flags())
    told = capsys.readouterr().err
    told = told[told.index("error: ") :]
    assert "was killed by SIGKILL" in told and "finished work is kept" in told and "Traceback" not in told
    assert (tmp_path / "codes" / "part-a" / "shard-000000.json").exists()
    run_here(extract_codes_t2i, *flags)
    assert digests(tmp_path / "codes") == digests(extracted)


def test_packed_codes_beside_published_ones_of_another_tokenizer_are_refused(data, tmp_path):
    folder = extract(data, tmp_path / "codes", "--data-end", 0)
    other = tmp_path / "other.pt"
    torch.manual_seed(1)
    torch.save({"model": VQ_models["VQ-4"](codebook_size=64).state_dict()}, other)
    extract(data, folder, "--data-start", 1, "--published-layout", "--vq-ckpt", other)
    for recorded in (True, False):
        with pytest.raises(
            ValueError, match=r"was made with|has packed codes of the tokenizer [0-9a-f]{32} and others of"
        ):
            TextCodes(folder, list(COUNTS), TOKENS, 64)
        if recorded:  # the first edition wrote no lines
            [file.unlink() for file in (folder / "part-a").glob("lines-*.npz")]


def test_the_released_tokenizer_is_the_default(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained_models").mkdir()
    shutil.copy(data / "vq.pt", tmp_path / "pretrained_models" / "vq_ds16_t2i.pt")
    words = ["--data-path", data / "pairs", "--code-path", tmp_path / "codes", "--data-end", 0]
    run_here(extract_codes_t2i, *words, *SETTINGS)
    assert os.listdir(tmp_path / "codes") == ["part-a"]


FLAGS = """
`--data-path` str = required; `--code-path` str = required; `--data-start` int = required; `--data-end` int = required;
`--vq-model` str ∈ [VQ-8, VQ-16] = VQ-16; `--vq-ckpt` str = None; `--codebook-size` int = 16384;
`--codebook-embed-dim` int = 8; `--image-size` int ∈ [256, 384, 448, 512] = 512; `--global-seed` int = 0;
`--num-workers` int = 24
"""


def test_published_flags():
    check_published_flags(extract_codes_t2i, FLAGS, ("--data-start", "--data-end"))


@pytest.mark.parametrize("layout", [[], ["--published-layout"]], ids=["packed", "published"])
def test_turned_images_are_read_in_one_way_in_one_folder(data, tmp_path, layout, capsys):
    pairs = shutil.copytree(data / "pairs", tmp_path / "pairs")
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(pairs / "images" / "0.png") as image:
        image.load()
        image.save(pairs / "images" / "0.png", exif=exif)
    usual = extract(data, tmp_path / "usual", *layout, pairs=pairs)
    old = extract(data, tmp_path / "old", "--no-exif", "--background", "none", *layout, pairs=pairs)
    with pytest.raises(ValueError, match=r"codes in .* made with|codes of other settings"):
        extract(data, usual, "--no-exif", *layout, pairs=pairs)
    kept = digests(old)
    assert kept != digests(usual)
    for record in old.glob("*/*.json"):  # as the first edition left it
        if record.name == "index.json":
            record.write_text(json.dumps({**json.loads(record.read_text()), "extra": {}}))
        elif record.name == "extraction.json":
            record.unlink()
    next(old.glob("*/0.npy" if layout else "*/shard-000000.json")).unlink()
    capsys.readouterr()
    extract(data, old, *layout, pairs=pairs)
    assert "images are read as published, as it was begun" in capsys.readouterr().out
    codes = [{name: value for name, value in each.items() if name.endswith(".npy")} for each in (kept, digests(old))]
    assert codes[0] == codes[1]
