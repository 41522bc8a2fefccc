"""Parallelism of a model over processes, applied from outside: the model knows nothing of it.

    plan = Parallel.from_args(args, dist)
    wrapped = plan.apply(module, blocks=model.layers)        # DDP, or FSDP2 of each block and of the rest
    with plan.gathered(wrapped): ...                         # all weights whole, on every process

Strategies: `ddp` (every process holds everything), `fsdp` (weights, gradients and optimizer state in shards, gathered
block by block), `sdp` (weights stay gathered from the forward to the backward pass; gradients, optimizer state and
master weights in shards), `hsdp` (shards within a group of processes, copies across groups).
ZeRO (arXiv 1910.02054); PyTorch FSDP (2304.11277).
"""

import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from utils.distributed import Distributed
from utils.precision import use_tf32
from utils.rng import item_seed
from utils.training.ema import local

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Rows of a weight are drawn in blocks of about this many numbers, so that a shard is drawn without the rest.
_DRAWN_AT_ONCE = 2**18


@dataclass(frozen=True)
class Parallel:
    """A strategy, its precision and what is done to each block."""

    dist: Distributed
    strategy: str = "ddp"
    precision: str = "none"  # of the forward and backward pass: none or fp32, tf32, fp16, bf16; weights stay float32
    grad_precision: str | None = None  # in which gradients are summed (None: under DDP float32, else `precision`)
    compile: bool = False
    activation_checkpointing: bool = False
    shard_size: int | None = None  # processes that share one copy under hsdp (None: those of one machine)
    sync_every_micro_batch: bool = False  # sum gradients after each part of a batch, not only after the last

    @classmethod
    def from_args(cls, args: Namespace, dist: Distributed, compile: bool) -> "Parallel":
        """Return the plan that --data-parallel and the flags beside it ask for. Raises ValueError for a group that does not fit."""
        names = ("grad_precision", "activation_checkpointing", "shard_size", "sync_every_micro_batch")
        given = {name: getattr(args, name) for name in names}
        return cls(dist, args.data_parallel, args.mixed_precision, compile=compile, **given)

    def __post_init__(self) -> None:
        if self.strategy == "hsdp" and self.dist.world_size % self.group_size:
            what = f"--data-parallel hsdp: groups of {self.group_size} do not divide {self.dist.world_size} processes"
            raise ValueError(f"{what}; pass a --shard-size that does")
        if self.strategy != "ddp" and self.dist.device.type == "mps":
            raise ValueError(f"--data-parallel {self.strategy} works on cuda and cpu; on mps train with ddp")

    @property
    def sharded(self) -> bool:
        """Tell whether a process holds only a part of the weights."""
        return self.strategy != "ddp"

    @property
    def group_size(self) -> int:
        """Processes that share one copy under hsdp."""
        return self.shard_size or self.dist.local_world_size

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Return the autocast dtype, or None if FSDP casts the weights itself or nothing is cast."""
        return None if self.sharded else HALF.get(self.precision)

    def mesh(self) -> DeviceMesh:
        """Return the device mesh: one dimension to shard over, and for hsdp one of copies before it."""
        kind, world = self.dist.device.type, self.dist.world_size
        if self.strategy != "hsdp":
            return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        shape = (world // self.group_size, self.group_size)
        return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))

    def apply(self, module: nn.Module, blocks: Sequence[nn.Module] = ()) -> nn.Module:
        """`module` ready for training; `blocks` are its repeated parts. What it holds is still what is saved.

        With sharding the module itself is changed, and may be on the meta device: see `materialize`. Without any blocks
        the whole module is compiled; compilation is for CUDA only (on a CPU it takes longer than it saves).
        """
        use_tf32(self.precision == "tf32")
        compiled = self.compile and self.dist.device.type == "cuda"
        if compiled:  # blocks share one graph, unless stochastic depth gives each its own
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, 8 * len(blocks))
        for block in blocks:
            forward = torch.compile(block.forward, dynamic=False) if compiled else block.forward
            if self.activation_checkpointing:
                forward = partial(checkpoint, forward, use_reentrant=False)  # arXiv 1604.06174
            block.forward = forward  # in its place, so that no name in the state dict changes
        if self.sharded:
            return self._shard(module, blocks)
        wrapped = cast(nn.Module, torch.compile(module)) if compiled and not blocks else module
        if self.dist.world_size > 1:
            ids = [self.dist.device.index] if self.dist.device.type == "cuda" else None
            with warnings.catch_warnings():  # its successor's name is not known to older releases
                warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
                wrapped = DistributedDataParallel(
                    wrapped, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )
            if self.grad_precision in HALF:
                hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
                wrapped.register_comm_hook(None, hooks[self.grad_precision])
        return wrapped

    def _shard(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        dtype = HALF.get(self.precision)
        reduced = HALF.get(self.grad_precision, torch.float32) if self.grad_precision else dtype
        # Inputs are left alone: rotary tables stay float32, token embeddings have the weights' precision already.
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
        mesh = self.mesh()
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=self.strategy != "sdp")
        # What is left (embeddings, head) is needed at both ends of a step: gathered once.
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
        return module

    @contextmanager
    def last_only(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Leave out the exchange of gradients on all parts of a batch but the last."""
        wait = not last and not self.sync_every_micro_batch
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(not wait)
            yield
        else:
            with cast(Any, wrapped).no_sync() if wait and hasattr(wrapped, "no_sync") else nullcontext():
                yield

    def rehearse(self, backward: Callable[[], Any], models: Iterable[nn.Module]) -> None:
        """Take one backward pass for nothing, where DDP has more than two processes.

        After the first pass of a process DDP rearranges its buckets, and with them the order in which gradients are added
        up: a run that was resumed would round otherwise than one that was not.
        """
        if self.dist.world_size <= 2 or self.sharded:
            return
        buffers = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
        with torch.random.fork_rng([self.dist.device] if self.dist.device.type == "cuda" else []):
            backward()
        for buffer, before in buffers:
            buffer.copy_(before)

    @contextmanager
    def gathered(self, wrapped: nn.Module) -> Iterator[None]:
        """Gather all weights of `wrapped` on every process, so that each may use any part of the model alone.

        Takes the memory of the whole model, in its training precision. Every process enters and leaves it together; inside,
        nobody asks for a state dict, at which FSDP would shard the weights again.
        """
        parts = [part for part in wrapped.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                root = part is wrapped
                part.set_reshard_after_forward(not root and self.strategy != "sdp", recurse=False)


def rows_held(tensor: Tensor) -> slice:
    """Return the rows (first dimension) of a tensor that this process holds; all of one that is not sharded."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor) if tensor.dim() else 1)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(offset[0], offset[0] + shape[0])


@torch.no_grad()
def copy_rows(target: Tensor, whole: Tensor) -> None:
    """Copy `whole` into `target`, each process the rows that it holds."""
    local(target).copy_(whole[rows_held(target)] if isinstance(target, DTensor) else whole)


class SeededNormal:
    """Fills tensors with normal numbers: the n-th call's are a function of the seed and n, however they are sharded.

    model.reset_parameters(SeededNormal(0)). Each process draws its own rows only.
    """

    def __init__(self, seed: int):
        self.seed, self.calls = seed, 0

    def __call__(self, tensor: Tensor, std: float) -> None:
        self.calls += 1
        held, part, columns = rows_held(tensor), local(tensor), prod(tensor.shape[1:])
        rows = max(_DRAWN_AT_ONCE // columns, 1)
        for block in range(held.start // rows, -(-held.stop // rows)):
            first, last = max(block * rows, held.start), min((block + 1) * rows, held.stop)
            if first < last:
                generator = torch.Generator().manual_seed(item_seed(self.seed, self.calls, block))
                drawn = torch.empty(rows, columns).normal_(std=std, generator=generator)
                drawn = drawn[first - block * rows : last - block * rows].view(last - first, *tensor.shape[1:])
                part[first - held.start : last - held.start].copy_(drawn)


@torch.no_grad()
def materialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Give a model from the meta device memory and its initial weights, the same for every way of sharding it."""
    model.to_empty(device=device)
    cast(Any, model).reset_parameters(SeededNormal(seed))


def parameters_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[nn.Parameter]:
    """Return every parameter that the optimizers move, in the order of their groups."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
