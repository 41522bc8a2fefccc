"""Seeds that are a function of where a draw happens: a run may stop, resume or change its workers and draws the same."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MASK = 2**64 - 1


def item_seed(*ints: Any) -> Any:
    """Hash integers to a seed in [0, 2**63): SplitMix64 folded over their count and values.

    Order and count matter, neighbours give unrelated seeds, and the result is the same on every machine. Some of the
    integers may be uint64 arrays that broadcast: the result is an array of seeds then.
    """
    state = len(ints)
    for value in ints:
        state = _mix(state ^ _mix(value & _MASK))
    return state >> 1


def _mix(x: Any) -> Any:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def image_noise(seed: int, indices: Sequence[int], tokens: int, draw: str = "race1") -> Tensor:
    """Return the noise that draws the tokens of images `indices` of a run, (len(indices), tokens), in the layout's order.

    Row i is a function of (seed, indices[i]) alone, whatever the batch, the process or the device.
    draw: SamplingConfig.draw. "race1": int64 keys, item_seed(seed, image, position, 2); image_label and order_seed hash a 1
    and a 3 in place of the 2 and no position. "cdf": float32 in [0, 1).
    """
    if draw == "race1":
        images = np.array([index & _MASK for index in indices], np.uint64)[:, None]
        return torch.from_numpy(item_seed(seed, images, np.arange(tokens, dtype=np.uint64), 2).astype(np.int64))
    rows = [np.random.Generator(np.random.Philox(key=item_seed(seed, i))).random(tokens, np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, tokens)


def order_seed(seed: int, index: int) -> int:
    """Return the seed of the order in which image `index` of a run is drawn, where it has one of its own."""
    return item_seed(seed, index, 3)


def particle_noise(seed: int, index: int, tokens: int, particles: int, draw: str = "race1") -> Tensor:
    """Return the noise of an image's particles, (particles, tokens): the first has image_noise's, the others keys of their own.

    That of token j of particle k > 0 is item_seed(seed, index, j, 3, k). One particle may have another draw than race1.
    """
    first = image_noise(seed, [index], tokens, draw)
    if particles == 1:
        return first
    numbers = np.arange(1, particles, dtype=np.uint64)[:, None]
    others = item_seed(seed, index, np.arange(tokens, dtype=np.uint64), 3, numbers)
    return torch.cat([first, torch.from_numpy(others.astype(np.int64))])


def image_label(seed: int, index: int, num_classes: int) -> int:
    """Return the class of image `index` of a run where classes are drawn at random."""
    return item_seed(seed, index, 1) % num_classes
