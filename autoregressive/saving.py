"""A pipeline's folder (autoregressive/folder.py), or repository of the hub, written."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData

from autoregressive.folder import INDEX, TEXT_ENCODER
from autoregressive.hub import TAGS, hub_class
from autoregressive.pipeline import ImagePipeline
from tokenizer.tokenizer_image.hub import for_hub
from utils.files import atomic_write
from utils.origin import origin
from utils.pretrained import HubModel, model_card

RELEASED_T5 = "flan-t5-xl"
# File by its place in the folder, and the class in it: diffusers loads each by such a file of its own.
_CODE = {
    "pipeline": "AutoregressivePipeline",
    "gpt/gpt_component": "GPT",
    "tokenizer/tokenizer_component": "ImageTokenizer",
}


def save(pipeline: ImagePipeline, folder: str | Path, *, name: str | None = None, license: str | None = None) -> None:
    """Write a pipeline to a folder that is new, empty, or has an earlier pipeline.

    name: what the model card loads it by, by default the folder's. license: of the weights, for the card.
    Raises ValueError where the folder holds something else, or the pipeline is quantised, decodes in bfloat16, or has a tokenizer
    or a text encoder of a kind that has no file format here.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not (folder / INDEX).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and holds no pipeline: give a folder that is new or empty")
    gpt, tokenizer = pipeline.gpt, pipeline.tokenizer
    if any(type(weight.detach()) is not torch.Tensor for weight in gpt.parameters()):
        raise ValueError("the GPT is quantised: save the pipeline of the weights it was made of")
    if any(weight.dtype != torch.float32 for weight in tokenizer.parameters()):
        raise ValueError("the tokenizer decodes in bfloat16: load the pipeline with decode_precision='none' to save it")
    text = _text_encoder(pipeline) if pipeline.text else None

    parts: dict[str, HubModel] = {"gpt": hub_class(gpt.args.trunk).holding(gpt), "tokenizer": for_hub(tokenizer)}
    belongs = {"tokenizer": tokenizer.fingerprint()}
    parts["gpt"].file_config = {**gpt.file_config, **origin(**gpt.args.identity, **belongs)}
    for part, model in parts.items():
        model.save_pretrained(folder / part)
        (folder / part / "README.md").unlink()  # it would say to load the part alone
    index: dict[str, Any] = {"_class_name": ["pipeline", _CODE["pipeline"]]}
    index |= {part: [f"{part}_component", _CODE[f"{part}/{part}_component"]] for part in parts}
    if text:
        index["text"], t5 = text
        if t5 and t5.absolute() != (folder / TEXT_ENCODER).absolute():
            shutil.copytree(t5, folder / TEXT_ENCODER, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    for place, kind in _CODE.items():
        (folder / f"{place}.py").write_text(f"from autoregressive.diffusers_pipeline import {kind}  # noqa: F401\n")
    _card(parts["gpt"], name or folder.absolute().name, license).save(folder / "README.md")
    with atomic_write(folder / INDEX) as f:  # last: a folder with it is whole
        f.write(json.dumps(index, indent=2).encode())


def push(pipeline: ImagePipeline, repo_id: str, *, private: bool | None = None, license: str | None = None) -> str:
    """Write a pipeline to a repository of the hub, made where it is not there yet. Returns the commit's address."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        save(pipeline, folder, name=repo_id, license=license)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="a pipeline of GPT and tokenizer")


def _text_encoder(pipeline: ImagePipeline) -> tuple[dict[str, Any], Path | None]:
    """Return how prompts are encoded, and the T5's folder where that is to be copied."""
    from language.t5 import find_t5

    known = {"t5_tokens": pipeline.t5_tokens, "left_padding": pipeline.left_padding}
    if pipeline.text_encoder is None:
        released = pipeline.t5_model_type.split("/")[-1] == RELEASED_T5
        t5 = None if released else find_t5(pipeline.t5_path, pipeline.t5_model_type)
    elif (t5 := getattr(pipeline.text_encoder, "folder", None)) is None:
        kind = type(pipeline.text_encoder).__name__
        raise ValueError(f"the text encoder is a {kind}; what can be saved is a T5Embedder")
    if t5 is None or t5.name == RELEASED_T5:
        return {"t5_model_type": RELEASED_T5, **known}, None
    return {"t5_model_type": TEXT_ENCODER, **known}, t5


def _card(gpt: HubModel, name: str, license: str | None) -> ModelCard:
    """Return the model card. gpt: the pipeline's, with its file_config. name: what the card loads the pipeline by."""
    text = gpt.config.model_type == "t2i"
    asked = '["a red lantern"]' if text else "[0, 1]"
    task = "text-to-image" if text else "unconditional-image-generation"
    data = ModelCardData(license=license, library_name="diffusers", pipeline_tag=task, tags=TAGS)
    use = f"""{gpt.describe()}

## How to use it

With the project installed (`pip install -e .` in its folder):

```python
from autoregressive.pipeline import ImagePipeline

pipeline = ImagePipeline.from_pretrained("{name}")
images = pipeline({asked}, guidance_scale=2.0, seed=0)  # PIL images
images[0].save("image.png")
```

Or through diffusers, which draws the same pictures:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="{name}", trust_remote_code=True)
pipeline({asked}, guidance_scale=2.0, seed=0).images[0].save("image.png")
```"""
    return model_card(data, name, [use], gpt.file_config.get("classes"))
