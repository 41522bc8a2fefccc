"""Keys and values of the rows computed so far, in memory allocated once."""

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor


class StaticCache:
    """One (B, H, S, D) pair of tensors a layer. S is the whole sequence; rows past the filled part hold old values.

    D is at least the width of a head; channels past that width are zero.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, rows: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ):
        shape = (batch, heads, rows, head_dim)
        self.rows = rows
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]

    def fits(self, batch: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Tell whether `batch` samples of this kind go in."""
        keys = self.keys[0]
        return len(keys) >= batch and keys.device == device and keys.dtype == dtype

    def part(self, samples: slice) -> "StaticCache":
        """Return the cache of some samples, over the same memory, until the next `lay_out`."""
        part = copy(self)
        part.keys, part.values = ([tensor[samples] for tensor in tensors] for tensors in (self.keys, self.values))
        return part

    def lay_out(self, length: int) -> None:
        """Puts the first `length` rows of all samples and heads side by side, without the gap of those not reached yet.

        So much are S and `update` limited to until the next call. Matrix products in half precision on a CPU copy what has
        gaps, in every step; this copies when the length changes.
        """
        batch, heads, rows, dim = self.keys[0].shape
        if rows == length:
            return
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                kept = tensor[:, :, :length].clone()
                whole = tensor.as_strided((batch * heads * length * dim,), (1,), 0)
                tensors[i] = whole.view(batch, heads, length, dim)
                tensors[i][:, :, :rows] = kept
                tensors[i][:, :, rows:] = 0  # what lay here is of other samples, and a NaN times a mask's 0 is NaN

    def clear(self) -> None:
        """Sets every row to zero, also those that `lay_out` has set apart."""
        for tensor in (*self.keys, *self.values):
            numbers = tensor.untyped_storage().nbytes() // tensor.itemsize
            tensor.as_strided((numbers,), (1,), 0).zero_()

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Stores k and v (b, H, s, d) at rows `positions`, (s,) or (b, s), of the first b samples.

        Returns the first `length` rows of those samples as views, (b, H, length, D) each.
        """
        keys, values = self.keys[layer], self.values[layer]
        # By both indices, into the whole tensor: a compiler copies a slice that is written to as a whole.
        samples = torch.arange(len(k), device=k.device)[:, None]
        keys[samples, :, positions] = widened(k, keys.shape[-1]).transpose(1, 2).to(keys.dtype)
        values[samples, :, positions] = widened(v, values.shape[-1]).transpose(1, 2).to(values.dtype)
        return keys[: len(k), :, :length], values[: len(v), :, :length]


def widened(x: Tensor, width: int) -> Tensor:
    """Add channels of zeros to x (…, d) up to `width`."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
