"""Crops and tensors of a PIL image, as the tokenizer reads them.

    image = random_crop_arr(pil_image, 256)                   # a PIL image, 256x256
    views = ten_crop_views(pil_image, 256, crop_range=1.1)    # 10 tensors (3, 256, 256) in [-1, 1]

Random crops and flips draw from Python's global `random`: seed it and they repeat.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

FLIP_VIEWS = ("center", "center_flip")
_FIVE = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
# The mirrored image is cropped, so that its top left is the mirror of the top right.
_MIRRORED = tuple(f"{name}_flip" for name in ("top_right", "top_left", "bottom_right", "bottom_left", "center"))
TEN_CROP_VIEWS = (*_FIVE, *_MIRRORED)
VIEWS = {len(names): names for names in (FLIP_VIEWS[:1], FLIP_VIEWS, _FIVE, TEN_CROP_VIEWS)}
"""The names of an image's views by their number, in the order of extraction."""

# A strip one pixel wide would be blown up to gigabytes before it is cropped.
_MAX_RESIZED_PIXELS = 2**28


class UnusableImage(ValueError):
    """An image that was read but cannot be cropped: far too long for its width."""


def center_crop_arr(pil_image: Image.Image, image_size: int) -> Image.Image:
    """Scale the short side to `image_size` pixels and cut the central square: (image_size, image_size).

    Raises UnusableImage for extreme strips.
    """
    image = _scale_short_side(pil_image, image_size)
    left = (image.width - image_size) // 2
    top = (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def random_crop_arr(
    pil_image: Image.Image, image_size: int, min_crop_frac: float = 0.8, max_crop_frac: float = 1.0
) -> Image.Image:
    """Cut a random square of `image_size` pixels whose side is between the two fractions of the scaled short side.

    Draws the short side, then y, then x from Python's `random`. Raises UnusableImage for extreme strips and ValueError
    for fractions that are not 0 < min <= max <= 1.
    """
    if not 0 < min_crop_frac <= max_crop_frac <= 1:
        raise ValueError(f"crop fractions must be 0 < min <= max <= 1, got {min_crop_frac} and {max_crop_frac}")
    shortest = math.ceil(image_size / max_crop_frac)
    longest = math.ceil(image_size / min_crop_frac)
    image = _scale_short_side(pil_image, random.randrange(shortest, longest + 1))
    top = random.randrange(image.height - image_size + 1)
    left = random.randrange(image.width - image_size + 1)
    return image.crop((left, top, left + image_size, top + image_size))


def to_tensor(pil_image: Image.Image) -> torch.Tensor:
    """Return an RGB image as float32 (3, H, W) in [-1, 1]: pixel / 127.5 - 1."""
    pixels = torch.from_numpy(np.array(pil_image, dtype=np.uint8))  # (H, W, 3)
    return pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def center_view(pil_image: Image.Image, image_size: int) -> torch.Tensor:
    """Return the centre crop as a tensor (3, image_size, image_size): evaluation."""
    return to_tensor(center_crop_arr(pil_image, image_size))


def random_view(pil_image: Image.Image, image_size: int, flip: bool = True, crop: bool = True) -> torch.Tensor:
    """Return a view for tokenizer training as a tensor (3, image_size, image_size).

    flip: mirror it half of the time. crop: a random one; otherwise the centre.
    """
    image = random_crop_arr(pil_image, image_size) if crop else center_crop_arr(pil_image, image_size)
    if flip and random.random() < 0.5:
        image = ImageOps.mirror(image)
    return to_tensor(image)


def ten_crop_views(pil_image: Image.Image, image_size: int, crop_range: float) -> list[torch.Tensor]:
    """Cut the corners and centre of the centre crop of int(image_size * crop_range), then their mirror images.

    Returns 10 tensors (3, image_size, image_size) in the order of TEN_CROP_VIEWS. Raises ValueError for a crop range
    below 1.
    """
    if crop_range < 1:
        raise ValueError(f"the crop range must be at least 1, got {crop_range}")
    from torchvision.transforms import TenCrop  # what serves has no torchvision, and reads shards

    crops = TenCrop(image_size)(center_crop_arr(pil_image, int(image_size * crop_range)))
    return [to_tensor(crop) for crop in crops]


def corrected_views(recorded: Sequence[str]) -> list[str]:
    """Return the right names of recorded views: the first edition crossed ten crops' mirrors, and numbered five crops."""
    crossed = [*_FIVE, *(f"{name}_flip" for name in _FIVE)]
    numbered = [f"view_{k}" for k in range(len(recorded))]
    return list(VIEWS.get(len(recorded), recorded) if list(recorded) in (crossed, numbered) else recorded)


def code_view_names(ten_crop: bool, flip: bool = True) -> tuple[str, ...]:
    """Return the names of what `code_views` gives, in its order."""
    names = TEN_CROP_VIEWS if ten_crop else FLIP_VIEWS
    return names if flip else names[: len(names) // 2]


def code_views(
    pil_image: Image.Image, image_size: int, ten_crop: bool, crop_range: float, flip: bool = True
) -> list[torch.Tensor]:
    """Return the views whose codes are stored: ten crops, or the centre crop and its mirror image; unflipped ones alone without `flip`.

    Images in which left and right matter (digits, text, scans) must not be mirrored.
    """
    if ten_crop:
        views = ten_crop_views(pil_image, image_size, crop_range)
    else:
        views = [view := center_view(pil_image, image_size), view.flip(-1)]
    return views if flip else views[: len(views) // 2]


def _scale_short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale an image to a short side of `size` pixels: halved by averaging while it can be, then resampled bicubically."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _MAX_RESIZED_PIXELS:
        raise UnusableImage(f"{image.width}x{image.height} pixels are too long a strip for a {size}-pixel crop")
    return image.resize((width, height), Image.Resampling.BICUBIC)
