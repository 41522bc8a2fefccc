"""Dispatch to what each machine needs for decoding: on_cpu.py, or on_cuda.py for any accelerator."""

from types import ModuleType

import torch
from torch import Tensor

from autoregressive.models import on_cpu, on_cuda


def machine(device: torch.device) -> ModuleType:
    """Return the module for a device: read_stride, records, cache_rows, cache_width and attention_kernels are in both."""
    return on_cpu if device.type == "cpu" else on_cuda


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask (…, S) into the bias that fused attention adds, once for all layers; on a CPU it stays a mask."""
    return mask if mask.device.type == "cpu" else on_cuda.fused_bias(mask, dtype)
