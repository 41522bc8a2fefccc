"""Interface of conditions: what an image is asked for, embedded beside the image's tokens.

A condition either stands as `rows` rows before the tokens (a class, a caption), or has no rows of its own and is added to
the row that predicts each token (a depth map). A new condition is one subclass in one file (examples/depth_map.py).

In training a condition is dropped now and then, which gives guidance its unconditional half (classifier-free guidance,
arXiv 2207.12598).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from utils.registry import Registry

KINDS = ("label", "caption", "control")
CONDITIONS: Registry["type[Condition]"] = Registry("condition", {name: f"{__package__}.{name}" for name in KINDS})


class Condition(nn.Module):
    """One kind of condition. Subclasses take `dim` and `grid_size`, then settings of their own, which `config` gives back."""

    rows = 0  # rows before the tokens; 0 for a condition that is added per token
    text_dim = 0  # numbers of a text feature, where a text encoder makes the values
    blocks: Sequence[int] = ()  # before which a condition without rows is added; none: to the row's embedding

    @property
    def config(self) -> dict[str, Any]:
        """Settings to build the condition from, beside dim and grid_size."""
        return {}

    def read(self, value: Any) -> Tensor:
        """Return the value of one image, as a user gives it, for `stack`. Raises ValueError, FileNotFoundError."""
        value = torch.as_tensor(value)
        self.check(value[None])
        return value

    def read_negative(self, value: Any) -> Tensor:
        """Return one image's value that guidance is to lead away from, as `read` does."""
        return self.read(value)

    def stack(self, values: Sequence[Tensor], left: bool = True) -> tuple[Tensor, Tensor | None]:
        """Batch what `read` returned: (B, …), and which rows are real, bool (B, rows), None where all are.

        left: padding stands before a value that is shorter than `rows`, as in training; else behind it.
        """
        return torch.stack(list(values)), None

    def example(self) -> Any:
        """Return a value of one image to try a model with."""
        raise ValueError(f"{type(self).__name__} has no example value; give the number of images at once")

    def place(self, blocks: int) -> None:
        """Choose `blocks` in a model of so many blocks. Raises ValueError where they do not fit."""

    def check(self, value: Tensor) -> None:
        """Raise ValueError where the value (B, …) is not of this condition."""

    def check_negative(self, value: Tensor) -> None:
        """Raise ValueError where guidance cannot lead away from the value: also "no condition" may be given."""
        self.check(value)

    def null(self, value: Tensor) -> Tensor:
        """Return what says "no condition", for as many samples as `value` has."""
        raise NotImplementedError

    def embed(self, value: Tensor) -> Tensor:
        """Return the rows (B, rows, dim); of a condition without rows one row a token in raster order, (B, N, dim).

        With `blocks` the rows of each block stand side by side, (B, N, len(blocks) * dim).
        """
        raise NotImplementedError

    def forward(self, value: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embed the value, with the null in place of the samples that `drop`, bool (B,), marks."""
        return self.embed(self.dropped(value, drop))

    def dropped(self, value: Tensor, drop: Tensor | None) -> Tensor:
        """Return the value with the null in place of the samples that `drop`, bool (B,), marks."""
        if drop is None:
            return value
        null, marked = self.null(value), drop.to(value.device, torch.bool).view(-1, *[1] * (value.dim() - 1))
        return null.where(marked, value.to(null.dtype))

    def reset(self, normal: Callable[[Tensor, float], None], std: float) -> None:
        """Give parameters and buffers that are neither of a linear nor of an embedding layer their initial values."""

    def rescale(self) -> None:
        """Scale linear layers whose initial weights are too small or too large for the condition."""


@dataclass(frozen=True)
class ControlImage:
    """A picture to draw by."""

    picture: Any  # a PIL image of any size; or an image of the model's size, uint8 (3, H, W) or (1, H, W), or features
    kind: str | None = None  # of the control that is made of it, where that is not the model's


register_condition = CONDITIONS.register
