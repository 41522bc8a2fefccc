"""The interface of image tokenizers: all that the rest of the project knows of one.

    codes = tokenizer.to_codes(pixels)      # (B, 3, H, W) in [-1, 1] -> int64 (B, h, w)
    pixels = tokenizer.to_pixels(codes)     # and back

A tokenizer is a network around a quantiser. Its `config` names both, and a tokenizer is built from a config alone
(tokenizer/load.py). A new quantiser is one file: docs/extending.md.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from tokenizer.pointwise import independent_of_threads
from utils.precision import full_float32
from utils.registry import Registry

QUANTIZERS: Registry[type["Quantizer"]] = Registry(
    "quantizer",
    {
        name: f"tokenizer.tokenizer_image.quantizers.{name}"
        for name in ("vq", "vq_restart", "vq_legacy", "ibq", "lfq", "fsq")
    },
)
NETWORKS: Registry[type["Tokenizer"]] = Registry(
    "network of a tokenizer",
    {
        "vqgan": "tokenizer.tokenizer_image.vq_model",
        "patches": "tokenizer.patches",
        "maskgit": "tokenizer.maskgit",
        "open-magvit2": "tokenizer.open_magvit2",
    },
)
# Decorators with the name that --quantizer, --network and configs then know.
register_quantizer, register_network = QUANTIZERS.register, NETWORKS.register

# How a CPU's convolutions round depends on the number of images, and with one of them on that of threads too.
IMAGES_AT_ONCE = 2
# Codes of training that a quantiser's window of usage holds.
USAGE_WINDOW = 65536
# Options of quantisers that belong to a run of training, not to the tokenizer: weights of losses.
LOSS_WEIGHTS = ("commit_loss_beta", "entropy_loss_ratio")
# State that moves while a tokenizer trains and decides no code.
_UNDECISIVE = ("quantize.codebook_used", "quantize.steps_unused")


@dataclass
class CodebookLosses:
    """The losses of a quantiser by name, already weighted, and the share of codes in use.

    Indexing and unpacking give the published tuple: (vq, commit, entropy, usage).
    """

    parts: dict[str, Tensor]
    usage: Tensor

    @property
    def total(self) -> Tensor:
        return sum(self.parts.values())

    def __getitem__(self, index: int | slice) -> Any:
        return (*self.parts.values(), self.usage)[index]


class Quantizer(nn.Module):
    """Latents to codes and back. Its methods are called in float32, whatever the autocast.

    codebook_size: number of codes. width: channels of the latents.
    config: what it is built from, {"name": …, option: value}. loss_weights: those of LOSS_WEIGHTS that it takes. Both are
    set by `build_quantizer`.
    """

    codebook_size: int
    width: int
    config: dict[str, Any]
    loss_weights: dict[str, float]

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the codes of latents: (B, width, h, w) -> int64 (B, h, w)."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """Return what the decoder gets of codes: (B, h, w) -> (B, width, h, w)."""
        raise NotImplementedError

    def forward(self, latents: Tensor) -> tuple[Tensor, CodebookLosses, Tensor]:
        """Quantise in training: (B, width, h, w) -> the same with its gradient, the losses, the codes (B, h, w)."""
        raise NotImplementedError

    def code_rule(self) -> str:
        """Return what decides codes besides the quantiser's tensors, for the fingerprint."""
        return json.dumps(self.config, sort_keys=True)

    @torch.no_grad()
    def usage(self, codes: Tensor) -> Tensor:
        """Return the share of codes that occur in these, or in the buffer `codebook_used` once it has taken them."""
        seen = codes = codes.flatten()
        if hasattr(self, "codebook_used"):
            newest = codes[-USAGE_WINDOW:]
            self.codebook_used.copy_(torch.cat([self.codebook_used[newest.numel() :], newest]))
            seen = self.codebook_used.long()
        # A scatter, not unique(): its output shape does not depend on the data, so no device sync and no graph break.
        return torch.zeros(self.codebook_size, device=codes.device).scatter_(0, seen, 1.0).mean()


def build_quantizer(config: Mapping[str, Any], **training: Any) -> Quantizer:
    """Build a quantiser from its config. training: weights of losses, passed on where the class takes them.

    Raises ValueError for a name that is not registered, an option that the class does not have, and one that it lacks.
    """
    name, options = config["name"], {key: value for key, value in config.items() if key != "name"}
    kind = QUANTIZERS[name]
    known = inspect.signature(kind).parameters
    weights = {key: value for key, value in training.items() if key in known}
    required = {key for key, option in known.items() if option.default is option.empty}
    if options.keys() - known.keys() or required - options.keys() - weights.keys():
        raise ValueError(f"quantizer {name} takes {', '.join(known)}, got {', '.join(options) or 'nothing'}")
    made = kind(**{**weights, **options})
    defaults = {key: option.default for key, option in known.items() if key not in LOSS_WEIGHTS}
    made.config = {"name": name, **defaults, **options}
    made.loss_weights = {key: weights.get(key, known[key].default) for key in LOSS_WEIGHTS if key in known}
    return made


class Tokenizer(nn.Module):
    """A network around a quantiser. A kind of network sets `encoder`, `quantize` and `decoder`, or has its own `latents` and `render`.

    name: of the network. Config: dataclass that it is built from, with the quantiser's config among its fields. family: name for messages, folders of samples and model cards. downsample: pixels a side of a code.
    decoding: names of the modules that decoding alone needs; the rest decides the codes.
    """

    name: str
    Config: type[Any]
    config: Any
    family: str
    downsample: int
    encoder: nn.Module
    decoder: nn.Module
    quantize: Quantizer
    decoding: tuple[str, ...] = ("decoder",)

    @classmethod
    def build(cls, network: Mapping[str, Any], quantizer: Mapping[str, Any], **training: Any) -> Self:
        """Build a tokenizer from the two parts of a config. training: dropout and the weights of the codebook's losses."""
        return cls(cls.Config(**network, quantizer=dict(quantizer)), **training)

    @property
    def network(self) -> dict[str, Any]:
        """Return the config of the network, {"name": …, option: value}."""
        options = asdict(self.config)
        del options["quantizer"]
        return {"name": self.name, **options}

    def latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels: (B, 3, H, W) -> (B, width, h, w). Raises ValueError for sides that the downsampling does not divide."""
        height, width = pixels.shape[-2:]
        if height % self.downsample or width % self.downsample:
            raise ValueError(
                f"images are {height} high and {width} wide; both must be multiples of {self.downsample}, the "
                "downsampling of this tokenizer: resize or crop them"
            )
        return self.encoder(pixels)

    def render(self, latents: Tensor) -> Tensor:
        """Decode latents: (B, width, h, w) -> (B, 3, H, W)."""
        return self.decoder(latents.to(next(self.decoder.parameters()).dtype))

    def to_pixels_in_strips(self, codes: Tensor) -> Tensor:
        """Return the images of codes as `to_pixels` does, on the CPU, with little of the device's memory.

        Raises NotImplementedError where the network cannot.
        """
        raise NotImplementedError(f"the tokenizer {self.family} cannot decode in strips: memory is short for an image")

    @property
    def codebook_size(self) -> int:
        return self.quantize.codebook_size

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def identity(self) -> dict[str, Any]:
        """Return what the tokenizer is built from, as its files record it (`Checkpoint.config`)."""
        return {"family": self.family, "network": self.network, "quantizer": self.quantize.config}

    @property
    def flags(self) -> dict[str, Any]:
        """Return the published flags that describe the tokenizer, by their names in a namespace."""
        size, width = self.codebook_size, self.quantize.width
        return {"vq_model": self.family, "codebook_size": size, "codebook_embed_dim": width}

    @torch.no_grad()
    def to_codes(self, pixels: Tensor) -> Tensor:
        """Return the codes of images: (B, 3, H, W) in [-1, 1] -> int64 (B, h, w), -1 where the latents are not finite."""
        with self.exact():
            latents = self._alike(self.latents, pixels)
            with torch.autocast(latents.device.type, enabled=False):
                codes = self.quantize.nearest(latents.float())
        return torch.where(latents.isfinite().all(dim=1), codes, -1)

    @torch.no_grad()
    def to_pixels(self, codes: Tensor) -> Tensor:
        """Return the images of codes: integers (B, h, w) -> (B, 3, H, W), roughly in [-1, 1], not clamped."""
        with self.exact():
            return self._alike(self.render, self.quantize.lookup(codes))

    def _alike(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Return function(batch), on a CPU as many images at once as IMAGES_AT_ONCE says."""
        if batch.device.type != "cpu":
            return function(batch)
        results = []
        for part in batch.contiguous().split(IMAGES_AT_ONCE):
            filled = torch.cat([part, *[part[-1:]] * (IMAGES_AT_ONCE - len(part))])
            results.append(function(filled)[: len(part)])
        return torch.cat(results)

    def forward(self, pixels: Tensor) -> tuple[Tensor, CodebookLosses]:
        """Reconstruct images in training: (B, 3, H, W) in [-1, 1] -> the same with gradients, the quantiser's losses."""
        with self.precision():
            quantised, losses, _ = self.quantized(self.latents(pixels))
            return self.render(quantised), losses

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Compute codes and pixels that depend on no setting of the process and on no number of threads."""
        with full_float32(), independent_of_threads(self) if self.device.type == "cpu" else nullcontext():
            yield

    def precision(self) -> AbstractContextManager:
        """Return the float32 to compute in: without TF32 in eval mode, in training what the run asks for."""
        return nullcontext() if self.training else full_float32()

    def quantized(self, latents: Tensor) -> tuple[Tensor, CodebookLosses, Tensor]:
        """Quantise as `Quantizer.forward` does, in float32, and return the dtype of the latents."""
        with torch.autocast(latents.device.type, enabled=False):
            quantised, losses, codes = self.quantize(latents.float())
        return quantised.to(latents.dtype), losses, codes

    def decode_in_bfloat16(self) -> "Tokenizer":
        """Turn what decodes into bfloat16 (on a CPU channels-last), in place, and return the tokenizer. Codes stay as they are.

        For pixels sooner that are not quite the same (docs/log.md): images come in bfloat16.
        """
        # On CUDA a group norm gives its maps out channels-first, and each convolution would turn them again.
        order = {"memory_format": torch.channels_last} if self.device.type == "cpu" else {}
        for name in self.decoding:
            self.get_submodule(name).to(torch.bfloat16, **order)
        return self

    def fingerprint(self) -> str:
        """Return 32 hexadecimal digits that are equal for tokenizers of equal codes; utils/origin.py compares them.

        The first 16 are those that the first edition recorded, of the codebook and the first layer alone, so that its
        records can be compared too. A decoder that was fine-tuned alone speaks the same codes.
        """
        decisive = {
            name: tensor
            for name, tensor in sorted(self.state_dict().items())
            if name not in _UNDECISIVE and not name.startswith(tuple(f"{part}." for part in self.decoding))
        }
        first = hashlib.sha256()
        for tensor in (
            *(t for name, t in decisive.items() if name.startswith("quantize.")),
            next(self.encoder.parameters()),
        ):
            first.update(_bytes(tensor))
        whole = hashlib.sha256(self.quantize.code_rule().encode())
        for name, tensor in decisive.items():
            whole.update(name.encode())
            whole.update(_bytes(tensor))
        return first.hexdigest()[:16] + whole.hexdigest()[:16]


def load_tokenizer(path: str | Path, **options: Any) -> Tokenizer:
    """Build the tokenizer of a checkpoint of any family, as tokenizer/load.py does with these options."""
    from tokenizer import load  # which imports every network, and they import this file

    return load.load_tokenizer(path, **options)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().float().cpu().contiguous().numpy()).cast("B")
