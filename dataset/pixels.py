"""RGB pixels of an image file of any format and mode.

    image = load_rgb("photo.jpg")                            # upright, transparency laid on white
    image = load_rgb("photo.jpg", PUBLISHED)                 # as the published scripts read it

Of a file with several pictures (GIF, APNG, TIFF, MPO) the first is read. Colour profiles are not applied.
"""

import logging
import os
import warnings
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps

from dataset.augmentation import UnusableImage
from utils.files import require_regular

logger = logging.getLogger(__name__)

# The pictures that Pillow decodes by itself, the same list on every machine: what is found in a folder, and so every label
# and number, must not depend on how a Pillow was built. Without: vector graphics (.eps, .wmf), videos, scientific grids.
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"),
    *(".jpe", ".jfif", ".mpo", ".apng", ".gif", ".tif", ".tiff", ".avif", ".avifs", ".qoi"),
    *(".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".tga", ".icb", ".vda", ".vst", ".dib", ".ico", ".icns", ".cur", ".dds", ".psd", ".pcx", ".dcx", ".pcd"),
    *(".sgi", ".rgb", ".rgba", ".bw", ".ras", ".im", ".msp", ".xbm", ".xpm"),
)
LOSSY_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".avifs")

_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF


@dataclass(frozen=True)
class Reading:
    """Settings of reading a file.

    exif: turn the image as its EXIF orientation says.
    background: colour laid under transparency, as '#rrggbb'; None drops transparency and shows the colours below it.
    """

    exif: bool = True
    background: str | None = "#ffffff"

    @classmethod
    def of(cls, args: Namespace, recorded: dict | None = None) -> "Reading":
        """Return the settings of --exif and --background.

        Args:
            args: flags of `utils/cli.py:add_reading_flags`; those that are absent or None take their defaults.
            recorded: settings of the folder that the run continues, None for a new one. A folder without `record()` among
                them goes on as it was begun, unless the flags say otherwise.
        """
        given = {name: getattr(args, name, None) for name in ("exif", "background")}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("background") == "none":
            given["background"] = None
        if recorded is None or "exif" in recorded:
            return cls(**given)
        if not given:
            logger.info(
                "the folder has no record of EXIF and transparency: images are read as published, as it was begun"
            )
        return replace(PUBLISHED, **given)

    def record(self) -> dict:
        """Return what is kept beside data that was made of images; what has no such record was read as published."""
        return {"exif": self.exif, "background": self.background or "none"}

    @classmethod
    def recorded(cls, settings: dict) -> "Reading":
        """Return the reading that settings record."""
        if "exif" not in settings:
            return PUBLISHED
        return cls(settings["exif"], None if settings["background"] == "none" else settings["background"])

    def __str__(self) -> str:
        turned = "turned as EXIF says" if self.exif else "as they lie in the file, whatever EXIF says"
        return f"images are {turned}; transparency is {f'laid on {self.background}' if self.background else 'dropped'}"


DEFAULT = Reading()
PUBLISHED = Reading(exif=False, background=None)


def load_rgb(path: str | os.PathLike, reading: Reading = DEFAULT) -> Image.Image:
    """Read an image file, or an open binary one, of any mode as RGB.

    Raises OSError, UnusableImage, DecompressionBombError and what else Pillow's decoders raise for missing, damaged or
    huge files.
    """
    if isinstance(path, (str, os.PathLike)):
        require_regular(path)
    with Image.open(path) as image:
        image.load()
        if reading.exif:
            with suppress(Exception):  # EXIF that is damaged in any way does not make the pixels unreadable
                ImageOps.exif_transpose(image, in_place=True)  # Pillow itself undoes a TIFF's own orientation
        return to_rgb(image, reading.background)


def to_rgb(image: Image.Image, background: str | None = None) -> Image.Image:
    """Return the image in mode RGB, transparency laid on `background` (None: dropped).

    Raises UnusableImage where it is not known which value is white.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if background is not None and image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    with warnings.catch_warnings():
        # Dropping the transparency of a palette image is what is meant.
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey of 16 bits or of floats from 0 to 1 in 8 bits; Pillow would clip them to white or to black."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):
            raise UnusableImage(
                f"pixels are floats from {values.min():g} to {values.max():g}, expected 0 (black) to 1 (white): save 8 bits"
            )
        return Image.fromarray((values * 255 + 0.5).astype(np.uint8))
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and (
        image.format not in ("PNG", "PPM", None) or not 0 <= values.min() <= values.max() < 2**16
    ):
        raise UnusableImage("pixels are 32-bit integers, of which white is not known: save it with 8 or 16 bits")
    wide = values.astype(np.int64) << (16 - min(tags.get(_BITS, (16,))[0], 16))
    if tags.get(_PHOTOMETRIC) == 0:  # zero is white
        wide = 65535 - wide
    grey = Image.fromarray((wide >> 8).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
