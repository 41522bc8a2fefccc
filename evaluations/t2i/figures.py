"""The work of evaluation.py: drawn images with their captions and a reference opened, judged, read and compared."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.folders import find_images, natural_key
from dataset.pixels import Reading
from evaluations.c2i.inception import Inception
from evaluations.features import Features, read_features
from evaluations.image_sets import ImageFolder, ImageSet, open_images, save_statistics
from evaluations.judgement import lossy_files, same_images
from evaluations.metrics import frechet_distance
from evaluations.report import ANY_TYPE, COCO, Report, describe_run, open_backend, require_same_graph, sample_settings
from evaluations.t2i.clip import CLIP, CLIP_MODELS, DIMS, PREFIX, find_clip, load_clip
from utils.distributed import Distributed, start
from utils.logger import console_logger

PUBLISHED_IMAGES, PUBLISHED_SIZE, COCO_IMAGES = 30_000, 256, 40_504
INCEPTION_SIZE = 299


def evaluate(args: argparse.Namespace) -> None:
    """Compute the figures that the flags ask for and write the reports, on all processes of the run."""
    folder = fake_folder(args)
    report = Report((args.output or f"{folder}/score").removesuffix(".txt"), args.strict)
    console_logger("dataset", os.environ.get("RANK", "0") == "0")
    # In natural order: 2.png before 10.png.
    names = sorted((name for name in find_images(folder / "images") if "/" not in name), key=natural_key)
    reading = Reading.of(args)
    fakes = ImageFolder(folder / "images", names[: args.how_many], reading, args.eval_res, total=len(names))
    captions = read_captions(folder, fakes) if args.clip else []
    reference = open_reference(args) if args.fid else None
    for images in filter(None, (fakes, reference)):
        if not images.statistics and images.count < 2:
            raise ValueError(f"{images.path} has {images.count} image: at least 2 are needed, covariances are of many")
    clip_folder = find_clip(args.clip_model4eval, args.clip_path) if args.clip else None
    report.warn(judge(fakes, captions, reference, args))  # before models are read
    dist = start(args.device)
    with dist.main_first():
        backend = open_backend(args, dist) if args.fid else None
        clip = load_clip(clip_folder, dist.device) if args.clip else None
    lines = [f"generated: {fakes.line()}"]
    if args.fid:
        require_same_graph(reference, backend)
        reference.require_made_with(graph=backend.sha256)
        lines.append(f"reference: {reference.line()}")
        lines.append(f"graph: {backend.path} by {backend.name} on {backend.device}, SHA-256 {backend.sha256}")
    if args.clip:
        known = DIMS[args.clip_model4eval]
        other = f"{clip.folder} makes vectors of {clip.dim} numbers, {args.clip_model4eval} has {known}: these are other weights"
        report.warn([other] if clip.dim != known else [])
        lines.append(f"captions: {len(captions):,}; CLIP: {clip.folder} by {clip.library} on {clip.device}")
    if dist.is_main:
        report.print_inputs(lines)

    inception = inception_features(backend, args.inception_resize) if args.fid else None

    def extract(batch: np.ndarray) -> tuple[np.ndarray, ...]:
        return *((clip.images(batch),) if args.clip else ()), *((inception(batch),) if args.fid else ())

    drawn = read_features(fakes, extract, dist, batch_size=args.batch_size, keep=args.clip, name="generated images")
    texts, cut = embed(captions, clip, args.batch_size, dist) if args.clip else (None, 0)
    seen = None
    if args.fid:
        known = {"recorded": reference.statistics, "batch_size": args.batch_size, "keep": False}
        seen = read_features(reference, lambda batch: (inception(batch),), dist, **known, name="reference")
    late = []
    if dist.is_main:
        if args.save_statistics:
            save_statistics(args.save_statistics, seen.statistics, made=settings_of(args, reference, backend))
            print(f"wrote {args.save_statistics}: give it as --ref_dir next time")
        late = drawn.inspection.warnings("generated images", fakes.lossy)
        if cut:
            late.append(f"{cut:,} captions are longer than CLIP's {clip.length} tokens: their ends were not read")
        figures = compare(drawn, texts, seen)
        if args.fid:
            scale = sum(float(one.covariance.trace()) for one in (seen.statistics[0], drawn.statistics[-1]))
            late += same_images(seen.inspection, drawn.inspection, figures["fid"], scale)
        report.warnings += late
        titles = {"clip_score": "CLIP score", "fid": f"FID_{args.eval_res}px"}
        report.write(figures, titles, protocol(args, fakes, captions, reference, clip, backend, dist))
    dist.close()
    report.warn(late, late=True)


def fake_folder(args: argparse.Namespace) -> Path:
    """Return --fake_dir, once it has images/. Raises FileNotFoundError that says what it has instead."""
    folder = Path(args.fake_dir).expanduser()
    if not (folder / "images").is_dir():
        inside = sorted(folder.glob("*/images"))
        hint = f"it has {inside[0].parent}, which does" if inside else "give the folder that sample_t2i_ddp.py wrote"
        if folder.absolute().name == "images":
            hint = f"give {folder.absolute().parent}, the folder that holds it"
        raise FileNotFoundError(f"--fake_dir {folder} has no folder images/: {hint}")
    return folder


def reference_folder(args: argparse.Namespace) -> Path:
    """Return the folder of reference images: val2014 of --ref_dir for coco2014, else its --ref_type; or --ref_dir itself.

    Raises FileNotFoundError where there is no such folder.
    """
    folder = Path(args.ref_dir).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of reference images at {folder}: check --ref_dir")
    name = COCO if args.ref_data == "coco2014" else args.ref_type
    if name == ANY_TYPE:
        return folder
    for place in (folder / name, *sorted(folder.glob(f"*/{name}"))):
        if place.is_dir():
            return place
    if args.ref_data != "coco2014":
        raise FileNotFoundError(f"--ref_dir {folder} has no folder {name} (--ref_type)")
    return folder  # val2014 itself, or a folder of photographs chosen from it


def open_reference(args: argparse.Namespace) -> ImageSet:
    """Open --ref_dir: an .npz of statistics, or a folder of images."""
    if not args.ref_dir.endswith(".npz"):
        folder = reference_folder(args)
        return ImageFolder(folder, find_images(folder), Reading.of(args), args.eval_res)
    reference = open_images(args.ref_dir)
    if not reference.statistics:
        raise ValueError(
            f"{reference.path} has no statistics mu and sigma: give a folder, or what --save_statistics made"
        )
    reading = Reading.of(args).record()
    reference.require_made_with(eval_res=args.eval_res, inception_resize=args.inception_resize, reading=reading)
    return reference


def read_captions(folder: Path, fakes: ImageFolder) -> list[str]:
    """Return the lines of captions.txt, one for each image that is evaluated.

    Raises FileNotFoundError, or ValueError where there are not as many as images, or the file is not UTF-8.
    """
    file = folder / "captions.txt"
    again = "sample_t2i_ddp.py, run again, completes an interrupted folder"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: a line for each image. {again}; --no-clip computes FID without it")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as such") from error
    if lines[-1] == "":
        lines.pop()
    if len(lines) != fakes.total:
        what = f"{file} has {len(lines):,} lines and {fakes.path} {fakes.total:,} images"
        raise ValueError(f"{what}: every image needs its caption, in natural order; {again}")
    return [line.strip() for line in lines[: fakes.count]]


def judge(fakes: ImageFolder, captions: list[str], reference: ImageSet | None, args: argparse.Namespace) -> list[str]:
    """Return what makes the figures incomparable with published ones, as far as is known before the images are read."""
    counted = f"of the {len(captions):,} captions"
    sizes = ", ".join(f"{count:,} of {w}x{h}" for (w, h), count in fakes.sizes.most_common(3))
    traps = {
        f"{fakes.count:,} images; published figures are of {PUBLISHED_IMAGES:,}, and FID falls with the number of images": (
            fakes.count < PUBLISHED_IMAGES
        ),
        f"the generated images are of {len(fakes.sizes)} sizes ({sizes}): were they drawn by one model?": len(
            fakes.sizes
        )
        > 1,
        f"--eval_res is {args.eval_res}; published figures are at {PUBLISHED_SIZE}": args.eval_res != PUBLISHED_SIZE,
        f"{captions.count('')} {counted} are empty: CLIP compares those images with no text": "" in captions,
        f"{len(captions) - len(set(captions))} {counted} repeat an earlier one": len(set(captions)) < len(captions),
        **enlarged(fakes, "generated"),
        **(other_pairs(fakes) if captions else {}),
    }
    if reference is not None:
        one, other = (images.path.resolve() for images in (reference, fakes))
        coco, folder = args.ref_data == "coco2014", isinstance(reference, ImageFolder)
        count = reference.count if folder else reference.statistics[0].count
        traps |= {
            f"{reference.path} does not say what its statistics were made with: whether the images had {args.eval_res} pixels "
            f"a side and were resized for the network by '{args.inception_resize}' is not known": not (
                folder or (reference.made or {}).get("eval_res")
            ),
            f"the reference {reference.path} and the generated images {fakes.path} lie one in the other": (
                folder and (one.is_relative_to(other) or other.is_relative_to(one))
            ),
            f"the reference has {count} images; published FID is against all {COCO_IMAGES:,} of COCO's {COCO}": (
                coco and count not in (COCO_IMAGES, None)
            ),
            f"--ref_type {args.ref_type} is not used: for coco2014 the reference is {COCO}, as published": (
                coco and args.ref_type not in (ANY_TYPE, "valid", "val", COCO)
            ),
            "--inception_resize graph: published text-to-image FID resizes for the network as clean-fid does": (
                args.inception_resize != "clean"
            ),
            **(enlarged(reference, "reference") if folder else {}),
        }
    return [text for text, found in traps.items() if found] + lossy_files(fakes, "generated images")


def enlarged(images: ImageFolder, name: str) -> dict[str, bool]:
    """Return a warning where files have a side shorter than the evaluated resolution."""
    small = sum(count for size, count in images.sizes.items() if min(size) < images.resolution)
    text = f"{small:,} of the {images.count:,} {name} images are smaller than --eval_res {images.resolution} and are enlarged"
    return {f"{text}: what is blurred by that counts as a property of the images": small > 0}


def other_pairs(fakes: ImageFolder) -> dict[str, bool]:
    """Return a warning where result.jsonl, beside images/, has other images in the places of captions.txt's lines.

    So it is when one image was removed and another added: the counts agree, and the captions have slipped.
    """
    file = fakes.path.parent / "result.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        listed = [Path(line.get("image_path") or line["image"]).name for line in lines]  # image: of the first edition
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # none, or another program's
    wrong = [place for place, (one, other) in enumerate(zip(listed, fakes.names)) if one != other]
    if not wrong:
        return {}
    place = wrong[0]
    return {
        f"{len(wrong):,} of the {fakes.count:,} images are not those that {file} pairs with the captions (the first: line "
        f"{place + 1} has {listed[place]}, images/ has {fakes.names[place]}): were files removed, added or renamed?": True
    }


def inception_features(backend: Inception, resize: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from uint8 (B, H, W, 3) to pool features (B, D).

    resize: 'clean', to the network's 299 pixels by Pillow's bicubic filter, in floating point and antialiased (Parmar et
    al., 2104.11222); 'graph', by the graph's own bilinear operation, as class-conditional figures are made.
    """
    if resize == "graph":
        return lambda images: backend(images)[0]

    def resized(channel: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(channel.astype(np.float32))  # of floats: nothing is rounded to bytes
        return np.asarray(picture.resize((INCEPTION_SIZE, INCEPTION_SIZE), Image.Resampling.BICUBIC))

    def extract(images: np.ndarray) -> np.ndarray:
        large = np.stack([np.stack([resized(image[..., c]) for c in range(3)], axis=-1) for image in images])
        return backend.features(large.clip(0, 255))[0].reshape(len(images), -1)

    return extract


def settings_of(args: argparse.Namespace, reference: ImageSet, backend: Inception) -> dict:
    """Return the settings that the statistics of the reference depend on, JSON values."""
    return {
        "path": str(reference.path),
        "data": args.ref_data,
        "eval_res": args.eval_res,
        "inception_resize": args.inception_resize,
        "reading": reference.reading.record(),
        "graph": backend.sha256,
    }


def embed(captions: list[str], clip: CLIP, batch_size: int, dist: Distributed) -> tuple[np.ndarray | None, int]:
    """Return the captions' unit vectors (N, D) on the first process, None on the others; and how many captions were cut."""
    first, last = (len(captions) * rank // dist.world_size for rank in (dist.rank, dist.rank + 1))
    parts = tqdm(range(first, last, batch_size), desc="captions", disable=not dist.is_main)
    rows = [clip.texts(captions[place : min(place + batch_size, last)]) for place in parts]
    shares = dist.collect((rows, clip.cut))
    if shares is None:
        return None, 0
    return np.concatenate([row for share, _ in shares for row in share]), sum(cut for _, cut in shares)


def compare(drawn: Features, texts: np.ndarray | None, seen: Features | None) -> dict[str, float]:
    """Return the figures: clip_score, the mean cosine of image and caption, and fid."""
    figures = {}
    if texts is not None:
        figures["clip_score"] = float((drawn.rows.astype("float64") * texts).sum(axis=1).mean())
    if seen is not None:
        figures["fid"] = frechet_distance(seen.statistics[0], drawn.statistics[-1])
    return figures


def protocol(
    args: argparse.Namespace,
    fakes: ImageFolder,
    captions: list[str],
    reference: ImageSet | None,
    clip: CLIP | None,
    backend: Inception | None,
    dist: Distributed,
) -> dict:
    """Return everything that a figure depends on, JSON values."""
    made = {
        "generated": {**fakes.describe(), "settings": sample_settings(fakes.path.parent)},
        "eval_res": args.eval_res,
        "crop": "centre square",
        "resize": "lanczos",
        "batch_size": args.batch_size,
        **describe_run(backend, dist, "pillow", "transformers"),
    }
    if clip is not None:
        made["clip"] = {
            "model": args.clip_model4eval,
            "repository": CLIP_MODELS[args.clip_model4eval],
            "path": str(clip.folder),
            "library": clip.library,
            "image_size": clip.size,
            "prefix": PREFIX,
            "captions": len(captions),
            "different_captions": len(set(captions)),
        }
    if backend is not None:
        made["reference"] = {**reference.describe(), "data": args.ref_data}
        made["graph"]["resize"] = args.inception_resize
    return made
