"""CLIP's opinion of images and captions: unit vectors, whose product is the cosine that the CLIP score averages.

    clip = CLIP(find_clip("ViT-B/32"), device="cuda")
    score = (clip.images(batch) * clip.texts(captions)).sum(axis=1).mean()

Hessel et al., 2104.08718: the caption is put after "A photo depicts ". Their score is 2.5 times the mean of the positive
part; what text-to-image papers print, and is computed here, is the plain mean cosine.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.hub import WEIGHTS

PREFIX = "A photo depicts "
# The flag's values, and the repositories of those weights in the format that transformers reads.
CLIP_MODELS = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    # What the published evaluators load under this name is open_clip's ViT-g-14 laion2b_s12b_b42k.
    "ViT-G/14": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    "ViT-bigG/14": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_ROOT = Path(__file__).resolve().parent.parent.parent
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def find_clip(name: str, folder: str | Path | None = None) -> Path:
    """The folder of a model of CLIP_MODELS: `folder` where given, else in pretrained_models/, else in the hub's cache.

    Raises FileNotFoundError with the command that gets it, ValueError for an unknown name.
    """
    import huggingface_hub

    if name not in CLIP_MODELS:
        raise ValueError(f"--clip_model4eval {name} is not one of {', '.join(CLIP_MODELS)}")
    repository = CLIP_MODELS[name]
    short = repository.split("/")[1]
    command = f"hf download {repository} --local-dir {WEIGHTS}/{short}"
    if folder is not None:
        places = [Path(folder).expanduser()]
    else:
        places = [Path.cwd() / WEIGHTS / short, _ROOT / WEIGHTS / short]
        cached = huggingface_hub.try_to_load_from_cache(repository, "config.json")
        if isinstance(cached, str):
            places.append(Path(cached).parent)
    for place in places:
        if (place / "config.json").is_file():
            if not any((place / f"{file}{end}").is_file() for file in _WEIGHT_FILES for end in ("", ".index.json")):
                raise FileNotFoundError(
                    f"{place} has a config.json and no weights ({' or '.join(_WEIGHT_FILES)}): {command}"
                )
            return place
    where = f"at {places[0]}" if folder is not None else f"in {WEIGHTS}/ or in the cache of the Hugging Face hub"
    raise FileNotFoundError(f"no CLIP {name} {where}: {command}, or leave the CLIP score out with --no-clip")


class CLIP:
    """A CLIP in float32. `cut` counts the captions so far that were longer than it reads, and so lost their ends.

    Raises ValueError for a folder that is damaged, lacks weights or the tokenizer, or is of another kind of model.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu"):
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # what is missing is an error here, and the rest of no interest
        self.folder, self.device, self.cut = Path(folder), torch.device(device), 0
        try:
            model, report = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the readers of damaged files raise whatever they meet
            raise ValueError(
                f"{folder} is not a whole CLIP in the format of transformers ({error}): download it again"
            ) from error
        lacking = sorted(report["missing_keys"])
        if lacking:
            raise ValueError(
                f"{folder} lacks {len(lacking)} weights of a CLIP ({', '.join(lacking[:3])}, …): another kind of model?"
            )
        self.model = model.eval().float().requires_grad_(False).to(self.device)
        self.size: int = model.config.vision_config.image_size
        self.length: int = model.config.text_config.max_position_embeddings
        self.dim: int = model.config.projection_dim

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) → float32 (B, dim) of length one."""
        seen = self.model.vision_model(pixel_values=preprocess(images, self.size).to(self.device)).pooler_output
        return _unit(self.model.visual_projection(seen))

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Captions, without the prefix → float32 (B, dim) of length one."""
        captions = [PREFIX + caption for caption in captions]
        self.cut += sum(len(tokens) > self.length for tokens in self.tokenizer(captions).input_ids)
        tokens = self.tokenizer(
            captions, padding="longest", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        read = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return _unit(self.model.text_projection(read))


def preprocess(images: np.ndarray, size: int) -> torch.Tensor:
    """uint8 squares (B, H, H, 3) → normalised float32 (B, 3, size, size), by Pillow's bicubic filter.

    Raises ValueError for another dtype or shape.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 squares (images, side, side, 3)")
    resized = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        resized[i] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    values = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _unit(vectors: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()
