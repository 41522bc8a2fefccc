"""Decoding on an accelerator: recorded steps (CUDA graphs), shapes that fused attention takes, streams."""

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
    from autoregressive.models.decode_step import DecodeState
    from autoregressive.models.layouts import Layout
    from autoregressive.models.plans import PassKind


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


# Rows of a pass up to which it takes hardly longer, a guess from memory bandwidth and arithmetic; smaller windows hardly pay.
ROWS_IN_A_WINDOW, LEAST_WINDOW = 256, 8
# Passes whose cursors are not read yet when the next one begins: the device never waits, and computes so many for nothing.
PASSES_LATE = 2
# Rows of the cache that a pass reads at least.
LEAST_READ = 1


def rows_agree(model: nn.Module, *shape: object) -> bool:
    """Tell whether windows are possible: always, and the size of the window is one of the settings that fix rounding."""
    return True


def auto_window(samples: int, compile: bool) -> int:
    """Return the window of `--window auto` for a batch, 0 for none. samples: rows of the batch for each token of a window."""
    size = min(ROWS_IN_A_WINDOW // samples, 64)
    return size if size >= LEAST_WINDOW else 0


def read_later(numbers: Tensor) -> Callable[[], list[int]]:
    """Begin to copy numbers to the host. Returns a function that waits for them alone, and returns them."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    copied = torch.cuda.current_stream(numbers.device).record_event()

    def wait() -> list[int]:
        copied.synchronize()
        return copy.tolist()

    return wait


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

    def serve(self, model: nn.Module, layout: "Layout", cache: StaticCache, batch: int) -> bool:
        """Tell whether the recordings are of this thread, these weights, this layout, this cache and so many images."""
        same = self.state.cache is cache and self.state.batch == batch and self.thread == threading.get_ident()
        same = same and self.state.layout == layout
        return same and self.weights == addresses(model)

    def run(self, kind: "PassKind", step: Callable[[], None]) -> None:
        """Takes the step, which is of this kind and reads and writes nothing but the state."""
        key = (kind, self.state.groups[0][0].operations, self.state.ordered)
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
