"""An estimate of what a GPU holds while it trains: weights, gradients, optimizer state, activations.

    memory = training_memory(ModelArgs(…), Setup(strategy="fsdp", gpus=32, shard=32, micro_batch=8))
    memory.total, memory.parts                           # bytes

Everything is added up by hand: weights, gradients and optimizer state by the rules of the way of sharding, activations by the
tensors that a block keeps for its backward pass, listed below. tests/tools/test_plan_training.py holds the totals against the
peak of real training steps.
"""

from dataclasses import dataclass

from autoregressive.models.gpt import ModelArgs

WEIGHTS = "weights"
GATHERED = "gathered weights"
COPIES = "low-precision copies of weights"
GRADIENTS = "gradients"
WHOLE_GRADIENTS = "gradients not yet sharded"
MOMENTS = "AdamW moments"
AVERAGE = "EMA"
ACTIVATIONS = "activations kept for backward"
TEMPORARY = "temporaries of a block, or logits"

FORWARD, UPDATE = "the end of the forward pass", "the optimizer's step"
# Numbers of a chunk of logits, which are float32, as are their gradients.
CHUNK = 2**25
# What the backward pass of a block holds besides, in units of what the block keeps for it: compiled, and operation by operation.
COMPILED, EAGER = 1.5, 0.5


@dataclass(frozen=True)
class Setup:
    """A run as the memory of one GPU sees it.

    Args:
        strategy: ddp, sdp, fsdp or hsdp; precision and grad_precision: as utils/training/parallel.py has them.
        micro_batch: samples computed at once; accumulation: how often in a step.
        shard: processes that share one copy of what is sharded.
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

    @property
    def sharded(self) -> bool:
        """Tell whether a process holds only a part of the weights."""
        return self.strategy != "ddp"

    @property
    def half(self) -> bool:
        """Tell whether products are computed in 16 bits."""
        return self.precision in ("fp16", "bf16")

    @property
    def waits(self) -> bool:
        """Tell whether unsharded gradients of all weights wait for the last part of a batch."""
        return self.sharded and self.accumulation > 1 and not self.sync_every_micro_batch


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
    """Return what one GPU holds at the moment it holds most.

    Sharding as FSDP2 does it (arXiv 2304.11277): of every parameter a process keeps a share in float32; two blocks are
    gathered at a time in the precision of training, one computed with and one on its way, and embeddings and head the
    whole step. A block's gradients leave it unsharded, in the precision they are summed in.
    """
    numbers, block = parameters_of(args)
    held = numbers // setup.shard if setup.sharded else numbers
    width = 2 if setup.sharded and setup.half else 4
    summed = {None: width, "fp32": 4}.get(setup.grad_precision, 2)
    fixed = {WEIGHTS: 4 * held, MOMENTS: 8 * held, AVERAGE: 4 * held * setup.ema}

    rows = setup.micro_batch * (args.block_size + args.cls_token_num - 1)
    of_block, backward = rows * block_bytes(args, setup), COMPILED if setup.compiled else EAGER
    stream = rows * args.dim * (2 if setup.sharded and setup.half else 4)
    logits = 8 * min(CHUNK, setup.micro_batch * args.block_size * args.vocab_size)
    step = {
        ACTIVATIONS: args.n_layer * (stream if setup.checkpointing else of_block) + stream // 4,
        TEMPORARY: max(logits, int((backward + setup.checkpointing) * of_block)),
    }
    if setup.sharded:
        both = min(2, args.n_layer) * block + numbers - args.n_layer * block
        step[GATHERED] = width * (numbers if setup.strategy == "sdp" else both)
        step[WHOLE_GRADIENTS] = (width + summed) * block + (summed * numbers if setup.waits else 0)
    elif setup.half and not (setup.checkpointing and setup.compiled):  # autocast's, for the whole step
        step[COPIES] = 2 * args.n_layer * block
    # Gradients are there before the backward pass: of earlier parts of the batch, or as DDP's buckets.
    early = setup.accumulation > 1 or (setup.gpus > 1 and not setup.sharded)
    step[GRADIENTS] = 4 * held if early and not setup.waits else 0
    moments = [
        Memory(_without_zeros(fixed | step), FORWARD),
        Memory(_without_zeros(fixed | {GRADIENTS: 4 * held}), UPDATE),
    ]
    return max(moments, key=lambda memory: memory.total)


def parameters_of(args: ModelArgs) -> tuple[int, int]:
    """Return the numbers of a model's parameters, and of one block's."""
    import torch

    from autoregressive.models.gpt import Transformer

    with torch.device("meta"):
        model = Transformer(args)
    return model.num_parameters, sum(p.numel() for p in model.layers[0].parameters())


def block_bytes(args: ModelArgs, setup: Setup) -> int:
    """Return the bytes that a block keeps for its backward pass of one row."""
    width = 2 if setup.half else 4
    stream = 2 if setup.half and setup.sharded else 4
    dim, ffn, dropout = args.dim, args.ffn_dim, bool(args.resid_dropout_p) + bool(args.ffn_dropout_p)
    kept = stream * dim  # the residual stream between attention and feed-forward
    kept += width * 2 * dim  # after the two norms
    kept += width * (1 + 2 * args.kv_heads / args.n_head) * dim  # queries, keys, values as they are projected
    kept += width * 4 * dim  # rotated queries and keys, and attention's result twice
    kept += width * 3 * ffn + dropout * dim  # gate, value and their product; dropout's masks, a byte each
    kept += 4 * args.n_head + 8  # attention's and the norms' sums
    if not setup.compiled:  # what a compiled block computes again
        kept += 8 * dim + width * ffn + (4 * dim if setup.half and not setup.sharded else 0)
    return int(kept)


def _without_zeros(parts: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}
