"""Recipe of a GPT's training: the parts that class-conditional and text-conditional training share.

dist, plan = join(args)
data = ClassData(args, dist)                       # or TextData: what is read, and how a batch becomes Inputs
fit(args, plan, data, new_model(args, grid))
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from autoregressive.class_names import class_names
from autoregressive.models.build import build_gpt
from autoregressive.models.generate import generate, release_cache
from autoregressive.models.sampling import SamplingConfig
from autoregressive.models.trunk import Conditions, Trunk
from autoregressive.released import find_identity, flags_of
from autoregressive.train.contrast import STEP_FLOPS, Contrast, ContrastLoss, NegativesOfNext
from autoregressive.train.control import condition_settings
from autoregressive.train.evaluation import mean_over, own_orders, require_readable
from autoregressive.train.flags import held_out_flag
from autoregressive.train.flops import training_flops_per_image
from autoregressive.train.lora import Lora
from autoregressive.train.loss import TokenLoss, dropped_conditions
from autoregressive.train.objectives import OBJECTIVES
from autoregressive.train.orders import OrderSchedule, training_orders
from autoregressive.train.start import starting_point
from dataset.arrays import condition_folders
from dataset.codes import recorded_size
from tokenizer.base import Tokenizer
from tokenizer.load import load_tokenizer
from utils.checkpoint import read_checkpoint
from utils.cli import given, layout_numbers, settle, tokenizer_beliefs
from utils.distributed import Distributed, start
from utils.images import labelled_grid, make_grid, to_uint8
from utils.rng import image_noise, item_seed, order_seed
from utils.runs import find_checkpoint, runs_in
from utils.training.job import Job, Micro, Phase
from utils.training.optim import adamw
from utils.training.parallel import Parallel, materialize
from utils.training.trainer import Trainer


@dataclass(frozen=True)
class Inputs:
    """A micro-batch as the model takes it."""

    codes: Tensor  # int64 (B, N) in raster order
    cond: Conditions
    prefix_mask: Tensor | None = None  # as Trunk.forward takes it
    valid: Tensor | None = None  # (B,), samples marked 0 do not count
    # Factor that makes the mean of micro-batches that of all valid samples (share_of_valid).
    share: Tensor | None = None


def further_conditions(args: argparse.Namespace) -> list[str]:
    """Return the names of --condition.

    Raises ValueError where --condition-path, or --val-condition-path of held-out data, does not give the data of each.
    """
    names = [condition["name"] for condition in args.condition]
    flag, held_out = held_out_flag(args)
    if args.val_condition_path and not held_out:
        raise ValueError(f"--val-condition-path {args.val_condition_path[0]} needs {flag} too")
    needed = [name for name in names if not (name == "control" and args.control_of_images)]
    for flag, words, stored in (
        ("condition", args.condition_path, needed),
        ("val-condition", args.val_condition_path, needed if held_out else []),
    ):
        if sorted(condition_folders(words)) != sorted(stored):
            wanted = " ".join(f"--{flag}-path {name}=FOLDER" for name in stored) or f"no --{flag}-path"
            raise ValueError(f"--{flag}-path gives {', '.join(words or ()) or 'nothing'}; this model takes {wanted}")
    return names


def join(args: argparse.Namespace) -> tuple[Distributed, Parallel]:
    """Join the processes of the run, and return the plan to lay a model over them."""
    OBJECTIVES[args.objective]  # refuses one that is not registered
    dist = start(args.device, args.data_parallel != "ddp", args.timeout_minutes, args.deterministic)
    return dist, Parallel.from_args(args, dist, compile=not args.no_compile)


def known_sizes(args: argparse.Namespace) -> None:
    """Set --image-size and --downsample-size, where they are not given, to those of the codes.

    Without codes the size of a token stays open until the tokenizer is read (`agreed_tokenizer`).
    """
    image, token = recorded_size(args.code_path) if args.code_path else (None, None)
    settle(args, image_size=image)
    if args.code_path:
        settle(args, downsample_size=token)


def known_model(args: argparse.Namespace) -> dict[str, Any]:
    """Set --gpt-model, where it is not given, to that of the run to resume or of --gpt-ckpt.

    Returns the flags that the run to resume began with, {} for a new run.
    """
    runs = runs_in(args.results_dir) if args.resume else []
    own = [run for run in runs if run.folder.name.split("-", 1)[1] == args.gpt_model]
    if not own and given(args.gpt_model) is None:
        own = [run for run in runs if run.flags().get("gpt_type") == args.gpt_type]
    resumed = own[0].flags() if own else {}
    asks_file = not own and given(args.gpt_model) is None
    settle(args, gpt_model=(_flags_of_file(args) if asks_file else resumed).get("gpt_model"))
    args.random_orders = args.random_orders or resumed.get("random_orders")
    return resumed


def _flags_of_file(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the file that training begins with says of its model, {} without one."""
    path = getattr(args, "gpt_resume", None) or args.gpt_ckpt
    return flags_of(find_identity(read_checkpoint(find_checkpoint(path)))) if path else {}


def new_model(args: argparse.Namespace, grid: int, **more: object) -> Trunk:
    """Return the model that the flags describe, on the meta device. more: further fields of ModelArgs.

    Raises ValueError where the first group of --ar-token-num, whose tokens are read one by one, is the whole image.
    """
    ar_token_num, spe_token_num = layout_numbers(args)
    if args.layout and (ar_token_num or 1) > 1:
        raise ValueError(
            f"--layout {args.layout['name']} and --ar-token-num {ar_token_num} both say the order; give one"
        )
    if (ar_token_num or 1) == grid**2 > 1:
        raise ValueError(
            f"--ar-token-num {ar_token_num} is all of the {grid}x{grid} tokens: the first {ar_token_num} are predicted one by "
            "one, and none would be left to predict together; choose a smaller square, or 1 for raster"
        )
    drop_path_rate = getattr(args, "drop_path", 0) or args.drop_path_rate
    dropout = 0.0 if drop_path_rate > 0 else args.dropout_p  # stochastic depth replaces them
    with torch.device("meta"):
        return build_gpt(
            args.gpt_model,
            vocab_size=args.vocab_size,
            block_size=grid**2,
            num_classes=args.num_classes,
            cls_token_num=args.cls_token_num,
            model_type=args.gpt_type,
            resid_dropout_p=dropout,
            ffn_dropout_p=dropout,
            token_dropout_p=args.token_dropout_p,
            drop_path_rate=drop_path_rate,
            spe_token_num=spe_token_num or 0,
            ar_token_num=ar_token_num or 1,
            layout=args.layout,
            target_positions=any(args.random_orders or ()),
            extra_conditions=condition_settings(args),
            **more,
        )


def fit(
    args: argparse.Namespace,
    plan: Parallel,
    data: Any,
    model: Trunk,
    orders: OrderSchedule | None = None,
    rate: Callable[[int, int], float] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Train a model from the meta device.

    data: a ClassData, a TextData, or an object with their attributes: what is read, and how a batch becomes Inputs.
    orders: what each step reads by (default: the model's layout, or --random-orders). rate: as Job has it. notes: for the log.
    """
    dist = plan.dist
    orders = orders or training_orders(args, model.layout, len(data.train))
    contrast, lora = Contrast.from_args(args), Lora.from_args(args)
    config = data.config | model.args.identity | {"objective": args.objective}
    if contrast:
        config |= contrast.config(config)
    if lora:
        config |= lora.config(lora.add(model))
    wrapped = lay_out(model, plan, args, contrast)
    initial, note = starting_point(args, dist, model, config)
    if lora:
        lora.take(model, initial, args.global_seed)
        initial = None
    shown, names = data.shown(), data.config.get("classes")
    if data.held_out is not None:
        require_readable(data.held_out, dist)
    prepare, cost, dropped = data.prepare, 1.0, model.args.class_dropout_prob
    if contrast:
        prepare, cost, dropped = NegativesOfNext([*model.conditions], dist), STEP_FLOPS, contrast.uncond
        notes = [*notes, contrast.describe()]
    step = StepLoss(wrapped, data, orders, args.global_seed, dropped)
    rates: dict[str, Any] = {}
    if not getattr(args, "random_sides", None):  # else steps differ in their tokens
        rates["tokens"] = model.args.block_size
        rates["flops"] = lambda step, epoch: cost * training_flops_per_image(model, orders(step, epoch, slice(0), 1)[0])
    job = Job(
        args.gpt_model,
        models={"model": model},
        phases=[Phase("optimizer", wrapped, adamw(model, args, model.decays), step)],
        dataset=data.train,
        initial=initial,
        validate=None if data.held_out is None else HeldOut(data, args, dist),
        sample=Preview(data.tokenizer, *shown, args, dist, names) if shown else None,
        rate=rate,
        collate=data.collate,
        prepare=prepare,
        config=config,
        **rates,
    )
    trainer = Trainer(args, plan, job)
    for line in filter(None, (note, *notes)):
        trainer.log.info(line)
    trainer.fit()
    dist.close()


def lay_out(model: Trunk, plan: Parallel, args: argparse.Namespace, contrast: Contrast | None = None) -> nn.Module:
    """Return the loss of a model from the meta device, laid over the processes, with initial weights."""
    if args.second_exit_only:
        if model.layout.heads == 1 or not (args.gpt_ckpt or args.resume):
            raise ValueError(
                "--second-exit-only trains what a raster file lacks: give --layout neighbours and --gpt-ckpt FILE"
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(model.of_second_exit(name) is not None)
    loss = contrast.loss(model) if contrast else TokenLoss(model, OBJECTIVES[args.objective])
    blocks = [*model.layers, *(loss.reference.layers if isinstance(loss, ContrastLoss) else ())]

    def begin() -> None:
        materialize(model, plan.dist.device, args.global_seed)
        if isinstance(loss, ContrastLoss):
            contrast.materialize(loss, plan.dist.device)

    if not plan.sharded:
        begin()
    wrapped = plan.apply(loss, blocks=blocks)
    if plan.sharded:  # only now, so that no process ever holds the whole model
        begin()
    return wrapped


@dataclass(frozen=True)
class StepLoss:
    """Loss of a micro-batch: some of its samples lose their condition, drawn by the step's number.

    wrapped: TokenLoss, or with CCA ContrastLoss. dropped: the probability that a sample loses its condition.
    """

    wrapped: nn.Module
    data: Any
    orders: OrderSchedule
    seed: int
    dropped: float

    def __call__(self, batch: Any, place: Micro) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = self.data.inputs(batch)
        device, seed = inputs.codes.device, item_seed(self.seed, place.step)
        drop = dropped_conditions(seed, place.global_batch, place.positions, self.dropped, device)
        layout, orders = self.orders(place.step, place.epoch, place.positions, place.global_batch)
        orders = None if orders is None else orders.to(device, non_blocking=True)
        read = {"drop": drop, "layout": layout, "orders": orders}
        if "negatives" in batch:
            loss, figures = self.wrapped(inputs.codes, inputs.cond, batch["negatives"], **read)
            return loss, {"loss": loss, **figures}
        loss = self.wrapped(inputs.codes, inputs.cond, prefix_mask=inputs.prefix_mask, valid=inputs.valid, **read)
        if inputs.share is not None:
            loss = loss * inputs.share
        return loss, {"loss": loss} | ({} if inputs.valid is None else {"valid": inputs.valid.float().mean()})


class HeldOut:
    """Mean cross-entropy of the held-out data, whatever the objective of training."""

    def __init__(self, data: Any, args: argparse.Namespace, dist: Distributed):
        self.data, self.dist = data, dist
        self.batch_size = max(args.global_batch_size // (dist.world_size * args.gradient_accumulation_steps), 1)

    def __call__(self, model: Trunk) -> dict[str, float]:
        loss = TokenLoss(model)

        def mean(items: list[Any]) -> tuple[Tensor, Tensor | int]:
            inputs = self.data.held_out_inputs(items)
            orders = own_orders(model, inputs.codes)
            value = loss(inputs.codes, inputs.cond, prefix_mask=inputs.prefix_mask, valid=inputs.valid, orders=orders)
            return value, len(items) if inputs.valid is None else inputs.valid.sum()

        return {"val_loss": mean_over(mean, self.data.held_out, self.batch_size, self.dist)}


@dataclass(frozen=True)
class Preview:
    """Pictures of a model in training; called where the tokenizer is.

    cond, emb_masks: as `generate` takes them. names: of the classes, where the first condition is a class.
    """

    tokenizer: Tokenizer | None
    cond: Conditions
    emb_masks: Tensor | None
    args: argparse.Namespace
    dist: Distributed
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        SamplingConfig(cfg_scale=self.args.sample_cfg_scale)  # refuses a scale that no picture can be drawn with

    def __call__(self, model: Trunk) -> dict[str, np.ndarray]:
        first = next(iter(self.cond.values())) if isinstance(self.cond, Mapping) else self.cond
        seed, layout, numbers = self.args.global_seed, model.layout, range(len(first))
        noise = image_noise(seed, numbers, layout.tokens).to(self.dist.device)
        orders = None
        if layout.own_orders:
            orders = torch.stack([layout.draw_order(order_seed(seed, i)) for i in numbers])
        asked: dict[str, Any] = {"emb_masks": self.emb_masks, "orders": orders, "noise": noise}
        try:
            drawn = generate(model, self.cond, cfg_scale=self.args.sample_cfg_scale, **asked)
        finally:
            release_cache(model)
        with torch.inference_mode():
            images = self.tokenizer.to_pixels(drawn.view(-1, layout.grid_size, layout.grid_size))
        pixels = to_uint8(images)
        if self.names:  # of which a model can have more rows than the data has classes
            names = class_names(model.args.num_classes, recorded=self.names)
            return {"samples": labelled_grid(pixels, [names[label] for label in first.tolist()], columns=4)}
        return {"samples": make_grid(pixels, columns=4)}


def agreed_tokenizer(
    args: argparse.Namespace, dist: Distributed, everywhere: bool, fingerprint: str | None
) -> Tokenizer | None:
    """Return the tokenizer of --vq-ckpt on the first process, or `everywhere`; None on processes that need none.

    fingerprint: of the tokenizer that made the codes, where they record it.
    Raises AgreedError on all of them where one cannot read it, or it is of other codes than the model's.
    """
    with dist.main_first():
        path = find_checkpoint(args.vq_ckpt)
    tokenizer = None
    with dist.together():  # the others would wait for the first
        if dist.is_main or everywhere:
            beliefs = tokenizer_beliefs(args)
            tokenizer = load_tokenizer(path, device=dist.device, fingerprint=fingerprint, **beliefs)
            codes, pixels = tokenizer.codebook_size, tokenizer.downsample
            settle(args, downsample_size=pixels)
            if (codes, pixels) != (args.vocab_size or codes, args.downsample_size):
                raise ValueError(
                    f"--vq-ckpt {path} has {codes} codes of {pixels}x{pixels} pixels, not --vocab-size {args.vocab_size} "
                    f"--downsample-size {args.downsample_size}"
                )
    return tokenizer


def model_sizes(args: argparse.Namespace, recorded: Mapping[str, Any]) -> tuple[int, int]:
    """Return the classes and the codes that the model has rows for.

    In this order: the flags; the run or file that training continues; what the codes record; the published numbers.
    With --finetune the classes are those of the codes.
    """
    runs = runs_in(args.results_dir, args.gpt_model) if args.resume else []
    before = runs[0].flags() if runs else _flags_of_file(args)
    classes = [before.get("num_classes"), recorded.get("num_classes")]
    if args.finetune:
        classes.reverse()
    return (
        args.num_classes or classes[0] or classes[1] or 1000,
        args.vocab_size or before.get("vocab_size") or recorded.get("codebook_size") or 16384,
    )
