"""Condition Contrastive Alignment: the published loss, and training by it through the script."""

import numpy as np
import pytest
import torch

from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.train import train_c2i
from autoregressive.train.contrast import ContrastLoss, NegativesOfNext
from autoregressive.train.loss import token_log_probs
from tests.helpers import assert_close, golden_state, load_golden, randomize
from tests.training import live, load, make_codes, metrics, run_folder, run_here, same
from utils.checkpoint import read_checkpoint
from utils.distributed import Distributed
from utils.errors import AgreedError

CASES = {"cca": (300.0, 0.02), "cca_l1000": (1000.0, 0.02), "cca_small": (0.5, 0.1)}


def golden():
    arrays, meta = load_golden("cca")
    models = []
    for seed in (meta["config"]["seed"], meta["reference_seed"]):
        model = Transformer(ModelArgs(**meta["model_args"]))
        model.load_state_dict(golden_state(meta["state_dict"], seed, meta["config"]["gain"]))
        models.append(model.eval())
    codes, labels, drop = (torch.from_numpy(arrays[name]) for name in ("codes", "labels", "drop"))
    return *models, codes, labels, drop, arrays


@pytest.mark.parametrize("case", CASES)
def test_contrast_loss_is_the_published_one(case):
    model, reference, codes, labels, drop, arrays = golden()
    loss, figures = ContrastLoss(model, reference, *CASES[case])(codes, labels, labels.roll(-1), drop=drop)
    assert_close(loss.double(), arrays[f"{case}/loss"])
    assert_close(figures["cca_margin"].double(), arrays[f"{case}/margin"])
    assert figures["cca_preferred"] == arrays[f"{case}/acc"]
    loss.backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    gradients = [key for key in arrays if key.startswith(f"{case}/grad/")]
    assert len(gradients) == 4
    for key in gradients:
        assert_close(model.get_parameter(key.removeprefix(f"{case}/grad/")).grad, arrays[key])


def test_log_probs_of_both_models_are_the_published_ones():
    model, reference, codes, _, _, arrays = golden()
    for name, one in (("img_logps", model), ("img_ref_logps", reference)):
        for kind in ("positive", "negative"):
            recorded = arrays[f"cca/{'negative_' * (kind == 'negative')}{name}"]
            labels = torch.from_numpy(arrays[f"cca/{kind}_labels"])
            assert_close(token_log_probs(one, codes, labels).sum(1), recorded)


def test_contrast_where_every_negative_is_the_own_class_is_twice_the_positive_term():
    model, reference, codes, labels, _, _ = golden()
    keep = torch.zeros(len(codes), dtype=torch.bool)
    gap = token_log_probs(model, codes, labels).sum(1) - token_log_probs(reference, codes, labels).sum(1)
    for weight in (0.5, 300.0):
        loss, figures = ContrastLoss(model, reference, weight, 0.02)(codes, labels, labels, drop=keep)
        assert_close(loss, -2 * torch.nn.functional.logsigmoid(0.02 * gap).mean() / max(weight, 1))
        assert_close(figures["cca_gap"], gap.mean())


@pytest.mark.parametrize("layout", [{"ar_token_num": 4}, {"layout": {"name": "neighbours"}}], ids=["PAR", "NAR"])
def test_contrast_of_another_layout_is_that_of_its_log_probs(layout):
    models = [
        randomize(Transformer(ModelArgs(64, 2, 2, vocab_size=32, block_size=16, num_classes=3, **layout)), seed)
        for seed in (1, 2)
    ]
    codes, labels = torch.randint(32, (4, 16), generator=torch.manual_seed(0)), torch.tensor([0, 1, 2, 1])
    drop = torch.tensor([False, False, True, False])
    own, other = (
        [token_log_probs(model, codes, one, drop=drop).sum(1) for model in models] for one in (labels, labels.roll(-1))
    )
    _, figures = ContrastLoss(*models, 2.0, 0.1)(codes, labels, labels.roll(-1), drop=drop)
    assert_close(figures["cca_margin"], (own[0] - own[1] - other[0] + other[1]).mean())


def test_negatives_of_micro_batches_are_the_global_batchs_next_samples():
    batches = [{"codes": torch.zeros(2, 4), "label": torch.tensor(labels)} for labels in ([5, 6], [7, 8])]
    prepared = NegativesOfNext(["label"], Distributed(torch.device("cpu")))(batches, 0)
    assert [batch["negatives"]["label"].tolist() for batch in prepared] == [[6, 7], [8, 5]]


# Through the script

VOCAB, CLASSES, TOKENS, COUNT = 64, 4, 16, 96
MODEL = [
    "--gpt-model",
    "GPT-XS",
    "--image-size",
    16,
    "--downsample-size",
    4,
    "--mixed-precision",
    "none",
    "--device",
    "cpu",
]
PLAIN = ["--global-batch-size", 24, "--num-workers", 0, "--log-every", 1, "--lr", 1e-3]
EXACT = ["--dropout-p", 0, "--token-dropout-p", 0]
CCA = ["--cca-lambda", 1, "--cca-beta", 0.05]


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """Codes whose range is their class's, with some noise."""
    generator = np.random.default_rng(0)
    labels = np.arange(COUNT) % CLASSES
    array = (labels[:, None, None] * 12 + generator.integers(0, 20, (COUNT, 1, TOKENS))) % VOCAB
    folder = tmp_path_factory.mktemp("codes") / "packed"
    return make_codes(folder, array, labels, image_size=16, vocab=VOCAB, classes=CLASSES)


@pytest.fixture(scope="module")
def base(codes, tmp_path_factory):
    results = tmp_path_factory.mktemp("base")
    train(codes, results, "--max-steps", 40, "--ema", "--epochs", 20)
    return results


def train(codes, results, *more):
    run_here(train_c2i, "--code-path", codes, "--results-dir", results, *MODEL, *PLAIN, *more)
    return newest(results)


def newest(results, number=0):
    return max((run_folder(results, number) / "checkpoints").glob("0*"), key=lambda path: int(path.stem))


def test_run_with_a_reference_learns_to_tell_classes_apart_and_resumes_to_the_bit(codes, base, tmp_path):
    flags = ["--cca-reference", base, *CCA, "--epochs", 4]
    whole = load(train(codes, tmp_path / "whole", *flags, "--val-code-path", codes))
    preferred, gap = metrics(tmp_path / "whole", "cca_preferred"), metrics(tmp_path / "whole", "cca_gap")
    assert preferred[16] > 0.7 and abs(gap[16]) < 8
    assert metrics(tmp_path / "whole", "loss")[1] == pytest.approx(2 * np.log(2), abs=0.1)
    assert whole["config"]["objective"] == "cca" and len(whole["config"]["reference"]) == 32
    train(codes, tmp_path / "parts", *flags, "--max-steps", 7)
    parts = load(train(codes, tmp_path / "parts", *flags, "--resume"))
    assert same(parts["model"], whole["model"]) and same(parts["optimizer"], whole["optimizer"])
    log = (run_folder(tmp_path / "parts") / "log.txt").read_text()
    assert "condition contrastive alignment" in log and "starting from" in log


def test_rar_in_random_orders_is_contrasted_in_them(codes, tmp_path):
    model = ["--gpt-model", "RAR-XS", "--random-orders", 1, 2]
    train(codes, tmp_path / "base", *model, "--max-steps", 2)
    file = train(codes, tmp_path / "cca", *model, "--cca-reference", tmp_path / "base", *CCA, *EXACT, "--max-steps", 2)
    assert metrics(tmp_path / "cca", "cca_gap")[1] == pytest.approx(0, abs=1e-4), "both read by the same orders"
    assert load(file)["config"]["objective"] == "cca"


def test_run_begins_with_the_references_weights_or_its_averages(codes, base, tmp_path):
    saved = load(newest(base))
    for name, more in (("model", []), ("ema", ["--use-ema"])):
        started = load(train(codes, tmp_path / name, "--cca-reference", base, *more, "--lr", 1e-12, "--max-steps", 1))
        for key, tensor in started["model"].items():
            torch.testing.assert_close(tensor, saved[name][key], atol=1e-9, rtol=1e-6)
        assert started["steps"] == 1


def test_run_resumed_with_another_reference_or_without_it_is_refused(codes, base, tmp_path):
    file = train(codes, tmp_path / "results", "--cca-reference", base, *CCA, "--max-steps", 1)
    with pytest.raises(AgreedError, match=r"reference '.*' and '.*': give the flags it began with"):
        train(codes, tmp_path / "results", "--cca-reference", file, *CCA, "--max-steps", 2, "--resume")
    with pytest.raises(AgreedError, match="objective 'cca' and 'cross_entropy'"):
        train(codes, tmp_path / "results", "--max-steps", 2, "--resume")


def test_flags_that_cca_needs_or_contradict_it_are_refused(codes, base, small_files, tmp_path):
    reference = ["--cca-reference", base]
    for flags, message in (
        (["--cca-lambda", 3], "--cca-lambda needs --cca-reference FILE"),
        (["--cca-uncond", 0], "--cca-uncond needs --cca-reference FILE"),
        ([*reference, "--objective", "z_loss"], "--objective and --cca-reference both say what is trained"),
        ([*reference, "--patch-level", 2], "--patch-level and --cca-reference both say what is trained"),
        (["--cca-reference", small_files.vq], "looks like a VQ image tokenizer"),
        (["--cca-reference", tmp_path / "none.pt"], "no file .*none.pt"),
        ([*reference, "--ar-token-num", 4], "is of the layout raster, and this run of parallel"),
        (["--cca-reference", small_files.gpt, "--use-ema"], "has no averaged weights"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(codes, tmp_path / "results", *flags)


@pytest.mark.slow
def test_processes_and_micro_batches_give_the_losses_of_one(codes, base, tmp_path):
    flags = ["--code-path", codes, *MODEL, *PLAIN, *EXACT, "--cca-reference", base, *CCA, "--epochs", 2, "--no-wandb"]
    kinds = {
        "one": ([], 1),
        "parts": (["--gradient-accumulation-steps", 3], 1),
        "ddp": (["--gradient-accumulation-steps", 2], 2),
        "fsdp": (["--data-parallel", "fsdp", "--activation-checkpointing"], 2),
        "sdp": (["--data-parallel", "sdp"], 2),
    }
    lives = [
        {
            "module": "autoregressive.train.train_c2i",
            "args": list(map(str, [*flags, *more, "--results-dir", tmp_path / name])),
            "world": world,
        }
        for name, (more, world) in kinds.items()
    ]
    live(*lives)
    one = read_checkpoint(newest(tmp_path / "one")).model
    for name in kinds:
        for figure in ("loss", "cca_gap", "grad_norm"):
            expected = metrics(tmp_path / "one", figure)
            assert len(expected) == 8 and metrics(tmp_path / name, figure) == pytest.approx(
                expected, rel=1e-3, abs=1e-4
            )
        for key, tensor in read_checkpoint(newest(tmp_path / name)).model.items():
            torch.testing.assert_close(tensor, one[key], rtol=1e-3, atol=1e-4, msg=f"{name} {key}")


@pytest.mark.slow
def test_killed_shards_with_a_reference_resume_to_the_same_bits(codes, base, tmp_path):
    def life(name, **when):
        flags = [
            *MODEL,
            *PLAIN,
            "--cca-reference",
            base,
            *CCA,
            "--epochs",
            2,
            "--ckpt-every",
            2,
            "--resume",
            "--no-wandb",
        ]
        args = ["--code-path", codes, "--results-dir", tmp_path / name, "--data-parallel", "fsdp", *flags]
        return {"module": "autoregressive.train.train_c2i", "args": list(map(str, args)), "world": 2, **when}

    killed = life("killed", kill_at=f"{tmp_path}/killed/*/checkpoints/0000004*")
    live(life("whole"), killed, life("killed"))
    whole, parts = (read_checkpoint(newest(tmp_path / name)) for name in ("whole", "killed"))
    assert whole.steps == parts.steps == 8 and same(whole.model, parts.model)
