"""The Llama-architecture transformer over image tokens, and the table of its sizes.

    model = GPT_models["GPT-B"](block_size=256)              # 16x16 tokens
    logits = model(tokens[:, : -model.layout.step_tokens], labels)       # (B, N, vocab_size)

What it shares with other models is in trunk.py. LlamaGen (arXiv 2406.06525, section 2.2); Llama (2302.13971); special tokens and groups: PAR (2412.15119); patches: NPP
(2412.15321).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.build import build_gpt
from autoregressive.models.conditions import Condition
from autoregressive.models.layouts import Layout
from autoregressive.models.rope import apply_rope, rope_table_2d
from autoregressive.models.sizes import GPT_SIZES
from autoregressive.models.trunk import ModelArgs, Rows, Trunk, attend, draw_normal, register_trunk


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467), computed in float32 and cast back before the weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): a sample's residual branch is left out with probability p."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        keep = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.dropout = nn.Dropout(args.ffn_dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Attention(nn.Module):
    """Attention with one fused projection (q, then k, then v) and 2D RoPE."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = args.n_head, args.kv_heads, args.dim // args.n_head
        self.wqkv = nn.Linear(args.dim, (args.n_head + 2 * args.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.attn_dropout_p = args.attn_dropout_p
        self.resid_dropout = nn.Dropout(args.resid_dropout_p)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None, causal: bool, layer: int, rows: Rows | None
    ) -> Tensor:
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # (B, S, H + 2 KV, D)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        q, k, v = (t.transpose(1, 2) for t in (apply_rope(q, rope), apply_rope(k, rope), v))  # (B, H, S, D)
        out = attend(q, k, v, mask, causal, layer, rows, self.attn_dropout_p if self.training else 0.0)
        return self.resid_dropout(self.wo(out))


class TransformerBlock(nn.Module):
    """One block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, args: ModelArgs, layer: int, drop_path: float):
        super().__init__()
        self.layer = layer
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None = None, causal: bool = True, rows: Rows | None = None
    ) -> Tensor:
        x = x + self.drop_path(self.attention(self.attention_norm(x), rope, mask, causal, self.layer, rows))
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))


class SpecialTokens(nn.Module):
    """The learned inputs that stand beside the last single token in the first parallel group (PAR, section 3)."""

    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.special_embeddings = nn.Embedding(tokens, dim)

    def forward(self) -> Tensor:
        return self.special_embeddings.weight


@register_trunk("llama")
class Transformer(Trunk):
    """The Llama architecture: RMSNorm, SwiGLU and 2D RoPE."""

    settings = ("rope_base", "norm_eps", "target_positions", "rope_grid", "exit_blocks")
    most_heads, adds_before_blocks = 2, True

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        if args.rope_grid and args.rope_grid < self.layout.grid_size:
            raise ValueError(
                f"the rotary table of {args.rope_grid}x{args.rope_grid} tokens has no places for {self.layout.grid_size}x"
                f"{self.layout.grid_size}: give a smaller --image-size"
            )
        per_token = [name for name, condition in self.conditions.items() if not condition.rows]
        if args.target_positions:
            per_token.append("the place of --random-orders")
        if per_token and self.layout.heads > 1:
            raise ValueError(
                f"the layout {self.layout.name!r} predicts two tokens from a row, and {' and '.join(per_token)} is added for one: "
                "give one of the two"
            )
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.spe_tok_embeddings = SpecialTokens(self.layout.special, args.dim) if self.layout.special else None
        self.any_order = args.target_positions
        self.target_embeddings = nn.Embedding(args.block_size, args.dim) if self.any_order else None
        rates = [args.drop_path_rate * layer / max(args.blocks - 1, 1) for layer in range(args.blocks)]
        self.layers = nn.ModuleList(TransformerBlock(args, layer, rate) for layer, rate in enumerate(rates))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if self.layout.heads > 1:
            self.medusa_norm = RMSNorm(args.dim, args.norm_eps)
            self.medusa_output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.rope(torch.device("cpu"))
        self.reset_parameters()

    @property
    def exits(self) -> list[tuple[RMSNorm, nn.Linear]]:
        """Norm and output layer of each head; the second head's come one block later (NAR, arXiv 2503.10696, section 3)."""
        exits = [(self.norm, self.output)]
        if self.layout.heads > 1:
            exits.append((self.medusa_norm, self.medusa_output))
        return exits

    def of_second_exit(self, name: str) -> str | None:
        for number in range(self.args.n_layer, len(self.layers)):
            if name.startswith(f"layers.{number}."):
                return name.replace(f"layers.{number}.", f"layers.{self.args.n_layer - 1}.")
        return name.removeprefix("medusa_") if name.startswith("medusa_") else None

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight (V, D) that turns the rows of `hidden` into logits, and its bias (V,) where there is one."""
        weights = [output.weight for _, output in self.exits]
        return (weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)), None

    @torch.no_grad()
    def reset_parameters(self, normal: Callable[[Tensor, float], None] = draw_normal) -> None:
        """Gives linear and embedding weights N(0, initializer_range²), norms ones, the output layer zeros.

        Features of "no caption" are of about unit length.
        """
        for module in self.modules():
            if module is self.output:
                module.weight.zero_()
            elif isinstance(module, nn.Linear | nn.Embedding):
                normal(module.weight, self.args.initializer_range)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, Condition):
                module.reset(normal, self.args.initializer_range)
        for condition in self.conditions.values():
            condition.rescale()

    def rope(self, device: torch.device, layout: Layout | None = None) -> Tensor:
        """The rotary table of every row of a layout (the model's own), float32 (rows, head_dim/2, 2)."""
        layout = layout or self.layout
        side = self.args.rope_grid or layout.rope_grid
        return self.made_once(("rows", layout, device), lambda: layout.rope_rows(self.rope_table(side)).to(device))

    def cell_rope(self, device: torch.device) -> Tensor:
        """The rotary table of every cell in raster order, float32 (grid_size², head_dim/2, 2)."""
        return self.made_once(("cells", device), lambda: self.rope_table(self.layout.grid_size).to(device))

    def rope_table(self, side: int) -> Tensor:
        """Return the rotary table of a grid of `side` cells a side."""
        return rope_table_2d(side, self.args.dim // self.args.n_head, self.args.rope_base)

    def in_orders(self, h: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Add to rows h (B, s, dim), of samples with orders of their own, the places of the tokens that they predict.

        A sample in the layout's order has none: in that order the model is one that was never trained in others.
        Returns the rows and their rotary table, (B, s, head_dim/2, 2).
        """
        assert rows.orders is not None and self.target_embeddings is not None
        cells, layout = self.cells(rows), rows.layout or self.layout
        own, target = cells.clamp(min=0).unbind(-1)
        other = (rows.orders != self.layout_order(layout, h.device)).any(1)[:, None]
        h = h + torch.where((other & (cells[..., 1] >= 0))[..., None], self.target_embeddings(target), 0).to(h.dtype)
        placed = (cells[..., 0] >= 0)[..., None, None]
        return h, torch.where(placed, self.cell_rope(h.device)[own], 0)

    @property
    def activations(self) -> list[tuple[Callable[[Tensor], Tensor], int]]:
        return [(F.silu, self.args.ffn_dim)]

    def special(self) -> Tensor:
        assert self.spe_tok_embeddings is not None
        return self.spe_tok_embeddings()

    def decode(self, h: Tensor, rows: Rows, mask: Tensor | None, causal: bool) -> Tensor:
        """Run rows h (B, s, dim) through the blocks. Returns the states that `logits` takes, (B, s, heads * dim)."""
        if rows.orders is not None:
            h, rope = self.in_orders(h, rows)
        else:
            rope = self.rope(h.device, rows.layout)
            rope = rope[rows.positions.clamp(max=len(rope) - 1)]  # past the last one stands what is past an image's end
            if self.target_embeddings is not None and rows.cache is None:
                h = h + 0 * self.target_embeddings.weight[0]  # a gradient of zeros, which DDP waits for
        exits = []
        for number, layer in enumerate(self.layers, start=1):
            if rows.added is not None and number - 1 in rows.added:
                h = h + rows.added[number - 1]
            h = layer(h, rope, mask, causal, rows if rows.cache is not None else None)
            if number in (self.args.n_layer, len(self.layers)):
                exits.append(h)
        return exits[0] if len(exits) == 1 else torch.cat(exits, dim=-1)

    def read(self, h: Tensor, layout: Layout, rows: int) -> Tensor:
        """Return the rows that `projection` turns into logits, (B, tokens, D), normalised.

        With two heads, D is twice the width: side by side the states that each head reads, times its share of the mean.
        """
        if len(self.exits) == 1:
            return super().read(h, layout, rows)
        exits = h.chunk(len(self.exits), dim=-1)
        parts = zip(self.exits, exits, *self.reads(layout, rows, h.device), strict=True)
        return torch.cat([norm(x[:, read]) * share.to(x.dtype) for (norm, _), x, read, share in parts], dim=-1)

    def reads(self, layout: Layout, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows that each head reads, int64 (heads, tokens), and its shares of the means, (heads, tokens, 1)."""
        heads = len(self.exits)

        def made() -> tuple[Tensor, Tensor]:
            every = torch.arange(rows, device="cpu")
            read = torch.stack([every[layout.read_rows(rows, head)] for head in range(heads)])
            return read.to(device), layout.shares(rows, heads).t()[..., None].to(device)

        return self.made_once(("reads", layout, rows, device), made)

    def logits(self, h: Tensor, reads: Tensor | None = None) -> Tensor:
        """Project states (B, s, heads * dim) to float32 logits (B, tokens, vocab_size), each the mean of a token's readers.

        reads: int64 (B, tokens, readers, 2), the row and head of each token's readers, of which a head is one (or several
        equal ones); None where token i is read from row i.
        """
        if len(self.exits) == 1:
            return super().logits(h, reads)
        assert reads is not None, "with two heads a token has its readers"
        parts = []
        for head, ((norm, output), state) in enumerate(zip(self.exits, h.chunk(len(self.exits), dim=-1), strict=True)):
            own = reads[..., 1] == head  # (B, tokens, readers)
            row = (reads[..., 0] * own).amax(-1, keepdim=True)
            logits = output(norm(state.gather(1, row.expand(-1, -1, state.shape[-1])))).float()
            parts.append(logits * own.float().mean(-1, keepdim=True))
        return sum(parts[1:], parts[0])


GPT_models: dict[str, Callable[..., Any]] = {name: partial(build_gpt, name) for name in GPT_SIZES}
