"""LPD: LayerNorm blocks and learned places, with a query row that asks for each token (arXiv 2507.01957, section 3).

    model = build_gpt("LPD-L")
    codes = generate(model, labels, cfg_scale=4.8, cfg_schedule="linear")          # 20 passes at 256 pixels

A row is z_proj_ln(content + place): the class, a token at its cell, or mask_token at the cell that is asked for. Parameter
names are the published ones.
"""

from collections.abc import Callable, Mapping
from math import isqrt, sqrt

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.trunk import ModelArgs, Rows, draw_normal, register_trunk
from autoregressive.models.vit import EPS, Attention, LayerNormTrunk, Mlp


class Block(nn.Module):
    """One block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(args.dim, EPS), nn.LayerNorm(args.dim, EPS)
        self.attn, self.mlp = Attention(args, layer), Mlp(args)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool, rows: Rows | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask, causal, rows)
        return x + self.mlp(self.norm2(x))


@register_trunk("lpd")
class LPD(LayerNormTrunk):
    """The published architecture. Dropouts are those of ModelArgs. Raises ValueError for layouts without queries too."""

    default_layout, any_order, resizes = "queried", True, True
    called, codes_name, head_name = "an LPD", "token_emb", "head"

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        if args.extra_conditions:
            raise ValueError("an LPD is of classes alone: give no --condition, or another --gpt-model")
        if self.layout.queries != args.block_size:
            raise ValueError(
                f"an LPD reads each token from a query, and the layout {self.layout.name!r} has none: give --layout queried"
            )
        dim = args.dim
        self.class_emb = nn.Embedding(args.num_classes, dim)
        self.fake_latent = nn.Parameter(torch.empty(1, dim))  # "no class"
        self.token_emb = nn.Embedding(args.vocab_size, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + args.block_size, dim))  # of the class, then of the cells
        self.z_proj_ln = nn.LayerNorm(dim, EPS)
        self.blocks = nn.ModuleList(Block(args, layer) for layer in range(args.n_layer))
        self.norm = nn.LayerNorm(dim, EPS)
        self.head = nn.Linear(dim, args.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, normal: Callable[[Tensor, float], None] = draw_normal) -> None:
        """Gives linear layers Xavier's uniform weights, the other weights and tables N(0, initializer_range²), norms ones."""
        linear = {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        for name, parameter in self.named_parameters():
            if name in linear:  # the error function makes N(0, 1) uniform in [-1, 1]
                normal(parameter, 1.0)
                parameter.copy_((parameter / sqrt(2)).erf() * sqrt(6 / sum(parameter.shape)))
            elif parameter.dim() >= 2:
                normal(parameter, self.args.initializer_range)
            else:
                parameter.fill_(float(name.endswith("weight")))

    def embed_condition(self, name: str, value: Tensor, drop: Tensor | None) -> Tensor:
        table = torch.cat([self.class_emb.weight, self.fake_latent])
        return table[self.conditions[name].dropped(value, drop).long(), None]

    def queries(self, positions: Tensor) -> Tensor:
        return self.mask_token[0].expand(len(positions), -1)

    def resized(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a state dict whose table of cells is resized bicubically to the model's grid, as a picture of `dim` channels."""
        table, side = state["pos_embed"], self.layout.grid_size
        if (before := isqrt(table.shape[1] - 1)) == side:
            return state
        cells = table[:, 1:].float().unflatten(1, (before, before)).permute(0, 3, 1, 2)
        cells = F.interpolate(cells, size=(side, side), mode="bicubic", align_corners=False)
        resized = torch.cat([table[:, :1], cells.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
        return {**state, "pos_embed": resized}

    def decode(self, h: Tensor, rows: Rows, mask: Tensor | None, causal: bool) -> Tensor:
        h = self.z_proj_ln(h + self.pos_embed[0, 1 + self.cells(rows)[..., 0]])
        for block in self.blocks:
            h = block(h, mask, causal, rows)
        return h
