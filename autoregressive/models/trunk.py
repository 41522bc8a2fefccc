"""Interface of trunks: what decoding, training and serving ask of a model, and what all models share.

    @register_trunk("rar")
    class RAR(Trunk): ...                                    # one file a model; its parameter names are the published ones

    model = build_model(ModelArgs(trunk="rar", …))           # build.py

Nothing here knows of sampling, files or training, nor of any order or condition by name. A model reads tokens in the
order of its `layout` (layouts/): `tokens = codes[:, model.layout.order]`, or in that of another layout it is given.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.args import TRUNKS, ModelArgs
from autoregressive.models.conditions import CONDITIONS, Condition
from autoregressive.models.kv_cache import StaticCache, widened
from autoregressive.models.layouts import Holds, Layout, build_layout
from autoregressive.models.machine import attention_bias
from autoregressive.models.on_cpu import attend_on_cpu

Conditions = Tensor | Mapping[str, Tensor]
"""Values (B, …) of a model's conditions by name; a tensor is that of the model's first condition."""

EMBEDDING = -1
"""Number of the block before which conditions are added to the embeddings of the rows, ahead of their dropout."""


register_trunk = TRUNKS.register


@dataclass(frozen=True)
class Rows:
    """Places of a pass's rows."""

    cache: StaticCache | None  # of earlier rows; None in training, where the rows are the whole sequence
    positions: Tensor  # int64 (s,) or (B, s), the places of the rows in the cache
    length: int  # rows of the cache to attend to
    layout: Layout | None = None  # of the call; None for the model's own
    orders: Tensor | None = None  # int64 (B, N), raster indices by sequence position; None for the layout's order
    context: Tensor | None = None  # (B, dim), what Trunk.context made of the conditions
    added: Mapping[int, Tensor] | None = None  # (B, s, dim) by block, what conditions add to the rows before it


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    layer: int,
    rows: Rows | None,
    dropout: float = 0,
) -> Tensor:
    """Attention of the rows of a pass, in training or over a layer's cache, (B, s, H * D).

    q, k, v: (B, H, s, D), (B, KV, s, D) twice; of earlier rows the cache has the others.
    dropout: probability with which a weight is left out.
    """
    head_dim, grouped, on_cpu = q.shape[-1], q.shape[1] != k.shape[1], False
    if rows is not None and rows.cache is not None:
        k, v = rows.cache.update(layer, rows.positions, k, v, rows.length)
        q, on_cpu = widened(q, k.shape[-1]), q.device.type == "cpu"
    scale = head_dim**-0.5
    if on_cpu:
        out = attend_on_cpu(q, k, v, mask, causal, scale)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )
    return out[..., :head_dim].transpose(1, 2).flatten(2)


def draw_normal(tensor: Tensor, std: float) -> None:
    """Fills the tensor with draws from N(0, std²)."""
    tensor.normal_(0, std)


class Trunk(nn.Module):
    """A GPT over image tokens and what they are asked for. Subclasses give the parts below and `decode`.

    `layout` says in which order tokens are read and which of them one step predicts. Decoding always goes by it;
    training may read by another one. `file_config` is the record of what the weights belong to (utils/origin.py), where
    the file that they were read from has one. first: the first condition, where it is not the registered one of its name.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    """Fields of ModelArgs that belong to a file's record of the trunk, beside its shapes."""

    has_context: ClassVar[bool] = False
    """Tell whether later rows need something of the conditions beside keys and values, as `context` returns it."""

    default_layout: ClassVar[str] = "raster"
    """Name of the layout where none is given."""

    resizes: ClassVar[bool] = False
    """Tell whether `resized` fits weights to another image size."""

    most_heads: ClassVar[int] = 1
    """Heads that a layout may have its tokens read by."""

    adds_before_blocks: ClassVar[bool] = False
    """Tell whether `decode` adds what Rows.added has."""

    any_order = False
    """Tell whether the model reads tokens in orders that differ from sample to sample."""

    added_at: list[int]
    """Blocks before which conditions are added to rows, in order; EMBEDDING for the embeddings of the rows."""
    layers: Any
    """Blocks, an nn.ModuleList: what is compiled, sharded and recomputed one by one."""
    tok_embeddings: Any
    """Embedding of the codes; its device and dtype are the model's."""
    norm: Any
    """Norm of the hidden states that logits are projected from."""
    output: Any
    """Linear layer of the logits."""

    def __init__(self, args: ModelArgs, first: Condition | None = None):
        super().__init__()
        self.file_config: dict[str, Any] = {}
        self.args = self.config = args
        grid_size = isqrt(args.block_size)
        own, *others = args.conditions.items()
        self.cls_embedding = first or CONDITIONS.build(own[0], args.dim, grid_size, **own[1])
        self.extra_conditions: nn.ModuleDict = nn.ModuleDict(
            {name: CONDITIONS.build(name, args.dim, grid_size, **settings) for name, settings in others}
        )
        added = [condition for condition in self.conditions.values() if not condition.rows]
        for condition in added:
            condition.place(args.n_layer)
        self.added_at = sorted({block for condition in added for block in condition.blocks or (EMBEDDING,)})
        if self.added_at not in ([], [EMBEDDING]) and not self.adds_before_blocks:
            raise ValueError(
                f"the trunk {args.trunk!r} has no conditions that are added before its blocks: give a --gpt-model of another "
                "trunk"
            )
        prefix = sum(condition.rows for condition in self.conditions.values())
        self.layout = build_layout(args.layout_config, grid_size, prefix)
        if self.layout.patch_side > 1:
            raise ValueError(
                f"the layout {self.layout.name!r} is of steps of training alone: give --patch-level 2 or more"
            )
        for needs, lacks, has in (
            (f"tokens read by {self.layout.heads} heads", self.layout.heads > self.most_heads, self.most_heads),
            ("tokens read from queries", self.layout.queries and type(self).queries is Trunk.queries, "none"),
            ("special tokens", self.layout.special and type(self).special is Trunk.special, "none"),
        ):
            if lacks:
                raise ValueError(
                    f"the layout {self.layout.name!r} has {needs}, and the trunk {args.trunk!r} has {has}: give another --layout "
                    "(or --ar-token-num 1), or a --gpt-model of another trunk"
                )
        self.tok_dropout = nn.Dropout(args.token_dropout_p)
        self._made: dict[tuple, Any] = {}

    # A trunk overrides from here …

    def reset_parameters(self, normal: Callable[[Tensor, float], None] = draw_normal) -> None:
        """Gives every parameter and buffer its initial value: a model moved off the meta device is complete after it.

        normal: fills a tensor with draws of a standard deviation; it makes every draw, in a fixed order.
        """
        raise NotImplementedError

    def decode(self, h: Tensor, rows: Rows, mask: Tensor | None, causal: bool) -> Tensor:
        """Runs rows h (B, s, dim) over the cache, or in training over themselves.

        Returns their last hidden states (B, s, dim), before `norm`.
        """
        raise NotImplementedError

    def embed_condition(self, name: str, value: Tensor, drop: Tensor | None) -> Tensor:
        """Embed the values of one condition, dropped where `drop`, bool (B,), says so; as Condition.forward."""
        return self.conditions[name](value, drop)

    def context(self, conditions: Tensor) -> Tensor | None:
        """Return what every later row needs of the condition rows (B, prefix, dim), (B, dim); None for nothing."""
        return None

    def special(self) -> Tensor:
        """Return the special vectors, (layout.special, dim). A trunk for layouts with such rows has some."""
        raise NotImplementedError

    def queries(self, positions: Tensor) -> Tensor:
        """Return the query vectors for sequence positions (Q,), (Q, dim). A trunk for layouts with queries has some."""
        raise NotImplementedError

    def of_second_exit(self, name: str) -> str | None:
        """Return the first head's parameter that one of the second head corresponds to; None for any other parameter."""
        return None

    @property
    def activations(self) -> list[tuple[Callable[[Tensor], Tensor], int]]:
        """Activation functions of the blocks and the width of the rows that each works on."""
        return [(F.gelu, self.args.ffn_dim)]

    def resized(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a state dict with tables of places made for the model's grid, where they are for another one."""
        return state

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Tell whether weight decay takes hold of a parameter."""
        return parameter.dim() >= 2

    # … to here.

    @property
    def conditions(self) -> dict[str, Condition]:
        """Conditions by name, the one of a plain tensor first."""
        modules: tuple[Any, ...] = (self.cls_embedding, *self.extra_conditions.values())
        return dict(zip(self.args.conditions, modules))

    @property
    def num_parameters(self) -> int:
        """Trainable numbers in the model."""
        return sum(p.numel() for p in self.parameters())

    @property
    def exits(self) -> list[tuple[Any, nn.Linear]]:
        """Norm and output layer of each head."""
        return [(self.norm, self.output)]

    def read(self, h: Tensor, layout: Layout, rows: int) -> Tensor:
        """Return what logits are projected from, (B, tokens, D), of the last states of the first `rows` rows."""
        return self.norm(h[:, layout.read_rows(rows)])

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight (V, D) that turns the rows of `hidden` into logits, and its bias (V,) where there is one."""
        return self.output.weight, self.output.bias

    def embed(self, tokens: Tensor, vectors: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """Embed the rows of a pass, (B, s, dim): tokens (B, s), or what stands in their place.

        vectors, queries: int64 (B, s), numbers of special vectors and the sequence positions of queries, -1 for tokens.
        """
        h = self.tok_embeddings(tokens)
        if vectors is not None:
            own = self.special().to(h.dtype)[vectors.clamp(min=0)]
            h = torch.where(vectors[..., None] >= 0, own, h)
        if queries is not None:
            own = self.queries(queries.clamp(min=0).flatten()).to(h.dtype).view_as(h)
            h = torch.where(queries[..., None] >= 0, own, h)
        return h

    def cells(self, rows: Rows) -> Tensor:
        """Return raster indices for the rows of a pass: of the cell where each stands, and of the token that it predicts.

        Returns int64 (s, 2) or (B, s, 2), -1 for none.
        """
        layout, device = rows.layout or self.layout, rows.positions.device

        def made() -> tuple[Tensor, Tensor]:
            tokens = layout.tokens_at
            return tokens.to(device), torch.where(tokens >= 0, layout.order[tokens], -1).to(device)

        tokens, cells = self.made_once(("places", layout, device), made)
        at = rows.positions.clamp(max=len(tokens) - 1)  # past the last one stands what is past an image's end
        if rows.orders is None:
            return cells[at]
        tokens = tokens[at].expand(len(rows.orders), -1, -1)
        cells = rows.orders.gather(1, tokens.clamp(min=0).flatten(1)).view_as(tokens)
        return torch.where(tokens >= 0, cells, -1)

    def layout_order(self, layout: Layout, device: torch.device) -> Tensor:
        """Return the order of a layout on a device."""
        return self.made_once(("order", layout, device), lambda: layout.order.to(device))

    def made_once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """Return what `make` returns, made once for each key. It is in no file, and keeps its dtype when weights are cast."""
        if key not in self._made:
            with torch.inference_mode(False):  # kept for training too, whoever asks first
                self._made[key] = make()
        return self._made[key]

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

    def check_conditions(self, cond: Conditions, negative: Conditions | None = None) -> None:
        """Raise ValueError where a condition or a negative is not the model's, or not of one number of samples."""
        values = self.as_conditions(cond)
        for name, value in values.items():
            self.conditions[name].check(value)
        if len(counts := {len(value) for value in values.values()}) > 1:
            raise ValueError(f"conditions are of one number of samples, got {sorted(counts)}")
        for name, value in ({} if negative is None else self.by_name(negative)).items():
            self.conditions[name].check_negative(value)
            if len(value) != len(values[name]):
                raise ValueError(f"{len(value)} negative conditions for {len(values[name])} images: give one for each")

    def as_orders(self, orders: Tensor, batch: int) -> Tensor | None:
        """Return the orders of a call on the model's device, int64 (batch, N); None where all are the layout's.

        Raises ValueError for what are no orders of the image's tokens, or where the model knows the layout's order alone.
        """
        tokens = self.layout.tokens
        each = torch.arange(tokens, device=orders.device)
        if orders.shape != (batch, tokens) or orders.is_floating_point() or not (orders.sort(1).values == each).all():
            raise ValueError(
                f"orders are whole numbers of shape ({batch}, {tokens}), each row with all of 0 to {tokens - 1}; got "
                f"{orders.dtype} of shape {tuple(orders.shape)}"
            )
        if (orders == self.layout.order.to(orders.device)).all():
            return None
        if not self.any_order:
            raise ValueError(f"the model knows the order of its layout {self.layout.name!r} alone; leave `orders` out")
        return orders.to(self.tok_embeddings.weight.device, torch.long)

    def embed_conditions(self, cond: Conditions, drop: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Embed the conditions: the rows before the tokens (B, prefix, dim), and what is added per token or None.

        cond: values by name, (B, …) each. drop: bool (B,), whose conditions are dropped; drawn here in training where not
        given. The second is (B, N, added_width) in raster order, see `split_added`.
        """
        values = self.as_conditions(cond)
        first = next(iter(values.values()))
        if drop is None and self.training and self.args.class_dropout_prob > 0:
            drop = torch.rand(len(first), device=first.device) < self.args.class_dropout_prob
        rows: list[Tensor] = []
        added: dict[int, Tensor] = {}
        for name, condition in self.conditions.items():
            embedded = self.embed_condition(name, values[name], drop)
            if condition.rows:
                rows.append(embedded)
                continue
            for block, part in zip(condition.blocks or (EMBEDDING,), embedded.split(self.args.dim, -1), strict=True):
                added[block] = added[block] + part if block in added else part
        return torch.cat(rows, dim=1), torch.cat([added[block] for block in self.added_at], -1) if added else None

    @property
    def added_width(self) -> int:
        """Numbers that conditions add per token, dim for each of `added_at`."""
        return len(self.added_at) * self.args.dim

    def split_added(self, h: Tensor, added: Tensor | None) -> tuple[Tensor, dict[int, Tensor] | None]:
        """Add to embedded rows h (B, s, dim) what belongs there of (B, s, added_width).

        Returns the rows, and what is added before each block, by its number; None for nothing.
        """
        if added is None:
            return h, None
        parts = dict(zip(self.added_at, added.to(h.dtype).split(self.args.dim, -1)))
        first = parts.pop(EMBEDDING, None)
        return h if first is None else h + first, parts or None

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
        orders: Tensor | None = None,
        drop: Tensor | None = None,
        prefix_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the rows that `projection` turns into logits, (B, tokens, D), normalised. Arguments as `forward` takes them."""
        layout = layout or self.layout
        conditions, added = self.embed_conditions(cond_idx, drop)
        tokens = self.tok_embeddings(idx)
        if layout.patch_tokens > 1:
            tokens = tokens.unflatten(1, (-1, layout.patch_tokens)).mean(2)  # (B, L / patch_tokens, dim)
        rows = layout.fed(idx.shape[1])
        own = {}
        if layout.special:
            own[Holds.SPECIAL] = self.special()
        if layout.queries:
            own[Holds.QUERY] = self.queries(torch.arange(layout.units, device=idx.device))
        sources = {Holds.CONDITION: conditions, Holds.TOKEN: tokens}
        sources |= {holds: vectors.expand(len(tokens), -1, -1) for holds, vectors in own.items()}
        h = torch.cat([source.to(tokens.dtype) for source in sources.values()], dim=1)
        starts = dict(zip(sources, accumulate((source.shape[1] for source in sources.values()), initial=0)))
        places = [starts[holds] + number for holds, number in layout.content[:rows]]
        if places != list(range(h.shape[1])):
            h = h[:, places]  # (B, rows, dim)
        reads = layout.read_rows(rows)
        if added is not None:
            added = self.added_to_rows(added, layout, orders, reads, rows)
        h, before_blocks = self.split_added(h, added)
        h = self.tok_dropout(h)
        mask = self.attention_mask(rows, prefix_mask, h.device, layout)
        if mask is not None:
            device = h.device.type
            autocast = torch.is_autocast_enabled(device)
            mask = attention_bias(mask, torch.get_autocast_dtype(device) if autocast else h.dtype)
        positions = torch.arange(rows, device=h.device)
        if not all(layout.kept[:rows]):
            positions = torch.tensor(layout.cache_places[:rows], device=h.device)
        whole = Rows(None, positions, rows, layout, orders, self.context(conditions), before_blocks)
        return self.read(self.decode(h, whole, mask, causal=mask is None), layout, rows)

    def added_to_rows(
        self, added: Tensor, layout: Layout, orders: Tensor | None, reads: slice | list[int], rows: int
    ) -> Tensor:
        """Put what is added per token (B, N, width, raster order) at the rows that predict the tokens. Returns (B, rows, width)."""
        if orders is None:
            added = added[:, self.layout_order(layout, added.device)[: added.shape[1]]]
        else:
            added = added.gather(1, orders[..., None].expand_as(added))
        units = added.unflatten(1, (-1, layout.patch_tokens)).mean(2)
        at = torch.arange(rows, device=added.device)[reads]
        return added.new_zeros(len(added), rows, added.shape[-1]).index_add(1, at, units[:, : len(at)])

    def forward(
        self,
        idx: Tensor,
        cond_idx: Conditions,
        *,
        layout: Layout | None = None,
        orders: Tensor | None = None,
        drop: Tensor | None = None,
        prefix_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of every next token, for training and scoring.

        idx: int64 (B, L), tokens in the layout's order, without the last group or patch (L = N - step_tokens), or fewer whole
        groups or patches, or some of the first tokens.
        cond_idx: values of the conditions by name, or of the first one: int64 (B,) labels, (B, T, caption_dim) features.
        layout: the order that the tokens are in, of the model's grid and prefix (its own where not given).
        orders: int64 (B, N), the raster index at each sequence position of each sample, where these are not the layout's.
        drop: bool (B,), whose conditions are dropped (drawn by the model in training where not given).
        prefix_mask: (B, T), which condition rows are real.
        Returns float32 (B, tokens, vocab_size); output i predicts token i of the layout's order. With patches there is one
        output a patch, which predicts each of its tokens (NPP, arXiv 2412.15321, section 3).
        """
        hidden = self.hidden(idx, cond_idx, layout=layout, orders=orders, drop=drop, prefix_mask=prefix_mask)
        return F.linear(hidden, *self.projection()).float()

    def logits(self, h: Tensor, reads: Tensor | None = None) -> Tensor:
        """Project hidden states (B, s, dim) to float32 logits (B, tokens, vocab_size): the final norm, then the output layer.

        reads: int64 (B, tokens, readers, 2), the row and head of each token's readers; None where
        token i is read from row i.
        """
        if reads is not None:
            assert reads.shape[2] == 1, "this trunk has one head"
            h = h.gather(1, reads[:, :, 0, :1].expand(-1, -1, h.shape[-1]))
        return self.output(self.norm(h)).float()
