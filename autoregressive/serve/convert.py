"""A checkpoint as the folder that vLLM loads: config.json and model.safetensors, made on first use and kept.

    folder = model_folder("pretrained_models/c2i_L_384.pt", image_size=384, dtype=torch.bfloat16)

The config calls itself a "llama", which vLLM reads without code of its own, and names the architecture that the plugin
(serve/plugin.py) registers. Classes are token ids after the codebook's, the row after the last class is "no class".
"""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.gpt import Transformer
from autoregressive.pipeline import load_gpt
from autoregressive.serve.plugin import ARCHITECTURE
from utils.checkpoint import AVERAGED_FILE, CONSOLIDATED_FILE, RECORD_FILE, read_checkpoint, save_safetensors
from utils.files import write_json

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FORMAT = 2  # of the folder; a folder of another one is made anew


def model_folder(
    path: str | Path,
    *,
    image_size: int | None = None,
    downsample_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    use_ema: bool = False,
    cache: str | Path | None = None,
    **flags,
) -> Path:
    """The folder of this checkpoint, written where it is not there whole. Several processes may ask at once.

    image_size, downsample_size, use_ema, flags: as load_gpt (autoregressive/pipeline.py) takes them. dtype: of the weights.
    cache: the folder of such folders (default: `autoregressive-image-generation/vllm` in the user's cache).
    Raises ValueError and FileNotFoundError as load_gpt does, ValueError for a PAR file, OSError where it cannot be written.
    """
    checkpoint = read_checkpoint(path, prefer_ema=use_ema)
    # As it stands in the file: memory-mapped, so that a folder that is there already costs no reading of weights.
    gpt = load_gpt(path, image_size=image_size, downsample_size=downsample_size, dtype=None, use_ema=use_ema, **flags)
    if gpt.args.ar_token_num > 1:
        raise ValueError(
            f"{path} predicts {gpt.args.ar_token_num} tokens a step (--ar-token-num); vLLM decodes one token a step. Serve it "
            "with `--engine native`, or draw with autoregressive/sample/sample_c2i.py"
        )
    side = (downsample_size or (checkpoint.args or {}).get("downsample_size") or 16) * gpt.layout.grid_size
    key = _identity(checkpoint.files, image_size=side, tokens=gpt.layout.tokens, dtype=DTYPES[dtype], use_ema=use_ema)
    folder = (Path(cache) if cache else default_cache()) / f"{checkpoint.path.stem}-{DTYPES[dtype]}-{key}"
    if not is_whole(folder):
        _place(folder, gpt, dtype, side, checkpoint.path.name)
    return folder


def default_cache() -> Path:
    """Where folders are kept: in $XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "autoregressive-image-generation" / "vllm"


def is_whole(folder: str | Path) -> bool:
    """Whether the folder was written to its end, and by this version."""
    try:
        config = read_config(folder)
        return (Path(folder) / WEIGHTS_FILE).stat().st_size == config["weights_bytes"]
    except (OSError, ValueError):
        return False


def read_config(folder: str | Path) -> dict:
    """The config of such a folder. Raises FileNotFoundError, ValueError for the folder of something else."""
    path = Path(folder) / CONFIG_FILE
    config = json.loads(path.read_text())
    if not isinstance(config, dict) or config.get("image_gpt_format") != _FORMAT:
        raise ValueError(
            f"{path} is not of this version of autoregressive/serve/convert.py: convert the checkpoint again"
        )
    return config


def _identity(files: list[Path], **settings: object) -> str:
    """Sixteen digits that change with the weights' files, what stands beside them, and the settings."""
    if files[0].name == CONSOLIDATED_FILE:
        files = [*files, *(files[0].with_name(name) for name in (AVERAGED_FILE, RECORD_FILE))]
    resolved = [file.resolve() for file in files]
    stats = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in resolved if file.exists()]
    return hashlib.sha256(json.dumps([_FORMAT, stats, settings]).encode()).hexdigest()[:16]


def _place(folder: Path, gpt: Transformer, dtype: torch.dtype, image_size: int, source: str) -> None:
    """Writes the folder under another name and renames it; the first of several processes wins."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    except OSError as error:
        raise OSError(error.errno, f"could not write {folder} ({error.strerror}): set XDG_CACHE_HOME") from error
    try:
        save_safetensors(made / WEIGHTS_FILE, engine_weights(gpt, dtype))
        config = engine_config(gpt, dtype, image_size)
        config |= {"weights_bytes": (made / WEIGHTS_FILE).stat().st_size, "converted_from": source}
        write_json(made / CONFIG_FILE, config)
        os.chmod(made, 0o755)
        for _ in range(3):
            try:
                os.rename(made, folder)
                return
            except OSError:
                if is_whole(folder):
                    return  # of another process, and the same
                _set_aside(folder)
        raise OSError(f"could not write {folder}: something else keeps writing there")
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _set_aside(folder: Path) -> None:
    """Removes what is no whole folder, under another name first: half removed it must not be found by anyone."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".broken"))
    with suppress(FileNotFoundError):  # another process may have been faster
        os.rename(folder, aside / "broken")
    shutil.rmtree(aside, ignore_errors=True)


def engine_config(gpt: Transformer, dtype: torch.dtype, image_size: int) -> dict:
    """What config.json has: the names that vLLM reads of a llama, then those of serve/model.py and serve/vllm_engine.py."""
    args = gpt.args
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "torch_dtype": DTYPES[dtype],
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layer,
        # Both streams of guidance are heads of one cache entry: vLLM sizes its cache by these.
        "num_attention_heads": 2 * args.n_head,
        "num_key_value_heads": 2 * args.n_kv_head,
        "head_dim": args.dim // args.n_head,
        # Past the codes stand the classes, or one id: the first of these marks a token that could not be drawn.
        "vocab_size": args.vocab_size + (args.num_classes + 1 if args.model_type == "c2i" else 1),
        "max_position_embeddings": gpt.layout.rows,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": False,
        "image_gpt_format": _FORMAT,
        "gpt_type": args.model_type,
        "codes": args.vocab_size,
        "grid_size": gpt.layout.grid_size,
        "prefix": gpt.layout.prefix,
        "num_classes": args.num_classes if args.model_type == "c2i" else 0,
        "caption_dim": args.caption_dim if args.model_type == "t2i" else 0,
        "image_size": image_size,
        "rope_base": args.rope_base,
        "origin": gpt.file_config,
    }
    if args.model_type == "t2i":
        # Has vLLM ask the model for positions: a caption's rows end where the image begins, however few they are.
        section = [config["head_dim"] // 2, 0, 0]
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": args.rope_base, "mrope_section": section}
    return config


@torch.inference_mode()
def engine_weights(gpt: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under the model's names, but for the conditions.

    `embed.weight` has the codes and then the classes, or a row of zeros, `null_condition` (prefix, dim) the embedded "no class" or "no caption";
    `caption.fc1`, `caption.fc2` project features in the process that takes the requests.
    """
    state = {name: tensor.to(dtype) for name, tensor in gpt.state_dict().items()}
    embed = state.pop("tok_embeddings.weight")
    if gpt.args.model_type == "c2i":
        classes = state.pop("cls_embedding.embedding_table.weight")
        return {**state, "embed.weight": torch.cat([embed, classes]), "null_condition": classes[-1:].clone()}
    project = gpt.cls_embedding.cap_proj.to(dtype)
    null = project(state.pop("cls_embedding.uncond_embedding"))
    for part in ("fc1", "fc2"):
        state[f"caption.{part}"] = state.pop(f"cls_embedding.cap_proj.{part}.weight")
    return {**state, "embed.weight": F.pad(embed, (0, 0, 0, 1)), "null_condition": null}
