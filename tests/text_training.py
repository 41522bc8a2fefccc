"""What the tests of text-conditional training share: small image-text pairs with features, as jsonl lists or tar shards."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.text_features import FeatureWriter

DIM, TOKENS = 6, 5  # of a feature; condition rows
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}


def picture(number: int, size: int = 20) -> Image.Image:
    """A picture of one colour with a brighter corner; the colour goes by the number."""
    array = np.empty((size, size + 4 * (number % 3), 3), np.uint8)
    array[:] = list(COLOURS.values())[number % len(COLOURS)]
    array[: 2 + number % 5, : 3 + number % 7] = 240
    return Image.fromarray(array)


def caption_features(number: int, length: int | None = None) -> torch.Tensor:
    """Features (length, DIM) that tell the picture's colour; lengths from 1 to TOKENS + 1."""
    length = 1 + number % (TOKENS + 1) if length is None else length
    generator = torch.Generator().manual_seed(number)
    features = 0.1 * torch.randn(length, DIM, generator=generator)
    features[:, number % len(COLOURS)] += 2
    return features


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def make_pairs(folder: Path, counts: dict[str, int], size: int = 20) -> Path:
    """A jsonl file for each stem with so many lines, and their images; numbered through all files."""
    (folder / "images").mkdir(parents=True)
    number = 0
    for stem, count in counts.items():
        lines = []
        for _ in range(count):
            (folder / "images" / f"{number}.png").write_bytes(png(picture(number, size)))
            colour = list(COLOURS)[number % len(COLOURS)]
            lines.append(json.dumps({"image_path": f"images/{number}.png", "text": [f"a {colour} thing", "b", "c"]}))
            number += 1
        (folder / f"{stem}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_stem(writer: FeatureWriter, stem: str, features: list[torch.Tensor | None]) -> None:
    """Writes all shards of a stem: a tensor (length, D) or None for each of its lines."""
    for shard, start in enumerate(range(0, len(features), writer.shard_size)):
        writer.write_shard(stem, shard, features[start : start + writer.shard_size], len(features))


def make_features(folder: Path, counts: dict[str, int], missing: tuple[int, ...] = (), shift: int = 0) -> Path:
    """Packed features of the pairs, without the numbers in `missing`."""
    writer = FeatureWriter(folder, dim=DIM, max_length=120, dtype="float32", settings={"model": "none"})
    number = 0
    for stem, count in counts.items():
        numbers = range(number, number + count)
        write_stem(writer, stem, [None if n in missing else caption_features(n + shift) for n in numbers])
        number += count
    return folder


def make_shards(folder: Path, counts: dict[str, int], size: int = 20) -> Path:
    """The same pairs as WebDataset shards: .png and .json, now and then .txt in its place."""
    folder.mkdir(parents=True)
    number = 0
    for stem, count in counts.items():
        with tarfile.open(folder / f"{stem}.tar", "w") as tar:
            for line in range(count):
                text = f"a {list(COLOURS)[number % len(COLOURS)]} thing"
                members = {"png": png(picture(number, size))}
                members |= (
                    {"txt": text.encode()} if number % 3 == 2 else {"json": json.dumps({"text": [text]}).encode()}
                )
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{stem}/{line:05d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
    return folder
