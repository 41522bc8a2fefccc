"""Parts of a training: what is trained, by which losses and optimizers, on which data."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import Dataset

from utils.checkpoint import Checkpoint
from utils.training.shards import ShardedCheckpoint


@dataclass(frozen=True)
class Micro:
    """Place of a micro-batch: the optimizer step and epoch, its number in the step, its positions in the batch."""

    step: int
    epoch: int
    number: int
    positions: slice
    global_batch: int


@dataclass
class Phase:
    """One optimizer's part of a step."""

    key: str  # name of its optimizer in checkpoint files
    module: nn.Module  # what the loss calls (parallelized)
    optimizer: torch.optim.Optimizer
    # Takes the batch on the device and its `Micro`, returns the loss and scalars to log.
    loss: Callable[[Any, Micro], tuple[Tensor, dict[str, Tensor]]]
    active: Callable[[int], bool] = lambda step: True  # takes part in a step at all
    model: str = "model"  # which of the job's models it moves


@dataclass
class Job:
    """A thing to train: models with their losses, data, and what is shown of them on the way.

    dataset: may have set_epoch(epoch), and sample_numbers(indices), by which its samples are named to users.
    prepare: called once a step on every process with its micro-batches on the device and the step's number: returns what the
        losses get.
    validate: called at --ckpt-every on every process with the model: returns figures by name.
    sample: called at --sample-every with the model, on the first process, with shards on every one: returns pictures by
        name, uint8 (H, W, 3).
    """

    name: str  # of the run's folder
    models: dict[str, nn.Module]  # what is saved, by its name in checkpoint files; EMA follows "model"
    phases: list[Phase]
    dataset: Dataset
    config: dict[str, Any] = field(default_factory=dict)  # what the weights belong to, as every checkpoint records it
    initial: Checkpoint | ShardedCheckpoint | None = None  # what a new run starts from
    collate: Callable[[list[Any]], Any] | None = None  # of items that are not all of one shape
    prepare: Callable[[list[Any], int], list[Any]] | None = None
    validate: Callable[[nn.Module], dict[str, float]] | None = None
    sample: Callable[[nn.Module], dict[str, Any]] | None = None
    rate: Callable[[int, int], float] | None = None  # learning rate by batches done and batches an epoch
    tokens: int | None = None  # of a sample, for the log
    flops: Callable[[int, int], float] | None = None  # of a sample by step and epoch, for the log
