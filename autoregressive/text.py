"""Prompts of a pipeline: checked, encoded, with the T5 that the first one loads. A class-conditional run needs none of it."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from autoregressive.pipeline import ImagePipeline, as_list
from autoregressive.released import find_identity, flags_of
from language import t5
from language.captions import clean_caption
from utils.checkpoint import read_checkpoint
from utils.errors import beginning
from utils.origin import require_encoder

RELEASED_T5_WIDTH = 2048


class TextEncoder(Protocol):
    """Encoder of prompts into features; language/t5.py's T5Embedder is one."""

    def get_text_embeddings(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Features (B, L, caption_dim) and their mask (B, L), nonzero where a row stands for text."""


def with_encoder(gpt: Path, text: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of the T5 as ImagePipeline takes them, with the T5 that a GPT's file records where none is named.

    Raises FileNotFoundError where that T5 is not near the file, unless its width is the released one's, which need not be.
    """
    checkpoint = read_checkpoint(gpt)
    identity = checkpoint.config.get("text_encoder")
    if identity and not any(text.get(name) for name in ("text_encoder", "t5_path", "t5_model_type")):
        try:
            features = (checkpoint.args or {}).get("t5_feat_path")
            found = t5.find_encoder(gpt, identity, features)
        except FileNotFoundError:
            if flags_of(find_identity(checkpoint))["caption_dim"] != RELEASED_T5_WIDTH:
                raise
        else:
            return {**text, "t5_path": found.parent, "t5_model_type": found.name}
    return dict(text)


def encode(pipeline: ImagePipeline, prompts: Sequence[str], *, progress: bool = False) -> list[Tensor]:
    """Return the features of each prompt, (length, caption_dim) on the CPU, in the encoder's dtype.

    Prompts are encoded one at a time, a repeated one once: a batch would round according to its size. On the CPU,
    since those of a run's prompts are there at once: 4 KB a token of flan-T5-XL in half precision.
    Raises ValueError for a prompt that is blank or of which cleaning leaves nothing, or an encoder of another model;
    FileNotFoundError where there is no T5.
    """
    check_prompts(prompts, getattr(pipeline.text_encoder, "use_text_preprocessing", pipeline.text_encoder is None))
    encoder = find_encoder(pipeline) if len(prompts) else None
    encoded: dict[str, Tensor] = {}
    for text in tqdm(dict.fromkeys(prompts), unit="prompt", disable=not progress, desc="encoding"):
        with torch.no_grad():
            features, mask = encoder.get_text_embeddings([text])  # (1, L, D), (1, L)
        features = features[0][mask[0].bool().to(features.device)].cpu()
        try:
            encoded[text] = pipeline.text.read(features)
        except ValueError as error:
            raise ValueError(f"prompt {beginning(text)!r}: {error}") from error
    full = [text for text, features in encoded.items() if len(features) >= pipeline.t5_tokens]
    if full:
        listed = ", ".join(repr(beginning(text)) for text in full[:3]) + (", …" if len(full) > 3 else "")
        warnings.warn(
            f"{len(full)} of {len(encoded)} prompts fill all {pipeline.t5_tokens} text tokens, and what stands behind "
            f"them is not read: {listed}",
            stacklevel=2,
        )
    return [encoded[text] for text in prompts]


def find_encoder(pipeline: ImagePipeline) -> TextEncoder:
    """Return the pipeline's encoder, or load the T5. Raises ValueError for one of another model, FileNotFoundError."""
    if not pipeline.text:
        raise ValueError("this GPT is class-conditional: it has no text encoder")
    if pipeline.text_encoder is None:
        folder = t5.find_t5(pipeline.t5_path and str(pipeline.t5_path), pipeline.t5_model_type)
        pipeline.text_encoder = t5.T5Embedder(
            pipeline.t5_device, str(folder), torch_dtype=pipeline.t5_dtype, model_max_length=pipeline.t5_tokens
        )
        if "text_encoder" in pipeline.gpt.file_config:
            require_encoder(pipeline.gpt.file_config, t5.encoder_identity(pipeline.text_encoder), str(folder))
    dim, width = getattr(pipeline.text_encoder, "dim", None), pipeline.text.text_dim
    if dim not in (None, width):
        raise ValueError(f"the text encoder has features of {dim} numbers and the GPT takes {width}")
    return pipeline.text_encoder


def check_prompts(prompts: Sequence[str], cleaned: bool = True) -> None:
    """Raise ValueError for what is no list of strings, and where a prompt is blank.

    cleaned: they will be, by language/captions.py; then also where that leaves nothing of one.
    """
    for i, prompt in enumerate(as_list(prompts)):
        if not isinstance(prompt, str):
            raise ValueError(f"this GPT is text-conditional: it takes prompts, and item {i} is {prompt!r}")
        if not prompt.strip():
            raise ValueError(f"prompt {i} (from 0) is blank: write what to draw")
        if cleaned and not clean_caption(prompt):
            raise ValueError(
                f"prompt {i} (from 0), {beginning(prompt)!r}, is blank once it is cleaned as captions were in training, without "
                "web addresses, file names, Chinese characters and the like: write what to draw"
            )


def warn_of_long_features(lengths: Sequence[tuple[int, int]], rows: int) -> None:
    """Warn where only the first `rows` rows of an image's features are read. lengths: images' numbers and their rows."""
    long = [f"{length} of image {i}" for i, length in lengths if length > rows]
    if long:
        listed = ", ".join(long[:3]) + (", …" if len(long) > 3 else "")
        warnings.warn(
            f"{len(long)} of {len(lengths)} features have more than {rows} rows, and what stands behind them is not read: "
            f"{listed}",
            stacklevel=3,
        )
