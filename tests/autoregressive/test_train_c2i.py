"""Training a GPT: the loss by hand, runs that learn, split, die and go on, and what a user gets wrong."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.sizes import GPT_SIZES
from autoregressive.train import train_c2i
from autoregressive.train.evaluation import mean_loss
from autoregressive.train.loss import TokenLoss, dropped_conditions
from dataset.code_files import write_published
from dataset.codes import open_codes
from tests.training import (
    check_published_flags,
    load,
    make_codes,
    metrics,
    repetitive_codes,
    run_folder,
    run_here,
    run_script,
    same,
)
from utils.checkpoint import read_checkpoint
from utils.distributed import Distributed

pytestmark = pytest.mark.usefixtures("quiet")

SCRIPT = "autoregressive.train.train_c2i"
CPU = Distributed(torch.device("cpu"))
VOCAB, CLASSES, TOKENS, COUNT = 64, 10, 16, 48
MODEL = ["--gpt-model", "GPT-XS", "--vocab-size", VOCAB, "--num-classes", CLASSES, "--image-size", 16]
MODEL += ["--downsample-size", 4]
PLAIN = ["--global-batch-size", 16, "--num-workers", 0, "--mixed-precision", "none", "--log-every", 1, "--lr", 2e-3]
EXACT = ["--dropout-p", 0, "--token-dropout-p", 0]
PAR = ["--ar-token-num", 4, "--spe-token-num", 3]


def labels(count=COUNT):
    return np.arange(count) % CLASSES


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """Packed codes with two views an image."""
    folder = tmp_path_factory.mktemp("codes") / "packed"
    array = repetitive_codes(COUNT, 2, TOKENS, VOCAB)
    return make_codes(folder, array, labels(), image_size=16, vocab=VOCAB, classes=CLASSES)


def train(codes, results, *more):
    """Trains in this process; returns the results folder."""
    run_here(train_c2i, "--code-path", codes, "--results-dir", results, *MODEL, *PLAIN, *more)
    return results


def last(results, number=0):
    return max((run_folder(results, number) / "checkpoints").glob("*.pt"))


# The loss


def tiny(**more):
    torch.manual_seed(0)
    args = {"dim": 32, "n_layer": 2, "n_head": 2, "vocab_size": 11, "block_size": 16, "num_classes": 5, **more}
    model = Transformer(ModelArgs(**args)).eval()
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model


def sample(count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(11, (count, 16), generator=generator), torch.randint(5, (count,), generator=generator)


def losses_by_hand(model, codes, labels):
    """Each token's loss from a forward pass that has seen no later group, (B, N) in the layout's order."""
    group, order = model.layout.groups[-1], model.layout.order
    tokens = codes[:, order]
    out = torch.zeros(tokens.shape)
    for b in range(len(codes)):
        for i in range(tokens.shape[1]):
            first = i // group * group
            seen = tokens[b : b + 1, : max(first, group if group > 1 else 0)]
            logits = model(seen, labels[b : b + 1])[0, i].double()
            out[b, i] = torch.logsumexp(logits, 0) - logits[tokens[b, i]]
    return out


@pytest.mark.parametrize("groups", [{}, {"ar_token_num": 4, "spe_token_num": 3}], ids=["raster", "PAR"])
def test_the_loss_by_hand(groups):
    model = tiny(**groups)
    codes, classes = sample()
    with torch.no_grad():
        expected = losses_by_hand(model, codes, classes)
        token_loss = TokenLoss(model)
        assert token_loss(codes, classes) == pytest.approx(float(expected.mean()), rel=1e-5)
        valid = torch.tensor([1, 0, 1])
        loss = token_loss(codes, classes, valid=valid)
        assert loss == pytest.approx(float(expected[[0, 2]].mean()), rel=1e-5)
        assert token_loss(codes, classes, valid=torch.zeros(3)) == 0
        drop = torch.tensor([False, True, False])
        loss = token_loss(codes, classes, drop=drop)
        expected[1] = losses_by_hand(model, codes[1:2], torch.tensor([5]))
        assert loss == pytest.approx(float(expected.mean()), rel=1e-5)


def test_the_parallel_order_is_that_of_the_paper():
    """Groups of four take one token of each quarter of the image."""
    model = tiny(ar_token_num=4, spe_token_num=3)
    codes, classes = sample(1)
    seen = []
    model.hidden = lambda tokens, *_, **__: seen.append(tokens) or torch.zeros(1, 16, 32)
    TokenLoss(model)(codes, classes)
    image = codes.view(4, 4)
    groups = [image[[y, y, y + 2, y + 2], [x, x + 2, x, x + 2]] for y in (0, 1) for x in (0, 1)]
    assert torch.equal(seen[0][0], torch.cat(groups[:-1]))


@pytest.mark.parametrize("world, micro", [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2)])
def test_dropped_conditions_do_not_depend_on_the_split(world, micro):
    whole = dropped_conditions(7, 48, slice(0, 48), 0.3)
    size = 48 // world // micro
    parts = [dropped_conditions(7, 48, slice(i * size, (i + 1) * size), 0.3) for i in range(world * micro)]
    assert torch.equal(torch.cat(parts), whole)


def test_conditions_are_dropped_with_their_probability():
    draws = torch.cat([dropped_conditions(seed, 256, slice(0, 256), 0.1) for seed in range(100)])
    assert draws.dtype == torch.bool
    assert float(draws.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert not torch.equal(draws[:256], draws[256:512])
    assert not dropped_conditions(0, 256, slice(0, 256), 0.0).any()


def test_the_mean_loss_of_a_data_set_by_any_number_of_processes():
    codes, classes = sample(5)
    data = [{"codes": codes[i], "label": int(classes[i])} for i in range(5)]
    model = tiny()
    with torch.no_grad():
        expected = float(losses_by_hand(model, codes, classes).mean())
    for batch in (1, 3, 5, 99):
        assert mean_loss(model, data, batch, CPU) == pytest.approx(expected, rel=1e-5)
    totals = []

    class Recording(Distributed):
        def sum(self, value):
            totals.append(value)
            return value

        def gather(self, value):
            return [value]

    for rank in range(7):  # more processes than samples
        mean_loss(model, data, 2, Recording(torch.device("cpu"), rank, 7))
    total = torch.stack(totals).sum(0)
    assert total[1] == 5 and float(total[0] / total[1]) == pytest.approx(expected, rel=1e-5)


# Runs


@pytest.mark.slow
def test_it_learns(codes, tmp_path):
    """As a user starts it, with the recipe's precision and dropout, to well under the loss of guessing."""
    output = run_script(
        *(SCRIPT, "--code-path", codes, "--results-dir", tmp_path / "results", *MODEL, "--ema", "--ema-decay", 0.9),
        *("--global-batch-size", 16, "--num-workers", 2, "--lr", 4e-3, "--warmup-steps", 5, "--max-steps", 80),
        *("--log-every", 10, "--val-code-path", codes, "--no-compile"),
    )
    loss = metrics(tmp_path / "results", "loss")
    assert list(loss) == [*range(10, 90, 10)]
    assert 0.8 * math.log(VOCAB) < loss[10] < math.log(VOCAB) + 0.3
    assert loss[80] < 0.4 * math.log(VOCAB)
    assert metrics(tmp_path / "results", "val_loss")[80] < loss[80]
    assert f"codes: {codes} (2 views), 48 samples of 16 tokens, a random view of each" in output
    saved = load(last(tmp_path / "results"))
    assert saved.keys() == {"model", "ema", "optimizer", "steps", "args", "config", "trainer"} and saved["steps"] == 80
    assert "Traceback" not in output and "Warning" not in output


def test_the_first_loss_is_that_of_guessing(codes, tmp_path):
    train(codes, tmp_path, "--max-steps", 1)
    assert metrics(tmp_path, "loss")[1] == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_published_and_packed_codes_give_the_same_losses(codes, tmp_path):
    for i, (views, label) in enumerate(zip(repetitive_codes(COUNT, 2, TOKENS, VOCAB), labels(), strict=True)):
        write_published(tmp_path / "flip", 16, i, views, label)
    for name, folder in (("packed", codes), ("published", tmp_path / "flip")):
        train(folder, tmp_path / name, "--epochs", 2)
    losses = [metrics(tmp_path / name, "loss") for name in ("packed", "published")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.fixture(scope="module")
def one_process(codes, tmp_path_factory):
    """Three epochs in one process, without accumulation: the losses of every layout."""
    folder = tmp_path_factory.mktemp("one")
    return {
        name: metrics(train(codes, folder / name, *EXACT, "--epochs", 3, *layout), "loss")
        for name, layout in (("raster", []), ("PAR", PAR))
    }


@pytest.mark.slow
def test_accumulation_gives_the_same_losses(codes, tmp_path, one_process):
    flags = ["--epochs", 3, "--gradient-accumulation-steps", 4, "--val-code-path", codes]
    train(codes, tmp_path, *EXACT, *flags)
    assert metrics(tmp_path, "loss") == pytest.approx(one_process["raster"], abs=1e-5)
    assert len(one_process["raster"]) == 9 and len(set(one_process["raster"].values())) == 9
    held_out = mean_loss(model_of(last(tmp_path)), open_codes(codes, 16, 4, random_view=False), 8, CPU)
    assert metrics(tmp_path, "val_loss") == {9: pytest.approx(held_out, abs=1e-5)}


def model_of(path, layout=()):
    from autoregressive.pipeline import load_gpt

    return load_gpt(path, gpt_model="GPT-XS", image_size=16, downsample_size=4)


def test_par_trains_another_model(one_process):
    raster, par = one_process["raster"], one_process["PAR"]
    assert par[1] == pytest.approx(math.log(VOCAB), rel=1e-6) and par[9] < par[1] - 0.1
    assert abs(par[9] - raster[9]) > 1e-3


@pytest.mark.slow
def test_starting_from_weights_and_from_a_whole_training_state(codes, tmp_path):
    train(codes, tmp_path / "first", "--epochs", 1, "--ema", "--ema-decay", 0.5)
    file = last(tmp_path / "first")
    before = file.read_bytes()

    train(codes, tmp_path / "whole", "--epochs", 2, "--ema", "--ema-decay", 0.5, "--gpt-ckpt", file)
    assert list(metrics(tmp_path / "whole", "loss")) == [4, 5, 6]
    train(codes, tmp_path / "first", "--epochs", 2, "--ema", "--ema-decay", 0.5, "--resume")
    continued, resumed = load(last(tmp_path / "whole")), load(last(tmp_path / "first"))
    for key in ("model", "ema", "optimizer", "steps"):
        assert same(continued[key], resumed[key]), key
    assert file.read_bytes() == before

    weights = tmp_path / "weights.pt"
    torch.save({"model": load(file)["model"]}, weights)
    train(codes, tmp_path / "new", "--epochs", 1, "--gpt-ckpt", weights, *EXACT, "--lr", 0)
    assert list(metrics(tmp_path / "new", "loss")) == [1, 2, 3]
    assert same(load(last(tmp_path / "new"))["model"], load(weights)["model"])
    assert load(last(tmp_path / "new"))["steps"] == 3


def test_the_saved_model_is_the_one_that_samples(codes, tmp_path):
    train(codes, tmp_path, "--max-steps", 4, *PAR)
    path = last(tmp_path)
    model = model_of(path)
    assert model.args.ar_token_num == 4 and model.args.vocab_size == VOCAB and model.args.num_classes == CLASSES
    assert read_checkpoint(path).args["downsample_size"] == 4


def test_drop_path_replaces_the_dropouts(codes, tmp_path):
    """Stochastic depth: the residual and feed-forward dropout are off, so --dropout-p does not matter."""
    for p in (0.0, 0.5):
        train(
            codes,
            tmp_path / str(p),
            "--max-steps",
            2,
            "--drop-path-rate",
            0.3,
            "--dropout-p",
            p,
            "--token-dropout-p",
            0,
        )
    assert same(load(last(tmp_path / "0.0"))["model"], load(last(tmp_path / "0.5"))["model"])
    train(codes, tmp_path / "none", "--max-steps", 2, *EXACT)
    assert not same(load(last(tmp_path / "none"))["model"], load(last(tmp_path / "0.0"))["model"])


def test_patches_of_a_run_that_max_steps_ends_go_over_to_single_tokens(codes, tmp_path):
    """--max-steps 6 of 40 epochs of 3 steps: three steps in patches, three of single tokens; resumed exactly."""
    flags = ["--patch-level", 2, "--epochs", 40, "--max-steps", 6, "--ckpt-every", 2, *EXACT]
    flags += ["--scheduler", "--warmup-epochs", 0, "--decay-ratio", 0.7, "--end-lr", 0]
    results = train(codes, tmp_path, *flags)
    rates = [metrics(results, "lr")[step] / 2e-3 for step in range(1, 7)]
    assert rates == pytest.approx([1, 2 / 2.1, 1 / 2.1] * 2)
    log = (run_folder(results) / "log.txt").read_text()
    assert "patches of 2x2 tokens to epoch 1, single tokens to epoch 2" in log
    whole = load(last(results))
    for step in (4, 6):
        (run_folder(results) / f"checkpoints/000000{step}.pt").unlink()
    train(codes, tmp_path, *flags, "--resume")
    assert same(load(last(results))["model"], whole["model"])


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "raster order, single tokens; PAR's own default is --ar-token-num 4"),
        (["--ar-token-num", 4], "layout parallel: 4 tokens a step"),
    ],
)
def test_log_tells_the_order_of_tokens(codes, tmp_path, words, said):
    results = train(codes, tmp_path, "--max-steps", 1, *words)
    assert said in (run_folder(results) / "log.txt").read_text()


@pytest.mark.slow
def test_pictures_while_it_trains(codes, tmp_path, small_files):
    flags = ["--code-path", codes, "--results-dir", tmp_path, *MODEL, *PLAIN, *EXACT, "--ema", "--no-wandb"]
    run_here(train_c2i, *flags, "--max-steps", 5, "--sample-every", 2, "--vq-ckpt", small_files.vq)
    pictures = sorted((run_folder(tmp_path) / "samples").iterdir())
    assert [path.name for path in pictures] == ["0000002.png", "0000004.png", "0000005.png"]
    assert Image.open(pictures[0]).size[0] >= 4 * 16
    losses = metrics(tmp_path, "loss")
    run_here(train_c2i, *flags[:3], tmp_path / "without", *flags[4:], "--max-steps", 5)
    assert metrics(tmp_path / "without", "loss") == losses, "drawing pictures changes nothing"


def test_pictures_with_another_tokenizer(codes, tmp_path, small_files):
    with pytest.raises(ValueError, match=r"vq\.pt has 64 codes of 4x4 pixels, not --vocab-size 128"):
        train(codes, tmp_path, "--vocab-size", 128, "--vq-ckpt", small_files.vq)


# What a user gets wrong


@pytest.fixture
def published(tmp_path):
    """Codes in the published layout, which records neither classes nor codebook: `write(label, largest code)`."""

    def write(label, code):
        array = repetitive_codes(4, 1, TOKENS, VOCAB)
        array[2, 0, 5] = code
        for i in range(4):
            write_published(tmp_path / "published", 16, i, array[i], label if i == 2 else 0)
        return tmp_path / "published"

    return write


@pytest.mark.parametrize(
    "more, message",
    [
        (["--num-classes", 9], r"packed has 10 classes, more than 9; pass --num-classes 10"),
        (["--vocab-size", 63], r"packed was made with 64 codes; pass --vocab-size 64"),
        (["--image-size", 64], r"have 16 tokens per image, which fits --image-size 16"),
        (["--image-size", 33], r"--image-size 33 is not a multiple of --downsample-size 4; try 32 or 36"),
        (["--image-size", 8, "--downsample-size", 2], r"packed holds codes of --image-size 16, not 8"),
        (["--global-batch-size", 15, "--gradient-accumulation-steps", 2], r"--global-batch-size 15 cannot be split"),
        (["--global-batch-size", 64], r"48 samples, fewer than --global-batch-size 64"),
        (["--gpt-type", "t2i"], r"train_t2i\.py"),
        (["--ar-token-num", 4, "--spe-token-num", 2], r"--ar-token-num 4 goes with --spe-token-num 3"),
        (["--ar-token-num", 9], r"cannot be cut into 3x3 regions"),
        (["--ar-token-num", 16], r"--ar-token-num 16 is all of the 4x4 tokens"),
        (["--cls-token-num", 2], r"--cls-token-num 2"),
        (["--dataset", "imagenette"], r"reads --dataset imagenet_code, got 'imagenette'"),
        (["--no-local-save"], r"--cloud-save-path"),
        (
            ["--condition-path", "depth=maps"],
            r"--condition-path gives depth=maps; this model takes no --condition-path",
        ),
        (["--device", "cuda:9"], r"--device cuda:9: no CUDA device"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_do_not_fit(codes, tmp_path, more, message):
    if "--device" in more and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=message):
        train(codes, tmp_path / "results", *more)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "label, code, message",
    [
        (CLASSES, 0, r"sample 2 of \S*published has label 10, not below --num-classes 10"),
        (-1, 0, r"sample 2 of \S*published has label -1"),
        (0, VOCAB, r"sample 2 of \S*published has codes from \d+ to 64, not below --vocab-size 64"),
        (0, -1, r"sample 2 of \S*published has codes from -1 to"),
    ],
)
def test_labels_and_codes_beyond_the_model(published, label, code, message):
    """A label of --num-classes would train the row that means "no class"."""
    folder = published(label, code)
    data = open_codes(folder, 16, 4)
    data.limit(CLASSES, VOCAB)
    assert len(data) == 4 and data[1]["label"] == 0
    with pytest.raises(ValueError, match=message):
        data[2]
    with pytest.raises(ValueError, match=message):
        data.__getitems__([0, 3, 2])
    folder = published(CLASSES - 1, VOCAB - 1)
    data = open_codes(folder, 16, 4)
    data.limit(CLASSES, VOCAB)
    assert [item["label"] for item in data.__getitems__(range(4))] == [0, 0, CLASSES - 1, 0]


def test_training_meets_a_label_beyond_the_model(published, tmp_path):
    flags = ["--global-batch-size", 4, "--num-workers", 1, "--max-steps", 1]
    with pytest.raises(ValueError, match=r"sample 2 of \S*published has label 10, not below --num-classes 10"):
        train(published(CLASSES, 0), tmp_path / "results", *flags)


@pytest.mark.slow
def test_held_out_codes_are_checked_under_their_own_name(codes, published, tmp_path):
    with pytest.raises(ValueError, match=r"published has label 10"):
        train(codes, tmp_path / "results", "--val-code-path", published(CLASSES, 0), "--max-steps", 1)
    assert not (tmp_path / "results").exists(), "before training begins"


def test_missing_and_incomplete_codes(codes, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: check --code-path"):
        train(tmp_path / "nowhere", tmp_path / "results")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no codes.*In it: nothing"):
        train(tmp_path / "empty", tmp_path / "results")
    array = repetitive_codes(COUNT, 2, TOKENS, VOCAB)
    folder = make_codes(tmp_path / "cut", array, labels(), image_size=16, vocab=VOCAB, classes=CLASSES)
    (folder / "shard-000001.json").unlink()
    with pytest.raises(ValueError, match=r"is incomplete: 2 of 3 shards"):
        train(folder, tmp_path / "results")


@pytest.mark.slow
def test_weights_that_do_not_fit(codes, tmp_path):
    train(codes, tmp_path / "first", "--max-steps", 1)
    with pytest.raises(
        ValueError, match="is of the layout raster, and this run of parallel: give --layout raster, or --finetune"
    ):
        train(codes, tmp_path / "second", "--gpt-ckpt", tmp_path / "first", *PAR)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(codes, tmp_path / "third", "--gpt-ckpt", tmp_path / "nowhere" / "0000001.pt")


# Flags

FLAGS = """
`--code-path` str = required; `--cloud-save-path` str = required; `--no-local-save` switch = –;
`--gpt-model` str ∈ [GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-XXXL, GPT-1B, GPT-3B, GPT-7B] = GPT-B;
`--gpt-ckpt` str = None; `--gpt-type` str ∈ [c2i, t2i] = c2i; `--vocab-size` int = 16384; `--ema` switch = –;
`--cls-token-num` int = 1; `--dropout-p` float = 0.1; `--token-dropout-p` float = 0.1; `--drop-path-rate` float = 0.0;
`--no-compile` switch = –; `--results-dir` str = results; `--dataset` str = imagenet_code;
`--image-size` int ∈ [256, 384, 448, 512] = 256; `--downsample-size` int ∈ [8, 16] = 16; `--num-classes` int = 1000;
`--epochs` int = 300; `--lr` float = 0.0001; `--weight-decay` float = 0.05; `--beta1` float = 0.9;
`--beta2` float = 0.95; `--max-grad-norm` float = 1.0; `--global-batch-size` int = 256; `--global-seed` int = 0;
`--num-workers` int = 24; `--log-every` int = 100; `--ckpt-every` int = 5000;
`--gradient-accumulation-steps` int = 1; `--mixed-precision` str ∈ [none, fp16, bf16] = bf16;
`--ar-token-num` int = 4; `--spe-token-num` int = 3; `--no-wandb` switch = –; `--wandb-project` str = None
"""


def test_published_flags():
    check_published_flags(train_c2i, FLAGS, ("--cloud-save-path", "--ar-token-num", "--spe-token-num"))
    args = train_c2i.flags().parse_args(["--code-path", "codes"])
    assert (args.cloud_save_path, args.ar_token_num, args.spe_token_num) == (None, None, None)


# What the files know


def test_code_path_is_a_whole_command(codes, tmp_path, monkeypatch):
    """Image size, downsampling, codebook and classes from the codes' record, and a batch that the 48 images fill."""
    monkeypatch.setitem(GPT_SIZES, "GPT-B", GPT_SIZES["GPT-XS"])  # the default's size
    few = ["--max-steps", 1, "--results-dir", tmp_path, "--num-workers", 0, "--mixed-precision", "none"]
    run_here(train_c2i, "--code-path", codes, *few)
    saved = vars(load(last(tmp_path))["args"])
    assert (saved["image_size"], saved["downsample_size"]) == (16, 4)
    assert (saved["vocab_size"], saved["num_classes"]) == (VOCAB, CLASSES)
    assert (saved["gpt_model"], saved["global_batch_size"]) == ("GPT-B", COUNT)
    assert {type(value) for value in saved.values()} <= {str, int, float, bool, list, type(None)}
    log = (run_folder(tmp_path) / "log.txt").read_text()
    assert "batches of 48 samples: there are 48, and --global-batch-size is not given" in log


@pytest.mark.parametrize(
    ("flag", "message"),
    [(["--image-size", 32], "16 tokens per image"), (["--downsample-size", 8], "16 tokens per image")],
)
def test_a_flag_that_the_codes_contradict_is_refused(codes, tmp_path, flag, message):
    with pytest.raises(ValueError, match=message):
        run_here(train_c2i, "--code-path", codes, "--results-dir", tmp_path, *flag)


def test_resumed_and_continued_runs_say_their_size_and_batch(codes, tmp_path):
    train(codes, tmp_path / "results", "--max-steps", 1)
    short = ["--code-path", codes, "--num-workers", 0, "--mixed-precision", "none", "--max-steps", 2]
    run_here(train_c2i, *short, "--results-dir", tmp_path / "results", "--resume")
    saved = load(last(tmp_path / "results"))
    assert (saved["steps"], saved["args"].gpt_model, saved["args"].global_batch_size) == (2, "GPT-XS", 16)
    tuned = [
        "--results-dir",
        tmp_path / "tuned",
        "--gpt-ckpt",
        tmp_path / "results",
        "--finetune",
        "--class-rows",
        "number",
    ]
    run_here(train_c2i, *short, *tuned)
    assert run_folder(tmp_path / "tuned").name == "000-GPT-XS"
