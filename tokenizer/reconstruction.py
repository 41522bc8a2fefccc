"""Images through a codec and back: the one loop behind every reconstruction script.

    reconstruct_folder(args, load_vq)          # tokenizer/codecs.py has the codecs; load_reference is none

What comes out:

- `{sample_dir}/{name}/{index:06d}.png`, the reconstruction of image `index` of the data set;
- `{sample_dir}/{name}.npz`: the same images (`arr_0`) and their labels (`arr_1`), for rFID against the file that
  tokenizer/validation/val_ddp.py writes;
- `{sample_dir}/{name}_results.txt` and `_results.json`: PSNR, SSIM, LPIPS, how the codebook is used.

Names are the published ones, which leave out the checkpoint and more: the folder's settings.json refuses another run's images.
Rerun the command to do what is missing. Batches are cut from the data set in one way whoever computes them, and the
figures of each are kept in `{name}/figures/`: results are the same for any number of processes and of interruptions.
"""

import argparse
import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from tqdm import tqdm

from dataset.augmentation import center_view
from dataset.image_build import image_dataset
from dataset.images import ImageDataset, present_batches
from dataset.pixels import PUBLISHED, Reading, load_rgb
from tokenizer.codecs import Codec, Loaded, Loader
from tokenizer.tokenizer_image import lpips as perceptual
from tokenizer.tokenizer_image.lpips import LPIPS
from utils.distributed import Distributed, pick_device, start
from utils.errors import NotFiniteError
from utils.files import atomic_write, write_json
from utils.images import is_whole_png, peak_signal_to_noise_ratio, save_png, to_uint8, write_image_npz
from utils.loading import loader_workers
from utils.logger import console_logger
from utils.sample_folder import claim_folder, file_identity, read_images, recorded_settings
from utils.training.parallel import HALF

# Flags that change no figure and no image, or stand in the settings in another form.
IMMATERIAL = {
    "import", "sample_dir", "per_proc_batch_size", "num_workers", "device", "npz", "lpips", "global_seed", "data_path", "vq_ckpt",
    "vqgan_ckpt", "vae_path", "cd_path", "codebook_size", "codebook_embed_dim", "exif", "background",
}  # fmt: skip
FIGURES = ("psnr", "ssim", "psnr_published", "ssim_published")
TITLES = {"psnr": "psnr_db", "psnr_published": "psnr_db_published"}  # in the results
# SSIM compares windows of 7x7 pixels; LPIPS halves an image four times.
SMALLEST, SMALLEST_FOR_LPIPS = 7, 16


@dataclass(frozen=True)
class RoundTrip:
    """A batch before and after.

    originals, recons: uint8 (B, H, W, 3)
    codes: int64 (B, N), or None
    unrounded: the originals before rounding to 8 bits, float32 (B, H, W, 3) in [0, 1] but for what resizing overshoots
    """

    originals: np.ndarray
    recons: np.ndarray
    codes: np.ndarray | None
    unrounded: np.ndarray


def round_trip(
    codec: Codec | None, images: Tensor, indices: Sequence[int], size: int | None = None, precision: str = "none"
) -> RoundTrip:
    """Encode and decode a batch (B, 3, H, W) in [-1, 1]; without a codec the originals come back.

    size: pixels a side of what is returned. Where it is not H, originals and reconstructions are both resized, in the same
    way (bicubic, without antialiasing, before rounding to 8 bits), so that their difference is the codec's alone.
    precision: none, fp16 or bf16, the codec's autocast. Raises ValueError for reconstructions that are not finite.
    """

    def resized(pixels: Tensor) -> Tensor:
        if size is not None and pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels.float(), size=(size, size), mode="bicubic")
        return pixels

    with torch.inference_mode():
        before = resized(images)
        originals, unrounded = to_uint8(before), ((before.float() + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
        if codec is None:
            return RoundTrip(originals, originals, None, unrounded)
        dtype = HALF.get(precision)
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            recons, codes = codec(images, indices)
        if not recons.isfinite().all() or (codes is not None and (codes < 0).any()):
            raise NotFiniteError(
                f"the reconstructions of images {indices[0]} to {indices[-1]} are not finite: are the weights whole? "
                "With --precision fp16 some models overflow; try bf16 or none"
            )
        codes = None if codes is None else codes.cpu().numpy()
        return RoundTrip(originals, to_uint8(resized(recons)), codes, unrounded)


def batch_figures(trip: RoundTrip, lpips: LPIPS | None, device: torch.device) -> dict[str, np.ndarray]:
    """Return the figures of each image of a batch, float64 (B,): PSNR in dB (infinite where nothing differs), SSIM, LPIPS.

    SSIM is scikit-image's, in windows of 7x7 pixels. PSNR and SSIM also come as the published scripts computed them, which
    compare with the original before it is rounded to 8 bits, and give SSIM a range of 2 for images in [0, 1]. The range
    decides the two constants of the index (Wang et al. 2004, equation 13): this SSIM is higher than that of range 1.
    """
    rows = []
    for original, exact, restored in zip(trip.originals, trip.unrounded.astype(np.float64), trip.recons, strict=True):
        unit = restored / 255
        with np.errstate(divide="ignore"):
            psnr_published = peak_signal_noise_ratio(unit, exact, data_range=1.0)
        ssim = structural_similarity(original, restored, data_range=255, channel_axis=-1)
        ssim_published = structural_similarity(unit, exact, data_range=2.0, channel_axis=-1)
        rows.append((peak_signal_to_noise_ratio(original, restored), ssim, psnr_published, ssim_published))
    figures = dict(zip(FIGURES, np.array(rows).T, strict=True))
    if lpips is not None:
        with torch.inference_mode():  # of the 8-bit images, as PSNR and SSIM
            a, b = (
                torch.from_numpy(part).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
                for part in (trip.originals, trip.recons)
            )
            figures["lpips"] = lpips(a, b).flatten().double().cpu().numpy()
    return figures


class ReconstructionFolder:
    """A run's folder: its PNG files, and the figures of each batch of them.

    wanted: figures without which a batch is not done.
    """

    def __init__(self, folder: Path, count: int, batch_size: int, wanted: Sequence[str]):
        self.folder = folder
        self.batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
        self.wanted = {"indices", *wanted}

    def png(self, index: int) -> Path:
        """Return the file of image `index`."""
        return self.folder / f"{index:06d}.png"

    def record(self, batch: range) -> Path:
        """Return the file of the figures of a batch."""
        return self.folder / "figures" / f"{batch.start:06d}-{batch.stop:06d}.npz"

    def missing(self) -> list[range]:
        """Return the batches of which an image or a figure is missing.

        Remove the figures of batches of another --per-proc-batch-size: an image belongs to one batch.
        """
        kept = {self.record(batch) for batch in self.batches}
        for path in set(self.folder.glob("figures/*.npz")) - kept:
            path.unlink()
        return [batch for batch in self.batches if not self._is_done(batch)]

    def _is_done(self, batch: range) -> bool:
        record = self.read(batch)
        complete = self.wanted <= record.keys() and record["indices"].tolist() == list(batch)
        return complete and all(is_whole_png(self.png(index)) for index in batch)

    def read(self, batch: range) -> dict[str, np.ndarray]:
        """Return a batch's figures by name, and `indices` of the images that could be read; nothing where there is no record."""
        try:
            with np.load(self.record(batch)) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return {}

    def clear(self, batch: range) -> None:
        """Remove what is there of a batch: what could be read before may be unreadable now."""
        self.record(batch).unlink(missing_ok=True)
        for index in batch:
            self.png(index).unlink(missing_ok=True)

    def write(self, batch: range, indices: Sequence[int], trip: RoundTrip, figures: dict[str, np.ndarray]) -> None:
        """Write the images, then their figures: those tell that the images are there."""
        for index, image in zip(indices, trip.recons, strict=True):
            save_png(image, self.png(index))
        codes = {} if trip.codes is None else {"codes": trip.codes.astype(np.int32)}
        with atomic_write(self.record(batch), durable=False) as f:
            np.savez(f, indices=np.asarray(indices, np.int64), **figures, **codes)

    def summary(self, codebook_size: int | None) -> tuple[list[int], dict[str, Any]]:
        """Return the numbers of the images that are there, ascending, and the figures over all of them.

        PSNR, SSIM and LPIPS are means over images in the order of the data set. Images that come back without a difference
        have no PSNR: they are counted instead. Codebook usage is the share of entries that occur in any image, perplexity
        exp(-sum p log p) of how often each does.
        """
        records = [record for batch in self.batches if (record := self.read(batch))]
        indices = [int(index) for record in records for index in record["indices"]]
        figures: dict[str, Any] = {}
        for name in (*FIGURES, "lpips") if "psnr" in self.wanted else ():
            values = [record[name] for record in records if name in self.wanted]
            finite = np.concatenate(values or [[]])
            finite = finite[np.isfinite(finite)]
            figures[TITLES.get(name, name)] = float(finite.mean()) if len(finite) else None
            if name == "psnr":
                figures["images_without_a_difference"] = len(indices) - len(finite)
        times = np.zeros(codebook_size or 0, np.int64)
        for record in records if codebook_size else ():
            times += np.bincount(record["codes"].ravel(), minlength=codebook_size)
        if times.any():
            p = times[times > 0] / times.sum()
            figures["codebook_size"] = codebook_size
            figures["codebook_entries_used"] = len(p)
            figures["codebook_usage"] = len(p) / codebook_size
            figures["codebook_perplexity"] = float(np.exp(-(p * np.log(p)).sum()))
        return indices, figures


def reconstruct_folder(args: argparse.Namespace, load: Loader) -> None:
    """Put the images of --data-path through the codec that `load` makes of the flags, on all processes of the run.

    A batch of `args.per_proc_batch_size` goes to each process in turn. Images are the centre crops of `args.image_size`;
    where `args.image_size_eval` is another size, both sides are resized to it (see `round_trip`). A reference of that size
    is cropped from the files directly, so that rFID also counts what resizing does.
    Raises ValueError for sizes that do not fit and for a folder made with other settings, and what `image_dataset` raises.
    """
    dist = start(args.device)
    loaded = load(args, dist, args.global_seed)
    codec, size = loaded.codec, args.image_size_eval or args.image_size
    check_size(codec, args.image_size, size)
    console_logger("dataset", dist.is_main)
    name = f"{loaded.name}-{args.dataset}-size-{args.image_size}{loaded.details}-seed-{args.global_seed}"
    folder = Path(args.sample_dir) / (name if codec else f"val_{args.dataset}")
    dataset = image_dataset(
        args,
        transform=partial(center_view, image_size=args.image_size),
        unreadable="omit",
        reading=Reading.of(args, recorded_settings(folder)),
    )
    lpips, without_lpips = find_lpips(args, dist, codec, size)
    wanted = (*(FIGURES if codec else ()), *(["lpips"] if lpips else ()))
    files = ReconstructionFolder(folder, len(dataset), args.per_proc_batch_size, wanted)
    settings, missing = run_settings(args, dataset, loaded), None
    with dist.together():
        if dist.is_main:
            claim_folder(folder, settings, unrecorded=PUBLISHED.record())
            missing = files.missing()
            print(f"{folder}: {sum(map(len, missing))} of {len(dataset)} images to do")
            if without_lpips:
                print(without_lpips)
    mine = dist.broadcast(missing)[dist.rank :: dist.world_size]
    present = present_batches(dataset, mine, loader_workers(args.num_workers, dist), dist.device.type == "cuda")
    with tqdm(total=sum(map(len, mine)), unit="img", disable=not dist.is_main) as bar:
        for batch, read in zip(mine, present, strict=True):
            files.clear(batch)
            if read is not None:  # None: none of its images could be read
                images, indices = read[0].to(dist.device), read[2].tolist()
                trip = round_trip(codec, images, indices, size, getattr(args, "precision", "none"))
                files.write(batch, indices, trip, batch_figures(trip, lpips, dist.device) if codec else {})
            bar.update(len(batch))
    # An image that could not be read is tried again by every run: these are all there are.
    unreadable = sorted({index for share in dist.gather(dataset.skipped_indices) for index in share})
    with dist.together():
        if dist.is_main:
            notes = {"lpips_note": without_lpips} if without_lpips else {}
            write_results(files, dataset, unreadable, codec, {**notes, "settings": settings}, npz=args.npz, size=size)
    dist.close()


def check_size(codec: Codec | None, image_size: int, size: int) -> None:
    """Raise ValueError where the codec does not divide the image, or the figures need larger ones."""
    if codec and image_size % codec.downsample:
        raise ValueError(
            f"--image-size {image_size} is not a multiple of {codec.downsample}, the pixels a side of this model's tokens"
        )
    if codec and size < SMALLEST:
        raise ValueError(f"SSIM needs images of {SMALLEST} pixels a side, got {size}")


def find_lpips(
    args: argparse.Namespace, dist: Distributed, codec: Codec | None, size: int
) -> tuple[LPIPS | None, str | None]:
    """Return the network of LPIPS, or why it is left out: the same on every process."""
    if codec is None or not args.lpips:
        return None, None
    if size < SMALLEST_FOR_LPIPS:
        return None, f"LPIPS is left out: it needs images of {SMALLEST_FOR_LPIPS} pixels a side, these have {size}"
    try:
        found = bool(perceptual.find_weights())
    except FileNotFoundError:
        found = False
    if not all(dist.gather(found)):
        return None, (
            f"LPIPS is left out: it needs {perceptual.VGG_FILE} (torchvision's VGG16) in pretrained_models/, whose README.md "
            f"has the address, and {perceptual.LIN_FILE} there or the lpips package. The same command then adds it"
        )
    return perceptual.LPIPS().to(dist.device), None


def run_settings(args: argparse.Namespace, dataset: ImageDataset, loaded: Loaded) -> dict[str, Any]:
    """Return what decides the images and the figures, as plain values."""
    settings = {key: value for key, value in vars(args).items() if key not in IMMATERIAL}
    if settings.get("quantizer", "") is None:  # the file says it
        del settings["quantizer"]
    settings |= dataset.reading.record()
    settings["image_size_eval"] = args.image_size_eval or args.image_size
    names, content = 0, hashlib.sha256()
    for path in dataset.images.paths:
        name = os.fsencode(os.path.relpath(path, args.data_path)) + b"\n"
        names = zlib.crc32(name, names)
        size = os.stat(path).st_size if os.path.exists(path) else 0  # of one that is gone, as one that cannot be read
        content.update(name + b"%d\n" % size)
    settings["data"] = {
        "folder": str(Path(args.data_path).resolve()),
        "images": len(dataset),
        "names": f"{names:08x}",
        "content": content.hexdigest()[:16],
    }
    if loaded.codec is not None and loaded.codec.draws:
        settings["global_seed"] = args.global_seed
    if loaded.weights is not None:
        settings["weights"] = file_identity(loaded.weights)
    return settings


def write_results(
    files: ReconstructionFolder,
    dataset: ImageDataset,
    unreadable: Sequence[int],
    codec: Codec | None,
    notes: dict[str, Any],
    *,
    npz: bool,
    size: int,
) -> None:
    """Write the .npz and the results beside the folder, and print them. Raises ValueError where no image could be read."""
    folder = files.folder
    indices, figures = files.summary(codec.codebook_size if codec else None)
    if not indices:
        raise ValueError(f"none of the {len(dataset)} images in {notes['settings']['data']['folder']} could be read")
    packages = ("torch", "numpy", "scikit-image", *(codec.packages if codec else ()))
    results = {
        "name": folder.name,
        "images": len(indices),
        "image_size": size,
        **figures,
        "skipped": [{"index": i, "path": dataset.images.paths[i]} for i in unreadable],
        **notes,
        "versions": {package: metadata.version(package) for package in packages},
    }
    if npz:
        target = folder.with_name(folder.name + ".npz")
        labels = np.array([dataset.images.label(i) for i in indices])
        write_image_npz(target, read_images(map(files.png, indices)), (len(indices), size, size, 3), labels)
        print(f"wrote {target}: {len(indices)} images")
    text = describe(results)
    with atomic_write(folder.with_name(folder.name + "_results.txt")) as f:
        f.write((text + "\n").encode(errors="surrogateescape"))
    write_json(folder.with_name(folder.name + "_results.json"), results)
    print(text)


def describe(results: dict[str, Any]) -> str:
    """Return the results as lines to read."""

    def figure(name: str, unit: str = "") -> str:
        return "none" if results[name] is None else f"{results[name]:.4f}{unit}"

    counted = f"{results['images']} images of {results['image_size']}x{results['image_size']}"
    if "ssim" not in results:
        lines = [f"reference: {counted}, no model"]
    else:
        lines = [
            f"PSNR: {figure('psnr_db', ' dB')}, SSIM: {figure('ssim')}, LPIPS: {figure('lpips')} ({counted})",
            "as published (SSIM with a data range of 2, originals not rounded): "
            f"PSNR: {figure('psnr_db_published', ' dB')}, SSIM: {figure('ssim_published')}",
        ]
        same = results["images_without_a_difference"]
        lines += [f"{same} images without a difference are not in the PSNR"] if same else []
    if "codebook_usage" in results:
        lines.append(
            f"codebook: {results['codebook_entries_used']} of {results['codebook_size']} entries used "
            f"({100 * results['codebook_usage']:.2f} %), perplexity {results['codebook_perplexity']:.1f}"
        )
    lines += [results["lpips_note"]] if "lpips_note" in results else []
    if results["skipped"]:
        lines.append(f"{len(results['skipped'])} unreadable images left out:")
        lines += [f"  {item['index']:06d} {item['path']}" for item in results["skipped"]]
    return "\n".join(lines)


def reconstruct_image(args: argparse.Namespace, load: Loader, suffix: str) -> None:
    """Encode and decode `args.image_path` at `args.image_size`; the reconstruction goes to `args.output_dir`.

    Raises FileNotFoundError or ValueError where the image is not there, not readable or of a size that does not fit.
    """
    if not Path(args.image_path).is_file():
        raise FileNotFoundError(f"--image-path {args.image_path}: there is no such file")
    device = pick_device(args.device)
    codec = load(args, Distributed(device), args.seed).codec
    check_size(codec, args.image_size, args.image_size)
    try:
        pixels = center_view(load_rgb(args.image_path, Reading.of(args)), args.image_size)[None].to(device)
    except Exception as error:  # decoders fail in arbitrary ways
        raise ValueError(f"--image-path {args.image_path} is not a readable image ({error})") from error
    trip = round_trip(codec, pixels, [0])
    output = Path(args.output_dir) / f"{Path(args.image_path).stem}_{suffix}.png"
    save_png(trip.recons[0], output)
    psnr = peak_signal_to_noise_ratio(trip.originals[0], trip.recons[0])
    codes = "" if trip.codes is None else f" from {trip.codes.size} codes, {len(set(trip.codes.ravel()))} different,"
    print(f"wrote {output}: {args.image_size}x{args.image_size}{codes} PSNR {psnr:.2f} dB")
