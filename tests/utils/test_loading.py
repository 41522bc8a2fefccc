"""Loader processes: how many there are, what their death becomes, and failures known ahead."""

import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from utils.distributed import Distributed
from utils.errors import words_of
from utils.loading import LoaderKilled, ReadAhead, batches_of, loader_workers

CPU = Distributed(torch.device("cpu"))


def test_loader_processes_share_the_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    asked = {
        (asked, world): loader_workers(asked, replace(CPU, local_world_size=world))
        for asked in (0, 3, 24)
        for world in (1, 8, 16)
    }
    assert asked == {
        **{(0, world): 0 for world in (1, 8, 16)},
        **{(3, 1): 3, (3, 8): 1, (3, 16): 0},
        **{(24, 1): 12, (24, 8): 1, (24, 16): 0},
    }


def test_loader_processes_of_tasks_with_processors_of_their_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert loader_workers(24, replace(CPU, world_size=8, local_world_size=8)) == 12
    assert loader_workers(24, replace(CPU, world_size=64, local_world_size=8)) == 1  # torchrun's, in a task per machine


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """torch looks every 5 seconds whether its loader processes live."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


class Numbers(list):
    """Data that may end a loader process at an item."""

    def __getitem__(self, index):
        item = list.__getitem__(self, index)
        return item() if callable(item) else item


def leave(code):
    return lambda: os._exit(code)


@pytest.mark.parametrize(
    "end, message",
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"killed by SIGKILL \(.*memory"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), r"killed by SIGBUS \(/dev/shm"),
        (leave(7), "ended with code 7"),
    ],
    ids=["SIGKILL", "SIGBUS", "exit"],
)
def test_batches_of_dead_loader_process_raises_loader_killed(end, message):
    loader = DataLoader(Numbers([1, 2, 3, end, 5]), batch_size=1, num_workers=1)
    batches, seen = batches_of(loader), []
    with pytest.raises(LoaderKilled, match=message):
        seen += (int(batch) for batch in batches)
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


def test_batches_of_loader_process_dead_between_epochs_raises_loader_killed():
    loader = DataLoader(Numbers(range(4)), batch_size=1, num_workers=2, persistent_workers=True)
    list(batches_of(loader))
    (first, _) = loader._iterator._workers
    first.kill()
    first.join()
    with pytest.raises(LoaderKilled, match="killed by SIGKILL"):
        list(batches_of(loader))


def test_batches_of_death_does_not_interrupt_other_work():
    """torch's own handler raises wherever the process is; here the batches at hand are still given."""
    batches = batches_of(DataLoader(Numbers(range(20)), batch_size=1, num_workers=1, prefetch_factor=2))
    assert int(next(batches)) == 0
    worker = max(multiprocessing.active_children(), key=lambda child: child.pid)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    sum(range(10**5))  # where torch would have raised
    with pytest.raises(LoaderKilled):
        list(batches)


def test_batches_of_item_that_raises_keeps_its_error():
    def refuse():
        raise ValueError("shard 3 is damaged")

    with pytest.raises(ValueError) as raised:
        list(batches_of(DataLoader(Numbers([1, refuse]), num_workers=1)))
    assert words_of(raised.value) == "shard 3 is damaged"


def test_read_ahead_knows_a_failure_two_batches_before_it():
    def batches():
        yield from range(5)
        raise ValueError("no more")

    ahead = ReadAhead(batches())
    assert [(batch, ahead.failure is not None) for batch in ahead] == [
        (0, False), (1, False), (2, False), (3, True), (4, True),
    ]  # fmt: skip
    assert list(ReadAhead(range(7))) == list(range(7)) and list(ReadAhead([])) == []
