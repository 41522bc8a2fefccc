"""The training loop on a tiny model: numbers by hand, stopped and resumed runs, full disks, what it writes down."""

import json
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import TensorDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tests.training import load, metrics, run_folder, same
from utils.checkpoint import read_checkpoint
from utils.cli import flag_parser
from utils.distributed import Distributed
from utils.errors import AgreedError
from utils.rng import item_seed
from utils.training import state as state_module
from utils.training.flags import add_training_flags
from utils.training.job import Job, Micro, Phase
from utils.training.optim import adamw, learning_rate
from utils.training.order import BatchOrder
from utils.training.parallel import Parallel
from utils.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("quiet")

CPU = Distributed(torch.device("cpu"))


class Stopped(Exception):
    """What a killed process is here."""


def arguments(folder, *more):
    parser = flag_parser(None)
    add_training_flags(parser, epochs=2, batch=8, results_dir=str(folder / "results"), num_workers=0)
    plain = ["--mixed-precision", "none", "--log-every", 1, "--lr", 0.01]
    return parser.parse_args([str(word) for word in [*plain, *more]])


def data(size=40):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(size, 4, generator=generator), torch.randn(size, 3, generator=generator))


def network(dropout=0.0):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 3))


def squares(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def build(folder, *more, model=None, dropout=0.0, optimizer=adamw, at=None, dataset=None, dist=CPU, **kwargs):
    """A trainer with one phase. at: called with the Micro before each loss, to stop the run or fill the disk."""
    args = arguments(folder, *more)
    model = model or network(dropout)

    def loss(batch, place: Micro):
        if at:
            at(place)
        value = squares(model, batch)
        return value, {"loss": value}

    phases = kwargs.pop("phases", None) or [Phase("optimizer", model, optimizer(model, args), loss)]
    models = {"model": model, **kwargs.pop("models", {})}
    plan = Parallel(dist, precision=args.mixed_precision)
    return Trainer(args, plan, Job("tiny", models, phases, dataset or data(), **kwargs))


def stop_at(step, number=0):
    def at(place):
        if (place.step, place.number) == (step, number):
            raise Stopped

    return at


def store(folder, number=0):
    return run_folder(folder / "results", number) / "checkpoints"


def log_of(folder, number=0):
    return (run_folder(folder / "results", number) / "log.txt").read_text()


def final(folder, number=0):
    return load(max(store(folder, number).glob("*.pt")))


# Numbers by hand


def test_a_run_by_hand(tmp_path):
    """Plain gradient descent on the very batches of the data order, with the learning rate's warm-up."""

    def descent(model, args):
        return torch.optim.SGD(model.parameters(), lr=123.0)

    model = nn.Linear(4, 3)
    trainer = build(tmp_path, "--warmup-steps", 4, "--max-grad-norm", 0, "--epochs", 2, model=model, optimizer=descent)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    x, y = data().tensors
    trainer.fit()
    order, losses = trainer.order, []
    for step in range(10):
        order.start_at(*divmod(step, 5))
        batch = next(iter(order))
        error = x[batch] @ weight.T + bias - y[batch]  # (8, 3)
        losses.append(float(error.square().mean()))
        rate = 0.01 * min((step + 1) / 4, 1)
        weight -= rate * 2 * error.T @ x[batch] / 24
        bias -= rate * 2 * error.sum(0) / 24
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias.detach(), bias, rtol=1e-5, atol=1e-6)
    assert list(metrics(tmp_path / "results", "loss")) == list(range(1, 11))
    assert list(metrics(tmp_path / "results", "loss").values()) == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("parts", [4])
def test_accumulation_changes_nothing(tmp_path, parts):
    models = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, split in zip(models, (1, parts), strict=True):
        build(tmp_path / str(split), "--gradient-accumulation-steps", split, "--ema", model=model).fit()
    one, many = final(tmp_path / "1"), final(tmp_path / str(parts))
    for key in ("model", "ema"):
        for name in one[key]:
            torch.testing.assert_close(many[key][name], one[key][name], rtol=0, atol=1e-6)
    losses = [metrics(tmp_path / str(split) / "results", "loss") for split in (1, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 10


@pytest.mark.parametrize("precision", ["none", "fp16"])
def test_clipping_by_hand(tmp_path, precision):
    """The norm is over all gradients together, after accumulation; a smaller one is left alone. The log has it unclipped."""
    model = nn.Linear(4, 3)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    order = build(tmp_path / "order", model=model).order
    x, y = (tensor[next(iter(order))] for tensor in data().tensors)
    error = x @ start["weight"].T + start["bias"] - y
    by_hand = float(torch.cat([2 * error.T @ x / 24, 2 * error.sum(0)[:, None] / 24], dim=1).norm())
    assert by_hand > 0.5
    for limit, expected in ((0.5, 0.5), (1e6, None), (0, None)):
        model.load_state_dict(start)
        seen = []

        class Watched(torch.optim.SGD):
            def step(self, closure=None, seen=seen):
                gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
                seen.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

        folder = tmp_path / str(limit)
        build(
            folder,
            *(
                "--max-grad-norm",
                limit,
                "--max-steps",
                1,
                "--gradient-accumulation-steps",
                2,
                "--mixed-precision",
                precision,
            ),
            model=model,
            optimizer=lambda m, args: Watched(m.parameters(), lr=args.lr),
        ).fit()
        close = 1e-5 if precision == "none" else 1e-2
        assert seen == pytest.approx([expected or by_hand], rel=close)
        assert metrics(folder / "results", "grad_norm") == {1: pytest.approx(by_hand, rel=close)}


def test_learning_rates_by_hand():
    own = {"min_lr": 0.0, "warmup_from_zero": False, "lr_decay_start_epoch": 0.0}
    args = SimpleNamespace(lr=0.8, warmup_steps=4, lr_schedule="constant", **own)
    assert [learning_rate(args, step, 100) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    args = SimpleNamespace(lr=0.8, warmup_steps=0, lr_schedule="constant", **own)
    assert learning_rate(args, 0, 100) == 0.8
    args = SimpleNamespace(lr=0.8, warmup_steps=2, lr_schedule="cosine", **own)
    half = 0.8 * (1 + math.cos(math.pi / 4)) / 2
    assert [learning_rate(args, step, 10) for step in (0, 1, 2, 4, 6, 10, 11)] == pytest.approx(
        [0.4, 0.8, 0.8, half, 0.4, 0, 0]
    )
    args = SimpleNamespace(lr=1.0, warmup_steps=5, lr_schedule="cosine", **own | {"min_lr": 0.5})
    assert [learning_rate(args, step, total) for step, total in ((5, 5), (10, 10), (10, 15))] == [1, 0.5, 0.75]


@pytest.mark.parametrize(
    "epochs, total, ends",
    [
        (300, 300 * 7, [150 * 7, 200 * 7, 250 * 7]),
        (5, 35, [2 * 7, 3 * 7, 4 * 7]),
        (300, 100, [50, 66, 83]),
        (1, 7, [3, 4, 5]),
    ],
)
def test_learning_rate_of_steps_falls_at_published_epochs(epochs, total, ends):
    own = {"min_lr": 0.0, "warmup_from_zero": False, "lr_decay_start_epoch": 0.0}
    args = SimpleNamespace(lr=1e-4, warmup_steps=0, lr_schedule="steps", epochs=epochs, **own)
    rates = [learning_rate(args, step, total, 7) for step in range(total)]
    expected = [1e-4 * 0.2 ** sum(step >= end for end in ends) for step in range(total)]
    assert rates == pytest.approx(expected)


def test_the_rate_reaches_every_group_and_the_log(tmp_path):
    trainer = build(tmp_path, "--warmup-steps", 3, "--lr-schedule", "cosine", "--lr", 0.3, "--max-steps", 5)
    rates = []
    trainer.phases[0].optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    trainer.fit()
    expected = [0.1, 0.2, 0.3, 0.3, 0.15]
    assert [rate for rate, _ in rates] == pytest.approx(expected)
    assert all(len(set(groups)) == 1 for groups in rates)
    assert list(metrics(tmp_path / "results", "lr").values()) == pytest.approx(expected)


def test_decay_is_for_matrices_only(tmp_path):
    """With a gradient of zero AdamW moves a parameter by its decay alone."""
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Embedding(5, 2))
    model[2].bias.requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
    optimizer = adamw(model, arguments(tmp_path, "--lr", 0.5, "--weight-decay", 0.1, "--beta1", 0.8, "--beta2", 0.9))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9)] * 2
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():
        expected = 2.0 * (1 - 0.5 * 0.1) if p.dim() >= 2 else 2.0
        assert torch.allclose(p, torch.full_like(p, expected)), name
    assert not any(p is model[2].bias for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("flag, first", [("--ema-warmup", 0.1), ("--no-ema-warmup", 0.8)])
def test_the_average_follows_every_step(tmp_path, flag, first):
    model = network()
    trainer = build(tmp_path, "--ema", "--ema-decay", 0.8, flag, model=model)
    decay = [0.8] * 10 if first == 0.8 else [min(0.8, (1 + step) / (10 + step)) for step in range(10)]
    assert decay[0] == first
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = trainer._train_step

    def watched(batch):
        step(batch)
        for name, p in model.named_parameters():
            d = decay[trainer.step - 1]
            expected[name] = d * expected[name] + (1 - d) * p.detach()

    trainer._train_step = watched
    trainer.fit()
    saved = final(tmp_path)
    for name, p in expected.items():
        torch.testing.assert_close(saved["ema"][name], p, rtol=1e-5, atol=1e-6)
    assert torch.equal(saved["ema"]["1.running_mean"], saved["model"]["1.running_mean"])


def test_dropout_is_a_function_of_seed_rank_and_step(tmp_path):
    draws = {}
    for rank in (0, 1):
        for seed in (0, 1):
            drawn = draws[rank, seed] = []
            dist = replace(CPU, rank=rank)  # another process's seed, without another process
            trainer = build(tmp_path / f"{rank}{seed}", "--global-seed", seed, "--max-steps", 3)
            trainer.dist = dist
            trainer.phases[0].loss = lambda batch, place, drawn=drawn: (
                drawn.append(float(torch.rand(()))) or squares(trainer.models["model"], batch),  # noqa: B023
                {},
            )
            trainer.fit()
    for (rank, seed), drawn in draws.items():
        expected = [float(torch.rand((), generator=generator)) for generator in seeded(seed, rank)]
        assert drawn == expected
    assert len({tuple(d) for d in draws.values()}) == 4


def seeded(seed, rank):
    return [torch.Generator().manual_seed(item_seed(seed, rank, step)) for step in range(3)]


@pytest.mark.parametrize(
    "precision, dtype", [("none", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_precision_of_the_forward_pass(tmp_path, precision, dtype):
    model = network()
    seen = set()
    model[4].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    build(tmp_path, "--mixed-precision", precision, "--max-steps", 2, model=model).fit()
    assert seen == {dtype}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_rate_of_its_own_goes_by_batches_also_after_resuming_with_another_batch_size(tmp_path):
    asked = []

    def rate(done, an_epoch):
        asked.append((done, an_epoch))
        return 0.001 * (1 + done / an_epoch)

    build(tmp_path, "--epochs", 1, "--warmup-steps", 3, rate=rate).fit()  # 5 steps of 8
    build(tmp_path, "--epochs", 2, "--resume", "--global-batch-size", 20, rate=rate).fit()  # and 2 of 20
    assert asked == [*((done, 5) for done in range(5)), (2, 2), (3, 2)]
    rates = metrics(tmp_path / "results", "lr")
    assert rates == pytest.approx({1: 0.001, 2: 0.0012, 3: 0.0014, 4: 0.0016, 5: 0.0018, 6: 0.002, 7: 0.0025})


def test_a_loss_is_told_where_it_stands(tmp_path):
    places = []
    build(tmp_path, "--gradient-accumulation-steps", 2, at=places.append).fit()
    assert [(place.step, place.epoch, place.number) for place in places] == [
        (step, step // 5, number) for step in range(10) for number in (0, 1)
    ]
    assert {(place.number, place.positions.start, place.positions.stop) for place in places} == {(0, 0, 4), (1, 4, 8)}
    assert {place.global_batch for place in places} == {8}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_data_set_is_told_the_epoch(tmp_path, workers):
    """Before its first batch is read, also by loader processes that live on, and after resuming."""

    class Told(TensorDataset):
        epoch = torch.full((1,), -1).share_memory_()

        def set_epoch(self, epoch):
            self.epoch[0] = epoch

        def __getitem__(self, index):
            return (*super().__getitem__(index), int(self.epoch))

    seen = {}

    def watch(folder, *more):
        trainer = build(folder, "--num-workers", workers, *more, dataset=Told(*data().tensors))
        loss = trainer.phases[0].loss

        def watched(batch, place):
            seen[place.step] = batch[2].tolist()
            return loss(batch[:2], place)

        trainer.phases[0].loss = watched
        trainer.fit()

    watch(tmp_path, "--epochs", 2, "--max-steps", 7)
    watch(tmp_path, "--epochs", 3, "--resume")
    assert seen == {step: [step // 5] * 8 for step in range(15)}


# Stopping and resuming


@pytest.mark.parametrize("precision, parts", [("none", 1), ("bf16", 2), ("fp16", 1)])
def test_resuming_is_bit_identical(tmp_path, parts, precision):
    """Stopped in the middle of the second epoch, two steps after its last checkpoint, with dropout on."""
    flags = ["--epochs", 3, "--ema", "--ema-decay", 0.9, "--ckpt-every", 4, "--warmup-steps", 7, "--lr-schedule"]
    flags += ["cosine", "--gradient-accumulation-steps", parts, "--mixed-precision", precision]
    build(tmp_path / "whole", *flags, dropout=0.5).fit()
    with pytest.raises(Stopped):
        build(tmp_path / "parts", *flags, dropout=0.5, at=stop_at(10, parts - 1)).fit()
    assert sorted(os.listdir(store(tmp_path / "parts"))) == ["0000004.pt", "0000008.pt"]
    torch.manual_seed(99)  # whatever state the generator has in the new process
    build(tmp_path / "parts", *flags, "--resume", dropout=0.5).fit()
    whole, parts_ = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.pop("args") and parts_.pop("args")
    assert whole["steps"] == 15 and whole["trainer"]["samples_seen"] == 120
    assert same(whole, parts_)
    losses = [metrics(tmp_path / name / "results", "loss") for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 15
    assert "resuming" in log_of(tmp_path / "parts") and "step 8" in log_of(tmp_path / "parts")


def test_resuming_at_the_end_of_an_epoch(tmp_path):
    flags = ["--epochs", 2, "--ckpt-every", 5]
    build(tmp_path / "whole", *flags).fit()
    with pytest.raises(Stopped):
        build(tmp_path / "parts", *flags, at=stop_at(5)).fit()
    build(tmp_path / "parts", *flags, "--resume").fit()
    assert same(final(tmp_path / "whole")["model"], final(tmp_path / "parts")["model"])


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_newest_checkpoint_is_reported_and_passed_over(tmp_path, damage):
    flags = ["--ckpt-every", 3, "--epochs", 2]
    build(tmp_path / "whole", *flags).fit()
    with pytest.raises(Stopped):
        build(tmp_path / "parts", *flags, at=stop_at(8)).fit()
    newest = store(tmp_path / "parts") / "0000006.pt"
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        weights = load(newest)["model"]["0.weight"].numpy().tobytes()
        content[content.find(weights) + 5] ^= 0xFF
    newest.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    build(tmp_path / "parts", *flags, "--resume").fit()
    text = log_of(tmp_path / "parts")
    assert re.search(r"0000006\.pt is damaged.* Trying the checkpoint before it", text)
    assert "at step 3 from" in text
    assert same(final(tmp_path / "whole")["model"], final(tmp_path / "parts")["model"])


def test_no_checkpoint_can_be_read(tmp_path):
    build(tmp_path, "--max-steps", 2).fit()
    (store(tmp_path) / "0000002.pt").write_bytes(b"PK not really")
    with pytest.raises(ValueError, match=r"no checkpoint of .*000-tiny can be read"):
        build(tmp_path, "--max-steps", 2, "--resume")


def test_resuming_before_the_first_checkpoint(tmp_path):
    with pytest.raises(Stopped):
        build(tmp_path, at=stop_at(3)).fit()
    build(tmp_path, "--resume").fit()
    assert "no checkpoint yet" in log_of(tmp_path)
    build(tmp_path / "whole").fit()
    assert same(final(tmp_path)["model"], final(tmp_path / "whole")["model"])


def test_a_run_that_could_be_resumed_is_told_of(tmp_path):
    """The same command without --resume starts anew, as the published scripts do."""
    with pytest.raises(Stopped):
        build(tmp_path, "--ckpt-every", 3, at=stop_at(5)).fit()
    build(tmp_path, "--max-steps", 1).fit()
    text = log_of(tmp_path, 1)
    assert re.search(
        r"a run before this one stands at \S*000-tiny/checkpoints/0000003\.pt; --resume would continue", text
    )
    assert "stands at" not in log_of(tmp_path, 0)


def test_a_finished_run_does_nothing(tmp_path):
    build(tmp_path).fit()
    file = store(tmp_path) / "0000010.pt"
    before, lines = file.stat().st_mtime_ns, len(metrics(tmp_path / "results"))
    assert build(tmp_path, "--resume", at=stop_at(10)).fit() == file
    assert file.stat().st_mtime_ns == before and len(metrics(tmp_path / "results")) == lines
    assert "nothing left to do: step 10 of 10" in log_of(tmp_path)
    build(tmp_path, "--resume", "--epochs", 3).fit()
    assert final(tmp_path)["steps"] == 15


def test_resuming_with_another_batch_size_still_ends_with_the_epochs(tmp_path):
    build(tmp_path, "--epochs", 1).fit()  # 5 steps of 8
    build(tmp_path, "--epochs", 2, "--resume", "--global-batch-size", 20).fit()  # and 2 of 20
    assert final(tmp_path)["steps"] == 7 and final(tmp_path)["trainer"]["samples_seen"] == 80


@pytest.mark.parametrize("began", ["--no-ema-warmup", "before the flag"])
def test_resume_of_averages_with_a_fixed_decay_keeps_it(tmp_path, began):
    fixed = ["--ema", "--ema-decay", 0.9, "--no-ema-warmup", "--ckpt-every", 5]
    build(tmp_path / "whole", *fixed).fit()
    build(tmp_path / "parts", *fixed, "--max-steps", 5).fit()
    if began != "--no-ema-warmup":  # as a file of the first edition, whose flags have no word of it
        path = store(tmp_path / "parts") / "0000005.pt"
        saved = load(path)
        del saved["args"].ema_warmup
        torch.save(saved, path)
    for _ in range(2):  # a second resume finds it in the files of the first
        build(tmp_path / "parts", "--ema", "--ema-decay", 0.9, "--ckpt-every", 2, "--max-steps", 7, "--resume").fit()
        assert "keep the fixed decay 0.9" in log_of(tmp_path / "parts")
    build(tmp_path / "parts", "--ema", "--ema-decay", 0.9, "--resume").fit()
    assert same(final(tmp_path / "parts")["ema"], final(tmp_path / "whole")["ema"])


def test_starting_from_weights_and_from_a_whole_state(tmp_path):
    build(tmp_path / "first", "--max-steps", 3, "--ema", "--ema-decay", 0.5).fit()
    whole = read_checkpoint(store(tmp_path / "first") / "0000003.pt")
    trainer = build(tmp_path / "second", "--ema", model=network(0.1), initial=whole)
    assert trainer.step == 3 and trainer.state.samples_seen == 24
    assert same(dict(trainer.models["model"].state_dict()), whole.model)
    assert same(dict(trainer.ema.state_dict()), whole.ema)
    assert trainer.phases[0].optimizer.state_dict()["state"][0]["step"] == 3
    assert "starting from" in log_of(tmp_path / "second") and ", step 3" in log_of(tmp_path / "second")
    trainer.fit()
    assert final(tmp_path / "second")["steps"] == 10

    weights = read_checkpoint(store(tmp_path / "first") / "0000003.pt")
    weights.optimizer, weights.extra, weights.ema = None, {}, None
    trainer = build(tmp_path / "third", "--ema", initial=weights)
    assert trainer.step == 0 and trainer.state.samples_seen == 0
    assert same(dict(trainer.models["model"].state_dict()), whole.model)
    assert same(dict(trainer.ema.state_dict()), whole.model)
    assert not trainer.phases[0].optimizer.state_dict()["state"]


def test_the_weights_to_start_from_count_also_after_an_early_stop(tmp_path):
    build(tmp_path / "first", "--max-steps", 3).fit()
    weights = read_checkpoint(store(tmp_path / "first") / "0000003.pt")
    weights.optimizer = None
    with pytest.raises(Stopped):
        build(tmp_path / "second", initial=weights, at=stop_at(2)).fit()
    trainer = build(tmp_path / "second", "--resume", initial=weights)
    assert same(dict(trainer.models["model"].state_dict()), weights.model)


def test_a_checkpoint_of_another_model(tmp_path):
    build(tmp_path, "--max-steps", 1).fit()
    with pytest.raises(ValueError, match=r"0000001\.pt does not fit the model"):
        build(tmp_path, "--resume", model=nn.Linear(4, 3))


# Asked to stop


SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]


def send(number, step=4, times=1):
    """Signals this process in the middle of a step."""

    def at(place):
        if place.step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return at


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_and_the_resumed_run_ends_bit_identically(tmp_path, number):
    flags = ["--ema", "--ema-decay", 0.9, "--warmup-steps", 7, "--ckpt-every", 3, "--log-every", 5]
    build(tmp_path / "whole", *flags, dropout=0.5).fit()
    before = [signal.getsignal(each) for each in SIGNALS]
    trainer = build(tmp_path / "parts", *flags, dropout=0.5, at=send(number))
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    else:
        assert trainer.fit() == store(tmp_path / "parts") / "0000005.pt"
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert sorted(os.listdir(store(tmp_path / "parts"))) == ["0000003.pt", "0000005.pt"]
    stopped = f"stopped by {number.name} after step 5 of 10; --resume continues from there"
    assert log_of(tmp_path / "parts").rstrip().endswith(stopped)
    build(tmp_path / "parts", *flags, "--resume", dropout=0.5).fit()
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert whole.pop("args") and parts.pop("args") and whole["steps"] == 10
    assert same(whole, parts)


def test_a_signal_at_the_last_step_is_the_end_of_the_run(tmp_path):
    assert build(tmp_path, at=send(signal.SIGTERM, step=9)).fit().name == "0000010.pt"
    assert "stopped by" not in log_of(tmp_path) and log_of(tmp_path).rstrip().endswith("done")


def test_loader_processes_that_get_the_signal_too_let_the_run_save(tmp_path):
    """A terminal's Ctrl-C reaches every process of its group, and torchrun signals a run's group."""

    def at(place):
        if place.step == 4:
            worker = max(multiprocessing.active_children(), key=lambda child: child.pid)
            os.kill(worker.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # in which the loader would tell of a worker's death

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, "--num-workers", 1, at=at).fit()
    assert os.listdir(store(tmp_path)) == ["0000005.pt"]


def test_a_lost_process_is_told_with_the_way_to_go_on(tmp_path):
    def lost(place):
        if place.step == 4:
            trainer.failures.dist = replace(CPU, world_size=2)  # as far as the error's handling goes
            raise RuntimeError("[/build/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:5023")

    trainer = build(tmp_path, "--ckpt-every", 3, at=lost)
    with pytest.raises(
        ConnectionError, match=r"process 0 lost the others at step 4 \(.*closed by peer.*--resume .*0000003\.pt"
    ):
        trainer.fit()

    def mistake(place):
        other.failures.dist = replace(CPU, world_size=2)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    other = build(tmp_path / "other", at=mistake)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        other.fit()


# Runs that fail in the middle


class Broken(TensorDataset):
    """Data of which one item cannot be read until it is mended."""

    def __init__(self, index, error):
        super().__init__(*data(80).tensors)
        self.index, self.error = index, error

    def __getitem__(self, index):
        if index == self.index:
            raise self.error
        return super().__getitem__(index)


def item_of_step(folder, step):
    """The number of a sample of that step."""
    return build(folder / "order", dataset=data(80)).order.samples(0, step)[0]


@pytest.mark.parametrize(
    "workers, error", [(0, ValueError("shard 3 is damaged")), (1, OSError(5, "Input/output error"))], ids=["0", "1"]
)
def test_fit_unreadable_item_saves_the_state_and_resumes_bit_identically(tmp_path, workers, error):
    flags = ["--num-workers", workers, "--ema", "--epochs", 1]
    build(tmp_path / "whole", *flags, dataset=data(80)).fit()
    damaged = Broken(item_of_step(tmp_path, 6), error)
    with pytest.raises(AgreedError, match=r"after step 5: .*(damaged|Input/output).*--resume .*0000005\.pt"):
        build(tmp_path, *flags, dataset=damaged).fit()
    assert os.listdir(store(tmp_path)) == ["0000005.pt"]
    assert "ended at step 5" in log_of(tmp_path) and "Traceback" not in log_of(tmp_path)
    build(tmp_path, *flags, "--resume", dataset=data(80)).fit()
    whole, resumed = final(tmp_path / "whole"), final(tmp_path)
    assert whole.pop("args") and resumed.pop("args") and same(whole, resumed)


def test_fit_mistake_in_a_data_set_saves_the_state_and_keeps_its_traceback(tmp_path):
    with pytest.raises(KeyError, match="colour"):
        build(tmp_path, dataset=Broken(item_of_step(tmp_path, 6), KeyError("colour"))).fit()
    assert os.listdir(store(tmp_path)) == ["0000005.pt"] and "KeyError" in log_of(tmp_path)


@pytest.mark.parametrize("step", [0, 2])
def test_fit_unreadable_first_items_end_the_run_at_once(tmp_path, step):
    with pytest.raises(AgreedError, match=r"shard 3 is damaged"):
        build(tmp_path, dataset=Broken(item_of_step(tmp_path, step), ValueError("shard 3 is damaged"))).fit()
    assert len(list(store(tmp_path).glob("*"))) == (step == 2)


def test_fit_killed_loader_process_saves_the_state_and_resumes_bit_identically(tmp_path, monkeypatch):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))

    def at(place):
        if place.step == 3:
            worker = max(multiprocessing.active_children(), key=lambda child: child.pid)
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()  # in the middle of a step, which has to be finished all the same

    flags = ["--num-workers", 1, "--epochs", 8, "--ema"]
    with pytest.raises(AgreedError, match=r"loader process .*memory.*--resume .*\.pt"):
        build(tmp_path, *flags, at=at).fit()
    assert "memory" in log_of(tmp_path)
    build(tmp_path, *flags, "--resume").fit()
    build(tmp_path / "whole", *flags).fit()
    whole, resumed = final(tmp_path / "whole"), final(tmp_path)
    assert whole.pop("args") and resumed.pop("args") and same(whole, resumed)


def test_fit_failing_pictures_are_a_warning_after_the_checkpoint(tmp_path):
    saved = []

    def sample(model):
        trainer.saver.wait()
        saved.append(sorted(os.listdir(store(tmp_path))))
        raise RuntimeError("cuBLAS failed")

    trainer = build(tmp_path, "--ckpt-every", 4, "--ema", sample=sample)
    trainer.fit()
    assert saved == [["0000004.pt"], ["0000004.pt", "0000008.pt"], ["0000004.pt", "0000008.pt", "0000010.pt"]]
    assert log_of(tmp_path).count("no pictures: cuBLAS failed") == 3 and trainer.models["model"].training
    build(tmp_path / "without", "--ckpt-every", 4, "--ema").fit()
    assert same(final(tmp_path)["model"], final(tmp_path / "without")["model"])


def test_fit_failing_validation_ends_the_run_after_the_checkpoint(tmp_path):
    def validate(model):
        raise ValueError("shard-000001.npy is damaged")

    with pytest.raises(AgreedError, match=r"held-out loss failed after step 4.*damaged.*--resume .*0000004\.pt"):
        build(tmp_path, "--ckpt-every", 4, "--ema", validate=validate).fit()
    assert os.listdir(store(tmp_path)) == ["0000004.pt"]
    build(tmp_path, "--ckpt-every", 4, "--ema", "--resume").fit()
    build(tmp_path / "without", "--ema").fit()
    assert same(final(tmp_path)["ema"], final(tmp_path / "without")["ema"])


# Files


def test_what_a_checkpoint_holds(tmp_path):
    build(tmp_path, "--ema", "--max-steps", 2).fit()
    saved = final(tmp_path)
    assert saved.keys() == {"model", "ema", "optimizer", "steps", "args", "config", "trainer"}
    assert saved["args"].global_batch_size == 8 and saved["steps"] == 2
    read = read_checkpoint(store(tmp_path) / "0000002.pt")
    assert read.format == "ddp" and read.steps == 2 and read.args["ema"] is True


def test_both_stores_are_written(tmp_path):
    build(tmp_path, "--cloud-save-path", tmp_path / "cloud", "--ckpt-every", 4, "--keep-last", 2).fit()
    (cloud,) = (tmp_path / "cloud").glob("*/000-tiny/checkpoints")
    for folder in (store(tmp_path), cloud):
        assert sorted(os.listdir(folder)) == ["0000008.pt", "0000010.pt"]
    assert (store(tmp_path) / "0000010.pt").read_bytes() == (cloud / "0000010.pt").read_bytes()


class Disk:
    """Full from the loss of one step to that of another: no file grows beyond what a checkpoint needs.

    What is being written when that changes is finished before.
    """

    def __init__(self, full, free=None):
        self.full, self.free, self.trainer = full, free, None
        self.soft, self.hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def __call__(self, place):
        if place.step in (self.full, self.free):
            self.trainer.saver.wait()
        if place.step == self.full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, self.hard))
        if place.step == self.free:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.soft, self.hard))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.soft, self.hard))


def test_a_full_disk_in_the_middle_is_lived_through(tmp_path):
    flags = ["--ckpt-every", 3, "--keep-last", 1, "--log-every", 5]
    meanwhile = []
    with Disk(full=5, free=8) as disk:

        def at(place):
            disk(place)
            if place.step == 7:
                trainer.saver.wait()
                meanwhile.extend(os.listdir(store(tmp_path)))

        trainer = disk.trainer = build(tmp_path, *flags, at=at)
        trainer.fit()
    assert meanwhile == ["0000003.pt"], "the last good checkpoint stays where the next cannot be written"
    assert os.listdir(store(tmp_path)) == ["0000010.pt"]
    text = log_of(tmp_path)
    assert re.search(
        r"could not write \S*0000006\.pt \(.*\); training continues, the next checkpoint tries again", text
    )
    build(tmp_path / "whole", *flags).fit()
    assert same(final(tmp_path)["model"], final(tmp_path / "whole")["model"])


def test_fit_checkpoints_that_fail_in_a_row_say_what_would_be_lost(tmp_path):
    with Disk(full=3, free=8) as disk:
        trainer = disk.trainer = build(tmp_path, "--ckpt-every", 2, "--log-every", 10, at=disk)
        trainer.fit()
    told = re.findall(r"nothing could be saved (\d) times in a row: .* since \S*0000002\.pt", log_of(tmp_path))
    assert told == ["2", "3"] and final(tmp_path)["steps"] == 10


def test_a_full_disk_at_the_end_is_an_error(tmp_path):
    with Disk(full=7) as disk:
        trainer = disk.trainer = build(tmp_path, "--ckpt-every", 6, "--log-every", 5, at=disk)
        with pytest.raises(OSError, match=r"could not write \S*0000010\.pt"):
            trainer.fit()
    assert os.listdir(store(tmp_path)) == ["0000006.pt"]
    build(tmp_path, "--resume").fit()
    assert final(tmp_path)["steps"] == 10


def test_one_full_store_does_not_keep_the_other_from_the_last_checkpoint(tmp_path):
    trainer = build(tmp_path, "--cloud-save-path", tmp_path / "cloud", "--max-steps", 2)
    store(tmp_path).symlink_to("/dev/null")  # a place where nothing can be written
    with pytest.raises(OSError, match=r"results\S*0000002\.pt"):
        trainer.fit()
    assert [path.name for path in (tmp_path / "cloud").rglob("*.pt")] == ["0000002.pt"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """It has the weights of its step. Only one is in memory at a time: the next save waits for the one before."""
    model, begun, free, told, weights = network(), threading.Event(), threading.Event(), [], {}
    write = state_module.save_checkpoint

    def slow(path, content):
        told.append(f"begin {path.name}")
        begun.set()
        assert free.wait(120)
        write(path, content)
        told.append(f"end {path.name}")

    def at(place):
        weights[place.step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if place.step == 3:
            assert begun.wait(120)
            told.append("step 3")
            threading.Timer(0.1, free.set).start()

    monkeypatch.setattr(state_module, "save_checkpoint", slow)
    trainer = build(tmp_path, "--ckpt-every", 2, "--max-steps", 6, "--log-every", 6, model=model, at=at)
    copy = trainer.state.file_content
    trainer.state.file_content = lambda args: told.append(f"copy {trainer.step}") or copy(args)
    trainer.fit()
    assert told[:6] == ["copy 2", "begin 0000002.pt", "step 3", "end 0000002.pt", "copy 4", "begin 0000004.pt"]
    for step in (2, 4):
        saved = load(store(tmp_path) / f"{step:07d}.pt")
        assert saved["steps"] == step and same(saved["model"], weights[step])
        assert saved["optimizer"]["state"][0]["step"] == step
    assert not same(weights[2], weights[4])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_records_that_cannot_be_written_do_not_end_the_run(tmp_path):
    trainer = build(tmp_path)
    trainer.log.metrics.close()
    trainer.log.metrics = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    board = trainer.log.board.file_writer.event_writer._general_file_writer
    board.write = board.flush = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    trainer.fit()
    assert final(tmp_path)["steps"] == 10
    assert "could not write to the run's records" in log_of(tmp_path)


# What is no longer a number


def poison(model, step, number=0):
    def at(place):
        if (place.step, place.number) == (step, number):
            with torch.no_grad():
                model[0].weight[0, 0] = float("nan")

    return at


def samples(batch, *, size=40, global_batch=8, parts=1, part=0):
    """The samples of a part of a batch of the first epoch, as a message lists them."""
    order = BatchOrder(size, global_batch, parts, 0, 1, 0)
    return list(order)[batch * parts + part]


def listed(message):
    return [int(word) for word in re.search(r"Samples there: ([\d, ]+)", message)[1].rstrip(", ").split(", ")]


@pytest.mark.parametrize("parts, part", [(1, 0), (2, 1)])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, parts, part):
    """The step is that of the log's lines; the samples are those of the part of the batch."""
    model = network()
    flags = ["--ckpt-every", 3, "--gradient-accumulation-steps", parts]
    trainer = build(tmp_path, *flags, model=model, at=poison(model, 4, part))
    with pytest.raises(AgreedError) as caught:
        trainer.fit()
    message, kept = str(caught.value), store(tmp_path) / "0000003.pt"
    where = "on process 0" + (f", part {part + 1} of {parts} of its batch" if parts > 1 else "")
    assert message.startswith(f"the loss became nan at step 5 {where}; it is no longer finite, and nothing of it was ")
    assert listed(message) == samples(4, parts=parts, part=part)
    assert message.endswith(f". The last checkpoint is {kept}. Try a lower --lr, or --mixed-precision none")
    assert os.listdir(store(tmp_path)) == [kept.name]
    assert list(metrics(tmp_path / "results", "loss")) == [1, 2, 3, 4]


def test_a_spoilt_model_never_replaces_a_good_checkpoint(tmp_path):
    model = network()
    flags = ["--ckpt-every", 2, "--log-every", 100, "--keep-last", 1]
    with pytest.raises(AgreedError, match=r"the loss became nan at step 5 .*The last checkpoint is \S*0000004\.pt\."):
        build(tmp_path, *flags, model=model, at=poison(model, 4)).fit()
    assert torch.isfinite(final(tmp_path)["model"]["0.weight"]).all()


def spoil(trainer, model, step):
    """Weights that are no numbers after a step whose loss and gradient were."""
    trainer.phases[0].optimizer.register_step_post_hook(
        lambda *_: model[0].weight.data.fill_(float("inf")) if trainer.step == step else None
    )


def test_weights_spoilt_by_a_step_whose_loss_was_finite(tmp_path):
    """Before a checkpoint they are looked at; in between the next loss tells."""
    told = {
        3: r"the weights are no longer finite after step 4, and were not saved\. There is no checkpoint yet\. .*--lr",
        4: r"the loss became nan at step 6 on process 0; .*The last checkpoint is \S*0000004\.pt\.",
    }
    for step, message in told.items():
        model, folder = network(), tmp_path / str(step)
        trainer = build(folder, "--ckpt-every", 4, "--log-every", 100, "--max-steps", 6, model=model)
        spoil(trainer, model, step)
        with pytest.raises(AgreedError, match=message):
            trainer.fit()


def test_spoilt_weights_are_not_saved_at_a_signal_either(tmp_path):
    model = network()
    trainer = build(tmp_path, "--log-every", 100, model=model, at=send(signal.SIGTERM))
    spoil(trainer, model, 4)
    with pytest.raises(AgreedError, match="the weights are no longer finite after step 5"):
        trainer.fit()
    assert not store(tmp_path).exists()


def steep_at(step, model, loss):
    """A loss that is finite and has an infinite gradient at a step."""

    def steep(batch, place):
        value, logs = loss(batch, place)
        weight = model[0].weight[0, 0]
        return value + ((weight - weight.detach()).sqrt() if place.step == step else 0), logs

    return steep


def test_an_infinite_gradient_of_a_finite_loss_ends_the_run(tmp_path):
    model = network()
    trainer = build(tmp_path, "--gradient-accumulation-steps", 2, model=model)
    trainer.phases[0].loss = steep_at(3, model, trainer.phases[0].loss)
    with pytest.raises(AgreedError, match="the gradient norm became inf at step 4; it is no longer finite") as caught:
        trainer.fit()
    assert listed(str(caught.value)) == samples(3)
    assert not store(tmp_path).exists()


# Logs


FIGURES = {"loss", "grad_norm", "lr", "steps_per_second", "images_per_second", "data_wait", "peak_memory_gib"}


def test_the_records_of_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.training.run_log.SECONDS_A_LINE", 1e6)
    picture = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    build(
        tmp_path,
        *("--log-every", 3, "--ckpt-every", 4),
        sample=lambda model: {"grid": picture},
        validate=lambda model: {"val_loss": 0.5},
        tokens=16,
        flops=lambda step, epoch: 1e9,  # a CPU's peak is not known, and so no share of it is
    ).fit()
    folder = run_folder(tmp_path / "results")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "val_loss" in line) for line in lines] == [
        *((3, False), (4, True), (6, False), (8, True), (9, False), (10, False), (10, True))
    ]
    assert set(lines[0]) == {"step", *FIGURES, "tokens_per_second"}
    for line in lines:
        if "loss" in line:
            assert line["steps_per_second"] > 0 and line["grad_norm"] > 0 and 0 <= line["data_wait"] <= 1
            assert line["images_per_second"] == pytest.approx(8 * line["steps_per_second"])
            assert line["tokens_per_second"] == pytest.approx(16 * line["images_per_second"])
            assert 0.01 < line["peak_memory_gib"] < 100

    text = (folder / "log.txt").read_text()
    assert "83 parameters, 40 samples, 5 steps an epoch, 10 steps, 1 process(es) on cpu (ddp, none: " in text
    line = (
        r"\(step=(\d{7})\) Train Loss: \d\.\d{4}, Train Steps/Sec: [\d.]+, step \d+ of 10, epoch [12] of 2, (?:[\w ,]+ left, )?grad_norm: \d\.\d{4}, lr: 0\.01, images/sec: [\d,]+, "
        r"tokens/sec: [\d,]+, data wait: \d+%, memory: \d+\.\d\d GiB\n"
    )
    assert re.findall(line, text) == ["0000003", "0000006", "0000009", "0000010"]
    assert "step 3 of 10, epoch 1 of 2, " in text and "step 6 of 10, epoch 2 of 2, " in text
    printed = re.findall(r"\(step=(\d{7})\) Train Loss", capsys.readouterr().out)
    assert printed == ["0000003", "0000010"]  # quick steps: the terminal has the first and the last
    assert text.count("val_loss: 0.5000") == 3 and text.count("saved ") == 3 and text.rstrip().endswith("done")

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*FIGURES, "tokens_per_second", "val_loss"}
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [
        (line["step"], line["loss"]) for line in lines if "loss" in line
    ]
    images = events.Images("grid")
    assert [(e.step, e.width, e.height) for e in images] == [(4, 6, 5), (8, 6, 5), (10, 6, 5)]
    assert sorted(os.listdir(folder / "grid")) == ["0000004.png", "0000008.png", "0000010.png"]
    assert np.array_equal(Image.open(folder / "grid" / "0000008.png"), picture)


def test_pictures_at_steps_of_their_own(tmp_path):
    """Drawn with the averaged weights of the step, in evaluation mode; figures and checkpoints keep to theirs."""
    model, seen = network(0.5), {}

    def sample(drawn_with):
        assert not drawn_with.training and not torch.is_grad_enabled()
        torch.manual_seed(5)  # training's draws are its own
        seen[trainer.step] = drawn_with[0].weight.detach().clone()
        return {"grid": np.full((2, 3, 3), trainer.step, np.uint8)}

    flags = ["--sample-every", 3, "--ckpt-every", 4, "--ema", "--ema-decay", 0.5]
    trainer = build(tmp_path, *flags, model=model, sample=sample, validate=lambda model: {"val_loss": 0.5})
    trainer.fit()
    folder = run_folder(tmp_path / "results")
    assert sorted(os.listdir(folder / "grid")) == [f"{step:07d}.png" for step in (3, 6, 9, 10)]
    assert all(np.asarray(Image.open(folder / "grid" / f"{step:07d}.png")).max() == step for step in (3, 6, 9, 10))
    assert list(metrics(tmp_path / "results", "val_loss")) == [4, 8, 10]
    assert sorted(os.listdir(store(tmp_path))) == [f"{step:07d}.pt" for step in (4, 8, 10)]
    assert torch.equal(seen[10], final(tmp_path)["ema"]["0.weight"]) and model.training
    build(tmp_path / "without", *flags, dropout=0.5).fit()
    assert same(final(tmp_path)["model"], final(tmp_path / "without")["model"])


def test_a_line_is_the_mean_since_the_one_before(tmp_path):
    for every in (1, 4):
        build(tmp_path / str(every), "--log-every", every).fit()
    each = metrics(tmp_path / "1" / "results", "loss")
    assert metrics(tmp_path / "4" / "results", "loss") == pytest.approx(
        {
            4: np.mean([each[s] for s in (1, 2, 3, 4)]),
            8: np.mean([each[s] for s in (5, 6, 7, 8)]),
            10: (each[9] + each[10]) / 2,
        }
    )


def test_validation_sees_the_averaged_model_and_disturbs_nothing(tmp_path):
    seen = []

    def validate(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.manual_seed(123)
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"val_loss": 1.0}

    flags = ["--ckpt-every", 4, "--ema", "--ema-decay", 0.9]
    build(tmp_path / "with", *flags, dropout=0.5, validate=validate).fit()
    build(tmp_path / "without", *flags, dropout=0.5).fit()
    with_, without = final(tmp_path / "with"), final(tmp_path / "without")
    assert same(with_["model"], without["model"]) and same(with_["optimizer"], without["optimizer"])
    assert len(seen) == 3
    for state, name in zip(seen, ("0000004", "0000008", "0000010"), strict=True):
        assert same(state, load(store(tmp_path / "with") / f"{name}.pt")["ema"])
    model = network()
    build(tmp_path / "plain", "--max-steps", 1, model=model, validate=lambda m: {"own": float(m is model)}).fit()
    assert metrics(tmp_path / "plain" / "results", "own") == {1: 1.0} and model.training


def test_unreadable_files_are_counted_at_the_end(tmp_path):
    class Holes(TensorDataset):
        skipped_indices = [3, 5, 8]

    build(tmp_path, "--max-steps", 1, dataset=Holes(*data().tensors)).fit()
    assert "3 unreadable files were skipped" in log_of(tmp_path)


def test_the_log_is_closed_whatever_happens(tmp_path):
    trainer = build(tmp_path, at=stop_at(2))
    with pytest.raises(Stopped):
        trainer.fit()
    events = EventAccumulator(str(run_folder(tmp_path / "results") / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert trainer.log.file not in trainer.log.logger.handlers


def test_weights_and_biases(tmp_path, monkeypatch):
    calls = []
    client = SimpleNamespace(
        init=lambda **kwargs: (
            calls.append(("init", kwargs["project"], kwargs["name"], kwargs["config"]["lr"])) or client
        ),
        log=lambda values, step: calls.append(("log", step, sorted(values))),
        finish=lambda: calls.append(("finish",)),
        Image=lambda image: image.shape,
    )
    monkeypatch.setitem(sys.modules, "wandb", client)
    pictures = {"sample": lambda model: {"grid": np.zeros((2, 3, 3), np.uint8)}}
    build(tmp_path / "on", "--wandb-project", "mine", "--max-steps", 2, **pictures).fit()
    logged = sorted(FIGURES)
    steps = [("log", 1, logged), ("log", 2, logged), ("log", 2, ["grid"])]
    assert calls == [("init", "mine", "000-tiny", 0.01), *steps, ("finish",)]
    calls.clear()
    build(tmp_path / "off", "--wandb-project", "mine", "--no-wandb", "--max-steps", 1).fit()
    build(tmp_path / "none", "--max-steps", 1).fit()
    assert calls == []


def test_weights_and_biases_is_never_required(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise ConnectionError("no network")

    reasons = {"missing": (None, r"pip install wandb"), "refused": (refuse, "ConnectionError: no network")}
    for name, (init, reason) in reasons.items():
        monkeypatch.setitem(sys.modules, "wandb", init and SimpleNamespace(init=init))
        build(tmp_path / name, "--wandb-project", "mine", "--max-steps", 1).fit()
        assert f"not logging to the wandb project mine ({reason}); --no-wandb leaves it out" in log_of(tmp_path / name)
        assert list(metrics(tmp_path / name / "results", "loss")) == [1]


# Several phases


def two_phases(folder, *more, start=4, at=None):
    """A generator, and a judge that takes part from a step on; the judge reads what the generator made."""
    args = arguments(folder, *more)
    torch.manual_seed(3)
    maker, judge = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), nn.Linear(3, 1)
    made, calls = {}, []

    def make(batch, place):
        calls.append(("make", place.step, place.number))
        made[place.number] = maker(batch[0])
        loss = F.mse_loss(made[place.number], batch[1])
        return loss, {"make": loss}

    def rate(batch, place):
        calls.append(("rate", place.step, place.number))
        if at:
            at(place)
        loss = judge(made.pop(place.number).detach()).square().mean()
        return loss, {"rate": loss}

    phases = [
        Phase("optimizer", maker, adamw(maker, args), make),
        Phase("optimizer_judge", judge, adamw(judge, args), rate, active=lambda step: step >= start, model="judge"),
    ]
    return build(folder, *more, model=maker, models={"judge": judge}, phases=phases), calls


def test_phases_take_turns_on_the_same_batch(tmp_path):
    trainer, calls = two_phases(tmp_path, "--gradient-accumulation-steps", 2, "--max-steps", 6)
    judge = {name: tensor.clone() for name, tensor in trainer.models["judge"].state_dict().items()}
    trainer.fit()
    expected = [
        (name, step, number)
        for step in range(6)
        for name in (("make", "rate") if step >= 4 else ("make",))
        for number in (0, 1)
    ]
    assert calls == expected
    assert not same(dict(trainer.models["judge"].state_dict()), judge)
    assert set(metrics(tmp_path / "results", "rate")) == {5, 6}
    assert final(tmp_path)["optimizer_judge"]["state"][0]["step"] == 2


def test_a_phase_is_averaged_over_its_own_steps(tmp_path):
    """Steps without a phase do not count as zeros."""
    trainer, _ = two_phases(tmp_path / "1", "--max-steps", 6)
    trainer.fit()
    trainer, _ = two_phases(tmp_path / "6", "--max-steps", 6, "--log-every", 6)
    trainer.fit()
    each = metrics(tmp_path / "1" / "results", "rate")
    assert metrics(tmp_path / "6" / "results", "rate")[6] == pytest.approx((each[5] + each[6]) / 2)


@pytest.mark.parametrize("precision, stop", [("none", 3), ("fp16", 7)], ids=["before the second phase", "after"])
def test_two_phases_resume_bit_identically(tmp_path, precision, stop):
    flags = ["--mixed-precision", precision, "--ckpt-every", 2]
    two_phases(tmp_path / "whole", *flags)[0].fit()
    trainer, _ = two_phases(tmp_path / "parts", *flags)
    loss = trainer.phases[0].loss
    trainer.phases[0].loss = lambda batch, place: stop_at(stop)(place) or loss(batch, place)
    with pytest.raises(Stopped):
        trainer.fit()
    two_phases(tmp_path / "parts", *flags, "--resume")[0].fit()
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    for key in ("model", "judge", "optimizer", "optimizer_judge", "trainer"):
        assert same(whole[key], parts[key]), key


def test_half_precision_scales_and_skips(tmp_path):
    """A gradient beyond float16 costs a step and half of the scale, not the weights."""
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = build(tmp_path, "--mixed-precision", "fp16", "--max-steps", 1, model=model)
    assert trainer.scaler.is_enabled()
    trainer.phases[0].loss = lambda batch, place: (squares(model, batch) * 1e34, {})
    trainer.fit()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert trainer.scaler.get_scale() == 2.0**15
    assert final(tmp_path)["trainer"]["scaler"]["scale"] == 2.0**15
