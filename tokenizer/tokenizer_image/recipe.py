"""Parts that vq_train.py puts together: what is trained, from which weights, by which losses."""

import argparse
import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset.augmentation import center_view
from dataset.images import ImageDataset, Unusable
from tokenizer.base import Tokenizer
from tokenizer.load import build_tokenizer, described
from tokenizer.released import recorded_l2_norm
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from tokenizer.tokenizer_image.vq_loss import VQLoss
from utils.checkpoint import Checkpoint
from utils.images import make_grid, to_uint8
from utils.runs import runs_in
from utils.training.parallel import Parallel
from utils.training.trainer import Micro, Phase

# Flags that say what is trained.
DESCRIPTION = (
    "vq_model", "vq_width", "codebook_size", "codebook_embed_dim", "codebook_l2_norm", "quantizer", "quantizer_options",
)  # fmt: skip
# What three halvings and two 4x4 convolutions without padding to spare leave a pixel of.
PATCHGAN_MINIMUM = 24


def new_tokenizer(args: argparse.Namespace, initial: Checkpoint | None) -> Tokenizer:
    """Build the tokenizer to train, and set the flags that describe it.

    Raises ValueError as `choose_config` does, and where it does not divide --image-size.
    """
    tokenizer = build_tokenizer(
        choose_config(args, initial),
        commit_loss_beta=args.commit_loss_beta,
        entropy_loss_ratio=args.entropy_loss_ratio,
        dropout_p=args.dropout_p,
    )
    options = tokenizer.quantize.config
    args.codebook_size, args.codebook_embed_dim = options.get("codebook_size"), options.get("codebook_embed_dim")
    args.codebook_l2_norm = options.get("l2_norm")
    if args.image_size % tokenizer.downsample:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of {tokenizer.downsample}, the pixels a side of a {args.vq_model} token"
        )
    return tokenizer


def choose_config(args: argparse.Namespace, initial: Checkpoint | None) -> dict[str, Any]:
    """Return the config of the tokenizer to train, that of --vq-ckpt or of the flags, and give the checkpoint our names.

    Flags that are left out are set as the file has them, or the run that is resumed.
    Raises ValueError where a flag contradicts the file or the run.
    """
    config = None
    if initial:
        config, initial.model = described(initial)
        kind = config["quantizer"]
        held = {"vq_model": config["family"], "vq_width": config["network"].get("ch"), "quantizer": kind["name"]}
        held |= {name: kind.get(name) for name in ("codebook_size", "codebook_embed_dim")}
        if args.quantizer_options:
            held["quantizer_options"] = {name: kind.get(name) for name in args.quantizer_options}
        complete(args, {**held, "codebook_l2_norm": recorded_l2_norm(initial)}, args.vq_ckpt)
    args.vq_model = args.vq_model or "VQ-16"
    for run in runs_in(args.results_dir, args.vq_model)[:1] if args.resume else []:
        began = run.flags()
        complete(args, {name: began.get(name) for name in DESCRIPTION}, run.folder)
    size = dict(VQ_SIZES.get(args.vq_model, {}))
    own = size.pop("quantizer", {"name": "vq"})
    args.quantizer = args.quantizer or own["name"]
    given = {"codebook_size": args.codebook_size, "codebook_embed_dim": args.codebook_embed_dim}
    given |= {"l2_norm": args.codebook_l2_norm, **(args.quantizer_options or {})}
    quantizer = {"name": args.quantizer, **{name: value for name, value in given.items() if value is not None}}
    if config:
        return {**config, "quantizer": {**config["quantizer"], **quantizer}}
    width = {} if args.vq_width is None else {"ch": args.vq_width}
    quantizer = {**own, **quantizer} if own["name"] == quantizer["name"] else quantizer
    return {"network": {"name": "vqgan", **size, **width}, "quantizer": quantizer}


def complete(args: argparse.Namespace, held: Mapping[str, Any], source: object) -> None:
    """Set the flags that are left out to what the source holds. Raises ValueError for one that contradicts it."""

    def said(name: str, value: Any) -> str:
        flag = name.replace("_", "-")
        return f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"

    for name, value in held.items():
        asked = getattr(args, name)
        if None not in (asked, value) and asked != value:
            raise ValueError(f"{said(name, asked)}: {source} was trained with {said(name, value)}; leave the flag out")
        setattr(args, name, value if asked is None else asked)


def new_losses(args: argparse.Namespace) -> VQLoss:
    """Build the losses of the flags. Raises ValueError for images that are too small for the discriminator."""
    if args.disc_weight and args.disc_type == "patchgan" and args.image_size < PATCHGAN_MINIMUM:
        raise ValueError(
            f"--disc-type patchgan needs images of {PATCHGAN_MINIMUM} pixels a side, got --image-size {args.image_size}; "
            "use a larger one, --disc-type stylegan, or --disc-weight 0"
        )
    names = (
        "disc_start", "disc_loss", "disc_type", "image_size", "disc_weight", "reconstruction_loss", "reconstruction_weight",
        "codebook_weight", "perceptual_weight",
    )  # fmt: skip
    return VQLoss(gen_adv_loss=args.gen_loss, **{name: getattr(args, name) for name in names})


def begin_anew(initial: Checkpoint, discriminator: nn.Module, args: argparse.Namespace) -> None:
    """Set a checkpoint back to step 0, for --finetune; without --keep-discriminator nothing but its tokenizer stays.

    Raises ValueError where the file's discriminator is another than the run's.
    """
    if not args.keep_discriminator:
        initial.optimizer, initial.extra = None, {}
    own, found = (
        {name: tensor.shape for name, tensor in state.items()}
        for state in (discriminator.state_dict(), initial.extra.get("discriminator") or {})
    )
    if found and found != own:
        raise ValueError(
            f"{initial.path} has another discriminator than --disc-type {args.disc_type} at --image-size {args.image_size}; "
            "--no-keep-discriminator begins with a new one"
        )
    initial.steps = 0
    initial.extra.pop("trainer", None)


class Adversaries:
    """The two phases of a step: the tokenizer's, and the discriminator's on the same reconstructions."""

    def __init__(self, args: argparse.Namespace, plan: Parallel, tokenizer: Tokenizer, losses: VQLoss):
        self.args, self.losses = args, losses
        self.generator, discriminator = plan.apply(tokenizer), losses.discriminator
        losses.discriminator = replace(plan, compile=False).apply(discriminator)
        self.reconstructions: dict[int, Tensor] = {}  # by the number of the microbatch
        self.phases = [
            Phase("optimizer", self.generator, self.adam(tokenizer), self.generator_loss),
            Phase(
                "optimizer_disc",
                losses.discriminator,
                self.adam(discriminator),
                self.discriminator_loss,
                lambda step: losses.discriminator_active(step + 1),
                model="discriminator",
            ),
        ]

    def generator_loss(self, batch: list[Tensor], place: Micro) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the tokenizer's loss of a microbatch, and figures for the log."""
        recons, codebook = self.generator(batch[0])
        self.reconstructions[place.number] = recons.detach()
        return self.losses.generator_loss(codebook, batch[0], recons, place.step + 1)

    def discriminator_loss(self, batch: list[Tensor], place: Micro) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the discriminator's loss of a microbatch, and figures for the log."""
        return self.losses.discriminator_loss(batch[0], self.reconstructions[place.number], place.step + 1)

    def adam(self, module: nn.Module) -> torch.optim.Adam:
        """Return the optimizer; weights decay where --weight-decay is given."""
        args = self.args
        settings = {"lr": args.lr, "betas": (args.beta1, args.beta2)}
        if getattr(args, "weight_decay_given", False):
            return torch.optim.AdamW(module.parameters(), weight_decay=args.weight_decay, **settings)
        return torch.optim.Adam(module.parameters(), **settings)


def readable(dataset: ImageDataset, first: int) -> Tensor | None:
    """Return the first of an image and those after it that can be read; what cannot is left to training to tell."""
    for index in range(first, len(dataset)):
        with suppress(Unusable):
            return dataset.read(index)[0]
    return None


class Comparison:
    """Images from all over a data set, drawn above their reconstructions while a tokenizer trains."""

    def __init__(self, dataset: ImageDataset, image_size: int, device: torch.device, count: int = 8):
        plain = copy.copy(dataset)
        plain.transform = partial(center_view, image_size=image_size)
        shown = np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)).tolist()
        found = (readable(plain, i) for i in shown)
        images = [image for image in found if image is not None] or [plain[0][0]]
        self.images = torch.stack(images).to(device)

    def __call__(self, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        codes = tokenizer.to_codes(self.images).clamp(min=0)  # -1 where training has diverged
        pictures = to_uint8(torch.cat([self.images, tokenizer.to_pixels(codes)]))
        return {"reconstructions": make_grid(pictures, columns=len(self.images))}
