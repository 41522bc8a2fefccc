"""How a model is spread over processes, applied from outside: the model knows nothing of it.

wrapped = parallelize(model, dist, compile=True)     # call this one in the loss
"""

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from utils.distributed import Distributed


def parallelize(model: nn.Module, dist: Distributed, compile: bool = False) -> nn.Module:
    """The callable form of `model` for this run: compiled where asked and useful, DDP with several processes.

    The parameters stay those of `model`; its state dict is the one to save.
    """
    wrapped: nn.Module = model
    if compile and dist.device.type == "cuda":
        wrapped = torch.compile(wrapped)
    if dist.world_size > 1:
        ids = [dist.device.index] if dist.device.type == "cuda" else None
        wrapped = DistributedDataParallel(
            wrapped, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return wrapped
