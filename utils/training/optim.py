"""The optimizer of the GPTs and the learning rate by step."""

from argparse import Namespace
from math import cos, pi

import torch
import torch.nn as nn


def adamw(model: nn.Module, args: Namespace) -> torch.optim.AdamW:
    """AdamW that decays tensors with two or more dimensions only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cuda", "cpu") for p in parameters)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=fused)


def learning_rate(args: Namespace, step: int, total: int) -> float:
    """Return the learning rate at a step (from 0): linear warm-up over --warmup-steps, then constant, or a cosine that ends at 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.lr_schedule == "cosine":
        done = (step - args.warmup_steps) / max(total - args.warmup_steps, 1)
        return args.lr * 0.5 * (1 + cos(pi * min(done, 1)))
    return args.lr
