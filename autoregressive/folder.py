"""One folder, or one repository of the hub, for a whole pipeline: GPT, tokenizer, and for text the T5 or its name.

pipeline.save_pretrained("digits"); pipeline.push_to_hub("owner/digits")
pipeline = ImagePipeline.from_pretrained("digits")                       # or "owner/digits"

digits/model_index.json     how prompts are encoded, and the classes that diffusers loads
digits/README.md            the model card
digits/gpt, digits/tokenizer    safetensors, config.json; each file's header has its identity and the fingerprints
digits/text_encoder         a T5, unless it is the released flan-t5-xl
digits/pipeline.py          for DiffusionPipeline.from_pretrained, as the *_component.py (diffusers_pipeline.py)
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, hf_hub_download, snapshot_download

from utils.hub import is_released

INDEX, TEXT_ENCODER = "model_index.json", "text_encoder"


def find_folder(name: str | Path) -> Path | None:
    """Return the folder of a pipeline, downloaded where `name` is owner/name; None where it is something else.

    Raises FileNotFoundError where neither the disk nor the hub has the name, ConnectionError.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return folder if (folder / INDEX).is_file() else None
    if str(name).count("/") != 1 or folder.is_absolute() or folder.suffix or is_released(name):
        return None
    try:
        hf_hub_download(str(name), INDEX)
        return Path(snapshot_download(str(name), ignore_patterns=["*.py", "*.md"]))
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(f"{name} is not on this disk and HF_HUB_OFFLINE is set") from error
        why = f"the hub cannot be reached ({error.__cause__})"
        raise ConnectionError(f"{name} is not on this disk, and {why}") from error
    except errors.EntryNotFoundError:
        return None
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(
            f"there is no {name} on this disk, and the hub has none, or does not show it without a login"
        ) from error


def text_settings(folder: Path) -> dict[str, Any]:
    """Return how the prompts of a folder's pipeline are encoded, as ImagePipeline takes it; nothing without prompts."""
    found = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("text") or {}
    return {**found, "t5_path": folder} if found.get("t5_model_type") == TEXT_ENCODER else found
