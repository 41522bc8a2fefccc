"""Condition Contrastive Alignment (CCA): training by contrast, after which sampling needs no guidance.

An image should be likelier than under a frozen reference given its own class, and less likely given another sample's. The
model and the reference each read the images twice, so a step takes 8/3 of the arithmetic of an ordinary one.
CCA (arXiv 2410.09347, equations 11 and 12).
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.build import build_model
from autoregressive.models.layouts import Layout
from autoregressive.models.trunk import Conditions, Trunk
from autoregressive.released import find_identity
from autoregressive.train.loss import token_log_probs
from utils.checkpoint import Checkpoint, read_checkpoint, weights_fingerprint
from utils.distributed import Distributed
from utils.origin import require_same
from utils.runs import find_checkpoint
from utils.training.state import fill

BETA, UNCOND = 0.02, 0.1
# The published weights of the negatives by size; of other sizes 1000.
LAMBDAS = {"GPT-L": 300.0, "GPT-3B": 500.0}
# Arithmetic of a step: forward and backward of two rows a sample, and two forward passes of the reference.
STEP_FLOPS = 2 + 2 / 3


def check_contrast(args: argparse.Namespace) -> None:
    """Begin with --cca-reference where no --gpt-ckpt is given. Raises ValueError for flags that need or contradict it."""
    given = [name for name in ("cca_lambda", "cca_beta", "cca_uncond") if getattr(args, name) is not None]
    if given and not args.cca_reference:
        raise ValueError(f"--{given[0].replace('_', '-')} needs --cca-reference FILE, the model to contrast with")
    if not args.cca_reference:
        return
    for flag, plain in (("objective", "cross_entropy"), ("patch_level", 1), ("second_exit_only", False)):
        if getattr(args, flag) != plain:
            name = f"--{flag.replace('_', '-')}"
            raise ValueError(f"{name} and --cca-reference both say what is trained: leave out one of them")
    if not (args.gpt_ckpt or args.gpt_resume):
        args.gpt_ckpt = args.cca_reference


class ContrastLoss(nn.Module):
    """Loss of a micro-batch, and what is logged of it. A module around both models, so that sharding sees every pass.

    reference: frozen; with dropout in training, as the model itself, by masks of its own.
    weight: of the negatives (the paper's λ). beta: scale of the log-ratios.
    """

    def __init__(self, model: Trunk, reference: Trunk, weight: float, beta: float):
        super().__init__()
        self.model, self.reference = model, reference.requires_grad_(False)
        self.weight, self.beta = weight, beta

    def forward(
        self,
        codes: Tensor,
        cond: Conditions,
        negatives: Conditions,
        *,
        drop: Tensor,
        layout: Layout | None = None,
        orders: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a float32 scalar, and figures to log.

        codes: int64 (B, N) in raster order. layout, orders: as TokenLoss takes them.
        cond, negatives: values of the images' own conditions, and of other images'; where these are the image's own, they
        count as its own. drop: bool (B,), images that lose both. They count as their own too.
        Figures: `cca_gap` and `cca_margin` (nats an image: log-ratio of the own condition to the reference's, and its
        distance from the other's) and `cca_preferred` (share of images that the own condition makes likelier).
        """
        own, others = self.model.as_conditions(cond), self.model.as_conditions(negatives)
        same = torch.stack([(own[name] == others[name]).reshape(len(codes), -1).all(1) for name in own]).all(0) | drop
        both = {name: torch.cat([own[name], others[name]]) for name in own}
        inputs = torch.cat([codes, codes]), both
        options = {
            "drop": torch.cat([drop, drop]),
            "layout": layout,
            "orders": None if orders is None else torch.cat([orders, orders]),
        }
        ratios = token_log_probs(self.model, *inputs, **options).sum(1)
        with torch.no_grad():
            known = token_log_probs(self.reference, *inputs, **options).sum(1)
        gap, other_gap = (ratios - known).chunk(2)
        sign = torch.where(same, 1.0, -1.0)
        weights = torch.where(same, 1.0, self.weight)
        terms = F.logsigmoid(self.beta * gap) + weights * F.logsigmoid(self.beta * sign * other_gap)
        figures = {"gap": gap.mean(), "margin": (gap - other_gap).mean(), "preferred": (gap > other_gap).float().mean()}
        return -terms.mean() / max(self.weight, 1), {f"cca_{name}": one.detach() for name, one in figures.items()}


@dataclass(frozen=True)
class Contrast:
    """CCA as the flags ask for it."""

    path: Path
    weight: float
    beta: float
    uncond: float
    use_ema: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Contrast | None":
        """Return what --cca-reference and the flags beside it ask for; None without it. Raises FileNotFoundError."""
        if not getattr(args, "cca_reference", None):
            return None
        return cls(
            find_checkpoint(args.cca_reference),
            LAMBDAS.get(args.gpt_model, 1000.0) if args.cca_lambda is None else args.cca_lambda,
            BETA if args.cca_beta is None else args.cca_beta,
            UNCOND if args.cca_uncond is None else args.cca_uncond,
            args.use_ema,
        )

    @cached_property
    def weights(self) -> Checkpoint:
        """The reference's file, `model` being the weights that are used."""
        saved = read_checkpoint(self.path, prefer_ema=self.use_ema)
        if self.use_ema:
            saved.require_averages()
        return saved

    def config(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a run's config records. Raises ValueError where the reference is no GPT, or of another order, other
        codes or classes than `own`."""
        layouts = [identity["layout"]["name"] for identity in (find_identity(self.weights), own)]
        if layouts[0] != layouts[1]:
            raise ValueError(f"--cca-reference {self.path} is of the layout {layouts[0]}, and this run of {layouts[1]}")
        names = f"--cca-reference {self.path}", "this run's data"
        require_same(self.weights.config, own, ("tokenizer", "classes"), names, "give a model of these codes")
        return {"objective": "cca", "reference": weights_fingerprint(self.weights.model)}

    def describe(self) -> str:
        """Return a line for the log."""
        return (
            f"condition contrastive alignment with {self.path}: lambda {self.weight:g}, beta {self.beta:g}, "
            f"{self.uncond:.0%} of the samples without a class; cca_gap should stay near 0"
        )

    def loss(self, model: Trunk) -> ContrastLoss:
        """Return the loss around a model and a reference of its shape, on the meta device."""
        with torch.device("meta"):
            return ContrastLoss(model, build_model(model.args), self.weight, self.beta)

    def materialize(self, loss: ContrastLoss, device: torch.device) -> None:
        """Give the reference memory and its weights. Raises ValueError where they are not of the model's shape."""
        loss.reference.to_empty(device=device)
        own = loss.reference.state_dict()
        fill(own, own, self.weights.model, self.path)


class NegativesOfNext:
    """Gives every sample of a global batch the conditions of the next one, whatever the processes and micro-batches.

    Job.prepare of a run with CCA: micro-batches get an entry "negatives", by which StepLoss knows the run.
    """

    def __init__(self, names: list[str], dist: Distributed):
        self.names, self.dist = names, dist

    def __call__(self, batches: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        sizes = [len(batch["codes"]) for batch in batches]
        rolled = [self._rolled(torch.cat([batch[name] for batch in batches])).split(sizes) for name in self.names]
        parts = [dict(zip(self.names, values, strict=True)) for values in zip(*rolled, strict=True)]
        return [{**batch, "negatives": own} for batch, own in zip(batches, parts, strict=True)]

    def _rolled(self, values: Tensor) -> Tensor:
        """Return the values of the next samples: the process's own, and the first one of the next process."""
        firsts = values.new_zeros(self.dist.world_size, *values.shape[1:])
        firsts[self.dist.rank] = values[0]
        after = self.dist.sum(firsts)[(self.dist.rank + 1) % self.dist.world_size]
        return torch.cat([values[1:], after[None]])
