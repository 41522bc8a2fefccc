"""Animations of images that appear: GIF, animated PNG, WebP."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import atomic_write

ANIMATIONS = (".gif", ".png", ".webp")


def animation_format(path: str | Path) -> str:
    """Return the format of an animation by its file's ending. Raises ValueError where it is none of ANIMATIONS."""
    if (ending := Path(path).suffix) not in ANIMATIONS:
        raise ValueError(f"--output {path} is no animation: give a name that ends in {', '.join(ANIMATIONS)}")
    return ending[1:]


def save_animation(frames: Sequence[np.ndarray], path: str | Path, milliseconds: int, *, exact: bool = True) -> None:
    """Write frames, uint8 (H, W, 3) each, that stay so many milliseconds, the last one 12 times as long.

    exact: of WebP; otherwise the file is small and the colours are near. A GIF has 256 colours a frame.
    """
    first, *others = (Image.fromarray(frame) for frame in frames)
    times, kind = [milliseconds] * len(others) + [12 * milliseconds], animation_format(path)
    with atomic_write(path) as f:
        first.save(f, kind, save_all=True, append_images=others, duration=times, loop=0, lossless=exact)
