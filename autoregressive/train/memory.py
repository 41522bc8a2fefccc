"""What a GPU holds while it trains: weights, gradients, optimizer state, activations, at the moment it holds most.

    memory = training_memory(ModelArgs(…), Setup(strategy="fsdp", gpus=32, shard=32, micro_batch=8))
    memory.total, memory.parts                           # bytes

Nothing is allocated and no GPU is needed. Weights, gradients and optimizer state are added up by the rules of the way
of sharding. Activations are counted: a forward and a backward pass run on fake tensors, which have shapes but no
memory, and every storage that comes to life in them is followed until it dies. The passes are of a model with few
blocks; all between the first and the last hold the same.
tests/tools/test_plan_training.py holds the totals against the peak of real training steps on a CPU: within 1 % in
float32, within 10 % in bfloat16, whose kernels there have buffers of their own.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoregressive.models import gpt, on_cuda
from autoregressive.models.gpt import ModelArgs, Transformer, TransformerBlock
from autoregressive.train.loss import TokenLoss
from utils.distributed import Distributed
from utils.training.parallel import HALF, Parallel

WEIGHTS = "weights"
GATHERED = "gathered weights"
COPIES = "low-precision copies of weights"
GRADIENTS = "gradients"
WHOLE_GRADIENTS = "gradients not yet sharded"
MOMENTS = "AdamW moments"
AVERAGE = "EMA"
ACTIVATIONS = "activations kept for backward"
LOSS = "loss: logits and their gradients"
TEMPORARY = "temporaries"
PARTS = (WEIGHTS, GATHERED, COPIES, GRADIENTS, WHOLE_GRADIENTS, MOMENTS, AVERAGE, ACTIVATIONS, LOSS, TEMPORARY)

# Stages of a step. Until the last block's backward pass is done every block's activations are there; afterwards
# gradients take their place, block by block.
FORWARD, IN_LOSS, LAST_BLOCK = "the forward pass", "the loss", "the backward pass of the last block"
OTHER_BLOCKS, UPDATE = "the backward pass of the other blocks", "the optimizer's step"


@dataclass(frozen=True)
class Setup:
    """A run as the memory of one GPU sees it.

    strategy, precision, grad_precision: as utils/training/parallel.py has them. micro_batch: samples computed at once, accumulation:
    how often in a step. shard: processes that share one copy of what is sharded.
    as_gpu: attention and dropout keep for backward what they keep on a GPU, not on a CPU.
    """

    strategy: str = "ddp"
    precision: str = "bf16"
    grad_precision: str | None = None
    micro_batch: int = 1
    accumulation: int = 1
    gpus: int = 1
    shard: int = 1
    ema: bool = False
    checkpointing: bool = False
    compiled: bool = False
    sync_every_micro_batch: bool = False
    as_gpu: bool = True

    @property
    def sharded(self) -> bool:
        """Whether a process holds only a part of the weights."""
        return self.strategy != "ddp"

    @property
    def waits(self) -> bool:
        """Whether unsharded gradients of all weights wait for the last part of a batch."""
        return self.sharded and self.accumulation > 1 and not self.sync_every_micro_batch

    @property
    def keeps_gradients(self) -> bool:
        """Whether all gradients are there before the backward pass: of earlier parts of the batch, or DDP's buckets."""
        return self.accumulation > 1 or (self.gpus > 1 and not self.sharded)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the moment it holds most, by part. at: which moment that is."""

    parts: dict[str, int]
    at: str

    @property
    def total(self) -> int:
        """Their sum, in bytes."""
        return sum(self.parts.values())


def training_memory(args: ModelArgs, setup: Setup) -> Memory:
    """What one GPU holds at the moment it holds most, of the whole step: forward, backward, optimizer.

    Sharding as FSDP2 does it (arXiv 2304.11277): of every parameter a process keeps a part of the first dimension in
    float32; two blocks are gathered at a time in the precision of training, one computed with and one on its way, and
    embeddings and head the whole step. A block's gradients leave it unsharded, in the precision they are summed in.
    """
    with torch.device("meta"):
        model = Transformer(args)
    numbers = model.num_parameters
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    block = sum(p.numel() for p in model.layers[0].parameters())
    root = numbers - args.n_layer * block
    held = sum(shard_numel(p, setup.shard) for p in model.parameters()) if setup.sharded else numbers
    width = 2 if setup.sharded and setup.precision in HALF else 4
    summed = {None: width, "fp32": 4}.get(setup.grad_precision, 2)

    fixed = {WEIGHTS: 4 * held + buffers, MOMENTS: 8 * held, AVERAGE: 4 * held if setup.ema else 0}
    in_step: dict[str, int] = {}
    if setup.sharded:
        in_step[GATHERED] = width * (numbers if setup.strategy == "sdp" else min(2, args.n_layer) * block + root)
        in_step[WHOLE_GRADIENTS] = (width + summed) * block + (summed * numbers if setup.waits else 0)
    if setup.keeps_gradients and not setup.waits:
        in_step[GRADIENTS] = 4 * held
    moments = [Memory(_added(fixed, in_step, m.parts), m.at) for m in passes_memory(args, setup)]
    update = Memory(_added(fixed, {GRADIENTS: 4 * held}), UPDATE)
    return max([*moments, update], key=lambda m: m.total)


def _added(*parts: dict[str, int]) -> dict[str, int]:
    """The sums by name, in the order of PARTS, without what is zero."""
    sums = sum(map(Counter, parts), Counter())
    return {name: sums[name] for name in PARTS if sums[name]}


_CASTS = (torch.ops.aten._to_copy.default, torch.ops.prims.convert_element_type.default)


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of every storage born under it, by kind, until it dies. `peaks`: at most, in each stage."""

    def __init__(self, ignored: Iterable[Tensor]):
        super().__init__()
        self.ignored: set[int] = set()
        for tensor in ignored:
            self.ignore(tensor)
        self.stage = FORWARD
        self.kinds: dict[int, str] = {}
        self.alive: dict[int, weakref.ref] = {}
        self.bytes: Counter[str] = Counter()
        self.highest: Counter[str] = Counter()  # total bytes by stage
        self.peaks: dict[str, dict[str, int]] = {}

    def ignore(self, tensor: Tensor) -> None:
        """Leaves out a storage that is there all the time."""
        self.ignored.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        cast = func in _CASTS and args[0].untyped_storage()._cdata in self.ignored
        kind = COPIES if cast else LOSS if self.stage == IN_LOSS else TEMPORARY
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage(), kind)
        return out

    def _follow(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.kinds or key in self.ignored:
            return

        def died(_: weakref.ref) -> None:
            del self.alive[key]
            self.bytes[self.kinds.pop(key)] -= size

        self.kinds[key], self.alive[key] = kind, weakref.ref(storage, died)
        self.bytes[kind] += size
        total = self.bytes.total()
        if total > self.highest[self.stage]:
            self.highest[self.stage], self.peaks[self.stage] = total, dict(self.bytes)

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Says what a storage turned out to be."""
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if key in self.kinds:
            self.bytes[self.kinds[key]] -= size
            self.bytes[kind] += size
            self.kinds[key] = kind

    def saved(self, tensor: Tensor) -> Tensor:
        """A hook for what autograd keeps for the backward pass."""
        if self.stage == FORWARD and self.kinds.get(tensor.untyped_storage()._cdata) == TEMPORARY:
            self.mark(tensor, ACTIVATIONS)
        return tensor


def passes_memory(args: ModelArgs, setup: Setup, simulated: int = 3) -> list[Memory]:
    """What comes and goes in a forward and backward pass, at the fullest moment of each stage.

    simulated: blocks that are run; what the others hold is that of the second one. Gradients are those that were not there
    before (`Setup.keeps_gradients`), in shards where the strategy makes shards of them.
    """
    dtype = HALF.get(setup.precision)
    missing = max(args.n_layer - simulated, 0)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        if setup.as_gpu:
            stack.enter_context(as_on_gpu())
        with default_dtype(dtype if setup.sharded else None):
            model = Transformer(replace(args, n_layer=args.n_layer - missing)).train()
        batch = example_batch(args, setup.micro_batch)
        autocast = torch.autocast("cpu", dtype, enabled=bool(dtype) and not setup.sharded)
        if setup.compiled:
            with autocast:
                compile_blocks(model)
        alone = Parallel(Distributed(torch.device("cpu")), activation_checkpointing=setup.checkpointing)
        module = alone.apply(TokenLoss(model), model.layers)
        live = LiveStorages([*model.parameters(), *model.buffers(), *model._rope.values()])
        after_block: list[Counter[str]] = []
        _follow_gradients(model, setup, live)
        _follow_stages(model.layers, live, after_block)
        with live, torch.autograd.graph.saved_tensors_hooks(live.saved, lambda t: t):
            with autocast:
                loss = module(**batch)
            loss.backward()
    kept, grown = Counter(), Counter()
    if missing:
        kept = Counter(after_block[1])
        kept.subtract(after_block[0])
        if not setup.keeps_gradients:
            held = sum(shard_numel(p, setup.shard) for p in model.layers[1].parameters())
            grown[GRADIENTS] = 4 * held
    found = []
    for stage, parts in live.peaks.items():
        total = Counter(parts)
        for part, size in (grown if stage == OTHER_BLOCKS else kept).items():
            total[part] += missing * size
        found.append(Memory(dict(total), stage))
    return found


def example_batch(args: ModelArgs, samples: int) -> dict[str, Tensor]:
    """What TokenLoss takes of a batch, all zeros."""
    batch = {
        "codes": torch.zeros(samples, args.block_size, dtype=torch.long),
        "drop": torch.zeros(samples, dtype=torch.bool),
    }
    if args.model_type == "c2i":
        return {**batch, "cond": torch.zeros(samples, dtype=torch.long)}
    shape = samples, args.cls_token_num
    return {**batch, "cond": torch.zeros(*shape, args.caption_dim), "prefix_mask": torch.ones(shape)}


def _follow_gradients(model: Transformer, setup: Setup, live: LiveStorages) -> None:
    """Gradients of a sharded block go as they come: those in flight are counted apart, of the others a shard stays."""
    blocks = {p for block in model.layers for p in block.parameters()} if setup.sharded else set()
    # Those of embeddings and head come one at a time, but stay unsharded until the pass is over.
    there = setup.waits or (setup.keeps_gradients and not setup.sharded)
    shards = []

    def accumulated(p: Tensor) -> None:
        if p not in blocks:
            live.mark(p.grad, WHOLE_GRADIENTS if setup.sharded else GRADIENTS)
            return
        p.grad = None
        if not setup.keeps_gradients:
            shards.append(torch.empty(shard_numel(p, setup.shard), dtype=torch.float32))
            live.mark(shards[-1], GRADIENTS)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(accumulated)
        if there and p not in blocks:
            p.grad = torch.empty_like(p)
            live.ignore(p.grad)


def _follow_stages(blocks: nn.ModuleList, live: LiveStorages, after_block: list[Counter[str]]) -> None:
    """Keeps `live.stage` true, and notes what is alive after each block's forward pass."""

    def enter(stage: str) -> Callable[[Tensor], None]:
        return lambda gradient: setattr(live, "stage", stage)

    def last_begins(block: nn.Module, inputs: tuple) -> None:
        if live.stage == FORWARD:  # not when it is computed again
            inputs[0].register_hook(enter(OTHER_BLOCKS))

    def ends(block: nn.Module, inputs: tuple, h: Tensor) -> None:
        after_block.append(Counter(live.bytes))
        if block is blocks[-1]:
            live.stage = IN_LOSS
            h.register_hook(enter(LAST_BLOCK))

    blocks[-1].register_forward_pre_hook(last_begins)
    for block in blocks:
        block.register_forward_hook(ends)


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Makes new modules' weights in a dtype (fake ones cannot be cast later); None for float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def shard_numel(p: Tensor, shards: int) -> int:
    """Numbers of a parameter that the fullest process holds: FSDP2 cuts along the first dimension."""
    return -(-len(p) // shards) * (p.numel() // len(p))


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Attention and dropout by the kernels a GPU would pick: they keep other tensors for backward than a CPU's do."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p > 0 else x

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16):
            width = q.shape[-1]
            if width % 8:
                q, k, v = (F.pad(t, (0, 8 - width % 8)) for t in (q, k, v))
            out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
            return out[..., :width]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(len(q), q.shape[1], -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal)[0]

    # Not by a TorchFunctionMode: what a checkpointed block computes again in the backward pass would leave that.
    plain = F.dropout, F.scaled_dot_product_attention, gpt.attention_bias
    F.dropout, F.scaled_dot_product_attention, gpt.attention_bias = dropout, attention, on_cuda.fused_bias
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention, gpt.attention_bias = plain


def compile_blocks(model: Transformer) -> None:
    """Makes the blocks keep for backward what a compiled block keeps: a minimum cut, and cheap steps are repeated.

    The partitioner is torch.compile's own; the graph then runs operation by operation.
    """
    from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    block = model.layers[-1]
    names = [name for name, _ in block.named_parameters()]

    def call(*inputs: Tensor) -> Tensor:
        weights, (x, rope, *mask) = inputs[: len(names)], inputs[len(names) :]
        with torch.nn.utils.stateless._reparametrize_module(block, dict(zip(names, weights, strict=True))):
            return TransformerBlock.forward(block, x, rope, *mask, causal=not mask)

    def as_it_is(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        return make_boxed_func(graph)

    compiled = aot_function(
        call, as_it_is, as_it_is, min_cut_rematerialization_partition, select_decomp_table(), len(names)
    )

    def forward_with(weights: list[Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, rope: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
            return compiled(*weights, x, rope, *([] if mask is None else [mask]))

        return forward

    for layer in model.layers:
        layer.forward = forward_with(list(layer.parameters()))
