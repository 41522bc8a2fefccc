"""Plan of a training run before it is started: parameters, memory of each GPU by part, FLOPs and hours.

python3 tools/plan_training.py --gpt-model GPT-3B --gpus 32 --image-size 384 --data-parallel fsdp

Needs no GPU and allocates nothing. Memory: autoregressive/train/memory.py; FLOPs: autoregressive/train/flops.py.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from autoregressive.models.sizes import GPT_SIZES
from utils.cli import (
    PORTION,
    add_gpt_flags,
    add_image_size_flags,
    add_parallel_flags,
    flag_parser,
    grid_size,
    positive_float,
    positive_int,
    run_script,
)

if TYPE_CHECKING:
    from autoregressive.train.memory import Memory, Setup

GIB = 2**30
# The driver's context, the workspaces of cuBLAS and NCCL, and what the allocator cannot join (assumed).
ALLOWANCE = 2 * GIB


@dataclass(frozen=True)
class Plan:
    """The figures of a run. Bytes, FLOPs, seconds; `stages` are (epochs, patch side, FLOPs an image)."""

    setup: "Setup"
    parameters: int
    memory: "Memory"
    card: str
    card_bytes: int
    batch: int
    tokens_per_step: int
    steps_per_epoch: int
    epochs: int
    stages: list[tuple[int, int, float]]
    flops_per_second: float  # of all GPUs at the assumed utilisation

    @property
    def fits(self) -> bool:
        """Tell whether a GPU has room for it, and for what no plan can see."""
        return self.memory.total + ALLOWANCE <= self.card_bytes

    @property
    def step_flops(self) -> float:
        """Model FLOPs of a step over single tokens, the last stage's."""
        return self.batch * self.stages[-1][2]

    @property
    def step_seconds(self) -> float:
        """Return the seconds of that step."""
        return self.step_flops / self.flops_per_second

    @property
    def run_seconds(self) -> float:
        """Return the seconds of all epochs, each with the FLOPs of its stage."""
        images = self.batch * self.steps_per_epoch
        return sum(epochs * images * flops for epochs, _, flops in self.stages) / self.flops_per_second

    def record(self) -> dict[str, Any]:
        """Everything, for a file."""
        derived = ("fits", "step_flops", "step_seconds", "run_seconds")
        record = asdict(self) | {name: getattr(self, name) for name in derived}
        record["memory"]["total"] = self.memory.total
        return record


def model_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags with what training takes from the data in place of what was not given."""
    given = vars(args)
    data = {"vocab_size": 16384, "num_classes": 1000, "cls_token_num": 1 if args.gpt_type == "c2i" else 120}
    return argparse.Namespace(**given | {name: given[name] or value for name, value in data.items()})


def setup_of(args: argparse.Namespace) -> "Setup":
    """Return the set-up of a GPU that the flags ask for. Raises ValueError where batch or groups do not divide."""
    import torch

    from autoregressive.train.memory import Setup
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


def make_plan(args: argparse.Namespace, setup: "Setup | None" = None) -> Plan:
    """Return the plan of the flags, or of another setup in their place."""
    from autoregressive.models.layouts.patches import with_patches
    from autoregressive.train.flops import training_flops_per_image
    from autoregressive.train.memory import training_memory
    from autoregressive.train.next_patch import PatchSchedule
    from autoregressive.train.recipe import new_model
    from utils.flops import require_accelerator

    setup, card = setup or setup_of(args), require_accelerator(args.gpu)
    grid = grid_size(args.image_size, args.downsample_size)
    model = new_model(model_flags(args), grid)
    patches = PatchSchedule(args.epochs, args.patch_level, args.epoch_rate)
    patches.check_grid(grid)
    stages = []
    for stage in patches.stages:
        flops = training_flops_per_image(model.args, with_patches(model.layout, stage.patch_side))
        stages.append((stage.end - stage.start, stage.patch_side, flops))
    peak = card.peak_flops(setup.precision)
    if peak is None:
        raise ValueError(f"{card.name} has no {setup.precision} units; choose another --mixed-precision")
    if args.images < args.global_batch_size:
        raise ValueError(f"--images {args.images} are fewer than --global-batch-size {args.global_batch_size}")
    return Plan(
        setup,
        model.num_parameters,
        training_memory(model.args, setup),
        card.name,
        int((args.gpu_memory_gib or card.memory) * GIB),
        args.global_batch_size,
        args.global_batch_size * model.args.block_size,
        args.images // args.global_batch_size,
        args.epochs,
        stages,
        args.gpus * peak * args.mfu,
    )


def remedies(args: argparse.Namespace, setup: "Setup") -> Iterator[tuple[str, Plan]]:
    """Yield flags that make a plan fit, and the plan: of each kind the first number of parts, doubled, that is enough."""
    whole = setup.micro_batch * setup.accumulation
    sharded = replace(setup, strategy="fsdp", shard=setup.gpus)
    for words, base in ((), setup), *[(("--data-parallel fsdp",), sharded)] * (setup.gpus > 1 and setup != sharded):
        for checkpointing in sorted({setup.checkpointing, True}):
            more = ("--activation-checkpointing",) * (checkpointing > setup.checkpointing)
            doubled = (setup.accumulation * 2**power for power in range(whole.bit_length()))
            for parts in (n for n in doubled if whole % n == 0):
                tried = replace(base, checkpointing=checkpointing, accumulation=parts, micro_batch=whole // parts)
                plan = make_plan(args, tried)
                if plan.fits:
                    last = (f"--gradient-accumulation-steps {parts}",) * (parts > setup.accumulation)
                    yield " ".join((*words, *more, *last)), plan
                    break


def describe(args: argparse.Namespace, plan: Plan) -> Iterator[str]:
    """Yield the plan in lines."""
    setup = plan.setup
    how = f"{setup.strategy}, {setup.precision}" + ", activation checkpointing" * setup.checkpointing
    yield f"{args.gpt_model}, {args.image_size} pixels, {setup.gpus} x {plan.card}, {how}"
    yield f"parameters        {plan.parameters:,}"
    yield f"micro-batch       {setup.micro_batch} images a GPU, {setup.accumulation} of them a step"
    yield f"tokens a step     {plan.tokens_per_step:,} ({plan.batch} images)"
    yield ""
    yield f"memory of a GPU at its fullest, in {plan.memory.at}"
    for name, size in plan.memory.parts.items():
        yield f"  {name:<34}{size / GIB:9.2f} GiB"
    yield f"  {'total':<34}{plan.memory.total / GIB:9.2f} GiB"
    room = f"{plan.card_bytes / GIB:.0f} GiB, of which {ALLOWANCE / GIB:.0f} for context, workspaces and fragments"
    yield f"  {'fits' if plan.fits else 'DOES NOT FIT'} in {room}"
    yield ""
    for epochs, side, flops in plan.stages:
        of = f", {epochs} epochs of {side}x{side} patches" if len(plan.stages) > 1 else ""
        yield f"model FLOPs       {flops:.3g} an image, {flops * plan.batch:.3g} a step{of}"
    per_epoch = plan.run_seconds / plan.epochs / 3600
    yield f"a step            {plan.step_seconds:.3f} s at {args.mfu:.0%} of peak (assumed, see --mfu)"
    yield f"an epoch          {per_epoch:.2f} h, {plan.steps_per_epoch:,} steps"
    yield (
        f"the run           {plan.run_seconds / 3600:.1f} h, {plan.epochs} epochs, "
        f"{plan.run_seconds / 3600 * setup.gpus:,.0f} GPU hours"
    )
    if plan.fits:
        return
    yield ""
    found = list(remedies(args, plan.setup))
    yield "what would fit:" if found else "nothing that this tool tries would fit: take more GPUs, or larger ones"
    for words, other in found:
        yield f"  {words:<70}{other.memory.total / GIB:7.1f} GiB"


def main(args: argparse.Namespace) -> None:
    from utils.files import write_json

    plan = make_plan(args)
    for line in describe(args, plan):
        print(line)
    if args.json:
        write_json(args.json, plan.record())


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
    group.add_argument(
        "--mixed-precision", choices=["none", "fp32", "tf32", "fp16", "bf16"], default="bf16", help="as in training"
    )
    group.add_argument("--ema", action="store_true", help="keep an average of the weights")
    group.add_argument(
        "--no-compile",
        dest="compile",
        action="store_false",
        help="blocks are not compiled: they keep more for backward",
    )
    group.add_argument("--patch-level", type=positive_int, default=1, help="stages of Next-Patch-Prediction (1: off)")
    group.add_argument("--epoch-rate", type=PORTION, default=0.5, help="where its stages end")
    group.add_argument("--images", type=positive_int, default=1281167, help="samples of the data set")
    group.add_argument("--epochs", type=positive_int, default=300, help="passes over them")
    group = parser.add_argument_group("machine")
    group.add_argument("--gpus", type=positive_int, default=8, help="over all machines")
    group.add_argument("--gpus-per-node", type=positive_int, default=8, help="of one machine: hsdp's groups")
    group.add_argument("--gpu", default="H100", help="which accelerator, as utils/flops.py names it")
    group.add_argument(
        "--gpu-memory-gib", type=positive_float, default=None, help="its memory (default: that of the card)"
    )
    group.add_argument("--mfu", type=PORTION, default=0.4, help="share of the peak that training reaches")
    parser.add_argument("--json", default=None, help="also write the figures to this file")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
