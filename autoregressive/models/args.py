"""Shapes of a model, from its flags or from the record in its file.

The trunks that are built from them are registered by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import TYPE_CHECKING, Any

from autoregressive.models.conditions import CONDITIONS
from autoregressive.models.layouts import build_layout
from utils.registry import Registry

if TYPE_CHECKING:
    from autoregressive.models.trunk import Trunk

FILES = {"llama": "gpt", "rar": "rar", "lpd": "lpd"}
TRUNKS: Registry["type[Trunk]"] = Registry("trunk", {name: f"{__package__}.{file}" for name, file in FILES.items()})


@dataclass
class ModelArgs:
    """Shapes and regularisation of a model.

    model_type, num_classes, caption_dim, cls_token_num, spe_token_num and ar_token_num are the published way to say the
    first condition and the layout.
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

    trunk: str = "llama"  # registered name of the model's class
    target_positions: bool = False  # a llama embeds the place of the token that a row predicts, for samples' own orders
    # Of the feed-forward layer, in place of the rule of multiple_of and ffn_dim_multiplier.
    ffn_width: int | None = None
    # Tokens a side of the grid whose rotary table a llama reads by a token's number, where that is not the image's (ControlAR).
    rope_grid: int | None = None
    exit_blocks: int | None = None  # behind the first head, that lead to a layout's second one, by default 1
    layout: Mapping[str, Any] | None = None  # config of any other registered layout, {"name": …, and its settings}
    extra_conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # settings of further ones by name

    @property
    def layout_config(self) -> Mapping[str, Any]:
        """Config of the layout."""
        if self.layout or self.ar_token_num == 1:
            return self.layout or {"name": TRUNKS[self.trunk].default_layout}
        return {"name": "parallel", "group_size": self.ar_token_num}

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
        """Blocks of the trunk: n_layer, and behind them those of a layout's second head."""
        two_heads = build_layout(self.layout_config, isqrt(self.block_size)).heads > 1
        return self.n_layer + two_heads * (self.exit_blocks or 1)

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
        if self.ar_token_num == 1:
            self.ar_token_num = self.spe_token_num + 1
        self.spe_token_num = self.spe_token_num or self.ar_token_num - 1
        if self.spe_token_num != self.ar_token_num - 1:
            raise ValueError(
                f"{self.ar_token_num} tokens at a time take {self.ar_token_num - 1} special tokens, "
                f"got --ar-token-num {self.ar_token_num} --spe-token-num {self.spe_token_num}"
            )

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the feed-forward layer."""
        if self.ffn_width is not None:
            return self.ffn_width
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return -(-hidden // self.multiple_of) * self.multiple_of

    @property
    def identity(self) -> dict[str, Any]:
        """Entries `model`, `layout` and `conditions` of a file's config: all that from_identity builds the model from."""
        shapes = ("trunk", "dim", "n_layer", "n_head", "n_kv_head", "ffn_dim", "vocab_size")
        numbers = {name: getattr(self, name) for name in (*shapes, *TRUNKS[self.trunk].settings)}
        return {
            "model": {name: value for name, value in numbers.items() if value is not False and value is not None},
            "layout": {**self.layout_config, "grid_size": isqrt(self.block_size)},
            "conditions": {name: dict(settings) for name, settings in self.conditions.items()},
        }

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any]) -> "ModelArgs":
        """Return the arguments of the model that a config describes. Raises ValueError where a condition is not registered."""
        model, layout, conditions = (dict(identity[part]) for part in ("model", "layout", "conditions"))
        for name in conditions:
            CONDITIONS[name]
        label, caption = conditions.pop("label", None), conditions.pop("caption", None)
        first = {"num_classes": label["num_classes"]} if label else {}
        if caption:
            first = {"caption_dim": caption["caption_dim"], "cls_token_num": caption["tokens"]}
        ffn_dim, grid_size = model.pop("ffn_dim"), layout.pop("grid_size")
        return cls(
            ffn_width=ffn_dim,
            block_size=grid_size**2,
            model_type="t2i" if caption else "c2i",
            ar_token_num=layout.get("group_size", 1) if layout["name"] == "parallel" else 1,
            layout=None if layout["name"] in ("raster", "parallel") else layout,
            extra_conditions=conditions,
            **model,
            **first,
        )
