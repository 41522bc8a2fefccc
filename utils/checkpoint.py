"""Checkpoint files: reads every published format, writes ours.

    checkpoint = read_checkpoint("pretrained_models/c2i_L_384.pt")
    load_into(model, checkpoint.model, checkpoint.path)

Nothing in a file is ever run: pickles are read with `weights_only=True`, which builds tensors and plain values only.
"""

import argparse
import difflib
import hashlib
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from utils.files import atomic_write

State = Mapping[str, torch.Tensor]
AVERAGED_ENTRIES = ("ema", "ema_model", "model_ema", "ema_state_dict")
WEIGHTS_ENTRIES = ("model", "module", "state_dict", "model_state_dict", *AVERAGED_ENTRIES)
# Where a folder keeps weights: this project's and FSDP's, transformers', diffusers'; an index lists the shards beside it.
_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
_SHARD = re.compile(r"(.+-)(\d{5})-of-(\d{5})(\.\w+)")
CONSOLIDATED_FILE, AVERAGED_FILE, RECORD_FILE = "consolidated.pth", "consolidated_ema.pth", "training.json"
_LISTED = 20
_AVERAGED = "model_ema."
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Lightning keeps the state of this callback under its class itself. Reading needs a class of that name, not Lightning's.
_LIGHTNING_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
_PLAIN = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size}


class _StandIn:
    """Stands for a class that a file names and that nothing is to be made of."""


@dataclass
class Checkpoint:
    """One file's content, whatever its layout.

    `model` and `ema` are state dicts with the wrappers' prefixes and a stray `freqs_cis` removed. `format` is the layout:
    'ddp', 'deepspeed', 'lightning', 'fsdp' (a bare state dict), 'tokenizer' ({"model"[, "ema"]}) or 'safetensors'.
    """

    path: Path
    model: State
    ema: State | None
    optimizer: dict | None
    args: dict[str, Any] | None  # flags of the run that wrote the file; None, as its steps, where the file does not say
    steps: int | None
    format: str
    extra: dict[str, Any] = field(default_factory=dict)  # other entries as they are
    config: dict[str, Any] = field(default_factory=dict)  # what the weights belong to; empty in published files
    files: list[Path] = field(default_factory=list)  # that were read: one, or all shards

    def require_averages(self) -> None:
        """Raise ValueError where the file has no averaged weights."""
        if self.ema is None:
            raise ValueError(
                f"{self.path} has no averaged weights, for which --use-ema asks; leave the flag out to use its raw weights"
            )


def read_checkpoint(path: str | Path, prefer_ema: bool = False, mmap: bool = True, merge: bool = True) -> Checkpoint:
    """Read a .pt, .pth, .bin, .ckpt or .safetensors file, a folder of one, or shards by folder, index or any one of them.

    With `prefer_ema` the averaged weights become `model` where the file has them. With `mmap` the tensors are read from
    the disk when first used, so that looking at a file's shapes costs nothing; without, their checksums are compared.
    An adapter (LoRA; a checkpoint of training, or a folder of peft's) is added to its base, unless `merge` is off.

    Raises FileNotFoundError (no such file; names those that look similar) and ValueError (damaged, a web page or a Git
    LFS pointer instead of weights, no weights inside, or a pickle that asks to run code).
    """
    adapter = Path(path) if (Path(path) / "adapter_config.json").is_file() else None
    path = adapter / "adapter_model.safetensors" if adapter else _locate(Path(path))
    files = files_of(path)
    starts = [_first_bytes(file) for file in files]
    if starts[0][8:9] == b"{":
        checkpoint = _read_safetensors(path, files)
    elif path.suffix == ".safetensors":  # which PyTorch reads, or not, from release to release
        raise _damaged(path, "it is called safetensors and is none")
    else:
        contents = []
        for file, start in zip(files, starts, strict=True):
            zipped = start[:2] == b"PK"
            if zipped and not mmap:
                _compare_checksums(file)
            contents.append(_read_pickle(file, mmap and zipped))
        checkpoint = _sort_out(path, contents[0] if len(files) == 1 else _merged(files, contents))
        if checkpoint.format == "fsdp":
            _add_companions(checkpoint, mmap)
    checkpoint.files = files
    if path.name.endswith(".index.json"):
        _require_indexed(path, checkpoint.model)
    _take_averages(checkpoint)
    if adapter:
        import_module("utils.lora").take_settings(checkpoint, adapter)
    if merge and "lora" in checkpoint.config:
        import_module("utils.lora").add_base(checkpoint)
    if prefer_ema and checkpoint.ema is not None:
        checkpoint.model = checkpoint.ema
    return checkpoint


def _take_averages(checkpoint: Checkpoint) -> None:
    """Take the averaged weights out of a state dict that has them beside the raw ones, as those of latent diffusion and IBQ do.

    Their names are "model_ema." and the raw name without its dots. The entries as they were become `extra["model_ema"]`.
    Raises ValueError where two raw names are that of one average without their dots, or there are averages alone.
    """
    entries = {name: tensor for name, tensor in checkpoint.model.items() if name.startswith(_AVERAGED)}
    if not entries:
        return
    raw = {name: tensor for name, tensor in checkpoint.model.items() if name not in entries}
    averages = {name.removeprefix(_AVERAGED): tensor for name, tensor in entries.items()}
    meant = {name: plain for name in raw if (plain := name.replace(".", "")) in averages}
    if len({*meant.values()}) < len(meant):
        raise ValueError(f"{checkpoint.path}: two of its weights have the name of one average without their dots")
    if not raw:
        raise ValueError(f"{checkpoint.path} has averaged weights without their raw ones, whose names they need")
    checkpoint.model, checkpoint.extra["model_ema"] = raw, entries
    checkpoint.ema = {name: averages[plain] for name, plain in meant.items()} or checkpoint.ema


def _add_companions(checkpoint: Checkpoint, mmap: bool) -> None:
    """Add the files beside a consolidated.pth: the averaged weights, the run's flags and its step."""
    averaged, record = (checkpoint.path.with_name(name) for name in (AVERAGED_FILE, RECORD_FILE))
    if checkpoint.path.name != CONSOLIDATED_FILE:
        return
    if averaged.is_file():
        checkpoint.ema = read_checkpoint(averaged, mmap=mmap).model
    if record.is_file():
        try:
            values = json.loads(record.read_bytes())
            checkpoint.args, checkpoint.steps = dict(values["args"]), int(values["steps"])
            checkpoint.config = dict(values.get("config") or checkpoint.config)
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(record, error) from error


def parameter_count(state: Mapping[str, torch.Tensor]) -> str:
    """Return the numbers in a state dict in a word, such as "343M" or "1.4B"."""
    count = sum(tensor.numel() for tensor in state.values())
    if count >= 1e9:
        return f"{count / 1e9:.1f}B"
    return f"{count / 1e6:.0f}M" if count >= 1e6 else f"{count:,}"


def files_of(path: Path) -> list[Path]:
    """Return the files that hold the weights named by `path`: itself, or all shards of its index or of the shard it is."""
    if path.name.endswith(".index.json"):
        try:
            names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
            files = [path.with_name(name) for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, "an index has the name of a file for each weight") from error
    elif shard := _SHARD.fullmatch(path.name):
        names = [f"{shard[1]}{number:05d}-of-{shard[3]}{shard[4]}" for number in range(1, int(shard[3]) + 1)]
        files = [path.with_name(name) for name in names]
    else:
        return [path]
    missing = [file.name for file in files if not file.is_file()]
    if not files:
        raise _damaged(path, "it names no file")
    if missing:
        raise FileNotFoundError(f"{path} is of {len(files)} files, and these are not beside it: {_listing(missing)}")
    return files


def _require_indexed(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError where an index has weights that its shards have not."""
    names = {name: torch.empty(0) for name in json.loads(path.read_bytes())["weight_map"]}
    if absent := sorted(set(_clean(names, path)) - set(state)) if names else []:
        raise ValueError(f"{path} does not fit its shards, which lack {_listing(absent)}: copy all of them again")


def _merged(files: list[Path], contents: list[Any]) -> State:
    merged: State = {}
    for file, content in zip(files, contents, strict=True):
        if not _is_state(content):
            raise ValueError(f"{file} is a shard that is no state dict: give the whole checkpoint's file")
        twice = [name for name in content if name in merged]
        if twice:
            raise ValueError(f"{file} has weights that another shard has too: {_listing(twice)}")
        merged |= content
    return merged


def _locate(path: Path) -> Path:
    if path.is_dir():
        for name in (CONSOLIDATED_FILE, *_NAMES, *(f"{name}.index.json" for name in _NAMES)):
            if (path / name).is_file():
                return path / name
        shards = {found.group(1, 3, 4): file for file in path.iterdir() if (found := _SHARD.fullmatch(file.name))}
        if len(shards) == 1:
            return shards.popitem()[1]
        if (path / ".metadata").is_file():
            raise FileNotFoundError(
                f"{path} holds shards without {CONSOLIDATED_FILE}; write it with "
                f"`python3 tools/export_checkpoint.py --checkpoint {path} --format consolidated`"
            )
        inside = _listing(sorted(p.name for p in path.iterdir())) or "nothing"
        known = " or ".join((CONSOLIDATED_FILE, *_NAMES[:2]))
        raise FileNotFoundError(f"{path} is a folder without {known} (or their shards); it holds: {inside}")
    if path.exists():
        return path
    if path.is_symlink():
        raise FileNotFoundError(f"{path} is a link to {path.readlink()}, which does not exist")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no folder {path.parent}")
    similar = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=5)
    hint = f"; that folder has {', '.join(similar)}" if similar else ""
    raise FileNotFoundError(f"no checkpoint at {path}{hint}")


def _first_bytes(path: Path) -> bytes:
    """Return the head of the file, once it is clear that it is neither empty nor a text that stands in for weights."""
    with path.open("rb") as f:
        start = f.read(1024)
    text = start.lstrip().lower()
    if not start:
        raise ValueError(f"{path} is empty (0 bytes): download or copy it again")
    if text.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", start)
        real = f" of {int(size[1]):,} bytes" if size else ""
        raise ValueError(
            f"{path} is a Git LFS pointer ({path.stat().st_size} bytes), not the weights{real}: "
            "run `git lfs pull` in the repository it came from, or download the file itself"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(
            f"{path} is a web page ({path.stat().st_size} bytes), not weights: download it again from the file's own "
            "address (on the Hugging Face hub: /resolve/ instead of /blob/)"
        )
    return start


def _damaged(path: Path, reason: object) -> ValueError:
    reason = (str(reason).strip().splitlines() or [type(reason).__name__])[0][:200]
    return ValueError(
        f"{path} is damaged or not a checkpoint ({path.stat().st_size:,} bytes): {reason}. Download or copy it again."
    )


def _compare_checksums(path: Path) -> None:
    """Raise ValueError where a file of torch.save is not as it was written: torch itself does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from error
    if wrong:
        raise _damaged(path, f"the checksum of {wrong} differs")


def _read_pickle(path: Path, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace, (_StandIn, _LIGHTNING_CALLBACK)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # arbitrary bytes make the reader fail in arbitrary ways
        wanted = re.search(r"(?:GLOBAL|unsupported class|unrecognized function) (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and wanted:
            raise ValueError(
                f"refused: {path} asks to run {wanted[1]} while loading; nothing was run. If you trust the file, have it "
                "saved again as a plain state dict or as safetensors"
            ) from error
        unknown = isinstance(error, pickle.UnpicklingError | LookupError | TypeError)
        raise _damaged(path, "its pickle is not one that torch.save writes" if unknown else error) from error


def _read_safetensors(path: Path, files: list[Path]) -> Checkpoint:
    states, metadata = [], {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt") as f:
                states.append({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118 (a handle, not a dict)
                metadata |= f.metadata() or {}
        except safetensors.SafetensorError as error:
            raise _damaged(file, error) from error
        if not states[-1]:
            raise ValueError(f"{file} holds no tensors")
    state = _merged(files, states)
    try:
        args = json.loads(metadata.pop("args", "null"))
        steps = json.loads(metadata.pop("steps", "null"))
        config = dict(json.loads(metadata.pop("config", "{}")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its metadata 'args', 'steps' and 'config' should be JSON ({error})") from error
    return Checkpoint(path, _clean(state, path), None, None, args, steps, "safetensors", metadata, config)


def _sort_out(path: Path, content: Any) -> Checkpoint:
    """Tell the published layouts apart by their top-level keys."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no tensors by name: its content is a {type(content).__name__}")
    if _is_state(content):
        root = getattr(content, "_metadata", {}).get("", {})
        config = dict(root.get("config", {}))
        return Checkpoint(path, _clean(content, path), None, None, None, None, "fsdp", config=config)
    entries = {str(key): value for key, value in content.items()}
    for key in WEIGHTS_ENTRIES:  # a model within a model is that model
        while isinstance(inner := entries.get(key), Mapping) and not _is_state(inner):
            found = [inner[name] for name in WEIGHTS_ENTRIES if isinstance(inner.get(name), Mapping)]
            if not found:
                break
            entries[key] = found[0]
    source = next((key for key in WEIGHTS_ENTRIES if _is_state(entries.get(key))), None)
    if source is None and {"state", "param_groups"} <= entries.keys():
        raise ValueError(f"{path} is the state of an optimizer and holds no weights: give the checkpoint of its model")
    if source is None:
        raise ValueError(
            f"{path} holds no weights: expected a state dict, or one under {', '.join(WEIGHTS_ENTRIES)}, and found "
            f"{_listing([f'{key} ({type(value).__name__})' for key, value in entries.items()]) or 'nothing'}"
        )
    layouts = {"module": "deepspeed", "state_dict": "lightning"}
    trained = {"optimizer", "args", "steps"} & entries.keys()
    layout = layouts.get(source, "ddp" if trained else "tokenizer")
    averaged = next((entries.pop(key) for key in AVERAGED_ENTRIES if _is_state(entries.get(key))), None)
    ema = None if averaged is None else _clean(averaged, path)
    model = ema if source in AVERAGED_ENTRIES and ema else _clean(entries.pop(source), path)
    args = entries.pop("args", None)
    config = entries.pop("config", None)
    steps = next((entries.pop(key) for key in ("steps", "global_step", "global_steps") if key in entries), None)
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return Checkpoint(
        path,
        model,
        ema,
        entries.pop("optimizer", None),
        dict(args) if isinstance(args, Mapping) else None,
        steps if isinstance(steps, int) else None,
        layout,
        entries,
        dict(config) if isinstance(config, Mapping) else {},
    )


def _is_state(value: Any) -> bool:
    """Tell whether this is tensors by name."""
    there = isinstance(value, Mapping) and len(value) > 0
    return there and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())


def _clean(state: Mapping[str, torch.Tensor], path: Path) -> State:
    """Return the names as the bare model has them: without what DDP, FSDP, compile, Lightning and other wrappers put in."""
    state = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] != "freqs_cis"}
    names = {key: ".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in state}
    while names and all(name.startswith(("module.", "model.")) for name in names.values()):
        names = {key: name.partition(".")[2] for key, name in names.items()}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path}: some of its weights have the same name once wrappers' prefixes are removed")
    return {names[key]: tensor for key, tensor in state.items()}


def _listing(items: list[str]) -> str:
    more = f", ... ({len(items)} in all)" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def load_into(
    model: torch.nn.Module, state: Mapping[str, torch.Tensor], path: str | Path, assign: bool = False
) -> None:
    """Load `state` (read from `path`) into `model`; every name and shape has to match.

    The weights are copied into the model's own tensors, or with `assign` become the model's tensors, dtype included.
    A model on the meta device has no memory to copy into: for it `assign` is implied.
    Raises ValueError that lists the missing and unexpected names and the shapes that differ.
    """
    own = model.state_dict()
    require_fit(own, {name: tensor.shape for name, tensor in state.items()}, path)
    whole = [name for name in own if own[name].is_floating_point() and not state[name].is_floating_point()]
    if whole:
        what = f"{path} has whole numbers for weights ({_listing(whole)})"
        raise ValueError(f"{what}: give the weights before quantisation")
    model.load_state_dict(state, strict=True, assign=assign or any(tensor.is_meta for tensor in own.values()))


def weights_fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """Return 32 hexadecimal digits of weights: of their names, shapes and up to 256 numbers of each, which training changes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        flat = tensor.detach().flatten()
        digest.update(flat[:: max(len(flat) // 256, 1)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def require_fit(own: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]], path: str | Path) -> None:
    """Raise ValueError where the names and shapes found at `path` are not those of `own`; it lists what differs."""
    missing = [name for name in own if name not in shapes]
    unexpected = [name for name in shapes if name not in own]
    other = [
        f"{name} {tuple(shape)} (model: {tuple(own[name].shape)})"
        for name, shape in shapes.items()
        if name in own and tuple(shape) != tuple(own[name].shape)
    ]
    problems = [
        f"{title} ({len(found)}): {_listing(found)}"
        for title, found in (("missing", missing), ("unexpected", unexpected), ("other shape", other))
        if found
    ]
    if problems:
        raise ValueError(f"{path} does not fit the model:\n  " + "\n  ".join(problems))


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write `content` with torch.save, atomically, in the published layout: `args` becomes an argparse.Namespace.

    `content` is {"model", "optimizer", "steps", "args", "config"[, "ema", ...]}, or any tree of tensors and plain values.
    Raises TypeError for a value that `read_checkpoint` would refuse, OSError that names the file where it cannot be
    written; what stood at `path` before then stays.
    """
    content = dict(content)
    if content.get("args") is not None:
        args = content["args"]
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        content["args"] = argparse.Namespace(**{k: str(v) if isinstance(v, Path) else v for k, v in args.items()})
    _require_readable(content, "")
    _save(path, content)


def save_bare_weights(path: str | Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write a state dict without anything around it (--from-fsdp), atomically.

    `config` goes where PyTorch keeps the versions of a state dict's modules, which programs that load it pass over: unlike a
    file beside it, it cannot be left behind. Raises as `save_checkpoint` does.
    """
    content = OrderedDict(state)
    _require_readable(content, "")
    _require_readable(dict(config), "[config]")
    if config:
        vars(content)["_metadata"] = {"": {"config": dict(config)}}
    _save(path, content)


def _save(path: str | Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as f:
        try:
            torch.save(content, f)
        except RuntimeError as error:
            # torch reports a full disk as a RuntimeError about positions, with the real cause behind it.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _require_readable(value: Any, where: str) -> None:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _require_readable(key, f"{where}[{key!r}] (the key)")
            _require_readable(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            _require_readable(item, f"{where}[{index}]")
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"checkpoint{where} is a {kind}, which could not be read back safely: store a plain value")


def save_safetensors(
    path: str | Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a state dict as safetensors, atomically. Takes the weights' size in memory once more.

    `metadata` goes into the header: strings as they are, anything else as JSON; `args` (a dict or a Namespace),
    `steps` and `config` come back from `read_checkpoint`. Raises OSError as `save_checkpoint` does.
    """
    header = {"format": "pt"}
    for key, value in (metadata or {}).items():
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        header[key] = value if isinstance(value, str) else json.dumps(value, default=str)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_write(path) as f:
        f.write(safetensors.torch.save(tensors, header))
