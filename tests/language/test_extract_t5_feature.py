"""Extraction of text features: every caption once, whatever happens on the way."""

import hashlib
import json
import re
import tarfile
from io import BytesIO

import numpy as np
import pytest
import torch

from dataset.text_features import Features
from language import extract_t5_feature
from language.captions import clean_caption
from language.extraction import encode_captions
from language.prompts import PromptFeatures
from language.t5 import T5Embedder
from tests.language.small_t5 import SENTENCES, make_small_t5
from tests.training import check_published_flags, flag_defaults, live, run_here
from utils.origin import require_encoder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]  # through whole scripts and servers

SCRIPT = "language.extract_t5_feature"
SENTENCE = "a red lantern hangs over the street two cats sleep on green chair next to window map of fox"
WORDS = SENTENCE.split()
CAPTIONS = {"part-00": 23, "part-01": 9, "part-02": 1}
EMPTY = (("part-00", 5), ("part-00", 15), ("part-01", 2))  # of blip's, once they are cleaned
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_small_t5(tmp_path_factory.mktemp("t5") / "flan-t5-xl")


@pytest.fixture(scope="module")
def embedder(t5):
    return T5Embedder("cpu", t5, torch_dtype=torch.float32)


def texts(number):
    """A pair's three captions: blip, llava, llava_first."""
    count = 1 + number * 7 % 15
    blip = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(count))
    return ["IMG_2041.jpg" if number % 10 == 5 else blip, f"The {blip}. A second sentence, “quoted”.", f"The {blip}"]


def make_lists(folder, counts=CAPTIONS):
    folder.mkdir(parents=True)
    number = 0
    for stem, count in counts.items():
        lines = [json.dumps({"image_path": f"{number + i}.jpg", "text": texts(number + i)}) for i in range(count)]
        (folder / f"{stem}.jsonl").write_text("\n".join(lines) + "\n")
        number += count
    return folder


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    return make_lists(tmp_path_factory.mktemp("lists") / "data")


def words(lists, features, t5, *more):
    settings = ["--precision", "none", "--num-workers", 0, "--shard-size", 5, "--batch-size", 3, "--device", "cpu"]
    return ["--data-path", lists, "--t5-path", features, "--t5-model-path", t5.parent, *settings, *more]


def extract(lists, features, t5, *more):
    run_here(extract_t5_feature, *words(lists, features, t5, *more))
    return features


def directly(embedder, texts_of, key=0):
    """The features of each caption as the embedder gives them, one text at a time."""
    found = {}
    number = 0
    for stem, count in CAPTIONS.items():
        for line in range(count):
            features, mask = embedder.get_text_embeddings([texts_of(number)[key]])
            if clean_caption(texts_of(number)[key]):
                found[stem, line] = features[0, : int(mask.sum())]
            number += 1
    return found


def digests(folder, files="*"):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(files))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def extracted(lists, t5, tmp_path_factory):
    return extract(lists, tmp_path_factory.mktemp("features") / "blip", t5)


# What comes out


def test_every_caption(extracted, embedder):
    store = Features(extracted, dim=32)
    expected = directly(embedder, texts)
    assert store.packed and len(store) == len(expected) == 30
    for (stem, line), features in expected.items():
        torch.testing.assert_close(store.get(stem, line), features, **CLOSE)
    assert all(store.get(*place) is None for place in EMPTY), "nothing is left of a file's name"
    assert len({len(features) for features in expected.values()}) > 8


def test_the_third_caption(lists, t5, embedder, tmp_path):
    store = Features(extract(lists, tmp_path / "third", t5, "--caption-key", "llava_first"))
    for (stem, line), features in directly(embedder, texts, 2).items():
        torch.testing.assert_close(store.get(stem, line), features, **CLOSE)


def test_up_to_the_first_full_stop(lists, t5, embedder, tmp_path):
    store = Features(extract(lists, tmp_path / "short", t5, "--caption-key", "llava", "--trunc-caption"))
    expected = directly(embedder, lambda number: [texts(number)[1].partition(".")[0]])
    for (stem, line), features in expected.items():
        torch.testing.assert_close(store.get(stem, line), features, **CLOSE)


def test_what_the_index_records(extracted):
    index = json.loads((extracted / "index.json").read_text())
    assert (index["dim"], index["max_length"], index["dtype"], index["shard_size"]) == (32, 120, "float32", 5)
    settings = index["settings"]
    assert re.fullmatch("[0-9a-f]{16}", settings.pop("fingerprint"))
    assert settings == {
        "t5": "flan-t5-xl", "precision": "none", "caption_key": "blip", "truncated": False, "cleaning": "twice"
    }  # fmt: skip


def test_the_published_layout(lists, t5, extracted, tmp_path):
    folder = extract(lists, tmp_path / "published", t5, "--published-layout")
    expected = sorted(f"{line}.npy" for line in range(9) if line != 2)
    assert sorted(path.name for path in (folder / "part-01").glob("*.npy")) == expected
    packed, published = Features(extracted), Features(folder, dim=32)
    for stem, count in CAPTIONS.items():
        for line in range(count):
            if (stem, line) in EMPTY:
                assert published.get(stem, line) is packed.get(stem, line) is None
                continue
            array = np.load(folder / stem / f"{line}.npy")
            assert array.dtype == np.float32 and array.shape[0] == 1
            assert torch.equal(published.get(stem, line), packed.get(stem, line))
    with pytest.raises(ValueError, match="holds packed features: give --t5-path another folder"):
        extract(lists, extracted, t5, "--published-layout")


def test_precisions(lists, t5, extracted, tmp_path):
    exact = Features(extracted)
    for precision, dtype in [("bf16", torch.bfloat16), ("fp16", torch.float16)]:
        store = Features(extract(lists, tmp_path / precision, t5, "--precision", precision))
        found = store.get("part-00", 1)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), exact.get("part-00", 1), rtol=0.1, atol=0.1)
    store = Features(extract(lists, tmp_path / "wide", t5, "--precision", "bf16", "--feature-dtype", "float32"))
    narrow = Features(tmp_path / "bf16")
    assert torch.equal(store.get("part-00", 1), narrow.get("part-00", 1).float())  # bfloat16 has lost nothing


def test_files_by_their_numbers(lists, t5, extracted, tmp_path):
    """Both ends are included; jobs of other files write to the same folder."""
    folder = extract(lists, tmp_path / "features", t5, "--data-start", 1, "--data-end", 1)
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "part-01"]
    extract(lists, folder, t5, "--data-start", 2, "--data-end", 7)
    extract(lists, folder, t5, "--data-start", 0, "--data-end", 0)
    assert digests(folder) == digests(extracted)
    with pytest.raises(ValueError, match=r"--data-start 3 --data-end 9 selects none of the 3 files, .* 0 to 2"):
        extract(lists, folder, t5, "--data-start", 3, "--data-end", 9)


def test_captions_of_tar_shards(t5, extracted, tmp_path):
    """The same captions beside their images, in WebDataset's format."""
    (tmp_path / "tars").mkdir()
    number = 0
    for stem, count in CAPTIONS.items():
        with tarfile.open(tmp_path / "tars" / f"{stem}.tar", "w") as tar:
            for line in range(count):
                for name, content in [("jpg", b"no image"), ("json", json.dumps({"text": texts(number)}).encode())]:
                    info = tarfile.TarInfo(f"{line:05d}.{name}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
                number += 1
    folder = extract(tmp_path / "tars", tmp_path / "features", t5)
    assert digests(folder, "*.npy") == digests(extracted, "*.npy")


def test_loader_processes_change_nothing(lists, t5, extracted, tmp_path):
    assert digests(extract(lists, tmp_path / "features", t5, "--num-workers", 2)) == digests(extracted)


def test_like_lengths_are_encoded_together(embedder, monkeypatch):
    shapes = []
    encode = T5Embedder.encode

    def watched(self, ids, mask):
        shapes.append(tuple(ids.shape))
        return encode(self, ids, mask)

    monkeypatch.setattr(T5Embedder, "encode", watched)
    lengths = [20, 3, 120, 5, 7, 19]
    ids = [[4] * (length - 1) + [1] for length in lengths]
    features = encode_captions(embedder, ids, batch_size=2)
    assert shapes == [(2, 8), (2, 24), (2, 120)]
    assert [len(rows) for rows in features] == lengths
    alone = embedder.encode(torch.tensor([ids[3]]), torch.ones(1, 5, dtype=torch.int64))[0]
    torch.testing.assert_close(features[3], alone, **CLOSE)


# Damaged lists


@pytest.fixture
def damaged(lists, tmp_path):
    """The lists with lines of part-00 that are cut, empty, without a text, with too few, or with empty ones."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in lists.iterdir():
        (folder / file.name).write_text(file.read_text())
    lines = (lists / "part-00.jsonl").read_text().splitlines()
    lines[3], lines[4] = lines[3][:-9], ""
    lines[8] = json.dumps({"image_path": "8.jpg"})
    lines[9] = json.dumps({"image_path": "9.jpg", "text": []})
    lines[12] = json.dumps({"image_path": "12.jpg", "text": [None, "a", "b"]})
    for line, text in BLANK.items():
        lines[line] = json.dumps({"image_path": f"{line}.jpg", "text": [text, "a", "b"]})
    (folder / "part-00.jsonl").write_text("\n".join(lines))  # and no line end at the end
    return folder


BLANK = {13: "", 14: " \n", 16: "https://example.com/a"}
DAMAGED = (3, 4, 8, 9, 12, *BLANK)


@pytest.mark.parametrize("more", [[], ["--published-layout"]], ids=["packed", "published"])
def test_damaged_lines(damaged, t5, extracted, tmp_path, capsys, more):
    folder = extract(damaged, tmp_path / "features", t5, *more)
    output = capsys.readouterr().out
    for line in DAMAGED:
        assert f"skipped: line {line} (from 0) of {damaged / 'part-00.jsonl'}" in output
    assert "features of 22 captions, 11 lines without a caption skipped" in output
    store, whole = Features(folder), Features(extracted)
    assert len(store) == 22
    for line in (13, 14):
        assert re.search(rf"skipped: line {line} \(from 0\) of .*part-00\.jsonl has an empty caption\n", output)
    assert "jsonl has an empty caption, 'https://example.com/a', once it is cleaned\n" in output
    assert "skipped: line 2 (from 0) of " in output and "empty caption, 'IMG_2041.jpg', once it is cleaned" in output
    for line in range(23):
        if line in DAMAGED or ("part-00", line) in EMPTY:
            assert store.get("part-00", line) is None
        else:
            torch.testing.assert_close(store.get("part-00", line), whole.get("part-00", line), **CLOSE)
    before = digests(folder)
    extract(damaged, folder, t5, *more)
    again = capsys.readouterr().out
    assert "features of 22 captions, 11 lines without a caption skipped" in again and "encoded" not in again
    assert digests(folder) == before


def test_lists_of_another_kind(t5, tmp_path):
    """Whole shards without a caption end the run at once, not as a folder of nothing."""
    (tmp_path / "a.jsonl").write_text('{"image_path": "a.jpg"}\n' * 200)
    with pytest.raises(ValueError, match=r"none of 150 lines in a row has a caption; the first: line 0 \(from 0\) of"):
        extract(tmp_path, tmp_path / "features", t5, "--shard-size", 150)


@pytest.mark.parametrize("more", [[], ["--published-layout"]], ids=["packed", "published"])
def test_a_run_without_any_caption(t5, tmp_path, more):
    """Of samples that have one text each; the second time too."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for line in range(12):
            for name, content in [("jpg", b"no image"), ("txt", b"a red lantern")]:
                info = tarfile.TarInfo(f"{line:05d}.{name}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    message = (
        r"none of the 12 lines has a caption: check .*--caption-key.*the first: sample 0 of .*a\.tar has 1 texts, "
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=message + "--caption-key llava is number 2"):
            extract(tmp_path, tmp_path / "features", t5, "--caption-key", "llava", *more)
    extract(tmp_path, tmp_path / "others", t5, *more)
    if more:  # there are some of an earlier run
        for line in (3, 4):
            (tmp_path / "others" / "a" / f"{line}.npy").unlink()
        with pytest.raises(
            ValueError, match=r"others/a was made with 'blip', now it is 'llava': write to another folder"
        ):
            extract(tmp_path, tmp_path / "others", t5, "--caption-key", "llava", *more)


# Prompts


@pytest.mark.parametrize(("name", "more"), [("own.prompts.tsv", []), ("own.prompts.txt", ["--published-layout"])])
def test_prompts_of_a_file(t5, embedder, tmp_path, name, more):
    """By the number of each, under the file's name; what the sampling scripts then read."""
    prompts = ["a red lantern", "two cats, sleep", "a map"]
    heading = ["Prompt"] if name.endswith("tsv") else [""]
    (tmp_path / name).write_text("\n".join([*heading, *prompts]) + "\n")
    folder = extract(tmp_path / name, tmp_path / "features", t5, *more)
    assert Features(folder).present("own.prompts").tolist() == [True] * 3
    features = PromptFeatures(folder, tmp_path / name, prompts, dim=32)
    for i, prompt in enumerate(prompts):
        expected, mask = embedder.get_text_embeddings([prompt])
        torch.testing.assert_close(features[i], expected[0, : int(mask.sum())], **CLOSE)


def test_prompts_whose_features_do_not_fit(t5, tmp_path):
    (tmp_path / "prompts.txt").write_text("a map\nhttp://a.com\ntwo cats\na fox\n")
    folder = extract(tmp_path / "prompts.txt", tmp_path / "features", t5)
    for name, count, message in (
        (
            "others.txt",
            4,
            r"has no features of others\.txt: a folder others/ is looked for(.|\n)*--data-path others\.txt",
        ),
        ("prompts.txt", 5, r"features/prompts has features of 4 prompts and prompts\.txt has 5: extract them anew"),
        ("prompts.txt", 4, r"features/prompts has no features of 1 of 4 prompts \(1, from 0\): extract them anew"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptFeatures(folder, name, ["a map"] * count)
    with pytest.raises(ValueError, match=r"of width 32, but 64 are needed"):
        PromptFeatures(folder, "prompts.txt", ["a map"] * 4, dim=64)


# Once more, killed, on more processes


def test_finished_means_finished(lists, t5, extracted, capsys):
    before = {path: path.stat().st_mtime_ns for path in extracted.rglob("*")}
    extract(lists, extracted, t5)
    output = capsys.readouterr().out
    assert "features of 30 captions, 3 lines without a caption skipped" in output and "encoded" not in output
    assert {path: path.stat().st_mtime_ns for path in extracted.rglob("*")} == before


def test_published_files_that_are_missing(lists, t5, tmp_path, capsys):
    """They are written anew with the same bytes: all of their shard is encoded, and only they are written."""
    folder = extract(lists, tmp_path / "published", t5, "--published-layout")
    before = digests(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    for name in ("part-00/2.npy", "part-00/13.npy", "part-02/0.npy"):
        (folder / name).unlink()
    capsys.readouterr()
    extract(lists, folder, t5, "--published-layout")
    assert "encoded 11 captions" in capsys.readouterr().out
    assert digests(folder) == before
    assert sum(path.stat().st_mtime_ns != times[path] for path in folder.rglob("*.npy")) == 3
    with pytest.raises(ValueError, match="precision: 'none' there, 'bf16' now"):
        extract(lists, folder, t5, "--published-layout", "--precision", "bf16")


def test_two_processes_killed_and_run_again_leave_what_one_would(t5, tmp_path):
    """In both layouts; without any caption both end with the same words."""
    lists = make_lists(tmp_path / "lists", {"a": 60, "b": 45})
    empty = make_lists(tmp_path / "empty", {"a": 12})
    lines = [json.loads(line) for line in (empty / "a.jsonl").read_text().splitlines()]
    (empty / "a.jsonl").write_text("\n".join(json.dumps({**line, "text": "http://a.com"}) for line in lines))
    imports = ["language.extraction", "transformers.models.t5.modeling_t5", "bs4", "ftfy"]
    lives = [{"module": SCRIPT, "args": words(empty, tmp_path / "none", t5), "world": 2, "fails": True}]
    lives[0]["imports"] = imports
    layouts = {"packed": ([], "shard-000003.json"), "published": (["--published-layout"], "17.npy")}
    for name, (more, written) in layouts.items():
        life = {"module": SCRIPT, "args": words(lists, tmp_path / name, t5, *more), "world": 2}
        lives += [{**life, "kill_at": f"{tmp_path / name}/a/{written}"}, life]
    output = live(*({**life, "args": list(map(str, life["args"]))} for life in lives))
    assert output.count("AgreedError: none of the 12 lines has a caption") == 2
    assert (
        output.count("life: killed") == output.count("features of 95 captions, 10 lines without a caption skipped") == 2
    )
    for name, (more, _) in layouts.items():
        for leftover in (tmp_path / name).rglob(".*.tmp"):
            assert more, leftover  # of small files; a shard's are removed
            leftover.unlink()
        assert digests(tmp_path / name) == digests(extract(lists, tmp_path / f"{name} whole", t5, *more))


# What a user gets wrong


@pytest.mark.parametrize(
    "more, message",
    [
        (["--trunc-caption"], "truncated: False there, True now"),
        (["--precision", "bf16"], "precision: 'none' there, 'bf16' now"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_other_settings_into_the_same_folder(lists, t5, extracted, more, message):
    before = digests(extracted)
    with pytest.raises(ValueError, match=rf"holds features of other settings(.|\n)*{message}"):
        extract(lists, extracted, t5, *more)
    assert digests(extracted) == before


def test_missing_folders(lists, t5, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        extract(tmp_path / "nowhere", tmp_path / "features", t5)
    with pytest.raises(FileNotFoundError, match=r"no T5 at .*my-t5"):
        extract(lists, tmp_path / "features", t5, "--t5-model-type", "my-t5", "--t5-model-path", tmp_path / "none")
    assert not (tmp_path / "features").exists()


# Flags

FLAGS = """
`--data-path` str = required; `--t5-path` str = required; `--data-start` int = required; `--data-end` int = required;
`--caption-key` str ∈ [blip, llava, llava_first] = blip; `--trunc-caption` switch = off;
`--t5-model-path` str = ./pretrained_models/t5-ckpt; `--t5-model-type` str = flan-t5-xl;
`--precision` str ∈ [none, fp16, bf16] = bf16; `--global-seed` int = 0; `--num-workers` int = 24
"""


def test_published_flags():
    check_published_flags(extract_t5_feature, FLAGS, without_default=("--data-start", "--data-end"))
    assert flag_defaults(extract_t5_feature)["--published-layout"] is False


@pytest.mark.parametrize("more", [[], ["--published-layout"]], ids=["packed", "published"])
def test_extraction_is_not_continued_with_another_list(lists, t5, tmp_path, more):
    """Neither what is missing nor what is there may be of two lists."""
    changed = make_lists(tmp_path / "lists")
    folder = extract(lists, tmp_path / "features", t5, *more, "--data-end", 0)
    text = (changed / "part-00.jsonl").read_text().splitlines()
    (changed / "part-00.jsonl").write_text("\n".join([text[1], text[0], *text[2:]]))
    with pytest.raises(
        ValueError, match=r"features/part-00 was made of other lines: the caption of line 0 .*and 1 more"
    ):
        extract(changed, folder, t5, *more)
    (changed / "part-00.jsonl").write_text("\n".join(line.replace(".jpg", ".png") for line in text))
    extract(changed, folder, t5, *more)
    assert len(Features(folder)) == 30


def test_features_know_their_encoder_in_any_precision(lists, t5, extracted, tmp_path):
    """Another encoder's are not mixed in, in either layout."""
    encoder = Features(extracted).encoder
    assert encoder == Features(extract(lists, tmp_path / "half", t5, "--precision", "bf16")).encoder
    other = make_small_t5(tmp_path / "other" / "flan-t5-xl", sentences=[*SENTENCES, "zebra"])
    folder = extract(lists, tmp_path / "published", t5, "--published-layout", "--data-end", 0)
    assert Features(folder).encoder == encoder != Features(extract(lists, tmp_path / "b", other)).encoder
    with pytest.raises(ValueError, match=rf"part-00 was made with '{encoder}', now it is '[0-9a-f]{{16}}'"):
        extract(lists, folder, other, "--published-layout")
    require_encoder({"text_encoder": encoder}, encoder, "features")
    with pytest.raises(ValueError, match=f"trained with text encoder 0123, features is of {encoder}"):
        require_encoder({"text_encoder": "0123"}, encoder, "features")
