"""Measures that the benchmarks share: the clock, the memory's bandwidth, models with random weights, a training step."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autoregressive.models.build import build_gpt
from autoregressive.models.trunk import Trunk
from utils.distributed import Distributed


def timed(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Return the seconds of a call to its end on the device, the mean over `repeats`."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - began) / repeats


def bandwidth(device: torch.device) -> float:
    """Return bytes a second that a copy on the device reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * len(source) / min(timed(lambda: target.copy_(source), device) for _ in range(5))


def random_gpt(name: str, tokens: int, device: torch.device, **changes: Any) -> Trunk:
    """Return a model with random weights, those of the output layer too, which are zeros at first."""
    torch.manual_seed(0)
    with device:
        model = build_gpt(name, block_size=tokens, **changes)
        torch.nn.init.normal_(model.output.weight, std=0.02)
    return model


def random_batch(images: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return codes (B, N) and labels (B,)."""
    codes = torch.randint(16384, (images, tokens), device=device)
    return codes, torch.randint(1000, (images,), device=device)


def project_step(model: Trunk, precision: str, dist: Distributed) -> Callable[[Tensor, Tensor], None]:
    """Return a training step on codes and labels, as the training scripts take it."""
    from autoregressive.train.loss import TokenLoss
    from utils.training.optim import adamw
    from utils.training.parallel import Parallel

    plan = Parallel(dist, precision=precision, compile=True)
    token_loss = plan.apply(TokenLoss(model), blocks=model.layers)
    optimizer = adamw(model, argparse.Namespace(lr=1e-4, weight_decay=0.05, beta1=0.9, beta2=0.95))

    def step(codes: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(dist.device.type, plan.autocast_dtype, enabled=plan.autocast_dtype is not None):
            loss = token_loss(codes, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step
