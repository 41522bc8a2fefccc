"""Folders of numbered images that many processes write and an interrupted run continues."""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import atomic_write, content_of, write_json

if TYPE_CHECKING:
    import numpy as np

SETTINGS_FILE = "settings.json"


def folder_name(args: argparse.Namespace, gpt_path: Path, vq_path: Path, prompts: str | None = None) -> str:
    """Return the published name of a folder of samples; args has the sampling scripts' flags. prompts: their file's name."""
    folder = gpt_path if gpt_path.is_dir() else gpt_path.parent
    checkpoint = folder.absolute().name if args.from_fsdp else gpt_path.stem
    size = getattr(args, "image_size_eval", args.image_size)  # images from prompts are saved as they are drawn
    asked = f"{prompts.partition('.')[0].lower()}-" if prompts else ""
    power = f"-{args.cfg_power}" if args.cfg_schedule == "power-cosine" else ""
    schedule = "" if args.cfg_schedule == "constant" else f"-{args.cfg_schedule}{power}"
    return (
        f"{args.gpt_model}-{checkpoint}-{asked}size-{args.image_size}-size-{size}-{args.vq_model}-"
        f"topk-{args.top_k}-topp-{args.top_p}-temperature-{args.temperature}-cfg-{args.cfg_scale}{schedule}-"
        f"seed-{args.global_seed}"
    )


def file_identity(path: Path) -> dict[str, Any]:
    """Describe a file or a folder by its content; where it lies is for the reader and not compared."""
    from utils.checkpoint import files_of  # imports torch

    files = [path] if path.is_dir() else files_of(path)  # an index, or a shard, stands for all of them
    return {"file": str(path.resolve()), "content": "-".join(map(content_of, files))}


def _same(before: Any, now: Any) -> bool:
    """Compare two settings. Files of the first edition's records are known by their time of change, wherever they lie now."""
    if not (isinstance(before, dict) and isinstance(now, dict) and "content" in now):
        return before == now
    if "content" in before:
        place = ("folder", "images", "names")  # of images, of which one may have been mended in its place since
        in_place = "names" in before and all(before.get(key) == now.get(key) for key in place)
        return in_place or before["content"] == now["content"]
    if "modified" in before:
        path = Path(now["file"])
        times = [each.stat().st_mtime_ns for each in (path.iterdir() if path.is_dir() else [path]) if each.is_file()]
        return before["modified"] in (path.stat().st_mtime_ns, max(times, default=0))
    return all(now.get(key) == value for key, value in before.items())


def text_identity(texts: list[str]) -> dict[str, Any]:
    """Return the identity of a list of texts, wherever their file lies."""
    return {"count": len(texts), "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}


def recorded_settings(folder: Path) -> dict[str, Any] | None:
    """Return what `folder`/settings.json records; None where there is none. Raises ValueError for a damaged one."""
    record = folder / SETTINGS_FILE
    if not record.exists():
        return None
    try:
        return dict(json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
        what = f"{record} is not the record of a run ({error})"
        raise ValueError(f"{what}; remove {folder}, or choose another") from error


def claim_folder(folder: Path, settings: dict[str, Any], unrecorded: dict[str, Any] | None = None) -> None:
    """Record in `folder`/settings.json what its images are made with, plain values that JSON gives back as they were.

    unrecorded: settings that folders of earlier editions had without recording them.

    Raises ValueError where the folder holds images made with other settings, or its record cannot be read.
    """
    recorded = recorded_settings(folder)
    if recorded is None or not any(folder.rglob("*.png")):  # a run that ended before its first image
        write_json(folder / SETTINGS_FILE, settings)
        return
    before = (unrecorded or {}) | recorded
    changed = [key for key in settings if not _same(before.get(key), settings[key])]
    if changed:
        described = "; ".join(f"{key}: {_words(before.get(key))}, now {_words(settings[key])}" for key in changed)
        what = f"{folder} holds images drawn with other settings ({described})"
        raise ValueError(f"{what}; give those, remove it, or choose another --sample-dir")
    if any(recorded.get(key) != settings[key] for key in settings):  # written at another place, or by the first edition
        write_json(folder / SETTINGS_FILE, {**before, **settings})


def _words(value: Any) -> Any:
    """Return a setting as it is told; of a file its place and content."""
    if not isinstance(value, dict) or not {"file", "folder"} & value.keys():
        return value
    content = f" (content {value['content']})" if "content" in value else ""
    return f"{value.get('file', value.get('folder'))}{content}"


def rename_earlier(earlier: Path, folder: Path, settings: dict[str, Any], unrecorded: dict[str, Any]) -> None:
    """Give a folder that an earlier edition named otherwise its present name, where it was drawn with these settings.

    unrecorded: as for claim_folder.
    """
    if folder.exists() or not earlier.exists():
        return
    before = recorded_settings(earlier)
    if before and all(_same((unrecorded | before).get(key), value) for key, value in settings.items()):
        earlier.rename(folder)
        print(f"{earlier} is named {folder.name} now")


def write_captions(folder: Path, captions: list[str], images: Iterable[Path]) -> None:
    """Write `folder`/captions.txt, a caption a line with its white space made single spaces, and result.jsonl.

    result.jsonl has {"text": the caption as it is, "image_path": where the image is} on each line.
    """
    with atomic_write(folder / "captions.txt") as f:
        f.write("".join(" ".join(caption.split()) + "\n" for caption in captions).encode())
    with atomic_write(folder / "result.jsonl") as f:
        for caption, image in zip(captions, images, strict=True):
            line = {"text": caption, "image_path": image.as_posix()}
            f.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def read_images(paths: Iterable[Path]) -> Iterator["np.ndarray"]:
    """Yield the PNG files' pixels, one at a time, uint8 (H, W, 3). Raises ValueError that names a file it cannot read."""
    import numpy as np
    from PIL import Image

    for path in paths:
        try:
            with Image.open(path) as image:
                yield np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} is not readable ({error}); remove it and run the same command again") from error
