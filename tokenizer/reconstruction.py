"""Images through a tokenizer and back: the one loop behind every reconstruction script.

    evaluate(args, dist, VQCodec(tokenizer), name=folder_name(args, "VQ-16"), weights=path)

A script gives the loop a `Codec`, something that encodes and decodes, and a name. What comes out:

- `{sample_dir}/{name}/{index:06d}.png`, the reconstruction of image `index` of the data set;
- `{sample_dir}/{name}.npz`: the same images (`arr_0`) and their labels (`arr_1`), for rFID against the file that
  tokenizer/validation/val_ddp.py writes;
- `{sample_dir}/{name}_results.txt` and `_results.json`: PSNR, SSIM, LPIPS, how the codebook is used.

Names are the published ones, which leave out the checkpoint and more: the folder's settings.json refuses another run's images.
The same command again does what is missing. Batches are cut from the data set in one way whoever computes them, and the
figures of each are kept in `{name}/figures/`: results are the same for any number of processes and of interruptions.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from utils.cli import (
    SEED,
    add_image_size_flags,
    add_reading_flags,
    add_switch,
    flag_parser,
    nonnegative_int,
    positive_int,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from dataset.images import ImageDataset
    from tokenizer.base import Tokenizer
    from tokenizer.tokenizer_image.lpips import LPIPS
    from utils.distributed import Distributed

# Flags that change no figure and no image, or stand in the settings in another form.
IMMATERIAL = {
    "import",
    "sample_dir",
    "per_proc_batch_size",
    "num_workers",
    "device",
    "npz",
    "lpips",
    "global_seed",
    "data_path",
    "vq_ckpt",
    "vqgan_ckpt",
    "vae_path",
    "cd_path",
    "codebook_size",
    "codebook_embed_dim",
    "exif",
    "background",
}
# SSIM compares windows of 7x7 pixels; LPIPS halves an image four times.
SMALLEST, SMALLEST_FOR_LPIPS = 7, 16


class Codec(Protocol):
    """Something that encodes and decodes images.

    downsample: pixels a side of what it turns into one token or latent; it divides the image.
    codebook_size: entries of its codebook, None without one. draws: whether images depend on --global-seed.
    packages: those whose versions matter, besides torch.
    """

    downsample: int
    codebook_size: int | None
    draws: bool
    packages: tuple[str, ...]

    def __call__(self, images: "Tensor", indices: Sequence[int]) -> "tuple[Tensor, Tensor | None]":
        """Images (B, 3, H, W) in [-1, 1] with these numbers in the data set -> reconstructions (B, 3, H, W), roughly in
        [-1, 1], and codes, int64 (B, N) in raster order, or None."""


class VQCodec:
    """A tokenizer as a Codec."""

    draws = False
    packages = ()

    def __init__(self, tokenizer: "Tokenizer"):
        self.tokenizer = tokenizer
        self.downsample = tokenizer.downsample
        self.codebook_size = tokenizer.codebook_size

    def __call__(self, images: "Tensor", indices: Sequence[int]) -> "tuple[Tensor, Tensor]":
        codes = self.tokenizer.to_codes(images)
        return self.tokenizer.to_pixels(codes), codes.flatten(1)


@dataclass(frozen=True)
class RoundTrip:
    """A batch before and after.

    originals, recons: uint8 (B, H, W, 3)
    codes: int64 (B, N), or None
    unrounded: the originals before rounding to 8 bits, float32 (B, H, W, 3) in [0, 1] but for what resizing overshoots
    """

    originals: "np.ndarray"
    recons: "np.ndarray"
    codes: "np.ndarray | None"
    unrounded: "np.ndarray"


def round_trip(
    codec: Codec | None, images: "Tensor", indices: Sequence[int], size: int | None = None, precision: str = "none"
) -> RoundTrip:
    """Encodes and decodes a batch (B, 3, H, W) in [-1, 1]; without a codec the originals come back.

    size: pixels a side of what is returned. Where it is not H, originals and reconstructions are both resized, in the same
    way (bicubic, without antialiasing, before rounding to 8 bits), so that their difference is the codec's alone.
    precision: none, fp16 or bf16, the codec's autocast. Raises ValueError for reconstructions that are not finite.
    """
    import torch
    import torch.nn.functional as F

    from utils.images import to_uint8
    from utils.training.parallel import HALF

    def resized(pixels: "Tensor") -> "Tensor":
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
        if not recons.isfinite().all():
            raise ValueError(
                f"the reconstructions of images {indices[0]} to {indices[-1]} are not finite: are the weights whole? "
                "With --precision fp16 some models overflow; try bf16 or none"
            )
        codes = None if codes is None else codes.cpu().numpy()
        return RoundTrip(originals, to_uint8(resized(recons)), codes, unrounded)


def reconstruct(
    tokenizer: "Tokenizer", batches: "Iterable[tuple[Tensor, Tensor]]", device: "torch.device"
) -> "Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]":
    """Encodes and decodes batches of (images (B, 3, H, W) in [-1, 1], labels).

    Yields originals and reconstructions, uint8 (B, H, W, 3), and codes, int64 (B, N) in raster order.
    """
    codec, first = VQCodec(tokenizer), 0
    for images, _ in batches:
        done = round_trip(codec, images.to(device), range(first, first + len(images)))
        first += len(images)
        yield done.originals, done.recons, done.codes


def structural_similarity(a: "np.ndarray", b: "np.ndarray") -> float:
    """SSIM of two uint8 images (H, W, 3): scikit-image's, 7x7 windows, the channels' mean, and a range of 255."""
    from skimage.metrics import structural_similarity as ssim

    return float(ssim(a, b, data_range=255, channel_axis=-1))


def published_figures(restored: "np.ndarray", original: "np.ndarray") -> tuple[float, float]:
    """Return PSNR in dB and SSIM as the published scripts computed them.

    They compare with the original before it is rounded to 8 bits, and give SSIM a range of 2 for images in [0, 1]. The range
    decides the two constants of the index (Wang et al. 2004, equation 13): this SSIM is higher than that of range 1.

    Args:
        restored: uint8 (H, W, 3)
        original: float (H, W, 3) in [0, 1]
    """
    import numpy as np
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    restored, original = restored / 255, original.astype(np.float64)
    with np.errstate(divide="ignore"):
        psnr = peak_signal_noise_ratio(restored, original, data_range=1.0)
    return float(psnr), float(structural_similarity(restored, original, data_range=2.0, channel_axis=-1))


def batch_figures(trip: RoundTrip, lpips: "LPIPS | None", device: "torch.device") -> "dict[str, np.ndarray]":
    """PSNR in dB (infinite where nothing differs), SSIM, both as published too, and, with its network, LPIPS: float64 (B,) each."""
    import numpy as np
    import torch

    from utils.images import peak_signal_to_noise_ratio

    pairs = list(zip(trip.originals, trip.recons, strict=True))
    figures = {
        "psnr": np.array([peak_signal_to_noise_ratio(a, b) for a, b in pairs]),
        "ssim": np.array([structural_similarity(a, b) for a, b in pairs]),
    }
    published = [published_figures(b, a) for a, b in zip(trip.unrounded, trip.recons, strict=True)]
    figures["psnr_published"], figures["ssim_published"] = np.array(published).T
    if lpips is not None:
        with torch.inference_mode():  # of the 8-bit images, as the other two
            a, b = (
                torch.from_numpy(part).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
                for part in (trip.originals, trip.recons)
            )
            figures["lpips"] = lpips(a, b).flatten().double().cpu().numpy()
    return figures


class ReconstructionFolder:
    """A run's folder: its PNG files, and the figures of each batch of them.

    codec, lpips: whether an image is only done with PSNR and SSIM, and with LPIPS.
    """

    def __init__(self, folder: Path, count: int, batch_size: int, codec: bool, lpips: bool):
        self.folder = folder
        self.count = count
        self.batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
        figures = {"psnr", "ssim", "psnr_published", "ssim_published"} if codec else set()
        self.wanted = {"indices"} | figures | ({"lpips"} if lpips else set())

    def png(self, index: int) -> Path:
        """Where image `index` is."""
        return self.folder / f"{index:06d}.png"

    def record(self, batch: range) -> Path:
        """Where the figures of a batch are."""
        return self.folder / "figures" / f"{batch.start:06d}-{batch.stop:06d}.npz"

    def missing(self) -> list[range]:
        """The batches of which an image or a figure is missing.

        Removes the figures of batches of another --per-proc-batch-size: an image belongs to one batch.
        """
        kept = {self.record(batch) for batch in self.batches}
        for path in self.record(range(0)).parent.glob("*.npz"):
            if path not in kept:
                path.unlink(missing_ok=True)
        return [batch for batch in self.batches if not self._is_done(batch)]

    def _is_done(self, batch: range) -> bool:
        from utils.images import is_whole_png

        record = self.read(batch)
        return (
            self.wanted <= record.keys()
            and record["indices"].tolist() == list(batch)
            and all(is_whole_png(self.png(index)) for index in batch)
        )

    def read(self, batch: range) -> "dict[str, np.ndarray]":
        """A batch's figures by name, and `indices` of the images that could be read; nothing where there is no record."""
        import zipfile

        import numpy as np

        try:
            with np.load(self.record(batch)) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return {}

    def clear(self, batch: range, keep: Sequence[int]) -> None:
        """Removes all images of a batch but `keep`: what could be read before may be unreadable now."""
        if not keep:
            self.record(batch).unlink(missing_ok=True)
        for index in set(batch) - set(keep):
            self.png(index).unlink(missing_ok=True)

    def write(self, batch: range, indices: Sequence[int], trip: RoundTrip, figures: "dict[str, np.ndarray]") -> None:
        """Writes the images, then their figures: those tell that the images are there."""
        import io

        import numpy as np

        from utils.files import atomic_write
        from utils.images import save_png

        self.clear(batch, keep=indices)
        for index, image in zip(indices, trip.recons, strict=True):
            save_png(image, self.png(index))
        codes = {} if trip.codes is None else {"codes": trip.codes.astype(np.int32)}
        buffer = io.BytesIO()
        np.savez(buffer, indices=np.asarray(indices, np.int64), **figures, **codes)
        with atomic_write(self.record(batch), durable=False) as f:
            f.write(buffer.getvalue())

    def summary(self, codebook_size: int | None) -> "tuple[np.ndarray, dict[str, Any]]":
        """The numbers of the images that are there, ascending, and the figures over all of them.

        PSNR, SSIM and LPIPS are means over images in the order of the data set. Images that come back without a difference
        have no PSNR: they are counted instead. Codebook usage is the share of entries that occur in any image, perplexity
        exp(-sum p log p) of how often each does.
        """
        import numpy as np

        parts: dict[str, list[np.ndarray]] = {}
        times = np.zeros(codebook_size or 0, np.int64)
        for batch in self.batches:
            record = self.read(batch)
            if codebook_size is not None and "codes" in record:
                times += np.bincount(record["codes"].ravel(), minlength=codebook_size)
            for name in self.wanted & record.keys():
                parts.setdefault(name, []).append(record[name])
        arrays = {name: np.concatenate(part) for name, part in parts.items()}
        indices = arrays.pop("indices", np.empty(0, np.int64))
        figures: dict[str, Any] = {}
        if "psnr" in arrays:
            finite = np.isfinite(arrays["psnr"])
            figures["psnr_db"] = float(arrays["psnr"][finite].mean()) if finite.any() else None
            figures["images_without_a_difference"] = int((~finite).sum())
            figures["ssim"] = float(arrays["ssim"].mean())
            figures["lpips"] = float(arrays["lpips"].mean()) if "lpips" in arrays else None
            finite = np.isfinite(arrays["psnr_published"])
            figures["psnr_db_published"] = float(arrays["psnr_published"][finite].mean()) if finite.any() else None
            figures["ssim_published"] = float(arrays["ssim_published"].mean())
        if codebook_size is not None and times.sum():
            p = times[times > 0] / times.sum()
            figures["codebook_size"] = codebook_size
            figures["codebook_entries_used"] = len(p)
            figures["codebook_usage"] = len(p) / codebook_size
            figures["codebook_perplexity"] = float(np.exp(-(p * np.log(p)).sum()))
        return indices, figures


def evaluate(
    args: argparse.Namespace, dist: "Distributed", codec: Codec | None, *, name: str, weights: Path | None = None
) -> dict[str, Any] | None:
    """Puts the images of `args.data_path` through the codec and writes what the module's docstring lists.

    Every process calls it; a batch of `args.per_proc_batch_size` goes to each in turn. Without a codec (the reference) the
    crops themselves are written. weights: the codec's file, which goes into the settings. Images are the centre crops of
    `args.image_size`; where `args.image_size_eval` is another size, both sides are resized to it (see `round_trip`). A
    reference of that size is cropped from the files directly, so that rFID also counts what resizing does.
    Returns the results on the first process. Raises ValueError for sizes that do not fit and for a folder made with other
    settings, and what `build_dataset` raises.
    """
    import time
    from functools import partial

    from tqdm import tqdm

    from dataset.augmentation import center_view
    from dataset.build import build_dataset
    from dataset.pixels import PUBLISHED, Reading
    from utils.errors import AgreedError
    from utils.logger import console_logger
    from utils.sample_folder import claim_folder, recorded_settings

    size = args.image_size_eval or args.image_size
    check_size(codec, args.image_size, size)
    console_logger("dataset", dist.is_main)
    folder = Path(args.sample_dir) / name
    dataset = build_dataset(
        args,
        transform=partial(center_view, image_size=args.image_size),
        unreadable="omit",
        reading=Reading.of(args, recorded_settings(folder)),
    )
    lpips, without_lpips = find_lpips(args, dist, codec, size)
    files = ReconstructionFolder(folder, len(dataset), args.per_proc_batch_size, codec is not None, lpips is not None)
    settings = run_settings(args, dataset, codec, weights)
    error, missing = None, None
    if dist.is_main:
        try:
            claim_folder(folder, settings, unrecorded=PUBLISHED.record())
            missing = files.missing()
        except (ValueError, OSError) as caught:
            error = caught
    failure = dist.first_failure(error)
    if failure is not None:
        raise AgreedError(failure)
    missing = dist.broadcast(missing)
    if dist.is_main:
        print(f"{folder}: {sum(map(len, missing))} of {len(dataset)} images to do")
        if without_lpips:
            print(without_lpips)
    mine = missing[dist.rank :: dist.world_size]
    started = time.monotonic()
    with tqdm(total=sum(map(len, mine)), unit="img", disable=not dist.is_main) as bar:
        for batch, images, indices in load(dataset, mine, args, dist):
            if not indices:
                files.clear(batch, keep=())
            else:
                trip = round_trip(codec, images.to(dist.device), indices, size, getattr(args, "precision", "none"))
                figures = {} if codec is None else batch_figures(trip, lpips, dist.device)
                files.write(batch, indices, trip, figures)
            bar.update(len(batch))
    # An image that could not be read is tried again by every run: these are all there are.
    unreadable = sorted({index for share in dist.gather(dataset.skipped_indices) for index in share})
    seconds = time.monotonic() - started
    error, results = None, None
    if dist.is_main:
        try:
            results = write_results(files, dataset, unreadable, codec, settings, without_lpips, npz=args.npz, size=size)
            done = sum(map(len, missing))
            print(f"{done} images in {seconds:.1f} s" + (f", {done / seconds:.1f} images/s" if done else ""))
        except (ValueError, OSError) as caught:
            error = caught
    failure = dist.first_failure(error)
    if failure is not None:
        raise AgreedError(failure)
    return results


def check_size(codec: Codec | None, image_size: int, size: int) -> None:
    """Raises ValueError where the codec does not divide the image, or the figures need larger ones."""
    if codec is None:
        return
    if image_size % codec.downsample:
        raise ValueError(
            f"--image-size {image_size} is not a multiple of {codec.downsample}, the pixels a side of this model's tokens"
        )
    if size < SMALLEST:
        raise ValueError(f"SSIM needs images of {SMALLEST} pixels a side, got {size}")


def find_lpips(
    args: argparse.Namespace, dist: "Distributed", codec: Codec | None, size: int
) -> "tuple[LPIPS | None, str | None]":
    """The network of LPIPS, or why it is left out: the same on every process."""
    from tokenizer.tokenizer_image.lpips import LIN_FILE, LPIPS, VGG_FILE, find_lin_weights, find_vgg_weights

    if codec is None or not args.lpips:
        return None, None
    if size < SMALLEST_FOR_LPIPS:
        return None, f"LPIPS is left out: it needs images of {SMALLEST_FOR_LPIPS} pixels a side, these have {size}"
    try:
        find_vgg_weights()
        find_lin_weights()
        found = True
    except FileNotFoundError:
        found = False
    if not all(dist.gather(found)):
        return None, (
            f"LPIPS is left out: it needs {VGG_FILE} (torchvision's VGG16) in pretrained_models/, whose README.md has the "
            f"address, and {LIN_FILE} there or the lpips package. The same command then adds it"
        )
    return LPIPS().to(dist.device), None


def run_settings(
    args: argparse.Namespace, dataset: "ImageDataset", codec: Codec | None, weights: Path | None
) -> dict[str, Any]:
    """What decides the images and the figures, as plain values."""
    import hashlib
    import os
    import zlib

    from utils.sample_folder import file_identity

    settings = {key: value for key, value in vars(args).items() if key not in IMMATERIAL}
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
    if codec is not None and codec.draws:
        settings["global_seed"] = args.global_seed
    if weights is not None:
        settings["weights"] = file_identity(weights)
    return settings


def load(
    dataset: "ImageDataset", batches: Sequence[range], args: argparse.Namespace, dist: "Distributed"
) -> "Iterator[tuple[range, Tensor | None, list[int]]]":
    """Yields each batch with its images (n, 3, H, W) and their numbers, those that could be read; (batch, None, []) for none."""
    from dataset.images import present_batches
    from utils.loading import loader_workers

    present = present_batches(dataset, batches, loader_workers(args.num_workers, dist), dist.device.type == "cuda")
    for batch, loaded in zip(batches, present, strict=True):
        if loaded is None:
            yield batch, None, []
        else:
            images, _, indices = loaded
            yield batch, images, indices.tolist()


def write_results(
    files: ReconstructionFolder,
    dataset: "ImageDataset",
    unreadable: Sequence[int],
    codec: Codec | None,
    settings: dict[str, Any],
    without_lpips: str | None,
    *,
    npz: bool,
    size: int,
) -> dict[str, Any]:
    """Writes the .npz and the results beside the folder, and prints them.

    Raises ValueError where no image could be read, or where figures are gone that this run found or wrote.
    """
    from importlib import metadata

    import numpy as np

    from utils.files import atomic_write, write_json
    from utils.images import write_image_npz
    from utils.sample_folder import read_images

    folder = files.folder
    indices, figures = files.summary(codec.codebook_size if codec else None)
    if not len(indices):
        raise ValueError(f"none of the {len(dataset)} images in {settings['data']['folder']} could be read")
    gone = sorted(set(range(len(dataset))) - set(indices.tolist()) - set(unreadable))
    if gone:
        raise ValueError(
            f"the figures of {len(gone)} images (the first: {gone[0]}) have gone from {folder} meanwhile: does another run "
            "write to it? Run the same command again once it has ended"
        )
    skipped = [{"index": i, "path": dataset.images.paths[i]} for i in unreadable]
    packages = ("torch", "numpy", "scikit-image", *(codec.packages if codec else ()))
    results = {
        "name": folder.name,
        "images": len(indices),
        "image_size": size,
        **figures,
        **({"lpips_note": without_lpips} if without_lpips else {}),
        "skipped": skipped,
        "settings": settings,
        "versions": {package: metadata.version(package) for package in packages},
    }
    if npz:
        target = folder.with_name(folder.name + ".npz")
        labels = np.array([dataset.images.label(i) for i in indices.tolist()])
        write_image_npz(target, read_images(map(files.png, indices.tolist())), (len(indices), size, size, 3), labels)
        print(f"wrote {target}: {len(indices)} images")
    text = describe(results)
    with atomic_write(folder.with_name(folder.name + "_results.txt")) as f:
        f.write((text + "\n").encode(errors="surrogateescape"))
    write_json(folder.with_name(folder.name + "_results.json"), results)
    print(text)
    return results


def describe(results: dict[str, Any]) -> str:
    """The results as lines to read."""

    def figure(name: str, digits: int, unit: str = "") -> str:
        return "none" if results.get(name) is None else f"{results[name]:.{digits}f}{unit}"

    counted = f"{results['images']} images of {results['image_size']}x{results['image_size']}"
    if "ssim" in results:
        lines = [
            f"PSNR: {figure('psnr_db', 4, ' dB')}, SSIM: {figure('ssim', 4)}, LPIPS: {figure('lpips', 4)} ({counted})",
            f"as published (SSIM with a data range of 2, originals not rounded): PSNR: {figure('psnr_db_published', 4, ' dB')}, "
            f"SSIM: {figure('ssim_published', 4)}",
        ]
    else:
        lines = [f"reference: {counted}, no model"]
    if results.get("images_without_a_difference"):
        lines.append(f"{results['images_without_a_difference']} images without a difference are not in the PSNR")
    if "codebook_usage" in results:
        lines.append(
            f"codebook: {results['codebook_entries_used']} of {results['codebook_size']} entries used "
            f"({100 * results['codebook_usage']:.2f} %), perplexity {results['codebook_perplexity']:.1f}"
        )
    if "lpips_note" in results:
        lines.append(results["lpips_note"])
    if results["skipped"]:
        lines.append(f"{len(results['skipped'])} unreadable images left out:")
        lines += [f"  {item['index']:06d} {item['path']}" for item in results["skipped"]]
    return "\n".join(lines)


def demonstrate(args: argparse.Namespace, codec: Codec, device: "torch.device", suffix: str) -> None:
    """Encodes and decodes `args.image_path` at `args.image_size`; the reconstruction goes to `args.output_dir`.

    Raises FileNotFoundError or ValueError where the image is not there, not readable or of a size that does not fit.
    """
    from dataset.augmentation import center_view
    from dataset.pixels import Reading, load_rgb
    from utils.images import peak_signal_to_noise_ratio, save_png

    if not Path(args.image_path).is_file():
        raise FileNotFoundError(f"--image-path {args.image_path}: there is no such file")
    check_size(codec, args.image_size, args.image_size)
    try:
        pixels = center_view(load_rgb(args.image_path, Reading.of(args)), args.image_size)[None].to(device)
    except Exception as error:  # decoders fail in arbitrary ways
        raise ValueError(f"--image-path {args.image_path} is not a readable image ({error})") from error
    trip = round_trip(codec, pixels, [0])
    output = Path(args.output_dir) / f"{Path(args.image_path).stem}_{args.suffix or suffix}.png"
    save_png(trip.recons[0], output)
    psnr = peak_signal_to_noise_ratio(trip.originals[0], trip.recons[0])
    codes = "" if trip.codes is None else f" from {trip.codes.size} codes, {len(set(trip.codes.ravel()))} different,"
    print(f"wrote {output}: {args.image_size}x{args.image_size}{codes} PSNR {psnr:.2f} dB")


def reconstruction_flags(
    description: str | None, *, evaluation: int | None = None, model: bool = True
) -> argparse.ArgumentParser:
    """The flags of every reconstruction script. evaluation: what --image-size-eval is unless given (None: --image-size)."""
    parser = flag_parser(description, added=["--precision"] if evaluation else ["--precision", "--image-size-eval"])
    parser.add_argument("--data-path", required=True, help="folder of images")
    parser.add_argument(
        "--dataset", default="imagenet", help="kind of data: imagenet, coco, pexels, openimage, t2i_image"
    )
    add_reading_flags(parser)
    add_image_size_flags(parser, 256, downsample=False)
    parser.add_argument("--sample-dir", default="reconstructions", help="where the folder of images and the rest go")
    parser.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images at once on each process")
    parser.add_argument("--global-seed", type=SEED, default=0, help="of what a model draws; most draw nothing")
    parser.add_argument(
        "--num-workers", type=nonnegative_int, default=4, help="loader processes (at most the processor's cores)"
    )
    add_switch(parser, "--npz", True, "gather the images into one .npz")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    if model:
        parser.add_argument(
            "--image-size-eval",
            type=positive_int,
            default=evaluation,
            help="pixels a side of the saved images" + ("" if evaluation else " (default: --image-size)"),
        )
        parser.add_argument(
            "--precision",
            choices=["none", "fp16", "bf16"],
            default="none",
            help="autocast of the model (none: float32)",
        )
        add_switch(parser, "--lpips", True, "LPIPS too, where the weights of VGG16 are in pretrained_models/")
    else:
        parser.set_defaults(image_size_eval=None, lpips=False)
    return parser


def folder_name(args: argparse.Namespace, model: str, details: str = "") -> str:
    """Return the published name of a folder of reconstructions. details: what stands between the size and the seed."""
    return f"{model}-{args.dataset}-size-{args.image_size}{details}-seed-{args.global_seed}"


def demo_flags(description: str | None) -> argparse.ArgumentParser:
    """The flags of the scripts that reconstruct one image."""
    parser = flag_parser(description, added=["--suffix"])
    parser.add_argument("--image-path", default="assets/example.jpg", help="the image")
    add_reading_flags(parser)
    parser.add_argument("--output-dir", default="output_vq_demo", help="where the reconstruction goes")
    parser.add_argument("--suffix", default=None, help="end of its name (default: the model's name)")
    add_image_size_flags(parser, 512, downsample=False)
    parser.add_argument("--seed", type=SEED, default=0, help="of what the model draws; most draw nothing")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser
