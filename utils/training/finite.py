"""Watch over losses: NaN and infinity are found without waiting for an accelerator at every step.

watch = FiniteWatch(); watch.add(step, {"loss": [loss of each part of the batch]}); watch.first(wait=False)
"""

from collections import deque
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor


@dataclass(frozen=True, order=True)
class NotFinite:
    """Place of a value that is not finite: the optimizer step, the part of the batch (None: all of it), what it was."""

    step: int
    part: int | None
    name: str
    value: float


class FiniteWatch:
    """Values travel to the host beside the computation and are looked at once they are there."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, list[tuple[str, int | None]], Tensor, torch.cuda.Event | None]] = deque()
        self._found: NotFinite | None = None

    def add(self, step: int, values: list[tuple[str, int | None, Tensor]]) -> None:
        """Take note of scalars of a step: (name, part of the batch, value). A step may have none."""
        if not values:
            return
        names = [(name, part) for name, part, _ in values]
        numbers = torch.stack([value.detach().float() for *_, value in values])
        event = None
        if numbers.is_cuda:
            host = torch.empty(len(numbers), pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            numbers = host
        self._pending.append((step, names, numbers, event))

    def first(self, wait: bool) -> NotFinite | None:
        """Return the first value that is not finite among those that have arrived, or with `wait` among all."""
        while self._pending and self._found is None:
            step, names, numbers, event = self._pending[0]
            if event is not None:
                if not wait and not event.query():
                    break
                event.synchronize()
            elif not (wait or numbers.device.type == "cpu"):
                break  # an accelerator without events would be waited for
            self._pending.popleft()
            for (name, part), value in zip(names, numbers.tolist(), strict=True):
                if not isfinite(value):
                    self._found = NotFinite(step, part, name, value)
                    break
        return self._found
