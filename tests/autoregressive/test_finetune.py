"""Fine-tuning of GPTs: weights from a file, a run or shards, class rows by name, fresh optimizer and step."""

import json

import numpy as np
import pytest
import torch

from autoregressive.train import train_c2i
from tests.autoregressive.test_training_processes import last as newest
from tests.training import live, load, make_codes, metrics, quiet_loggers, repetitive_codes, run_folder, run_here, same
from utils.checkpoint import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]  # through whole scripts and servers

VOCAB, TOKENS = 64, 16
FLAGS = ["--gpt-model", "GPT-XS", "--downsample-size", 4, "--global-batch-size", 8, "--num-workers", 0, "--no-wandb"]
FLAGS += ["--mixed-precision", "none", "--log-every", 1, "--weight-decay", 0]
STILL = ["--max-steps", 1, "--lr", 1e-12]  # a step that moves nothing, so that the file has what training began with
TABLE = "cls_embedding.embedding_table.weight"


def codes_of(folder, *names, image_size=16, classes=None):
    """Packed codes of a few classes; without names they record none."""
    tokens, count = (image_size // 4) ** 2, 24
    classes = classes or len(names)
    array, labels = repetitive_codes(count, 2, tokens, VOCAB), np.arange(count) % classes
    make_codes(folder, array, labels, image_size=image_size, vocab=VOCAB, classes=classes)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"classes": list(names) or None}))
    return folder


def train(codes, results, *more):
    run_here(train_c2i, "--code-path", codes, "--results-dir", results, "--image-size", 16, *FLAGS, *more)
    return max((run_folder(results) / "checkpoints").glob("0*"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The file of a run of two steps on three classes, with averaged weights."""
    folder = tmp_path_factory.mktemp("source")
    with quiet_loggers():
        return train(codes_of(folder / "codes", "cat", "dog", "owl"), folder / "results", "--max-steps", 2, "--ema")


def fresh(tmp_path, classes):
    """The table of a new model."""
    return load(train(codes_of(tmp_path / "new codes", classes=classes), tmp_path / "new", *STILL))["model"][TABLE]


@pytest.mark.parametrize(
    "rows, expected",
    [([], [2, None, 0, None]), (["--class-rows", "number"], [0, 1, 2, None]), (["--class-rows", "new"], [None] * 4)],
    ids=["name", "number", "new"],
)
def test_finetune_maps_class_rows_and_keeps_the_row_of_no_class_last(source, tmp_path, rows, expected):
    codes = codes_of(tmp_path / "codes", "owl", "bee", "cat", "fox")
    saved = load(train(codes, tmp_path / "results", "--finetune", "--gpt-ckpt", source, *STILL, *rows))
    before, new = load(source)["model"], fresh(tmp_path, 4)
    wanted = torch.stack([new[i] if row is None else before[TABLE][row] for i, row in enumerate(expected)])
    torch.testing.assert_close(saved["model"][TABLE], torch.cat([wanted, before[TABLE][-1:]]), rtol=0, atol=1e-9)
    for name, tensor in before.items():
        if name != TABLE:
            torch.testing.assert_close(saved["model"][name], tensor, rtol=0, atol=1e-9)
    assert saved["steps"] == 1 and saved["optimizer"]["state"][0]["step"] == 1
    assert saved["config"]["classes"] == ["owl", "bee", "cat", "fox"] and saved["args"].num_classes == 4


def test_finetune_use_ema_begins_with_the_averaged_weights_and_so_does_the_average(source, tmp_path):
    codes = codes_of(tmp_path / "codes", "cat", "dog", "owl")
    flags = ["--finetune", "--gpt-ckpt", source, "--ema", *STILL]
    for name, more, key in (("raw", [], "model"), ("averaged", ["--use-ema"], "ema")):
        saved, begun = load(train(codes, tmp_path / name, *flags, *more)), load(source)[key]
        for weights in (saved["model"], saved["ema"]):
            torch.testing.assert_close(weights["norm.weight"], begun["norm.weight"], rtol=0, atol=1e-9)
            torch.testing.assert_close(weights[TABLE], begun[TABLE], rtol=0, atol=1e-9)
    assert not torch.equal(load(source)["ema"][TABLE], load(source)["model"][TABLE])


def test_finetune_other_image_size_takes_the_weights(source, tmp_path):
    codes = codes_of(tmp_path / "codes", "cat", "dog", "owl", image_size=32)
    saved = load(train(codes, tmp_path / "results", "--image-size", 32, "--finetune", "--gpt-ckpt", source, *STILL))
    torch.testing.assert_close(saved["model"][TABLE], load(source)["model"][TABLE], rtol=0, atol=1e-9)


def test_finetune_resumes_bit_identically_also_without_the_file(source, tmp_path):
    codes = codes_of(tmp_path / "codes", "owl", "bee")
    file = tmp_path / "weights.pt"
    file.write_bytes(source.read_bytes())
    flags = ["--finetune", "--gpt-ckpt", file, "--ema", "--resume"]
    train(codes, tmp_path / "whole", *flags, "--max-steps", 4)
    train(codes, tmp_path / "parts", *flags, "--max-steps", 2)
    file.unlink()
    whole, parts = (load(train(codes, tmp_path / name, *flags, "--max-steps", 4)) for name in ("whole", "parts"))
    assert whole.pop("args") and parts.pop("args") and same(whole, parts)


def test_finetune_in_shards_from_a_file_and_from_shards(source, tmp_path):
    codes = codes_of(tmp_path / "codes", "owl", "bee", "cat", "fox")
    fsdp = "autoregressive.train.train_c2i_fsdp"

    def life(name, start, *more):
        words = ["--code-path", codes, "--results-dir", tmp_path / name, "--image-size", 16, *FLAGS, *more, *STILL]
        return {"module": fsdp, "args": list(map(str, [*words, "--finetune", "--gpt-ckpt", start])), "world": 2}

    live(life("one", source), life("two", tmp_path / "one"))
    train(codes, tmp_path / "alone", "--finetune", "--gpt-ckpt", source, *STILL)
    alone, *others = (read_checkpoint(newest(tmp_path / name)).model[TABLE] for name in ("alone", "one", "two"))
    for table in others:
        torch.testing.assert_close(table, alone, rtol=0, atol=1e-8)
    assert [list(metrics(tmp_path / name, "loss")) for name in ("one", "two")] == [[1], [1]]


NEIGHBOURS = ["--layout", "neighbours"]
EXIT = ["--second-exit-only", *NEIGHBOURS]


def test_finetune_of_a_raster_file_by_neighbours_begins_with_its_exit_twice(source, tmp_path):
    codes = codes_of(tmp_path / "codes", "cat", "dog", "owl")
    saved = load(train(codes, tmp_path / "begun", *NEIGHBOURS, "--finetune", "--gpt-ckpt", source, *STILL))["model"]
    before = load(source)["model"]
    assert len(saved) == len(before) + 9
    for name, tensor in saved.items():
        first = name.removeprefix("medusa_").replace("layers.4.", "layers.3.")
        torch.testing.assert_close(tensor, before[first], rtol=0, atol=1e-9)
    log = (run_folder(tmp_path / "begun") / "log.txt").read_text()
    assert "its layout was raster, now neighbours; the second exit begins as a copy of the first" in log


def test_second_exit_only_moves_nothing_else_and_resumes_bit_identically(source, tmp_path):
    codes = codes_of(tmp_path / "codes", "cat", "dog", "owl")
    flags = [*EXIT, "--finetune", "--gpt-ckpt", source, "--lr", 1e-2, "--ema", "--resume"]
    whole = load(train(codes, tmp_path / "whole", *flags, "--max-steps", 4))
    train(codes, tmp_path / "parts", *flags, "--max-steps", 2)
    parts = load(train(codes, tmp_path / "parts", *flags, "--max-steps", 4))
    assert whole.pop("args") and parts.pop("args") and same(whole, parts)
    still = {name for name, tensor in load(source)["model"].items() if torch.equal(tensor, whole["model"][name])}
    assert still == set(load(source)["model"])
    for name in whole["model"].keys() - still:
        first = name.removeprefix("medusa_").replace("layers.4.", "layers.3.")
        assert not torch.allclose(whole["model"][name], load(source)["model"][first], atol=1e-4)
    with pytest.raises(ValueError, match="give the flags it began with"):
        train(codes, tmp_path / "parts", *NEIGHBOURS, *flags[3:], "--max-steps", 5)
    all_ = train(codes, tmp_path / "all", *NEIGHBOURS, "--finetune", "--gpt-ckpt", tmp_path / "whole", *STILL)
    torch.testing.assert_close(load(all_)["model"][TABLE], whole["model"][TABLE], rtol=0, atol=1e-9)


def test_second_exit_only_in_shards_trains_as_in_one_process(source, tmp_path):
    codes = codes_of(tmp_path / "codes", "cat", "dog", "owl")
    flags = [*EXIT, "--finetune", "--gpt-ckpt", source, "--max-steps", 3, "--dropout-p", 0, "--token-dropout-p", 0]
    words = ["--code-path", codes, "--results-dir", tmp_path / "shards", "--image-size", 16, *FLAGS, *flags]
    live({"module": "autoregressive.train.train_c2i_fsdp", "args": list(map(str, words)), "world": 2})
    train(codes, tmp_path / "alone", *flags)
    alone, shards = (read_checkpoint(newest(tmp_path / name)).model for name in ("alone", "shards"))
    for name, tensor in alone.items():
        torch.testing.assert_close(shards[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "begun, more, message",
    [
        ([], ["--layout", "neighbours"], r"is of the layout raster, and this run of neighbours: give --layout raster, or --finetune"),
        (NEIGHBOURS, [], r"is of the layout neighbours, and this run of raster: .*neighbours alone have a second exit"),
        (NEIGHBOURS, ["--finetune"], r"is of the layout neighbours, and this run of raster: .*neighbours alone have a second exit"),
        ([], ["--second-exit-only", "--finetune"], "give --layout neighbours and --gpt-ckpt FILE"),
    ],
    ids=["raster for neighbours", "neighbours for raster", "neighbours fine-tuned by raster", "raster without an exit"],
)  # fmt: skip
def test_a_start_of_another_layout_is_refused_with_the_reason(tmp_path, begun, more, message):
    codes = codes_of(tmp_path / "codes", "cat", "dog", "owl")
    file = tmp_path / "published.pt"
    torch.save({"model": load(train(codes, tmp_path / "first", *begun, *STILL))["model"]}, file)  # records nothing
    with pytest.raises(ValueError, match=message):
        train(codes, tmp_path / "second", "--gpt-ckpt", file, *more)


@pytest.mark.parametrize(
    "names, more, message",
    [
        ([], [], r"codes record no names of classes.*--class-rows number"),
        (["cat", "dog", "owl"], ["--ar-token-num", 4], r"does not fit the flags: --ar-token-num 4 \(file: 1\)"),
        (["cat", "dog", "owl"], ["--gpt-model", "GPT-B"], r"--gpt-model GPT-B \(file: GPT-XS\)"),
    ],
    ids=["no names", "layout", "size"],
)
def test_finetune_weights_that_do_not_fit_are_refused(source, tmp_path, names, more, message):
    codes = codes_of(tmp_path / "codes", *names, classes=3)
    with pytest.raises(ValueError, match=message):
        train(codes, tmp_path / "results", "--finetune", "--gpt-ckpt", source, *more)
    assert not (tmp_path / "results").exists()


def test_finetune_flags_that_miss_others_are_refused(source, small_files, tmp_path):
    codes = codes_of(tmp_path / "codes", "cat", "dog", "owl")
    plain = tmp_path / "plain.pt"
    torch.save({"model": load(source)["model"]}, plain)
    for flags, message in (
        (["--finetune"], "--finetune needs --gpt-ckpt"),
        (["--use-ema", "--gpt-ckpt", source], "--use-ema needs --finetune"),
        (["--class-rows", "new", "--gpt-ckpt", source], "--class-rows needs --finetune"),
        (["--finetune", "--gpt-ckpt", source, "--gpt-resume", plain], "give one of them"),
        (["--use-ema", "--finetune", "--gpt-ckpt", plain], "has no averaged weights"),
        (["--finetune", "--gpt-ckpt", plain], r"plain\.pt records no names of its classes"),
        (["--finetune", "--gpt-ckpt", small_files.vq], "looks like a VQ image tokenizer"),
        (["--gpt-ckpt", small_files.vq], "looks like a VQ image tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            train(codes, tmp_path / "results", *flags)


@pytest.mark.parametrize("more", [[], ["--max-steps", 2]])
def test_gpt_ckpt_of_a_finished_run_names_finetune(source, tmp_path, more):
    codes = codes_of(tmp_path / "codes", "cat", "dog", "owl")
    finished = train(codes, tmp_path / "first", "--epochs", 1)
    with pytest.raises(ValueError, match=r"has done 3 steps, all that --.* asks for.*--finetune"):
        train(codes, tmp_path / "second", "--epochs", 1, "--gpt-ckpt", finished, *more)


def test_resume_with_another_layout_is_refused_in_one_line_that_names_the_flags(source, tmp_path):
    codes = codes_of(tmp_path / "codes", "cat", "dog", "owl")
    train(codes, tmp_path / "results", "--ar-token-num", 4, "--max-steps", 1)
    with pytest.raises(ValueError, match=r"layout .*parallel.*raster.*--ar-token-num None \(was 4\)") as refused:
        train(codes, tmp_path / "results", "--max-steps", 2, "--resume")
    assert "\n" not in str(refused.value)
