"""Plan of a training run before it is started: parameters, memory of each GPU by part, FLOPs and hours.

python3 tools/plan_training.py --gpt-model GPT-3B --gpus 32 --image-size 384 --data-parallel fsdp

Needs no GPU and allocates nothing. Memory is added up by hand: weights, gradients and optimizer state by the rules of the
way of sharding, activations by the tensors that a block keeps for its backward pass. FLOPs: autoregressive/train/flops.py.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoregressive.models.sizes import GPT_SIZES
from utils.cli import (
    PORTION,
    add_gpt_flags,
    add_image_size_flags,
    flag_parser,
    grid_size,
    positive_float,
    positive_int,
    run_script,
)
from utils.training.flags import add_parallel_flags

if TYPE_CHECKING:
    from autoregressive.models.trunk import ModelArgs

GIB = 2**30
# The driver's context, the workspaces of cuBLAS and NCCL, and what the allocator cannot join (assumed).
ALLOWANCE = 2 * GIB
WEIGHTS, AVERAGE, MOMENTS, GRADIENTS = "weights", "EMA", "AdamW moments", "gradients"
GATHERED, WHOLE_GRADIENTS = "gathered weights", "gradients not yet sharded"
COPIES, ACTIVATIONS = "low-precision copies of weights", "activations kept for backward"
TEMPORARY = "temporaries of a block, or logits"
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


def training_memory(args: "ModelArgs", setup: Setup) -> dict[str, int]:
    """Return the bytes, by part, that one GPU holds at the moment it holds most.

    Sharding as FSDP2 does it (arXiv 2304.11277): of every parameter a process keeps a share in float32; two blocks are
    gathered at a time in the precision of training, one computed with and one on its way, and embeddings and head the
    whole step. A block's gradients leave it unsharded, in the precision they are summed in.
    """
    sharded, half = setup.strategy != "ddp", setup.precision in ("fp16", "bf16")
    numbers, block = parameters_of(args)
    held = numbers // setup.shard if sharded else numbers
    width = 2 if sharded and half else 4
    summed = {None: width, "fp32": 4}.get(setup.grad_precision, 2)
    # Unsharded gradients of all weights wait for the last part of a batch.
    waits = sharded and setup.accumulation > 1 and not setup.sync_every_micro_batch
    fixed = {WEIGHTS: 4 * held, MOMENTS: 8 * held, AVERAGE: 4 * held * setup.ema}

    rows = setup.micro_batch * (args.block_size + queries_of(args) + args.cls_token_num - 1)
    of_block, backward = rows * block_bytes(args, setup), COMPILED if setup.compiled else EAGER
    stream = rows * args.dim * width
    logits = 8 * min(CHUNK, setup.micro_batch * args.block_size * args.vocab_size)
    step = {
        ACTIVATIONS: args.blocks * (stream if setup.checkpointing else of_block) + stream // 4,
        TEMPORARY: max(logits, int((backward + setup.checkpointing) * of_block)),
    }
    if sharded:
        both = min(2, args.blocks) * block + numbers - args.blocks * block
        step[GATHERED] = width * (numbers if setup.strategy == "sdp" else both)
        step[WHOLE_GRADIENTS] = (width + summed) * block + (summed * numbers if waits else 0)
    elif half and not (setup.checkpointing and setup.compiled):  # autocast's, for the whole step
        step[COPIES] = 2 * args.blocks * block
    # Gradients are there before the backward pass: of earlier parts of the batch, or as DDP's buckets.
    early = setup.accumulation > 1 or (setup.gpus > 1 and not sharded)
    step[GRADIENTS] = 4 * held if early and not waits else 0
    fullest = max(fixed | step, fixed | {GRADIENTS: 4 * held}, key=lambda parts: sum(parts.values()))
    return {name: size for name, size in fullest.items() if size}


def parameters_of(args: "ModelArgs") -> tuple[int, int]:
    """Return the numbers of a model's parameters, and of one block's."""
    import torch

    from autoregressive.models.build import build_model

    with torch.device("meta"):
        model = build_model(args)
    return model.num_parameters, sum(p.numel() for p in model.layers[0].parameters())


def queries_of(args: "ModelArgs") -> int:
    """Return the query rows of a sample, a row for each token where a layout has such."""
    from autoregressive.models.layouts import LAYOUTS

    return args.block_size if LAYOUTS[args.layout_config["name"]].own_orders else 0


def block_bytes(args: "ModelArgs", setup: Setup) -> int:
    """Return the bytes that a block keeps for its backward pass of one row."""
    sharded, half = setup.strategy != "ddp", setup.precision in ("fp16", "bf16")
    width = 2 if half else 4
    dim, ffn, dropout = args.dim, args.ffn_dim, bool(args.resid_dropout_p) + bool(args.ffn_dropout_p)
    if args.trunk != "llama":
        return vit_bytes(args, width, half and not sharded)
    kept = (2 if half and sharded else 4) * dim  # the residual stream between attention and feed-forward
    kept += width * 2 * dim  # after the two norms
    kept += width * (1 + 2 * args.kv_heads / args.n_head) * dim  # queries, keys, values as they are projected
    kept += width * 4 * dim  # rotated queries and keys, and attention's result twice
    kept += width * 3 * ffn + dropout * dim  # gate, value and their product; dropout's masks, a byte each
    kept += 4 * args.n_head + 8  # attention's and the norms' sums
    if not setup.compiled:  # what a compiled block computes again
        kept += 8 * dim + width * ffn + (4 * dim if half and not sharded else 0)
    return int(kept)


def vit_bytes(args: "ModelArgs", width: int, autocast: bool) -> int:
    """Return the bytes that a LayerNorm block keeps for its backward pass of one row, computed operation by operation.

    width: of activations. autocast: whether the residual stream and the norms are float32 beside narrower activations.
    """
    wide = 4 if autocast else width
    kept = 2 * wide + 2 * width  # the stream before attention and feed-forward layer, and the norms' results
    kept += 5 * width + 2 * bool(
        args.resid_dropout_p
    )  # queries, keys, values, attention's result twice, dropout's masks
    if args.trunk == "rar":
        kept += 2 * wide + 2 * width  # norms that are scaled and shifted
        kept += 2 * width + 2 * wide * autocast  # normalised queries and keys, of float32 inputs
        kept += 9 * width  # both gated branches, the row's condition after SiLU and its six vectors
    return kept * args.dim + (2 * width + bool(args.ffn_dropout_p)) * args.ffn_dim


def setup_of(args: argparse.Namespace) -> Setup:
    """Return the set-up of a GPU that the flags ask for. Raises ValueError where batch or groups do not divide."""
    import torch

    from utils.distributed import Distributed
    from utils.training.parallel import Parallel

    parts = args.gpus * args.gradient_accumulation_steps
    if args.global_batch_size % parts:
        near = args.global_batch_size // parts * parts
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} cannot be split over --gpus {args.gpus} times "
            f"--gradient-accumulation-steps {args.gradient_accumulation_steps}; try {near or parts} or {near + parts}"
        )
    machine = min(args.gpus_per_node, args.gpus)
    dist = Distributed(torch.device("cpu"), world_size=args.gpus, local_world_size=machine)
    parallel = Parallel.from_args(args, dist, compile=args.compile)
    return Setup(
        parallel.strategy,
        parallel.precision,
        parallel.grad_precision,
        args.global_batch_size // parts,
        args.gradient_accumulation_steps,
        args.gpus,
        {"ddp": 1, "hsdp": parallel.group_size}.get(parallel.strategy, args.gpus),
        args.ema,
        parallel.activation_checkpointing,
        parallel.compile,
        parallel.sync_every_micro_batch,
    )


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a run: bytes, FLOPs, seconds."""
    from autoregressive.train.flops import training_flops_per_image
    from autoregressive.train.recipe import new_model
    from utils.flops import require_accelerator

    setup, card = setup_of(args), require_accelerator(args.gpu)
    data = {
        "vocab_size": GPT_SIZES[args.gpt_model].vocab_size,
        "num_classes": 1000,
        "cls_token_num": 1 if args.gpt_type == "c2i" else 120,
    }
    named = argparse.Namespace(**vars(args) | {name: getattr(args, name) or value for name, value in data.items()})
    model = new_model(named, grid_size(args.image_size, args.downsample_size))
    peak = card.peak_flops(setup.precision)
    if peak is None:
        raise ValueError(f"{card.name} has no {setup.precision} units; choose another --mixed-precision")
    if args.images < args.global_batch_size:
        raise ValueError(f"--images {args.images} are fewer than --global-batch-size {args.global_batch_size}")
    memory, room = training_memory(model.args, setup), int((args.gpu_memory_gib or card.memory) * GIB)
    flops = training_flops_per_image(model)
    seconds = args.global_batch_size * flops / (args.gpus * peak * args.mfu)
    steps = args.images // args.global_batch_size
    return {
        "setup": vars(setup),
        "parameters": model.num_parameters,
        "tokens_per_step": args.global_batch_size * model.args.block_size,
        "memory": memory,
        "memory_total": sum(memory.values()),
        "card": card.name,
        "card_bytes": room,
        "fits": sum(memory.values()) + ALLOWANCE <= room,
        "flops_per_image": flops,
        "step_seconds": seconds,
        "steps_per_epoch": steps,
        "run_seconds": seconds * steps * args.epochs,
    }


def describe(args: argparse.Namespace, plan: dict[str, Any]) -> Iterator[str]:
    """Yield the plan in lines."""
    setup = plan["setup"]
    how = f"{setup['strategy']}, {setup['precision']}" + ", activation checkpointing" * setup["checkpointing"]
    yield f"{args.gpt_model}, {args.image_size} pixels, {args.gpus} x {plan['card']}, {how}"
    yield f"parameters        {plan['parameters']:,}"
    yield f"micro-batch       {setup['micro_batch']} images a GPU, {setup['accumulation']} of them a step"
    yield f"tokens a step     {plan['tokens_per_step']:,} ({args.global_batch_size} images)"
    yield from ("", "memory of a GPU at its fullest")
    for name, size in (plan["memory"] | {"total": plan["memory_total"]}).items():
        yield f"  {name:<34}{size / GIB:9.2f} GiB"
    room = f"{plan['card_bytes'] / GIB:.0f} GiB, of which {ALLOWANCE / GIB:.0f} for context, workspaces and fragments"
    yield f"  {'fits' if plan['fits'] else 'DOES NOT FIT'} in {room}"
    if not plan["fits"]:
        yield "  try --activation-checkpointing, a larger --gradient-accumulation-steps, or --data-parallel fsdp"
    hours = plan["run_seconds"] / 3600
    yield from ("", f"model FLOPs       {plan['flops_per_image']:.3g} an image")
    yield f"a step            {plan['step_seconds']:.3f} s at {args.mfu:.0%} of peak (assumed, see --mfu)"
    yield f"an epoch          {hours / args.epochs:.2f} h, {plan['steps_per_epoch']:,} steps"
    yield f"the run           {hours:.1f} h, {args.epochs} epochs, {hours * args.gpus:,.0f} GPU hours"


def main(args: argparse.Namespace) -> None:
    from utils.files import write_json

    plan = make_plan(args)
    print("\n".join(describe(args, plan)))
    if args.json:
        write_json(args.json, plan)


def flags() -> argparse.ArgumentParser:
    """Return the script's flags: the training scripts' own, and the machine's."""
    parser = flag_parser(__doc__)
    add_gpt_flags(parser, GPT_SIZES, training=True)
    parser.set_defaults(cls_token_num=None)
    add_image_size_flags(parser, 256)
    add_parallel_flags(parser, "ddp")
    group = parser.add_argument_group("training")
    group.add_argument("--global-batch-size", type=positive_int, default=256, help="samples a step, over all GPUs")
    group.add_argument("--gradient-accumulation-steps", type=positive_int, default=1, help="parts of a GPU's share")
    precisions = ["none", "fp32", "tf32", "fp16", "bf16"]
    group.add_argument("--mixed-precision", choices=precisions, default="bf16", help="as in training")
    group.add_argument("--ema", action="store_true", help="keep an average of the weights")
    help = "blocks are not compiled: they keep more for backward"
    group.add_argument("--no-compile", dest="compile", action="store_false", help=help)
    group.add_argument("--images", type=positive_int, default=1281167, help="samples of the data set")
    group.add_argument("--epochs", type=positive_int, default=300, help="passes over them")
    group = parser.add_argument_group("machine")
    group.add_argument("--gpus", type=positive_int, default=8, help="over all machines")
    group.add_argument("--gpus-per-node", type=positive_int, default=8, help="of one machine: hsdp's groups")
    group.add_argument("--gpu", default="H100", help="which accelerator, as utils/flops.py names it")
    group.add_argument("--gpu-memory-gib", type=positive_float, default=None, help="its memory (default: the card's)")
    group.add_argument("--mfu", type=PORTION, default=0.4, help="share of the peak that training reaches")
    parser.add_argument("--json", default=None, help="also write the figures to this file")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
