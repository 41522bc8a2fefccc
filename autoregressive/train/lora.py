"""LoRA: fine-tuning of low-rank additions to a frozen model's attention and feed-forward matrices, by peft.

The table of the classes is trained and kept too, since new data has other classes. LoRA (arXiv 2106.09685).
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from autoregressive.models.trunk import Trunk
from autoregressive.released import CLASS_TABLE
from autoregressive.systems import LPD_TABLE, RAR_TABLE
from utils.checkpoint import Checkpoint, read_checkpoint, weights_fingerprint
from utils.hub import is_released
from utils.rng import item_seed
from utils.runs import find_checkpoint
from utils.training.parallel import SeededNormal
from utils.training.state import fill


@dataclass(frozen=True)
class Lora:
    """An adapter as the flags ask for it.

    name: of the base, as --gpt-ckpt gives it. use_ema: adapt its averaged weights. whole: modules that are trained whole.
    """

    name: str
    rank: int
    alpha: float
    dropout: float
    use_ema: bool
    whole: tuple[str, ...] = ()

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Lora | None":
        """Return what --lora-rank and the flags beside it ask for; None without it. Raises ValueError for flags it needs."""
        if args.lora_rank is None:
            for flag in ("lora_alpha", "lora_dropout", "lora_whole"):
                if getattr(args, flag):
                    raise ValueError(f"--{flag.replace('_', '-')} needs --lora-rank")
            return None
        name = getattr(args, "gpt_resume", None) or args.gpt_ckpt
        if not (args.finetune and name) or args.second_exit_only:
            raise ValueError("--lora-rank adapts a model: give --finetune --gpt-ckpt FILE, and no --second-exit-only")
        alpha, whole = args.lora_alpha or 2.0 * args.lora_rank, tuple(args.lora_whole or ())
        return cls(name, args.lora_rank, alpha, args.lora_dropout, args.use_ema, whole)

    @cached_property
    def path(self) -> Path:
        """The base's file."""
        return find_checkpoint(self.name)

    @cached_property
    def base(self) -> Checkpoint:
        """The base, `model` being the weights that are adapted."""
        return read_checkpoint(self.path, prefer_ema=self.use_ema)

    def add(self, model: Trunk) -> list[str]:
        """Add the adapter to a model on the meta device, whose state dict is then the adapter's. Returns names of matrices.

        The table of the classes is trained whole, and so is what the base lacks (places of targets).
        Raises ValueError for modules to train whole that the model does not have, and for a base that lacks a block's weights.
        """
        from peft import LoraConfig, inject_adapter_in_model

        outside = {name: one for name, one in model.named_children() if one is not model.layers}
        if unknown := [name for name in self.whole if name not in outside]:
            raise ValueError(f"--lora-whole {unknown[0]}: the model has {', '.join(outside)}")
        lacking = {name: one for name, one in model.named_parameters() if name not in self.base.model}
        if within := [name for name, one in lacking.items() if any(one is each for each in model.layers.parameters())]:
            raise ValueError(
                f"{self.path} lacks {within[0]}, which an adapter does not hold: leave out --lora-rank, or fine-tune the whole "
                "model first"
            )
        trained = {CLASS_TABLE, RAR_TABLE, LPD_TABLE, *lacking}
        trained |= {f"{name}.{each}" for name in self.whole for each, _ in outside[name].named_parameters()}
        matrices = {one for block in model.layers for one in block.modules() if isinstance(one, nn.Linear)}
        names = {name.rpartition(".")[2] for name, one in model.named_modules() if one in matrices}
        modules = sorted(name for name in names if not name.isdigit())  # a number: layers of a modulation
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=modules)
        inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name or name in trained)
        model.register_state_dict_post_hook(_adapter_alone)
        return modules

    def config(self, modules: list[str]) -> dict[str, Any]:
        """Return what a run's config records of the adapter and its base."""
        base = self.name if is_released(self.name) else str(self.path.resolve())
        return {
            "lora": {"rank": self.rank, "alpha": self.alpha, "modules": modules}
            | ({"whole": list(self.whole)} if self.whole else {}),
            "base": weights_fingerprint(self.base.model),
            "base_file": {"path": base, "averaged": self.use_ema},
        }

    def take(self, model: Trunk, start: Checkpoint | None, seed: int) -> None:
        """Fill a model: the frozen weights, and at a run's start the adapter, which adds nothing at first.

        start: the base as --finetune begins with it; None for a run that is resumed. Every process calls it together.
        """
        frozen, own = {}, {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if ".lora_" not in name:
                (own if tensor.requires_grad else frozen)[name.replace(".base_layer.", ".")] = tensor.detach()
        weights = (start or self.base).model
        if start is None:  # the checkpoint has what is trained
            weights, own = {name: tensor for name, tensor in weights.items() if name not in own}, {}
        fill(frozen | own, frozen | own, weights, self.path)
        normal = SeededNormal(item_seed(seed, 5))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_A." in name:
                    normal(parameter, (3 * parameter.shape[1]) ** -0.5)
                elif ".lora_B." in name:
                    parameter.zero_()


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Compute as the base does in the block; parameters and what is trained stay as they are."""
    layers: list[Any] = [one for one in model.modules() if hasattr(one, "lora_A") and hasattr(one, "scaling")]
    scales = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = dict.fromkeys(layer.scaling, 0.0)
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling = scale


def _adapter_alone(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Mapping[str, Any]) -> None:
    """Leave in a state dict what is trained."""
    trained = {prefix + name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in [name for name in state if name not in trained]:
        del state[name]
