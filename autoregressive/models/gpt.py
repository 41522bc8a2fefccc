"""The Llama-architecture transformer over image tokens, and the table of its sizes.

    model = GPT_models["GPT-B"](block_size=256)              # 16x16 tokens
    logits = model(tokens[:, : -model.layout.step_tokens], labels)       # (B, N, vocab_size)

Nothing here knows of sampling, files or training, nor of any order or condition by name. The model reads tokens in the
order of its `layout` (layouts/): `tokens = codes[:, model.layout.order]`, or in that of another layout it is given.
LlamaGen (arXiv 2406.06525, section 2.2); Llama (2302.13971); special tokens and groups: PAR (2412.15119); patches: NPP
(2412.15321).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.conditions import CONDITIONS, Condition
from autoregressive.models.kv_cache import StaticCache, widened
from autoregressive.models.layouts import Holds, Layout, build_layout
from autoregressive.models.machine import attention_bias
from autoregressive.models.on_cpu import attend_on_cpu
from autoregressive.models.rope import apply_rope, rope_table_2d
from autoregressive.models.sizes import GPT_SIZES

Conditions = Tensor | Mapping[str, Tensor]
"""Values (B, …) of a model's conditions by name; a tensor is that of the model's first condition."""


@dataclass
class ModelArgs:
    """Shapes and regularisation of a model.

    model_type, num_classes, caption_dim, cls_token_num, spe_token_num and ar_token_num are the published way to say the
    first condition and the layout. layout: config of any other registered layout, {"name": …, and its settings}.
    extra_conditions: settings of further conditions by their registered names.
    """

    dim: int = 4096
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    token_dropout_p: float = 0.1
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    drop_path_rate: float = 0.0

    num_classes: int = 1000
    caption_dim: int = 2048
    class_dropout_prob: float = 0.1
    model_type: str = "c2i"

    vocab_size: int = 16384
    cls_token_num: int = 1
    block_size: int = 256
    spe_token_num: int = 0
    ar_token_num: int = 1

    layout: Mapping[str, Any] | None = None
    extra_conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def layout_config(self) -> Mapping[str, Any]:
        """Config of the layout."""
        published = (
            {"name": "raster"} if self.ar_token_num == 1 else {"name": "parallel", "group_size": self.ar_token_num}
        )
        return self.layout or published

    @property
    def conditions(self) -> dict[str, Mapping[str, Any]]:
        """Settings of every condition by name, the published one first."""
        if self.model_type == "c2i":
            first: dict[str, Any] = {"label": {"num_classes": self.num_classes}}
        else:
            first = {"caption": {"caption_dim": self.caption_dim, "tokens": self.cls_token_num}}
        return {**first, **self.extra_conditions}

    @property
    def blocks(self) -> int:
        """Blocks of the trunk: n_layer, and one more for a layout's second head."""
        return self.n_layer + build_layout(self.layout_config, isqrt(self.block_size)).heads - 1

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values: those of the queries unless they are fewer."""
        return self.n_kv_head or self.n_head

    def __post_init__(self) -> None:
        self.n_kv_head = self.kv_heads
        if self.model_type not in ("c2i", "t2i"):
            raise ValueError(f"model_type must be c2i or t2i, got {self.model_type!r}")
        if self.dim % self.n_head or self.n_head % self.kv_heads:
            raise ValueError(
                f"{self.n_head} heads must divide dim {self.dim} and be divided by {self.n_kv_head} kv heads"
            )
        if isqrt(self.block_size) ** 2 != self.block_size:
            raise ValueError(f"block_size is the number of tokens of a square grid, got {self.block_size}")
        if self.model_type == "c2i" and self.cls_token_num != 1:
            raise ValueError(f"a class takes one condition token, got --cls-token-num {self.cls_token_num}")
        if self.ar_token_num == 1 and self.spe_token_num:
            self.ar_token_num = self.spe_token_num + 1
        if self.spe_token_num == 0:
            self.spe_token_num = self.ar_token_num - 1
        if self.spe_token_num != self.ar_token_num - 1:
            raise ValueError(
                f"{self.ar_token_num} tokens at a time take {self.ar_token_num - 1} special tokens, "
                f"got --ar-token-num {self.ar_token_num} --spe-token-num {self.spe_token_num}"
            )

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the feed-forward layer."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of

    @property
    def identity(self) -> dict[str, Any]:
        """Entries `model`, `layout` and `conditions` of a file's config: all that from_identity builds the model from."""
        names = ("dim", "n_layer", "n_head", "n_kv_head", "ffn_dim", "vocab_size", "rope_base", "norm_eps")
        return {
            "model": {"trunk": "llama", **{name: getattr(self, name) for name in names}},
            "layout": {**self.layout_config, "grid_size": isqrt(self.block_size)},
            "conditions": {name: dict(settings) for name, settings in self.conditions.items()},
        }

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any]) -> "ModelArgs":
        """Return the arguments of the model that a config describes.

        Raises ValueError where its trunk, layout or a condition is not registered.
        """
        model, layout, conditions = (dict(identity[part]) for part in ("model", "layout", "conditions"))
        if (trunk := model.pop("trunk")) != "llama":
            raise ValueError(f"no trunk is called {trunk!r}; known is llama")
        for name in conditions:
            CONDITIONS[name]
        label, caption = conditions.pop("label", None), conditions.pop("caption", None)
        first = {"num_classes": label["num_classes"]} if label else {}
        if caption:
            first = {"caption_dim": caption["caption_dim"], "cls_token_num": caption["tokens"]}
        ffn_dim, grid_size = model.pop("ffn_dim"), layout.pop("grid_size")
        return cls(
            multiple_of=ffn_dim,  # the hidden width itself, whatever rule it came from
            ffn_dim_multiplier=ffn_dim / int(8 * model["dim"] / 3),
            block_size=grid_size**2,
            model_type="t2i" if caption else "c2i",
            ar_token_num=layout.get("group_size", 1) if layout["name"] == "parallel" else 1,
            layout=None if layout["name"] in ("raster", "parallel") else layout,
            extra_conditions=conditions,
            **model,
            **first,
        )


@dataclass(frozen=True)
class Rows:
    """Place of a pass's rows: the cache, `positions` in it, (s,) or (B, s), and the number of rows to attend to."""

    cache: StaticCache
    positions: Tensor
    length: int


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
        scale = self.head_dim**-0.5
        if rows is not None:
            k, v = rows.cache.update(layer, rows.positions, k, v, rows.length)
            q = widened(q, k.shape[-1])
        if rows is not None and q.device.type == "cpu":
            out = attend_on_cpu(q, k, v, mask, causal, scale)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=causal,
                dropout_p=self.attn_dropout_p if self.training else 0.0,
                scale=scale,
                enable_gqa=self.n_kv_head != self.n_head,
            )
        return self.resid_dropout(self.wo(out[..., : self.head_dim].transpose(1, 2).flatten(2)))


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


def draw_normal(tensor: Tensor, std: float) -> None:
    """Fills the tensor with draws from N(0, std²)."""
    tensor.normal_(0, std)


class Transformer(nn.Module):
    """A GPT over image tokens and what they are asked for.

    `layout` says in which order tokens are read and which of them one step predicts. Decoding always goes by it;
    training may read by another one. `file_config` is the record of what the weights belong to (utils/origin.py), where
    the file that they were read from has one.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.file_config: dict[str, Any] = {}
        self.args = self.config = args
        grid_size = isqrt(args.block_size)
        first, *others = (CONDITIONS[name](args.dim, grid_size, **own) for name, own in args.conditions.items())
        self.cls_embedding = first
        self.extra_conditions: nn.ModuleDict = nn.ModuleDict(dict(zip(args.extra_conditions, others)))
        prefix = sum(condition.rows for condition in self.conditions.values())
        self.layout = build_layout(args.layout_config, grid_size, prefix)
        per_token = [name for name, condition in self.conditions.items() if not condition.rows]
        if per_token and self.layout.heads > 1:
            raise ValueError(
                f"the layout {self.layout.name!r} predicts two tokens from a row, and {', '.join(per_token)} is added for one: "
                "give another --layout or leave the condition out"
            )
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.spe_tok_embeddings = SpecialTokens(self.layout.special, args.dim) if self.layout.special else None
        self.tok_dropout = nn.Dropout(args.token_dropout_p)
        rates = [args.drop_path_rate * layer / max(args.blocks - 1, 1) for layer in range(args.blocks)]
        self.layers = nn.ModuleList(TransformerBlock(args, layer, rate) for layer, rate in enumerate(rates))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if self.layout.heads > 1:
            self.medusa_norm = RMSNorm(args.dim, args.norm_eps)
            self.medusa_output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self._rope: dict[tuple[Layout, torch.device], Tensor] = {}
        self._reads: dict[tuple[Layout, int, torch.device], tuple[Tensor, Tensor]] = {}
        self.rope(torch.device("cpu"))
        self.reset_parameters()

    @property
    def exits(self) -> list[tuple[RMSNorm, nn.Linear]]:
        """Norm and output layer of each head; the second head's come one block later (NAR, arXiv 2503.10696, section 3)."""
        exits = [(self.norm, self.output)]
        if self.layout.heads > 1:
            exits.append((self.medusa_norm, self.medusa_output))
        return exits

    def of_second_exit(self, name: str) -> bool:
        """Tell whether a parameter is of the second head alone: the head, its norm and the block before it."""
        return name.startswith(("medusa_", f"layers.{self.args.n_layer}."))

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight (V, D) that turns the rows of `hidden` into logits, and its bias (V,) where there is one."""
        weights = [output.weight for _, output in self.exits]
        return (weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)), None

    @property
    def conditions(self) -> dict[str, Condition]:
        """Conditions by name, the one of a plain tensor first."""
        modules: tuple[Any, ...] = (self.cls_embedding, *self.extra_conditions.values())
        return dict(zip(self.args.conditions, modules))

    @torch.no_grad()
    def reset_parameters(self, normal: Callable[[Tensor, float], None] = draw_normal) -> None:
        """Gives every parameter and buffer its initial value: a model moved off the meta device is complete after it.

        N(0, initializer_range²) for linear and embedding weights, ones for norms, zeros for the output layer, and features
        of about unit length for "no caption".
        normal: fills a tensor with draws of a standard deviation; it makes every draw, in a fixed order.
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

    @property
    def num_parameters(self) -> int:
        """Trainable numbers in the model."""
        return sum(p.numel() for p in self.parameters())

    def rope(self, device: torch.device, layout: Layout | None = None) -> Tensor:
        """The rotary table of every row of a layout (the model's own), float32 (rows, head_dim/2, 2).

        Kept beside the parameters, not among them: it must stay float32 when the weights are cast, and is in no file.
        """
        layout = layout or self.layout
        if (layout, device) not in self._rope:
            with torch.inference_mode(False):  # kept for training too, whoever asks first
                table = rope_table_2d(layout.rope_grid, self.args.dim // self.args.n_head, self.args.rope_base)
                self._rope[layout, device] = layout.rope_rows(table).to(device)
        return self._rope[layout, device]

    def embed(self, tokens: Tensor, vectors: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """Embed the rows of a pass, (B, s, dim): tokens (B, s), or what stands in their place.

        vectors, queries: int64 (B, s), numbers of special vectors and the sequence positions of queries, -1 for tokens.
        """
        h = self.tok_embeddings(tokens)
        if vectors is not None:
            own = self.vectors(Holds.SPECIAL, slice(None)).to(h.dtype)[vectors.clamp(min=0)]
            h = torch.where(vectors[..., None] >= 0, own, h)
        if queries is not None:
            own = self.queries(queries.clamp(min=0).flatten()).to(h.dtype).view_as(h)
            h = torch.where(queries[..., None] >= 0, own, h)
        return h

    def vectors(self, holds: Holds, numbers: slice) -> Tensor:
        """Return the model's own vectors of some rows, (rows, dim)."""
        if holds is Holds.SPECIAL:
            assert self.spe_tok_embeddings is not None
            return self.spe_tok_embeddings()[numbers]
        return self.queries(torch.arange(numbers.start, numbers.stop, device=self.tok_embeddings.weight.device))

    def queries(self, positions: Tensor) -> Tensor:
        """Return the query vectors for sequence positions (Q,), (Q, dim). A Llama trunk has none."""
        raise NotImplementedError(
            f"the layout {self.layout.name!r} has query rows, for which this trunk has no vectors"
        )

    def as_conditions(self, cond: Conditions) -> dict[str, Tensor]:
        """Return the values by condition name. Raises ValueError where a condition is missing or unknown."""
        given = self.by_name(cond)
        if set(given) != set(self.conditions):
            asked, known = (", ".join(names) or "none" for names in (given, self.conditions))
            raise ValueError(f"the model takes the conditions {known}; given were {asked}")
        return {name: given[name] for name in self.conditions}

    def by_name(self, cond: Conditions) -> Mapping[str, Tensor]:
        """Return the values given, by condition name."""
        return cond if isinstance(cond, Mapping) else {next(iter(self.conditions)): cond}

    def check_conditions(self, cond: Conditions) -> None:
        """Raise ValueError where a condition is not the model's, or of another number of samples than the others."""
        values = self.as_conditions(cond)
        for name, value in values.items():
            self.conditions[name].check(value)
        if len(counts := {len(value) for value in values.values()}) > 1:
            raise ValueError(f"conditions are of one number of samples, got {sorted(counts)}")

    def check_negatives(self, negative: Conditions, cond: Conditions) -> None:
        """Raise ValueError where a negative condition is not the model's, or there is not one for each of the samples."""
        samples = self.as_conditions(cond)
        for name, value in self.by_name(negative).items():
            self.conditions[name].check_negative(value)
            if len(value) != len(samples[name]):
                raise ValueError(f"{len(value)} negative conditions for {len(samples[name])} images: give one for each")

    def embed_conditions(self, cond: Conditions, drop: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Embed the conditions: the rows before the tokens (B, prefix, dim), and what is added per token or None.

        cond: values by name, (B, …) each. drop: bool (B,), whose conditions are dropped; drawn here in training where not
        given. The second is (B, N, dim) in raster order.
        """
        values = self.as_conditions(cond)
        first = next(iter(values.values()))
        if drop is None and self.training and self.args.class_dropout_prob > 0:
            drop = torch.rand(len(first), device=first.device) < self.args.class_dropout_prob
        rows, added = [], []
        for name, condition in self.conditions.items():
            (rows if condition.rows else added).append(condition(values[name], drop))
        return torch.cat(rows, dim=1), sum(added[1:], added[0]) if added else None

    def attention_mask(
        self, rows: int, prefix_mask: Tensor | None, device: torch.device, layout: Layout | None = None
    ) -> Tensor | None:
        """Return which of the first `rows` rows of a layout (the model's own) sees which; None where plainly causal.

        prefix_mask: (B, T), nonzero where the condition row is real. Padded rows are seen by none but themselves.
        Returns bool, (rows, rows) or (B, 1, rows, rows).
        """
        layout = layout or self.layout
        mask = layout.mask(rows, device)
        if prefix_mask is None:
            return mask
        if mask is None:
            mask = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
        seen = F.pad(prefix_mask.to(device, torch.bool), (0, rows - layout.prefix), value=True)  # (B, rows)
        return (mask & seen[:, None, None, :]) | torch.eye(rows, dtype=torch.bool, device=device)

    def hidden(
        self,
        idx: Tensor,
        cond_idx: Conditions,
        *,
        layout: Layout | None = None,
        drop: Tensor | None = None,
        prefix_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the rows that `projection` turns into logits, (B, tokens, D), normalised. Arguments as `forward` takes them.

        With two heads, D is twice the width: side by side the states that each head reads, times its share of the mean.
        """
        layout = layout or self.layout
        conditions, added = self.embed_conditions(cond_idx, drop)
        tokens = self.tok_embeddings(idx)
        if layout.patch_tokens > 1:
            tokens = tokens.unflatten(1, (-1, layout.patch_tokens)).mean(2)  # (B, L / patch_tokens, dim)
        rows = layout.fed(idx.shape[1])
        parts = [tokens[:, :0]]  # the embedding has a gradient, of zeros, also where no token is read
        for holds, numbers in layout.runs(rows):
            if holds is Holds.CONDITION:
                parts.append(conditions[:, numbers])
            elif holds is Holds.TOKEN:
                parts.append(tokens[:, numbers])
            else:
                parts.append(self.vectors(holds, numbers).expand(len(tokens), -1, -1))
        h = torch.cat([part.to(tokens.dtype) for part in parts], dim=1)  # (B, rows, dim)
        reads = layout.read_rows(rows)
        if added is not None:
            h = h + self.added_to_rows(added, layout, reads, rows).to(h.dtype)
        h = self.tok_dropout(h)
        mask = self.attention_mask(rows, prefix_mask, h.device, layout)
        if mask is not None:
            device = h.device.type
            mask = attention_bias(
                mask, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
            )
        rope = self.rope(h.device, layout)[:rows]
        exits = self.run(h, rope, mask, mask is None)
        if len(exits) == 1:
            return self.norm(exits[0][:, reads])
        parts = zip(self.exits, exits, *self.reads(layout, rows, h.device), strict=True)
        return torch.cat([norm(x[:, read]) * share.to(x.dtype) for (norm, _), x, read, share in parts], dim=-1)

    def run(self, h: Tensor, rope: Tensor, mask: Tensor | None, causal: bool, rows: Rows | None = None) -> list[Tensor]:
        """Run rows h (B, s, dim) through the blocks. Returns the states (B, s, dim) that each head reads."""
        exits = []
        for number, layer in enumerate(self.layers, start=1):
            h = layer(h, rope, mask, causal, rows)
            if number >= self.args.n_layer:
                exits.append(h)
        return exits

    def reads(self, layout: Layout, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rows that each head reads, int64 (heads, tokens), and its shares of the means, (heads, tokens, 1)."""
        key = layout, rows, device
        if key not in self._reads:
            with torch.inference_mode(False):  # kept for training too, whoever asks first
                heads = len(self.exits)
                every = torch.arange(rows, device="cpu")
                read = torch.stack([every[layout.read_rows(rows, head)] for head in range(heads)])
                self._reads[key] = read.to(device), layout.shares(rows, heads).t()[..., None].to(device)
        return self._reads[key]

    def added_to_rows(self, added: Tensor, layout: Layout, reads: slice | list[int], rows: int) -> Tensor:
        """Put what is added per token (B, N, dim, raster order) at the rows that predict the tokens. Returns (B, rows, dim)."""
        units = added[:, layout.order.to(added.device)].unflatten(1, (-1, layout.patch_tokens)).mean(2)
        at = torch.arange(rows, device=added.device)[reads]
        return added.new_zeros(len(added), rows, added.shape[-1]).index_add(1, at, units[:, : len(at)])

    def forward(
        self,
        idx: Tensor,
        cond_idx: Conditions,
        *,
        layout: Layout | None = None,
        drop: Tensor | None = None,
        prefix_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of every next token, for training and scoring.

        Args:
            idx: int64 (B, L), tokens in the layout's order, without the last group or patch (L = N - step_tokens), or fewer
                whole groups or patches, or some of the first tokens.
            cond_idx: values of the conditions by name, or of the first one: int64 (B,) labels, (B, T, caption_dim) features.
            layout: the order that the tokens are in, of the model's grid and prefix (its own where not given).
            drop: bool (B,), whose conditions are dropped (drawn by the model in training where not given).
            prefix_mask: (B, T), which condition rows are real.

        Returns:
            float32 (B, tokens, vocab_size); output i predicts token i of the layout's order. With patches there is one
            output a patch, which predicts each of its tokens (NPP, arXiv 2412.15321, section 3).
        """
        hidden = self.hidden(idx, cond_idx, layout=layout, drop=drop, prefix_mask=prefix_mask)
        return F.linear(hidden, *self.projection()).float()

    def decode(self, h: Tensor, rows: Rows, mask: Tensor | None, causal: bool) -> Tensor:
        """Run new rows h (B, s, dim) over the cache. Returns the states that `head` takes, (B, s, heads * dim)."""
        rope = self.rope(h.device)
        rope = rope[rows.positions.clamp(max=len(rope) - 1)]  # past the last one stands what is past an image's end
        exits = self.run(h, rope, mask, causal, rows)
        return exits[0] if len(exits) == 1 else torch.cat(exits, dim=-1)

    def head(self, h: Tensor, reads: Tensor | None = None) -> Tensor:
        """Project states (B, s, heads * dim) to float32 logits (B, tokens, vocab_size), each the mean of a token's readers.

        reads: int64 (B, tokens, readers, 2), the row and head of each token's readers, of which a head is one (or several
        equal ones); None where token i is read from row i.
        """
        if len(self.exits) == 1:
            if reads is not None:
                h = h.gather(1, reads[:, :, 0, :1].expand(-1, -1, h.shape[-1]))
            return self.output(self.norm(h)).float()
        assert reads is not None, "with two heads a token has its readers"
        parts = []
        for head, ((norm, output), state) in enumerate(zip(self.exits, h.chunk(len(self.exits), dim=-1), strict=True)):
            own = reads[..., 1] == head  # (B, tokens, readers)
            row = (reads[..., 0] * own).amax(-1, keepdim=True)
            logits = output(norm(state.gather(1, row.expand(-1, -1, state.shape[-1])))).float()
            parts.append(logits * own.float().mean(-1, keepdim=True))
        return sum(parts[1:], parts[0])


def build_gpt(name: str, **overrides) -> Transformer:
    """A model of a size in the table, with any field of ModelArgs overridden."""
    n_layer, n_head, dim = GPT_SIZES[name]
    fields: dict[str, Any] = {"n_layer": n_layer, "n_head": n_head, "dim": dim, **overrides}
    return Transformer(ModelArgs(**fields))


GPT_models: dict[str, Callable[..., Transformer]] = {name: partial(build_gpt, name) for name in GPT_SIZES}
