"""CLIP's opinion of images and captions: unit vectors, whose product is the cosine that the CLIP score averages.

    clip = load_clip(find_clip("ViT-B/32"), device="cuda")
    score = (clip.images(batch) * clip.texts(captions)).sum(axis=1).mean()

Hessel et al., 2104.08718: the caption is put after "A photo depicts ". Their score is 2.5 times the mean of the positive
part; what text-to-image papers print, and is computed here, is the plain mean cosine.

A folder is read by transformers, or by open_clip where only that can: the files it has decide, so that a figure does not
depend on what is installed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evaluations.features import normalised
from utils.hub import WEIGHTS

PREFIX = "A photo depicts "
# The flag's values, and the repositories of those weights in the format that transformers reads.
CLIP_MODELS = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    # What the published evaluators load under this name is open_clip's ViT-g-14 laion2b_s12b_b42k.
    "ViT-G/14": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    "ViT-bigG/14": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}
DIMS = {"ViT-B/32": 512, "ViT-G/14": 1024, "ViT-bigG/14": 1280}  # of the vectors
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_ROOT = Path(__file__).resolve().parent.parent.parent
_TRANSFORMERS = ("config.json", ("model.safetensors", "pytorch_model.bin"))
_OPEN_CLIP = ("open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))


def find_clip(name: str, folder: str | Path | None = None) -> Path:
    """Return the folder of a model of CLIP_MODELS: `folder` where given, else in pretrained_models/, else in the hub's cache.

    Raises FileNotFoundError with the command that gets it, ValueError for an unknown name.
    """
    import huggingface_hub

    if name not in CLIP_MODELS:
        raise ValueError(f"--clip_model4eval {name} is not one of {', '.join(CLIP_MODELS)}")
    repository = CLIP_MODELS[name]
    short = repository.split("/")[1]
    if folder is not None:
        places = [Path(folder).expanduser()]
    else:
        places = [Path.cwd() / WEIGHTS / short, _ROOT / WEIGHTS / short]
        cached = huggingface_hub.try_to_load_from_cache(repository, "config.json")
        places += [Path(cached).parent] if isinstance(cached, str) else []
    for place in places:
        if _has(place, *_TRANSFORMERS) or _has(place, *_OPEN_CLIP):
            return place
    raise FileNotFoundError(
        f"no CLIP {name} with configuration and weights at {' or '.join(map(str, places))}: hf download {repository} "
        f"--local-dir {WEIGHTS}/{short}, or leave the CLIP score out (the evaluator: --no-clip)"
    )


def _has(folder: Path, config: str, weights: Sequence[str]) -> bool:
    files = [folder / f"{file}{end}" for file in weights for end in ("", ".index.json")]
    return (folder / config).is_file() and any(file.is_file() for file in files)


def load_clip(folder: str | Path, device: torch.device | str = "cpu") -> "CLIP":
    """Return the CLIP in a folder, by the library whose format the folder has. Raises ValueError as CLIP and OpenCLIP do."""
    return (CLIP if _has(Path(folder), *_TRANSFORMERS) else OpenCLIP)(folder, device)


class CLIP:
    """A CLIP in float32, by transformers.

    size: pixels a side that it looks at. length: tokens that it reads. dim: numbers of a vector. `cut` counts the captions
    so far that were longer than it reads, and so lost their ends.
    Raises ValueError for a folder that is damaged, lacks weights or the tokenizer, or is of another kind of model.
    """

    library = "transformers"

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu"):
        self.folder, self.device, self.cut = Path(folder), torch.device(device), 0
        self._load()
        self.model.eval().float().requires_grad_(False).to(self.device)

    def _load(self) -> None:
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # what is missing is an error here, and the rest of no interest
        try:
            self.model, report = CLIPModel.from_pretrained(self.folder, local_files_only=True, output_loading_info=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # the readers of damaged files raise whatever they meet
            raise _damaged(self, error) from error
        lacking = sorted(report["missing_keys"])
        if lacking:
            raise ValueError(
                f"{self.folder} lacks {len(lacking)} weights of a CLIP ({', '.join(lacking[:3])}, …): another kind of model?"
            )
        self.size: int = self.model.config.vision_config.image_size
        self.length: int = self.model.config.text_config.max_position_embeddings
        self.dim: int = self.model.config.projection_dim

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> np.ndarray:
        """Return unit vectors of images: uint8 squares (B, H, H, 3) → float32 (B, dim)."""
        return _unit(self._see(normalised(images, self.size, MEAN, STD).to(self.device)))

    @torch.inference_mode()
    def texts(self, captions: Sequence[str], prefix: str = PREFIX) -> np.ndarray:
        """Return unit vectors of captions, given without the prefix → float32 (B, dim)."""
        return _unit(self._read([prefix + caption for caption in captions]))

    def _see(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def _read(self, texts: list[str]) -> torch.Tensor:
        self.cut += sum(len(tokens) > self.length for tokens in self.tokenizer(texts).input_ids)
        tokens = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        read = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return self.model.text_projection(read)


class OpenCLIP(CLIP):
    """The same by open_clip, which has the published ViT-G/14. Raises ValueError also where open_clip is not installed."""

    library = "open_clip"

    def _load(self) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise ValueError(
                f"{self.folder} has weights in the format of open_clip, which is not installed: pip install open_clip_torch"
            ) from error
        name = f"local-dir:{self.folder.absolute()}"
        try:
            self.model = open_clip.create_model(name, precision="fp32")
            self.tokenizer = open_clip.get_tokenizer(name)
            self.size = int(self.model.visual.image_size[0])
            self.length = int(self.tokenizer.context_length)
            self.dim = len(self.model.encode_text(self.tokenizer([""]))[0])
        except Exception as error:
            raise _damaged(self, error) from error

    def _see(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixels)

    def _read(self, texts: list[str]) -> torch.Tensor:
        # Two more tokens than the words have: a text's beginning and its end.
        self.cut += sum(len(self.tokenizer.encode(text)) + 2 > self.length for text in texts)
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


def _damaged(clip: CLIP, error: Exception) -> ValueError:
    return ValueError(f"{clip.folder} is not a whole CLIP in the format of {clip.library} ({error}): download it again")


def _unit(vectors: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()
