"""A VQGAN in taming-transformers' format, made and computed here: names, numbers, and the file Lightning writes of it."""

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import golden_state

F16, F8 = (1, 1, 2, 2, 4), (1, 2, 2, 4)


def taming_shapes(
    codes: int,
    embed_dim: int,
    mults: tuple[int, ...],
    z: int,
    ch: int = 32,
    blocks: int = 2,
    attend: tuple[int, ...] = (-1,),
) -> dict[str, tuple]:
    """The names and shapes of a VQGAN; `attend`: the levels with attention, -1 the coarsest."""
    shapes: dict[str, tuple] = {}

    def conv(name: str, cin: int, cout: int, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (cout, cin, size, size), (cout,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, cin: int, cout: int) -> None:
        norm(f"{name}.norm1", cin)
        conv(f"{name}.conv1", cin, cout, 3)
        norm(f"{name}.norm2", cout)
        conv(f"{name}.conv2", cout, cout, 3)
        if cin != cout:
            conv(f"{name}.nin_shortcut", cin, cout, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name: str, width: int) -> None:
        block(f"{name}.mid.block_1", width, width)
        attention(f"{name}.mid.attn_1", width)
        block(f"{name}.mid.block_2", width, width)

    last = len(mults) - 1
    conv("encoder.conv_in", 3, ch, 3)
    width = ch
    for i, mult in enumerate(mults):
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", width, ch * mult)
            width = ch * mult
            if i in attend or i - len(mults) in attend:
                attention(f"encoder.down.{i}.attn.{j}", width)
        if i != last:
            conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    middle("encoder", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, z, 3)
    conv("decoder.conv_in", z, width, 3)
    middle("decoder", width)
    for i in range(last, -1, -1):
        for j in range(blocks + 1):
            block(f"decoder.up.{i}.block.{j}", width, ch * mults[i])
            width = ch * mults[i]
            if i in attend or i - len(mults) in attend:
                attention(f"decoder.up.{i}.attn.{j}", width)
        if i != 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)
    shapes["quantize.embedding.weight"] = (codes, embed_dim)
    conv("quant_conv", z, embed_dim, 1)
    conv("post_quant_conv", embed_dim, z, 1)
    # What a checkpoint has besides: the discriminator and LPIPS.
    conv("loss.discriminator.main.0", 3, 4, 4)
    conv("loss.perceptual_loss.lin0.model.1", 4, 1, 1)
    return shapes


def taming_state(codes: int, embed_dim: int, mults: tuple[int, ...], z: int, seed: int = 0, **more) -> OrderedDict:
    return OrderedDict(golden_state(taming_shapes(codes, embed_dim, mults, z, **more), seed))


def with_averages(raw: dict[str, Tensor], averaged: dict[str, Tensor]) -> OrderedDict:
    """A state dict as IBQ's Lightning files have it: the averages are under the raw names without their dots."""
    named = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in averaged.items()}
    counted = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1, dtype=torch.int)}
    return OrderedDict({**raw, **counted, **named})


class TamingByHand:
    """What those weights compute, read off the names."""

    def __init__(self, state: dict[str, Tensor], mults: tuple[int, ...], blocks: int = 2):
        self.state, self.blocks = state, blocks
        self.levels = len(mults)

    def conv(self, name: str, x: Tensor, **kwargs) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **kwargs)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (B, C, N)
        weights = torch.einsum("bci,bcj->bij", q, k).div(q.shape[1] ** 0.5).softmax(dim=2)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bcj,bij->bci", v, weights).view_as(x))

    def level(self, name: str, x: Tensor, blocks: int) -> Tensor:
        for j in range(blocks):
            x = self.block(f"{name}.block.{j}", x)
            if f"{name}.attn.{j}.q.weight" in self.state:
                x = self.attention(f"{name}.attn.{j}", x)
        return x

    def middle(self, part: str, x: Tensor) -> Tensor:
        x = self.attention(f"{part}.mid.attn_1", self.block(f"{part}.mid.block_1", x))
        return self.block(f"{part}.mid.block_2", x)

    def latents(self, images: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", images, padding=1)
        for i in range(self.levels):
            x = self.level(f"encoder.down.{i}", x, self.blocks)
            if i != self.levels - 1:
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1))

    def codes(self, latents: Tensor) -> Tensor:
        """The nearest entry by plain distance: (B, C, h, w) -> (B, h, w)."""
        book = self.state["quantize.embedding.weight"]
        return torch.cdist(latents.permute(0, 2, 3, 1).double(), book.double()[None]).argmin(dim=-1)

    def images(self, codes: Tensor) -> Tensor:
        x = self.state["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", x), padding=1)
        x = self.middle("decoder", x)
        for i in range(self.levels - 1, -1, -1):
            x = self.level(f"decoder.up.{i}", x, self.blocks + 1)
            if i != 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"decoder.up.{i}.upsample.conv", x, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)


@contextmanager
def lightning_class(name: str = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint") -> Iterator[type]:
    """A class that pickles under a name of Lightning's, for as long as the block."""
    path, _, leaf = name.rpartition(".")
    parts = path.split(".")
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    new = [module for module in modules if module not in sys.modules]
    sys.modules.update({module: ModuleType(module) for module in new})
    made = type(leaf, (), {"__module__": path})
    setattr(sys.modules[path], leaf, made)
    try:
        yield made
    finally:
        delattr(sys.modules[path], leaf)
        for module in new:
            del sys.modules[module]


def save_lightning(path: Path, state: dict[str, Tensor], zipped: bool = True, **more) -> Path:
    """Writes what Lightning 1.0 writes: the callback's state is kept under its class."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))]).state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    with lightning_class() as callback:
        content = {
            "epoch": 12,
            "global_step": 3456,
            "pytorch-lightning_version": "1.0.8",
            "callbacks": {callback: {"monitor": "val/rec_loss", "best_model_score": torch.tensor(0.3), "dirpath": "x"}},
            "optimizer_states": [optimizer, optimizer],
            "lr_schedulers": [],
            "state_dict": state,
            **more,
        }
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path
