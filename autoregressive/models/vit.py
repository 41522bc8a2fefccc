"""Parts of LayerNorm transformers, by the names that timm gives them: RAR and LPD are made of these."""

from typing import Any, ClassVar

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.conditions.label import Label
from autoregressive.models.trunk import ModelArgs, Rows, Trunk, attend

EPS = 1e-6


class Attention(nn.Module):
    """Attention with one fused projection with biases, and resid_dropout_p behind it.

    qk_norm: whether queries and keys are normalised, over each head's channels. dropout: of attention weights.
    """

    def __init__(self, args: ModelArgs, layer: int, qk_norm: bool = False, dropout: float = 0.0):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, args.n_head, dropout
        head_dim = args.dim // args.n_head
        self.qkv = nn.Linear(args.dim, 3 * args.dim)
        self.q_norm = nn.LayerNorm(head_dim, EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(args.dim, args.dim)
        self.proj_drop = nn.Dropout(args.resid_dropout_p)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool, rows: Rows | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)  # (B, H, s, D) each
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out = attend(q, k, v, mask, causal, self.layer, rows, self.dropout if self.training else 0.0)
        return self.proj_drop(self.proj(out))


class Mlp(nn.Module):
    """Feed-forward layer fc2(gelu(fc1(x))), the exact form of gelu, with biases; dropout behind both."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.fc1 = nn.Linear(args.dim, args.ffn_dim)
        self.fc2 = nn.Linear(args.ffn_dim, args.dim)
        self.dropout = nn.Dropout(args.ffn_dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class LayerNormTrunk(Trunk):
    """A trunk of LayerNorm blocks and one class, without dropout of tokens.

    Raises ValueError for what the published architectures do not have.
    """

    called: ClassVar[str]
    """Name of the architecture in errors."""
    class_rows: ClassVar[int] = 1
    """Rows before the tokens, which the trunk makes of a class."""
    codes_name: ClassVar[str]
    head_name: ClassVar[str]
    """Published names of the embedding of the codes and of the output layer."""

    def __init__(self, args: ModelArgs):
        if args.model_type != "c2i":
            raise ValueError(f"{self.called} is of classes: give --gpt-type c2i, or another --gpt-model")
        if args.drop_path_rate:
            raise ValueError(
                f"{self.called} has no stochastic depth: leave out --drop-path-rate {args.drop_path_rate:g}"
            )
        if args.kv_heads != args.n_head:
            raise ValueError(f"{self.called} has as many kv heads as heads, got {args.kv_heads} for {args.n_head}")
        super().__init__(args, Label(args.num_classes, rows=self.class_rows))
        if self.layout.prefix != self.class_rows:
            raise ValueError(
                f"{self.called} has the rows of one class before its tokens; leave out the --condition with rows"
            )
        self.tok_dropout.p = 0.0

    @property
    def layers(self) -> Any:  # pyrefly: ignore[bad-override]
        return self.blocks

    @property
    def tok_embeddings(self) -> Any:  # pyrefly: ignore[bad-override]
        return getattr(self, self.codes_name)

    @property
    def output(self) -> Any:  # pyrefly: ignore[bad-override]
        return getattr(self, self.head_name)
