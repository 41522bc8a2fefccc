"""Codecs of the reconstruction scripts: a tokenizer, or one of the baselines, by the flags that name it.

loaded = load_vae(args, dist, seed)                    # Loaded(codec, name, weights)
recons, codes = loaded.codec(images, indices)          # (B, 3, H, W) in [-1, 1], and the images' numbers
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer.base import Tokenizer
from tokenizer.load import load_tokenizer
from tokenizer.tokenizer_image.sizes import VQGAN_FROM_TAMING
from utils.checkpoint import read_checkpoint
from utils.cli import tokenizer_beliefs
from utils.distributed import Distributed
from utils.hub import resolve
from utils.rng import item_seed
from utils.runs import find_checkpoint

VAES = {"sdxl-vae": "stabilityai/sdxl-vae", "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse"}
CONSISTENCY_DECODER = "openai/consistency-decoder"
# The files of a diffusers folder.
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Where a VQGAN may lie in pretrained_models/.
_PLACES = (
    "{0}/ckpts/last.pth", "{0}/ckpts/last.ckpt", "{0}/checkpoints/last.ckpt", "{0}/last.ckpt", "{0}/model.ckpt", "{0}.ckpt",
    "{0}.pth", "{0}.pt", "{0}.safetensors",
)  # fmt: skip


class VQCodec:
    """A tokenizer as a codec. The reconstructions are those of its codes.

    downsample: pixels a side of what becomes one code; it divides the image. codebook_size: None without a codebook.
    draws: whether images depend on the seed. packages: those whose versions matter, besides torch.
    """

    draws = False
    packages: tuple[str, ...] = ()

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.downsample = tokenizer.downsample
        self.codebook_size: int | None = tokenizer.codebook_size

    def __call__(self, images: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Reconstruct images, and return codes in raster order.

        Args:
            images: (B, 3, H, W) in [-1, 1]
            indices: their numbers in the data set

        Returns:
            (B, 3, H, W), roughly in [-1, 1], and int64 (B, N), -1 where latents are not finite; None without a codebook
        """
        codes = self.tokenizer.to_codes(images)
        return self.tokenizer.to_pixels(codes.clamp(min=0)), codes.flatten(1)


class DiffusersCodec:
    """An autoencoder of diffusers as a codec, with the attributes of VQCodec.

    An image is decoded from the mean of its posterior, with `sample` from a draw. `draw_decoded`: the decoder itself draws,
    as a consistency model does (arXiv 2303.01469). What is drawn for an image is a function of the seed and its number. The
    factor that scales latents for a diffusion model cancels out.
    """

    codebook_size: int | None = None
    packages: tuple[str, ...] = ("diffusers",)

    def __init__(self, model: nn.Module, seed: int = 0, sample: bool = False, draw_decoded: bool = False):
        self.model, self.seed, self.sample, self.draw_decoded = model, seed, sample, draw_decoded
        self.draws = sample or draw_decoded
        self.downsample = 2 ** (len(model.config.block_out_channels) - 1)

    def __call__(self, images: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        generators = [torch.Generator().manual_seed(item_seed(self.seed, index)) for index in indices]
        posterior = self.model.encode(images).latent_dist
        latents = posterior.sample(generators) if self.sample else posterior.mode()
        drawn = {"generator": generators} if self.draw_decoded else {}
        return self.model.decode(latents, **drawn).sample, None


Codec = VQCodec | DiffusersCodec


@dataclass(frozen=True)
class Loaded:
    """A codec by its flags.

    codec: None where images stay as they are. name: of its folders. weights: their file. details: settings in the folders' name.
    """

    codec: Codec | None
    name: str
    weights: Path | None
    details: str = ""


def load_vq(args: argparse.Namespace, dist: Distributed, seed: int) -> Loaded:
    """Load the tokenizer of --vq-ckpt, by its averaged weights where --use-ema asks for them and the file has some."""
    if args.vq_ckpt is None:
        raise ValueError(
            "--vq-ckpt is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
        )
    with dist.main_first():
        path = find_checkpoint(args.vq_ckpt)
    args.use_ema = args.use_ema and read_checkpoint(path).ema is not None
    if dist.is_main:
        print(f"{path}: its {'averaged' if args.use_ema else 'raw'} weights")
    tokenizer = load_tokenizer(path, **tokenizer_beliefs(args), device=dist.device, use_ema=args.use_ema)
    vars(args).update(tokenizer.flags)
    size = getattr(args, "image_size_eval", None) or args.image_size
    details = f"-size-{size}-codebook-size-{args.codebook_size}-dim-{args.codebook_embed_dim}"
    return Loaded(VQCodec(tokenizer), tokenizer.family, path, details)


def load_vqgan(args: argparse.Namespace, dist: Distributed, seed: int) -> Loaded:
    """Load the VQGAN of --vqgan, a baseline."""
    path = find_vqgan(args.vqgan, args.vqgan_ckpt)
    return Loaded(VQCodec(vqgan(path, args.vqgan, dist.device)), args.vqgan, path)


def load_vae(args: argparse.Namespace, dist: Distributed, seed: int) -> Loaded:
    """Load the VAE of --vae, a baseline."""
    with dist.main_first():
        model, weights = load_autoencoder("AutoencoderKL", resolve(args.vae_path or VAES[args.vae]), dist.device)
    codec = DiffusersCodec(model, seed, sample=args.posterior == "sample")
    return Loaded(codec, VAES[args.vae].replace("/", "-"), weights)


def load_consistency_decoder(args: argparse.Namespace, dist: Distributed, seed: int) -> Loaded:
    """Load OpenAI's consistency decoder behind Stable Diffusion's encoder, a baseline."""
    folder = args.cd_path or CONSISTENCY_DECODER
    with dist.main_first():
        model, weights = load_autoencoder("ConsistencyDecoderVAE", resolve(folder), dist.device)
    return Loaded(DiffusersCodec(model, seed, draw_decoded=True), "openai-consistencydecoder", weights)


def load_reference(args: argparse.Namespace, dist: Distributed, seed: int) -> Loaded:
    """Load nothing: the crops themselves are the reference of rFID."""
    return Loaded(None, "val", None)


# Makers of a codec from a script's flags, on every process; the last argument is the seed.
Loader = Callable[[argparse.Namespace, Distributed, int], Loaded]
LOADERS: dict[str, Loader] = {
    "vq": load_vq,
    "vqgan": load_vqgan,
    "vae": load_vae,
    "consistency-decoder": load_consistency_decoder,
    "reference": load_reference,
}


def find_vqgan(name: str, path: str | Path | None = None) -> Path:
    """Return the file of a VQGAN: `path` where given, else in pretrained_models/.

    Raises FileNotFoundError that says where it was looked for and where it is to be had.
    """
    if path is not None:
        return resolve(path)
    places = [place.format(name) for place in _PLACES]
    for place in places:
        with suppress(FileNotFoundError):
            return resolve(f"pretrained_models/{place}")
    raise FileNotFoundError(
        f"no weights of {name} in pretrained_models/ (looked for {', '.join(places)}): fetch them from "
        f"{VQGAN_FROM_TAMING[name].address} and put the checkpoint at pretrained_models/{name}.ckpt, or give its path with "
        "--vqgan-ckpt"
    )


def vqgan(path: str | Path, name: str | None = None, device: torch.device | str = "cpu") -> Tokenizer:
    """Load a VQGAN of taming-transformers or latent diffusion, whose codes are not l2-normalised, as `load_tokenizer` does.

    Raises ValueError where the file holds something else, or another one than `name` of VQGAN_FROM_TAMING.
    """
    model = load_tokenizer(path, codebook_l2_norm=False, device=device)
    found = (model.codebook_size, model.quantize.width, tuple(model.network["encoder_ch_mult"]))
    if name and found != VQGAN_FROM_TAMING[name].shape:
        fitting = [other for other, vqgan in VQGAN_FROM_TAMING.items() if vqgan.shape == found]
        hint = f"use --vqgan {fitting[0]}" if fitting else "give another file"
        raise ValueError(
            f"{path} is not {name}: it has {found[0]} codes of {found[1]} numbers and levels {list(found[2])}; {hint}"
        )
    return model


def load_autoencoder(kind: str, folder: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, Path]:
    """Load the autoencoder of a diffusers folder, in eval mode and float32, and return the file of its weights too.

    kind: the diffusers class that config.json has to name. Nothing is downloaded and no pickle runs code.
    Raises FileNotFoundError where a file is missing, ValueError where the folder holds another model or damaged weights.
    """
    import diffusers  # takes seconds, and only two baselines need it
    from diffusers.utils import logging

    folder = Path(folder)
    config = folder / CONFIG_FILE
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None or not config.is_file():
        raise FileNotFoundError(
            f"{folder} is no diffusers folder: it needs {CONFIG_FILE} and {' or '.join(WEIGHT_FILES)}"
        )
    logging.set_verbosity_error()
    try:
        found = json.loads(config.read_bytes())["_class_name"]
        if found != kind:
            raise ValueError(f"it holds a model of class {found}, not {kind}")
        model, fit = getattr(diffusers, kind).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=weights.suffix == ".safetensors",
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        wrong = [name for title in ("missing_keys", "unexpected_keys") for name in fit[title]]
        if wrong:
            raise ValueError(f"missing or unexpected weights {', '.join(wrong[:5])}")
    except Exception as error:  # damaged weights and configurations fail in arbitrary ways
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{weights} is damaged or does not fit {config}: {reason}") from error
    return model.to(device=device, dtype=torch.float32).eval().requires_grad_(False), weights
