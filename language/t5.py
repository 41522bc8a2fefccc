"""The text encoder of the text-conditional models: flan-T5-XL's encoder, captions in, 120 rows of features out.

    embedder = T5Embedder("cuda", find_t5("pretrained_models/t5-ckpt", "flan-t5-xl"))
    features, mask = embedder.get_text_embeddings(["a red lantern"])     # (1, 120, 2048) bfloat16, (1, 120) int64

Features are right-padded, as the tokenizer pads; what stands in the padding is not zero, and `mask` tells where that is.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from language.captions import clean_caption
from utils.checkpoint import read_checkpoint
from utils.extras import optional_imports
from utils.hub import BY_HAND, resolve, weights_folders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RELEASED = "google/flan-t5-xl"
DEFAULT_FOLDER = "pretrained_models/t5-ckpt"

# Texts that go through the encoder at once. A caption of 120 tokens has a quarter of a gigabyte of activations in XL.
TEXTS_AT_ONCE = 64

_NEEDED = {
    "config.json": ["config.json"],
    "tokenizer": ["tokenizer.json", "spiece.model"],
    "weights": ["*.safetensors", "*.bin"],
}


def find_t5(t5_path: str | Path | None = None, model_type: str = "flan-t5-xl") -> Path:
    """Find the folder of T5's files: `{t5_path}/{model_type}`, `t5_path` itself, or `model_type` where that is a folder.

    Where none of them is there and the released flan-t5-xl is asked for, pretrained_models/ and the hub, as
    utils/hub.py looks for released files. Raises FileNotFoundError or ConnectionError with the command that gets it.
    """
    with optional_imports():
        import transformers  # noqa: F401 - an absent package is an error before gigabytes are downloaded

    asked = [Path(t5_path, model_type), Path(t5_path)] if t5_path else []
    for folder in [*asked, Path(model_type)]:
        folder = folder.expanduser()
        if (folder / "config.json").is_file():
            return folder
    home = asked[0] if asked else Path(DEFAULT_FOLDER, model_type)
    if asked and home.expanduser().is_dir():
        raise FileNotFoundError(f"{home} has no config.json: it is no model's folder, or not whole. {_remedy(home)}")
    if model_type not in (RELEASED, RELEASED.split("/")[1]):
        looked = " or ".join(map(str, dict.fromkeys([*asked, Path(model_type)])))
        raise FileNotFoundError(f"there is no T5 at {looked}: give the folder that holds {model_type}'s config.json")
    try:
        return resolve(RELEASED)
    except (FileNotFoundError, ConnectionError) as error:
        reason = str(error).partition(BY_HAND)[0].rstrip(". ")  # of two places to put it at, the one that was asked for
        raise type(error)(f"there is no T5 at {home}: {reason}. {_remedy(home)}") from error


def find_encoder(gpt: Path, identity: str, features: str | None = None) -> Path:
    """Find the T5 of this identity: in or beside the folders above a GPT's file, beside the folder of the features it was
    trained on, or in pretrained_models/.

    Raises FileNotFoundError where none is there.
    """
    with optional_imports():
        import transformers  # noqa: F401

    beside = [Path(features).parent] if features else []
    for folder in (*list(gpt.absolute().parents)[:5], *beside, *weights_folders()):
        for config in sorted({*folder.glob("*/config.json"), *folder.glob("*/*/config.json")}):
            with suppress(ValueError, OSError, KeyError):
                if json.loads(config.read_bytes())["model_type"] != "t5":
                    continue
                if _identity(load_tokenizer(config.parent), read_checkpoint(config.parent).model) == identity:
                    return config.parent
    raise FileNotFoundError(
        f"no text encoder {identity} lies near {gpt}, which was trained with that one: give --t5-path"
    )


def _remedy(folder: Path) -> str:
    return f"To get it:\n  hf download {RELEASED} --local-dir {folder} --include '*.json' '*.model' '*.safetensors'"


class T5Embedder:
    """T5's encoder and tokenizer on one device, never trained.

    device: where the encoder works. dir_or_name: a folder with its files, or 'flan-t5-xl' (find_t5 looks for it).
    cache_dir: the folder that holds a folder `dir_or_name`; local_cache: it has to be there, nothing is downloaded.
    torch_dtype: of weights and features; bfloat16 where not given, as published. model_max_length: tokens a text is cut
    or padded to. use_text_preprocessing: clean texts by language/captions.py, as the released models' training did;
    without, they are only stripped and in lower case.
    Raises FileNotFoundError for a missing folder or file, ValueError for a folder of another model or damaged weights.
    """

    def __init__(
        self,
        device: str | torch.device,
        dir_or_name: str | Path = "flan-t5-xl",
        *,
        local_cache: bool = False,
        cache_dir: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        model_max_length: int = 120,
        use_text_preprocessing: bool = True,
    ):
        if model_max_length < 1:
            raise ValueError(f"model_max_length is {model_max_length}; it is at least 1")
        if local_cache:
            self.folder = Path(cache_dir or DEFAULT_FOLDER, dir_or_name).expanduser()
            if not self.folder.is_dir():
                raise FileNotFoundError(f"there is no T5 at {self.folder}. {_remedy(self.folder)}")
        else:
            self.folder = find_t5(cache_dir, str(dir_or_name))
        self.device = torch.device(device)
        self.torch_dtype = torch_dtype or torch.bfloat16
        self.model_max_length = model_max_length
        self.use_text_preprocessing = use_text_preprocessing
        self.tokenizer = load_tokenizer(self.folder)
        self.model = _load_encoder(self.folder, self.torch_dtype).to(self.device).eval().requires_grad_(False)

    @property
    def dim(self) -> int:
        """Return the width of the features: 2048 for XL."""
        return self.model.config.d_model

    def get_text_embeddings(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return features (B, L, dim) in `torch_dtype` and the tokenizer's mask, int64 (B, L), L = model_max_length.

        A text's features do not depend on the other texts beyond rounding. Longer texts are cut.
        Raises ValueError for no texts, or one that is no string.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts are a list of strings, got {texts!r}")
        if not len(texts):
            raise ValueError("no texts to embed: the list is empty")
        tokens = self.tokenizer(
            [preprocess(text, self.use_text_preprocessing) for text in texts],
            max_length=self.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = (tokens[name].to(self.device) for name in ("input_ids", "attention_mask"))
        parts = zip(ids.split(TEXTS_AT_ONCE), mask.split(TEXTS_AT_ONCE), strict=True)
        return torch.cat([self.encode(*part) for part in parts]), mask

    # Not inference_mode: a model that is trained on these features could not save its tensors for the backward pass.
    @torch.no_grad()
    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode token numbers, with a mask, both whole numbers (B, length), to features (B, length, dim)."""
        return self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state


def preprocess(text: str, clean: bool = True) -> str:
    """Return a caption as the tokenizer gets it: cleaned, or only stripped and in lower case."""
    return clean_caption(text) if clean else text.lower().strip()


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Load T5's tokenizer from a local folder. Raises FileNotFoundError or ValueError that names the folder."""
    from transformers import AutoTokenizer

    with _read_whole(Path(folder), "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def _read_whole(folder: Path, what: str) -> Iterator[None]:
    """Raise FileNotFoundError where a folder has none of the files of `what`, ValueError where they cannot be read inside."""
    if not any(file for pattern in _NEEDED[what] for file in folder.glob(pattern)):
        raise FileNotFoundError(f"{folder} has no {what} ({' or '.join(_NEEDED[what])}). {_remedy(folder)}")
    try:
        yield
    except Exception as error:  # sentencepiece, tokenizers, safetensors and json each have their own for a damaged file
        raise ValueError(f"the {what} in {folder} cannot be read ({error}). {_remedy(folder)}") from error


def _load_encoder(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoConfig, T5EncoderModel
    from transformers.utils import logging

    with _read_whole(folder, "config.json"):
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if kind != "t5":
        raise ValueError(f"{folder} holds a model of the kind {kind!r}, not a T5. {_remedy(folder)}")
    logging.disable_progress_bar()  # it takes seconds, and one for each of eight processes tells nothing
    options = {"local_files_only": True, "output_loading_info": True, _dtype_argument(): dtype}
    with _read_whole(folder, "weights"):
        model, found = T5EncoderModel.from_pretrained(folder, **options)
    wrong = sorted(found["missing_keys"]) + sorted(map(str, found.get("mismatched_keys", [])))
    if wrong:  # transformers would go on with random numbers in their place
        raise ValueError(f"{folder} lacks weights of T5's encoder: {', '.join(wrong[:8])}. {_remedy(folder)}")
    return model


def _dtype_argument() -> str:
    """Return the name of from_pretrained's argument for the dtype, which changed with transformers 4.56."""
    from transformers import __version__

    return "dtype" if tuple(map(int, __version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


def fingerprint(embedder: T5Embedder) -> str:
    """Return sixteen digits that tell encoders apart by what decides their features: vocabulary, first and last weights."""
    weights = *_first_weights(embedder.model.state_dict()), embedder.model.encoder.final_layer_norm.weight
    return _digest(embedder.tokenizer, [weight.detach().float() for weight in weights])


def encoder_identity(embedder: T5Embedder) -> str:
    """Return sixteen digits that are equal for one encoder in any precision: of its vocabulary and its weights' signs."""
    return _identity(embedder.tokenizer, embedder.model.state_dict())


def _identity(tokenizer: "PreTrainedTokenizerBase", state: Mapping[str, Tensor]) -> str:
    return _digest(tokenizer, [weight.detach().signbit() for weight in _first_weights(state)])


def _first_weights(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return state["shared.weight"][:64], state["encoder.block.0.layer.0.SelfAttention.q.weight"]


def _digest(tokenizer: "PreTrainedTokenizerBase", values: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    for value in values:
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
