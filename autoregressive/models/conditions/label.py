"""Class label: a row before the tokens (LlamaGen, arXiv 2406.06525, section 2.2)."""

from operator import index
from reprlib import repr as shorten
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from autoregressive.models.conditions.base import Condition, register_condition


class Label(Condition):
    """Numbers of classes, num_classes for "no class"; for trunks that embed them by tables of their own.

    rows: condition rows that the trunk makes of a label.
    """

    def __init__(self, num_classes: int, rows: int = 1):
        super().__init__()
        self.num_classes, self.rows = num_classes, rows

    @property
    def config(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes}

    def read(self, value: Any, end: int | None = None) -> Tensor:
        """Return a whole number below the number of classes as int64 ()."""
        try:
            if isinstance(value, bool):
                raise TypeError
            label = index(value)
        except TypeError:
            message = f"a label is a whole number, 0 to {self.num_classes - 1}, got {shorten(value)}"
            raise ValueError(message) from None
        if not 0 <= label < (end or self.num_classes):
            raise ValueError(f"label {label} is out of range: the model has classes 0 to {self.num_classes - 1}")
        return torch.tensor(label)

    def read_negative(self, value: Any) -> Tensor:
        """Return a label as read does, or num_classes, "no class"."""
        return self.read(value, self.num_classes + 1)

    def example(self) -> int:
        return 0

    def check(self, value: Tensor) -> None:
        """Raise ValueError for what are no whole numbers (B,), or for a label outside 0 … num_classes - 1."""
        if value.dim() != 1 or value.is_floating_point():
            raise ValueError(f"labels are whole numbers of shape (B,), got {value.dtype} of shape {tuple(value.shape)}")
        labels = value.long()  # a narrow type may not reach the number of classes
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            raise ValueError(
                f"label {int(outside[0])} is out of range: the model has classes 0 to {self.num_classes - 1}"
            )

    def check_negative(self, value: Tensor) -> None:
        """Raise ValueError as check does, but not for num_classes, "no class"."""
        self.check(torch.where(value == self.num_classes, 0, value))

    def null(self, value: Tensor) -> Tensor:
        return torch.full_like(value, self.num_classes, dtype=torch.long)


@register_condition("label")
class LabelEmbedder(Label):
    """Class embeddings; the row after the last class means "no class"."""

    def __init__(self, dim: int, grid_size: int = 0, *, num_classes: int):
        super().__init__(num_classes)
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def embed(self, value: Tensor) -> Tensor:
        return self.embedding_table(value.long()).unsqueeze(1)
