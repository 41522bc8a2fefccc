"""Decode passes through torch.compile."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from autoregressive.models.decode_step import Decode, decode_rows
from autoregressive.models.sampling import race
from autoregressive.models.trunk import Rows, Trunk


def can_compile(device: torch.device) -> bool:
    """Tell whether steps can be compiled for a device: a CPU beside a C++ compiler, a GPU of CUDA beside a C compiler.

    Triton builds a module of the driver's in C when it is first used.
    """
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None
    compilers = [os.environ.get("CC"), "gcc", "clang"]
    return device.type == "cuda" and any(shutil.which(name) for name in compilers if name)


@cache
def compiled_race() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the race through the compiler, one kernel in place of some thirty; one serves every number of rows."""
    return torch.compile(race, dynamic=True)


@cache
def compiled_decode_rows() -> Decode:
    """Return decode_rows through the compiler, made when needed, since that takes long to import.

    It is compiled for a number of samples and of rows: with these open its loops are several times slower on a CPU. One
    serves every length.
    """
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, 64)
    compiled = torch.compile(decode_rows_up_to, dynamic=False)

    def decode(model: Trunk, tokens: Tensor, rows: Rows, mask: Tensor | None, *more: Any) -> Tensor:
        up_to = torch.empty(rows.length, 0)  # a size that may change; a plain number would be compiled in
        torch._dynamo.mark_dynamic(up_to, 0)
        if mask is not None:
            torch._dynamo.mark_dynamic(mask, 3)
        return compiled(model, tokens, replace(rows, length=0), up_to, mask, *more)

    return decode


def decode_rows_up_to(
    model: Trunk, tokens: Tensor, rows: Rows, up_to: Tensor, mask: Tensor | None, *more: Any
) -> Tensor:
    """Compute decode_rows with as many rows to attend to as `up_to` has."""
    places = Rows(rows.cache, rows.positions, up_to.shape[0], rows.layout, rows.orders, rows.context)
    return decode_rows(model, tokens, places, mask, *more)
