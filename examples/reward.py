"""Rewards of a classifier of digits, for group relative policy optimisation (GRPO, arXiv 2402.03300).

    python3 autoregressive/train/train_grpo.py --import examples/reward.py --reward read_as_asked --recall-features digits \\
        --gpt-ckpt quickstart/tiny/gpt --val-code-path quickstart/tiny/codes_held_out --cfg-scale 1 --lr 1e-4

A reward is a function of images and of what was asked for; features are what held-out recall compares images by.
"""

from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from autoregressive.train.rewards import features, reward


@cache
def judge() -> LogisticRegression:
    scans = load_digits()
    return LogisticRegression(max_iter=1000).fit(scans.data, scans.target)


@features("digits")
def small(images: np.ndarray) -> np.ndarray:
    """Return the pixels of images (B, H, W, 3) as scikit-learn's scans have them, (B, 64)."""
    scans = [np.asarray(Image.fromarray(image).convert("L").resize((8, 8), Image.Resampling.BOX)) for image in images]
    return np.stack(scans).reshape(len(images), -1) / 15.9


@reward("read_as_asked")
def read_as_asked(images: np.ndarray, asked: dict) -> np.ndarray:
    """Return the probability that the classifier gives the class that each image was asked for."""
    return judge().predict_proba(small(images))[range(len(images)), asked["label"]]


@reward("ink")
def ink(images: np.ndarray, asked: dict) -> np.ndarray:
    """Return how much of each image is bright: a reward that is easily hacked."""
    return images.mean((1, 2, 3)) / 255
