"""Requests of training to a GPU, seen on a CPU: compilations, copies that wait, lost processes, the writer of shards."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint.filesystem as filesystem

from autoregressive.train import train_c2i, train_t2i
from autoregressive.train.loss import dropped_conditions
from autoregressive.train.objectives.chunked import even_chunk
from tests.helpers import ROOT, free_port
from tests.utils.training.test_trainer import build, network
from tokenizer.tokenizer_image import vq_train
from utils import distributed
from utils.training.shards import ChecksummedWriter


@pytest.mark.slow
def test_pictures_and_held_out_loss_compile_nothing(tmp_path):
    """Each shape and each plain number of the decode loop would otherwise compile the training blocks anew."""
    compiled, calls = [], []
    model = network(0.0)
    plain = model.forward
    model.forward = torch.compile(
        lambda x, at=0: plain(x) + at, backend=lambda graph, _: compiled.append(graph) or graph.forward, dynamic=False
    )

    def evaluate(model, rows):
        calls.append(rows)
        for at in range(3):
            model(torch.zeros(rows, 4), at)
        return {}

    trainer = build(
        tmp_path, "--max-steps", 4, "--ckpt-every", 2, "--sample-every", 2, model=model,
        validate=lambda model: evaluate(model, 5), sample=lambda model: evaluate(model, 7),
    )  # fmt: skip
    trainer.fit()
    assert calls == [5, 7, 5, 7] and len(compiled) == 1, "the graph of a training step"


@pytest.mark.parametrize("precision, expected", [("bf16", torch.bfloat16), ("none", torch.float32)])
def test_held_out_loss_is_computed_in_the_precision_of_training(precision, expected, tmp_path):
    seen = []

    def validate(model):
        seen.append((torch.zeros(2, 3) @ torch.zeros(3, 2)).dtype)
        return {}

    build(tmp_path, "--max-steps", 1, "--mixed-precision", precision, validate=validate).fit()
    assert seen == [expected]


def test_dropped_conditions_reach_cuda_from_pinned_memory(monkeypatch):
    """A copy from other memory waits for everything that the device has to do."""
    asked = []

    class Drop:
        def pin_memory(self):
            asked.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            asked.append((str(device), non_blocking))
            return self

    class Numbers:
        def __getitem__(self, positions):
            return self

        def __lt__(self, probability):
            return Drop()

    monkeypatch.setattr(torch, "rand", lambda *_, **__: Numbers())
    dropped_conditions(0, 8, slice(0, 4), 0.1, torch.device("cuda", 1))
    assert asked == ["pinned", ("cuda:1", True)]


def test_writer_of_shards_never_waits_for_a_device(tmp_path, monkeypatch):
    """All tensors are in host memory: the library's copying ahead would wait for the training stream at every few."""

    def waits(*_, **__):
        raise AssertionError("copies ahead, and waits for the device")

    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", waits)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    writer = ChecksummedWriter(tmp_path / "saved", 0)
    torch.distributed.checkpoint.save({"a": torch.arange(3.0)}, storage_writer=writer, no_dist=True)
    assert (tmp_path / "saved" / "0.crc32.json").exists()


@pytest.mark.parametrize("rows, expected", [(18432, {3072}), (16384, {4096}), (5, {5}), (4099, {2050, 2049})])
def test_chunks_of_the_loss_on_cuda_are_even(rows, expected):
    assert {len(part) for part in torch.empty(rows).split(even_chunk(rows, 4096))} == expected


def test_start_of_a_deterministic_run_asks_for_kernels_of_one_order(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        distributed.start("cpu", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # with which attention keeps any order
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "script, given",
    [
        (train_c2i, "--code-path x"),
        (train_t2i, "--data-path x --t5-feat-path x --vq-ckpt x"),
        (vq_train, "--data-path x"),
    ],
)
def test_training_scripts_hand_the_flag_on(script, given, monkeypatch):
    class Asked(Exception):
        pass

    def ask():
        raise Asked

    monkeypatch.setattr(distributed, "add_up_in_one_order", ask)
    with pytest.raises(Asked):
        script.main(script.flags().parse_args([*given.split(), "--deterministic", "--device", "cpu"]))


def test_start_with_more_processes_than_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "pick_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="4 processes on a machine with 2 visible GPUs: start at most 2"):
        distributed.start()


@pytest.mark.slow
def test_a_process_that_waits_for_its_device_ends_once_another_is_gone():
    """The main thread sleeps in the place of a device that waits for the other process."""
    code = (
        "import os, sys, time; from dataclasses import replace; import torch; from utils.training import signals\n"
        "from utils.distributed import start\n"
        "signals.ALONE_FOR = 1\n"
        "dist = start('cpu')\n"
        "agreement = signals.Agreement(replace(dist, device=torch.device('cuda')))\n"
        "agreement.exchange(False)\n"
        "store = torch.distributed.distributed_c10d._get_default_store()\n"
        "if dist.rank == 1: agreement.close(); store.wait(['asked']); os._exit(9)\n"
        "agreement.exchange(False); store.set('asked', ''); time.sleep(600)"
    )
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(ROOT), "PATH": "", "RANK": str(rank), "LOCAL_RANK": str(rank), **where},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = ranks[0].communicate(timeout=120)[1]
    ranks[1].communicate()
    assert ranks[0].returncode == 1 and "process 0 lost the others" in said and "rerun with --resume" in said
