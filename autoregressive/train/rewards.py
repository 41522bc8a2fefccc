"""Rewards: functions of drawn images and of what was asked for, which train_grpo.py makes likelier.

    @reward("bright")
    def bright(images, asked):                       # uint8 (B, H, W, 3), see `Reward` -> float (B,)
        return images.mean((1, 2, 3)) / 255

`--import FILE.py --reward bright` trains by it, `--reward bright,weight=2` counts it twice; what else stands there is given to
the function by name. A NaN says that the reward does not apply to an image, and counts 0. `@features` registers what
held-out recall compares images by in the same way.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluations.t2i.clip import CLIP, find_clip, load_clip
from utils.registry import Registry

Asked = Mapping[str, Any]
REWARDS: Registry[Callable[..., Any]] = Registry("reward")
FEATURES: Registry[Callable[..., Any]] = Registry("kind of features")
PIXELS_A_SIDE = 16

reward = REWARDS.register
features = FEATURES.register  # of functions of images, uint8 (B, H, W, 3) -> float (B, D), for --recall-features


@dataclass(frozen=True)
class Reward:
    """A registered function with its weight in the sum and its settings.

    The function takes images, uint8 (B, H, W, 3), and what was asked for by name: `text`, B strings (a prompt, or "a photo of "
    and the class's name), and for classes `label`, int64 (B,). It returns B numbers.
    """

    name: str
    weight: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, words: Mapping[str, Any]) -> "Reward":
        """Return what `--reward NAME,weight=…,…` says. Raises ValueError for a name or a setting that is not known."""
        settings = {key: value for key, value in words.items() if key not in ("name", "weight")}
        name, weight = words["name"], words.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not np.isfinite(weight):
            raise ValueError(f"--reward {name}: weight must be a finite number, got {weight}")
        try:
            inspect.signature(REWARDS[name]).bind(None, None, **settings)
        except TypeError as error:
            raise ValueError(f"--reward {name}: {error}; its settings are the function's own arguments") from error
        return cls(name, float(weight), settings)

    def __call__(self, images: np.ndarray, asked: Asked) -> np.ndarray:
        """Return the rewards of images, float64 (B,). Raises ValueError where the function fails or returns something else."""
        found = _call(f"reward {self.name}", REWARDS[self.name], images, asked, **self.settings)
        if found.shape != (len(images),):
            raise ValueError(
                f"the reward {self.name} returned the shape {found.shape} for {len(images)} images: return a number for each"
            )
        if np.isinf(found).any():
            raise ValueError(f"the reward {self.name} returned {found[np.isinf(found)][0]}: return finite numbers")
        return found


def rewards_of(rewards: Sequence[Reward], images: np.ndarray, asked: Asked) -> np.ndarray:
    """Return every reward of every image, float64 (B, K), NaN where it does not apply.

    Raises ValueError as the rewards do, and for an image to which none of them applies.
    """
    found = np.stack([one(images, asked) for one in rewards], axis=1)
    lost = np.flatnonzero(np.isnan(found).all(1))
    if len(lost):
        names = " and ".join(one.name for one in rewards)
        raise ValueError(
            f"{names} returned NaN for {len(lost)} of {len(images)} images, the first asked for as {asked['text'][lost[0]]!r}: "
            "give every image a number from at least one reward"
        )
    return found


def features_of(name: str, images: np.ndarray) -> np.ndarray:
    """Return a registered kind of features of images, (B, D). Raises ValueError where the function fails or returns something else."""
    found = _call(f"features {name}", FEATURES[name], images)
    if found.ndim != 2 or len(found) != len(images):
        raise ValueError(
            f"the features {name} have the shape {found.shape} for {len(images)} images: return a row for each"
        )
    return found


def _call(name: str, function: Callable[..., Any], images: np.ndarray, *more: Any, **settings: Any) -> np.ndarray:
    """Return what a user's function makes of a copy of the images, float64, without gradients and training's autocast."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            found = function(images.copy(), *more, **settings)
        found = found.detach().cpu().double() if isinstance(found, torch.Tensor) else found
        return np.asarray(found).astype(np.float64, casting="same_kind")
    except Exception as error:  # a user's code raises whatever it meets
        raise ValueError(f"the {name} failed: {' '.join(str(error).split())} ({type(error).__name__})") from error


# Built in


@reward("clip")
def clip(images: np.ndarray, asked: Asked, model: str = "ViT-B/32", folder: str | None = None) -> np.ndarray:
    """Return the cosines of images and their texts in CLIP's space, the texts as they are (AR-GRPO, arXiv 2508.06924).

    model: a name of evaluations/t2i/clip.py. folder: where it is, if not in pretrained_models/ or the hub's cache.
    """
    judge = _clip(model, folder)
    return (judge.images(images) * judge.texts(asked["text"], prefix="")).sum(1)


@features("clip")
def clip_features(images: np.ndarray) -> np.ndarray:
    """Return CLIP's vectors of images."""
    return _clip("ViT-B/32", None).images(images)


@features("pixels")
def pixels(images: np.ndarray) -> np.ndarray:
    """Return the pixels of small copies of the images."""
    size = PIXELS_A_SIDE, PIXELS_A_SIDE
    small = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images]
    return np.stack(small).reshape(len(images), -1) / 255


@cache
def _clip(model: str, folder: str | None) -> CLIP:
    return load_clip(find_clip(model, folder), "cuda" if torch.cuda.is_available() else "cpu")
