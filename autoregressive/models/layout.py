"""Which token stands where: the order in which an image's tokens are read, and which of them a step predicts together.

    layout = TokenLayout(grid_size=24)                       # raster: one token at a time, row by row
    layout = TokenLayout(grid_size=24, group_size=4)         # PAR: groups of four from distant regions
    layout = TokenLayout(grid_size=16, patch_side=2)         # NPP: a row reads the mean of 2x2 tokens (training only)
    sequence = codes[:, layout.order]                        # (B, N) raster codes -> sequence order
    for step in layout.steps: ...                            # the decode steps after the prefill

Raster order is the layout with groups of one and patches of one, so nothing outside this file asks which it has.
Parallel groups: PAR (arXiv 2412.15119, section 3). Patches: NPP (2412.15321, section 3).

A sequence is made of rows. `prefix` condition rows come first; then the first `group_size` image tokens, read one by
one; then `group_size - 1` learned special tokens; then the other image tokens in groups. The last of the first tokens
and the special tokens are the inputs of the first group: a group's inputs predict the next group, all at once.
With patches an image row stands for a block of `patch_side` x `patch_side` tokens, the blocks in raster order, and one
row predicts all tokens of the next block.
"""

from dataclasses import dataclass
from functools import cached_property
from math import isqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecodeStep:
    """One decode step: which tokens go in, the rows they take, and which tokens come out (sequence positions)."""

    rows: range  # rows of the sequence that this step computes
    inputs: slice  # sequence tokens fed
    special: int  # special tokens fed after them
    outputs: slice  # sequence tokens predicted
    number: int  # what `cfg_interval` is compared with


@dataclass(frozen=True)
class TokenLayout:
    """The order, rotary rows, attention mask and decode steps of an image's tokens.

    grid_size: tokens a side. group_size: tokens a decode step predicts (1: raster). prefix: condition rows.
    patch_side: a row reads and predicts blocks of patch_side² tokens (1: single tokens).
    Raises ValueError where groups or patches do not fit the grid, and where there are both.
    """

    grid_size: int
    group_size: int = 1
    prefix: int = 1
    patch_side: int = 1

    def __post_init__(self) -> None:
        side = isqrt(max(self.group_size, 0))
        if self.group_size < 1 or side**2 != self.group_size:
            raise ValueError(f"--ar-token-num must be a square number (1, 4, 16, …), got {self.group_size}")
        if self.grid_size < 1 or self.grid_size % side:
            raise ValueError(
                f"a grid of {self.grid_size}x{self.grid_size} tokens cannot be cut into {side}x{side} regions of equal "
                f"size; choose an --image-size whose grid {side} divides, or another --ar-token-num"
            )
        if self.patch_side < 1 or self.grid_size % self.patch_side:
            raise ValueError(
                f"a grid of {self.grid_size}x{self.grid_size} tokens cannot be cut into patches of {self.patch_side}x"
                f"{self.patch_side}; choose an --image-size whose grid {self.patch_side} divides, or a lower --patch-level"
            )
        if self.patch_side > 1 and self.group_size > 1:
            raise ValueError(
                f"--ar-token-num {self.group_size} and patches of {self.patch_side}x{self.patch_side} tokens both redefine "
                "what one step predicts, and the published systems train them apart; choose --ar-token-num 1 or "
                "--patch-level 1"
            )

    @property
    def tokens(self) -> int:
        """Tokens an image has, N."""
        return self.grid_size**2

    @property
    def patch_tokens(self) -> int:
        """Tokens that one row reads, and that it predicts: patch_side²."""
        return self.patch_side**2

    @property
    def step_tokens(self) -> int:
        """Tokens of a whole group or patch: so many at the end of the order are predicted and never read."""
        return self.group_size * self.patch_tokens

    @property
    def rope_grid(self) -> int:
        """Image rows a side: the grid that the rotary table is of."""
        return self.grid_size // self.patch_side

    @property
    def special(self) -> int:
        """Special tokens in the sequence, M."""
        return self.group_size - 1

    @property
    def rows(self) -> int:
        """Rows of the whole sequence: condition, image tokens (or patches of them) and special tokens."""
        return self.prefix + self.rope_grid**2 + self.special

    @cached_property
    @torch.inference_mode(False)
    def _cells(self) -> Tensor:
        """The cell of the rope grid, in raster order, that each image row stands for, int64 (rope_grid²,)."""
        side = isqrt(self.group_size)
        region = self.rope_grid // side
        raster = torch.arange(self.rope_grid**2, device="cpu").view(side, region, side, region)
        return raster.permute(1, 3, 0, 2).reshape(-1)  # offset in the region, then region

    @cached_property
    @torch.inference_mode(False)  # kept for training too, whoever asks first
    def order(self) -> Tensor:
        """The raster index of the token at each sequence position, int64 (N,); the tokens of a patch side by side."""
        patch, cells = self.patch_side, self.rope_grid
        raster = torch.arange(self.tokens, device="cpu").view(cells, patch, cells, patch)
        return raster.transpose(1, 2).reshape(cells**2, -1)[self._cells].flatten()  # cell, then row and column in it

    @cached_property
    @torch.inference_mode(False)
    def raster(self) -> Tensor:
        """The sequence position of the token at each raster index, int64 (N,): the inverse of `order`."""
        return torch.argsort(self.order)

    def rope_rows(self, table: Tensor) -> Tensor:
        """Puts the rotary table (rope_grid², …) into row order, zeros at condition and special rows. Returns (rows, …)."""
        sequence = table[self._cells.to(table.device)]
        zeros = table.new_zeros(self.prefix + self.special, *table.shape[1:])
        first, rest = sequence[: self.group_size], sequence[self.group_size :]
        return torch.cat([zeros[: self.prefix], first, zeros[self.prefix :], rest])

    def mask(self, rows: int, device: torch.device | None = None) -> Tensor | None:
        """Which rows the first `rows` rows see, bool (rows, rows); None where that is plainly causal.

        Rows see what stands before them; the rows of a group also see their whole group.
        """
        if self.group_size == 1:
            return None
        row = torch.arange(rows, device=device)
        in_groups = row - (self.prefix - 1) - self.group_size
        start_of_groups = self.prefix - 1 + self.group_size
        end = torch.where(
            in_groups >= 0,
            start_of_groups + (in_groups.div(self.group_size, rounding_mode="floor") + 1) * self.group_size,
            row + 1,
        )
        return row[None, :] < end[:, None]

    @cached_property
    def steps(self) -> tuple[DecodeStep, ...]:
        """The decode steps after the prefill has predicted the first token.

        First tokens singly, then whole groups; both kinds are numbered by tokens from 0, as `cfg_interval` counts.
        """
        assert self.patch_side == 1, "patches are for training: a model trained with them decodes single tokens"
        n, first_row = self.group_size, self.prefix
        steps = [
            DecodeStep(range(first_row + t, first_row + t + 1), slice(t, t + 1), 0, slice(t + 1, t + 2), t)
            for t in range(n - 1)
        ]
        for done in range(0, self.tokens - n, n):
            rows = range(first_row + n - 1 + done, first_row + 2 * n - 1 + done)
            first_group = done == 0
            inputs = slice(n - 1, n) if first_group else slice(done, done + n)
            outputs = slice(n + done, 2 * n + done)
            steps.append(DecodeStep(rows, inputs, self.special if first_group else 0, outputs, done))
        return tuple(steps)
