"""RAR: LayerNorm blocks modulated by the class and the row's number, and learned places, of which one is the target's.

    model = build_gpt("RAR-B", vocab_size=1024)
    logits = model(tokens[:, :-1], labels, orders=orders)    # int64 (B, N), the raster index at each sequence place

Trained in random orders that are annealed to raster, and sampled as raster. Two condition rows, a learned vector and the
class; parameter names are the published ones. Randomized Autoregressive Visual Generation (arXiv 2411.00776, section 3).
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.conditions.label import Label
from autoregressive.models.sizes import SPARE_PLACES
from autoregressive.models.trunk import ModelArgs, Rows, draw_normal, register_trunk
from autoregressive.models.vit import EPS, Attention, LayerNormTrunk, Mlp

SPARE_NUMBERS = 100  # rows that the published table has to spare


def modulation(dim: int, parts: int) -> nn.Sequential:
    """Return the layer that makes `parts` vectors of a row's condition."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class Block(nn.Module):
    """A block whose branches are shifted, scaled and gated by the row's condition (AdaLN, arXiv 2212.09748)."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(args.dim, EPS), nn.LayerNorm(args.dim, EPS)
        self.attn = Attention(args, layer, qk_norm=True, dropout=args.resid_dropout_p)
        self.mlp = Mlp(args)
        self.adaLN_modulation = modulation(args.dim, 6)

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None, causal: bool, rows: Rows | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, mask, causal, rows)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalNorm(nn.Module):
    """LayerNorm without parameters, scaled and shifted by the row's condition."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.adaLN_modulation = modulation(dim, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.norm_final(x) * (1 + scale) + shift


@register_trunk("rar")
class RAR(LayerNormTrunk):
    """The published architecture. Dropouts are those of ModelArgs, resid_dropout_p also that of attention weights."""

    has_context = any_order = True
    called, class_rows, codes_name, head_name = "a RAR", 2, "embeddings", "lm_head"

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        dim, tokens = args.dim, args.block_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.embeddings = nn.Embedding(args.vocab_size + args.num_classes + 2, dim)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens + SPARE_PLACES, dim))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, tokens + SPARE_PLACES, dim))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, tokens + SPARE_NUMBERS, dim))
        self.blocks = nn.ModuleList(Block(args, layer) for layer in range(args.n_layer))
        self.adaln_before_head = FinalNorm(dim)
        self.lm_head = nn.Linear(dim, args.vocab_size)
        self.norm = nn.Identity()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, normal: Callable[[Tensor, float], None] = draw_normal) -> None:
        """Gives weights and tables N(0, initializer_range²), norms ones; biases, AdaLN and cls_token are zero.

        So a block begins as the identity.
        """
        for name, parameter in self.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            elif parameter.dim() < 2 or "adaLN" in name or name == "cls_token":
                parameter.zero_()
            else:
                normal(parameter, self.args.initializer_range)
        for condition in self.conditions.values():
            condition.reset(normal, self.args.initializer_range)

    @property
    def activations(self) -> list[tuple[Callable[[Tensor], Tensor], int]]:
        return [(F.silu, self.args.dim), *super().activations]

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Tell whether weight decay takes hold of a parameter, by the published rule of names: of the tables not, of AdaLN yes."""
        spared = ("ln", "bias", "norm", "embedding", "embed", "mask_token", "latent_tokens", "gamma")
        return parameter.dim() >= 2 and not any(word in name for word in spared)

    def embed_condition(self, name: str, value: Tensor, drop: Tensor | None) -> Tensor:
        condition = self.conditions[name]
        if not isinstance(condition, Label):
            return super().embed_condition(name, value, drop)
        classes = self.tok_embeddings(self.args.vocab_size + 1 + condition.dropped(value, drop).long())
        return torch.stack([self.cls_token[0].expand_as(classes), classes], dim=1)

    def context(self, conditions: Tensor) -> Tensor:
        """Return the class's embedding, which modulates every row."""
        return conditions[:, 1]

    def decode(self, h: Tensor, rows: Rows, mask: Tensor | None, causal: bool) -> Tensor:
        cells, at = self.cells(rows), rows.positions.clamp(max=self.layout.rows - 1)
        own, target = (cells + self.layout.prefix).unbind(-1)
        own = torch.where(cells[..., 0] >= 0, own, at)
        h = h + self.pos_embed[0, own]
        h = h + torch.where(cells[..., 1:] >= 0, self.target_aware_pos_embed[0, target], 0)
        assert rows.context is not None
        condition = rows.context[:, None] + self.timesteps_embeddings[0, at]
        for block in self.blocks:
            h = block(h, condition, mask, causal, rows if rows.cache is not None else None)
        return self.adaln_before_head(h, condition)
