"""Training in random orders through the script: RAR and a llama learn, resume to the bit, split over processes, sample."""

import numpy as np
import pytest
import torch

from autoregressive.pipeline import load_gpt
from autoregressive.train import train_c2i
from tests.training import (  # fmt: skip
    load,
    make_codes,
    metrics,
    repetitive_codes,
    run_folder,
    run_here,
    run_script,
    same,
)

pytestmark = pytest.mark.usefixtures("quiet")

SCRIPT = "autoregressive.train.train_c2i"
VOCAB, CLASSES, TOKENS, COUNT = 64, 10, 16, 48
FLAGS = ["--vocab-size", VOCAB, "--num-classes", CLASSES, "--image-size", 16, "--downsample-size", 4]
FLAGS += ["--global-batch-size", 16, "--num-workers", 0, "--mixed-precision", "none", "--log-every", 1, "--lr", 2e-3]
FLAGS += ["--dropout-p", 0, "--token-dropout-p", 0]
ORDERS = ["--random-orders", 1, 3, "--epochs", 4]
MODELS = ["RAR-XS", "GPT-XS"]


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    array = repetitive_codes(COUNT, 2, TOKENS, VOCAB)
    folder = tmp_path_factory.mktemp("codes") / "packed"
    return make_codes(folder, array, np.arange(COUNT) % CLASSES, image_size=16, vocab=VOCAB, classes=CLASSES)


def train(codes, results, name, *more):
    run_here(train_c2i, "--code-path", codes, "--results-dir", results, "--gpt-model", name, *FLAGS, *more)
    return results


def last(results):
    return max((run_folder(results) / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize("name", MODELS)
def test_run_in_random_orders_learns_and_its_file_loads(codes, tmp_path, name):
    results = train(codes, tmp_path, name, *ORDERS)
    losses = metrics(results, "loss")
    assert losses[1] == pytest.approx(np.log(VOCAB), abs=0.3) and losses[12] < 0.9 * losses[1]
    model = load_gpt(last(results))
    assert model.any_order and model.args.trunk == ("rar" if name == "RAR-XS" else "llama")


@pytest.mark.parametrize("name", MODELS)
def test_resumed_run_without_the_flag_draws_the_same_orders(codes, tmp_path, name):
    whole = train(codes, tmp_path / "whole", name, *ORDERS)
    parts = train(codes, tmp_path / "parts", name, *ORDERS, "--max-steps", 5)
    train(codes, parts, name, "--epochs", 4, "--resume")
    assert same(load(last(whole))["model"], load(last(parts))["model"])


@pytest.mark.parametrize("name", MODELS)
def test_no_random_orders_is_raster_to_the_bit(codes, tmp_path, name):
    none = train(codes, tmp_path / "none", name, "--random-orders", 0, 0, "--max-steps", 3)
    plain = train(codes, tmp_path / "plain", name, "--max-steps", 3)
    assert same(load(last(none))["model"], load(last(plain))["model"])


@pytest.mark.slow
def test_raster_file_begins_a_run_in_random_orders_and_the_reverse(codes, tmp_path):
    still = ["--finetune", "--class-rows", "number", "--max-steps", 1, "--lr", 1e-12, "--weight-decay", 0]
    raster = last(train(codes, tmp_path / "raster", "GPT-XS", "--max-steps", 2))
    random = last(train(codes, tmp_path / "random", "GPT-XS", *ORDERS, *still, "--gpt-ckpt", raster))
    back = last(train(codes, tmp_path / "back", "GPT-XS", *still, "--gpt-ckpt", random))
    before, between, after = (load(path)["model"] for path in (raster, random, back))
    assert between.keys() - before.keys() == {"target_embeddings.weight"} and after.keys() == before.keys()
    assert all(torch.allclose(after[name], before[name], atol=1e-9) for name in before)


@pytest.mark.slow
def test_rar_finetuned_on_other_classes_keeps_rows_of_codes_and_of_no_class(codes, tmp_path):
    begun = load(begin := last(train(codes, tmp_path / "begin", "RAR-XS", *ORDERS)))["model"]["embeddings.weight"]
    still = ["--finetune", "--class-rows", "number", "--max-steps", 1, "--lr", 1e-12, "--num-classes", 12]
    table = load(last(train(codes, tmp_path / "more", "RAR-XS", *still, "--gpt-ckpt", begin)))["model"][
        "embeddings.weight"
    ]
    assert len(table) == len(begun) + 2
    torch.testing.assert_close(table[: VOCAB + 1 + CLASSES], begun[:-1], rtol=0, atol=1e-9)
    torch.testing.assert_close(table[-1], begun[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--random-orders", 3, 1], "random orders end where they begin to be fewer or later"),
        (["--random-orders", 1, 2, "--patch-level", 2], "both say what a step reads by"),
        (["--random-orders", 1, 2, "--layout", "neighbours"], "predicts two tokens from a row"),
    ],
)
def test_orders_that_do_not_fit_are_refused(codes, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train(codes, tmp_path, "GPT-XS", *more)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_train_what_one_trains(codes, tmp_path, name, strategy):
    train(codes, tmp_path / "one", name, *ORDERS)
    words = ["--code-path", codes, "--results-dir", tmp_path / "two", "--gpt-model", name, *FLAGS, *ORDERS]
    run_script(SCRIPT, *words, "--data-parallel", strategy, "--device", "cpu", processes=2)
    one, two = metrics(tmp_path / "one", "loss"), metrics(tmp_path / "two", "loss")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-3)
