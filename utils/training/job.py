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
    """One optimizer's part of a step.

    Args:
        key: name of its optimizer in checkpoint files.
        module: what the loss calls (parallelized).
        loss: takes the batch on the device and its `Micro`, returns the loss and scalars to log.
        active: tells whether it takes part in a step at all.
        model: which of the job's models it moves.
    """

    key: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any, Micro], tuple[Tensor, dict[str, Tensor]]]
    active: Callable[[int], bool] = lambda step: True
    model: str = "model"


@dataclass
class Job:
    """A thing to train: models with their losses, data, and what is shown of them on the way.

    Args:
        name: of the run's folder.
        models: what is saved, by its name in checkpoint files; "model" is the one that EMA follows.
        dataset: may have set_epoch(epoch), and sample_numbers(indices), by which its samples are named to users.
        config: the record of what the weights belong to (tokenizer, classes, …), written into every checkpoint.
        initial: what a new run starts from.
        collate: makes a batch of the data set's items, where they are not all of one shape.
        prepare: called once a step on every process with its micro-batches on the device and the step's number: returns
            what the losses get.
        validate: called at --ckpt-every on every process with the model: returns figures by name.
        sample: called at --sample-every with the model, on the first process, with shards on every one: returns pictures
            by name, uint8 (H, W, 3).
        rate: the learning rate by batches done and batches an epoch, in place of --lr-schedule.
        tokens: of a sample, for the log.
        flops: model FLOPs of a sample by step and epoch, for the log.
    """

    name: str
    models: dict[str, nn.Module]
    phases: list[Phase]
    dataset: Dataset
    config: dict[str, Any] = field(default_factory=dict)
    initial: Checkpoint | ShardedCheckpoint | None = None
    collate: Callable[[list[Any]], Any] | None = None
    prepare: Callable[[list[Any], int], list[Any]] | None = None
    validate: Callable[[nn.Module], dict[str, float]] | None = None
    sample: Callable[[nn.Module], dict[str, Any]] | None = None
    rate: Callable[[int, int], float] | None = None
    tokens: int | None = None
    flops: Callable[[int, int], float] | None = None
