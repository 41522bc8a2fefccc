"""Objectives: what training minimises, one small file each. An objective is a function of logits and targets.

    @objective("z_loss")
    def z_loss(logits, targets):         # float32 (rows, codes), int64 (rows, tokens) -> float32 (rows, tokens)
        ...

`--objective z_loss` trains with it. A row predicts one token, or with next-patch prediction those of a patch. Autograd
differentiates an objective chunk by chunk (`chunked.py`), so it is written as if all logits were there.
"""

from collections.abc import Callable

from torch import Tensor

from utils.registry import Registry

Objective = Callable[[Tensor, Tensor], Tensor]
OBJECTIVES: Registry[Objective] = Registry("objective")
objective = OBJECTIVES.register

from autoregressive.train.objectives import cross_entropy  # noqa: E402, F401 - registers itself
