"""The GPT as vLLM runs it: both streams of guidance inside one request.

A request's rows are computed twice over, as `h` (T, 2, dim): for what was asked, and for "no class" or "no caption". In the
linear layers these are 2T rows; in attention the streams are heads, 2H of them, in one entry of the engine's cache.
So the streams of an image can never come apart, whatever the engine does to its batch (batch limits, preemption,
late arrivals). serve/guidance.py mixes their logits.
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
from autoregressive.serve.guidance import GuidedDraw, mark_broken

STREAMS = 2  # conditional, unconditional


class GuidedAttention(nn.Module):
    """models/gpt.py's Attention, for both streams."""

    def __init__(self, config: object, cache: CacheConfig | None, quant: QuantizationConfig | None, prefix: str):
        super().__init__()
        heads, kv_heads = config.num_attention_heads // STREAMS, config.num_key_value_heads // STREAMS
        self.head_dim = config.head_dim
        self.wqkv = QKVParallelLinear(
            config.hidden_size, self.head_dim, heads, kv_heads, bias=False, quant_config=quant, prefix=f"{prefix}.wqkv"
        )
        self.wo = RowParallelLinear(
            heads * self.head_dim, config.hidden_size, bias=False, quant_config=quant, prefix=f"{prefix}.wo"
        )
        self.heads, self.kv_heads = self.wqkv.num_heads, self.wqkv.num_kv_heads  # of this process
        self.attn = Attention(
            STREAMS * self.heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=STREAMS * self.kv_heads,
            cache_config=cache,
            quant_config=quant,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x: (T, 2, dim). rope: (T, D/2, 2)."""
        qkv, _ = self.wqkv(x.flatten(0, 1))  # (2T, (H + 2 KV) D)
        qkv = qkv.view(len(x), STREAMS, -1, self.head_dim)
        q, k, v = (t.flatten(1, 2) for t in qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2))  # (T, 2H, D)
        q, k = (apply_rope(t[None], rope)[0] for t in (q, k))
        # A block of the cache outlives its request, and a NaN in it would reach the next one through the mask. The request's
        # own logits are not finite all the same: the rows of `x` are kept.
        k, v = (t.nan_to_num(0.0, posinf=0.0, neginf=0.0) for t in (k, v))
        out = self.attn(q.flatten(1), k.flatten(1), v.flatten(1))  # (T, 2H D)
        out, _ = self.wo(out.view(-1, self.heads * self.head_dim))
        return out.view_as(x)


class GuidedBlock(nn.Module):
    """models/gpt.py's TransformerBlock, for both streams."""

    def __init__(self, config: object, cache: CacheConfig | None, quant: QuantizationConfig | None, prefix: str):
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self.attention = GuidedAttention(config, cache, quant, f"{prefix}.attention")
        self.w13 = MergedColumnParallelLinear(
            dim, [hidden, hidden], bias=False, quant_config=quant, prefix=f"{prefix}.w13"
        )
        self.w2 = RowParallelLinear(hidden, dim, bias=False, quant_config=quant, prefix=f"{prefix}.w2")
        self.attention_norm = RMSNorm(dim, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """(T, 2, dim) -> the same."""
        x = x + self.attention(self.attention_norm(x), rope)
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
        dtype = vllm_config.model_config.dtype
        self.prefix = config.prefix
        self.last_id = config.vocab_size - 1
        self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size, quant_config=quant)
        self.layers = nn.ModuleList(
            GuidedBlock(config, vllm_config.cache_config, quant, f"{prefix}.layers.{layer}")
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.null_condition = nn.Parameter(
            torch.empty(config.prefix, config.hidden_size, dtype=dtype), requires_grad=False
        )
        layout = RasterLayout(config.grid_size, config.prefix)
        table = layout.rope_rows(rope_table_2d(config.grid_size, config.head_dim, config.rope_base))
        self.register_buffer("rope", table.to(self.null_condition.device), persistent=False)  # float32 in any dtype

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Returns (T, 2 dim): the two streams side by side."""
        # An id or a place past the end, in a dry run or of a request that nobody checked, must not end the engine.
        positions = positions.clamp(0, len(self.rope) - 1)
        h = self.embed(input_ids.clamp(0, self.last_id)) if inputs_embeds is None else inputs_embeds  # (T, dim)
        null = self.null_condition[positions.clamp(max=self.prefix - 1)]
        h = torch.stack([h, torch.where((positions < self.prefix)[:, None], null, h)], dim=1)  # (T, 2, dim)
        rope = self.rope[positions]
        for layer in self.layers:
            h = layer(h, rope)
        return self.norm(h).flatten(1)


class ImageGPT(nn.Module):
    """What vLLM registers: a request's prompt is a class's id, or embedded rows of a caption; its output an image's codes."""

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
        self.output = ParallelLMHead(config.codes, config.hidden_size, quant_config=vllm_config.quant_config)
        self.logits = LogitsProcessor(config.codes)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """(T,) -> (T, dim)."""
        return self.layers.embed(input_ids.clamp(0, self.layers.last_id))

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
        logits = self.logits(self.output, hidden_states.reshape(-1, self.config.hidden_size))  # (2B, V)
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
        """Takes the names that serve/convert.py writes; returns those of the parameters that were given a value."""
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if name.startswith("caption."):  # for the process that takes the requests
                continue
            name, *shard = own_name(name)
            parameter = parameters[name]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, tensor, *shard)
            loaded.add(name)
        return loaded


def own_name(name: str) -> tuple[str] | tuple[str, int]:
    """A converted weight's name here, and which shard of a merged parameter it is."""
    if name.startswith("output."):
        return (name,)
    name = "layers." + name
    for part, shard in (("w1", 0), ("w3", 1)):
        if f".feed_forward.{part}." in name:
            return name.replace(f".feed_forward.{part}.", ".w13."), shard
    return (name.replace(".feed_forward.", "."),)
