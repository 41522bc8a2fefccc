"""Converts extracted codes between packed shards and the published layout of one small file per image.

    python tools/convert_codes.py --from imagenet_code_c2i_flip --to imagenet_code_c2i_flip_packed --image-size 256

The layout of `--from` is recognised and `--to` gets the other one. A stopped conversion resumes where it was; what is
already in `--to` is compared with the source, and refused where it differs.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import flag_parser, positive_int, run_script

if TYPE_CHECKING:
    import numpy as np

    from dataset.code_files import CodeWriter, PublishedFolder


def published_to_packed(
    source: str | Path,
    target: str | Path,
    image_size: int,
    codebook_size: int | None = None,
    num_classes: int | None = None,
    vq_model: str | None = None,
    shard_size: int = 4096,
) -> None:
    """Writes packed shards of the codes in the published layout; numbers without a file count as skipped.

    What the source records (tokenizer, classes, …) is kept; the arguments stand for what it does not record.
    Raises FileNotFoundError and ValueError as PublishedFolder and CodeWriter do, and ValueError where a shard that is
    already there is not of this source.
    """
    from dataclasses import replace

    import numpy as np
    from tqdm import tqdm

    from dataset.code_files import CodeSettings, CodeWriter, PublishedFolder

    published = PublishedFolder(source, image_size)
    settings = published.settings or CodeSettings(
        dataset="imagenet",
        image_size=image_size,
        tokens=published.tokens,
        views=published.view_names,
        codebook_size=codebook_size or 16384,
        num_images=int(published.numbers[-1]) + 1,
        num_classes=num_classes,
        vq_model=vq_model,
    )
    given = {"codebook_size": codebook_size, "num_classes": num_classes, "vq_model": vq_model}
    recorded = {name: getattr(settings, name) for name in given}
    wrong = [name for name, value in given.items() if value is not None and recorded[name] != value]
    if wrong:
        raise ValueError(
            f"{source} records {', '.join(f'{name} {recorded[name]}' for name in wrong)}, "
            f"not {', '.join(str(given[name]) for name in wrong)}: leave the flag out"
        )
    settings = replace(settings, shard_size=shard_size, made_by="tools/convert_codes.py")
    writer = CodeWriter(target, settings)
    missing = set(writer.missing_shards())
    with tqdm(total=len(published), unit="image") as progress:
        for shard in range(settings.num_shards):
            images = settings.images_of(shard)
            first, last = np.searchsorted(published.numbers, [images.start, images.stop])
            positions = np.arange(first, last)
            if shard in missing:
                codes = np.zeros((len(positions), len(settings.views), settings.tokens), np.int64)
                for row, position in enumerate(positions):
                    codes[row] = published.all_views(position)
                    progress.update()
                indices = published.numbers[positions]
                skipped = np.setdiff1d(images, indices).tolist()
                writer.write_shard(shard, codes, published.labels(positions), indices, skipped)
            else:
                _compare_shard(writer, shard, published, positions)
                progress.update(len(positions))


def packed_to_published(source: str | Path, target: str | Path, image_size: int) -> None:
    """Writes the published layout of packed shards; the files are numbered by data set index.

    Raises FileNotFoundError and ValueError as ShardFolder and its `verify` do, and ValueError where the codes are of
    another image size or the target holds other samples.
    """
    from dataclasses import replace

    import numpy as np
    from tqdm import tqdm

    from dataset.code_files import (
        SHARD_SIZE,
        ShardFolder,
        published_folders,
        published_record,
        record_settings,
        write_published,
    )
    from dataset.store import Loose

    packed = ShardFolder(source)
    if packed.settings.image_size != image_size:
        raise ValueError(f"{source} holds codes of --image-size {packed.settings.image_size}, not {image_size}")
    packed.verify()
    folders = published_folders(target, image_size)
    present = [Loose(folder, "integers", ()).numbers for folder in folders]
    for folder, numbers in zip(folders, present):
        foreign = np.setdiff1d(numbers, packed.numbers)
        if len(foreign):
            raise ValueError(
                f"{folder} holds {len(foreign)} samples that {source} has not ({foreign[0]}.npy): use another folder"
            )
    record_settings(target, replace(packed.settings, shard_size=SHARD_SIZE), published_record(image_size))
    whole = set(np.intersect1d(*present).tolist())
    with tqdm(total=len(packed), unit="image") as progress:
        for shard_codes, labels, indices in packed.parts():
            for codes, label, i in zip(shard_codes, labels.tolist(), indices.tolist()):
                if i in whole:
                    _compare_sample(folders, i, codes, label)
                else:
                    write_published(target, image_size, i, codes, label)
                progress.update()


def _compare_shard(writer: "CodeWriter", shard: int, published: "PublishedFolder", positions: "np.ndarray") -> None:
    """Compares the numbers and the first sample: reading all the small files again would be a second conversion."""
    import numpy as np

    codes, labels, indices = writer.read_shard(shard)
    same = np.array_equal(indices, published.numbers[positions])
    if same and len(positions):
        same = np.array_equal(codes[0], published.all_views(positions[0]))
        same = same and labels[0] == published.labels(positions[:1])[0]
    if not same:
        raise ValueError(
            f"shard {shard} in {writer.folder} is not of the codes in {published.folder}: use another folder"
        )


def _compare_sample(folders: tuple[Path, Path], i: int, codes: "np.ndarray", label: int) -> None:
    import numpy as np

    for folder, expected in zip(folders, (codes[None], np.asarray([label]))):
        if not np.array_equal(np.load(folder / f"{i}.npy"), expected):
            raise ValueError(f"{folder / f'{i}.npy'} differs from the packed codes: use another folder, or remove it")


def main(args: argparse.Namespace) -> None:
    """Converts in the direction that `args.source` asks for. Raises ValueError where it holds no codes."""
    from dataset.code_files import published_sizes
    from dataset.store import INDEX_FILE

    source, target = Path(args.source), Path(args.target)
    if not source.is_dir():
        raise FileNotFoundError(f"the code folder {source} does not exist: check --from")
    if target.exists() and target.samefile(source):
        raise ValueError(f"--from and --to are the same folder {source}: give another one to write to")
    if (source / INDEX_FILE).exists():
        packed_to_published(source, target, args.image_size)
    elif sizes := published_sizes(source):
        if args.image_size not in sizes:
            there = ", ".join(map(str, sizes))
            raise ValueError(f"{source} holds codes of --image-size {there}, not {args.image_size}")
        published_to_packed(
            source, target, args.image_size, args.codebook_size, args.num_classes, args.vq_model, args.shard_size
        )
    else:
        raise ValueError(f"{source} holds no codes: neither {INDEX_FILE} nor imagenet{args.image_size}_codes/")
    print(f"{target} holds the codes of {source}")


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--from", dest="source", required=True, help="folder of codes in either layout")
    parser.add_argument("--to", dest="target", required=True, help="folder that gets the other layout")
    parser.add_argument("--image-size", type=positive_int, required=True, help="pixels, as given at extraction")
    help = "to packed: noted in the index (default: what --from records, or 16384)"
    parser.add_argument("--codebook-size", type=positive_int, default=None, help=help)
    help = "to packed: noted in the index (default: what --from records)"
    parser.add_argument("--num-classes", type=positive_int, default=None, help=help)
    parser.add_argument("--vq-model", default=None, help=help)
    parser.add_argument("--shard-size", type=positive_int, default=4096, help="to packed: images per shard")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
