"""Decoding on an accelerator: recorded steps (CUDA graphs), shapes that fused attention takes, streams.

graphs = StepGraphs(model, state)
graphs.run(kind, step)                     # records the step when its kind comes again, then replays it
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models.kv_cache import StaticCache

if TYPE_CHECKING:
    from autoregressive.models.decode_step import DecodeState, StepKind


def read_stride(dtype: torch.dtype, compile: bool) -> int:
    """Return the multiple of rows that a step reads of the cache: each length of a compiled step is a CUDA graph."""
    return 128 if compile else 1


def records(device: torch.device) -> bool:
    """Tell whether compiled steps are recorded."""
    return device.type == "cuda"


def cache_rows(longest: int) -> int:
    """Return the rows of a cache of which at most `longest` are read: a multiple that attention kernels need not pad."""
    return -(-longest // 16) * 16


def cache_width(head_dim: int) -> int:
    """Return the channels that the cache keeps of a head.

    Fused attention on a GPU takes multiples of 8 alone; for GPT-3B's 100 channels plain attention would copy the whole
    cache to float32 in every step.
    """
    return -(-head_dim // 8) * 8


def attention_kernels(compile: bool) -> AbstractContextManager:
    """Keep cuDNN out of the attention of plain steps: it plans anew for every length of the cache."""
    if compile:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def fused_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask (…, S) into a bias whose rows lie at multiples of 8 numbers, or attention would copy them so."""
    columns = mask.shape[-1]
    return torch.where(F.pad(mask, (0, -columns % 8)), 0.0, float("-inf")).to(dtype)[..., :columns]


class StepGraphs:
    """Recorded steps over one state: run again as they are, at the cost of one launch.

    A kind of step is run as it is the first time, which compiles it and makes its kernels ready, and recorded when it
    comes again. The recordings hold addresses: of the state, and of the model's weights. They are of the thread that made
    them, whose kernels are ready.
    """

    def __init__(self, model: nn.Module, state: "DecodeState"):
        self.state, self.weights = state, addresses(model)
        self.thread = threading.get_ident()
        self.device = state.tokens.device
        # Of this device: the stream that PyTorch records on by default belongs to the device that recorded first.
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.pool: Any = None  # of memory, one for all: no step needs what another left behind in it

    def serve(self, model: nn.Module, cache: StaticCache, batch: int) -> bool:
        """Tell whether the recordings are of this thread, these weights, this cache and so many images."""
        same = self.state.cache is cache and self.state.batch == batch and self.thread == threading.get_ident()
        return same and self.weights == addresses(model)

    def run(self, kind: "StepKind", step: Callable[[], None]) -> None:
        """Takes the step, which is of this kind and reads and writes nothing but the state."""
        key = (kind, self.state.config.operations)
        if key not in self.graphs:
            step()
            self.graphs[key] = None
            return
        graph = self.graphs[key]
        if graph is None:
            graph = self.graphs[key] = record(step, self.pool, self.stream)
            self.pool = graph.pool()
        graph.replay()


def record(step: Callable[[], None], pool: Any, stream: torch.cuda.Stream | None) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of what the step launches, recorded on `stream` and not run.

    Other threads may use the device meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph


def addresses(model: nn.Module) -> list[int]:
    """Return where the model's weights lie, or which objects they are where their memory is not told."""

    def address(weight: Tensor) -> int:
        try:
            return weight.data_ptr() or id(weight)  # 8-bit weights raise, or answer 0
        except RuntimeError:
            return id(weight)

    return [address(weight) for weight in model.parameters()]
