"""A saved pipeline (autoregressive/folder.py) through diffusers, which imports this module by the files in the folder.

    pipeline = DiffusionPipeline.from_pretrained("owner/digits", custom_pipeline="owner/digits", trust_remote_code=True)
    images = pipeline([3, 7], guidance_scale=2.0, seed=0).images             # or prompts, or one of them

The pictures are those of ImagePipeline.from_pretrained("owner/digits").
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from autoregressive.folder import find_folder, text_settings
from autoregressive.models.trunk import Trunk
from autoregressive.pipeline import ImagePipeline, load_gpt
from tokenizer.base import Tokenizer
from tokenizer.load import load_tokenizer


class GPT(Trunk):
    """The GPT of a folder, as diffusers loads a component."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None) -> Trunk:
        """Load the GPT in a dtype, float32 where none is asked for."""
        return load_gpt(folder, dtype=torch_dtype or torch.float32)


class ImageTokenizer(Tokenizer):
    """The tokenizer of a folder. Its weights stay float32, whatever dtype diffusers asks for."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype | None = None) -> Tokenizer:
        """Load the tokenizer in float32."""
        return load_tokenizer(folder)


class AutoregressivePipeline(DiffusionPipeline):
    """Draws an image for each class or prompt.

    text: how prompts are encoded, as ImagePipeline takes it (model_index.json has it).
    """

    def __init__(self, gpt: Trunk, tokenizer: Tokenizer, text: dict | None = None):
        super().__init__()
        self.register_modules(gpt=gpt, tokenizer=tokenizer)
        self.register_to_config(text=text)
        self._made: ImagePipeline | None = None

    @torch.no_grad()
    def __call__(
        self, prompt: str | int | Sequence, *, return_dict: bool = True, **settings: Any
    ) -> ImagePipelineOutput | tuple:
        """Draw images. prompt: a class or prompt, or several. settings: as ImagePipeline's call takes them."""
        asked = [prompt] if isinstance(prompt, str | int) else prompt
        progress = not vars(self).get("_progress_bar_config", {}).get("disable")
        images = self._pipeline()(asked, progress=progress, **settings)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def save_pretrained(self, folder: str | Path, *, license: str | None = None) -> None:
        """Write the folder again, as ImagePipeline does."""
        self._pipeline().save_pretrained(folder, license=license)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, license: str | None = None) -> str:
        """Write the folder to a repository of the hub, as ImagePipeline does. Returns the commit's address."""
        return self._pipeline().push_to_hub(repo_id, private=private, license=license)

    def _pipeline(self) -> ImagePipeline:
        """Return the pipeline of the two models where they are now; a T5 that is loaded is kept until they move."""
        weight = self.gpt.tok_embeddings.weight
        made = self._made
        if made is None or (made.device, made.gpt) != (weight.device, self.gpt) or made.tokenizer is not self.tokenizer:
            self._made = ImagePipeline(self.gpt, self.tokenizer, **self._text_settings())
        return self._made

    def _text_settings(self) -> dict[str, Any]:
        if not self.config.text:
            return {}
        if (folder := find_folder(self.config._name_or_path)) is None:
            raise FileNotFoundError(f"the pipeline's folder {self.config._name_or_path} is gone, and its T5 with it")
        return text_settings(folder)
