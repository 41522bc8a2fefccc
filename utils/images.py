"""Pictures of model outputs: bytes, PNG files, grids, and the `.npz` of many images that evaluators read."""

import io
import math
import struct
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from utils.errors import NotFiniteError
from utils.files import atomic_write


def to_uint8(images: Tensor) -> np.ndarray:
    """Return clamp(127.5 x + 128, 0, 255), truncated. (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3).

    Raises NotFiniteError where a pixel is NaN or infinite.
    """
    if not images.isfinite().all():
        count = int((~images.isfinite()).flatten(1).any(1).sum())
        raise NotFiniteError(
            f"the pixels of {count} of {len(images)} images are not finite, in {str(images.dtype).removeprefix('torch.')}: "
            "give other tokenizer weights, or --decode-precision none"
        )
    values = (127.5 * images.float() + 128.0).clamp(0, 255)
    return values.permute(0, 2, 3, 1).byte().cpu().numpy()


def make_grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Lay images out in rows of `columns` (as square as may be by default), 2 black pixels apart. (n, H, W, 3) -> (H', W', 3), uint8."""
    padding = 2
    count, height, width, channels = images.shape
    columns = columns or max(1, math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    shape = (rows * (height + padding) + padding, columns * (width + padding) + padding, channels)
    grid = np.zeros(shape, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + padding) + padding, (i % columns) * (width + padding) + padding
        grid[y : y + height, x : x + width] = image
    return grid


def labelled_grid(images: np.ndarray, labels: Sequence[str], columns: int, side: int = 96) -> np.ndarray:
    """Lay images out with a label below each, small images enlarged to `side` pixels or more. (n, H, W, 3) -> (H', W', 3), uint8."""
    scale, size = max(1, -(-side // images.shape[2])), 11
    font = ImageFont.load_default(size=size)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    _, height, width, _ = images.shape
    wide = width + 8
    line = int(wide / (0.5 * size))
    texts = [textwrap.wrap(label, line, max_lines=3, placeholder=" …") for label in labels]
    tall = height + (size + 2) * max(map(len, texts)) + 8
    grid = Image.new("RGB", (columns * wide, -(-len(images) // columns) * tall), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        x, y = i % columns * wide + 4, i // columns * tall + 4
        grid.paste(Image.fromarray(image), (x, y))
        for line, text in enumerate(lines):
            place = x + width / 2, y + height + (size + 2) * (line + 0.5)
            draw.text(place, text, fill="black", font=font, anchor="mm")
    return np.asarray(grid)


# Pixels of a picture that is read to be edited: more fit no model, and a small file may unpack to any number.
MOST_PIXELS = 64 * 2**20


def open_picture(
    file: str | Path | IO[bytes], name: str = "", most_pixels: int = MOST_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Read a picture to edit, turned as its EXIF says.

    name: of the file, for messages. formats: Pillow's names of those that are read (default: all it knows).
    Raises ValueError for what is no picture, a damaged one, one of too many pixels, or of other than 8 bits; FileNotFoundError.
    """
    name = name or str(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(file, formats=formats)
        if image.width * image.height > most_pixels:
            size = f"{image.width}x{image.height}"
            raise ValueError(f"{name} has {size} pixels: give a picture of at most {most_pixels:,}")
        require_eight_bits(image, name)
        image.load()
        return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name} is no picture that can be read ({reason}): give a PNG, JPEG or WebP file") from error


def require_eight_bits(image: Image.Image, name: str) -> None:
    """Raise ValueError for pixels of 16 or 32 bits, which Pillow does not scale to 8."""
    if image.mode[0] in "IF":
        raise ValueError(f"{name} has pixels of mode {image.mode}: give a picture of 8 bits a channel")


def save_png(image: np.ndarray | Image.Image, path: str | Path) -> None:
    """Write a PNG, atomically (`is_whole_png` tells one that a power cut left short). image: uint8 (H, W, 3) or PIL."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    with atomic_write(path, durable=False) as f:
        f.write(buffer.getvalue())


def is_whole_png(path: Path) -> bool:
    """Tell whether the file ends as a complete PNG does."""
    try:
        with open(path, "rb") as f:
            f.seek(-12, io.SEEK_END)
            return f.read() == b"\x00\x00\x00\x00IEND\xaeB`\x82"
    except OSError:
        return False


def write_image_npz(path: str | Path, images: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray) -> None:
    """Write `arr_0` uint8 of `shape` (n, H, W, 3) and `arr_1` int64 labels (n,), one image in memory at a time.

    Raises ValueError where an image has another shape or there are too few.
    """
    with atomic_write(path) as f, zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(member, header)
            count = 0
            for count, image in enumerate(images, start=1):
                if image.shape != shape[1:] or image.dtype != np.uint8:
                    raise ValueError(f"image {count - 1} is {image.dtype} {image.shape}, expected uint8 {shape[1:]}")
                member.write(image.tobytes())
            if count != shape[0]:
                raise ValueError(f"{path}: {count} images for {shape[0]} places")
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
            np.lib.format.write_array(member, np.asarray(labels, np.int64))


def peak_signal_to_noise_ratio(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of two uint8 images (or batches, over all their pixels); infinite where they are equal."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
