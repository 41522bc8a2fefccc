"""Common part of the scripts that edit a picture: what is wrong with files, the edit, and the sheet of before and after."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoregressive.sample.flags import MARGINS, sampling_config

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from autoregressive.pipeline import ImagePipeline


def picture_to_edit(args: argparse.Namespace) -> "tuple[Image.Image, np.ndarray | None]":
    """Read --image, and the pixels to fill, bool (height, width), None where surroundings are drawn.

    Raises ValueError for what is no picture, no hole, or a hole and margins at once; FileNotFoundError.
    """
    from autoregressive.editing import hole_in
    from utils.images import open_picture

    sampling_config(args)  # refuses settings before files are read
    image, margins = open_picture(args.image), [side for side in MARGINS if getattr(args, side)]
    if margins:
        of_holes = {"mask": args.mask, "box": args.box, "ring": args.ring, "no-keep-pixels": not args.keep_pixels}
        if given := [flag for flag, value in of_holes.items() if value]:
            raise ValueError(f"--{given[0]} is of a hole, and --{margins[0]} extends the picture: give one of them")
        return image, None
    hole = hole_in(image, None if args.mask is None else open_picture(args.mask), args.box)
    if not hole.any():
        raise ValueError(f"nothing is to be filled: {args.mask or args.image} has no transparent or white pixels")
    return image, hole


def write_edits(
    args: argparse.Namespace, pipeline: "ImagePipeline", image: "Image.Image", hole: "np.ndarray | None", **asked: Any
) -> None:
    """Edit or extend a picture as the flags say, write the results, and print how well they fit.

    asked: class or prompt, as ImagePipeline.edit takes it. Raises ValueError as it does.
    """
    import numpy as np
    from PIL import Image, ImageOps

    from autoregressive.sample.common import extra_conditions, orders_of
    from utils.images import make_grid, save_png

    numbers = range(args.num_images)
    settings = {**vars(sampling_config(args)), **asked, "n": args.num_images, "orders": orders_of(args, numbers)}
    settings |= {name: getattr(args, name) for name in ("particles", "rounds", "seed")}
    settings["extra_conditions"] = extra_conditions(args, numbers) or None
    before = []
    if hole is None:
        results = pipeline.extend(image, **{side: getattr(args, side) for side in MARGINS}, **settings)
    else:
        results = pipeline.edit(image, hole, ring=args.ring, keep_pixels=args.keep_pixels, **settings)
        shown = np.where(hole[..., None], np.uint8(128), np.asarray(image.convert("RGB")))
        before = [image.convert("RGB"), Image.fromarray(shown)]
    for i, result in enumerate(results):
        told = f"log-evidence {result.info['log_evidence']:.1f}, effective particles {result.info['effective']:.1f}"
        print(f"{i}: {told} of {result.info['particles']}")
    output, size = Path(args.output), results[0].size
    if args.sheet:
        pictures = [*(ImageOps.fit(each, size, Image.Resampling.BICUBIC) for each in before), *results]
        save_png(make_grid(np.stack([np.asarray(each) for each in pictures]), len(pictures)), output)
    else:
        names = [output] if len(results) == 1 else [output.with_stem(f"{output.stem}-{i}") for i in numbers]
        for name, result in zip(names, results, strict=True):
            save_png(result, name)
    print(f"wrote {args.output}: {len(results)} of {size[0]}x{size[1]}")
