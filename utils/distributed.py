"""Processes and devices: the same code under torchrun, srun or mpirun with many processes and under plain python3 with one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from utils.errors import AgreedError, words_of
from utils.launchers import adopt_launcher
from utils.precision import add_up_in_one_order, use_tf32

T = TypeVar("T")


@dataclass(frozen=True)
class Distributed:
    """Place of this process among the others, and the device it works on."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Tell whether this process is the first one, which writes shared files."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of `value` over the processes."""
        return value if self.world_size == 1 else self.sum(value) / self.world_size

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over the processes."""
        if self.world_size == 1:
            return value
        value = value.clone()
        torch_dist.all_reduce(value)
        return value

    def gather(self, value: T) -> list[T]:
        """Return every process's picklable `value`, in rank order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch_dist.all_gather_object(values, value)
        return values

    def collect(self, value: T) -> list[T] | None:
        """Return every process's picklable `value`, in rank order, on the first process; None on the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        torch_dist.gather_object(value, values)
        return values

    def broadcast(self, value: T) -> T:
        """Return the first process's picklable `value`."""
        if self.world_size == 1:
            return value
        values = [value]
        torch_dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            torch_dist.barrier()

    def first_failure(self, error: Exception | None) -> str | None:
        """Return the failure of the first process that has one, on all of them; None where none has."""
        told = self.gather(None if error is None else words_of(error))
        return next((text for text in told if text is not None), None)

    def agree(self, error: Exception | None) -> None:
        """Raise AgreedError on every process where one of them has an error; a process alone raises its own."""
        failure = self.first_failure(error)
        if failure is not None:
            raise error if error and self.world_size == 1 else AgreedError(failure) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise AgreedError on every process where one of them fails in the block; a process alone raises its own error.

        Every process goes through the block, what it does itself or not.
        """
        own: Exception | None = None
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            own = error
        self.agree(own)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first process of each machine go through the block before the others (a download, a file made once).

        Raises AgreedError on every process where one of them fails in it.
        """
        if self.local_rank:
            self.agree(None)
        with self.together():
            yield
        if not self.local_rank:
            self.agree(None)

    def close(self) -> None:
        """Leave the process group, at a run's good end and together: who left early would take the others' connections."""
        if torch_dist.is_initialized():
            self.barrier()
            torch_dist.destroy_process_group()


def pick_device(name: str | None = None, local_rank: int = 0) -> torch.device:
    """Return the device called `name`, or the best there is (cuda, then mps, then cpu), and make float32 mean float32 on it.

    TF32 is turned off for the process: only `Parallel.apply` for --mixed-precision tf32 turns it on. Raises ValueError where a device is named that this machine does not have.
    """
    use_tf32(False)
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not a device: give cuda, mps or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device is available here; leave the flag out or use --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    return device


def start(
    device: str | None = None, group: bool = False, timeout_minutes: float = 30, deterministic: bool = False
) -> Distributed:
    """Join the process group that torchrun, srun or mpirun describe in the environment, or stand alone without one.

    group: make a process group for a single process too, which sharding needs. timeout_minutes: how long a process waits
    for the others before it gives up. deterministic: see `add_up_in_one_order`.
    """
    adopt_launcher()
    if deterministic:
        add_up_in_one_order()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        if (there := torch.cuda.device_count()) < local_world:
            raise ValueError(f"{local_world} processes on a machine with {there} visible GPUs: start at most {there}")
        torch.cuda.set_device(chosen)
    if (world > 1 or group) and not torch_dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        alone: dict[str, Any] = {} if world > 1 else {"store": torch_dist.HashStore(), "rank": 0, "world_size": 1}
        torch_dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **alone)
    return Distributed(chosen, rank, world, local_rank, local_world)
