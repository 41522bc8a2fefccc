"""Files of sharded checkpoints: torch.distributed.checkpoint's folders with checksums, read without running a pickle's code."""

import json
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import StorageMeta

from utils.checkpoint import AVERAGED_FILE, CONSOLIDATED_FILE, RECORD_FILE, save_bare_weights
from utils.files import crc32_of, write_json


@dataclass
class ShardedCheckpoint:
    """A folder of shards whose files are as they were written. `record` is its training.json."""

    path: Path
    record: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """Return the record of what the weights belong to, as `Checkpoint.config`."""
        return self.record.get("config", {})

    @property
    def args(self) -> dict[str, Any]:
        """Return the flags of the run."""
        return self.record["args"]


def open_folder(path: Path, rank: int = 0, world_size: int = 1) -> ShardedCheckpoint:
    """Open a folder and compare the checksums of this process's part of the files. Raises ValueError for a damaged one."""
    files = {place.relative_path for place in SafeReader(path).read_metadata().storage_data.values()}
    record, sums = read_record(path / RECORD_FILE), {}
    for file in sorted(path.glob("*.crc32.json")):
        sums |= read_record(file)
    for name in sorted(files)[rank::world_size]:
        file = path / name
        if not file.is_file() or crc32_of(file) != sums.get(name):
            raise ValueError(f"{file} is damaged ({'its checksum differs' if file.is_file() else 'missing'}).")
    return ShardedCheckpoint(path, record)


def consolidate(folder: Path) -> None:
    """Write `consolidated.pth`, and `consolidated_ema.pth` where there is an average, from a folder's shards.

    Takes the memory of the whole model once. Needs no other process.
    """
    for part, name in (("model", CONSOLIDATED_FILE), ("ema", AVERAGED_FILE)):
        state = whole_weights(folder, part)
        if state:
            save_bare_weights(folder / name, state, read_record(folder / RECORD_FILE).get("config", {}))


def whole_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """Return the state dict "model" or "ema" put together from a folder's shards; empty where there is none."""
    prefix = f"{part}."
    entries: dict[str, Any] = SafeReader(folder).read_metadata().state_dict_metadata
    state = {
        key.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if key.startswith(prefix)
    }
    if state:
        load_shards({part: state}, folder, alone=True)
    return state


def first_failure(error: BaseException) -> str:
    """Return one line on what went wrong; DCP wraps the errors of all processes."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def load_shards(tree: dict[str, Any], folder: Path, alone: bool) -> None:
    """Fill a tree of tensors from a folder. alone: this process by itself, whatever the others do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tree, storage_reader=SafeReader(folder), no_dist=alone)
        except dcp.CheckpointException as error:  # no Exception, it says itself
            raise ValueError(f"{folder} cannot be read ({first_failure(error)})") from error


class ChecksummedWriter(dcp.FileSystemWriter):
    """Writes this process's shards and, in `{rank}.crc32.json`, their checksums."""

    def __init__(self, folder: Path, rank: int):
        # Nothing is copied ahead: all tensors are in host memory, and the library would wait for the device anyway.
        super().__init__(folder, per_thread_copy_ahead=0)
        self.folder, self.rank = folder, rank

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        """Write as the library does, then read the files once more, so that the checksums are of what is on the disk."""
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        write_json(self.folder / f"{self.rank}.crc32.json", {name: crc32_of(self.folder / name) for name in names})
        done = torch.futures.Future()
        done.set_result(results)
        return done


class SafeReader(dcp.FileSystemReader):
    """Reads a folder of shards; its table of contents is a pickle, of which only the library's own classes are built."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """Raise ValueError for a table that is damaged or asks to run anything else."""
        file = Path(self.path) / ".metadata"
        try:
            with open(file, "rb") as f:
                metadata = _TableReader(f).load()
        except _RefusedError as error:
            raise ValueError(f"refused: {file} {error}") from error
        except Exception as error:  # arbitrary bytes make the reader fail in arbitrary ways
            raise ValueError(f"{file} is damaged ({error})") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_TABLE_PARTS = {
    _METADATA: "Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata "
    "TensorProperties _MEM_FORMAT_ENCODING",
    _FILESYSTEM: "_StorageInfo _StoragePrefix",
    "pathlib": "Path PosixPath WindowsPath",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "collections": "OrderedDict",
}


class _RefusedError(Exception):
    """A table asks for something that is no part of one."""


class _TableReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what a table is made of."""
        known = name in _TABLE_PARTS.get(module, "").split()
        if not known and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise _RefusedError(f"asks for {module}.{name}, which no checkpoint needs; nothing was run")
        return super().find_class(module, name)


def read_record(file: Path) -> dict[str, Any]:
    """Read a small JSON file of a checkpoint's folder. Raises ValueError that names it."""
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged or missing ({error}).") from error
