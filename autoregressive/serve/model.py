"""The GPT as vLLM runs it: both streams of guidance inside one request.

A request's rows are computed twice over, as `h` (T, 2, dim): for what was asked, and for "no class" or "no caption". In the
linear layers these are 2T rows; in attention the streams are heads, 2H of them, in one entry of the engine's cache.
So the streams of an image can never come apart, whatever the engine does to its batch (batch limits, preemption,
late arrivals). serve/guidance.py mixes their logits. Conditions come as rows of both streams, from vllm_engine.py; a row of
hidden_value is padding, which no other row sees.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.sequence import IntermediateTensors

from autoregressive.models.gpt import RMSNorm
from autoregressive.models.layouts.raster import RasterLayout
from autoregressive.models.rope import apply_rope, rope_table_2d
from autoregressive.serve.convert import STREAMS, hidden_value
from autoregressive.serve.guidance import GuidedDraw, mark_broken

# Added to the scores of a hidden row, in a channel of its own: no weight is left of it, and float16 holds it.
_FAR_BELOW = -6e4


class GuidedAttention(nn.Module):
    """models/gpt.py's Attention, for both streams."""

    def __init__(self, config: object, cache: CacheConfig | None, quant: QuantizationConfig | None, prefix: str):
        super().__init__()
        heads, kv_heads = config.num_attention_heads // STREAMS, config.num_key_value_heads // STREAMS
        dim, self.head_dim = config.hidden_size // STREAMS, config.own_head_dim
        self.room = config.head_dim - self.head_dim  # channels beside the model's own
        self.wqkv = QKVParallelLinear(
            dim, self.head_dim, heads, kv_heads, bias=False, quant_config=quant, prefix=f"{prefix}.wqkv"
        )
        self.wo = RowParallelLinear(heads * self.head_dim, dim, bias=False, quant_config=quant, prefix=f"{prefix}.wo")
        self.heads, self.kv_heads = self.wqkv.num_heads, self.wqkv.num_kv_heads  # of this process
        self.attn = Attention(
            STREAMS * self.heads,
            config.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=STREAMS * self.kv_heads,
            cache_config=cache,
            quant_config=quant,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: Tensor, rope: Tensor, bias: Tensor | None) -> Tensor:
        """x: (T, 2, dim). rope: (T, D/2, 2). bias: (T, 2), what is added to the scores of a row; None for nothing."""
        qkv, _ = self.wqkv(x.flatten(0, 1))  # (2T, (H + 2 KV) D)
        qkv = qkv.view(len(x), STREAMS, -1, self.head_dim)
        q, k, v = (t.flatten(1, 2) for t in qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2))  # (T, 2H, D)
        q, k = (apply_rope(t[None], rope)[0] for t in (q, k))
        # A block of the cache outlives its request, and a NaN in it would reach the next one through the mask. The request's
        # own logits are not finite all the same: the rows of `x` are kept.
        k, v = (t.nan_to_num(0.0, posinf=0.0, neginf=0.0) for t in (k, v))
        if bias is not None:
            q, k, v = (F.pad(t, (0, self.room)) for t in (q, k, v))
            q[..., self.head_dim] = self.head_dim**0.5
            k[..., self.head_dim] = bias.repeat_interleave(self.kv_heads, dim=1)
        out = self.attn(q.flatten(1), k.flatten(1), v.flatten(1))  # (T, 2H D)
        if bias is not None:
            out = out.view(len(x), -1, self.head_dim + self.room)[..., : self.head_dim]
        out, _ = self.wo(out.reshape(-1, self.heads * self.head_dim))
        return out.view_as(x)


class GuidedBlock(nn.Module):
    """models/gpt.py's TransformerBlock, for both streams."""

    def __init__(self, config: object, cache: CacheConfig | None, quant: QuantizationConfig | None, prefix: str):
        super().__init__()
        dim, hidden = config.hidden_size // STREAMS, config.intermediate_size
        self.attention = GuidedAttention(config, cache, quant, f"{prefix}.attention")
        self.w13 = MergedColumnParallelLinear(
            dim, [hidden, hidden], bias=False, quant_config=quant, prefix=f"{prefix}.w13"
        )
        self.w2 = RowParallelLinear(hidden, dim, bias=False, quant_config=quant, prefix=f"{prefix}.w2")
        self.attention_norm = RMSNorm(dim, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Tensor, bias: Tensor | None) -> Tensor:
        """x: (T, 2, dim), and so is what it returns. The rest as GuidedAttention takes it."""
        x = x + self.attention(self.attention_norm(x), rope, bias)
        gate, up = self.w13(self.ffn_norm(x).flatten(0, 1))[0].chunk(2, dim=-1)
        out, _ = self.w2(F.silu(gate) * up)
        return x + out.view_as(x)


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class GuidedLayers(nn.Module):
    """From token ids, or embedded rows, to hidden states."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config, quant = vllm_config.model_config.hf_config, vllm_config.quant_config
        dim = config.hidden_size // STREAMS
        self.codes, self.last_id = config.codes, config.vocab_size - 1
        self.has_padding = config.head_dim > config.own_head_dim
        self.embed = VocabParallelEmbedding(config.vocab_size, dim, quant_config=quant)
        self.layers = nn.ModuleList(
            GuidedBlock(config, vllm_config.cache_config, quant, f"{prefix}.layers.{layer}")
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(dim, config.rms_norm_eps)
        layout = RasterLayout(config.grid_size, config.prefix)
        table = layout.rope_rows(rope_table_2d(config.rope_grid, config.own_head_dim, config.rope_base))
        self.register_buffer("rope", table.to(self.norm.weight.device), persistent=False)  # float32 in any dtype

    def embed_streams(self, ids: Tensor) -> Tensor:
        """Embed ids (T,) in both streams, (T, 2 dim). A class's id is "no class" in the other one."""
        ids = ids.clamp(0, self.last_id)
        return self.embed(torch.stack([ids, torch.where(ids < self.codes, ids, self.last_id)], dim=1)).flatten(1)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Returns (T, 2 dim): the two streams side by side."""
        # An id or a place past the end, in a dry run or of a request that nobody checked, must not end the engine.
        rope = self.rope[positions.clamp(0, len(self.rope) - 1)]
        h = self.embed_streams(input_ids) if inputs_embeds is None else inputs_embeds
        h = h.unflatten(1, (STREAMS, -1))  # (T, 2, dim)
        bias = None
        if self.has_padding:
            hidden = h[..., 0] == hidden_value(h.dtype)
            h = h.masked_fill(hidden[..., None], 0)
            bias = hidden * _FAR_BELOW
        for layer in self.layers:
            h = layer(h, rope, bias)
        return self.norm(h).flatten(1)


class ImageGPT(nn.Module):
    """Model that vLLM registers: a request's prompt is embedded rows of both streams, or a class's id; its output an image's codes."""

    supports_mrope = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        if get_pp_group().world_size > 1:
            raise ValueError("pipeline parallelism is not supported: choose --pipeline-parallel-size 1")
        if GuidedDraw.current is None:
            raise RuntimeError(
                "this engine has no logits processor autoregressive.serve.guidance:GuidedDraw; with the newer model runner of "
                "vLLM set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        self.layers = GuidedLayers(vllm_config=vllm_config, prefix=f"{prefix}.layers" if prefix else "layers")
        self.output = ParallelLMHead(config.codes, config.hidden_size // STREAMS, quant_config=vllm_config.quant_config)
        self.logits = LogitsProcessor(config.codes)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed ids (T,) in both streams, (T, 2 dim)."""
        return self.layers.embed_streams(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """positions: (T,), or of a text model (3, T), all alike. Returns (T, 2 dim)."""
        positions = positions[0] if positions.dim() == 2 else positions
        return self.layers(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Guided logits, float32 (B, vocab_size), -inf for the ids of classes. hidden_states: (B, 2 dim)."""
        logits = self.logits(self.output, hidden_states.view(-1, self.config.hidden_size // STREAMS))  # (2B, V)
        if logits is None:
            return None
        conditional, unconditional = logits.float().view(len(hidden_states), STREAMS, -1).unbind(1)
        mixed = mark_broken(GuidedDraw.current.mix(conditional, unconditional))
        return F.pad(mixed, (0, self.config.vocab_size - mixed.shape[1]), value=float("-inf"))

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """A caption's rows end where the image begins. Returns positions (3, T) and what later ones are ahead of their count."""
        count = len(input_tokens)
        ahead = self.config.prefix - count
        return (torch.arange(count) + ahead).expand(3, -1), ahead

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes the names of serve/convert.py; returns those of the parameters that were given a value."""
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            name, *shard = own_name(name)
            parameter = parameters[name]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, tensor, *shard)
            loaded.add(name)
        return loaded


def own_name(name: str) -> tuple[str] | tuple[str, int]:
    """A checkpoint's weight's name here, and which shard of a merged parameter it is."""
    if name.startswith("output."):
        return (name,)
    name = "layers." + name
    for part, shard in (("w1", 0), ("w3", 1)):
        if f".feed_forward.{part}." in name:
            return name.replace(f".feed_forward.{part}.", ".w13."), shard
    return (name.replace(".feed_forward.", "."),)
