"""Models that are saved for the Hugging Face hub and loaded from it: safetensors, config.json and a model card.

    class TransformerHF(Transformer, HubModel, tags=["…"]): ...          # autoregressive/hub.py
    model.save_pretrained("folder"); model.push_to_hub("owner/name")
    model = TransformerHF.from_pretrained("owner/name")                  # or a folder

The hub's own mixin does the work. Here are strict loading without drawing weights first, in the file's dtype; the
flags of training, which travel in the weights' header; and the card.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import torch
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, get_token, hf_hub_download
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from utils.checkpoint import load_into, parameter_count, read_checkpoint, save_safetensors

# Flags that say where things lay or ran, which is nobody else's business and no use to them.
_PRIVATE = ("path", "dir", "ckpt", "file", "project", "resume", "device", "host", "entity")


def publishable(args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the flags of a run without paths and without those that were not set."""
    return {
        name: value
        for name, value in (args or {}).items()
        if value is not None
        and not any(name == word or name.endswith("_" + word) for word in _PRIVATE)
        and not (isinstance(value, str) and ("/" in value or "\\" in value))
    }


# Every subclass is a module by its other base, which comes first.
_Module = torch.nn.Module if TYPE_CHECKING else object


class HubModel(PyTorchModelHubMixin, _Module):
    """Mixin of models that the hub keeps; comes after the model among the bases.

    The model's constructor takes one dataclass, `config`, which becomes config.json.
    training_args: the flags of the run that made the weights, steps: its optimizer steps; None where nobody knows.
    file_config: the record of what the weights belong to (`Checkpoint.config`), which the weights' header carries.
    """

    config: Any
    training_args: dict[str, Any] | None = None
    steps: int | None = None
    file_config: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def holding(cls, model: torch.nn.Module, args: Mapping[str, Any] | None = None, steps: int | None = None) -> Self:
        """Return the same weights (not a copy of them) as a model for the hub. args: flags; those that are paths are left out."""
        with torch.device("meta"):
            made = cls(model.config)
        made.load_state_dict(model.state_dict(), assign=True)
        made.training_args, made.steps = publishable(args) or None, steps
        made.file_config = vars(model).get("file_config", made.file_config)
        return made.train(model.training)

    def _save_pretrained(self, save_directory: Path) -> None:
        args, config = publishable(self.training_args) or None, dict(self.file_config) or None
        header = {"args": args, "steps": self.steps, "config": config}
        header = {key: value for key, value in header.items() if value is not None}
        save_safetensors(Path(save_directory) / SAFETENSORS_SINGLE_FILE, self.state_dict(), header)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, config: Any = None, map_location: str | torch.device = "cpu", **download
    ) -> Self:
        """Load a model in eval mode, on `map_location`, in the dtype of the file.

        Raises ValueError where weights and config.json disagree, FileNotFoundError where one of them is not there.
        """
        if config is None:
            raise FileNotFoundError(f"{model_id} has no config.json: it was not saved by save_pretrained")
        if Path(model_id).is_dir():
            file = Path(model_id) / SAFETENSORS_SINGLE_FILE
        else:
            file = Path(hf_hub_download(model_id, SAFETENSORS_SINGLE_FILE, **download))
        checkpoint = read_checkpoint(file)
        with torch.device("meta"):
            model = cls(config)
        load_into(model, checkpoint.model, file, assign=True)
        model.training_args, model.steps = checkpoint.args, checkpoint.steps
        model.file_config = checkpoint.config or model.file_config
        return model.to(map_location).eval()

    def describe(self) -> str:
        """Describe the model in one line."""
        return f"{type(self).__name__} with {parameter_count(self.state_dict())} parameters"

    def how_to_load(self, name: str) -> str:
        """Return Python lines that load and use the model called `name`."""
        return f'{type(self).__name__}.from_pretrained("{name}")'

    def generate_model_card(self, *, repo_id: str = "owner/name", license: str | None = None, **_: Any) -> ModelCard:
        """Return the README.md of the model's folder. repo_id: the name to load it by. license: of the weights."""
        data = ModelCardData(**self._hub_mixin_info.model_card_data.to_dict())
        data.license = license or data.license
        training, args = [], publishable(self.training_args)
        if self.steps is not None:
            training.append(f"{self.steps:,} optimizer steps.")
        if args:
            rows = [f"| `{name}` | `{json.dumps(value, default=str)}` |" for name, value in sorted(args.items())]
            training.append("\n".join(["| flag | value |", "|---|---|", *rows]))
        parts = [self.describe(), "## How to load it", f"```python\n{self.how_to_load(repo_id)}\n```"]
        return model_card(data, repo_id, parts, self.file_config.get("classes"), training)


def model_card(
    data: ModelCardData, name: str, parts: Sequence[str], classes: Sequence[str] | None, training: Sequence[str] = ()
) -> ModelCard:
    """Return a README.md: its metadata, the name, the parts, and what there is of classes, training and license."""
    whole = [f"---\n{data.to_yaml()}\n---", f"# {name.split('/')[-1]}", *parts]
    if classes:
        whole += ["## Classes", ", ".join(f"{label} {each}" for label, each in enumerate(classes))]
    whole += ["## Training", *training] if training else []
    whole += ["## License", f"The weights: {data.license}."] if data.license else []
    return ModelCard("\n\n".join(whole) + "\n")


def check_destination(repo_id: str | None, output: str | Path | None) -> None:
    """Raise ValueError where a push would fail at its end: no place to go, a bad name, no token, a folder in use."""
    if repo_id is None and output is None:
        raise ValueError("give --repo-id owner/name to push to, or --output for a folder")
    if repo_id is not None:
        if repo_id.count("/") != 1:
            raise ValueError(f"--repo-id {repo_id} is not owner/name")
        validate_repo_id(repo_id)
        if get_token() is None:
            raise ValueError(
                "no token of the hub: set HF_TOKEN, or run `hf auth login` (or save a folder with --output)"
            )
    if output is not None and Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise ValueError(f"--output {output} is there already: give a folder that is new or empty")


def send(
    model: HubModel, repo_id: str | None, output: str | Path | None, *, private: bool, license: str | None
) -> None:
    """Save the model to a folder, push it, or both, and say where it is.

    Raises ConnectionError, or ValueError where the hub refuses (no right to the repository, a wrong token).
    """
    card = {"repo_id": repo_id or Path(output or "").absolute().as_posix().split("/")[-1], "license": license}
    if output is not None:
        model.save_pretrained(output, model_card_kwargs=card)
        print(f"{output}: {model.describe()}")
    if repo_id is None:
        return
    try:
        # True or the hub's default: False would open a repository of an organisation that keeps its own closed.
        url = model.push_to_hub(repo_id, private=private or None, model_card_kwargs=card)
    except HfHubHTTPError as error:
        raise ValueError(f"the hub refused {repo_id}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # which network errors there are depends on the HTTP library below the hub's
        raise ConnectionError(f"could not push to {repo_id}: {error}") from error
    print(f"{url}: {model.describe()}")
