"""The optimizer of the GPTs and the learning rate by step."""

from argparse import Namespace
from collections.abc import Callable
from math import cos, pi

import torch
import torch.nn as nn


def adamw(
    model: nn.Module,
    args: Namespace,
    decays: Callable[[str, nn.Parameter], bool] = lambda name, parameter: parameter.dim() >= 2,
) -> torch.optim.AdamW:
    """AdamW that decays the parameters which `decays` tells."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = all(p.device.type in ("cuda", "cpu") for p in (*decayed, *others))
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=fused)


def learning_rate(args: Namespace, step: int, total: int, steps_per_epoch: int = 1) -> float:
    """Return the learning rate at a step (from 0), after a linear warm-up over --warmup-steps as --lr-schedule says.

    constant; cosine, which begins at --lr-decay-start-epoch if that is later and ends at --min-lr; or steps, times 0.2 after 1/2, 2/3 and 5/6 of the epochs, rounded down (NAR, arXiv
    2503.10696, section 4.1), or of the steps where there is one epoch, or --max-steps ends the run sooner.
    The first step of a warm-up has the first part of the rate; with --warmup-from-zero it has none, and the next one has that.
    """
    if step < args.warmup_steps:
        return args.lr * (step + (not args.warmup_from_zero)) / args.warmup_steps
    if args.lr_schedule == "cosine":
        start = max(args.warmup_steps, args.lr_decay_start_epoch * steps_per_epoch)
        done = max(step - start, 0) / max(total - start, 1)
        return args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + cos(pi * min(done, 1)))
    if args.lr_schedule == "steps":
        whole = args.epochs > 1 and total >= args.epochs * steps_per_epoch
        parts, unit = (args.epochs, steps_per_epoch) if whole else (total, 1)
        ends = (parts // 2, parts * 2 // 3, parts * 5 // 6)
        return args.lr * 0.2 ** sum(step >= end * unit for end in ends)
    return args.lr
