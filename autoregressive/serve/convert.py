"""A checkpoint as vLLM takes it: its config and its weights, read from the file itself while the engine loads.

The config is that of a "llama", which vLLM reads without code of its own, of the architecture that the plugin registers
(serve/plugin.py). Classes are token ids after the codebook's, the row after the last class is "no class". Needs
no vLLM.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.gpt import Transformer
from autoregressive.pipeline import load_gpt

STREAMS = 2  # conditional, unconditional
# Channels of a head for which vLLM's kernels, on CPUs too, are made.
_HEAD_SIZES = (64, 80, 96, 112, 128, 160, 192, 224, 256)


def open_gpt(path: str | Path, **flags) -> Transformer:
    """The checkpoint's GPT as it stands in the file, memory-mapped: weights are read when they are used.

    flags: image_size, downsample_size, use_ema and the caller's beliefs, as load_gpt (autoregressive/pipeline.py) takes them.
    Raises ValueError and FileNotFoundError as load_gpt does, ValueError for a layout or conditions that vLLM cannot draw.
    """
    gpt = load_gpt(path, dtype=None, **flags)
    if not isinstance(gpt, Transformer) or not gpt.layout.is_raster or len(gpt.conditions) > 1:
        raise ValueError(
            f"{path} is of the trunk {gpt.args.trunk!r}, the layout {gpt.layout.name!r} and the conditions "
            f"{', '.join(gpt.conditions)}; vLLM decodes a llama one token a step in raster order, of a class or a caption. Serve "
            "it with `--engine native`, or draw with autoregressive/sample/sample_c2i.py"
        )
    return gpt


def hidden_value(dtype: torch.dtype) -> float:
    """Return the number that fills a padding row of a condition."""
    return torch.finfo(dtype).min


def engine_config(gpt: Transformer) -> dict:
    """The names that vLLM reads of a llama, then those of serve/model.py and serve/guidance.py."""
    args, head_dim = gpt.args, gpt.args.dim // gpt.args.n_head
    text = args.model_type == "t2i"
    config = {
        "hidden_size": STREAMS * args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layer,
        # Both streams of guidance are heads of one cache entry: vLLM sizes its cache by these.
        "num_attention_heads": STREAMS * args.n_head,
        "num_key_value_heads": STREAMS * args.kv_heads,
        # A prompt and its negative differ in length: a channel of keys hides the padding of the shorter one.
        "head_dim": next(size for size in _HEAD_SIZES if size > head_dim) if text else head_dim,
        # Past the codes stand the classes, or one id: the first of these marks a token that could not be drawn.
        "vocab_size": args.vocab_size + (1 if text else args.num_classes + 1),
        "max_position_embeddings": gpt.layout.rows,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": False,
        "own_head_dim": head_dim,
        "codes": args.vocab_size,
        "grid_size": gpt.layout.grid_size,
        "prefix": gpt.layout.prefix,
        "rope_base": args.rope_base,
        "rope_grid": args.rope_grid or gpt.layout.grid_size,
    }
    if text:
        # Has vLLM ask the model for positions: a caption's rows end where the image begins, however few they are.
        section = [config["head_dim"] // 2, 0, 0]
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": args.rope_base, "mrope_section": section}
    return config


@torch.inference_mode()
def engine_weights(gpt: Transformer) -> dict[str, Tensor]:
    """The weights under the file's names, but `embed.weight` for the codes and then the classes, or a row of zeros.

    What else conditions are made of is for the process that takes the requests.
    """
    embeddings = ("cls_embedding.", "tok_embeddings.", "target_embeddings.")  # the last are of other orders than raster
    state = {name: weight for name, weight in gpt.state_dict().items() if not name.startswith(embeddings)}
    embed = gpt.tok_embeddings.weight
    if gpt.args.model_type == "c2i":
        return {"embed.weight": torch.cat([embed, gpt.cls_embedding.embedding_table.weight]), **state}
    return {"embed.weight": F.pad(embed, (0, 0, 0, 1)), **state}
