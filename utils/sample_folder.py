"""Folders of numbered images that many processes write and an interrupted run goes on with.

folder = Path(args.sample_dir) / folder_name(args, gpt_path, vq_path)
claim_folder(folder, {"cfg_scale": 1.5, "gpt_ckpt": file_identity(path)})    # refuses images made with other settings
write_image_npz(target, read_images(paths), shape, labels)
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import atomic_write, write_json

if TYPE_CHECKING:
    import numpy as np

SETTINGS_FILE = "settings.json"


def folder_name(args: argparse.Namespace, gpt_path: Path, vq_path: Path) -> str:
    """The published name of a folder of samples; args has the sampling scripts' flags."""
    folder = gpt_path if gpt_path.is_dir() else gpt_path.parent
    checkpoint = folder.absolute().name if args.from_fsdp else gpt_path.stem
    size = getattr(args, "image_size_eval", args.image_size)  # images from prompts are saved as they are drawn
    return (
        f"{args.gpt_model}-{checkpoint}-size-{args.image_size}-size-{size}-{args.vq_model}-"
        f"topk-{args.top_k}-topp-{args.top_p}-temperature-{args.temperature}-cfg-{args.cfg_scale}-seed-{args.global_seed}"
    )


def file_identity(path: Path) -> dict[str, Any]:
    """What tells one state of a file from another, as plain values: its place, its size and when it was written."""
    status = path.stat()
    return {"file": str(path.resolve()), "bytes": status.st_size, "modified": status.st_mtime_ns}


def folder_identity(folder: Path) -> dict[str, Any]:
    """What tells one state of a model's folder from another: its place, its files' sizes, when the last was written."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    written = max((path.stat().st_mtime_ns for path in files), default=0)
    return {
        "folder": str(folder.resolve()),
        "bytes": {path.name: path.stat().st_size for path in files},
        "modified": written,
    }


def tree_identity(folder: Path) -> dict[str, Any]:
    """What tells one state of a folder of very many files from another: its place, their number and bytes, the last one's time."""
    states = [path.stat() for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return {
        "folder": str(folder.resolve()),
        "files": len(states),
        "bytes": sum(state.st_size for state in states),
        "modified": max((state.st_mtime_ns for state in states), default=0),
    }


def text_identity(texts: list[str]) -> dict[str, Any]:
    """What tells one list of texts from another, wherever the file is that they came from."""
    return {"count": len(texts), "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}


def recorded_settings(folder: Path) -> dict[str, Any] | None:
    """Return what `folder`/settings.json records; None where there is none. Raises ValueError for a damaged one."""
    record = folder / SETTINGS_FILE
    if not record.exists():
        return None
    try:
        return dict(json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{record} is not the record of a run ({error}); remove {folder}, or choose another"
        ) from error


def claim_folder(folder: Path, settings: dict[str, Any], unrecorded: dict[str, Any] | None = None) -> None:
    """Records in `folder`/settings.json what its images are made with, plain values that JSON gives back as they were.

    unrecorded: settings that folders of earlier editions had without recording them.

    Raises ValueError where the folder holds images made with other settings, or its record cannot be read.
    """
    before = recorded_settings(folder)
    if before is None:
        write_json(folder / SETTINGS_FILE, settings)
        return
    before = (unrecorded or {}) | before
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        described = "; ".join(f"{key}: {before.get(key)}, now {settings[key]}" for key in changed)
        raise ValueError(
            f"{folder} holds images drawn with other settings ({described}); remove it, or choose another --sample-dir"
        )


def write_captions(folder: Path, captions: list[str], images: Iterable[Path]) -> None:
    """Writes `folder`/captions.txt, a caption a line with its white space made single spaces, and result.jsonl.

    result.jsonl has {"text": the caption as it is, "image": the file's place in the folder} on each line.
    """
    with atomic_write(folder / "captions.txt") as f:
        f.write("".join(" ".join(caption.split()) + "\n" for caption in captions).encode())
    with atomic_write(folder / "result.jsonl") as f:
        for caption, image in zip(captions, images, strict=True):
            line = {"text": caption, "image": image.relative_to(folder).as_posix()}
            f.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


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
