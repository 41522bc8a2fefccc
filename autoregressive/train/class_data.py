"""Data of class-conditional training: codes with labels, and what they record of themselves."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoregressive.train.recipe import Inputs, agreed_tokenizer, model_sizes
from dataset.build import build_dataset
from dataset.codes import CodeDataset, open_codes
from utils.distributed import Distributed
from utils.logger import console_logger
from utils.origin import listed_classes, origin, require_same


class ClassData:
    """Codes to train on and those held out; fills in --num-classes and --vocab-size where they are not given."""

    collate = prepare = None

    def __init__(self, args: argparse.Namespace, dist: Distributed):
        self.args, self.dist, self.log = args, dist, console_logger("dataset", dist.is_main)
        self.codes = build_dataset(args)
        settings = self.codes.settings
        args.num_classes, args.vocab_size = model_sizes(args, self.codes.sizes())
        self.train = CheckedCodes(self.codes, args.code_path, args.num_classes, args.vocab_size)
        self._log_classes()
        told = {"tokenizer": settings.tokenizer, "classes": settings.classes} if settings else {}
        self.config = origin(**told, codes=self.codes.identity())
        self.held_out = None
        if args.val_code_path:
            held_out = open_codes(args.val_code_path, args.image_size, args.downsample_size, random_view=False)
            self._require_same_kind(held_out)
            self.held_out = CheckedCodes(held_out, args.val_code_path, args.num_classes, args.vocab_size)
        self.tokenizer = None
        if args.vq_ckpt:
            fingerprint = settings and settings.tokenizer
            self.tokenizer = agreed_tokenizer(args, dist, args.data_parallel != "ddp", fingerprint)

    def inputs(self, batch: list[Tensor]) -> Inputs:
        """Return a batch on the device as the model takes it."""
        return Inputs(*batch)

    def held_out_inputs(self, items: list[tuple]) -> Inputs:
        """Return items of `held_out` as the model takes them, on the device."""
        codes, labels = zip(*items, strict=True)
        return Inputs(torch.stack(codes).to(self.dist.device), torch.tensor(labels, device=self.dist.device))

    def shown(self) -> tuple[Tensor, None] | None:
        """Return eight labels to draw pictures of while training; None without a tokenizer."""
        labels = torch.arange(8, device=self.dist.device) * self.args.num_classes // 8
        return (labels, None) if self.args.vq_ckpt else None

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


class CheckedCodes:
    """A data set of codes that the model has rows for; ValueError where it records others, or where one turns up.

    The published layout records nothing, and a label too large by one would pass for "no class".
    """

    def __init__(self, data: CodeDataset, path: str, num_classes: int, vocab_size: int):
        self.data, self.path, self.num_classes, self.vocab_size = data, path, num_classes, vocab_size
        settings = data.settings
        if settings and (settings.num_classes or 0) > num_classes:
            raise ValueError(
                f"{path} has {settings.num_classes} classes, more than {num_classes}; pass --num-classes "
                f"{settings.num_classes}, and --finetune too where training begins with the weights of another model"
            )
        if settings and settings.codebook_size > vocab_size:
            raise ValueError(
                f"{path} was made with {settings.codebook_size} codes; pass --vocab-size {settings.codebook_size}"
            )

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int) -> None:
        self.data.set_epoch(epoch)

    def sample_numbers(self, indices: Sequence[int]) -> list[int]:
        """Return the numbers that extraction gave these samples: unreadable images count too."""
        return self.data.sources[0].numbers[list(indices)].tolist()

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple]:
        items = self.data.__getitems__(indices)
        for index, (codes, label) in zip(indices, items, strict=True):
            if not 0 <= label < self.num_classes:
                raise ValueError(
                    f"sample {index} of {self.path} has label {label}, not below --num-classes {self.num_classes}"
                )
            if not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
                raise ValueError(
                    f"sample {index} of {self.path} has codes from {codes.min()} to {codes.max()}, "
                    f"not below --vocab-size {self.vocab_size}"
                )
        return items
