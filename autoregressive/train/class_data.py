"""Class-conditional training: what train_c2i.py and train_c2i_fsdp.py do, and its data, codes with labels."""

import argparse
from functools import partial

import torch
from torch import Tensor

from autoregressive.models.layouts import Layout
from autoregressive.models.trunk import Conditions
from autoregressive.train.contrast import check_contrast
from autoregressive.train.control import ask_control
from autoregressive.train.next_patch import PatchSchedule
from autoregressive.train.recipe import (
    Inputs,
    agreed_tokenizer,
    fit,
    further_conditions,
    join,
    known_model,
    known_sizes,
    model_sizes,
    new_model,
)
from dataset.arrays import codes_of, collate
from dataset.codes import CODES, CodeDataset
from utils.cli import grid_size, layout_numbers
from utils.distributed import Distributed
from utils.logger import console_logger
from utils.origin import listed_classes, origin, require_same
from utils.training.order import fit_batch


def train_classes(args: argparse.Namespace) -> None:
    """Train a class-conditional GPT as the flags say: raster, parallel layout, or next-patch prediction."""
    known_sizes(args)
    grid = grid_size(args.image_size, args.downsample_size)
    layout_numbers(args)  # refuses two that do not go together
    if args.gpt_type != "c2i":
        raise ValueError("train_c2i.py trains class-conditional models; for captions there is train_t2i.py")
    if args.scheduler and (args.lr_schedule != "constant" or args.warmup_steps):
        raise ValueError(
            "--scheduler is a learning-rate schedule of its own: leave out --lr-schedule and --warmup-steps"
        )
    ask_control(args)
    patches = PatchSchedule.from_args(args)
    patches.check_grid(grid)
    check_contrast(args)

    dist, plan = join(args)
    resumed = known_model(args)
    data = ClassData(args, dist)
    notes = fit_batch(args, len(data.train), dist.world_size, resumed)
    patches = patches.for_run(len(data.train), args)
    model = new_model(args, grid)
    if args.patch_level > 1 and args.random_orders:
        raise ValueError("--patch-level and --random-orders both say what a step reads by; give one")
    orders = patches.layouts(model.layout) if args.patch_level > 1 else None
    rate = patches.learning_rate if args.scheduler else None
    fit(args, plan, data, model, orders, rate, notes=notes + order_in_words(patches, model.layout))


def order_in_words(patches: PatchSchedule, layout: Layout) -> list[str]:
    """Return lines on what is predicted together and when, beside what PAR's and NPP's own scripts do without a flag."""
    if not layout.is_raster:
        most, steps = max(layout.groups), len(layout.groups)
        words = f"layout {layout.config['name']}: {most} tokens a step at most, {steps} steps"
        return [f"{words} where it draws; trained in random orders and groups" if layout.own_orders else words]
    if patches.patch_level > 1:
        skipped = [
            f"patches of {side}x{side} tokens get no part of the training: --patch-level {patches.patch_level} skips them"
            for side in patches.skipped_sides
        ]
        return [f"next-patch prediction: {patches.describe()}", *skipped]
    return [
        "raster order, single tokens; PAR's own default is --ar-token-num 4 --image-size 384, NPP's own is --patch-level 2 "
        "(its train_c2i_fsdp.py: --patch-level 4 --epoch-rate 0.67)"
    ]


class ClassData:
    """Codes to train on and those held out; fills in --num-classes and --vocab-size where they are not given."""

    prepare = None

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        self.args, self.dist, self.log = args, dist, console_logger("dataset", dist.is_main)
        self.further = further_conditions(args)
        if args.dataset != CODES:
            raise ValueError(f"train_c2i.py reads --dataset {CODES}, got {args.dataset!r}")
        self.train = self.codes = codes_of(args)
        settings = self.codes.settings
        args.num_classes, args.vocab_size = model_sizes(args, self.codes.sizes())
        self.codes.limit(args.num_classes, args.vocab_size)
        self.collate = partial(collate, rows=self.codes.rows())
        self._log_classes()
        told = {"tokenizer": settings.tokenizer, "classes": settings.classes} if settings else {}
        self.config = origin(**told, codes=self.codes.identity())
        self.held_out = None
        if args.val_code_path:
            held_out = {"code_path": args.val_code_path, "condition_path": args.val_condition_path}
            self.held_out = codes_of(argparse.Namespace(**vars(args) | held_out), random_view=False)
            self._require_same_kind(self.held_out)
            self.held_out.limit(args.num_classes, args.vocab_size)
        self.tokenizer = None
        if args.vq_ckpt:
            fingerprint = settings and settings.tokenizer
            self.tokenizer = agreed_tokenizer(args, dist, args.data_parallel != "ddp", fingerprint)

    def inputs(self, batch: dict[str, Tensor]) -> Inputs:
        """Return a batch on the device as the model takes it."""
        return Inputs(batch["codes"], {name: batch[name] for name in ("label", *self.further)})

    def held_out_inputs(self, items: list[dict]) -> Inputs:
        """Return items of `held_out` as the model takes them, on the device."""
        return self.inputs({name: value.to(self.dist.device) for name, value in self.collate(items).items()})

    def shown(self) -> tuple[Conditions, None] | None:
        """Return eight labels to draw pictures of while training, or the conditions of eight samples; None without a tokenizer."""
        if not self.args.vq_ckpt:
            return None
        if self.further:
            data = self.held_out or self.codes
            return self.held_out_inputs([data[i] for i in range(min(8, len(data)))]).cond, None
        return torch.arange(8, device=self.dist.device) * self.args.num_classes // 8, None

    def _log_classes(self) -> None:
        """Write down which label has which name, and where the model has more rows than the codes have classes."""
        settings, known = self.codes.settings, self.codes.sizes().get("num_classes")
        if settings and settings.classes:
            self.log.info(f"classes: {listed_classes(settings.classes)}")
        if known != self.args.num_classes:
            told = known or "does not say how many"
            self.log.info(f"the model has {self.args.num_classes} classes, and {self.args.code_path} {told}")

    def _require_same_kind(self, held_out: CodeDataset) -> None:
        """Raise ValueError where held-out codes are of another tokenizer or other classes than those of training."""
        paths = self.args.code_path, self.args.val_code_path
        one, other = ({} if s is None else vars(s) for s in (self.codes.settings, held_out.settings))
        unknown = require_same(
            one,
            other,
            ("tokenizer", "classes", "num_classes"),
            (f"--code-path {paths[0]}", f"--val-code-path {paths[1]}"),
            f"extract the held-out images by the same tokenizer, with --classes-of {paths[0]}",
        )
        if unknown:
            words = " and ".join(key.replace("_", " ") for key in unknown)
            self.log.info(f"{paths[1]} and {paths[0]}: one of them records no {words}: not compared")
