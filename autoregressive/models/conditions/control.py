"""Control: an image of edges, depth or other maps, added to the rows that predict its tokens (ControlAR, arXiv 2410.02705).

    args = ModelArgs(…, extra_conditions={"control": {"encoder": "dinov2", "width": 384}})
    codes = generate(model, {"label": labels, "control": images}, control_strength=0.6)

A value is an image, uint8 (3, H, W) or (1, H, W), or what the encoder makes of it, (N, width). Nothing is added where there
is no control. Names of parameters are the published ones, behind "extra_conditions.control.".
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from autoregressive.models.canny import canny
from autoregressive.models.conditions.base import Condition, ControlImage, register_condition
from autoregressive.models.conditions.caption import CaptionProjection
from autoregressive.models.on_cpu import packed

NARROW = 384  # inputs of a linear layer
PARTS = 3  # of the blocks; the control is added before each
# Kinds of control images, and how each is resized to the patches of the encoder.
RESIZES = {"canny": "nearest", "seg": "nearest", "depth": "bicubic", "hed": "bicubic", "lineart": "bicubic"}
PATCHES = {"dinov2": 14, "vit": 16}  # pixels a side


def control_pixels(picture: Image.Image, kind: str, width: int, height: int | None = None) -> Tensor:
    """Return the control image of a picture, uint8 (3, height, width), cropped to these sides, or to a square.

    Of kind canny the edges in the picture; the picture itself where it is of black and white alone, and of other kinds.
    Transparency is laid on white. Raises ValueError for pixels of 16 or 32 bits, which Pillow does not scale to 8.
    """
    if picture.mode[0] in "IF":
        raise ValueError(f"the control image has pixels of mode {picture.mode}: give a picture of 8 bits a channel")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    picture = picture.convert("RGB")
    drawn = kind == "canny" and set(np.unique(np.array(picture))) <= {0, 255}
    how = Image.Resampling.NEAREST if kind == "seg" else Image.Resampling.BICUBIC
    pixels = torch.from_numpy(np.array(ImageOps.fit(picture, (width, height or width), how))).permute(2, 0, 1)
    if drawn:
        return (pixels > 63).to(torch.uint8) * 255  # a line that was resized stays one
    return canny(pixels[None])[0].expand(3, -1, -1) if kind == "canny" else pixels


def check_kind(kind: str) -> None:
    """Raise ValueError for a kind of control images that is not known."""
    if kind not in RESIZES:
        raise ValueError(f"--control-type is {kind!r}: give {', '.join(RESIZES)}")


class Encoder(nn.Module):
    """DINOv2 or a ViT of transformers, which makes a row of each patch of an image."""

    def __init__(self, kind: str, width: int, layers: int, heads: int, positions: int, patch: int):
        super().__init__()
        self.is_vit = kind == "vit"
        transformers = import_module("transformers")
        shapes = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "patch_size": patch,
            "image_size": positions * patch,
        }
        if self.is_vit:
            config = transformers.ViTConfig(**shapes, intermediate_size=4 * width)
            self.model = transformers.ViTModel(config, add_pooling_layer=False)
        else:
            self.model = transformers.Dinov2Model(transformers.Dinov2Config(**shapes, use_mask_token=False))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1]: (B, patches, width)."""
        more = {"interpolate_pos_encoding": True} if self.is_vit else {}
        dtype = self.model.embeddings.patch_embeddings.projection.weight.dtype
        return self.model(pixels.to(dtype), **more).last_hidden_state[:, 1:]


@register_condition("control")
class Control(Condition):
    """Control images, uint8 (B, 1 or 3, H, W), or their features (B, N, width), added before three blocks.

    encoder: dinov2 or vit, None for a model of features alone. width, layers, heads: of the encoder. positions: cells a side
    of its table of places. patch: pixels a side of its patches (by default those of its kind). pixels: a side of a token.
    kind: of the control images, canny, seg, depth, hed or lineart, which decides how they are resized.
    """

    def __init__(
        self,
        dim: int,
        grid_size: int,
        *,
        encoder: str | None = "dinov2",
        width: int = 384,
        layers: int = 12,
        heads: int = 6,
        positions: int = 37,
        patch: int | None = None,
        pixels: int = 16,
        kind: str = "canny",
    ):
        super().__init__()
        if encoder not in (None, *PATCHES):
            raise ValueError(f"the encoder of control is {encoder!r}; known are {', '.join(PATCHES)}")
        check_kind(kind)
        if encoder and width % heads:
            raise ValueError(f"{heads} heads must divide the width {width} of the encoder of control")
        self.grid_size, self.width, self.kind, self.pixels = grid_size, width, kind, pixels
        self.patch = patch or PATCHES.get(encoder or "", pixels)
        self.settings = {"encoder": encoder, "width": width, "pixels": pixels, "kind": kind}
        if encoder:
            self.settings |= {"layers": layers, "heads": heads, "positions": positions, "patch": self.patch}
        self.adapter = Encoder(encoder, width, layers, heads, positions, self.patch) if encoder else None
        self.adapter_mlp = CaptionProjection(width, dim)
        self.condition_mlp = nn.ModuleDict({"cap_proj": CaptionProjection(dim, dim)})
        self.condition_layers = nn.ModuleList(CaptionProjection(dim, dim) for _ in range(PARTS))

    @property
    def config(self) -> dict[str, Any]:
        return self.settings

    @property
    def size(self) -> int:
        """Pixels a side of the control images."""
        return self.grid_size * self.pixels

    def place(self, blocks: int) -> None:
        """Choose the first block and those a third and two thirds of the blocks later."""
        if blocks < PARTS:
            raise ValueError(f"a control is added before {PARTS} blocks, and the model has {blocks}")
        self.blocks = tuple(part * (blocks // PARTS) for part in range(PARTS))

    def check(self, value: Tensor) -> None:
        """Raise ValueError for another shape than that of images or features, and for features that are not finite."""
        side, tokens = self.size, self.grid_size**2
        is_image = self.adapter is not None and value.dim() == 4 and value.shape[1] in (1, 3)
        if is_image and tuple(value.shape[2:]) == (side, side) and (value.dtype == torch.uint8 or value.isnan().all()):
            return
        if tuple(value.shape[1:]) != (tokens, self.width) or not value.is_floating_point():
            takes = f"features, floats of shape (B, {tokens}, {self.width})"
            if self.adapter is not None:
                takes = f"images of {side}x{side} pixels, uint8 of shape (B, 1 or 3, {side}, {side}), or their {takes}"
            raise ValueError(f"control takes {takes}; got {value.dtype} of shape {tuple(value.shape)}")
        if not value.isfinite().all():
            raise ValueError("features of control are not all finite")

    def read(self, value: Any) -> Tensor:
        """Return the features (N, width) of a ControlImage, a PIL image or an image; features as they are."""
        if not isinstance(value, ControlImage):
            value = ControlImage(value)
        picture, kind = value.picture, value.kind or self.kind
        check_kind(kind)
        if isinstance(picture, Image.Image):
            if self.adapter is None:
                raise ValueError(
                    f"the model has no encoder of control images: give features, (B, {self.grid_size**2}, {self.width})"
                )
            picture = control_pixels(picture, kind, self.size)
        if picture is None:
            raise ValueError("an image without its control image: give one for each image")
        picture = torch.as_tensor(picture)
        self.check(picture[None])
        if picture.dim() == 2:
            return picture
        with torch.no_grad(), packed(self):
            return self.features(picture[None], kind)[0]

    def read_rectangle(self, value: ControlImage, height: int, width: int) -> Tensor:
        """Return the features of a PIL image for pictures of other sides, (N, width): of their tokens, then zeros.

        Raises ValueError for sides that are no whole tokens or more of them than the model's, and without an encoder.
        """
        rows, columns, tokens = height // self.pixels, width // self.pixels, self.grid_size**2
        if height % self.pixels or width % self.pixels or not 0 < rows * columns <= tokens:
            raise ValueError(
                f"{width}x{height} pixels: give sides that are multiples of {self.pixels}, at most {tokens} tokens of "
                f"{self.pixels}x{self.pixels} in all"
            )
        if self.adapter is None or not isinstance(value.picture, Image.Image):
            raise ValueError(
                "images of other sides are drawn by pictures, and by models with an encoder of control images"
            )
        kind = value.kind or self.kind
        check_kind(kind)
        with torch.no_grad(), packed(self):
            features = self.features(control_pixels(value.picture, kind, width, height)[None], kind)[0]
        return F.pad(features, (0, 0, 0, tokens - len(features)))

    def example(self) -> Tensor:
        return torch.zeros(self.grid_size**2, self.width)

    def null(self, value: Tensor) -> Tensor:
        """Return features of zeros, or images of NaN."""
        if value.dim() == 3:
            return torch.zeros_like(value)
        return torch.full_like(value, torch.nan, dtype=torch.float32)

    def resized(self, images: Tensor, kind: str | None = None) -> Tensor:
        """Resize images (B, 1 or 3, H, W) so that a patch of the encoder is a token: (B, 3, …) in [-1, 1]."""
        x = images.to(self.adapter_mlp.fc1.weight.device, torch.float32) / 127.5 - 1
        size = [side // self.pixels * self.patch for side in x.shape[2:]]
        if size != list(x.shape[2:]):
            mode = RESIZES[kind or self.kind]
            x = F.interpolate(x, size, mode=mode, align_corners=True if mode == "bicubic" else None)
        return x.expand(-1, 3, -1, -1)

    def features(self, images: Tensor, kind: str | None = None) -> Tensor:
        """Encode images (B, 1 or 3, H, W): (B, tokens, width). kind: where it is another one than the model's."""
        assert self.adapter is not None
        return self.adapter(self.resized(images, kind))

    def embed(self, value: Tensor) -> Tensor:
        return self(value)

    def forward(self, value: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embed the value, (B, N, 3 * dim): zeros for samples without control and those that `drop`, bool (B,), marks."""
        if value.dim() == 4:
            if value.is_floating_point():
                null = value.isnan().flatten(1).any(1)
                drop, value = null if drop is None else null | drop.to(null.device, torch.bool), value.nan_to_num()
            value = self.features(value)
        x = self.adapter_mlp(value.to(self.adapter_mlp.fc1.weight.dtype))
        if drop is not None:
            x = x.masked_fill(drop.to(x.device, torch.bool)[:, None, None], 0)
        x = self.condition_mlp["cap_proj"](x)
        return torch.cat([layer(x) for layer in self.condition_layers], dim=-1)

    def reset(self, normal: Callable[[Tensor, float], None], std: float) -> None:
        """Give the encoder's tables and patches N(0, std²), norms and layer scales ones, biases zeros."""
        for name, parameter in self.adapter.named_parameters() if self.adapter else ():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1)
            elif parameter.dim() > 2:
                normal(parameter, std)

    def rescale(self) -> None:
        """Give layers of fewer than NARROW inputs weights that keep their outputs as large as their inputs.

        N(0, 0.02²) would let 1e-4 of the control through them and nothing be learned of it. The last layers are small, so that
        tuning begins near the model without control. Layers of NARROW inputs and more stay as published.
        """
        last = {layer.fc2 for layer in self.condition_layers}
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and (inputs := layer.weight[0].numel()) < NARROW:
                layer.weight.mul_(0.1 if layer in last else (2 / inputs) ** 0.5 / 0.02)
