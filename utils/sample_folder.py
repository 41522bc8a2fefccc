"""Folders of numbered images that many processes write and an interrupted run goes on with.

claim_folder(folder, {"cfg_scale": 1.5, "gpt_ckpt": file_identity(path)})    # refuses images made with other settings
write_image_npz(target, read_images(paths), shape, labels)
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import write_json

if TYPE_CHECKING:
    import numpy as np

SETTINGS_FILE = "settings.json"


def file_identity(path: Path) -> dict[str, Any]:
    """What tells one state of a file from another, as plain values: its place, its size and when it was written."""
    status = path.stat()
    return {"file": str(path.resolve()), "bytes": status.st_size, "modified": status.st_mtime_ns}


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Records in `folder`/settings.json what its images are made with, plain values that JSON gives back as they were.

    Raises ValueError where the folder holds images made with other settings, or its record cannot be read.
    """
    record = folder / SETTINGS_FILE
    if not record.exists():
        write_json(record, settings)
        return
    try:
        before = dict(json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{record} is not the record of a run ({error}); remove {folder}, or choose another"
        ) from error
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        described = "; ".join(f"{key}: {before.get(key)}, now {settings[key]}" for key in changed)
        raise ValueError(
            f"{folder} holds images drawn with other settings ({described}); remove it, or choose another --sample-dir"
        )


def read_images(paths: Iterable[Path]) -> Iterator["np.ndarray"]:
    """The PNG files' pixels, one at a time, uint8 (H, W, 3). Raises ValueError that names a file it cannot read."""
    import numpy as np
    from PIL import Image

    for path in paths:
        try:
            with Image.open(path) as image:
                yield np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} is not readable ({error}); remove it and run the same command again") from error
