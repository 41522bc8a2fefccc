"""Data of class-conditional training: codes with labels, and what they record of themselves."""

import argparse
from functools import partial

import torch
from torch import Tensor

from autoregressive.models.gpt import Conditions
from autoregressive.train.recipe import Inputs, agreed_tokenizer, further_conditions, model_sizes
from dataset.arrays import codes_of, collate
from dataset.codes import CODES, CodeDataset
from language.features import left_padded
from utils.distributed import Distributed
from utils.logger import console_logger
from utils.origin import listed_classes, origin, require_same


class ClassData:
    """Codes to train on and those held out; fills in --num-classes and --vocab-size where they are not given."""

    prepare = None

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        self.args, self.dist, self.log = args, dist, console_logger("dataset", dist.is_main)
        self.further = further_conditions(args, args.val_code_path)
        if args.dataset != CODES:
            raise ValueError(f"train_c2i.py reads --dataset {CODES}, got {args.dataset!r}")
        self.train = self.codes = codes_of(args)
        settings = self.codes.settings
        args.num_classes, args.vocab_size = model_sizes(args, self.codes.sizes())
        self.codes.limit(args.num_classes, args.vocab_size)
        self.collate = partial(collate, rows=self.codes.rows(), pad=left_padded)
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
