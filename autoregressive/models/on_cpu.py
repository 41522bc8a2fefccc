"""Decoding on a CPU: packed weights, attention of few rows, and rows that round alike whatever the batch.

    with packed(model):
        ...                                    # model's nn.Linear layers multiply with packed weights

A packed weight is laid out once, in blocks, as the processor's matrix units read it; a plain layer has its weight laid
out anew in every step. A row's result is the same bits whatever the number of rows (from two on) and of threads: oneDNN
takes other kernels for more rows on some processors (with AMX for more than 32), so rows are multiplied in parts that all
take the same. The copies cost the weights' memory once more; they are kept for the next call and made anew where the
weights have changed since.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from torch import Tensor

if TYPE_CHECKING:
    from autoregressive.models.trunk import Trunk

# Rows that the layout is made for. A constant, since a row's result must not depend on how many there are.
ROWS = 16
# Rows that are multiplied at once at most.
MOST_ROWS = 256
DTYPES = (torch.float32, torch.bfloat16)

_numbers = count()
# Laid-out weights and the rows at once, by number: a compiled step holds numbers, it cannot hold such tensors.
_copies: dict[int, tuple[Tensor, int]] = {}


class PackedWeights:
    """The laid-out copies of a model's linear layers, and what they were made of."""

    def __init__(self, model: nn.Module):
        self.layers = {layer: next(_numbers) for layer in model.modules() if type(layer) is nn.Linear}
        self.made_of = {layer: _identity(layer.weight) for layer in self.layers}
        self.copies = _copies  # a module's own names may be gone when the last of these is
        for layer, number in self.layers.items():
            weight = layer.weight.detach()
            laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            _copies[number] = laid_out, rows_at_once(layer.in_features, layer.out_features, weight.dtype)

    def is_current(self, model: nn.Module) -> bool:
        """Tell whether the model's weights are the packed ones."""
        layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
        return layers == list(self.layers) and all(_identity(layer.weight) == self.made_of[layer] for layer in layers)

    def __del__(self) -> None:
        for number in self.layers.values():
            self.copies.pop(number, None)


_packed: WeakKeyDictionary[nn.Module, PackedWeights] = WeakKeyDictionary()


def can_pack(model: nn.Module) -> bool:
    """Tell whether the model's linear layers can be packed, here and now."""
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
        return False
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return bool(layers) and all(
        type(layer) is nn.Linear
        and type(layer.weight) in (Tensor, nn.Parameter)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in DTYPES
        and rows_at_once(layer.in_features, layer.out_features, layer.weight.dtype) > 0
        for layer in layers
    )


@cache
def rows_at_once(inner: int, outer: int, dtype: torch.dtype) -> int:
    """Find how many rows may be multiplied at once for a row's product not to depend on the others; 0 if none may.

    Products of numbers that nearly cancel out show the order in which a kernel adds up, in half precision too.
    """
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(inner, generator=generator)

    def pairs(rows: int, sign: int) -> Tensor:
        one = torch.randn(rows, -(-inner // 2), generator=generator).to(dtype)
        return torch.cat([one, sign * one], dim=1)[:, places]

    x = pairs(MOST_ROWS, -1)
    x[:, :: max(1, inner // 16)] += torch.randn(MOST_ROWS, 1, generator=generator).to(dtype) / 512
    laid_out = torch.ops.mkldnn._reorder_linear_weight(pairs(outer, 1), ROWS)
    few, agreed = product(x[:2], laid_out, MOST_ROWS), 0
    threads = torch.get_num_threads()
    try:
        for rows in (5, 8, 9, 12, 15, 16, 20, 22, 24, 28, 31, 32, 33, 64, MOST_ROWS):
            many = few
            for several in {1, 2, threads}:
                torch.set_num_threads(several)
                many = product(x[:rows], laid_out, MOST_ROWS)
                if not torch.equal(many[: len(few)], few):
                    return agreed
            few, agreed = many, rows if rows in (8, 16, 32, MOST_ROWS) else agreed
    finally:
        torch.set_num_threads(threads)
    return agreed


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Have the model's linear layers use packed weights, where they can."""
    if not can_pack(model):
        yield
        return
    weights = _packed.get(model)
    if weights is None or not weights.is_current(model):
        release(model)
        weights = _packed[model] = PackedWeights(model)
    for layer, number in weights.layers.items():
        layer.forward = partial(multiply, number=number, width=layer.out_features, bias=layer.bias)
    try:
        yield
    finally:
        for layer in weights.layers:
            layer.__dict__.pop("forward", None)


def release(model: nn.Module) -> None:
    """Give the memory of the model's packed weights back."""
    _packed.pop(model, None)


def _identity(weight: Tensor) -> tuple:
    """Return the identity of a weight: its address, the number of writes to it, and some of its numbers.

    The numbers tell of writing through `.data`, which is not counted.
    """
    version = 0 if weight.is_inference() else weight._version
    flat = weight.detach().flatten()
    return weight.data_ptr(), version, weight.dtype, tuple(weight.shape), float(flat[:: max(1, len(flat) // 64)].sum())


def multiply(x: Tensor, number: int, width: int, bias: Tensor | None = None) -> Tensor:
    """Multiply x (…, in) by the packed weight of this number, and add the bias (width,): (…, width)."""
    compiling = torch.compiler.is_compiling()  # a compiled step can call an operation of its own
    y = packed_linear(x, number, width) if compiling else product(x, *_copies[number])
    return y if bias is None else y + bias


def product(x: Tensor, laid_out: Tensor, at_once: int) -> Tensor:
    """Multiply x (…, in) by a packed weight, at most `at_once` rows at a time: (…, out)."""
    rows = x.flatten(0, -2)
    if len(rows) == 1:  # a single row takes another kernel
        return product(rows.expand(2, -1), laid_out, at_once)[:1].view(*x.shape[:-1], -1)
    if len(rows) <= at_once:
        return torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")
    parts = rows.tensor_split(-(-len(rows) // at_once))
    return torch.cat([product(part, laid_out, at_once) for part in parts]).view(*x.shape[:-1], -1)


@torch.library.custom_op("autoregressive::packed_linear", mutates_args=())
def packed_linear(x: Tensor, number: int, width: int) -> Tensor:
    """Compute `multiply` for a compiled step."""
    return product(x, *_copies[number])


@packed_linear.register_fake
def _(x: Tensor, number: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


# Rows of a step whose attention is, compiled for a CPU, faster as one loop over keys and values than as matrix products.
FEW_ROWS = 4
# A product that sums up more numbers than that may do so in parts, which are others for each length (with AVX2 sooner than with AVX-512).
SUMMED_AT_ONCE = 256
# Rows of the cache that a pass reads at least: keys of fewer take other kernels.
LEAST_READ = 16
# A product of matrices with fewer multiplications may be computed otherwise.
SMALL_PRODUCT = 4096
# Samples for whose number the rows of plain linear layers round alike; packed weights take any number.
ROW_MULTIPLE = 8


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Attention of the rows of a pass: q (B, H, s, D) over k and v (B, KV, S, D) to (B, H, s, D).

    A row is rounded alike whatever rows are computed beside it and however many are read that it does not see
    (`rows_agree` checks). PyTorch's fused kernel is made for many rows and is several times slower for one; in float32 its
    rounding depends on a sample's place in the batch besides.
    """
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    if causal and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    by_hand = q.shape[2] <= FEW_ROWS and torch.compiler.is_compiling()
    scores = (q.float().unsqueeze(3) * k.float().unsqueeze(2)).sum(-1) if by_hand else row_scores(q, k)
    scores = scores * scale  # (B, H, s, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    if by_hand:
        return (weights.unsqueeze(-1) * v.float().unsqueeze(2)).sum(-2).to(q.dtype)
    return row_sums(weights.to(v.dtype), v)


def row_scores(q: Tensor, k: Tensor) -> Tensor:
    """Multiply queries by keys, float32 (B, H, s, S); k as it lies in memory, whose rows are many whatever s is."""
    return (k @ repeated_rows(q, k).transpose(-1, -2)).transpose(-1, -2)[:, :, : q.shape[2]].float()


def row_sums(weights: Tensor, v: Tensor) -> Tensor:
    """Sum values up by weights (B, H, s, S)."""
    at_once = SUMMED_AT_ONCE if v.dtype == torch.float32 else v.shape[2]
    sums = None
    for start in range(0, v.shape[2], at_once):
        values = v[:, :, start : start + at_once]
        some = repeated_rows(weights[..., start : start + at_once], values, least=2) @ values
        some = some[:, :, : weights.shape[2]]
        sums = some if sums is None else sums + some
    assert sums is not None
    return sums


def repeated_rows(x: Tensor, other: Tensor, least: int = 1) -> Tensor:
    """Repeat the last row of x (B, H, s, …) until there are `least`, and enough for a product with `other` not to be small."""
    missing = max(least, SMALL_PRODUCT // (other.shape[2] * other.shape[3]) + 1) - x.shape[2]
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], dim=2) if missing > 0 else x


@cache
def attention_agrees(dim: int, longest: int, stride: int, dtype: torch.dtype, threads: int) -> bool:
    """Tell whether a row's attention does not depend on the rows beside it, and on the rows read that it does not see.

    dim: of a head. longest, stride: passes read up to multiples of `stride` rows, at most `longest`.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, rows, dim, generator=generator).to(dtype) for rows in (16, longest, longest))
    v[:, :, 1::2] = -v[:, :, : longest // 2 * 2 : 2]  # sums that nearly cancel out show the order of the additions
    weights = torch.rand(2, 3, 16, longest, generator=generator).div(64).add(1).to(dtype)
    scores = row_scores(q, k)
    coarse = -(-max(longest // 16, 1) // stride) * stride
    for seen in {1, 1 + longest // 3, min(SUMMED_AT_ONCE + 3, longest)}:
        masked = weights.masked_fill(torch.arange(longest) >= seen, 0)
        sums = row_sums(masked, v)
        least = -(-min(max(seen, LEAST_READ), longest) // stride) * stride
        for length in {*range(least, least + 8 * stride, stride), *range(least, longest, coarse)}:
            keys, values = (t[:, :, :length] for t in (k, v))
            if stride > 1:  # StaticCache.lay_out
                keys, values = keys.contiguous(), values.contiguous()
            for rows in (slice(15, 16), slice(14, 16), slice(13, 16), slice(8, 16), slice(16)):
                same = torch.equal(row_scores(q[:, :, rows], keys), scores[:, :, rows, :length])
                if not (same and torch.equal(row_sums(masked[:, :, rows, :length], values), sums[:, :, rows])):
                    return False
    return True


@cache
def activation_agrees(activation: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> bool:
    """Tell whether the activation of a row does not depend on the rows beside it: what is left behind whole vectors is computed otherwise."""
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.equal(activation(x), torch.cat([activation(row) for row in x.split(1)]))


def rows_agree(model: "Trunk", compile: bool, longest: int, stride: int) -> bool:
    """Tell whether the rows of a pass round alike whatever their number, so that windows draw the sequential image.

    compile: compiled loops are made for a number of rows. longest, stride: as attention_agrees takes them.
    """
    dtype, head = model.tok_embeddings.weight.dtype, cache_width(model.args.dim // model.args.n_head)
    if compile or not can_pack(model):
        return False
    if not all(activation_agrees(activation, width, dtype) for activation, width in model.activations):
        return False
    return attention_agrees(head, longest, stride, dtype, torch.get_num_threads())


# A CPU's passes take as long as the weights need to come from memory, up to so many rows; smaller windows may cost more than they save.
ROWS_IN_A_WINDOW, LEAST_WINDOW = 16, 8
# Passes whose cursors are not read yet when the next one begins.
PASSES_LATE = 0


def auto_window(samples: int, compile: bool) -> int:
    """Return the window of `--window auto` for a batch, 0 for none. samples: rows of the batch for each token of a window."""
    size = ROWS_IN_A_WINDOW // samples
    return size if size >= LEAST_WINDOW and not compile else 0


def read_later(numbers: Tensor) -> Callable[[], list[int]]:
    """Return a function that returns the numbers."""
    return numbers.tolist


def missing_rows(model: nn.Module, samples: int) -> int:
    """Return how many samples to add to a batch for its rows to round as those of any other batch."""
    with torch.inference_mode():
        return 0 if can_pack(model) else -samples % ROW_MULTIPLE


def read_stride(dtype: torch.dtype, compile: bool) -> int:
    """Return the multiple of rows that a step reads of the cache, behind a mask where that is above 1.

    In half precision each length costs a kernel that oneDNN makes for the shape; a compiled step has one loop for all.
    """
    return 1 if compile or dtype == torch.float32 else 32


def records(device: torch.device) -> bool:
    """Tell whether compiled steps are recorded."""
    return False


def cache_rows(longest: int) -> int:
    """Return the rows of a cache of which at most `longest` are read: with one to spare a multiple of those read at once."""
    return -(-(longest + 1) // 32) * 32 - 1


def cache_width(head_dim: int) -> int:
    """Return the channels that the cache keeps of a head."""
    return head_dim


def attention_kernels(compile: bool) -> AbstractContextManager:
    """Return a context for the attention of the steps."""
    return nullcontext()
