"""Rewards of the tests, for --import."""

import numpy as np
import torch

from autoregressive.train.rewards import features, reward


@reward("bright")
def bright(images, asked, power=1.0):
    """The brightness of the first token's pixels: a decoder with random weights gives every image the same mean."""
    return (images[:, :4, :4].mean((1, 2, 3)) / 255) ** power


@reward("raises")
def raises(images, asked):
    raise KeyError("no such network")


@reward("of_shape")
def of_shape(images, asked, shape=1):
    return np.zeros(shape)


@reward("constant")
def constant(images, asked, value=0.5):
    return [float(value)] * len(images)


@reward("of_kind")
def of_kind(images, asked, kind="complex"):
    images[:] = 0  # which no other reward sees
    kinds = {
        "complex": np.full(len(images), 1 + 2j),
        "words": ["0.5"] * len(images),
        "tensor": torch.ones(len(images), dtype=torch.bfloat16, requires_grad=True) * 0.5,
        "bool": np.ones(len(images), bool),
        "state": [torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")] * len(images),
    }
    if kind not in kinds:
        raise RuntimeError(f"no kind\nis {kind}")
    return kinds[kind]


@reward("of_even_classes")
def of_even_classes(images, asked):
    return np.where(asked["label"] % 2 == 0, 1.0, np.nan)


@features("flat")
def flat(images):
    return images.mean((1, 2, 3))
