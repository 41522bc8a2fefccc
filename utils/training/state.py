"""State of a training run, and its way to the disk and back while training continues.

    state = TrainingState(models={"model": model}, optimizers={"optimizer": (model, adam)}, ema=ema, scaler=scaler)
    saver = Saver(state, run, args, dist, log); saver.save(); saver.finish()
    state.take(state.read(path, dist))

A process that holds all of a model writes the published layout, one file `{step:07d}.pt`. A sharded one writes a folder
`{step:07d}/` with torch.distributed.checkpoint, every process its shards, beside them `consolidated.pth` for sampling. Either
is read back by either, on any number of processes. A thread writes both from a copy, with checksums, under a temporary name.
"""

import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as torch_dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from utils.checkpoint import RECORD_FILE, Checkpoint, read_checkpoint, require_fit, save_checkpoint
from utils.distributed import Distributed
from utils.files import sync_folder, write_json
from utils.runs import Run
from utils.training.ema import EMA
from utils.training.parallel import copy_rows, parameters_of
from utils.training.run_folder import prune_checkpoints
from utils.training.run_log import RunLogger
from utils.training.shards import (
    ChecksummedWriter,
    SafeReader,
    ShardedCheckpoint,
    consolidate,
    first_failure,
    load_shards,
    open_folder,
)


class TrainingState:
    """Models, optimizers, average, loss scale, and the place in the run: `step`, `samples_seen`.

    models: by their names in checkpoint files; "model" is the one that `ema` follows. optimizers: by name, each with the
    model it moves. config: the record of what the weights belong to, written into every checkpoint (`Checkpoint.config`).
    """

    def __init__(
        self,
        models: dict[str, nn.Module],
        optimizers: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
        ema: EMA | None,
        scaler: torch.amp.GradScaler,
        config: dict[str, Any] | None = None,
    ):
        self.models, self.optimizers, self.ema, self.scaler = models, optimizers, ema, scaler
        self.config = config or {}
        self.step = self.samples_seen = 0

    @property
    def sharded(self) -> bool:
        """Tell whether this process holds only a part of the weights."""
        return any(isinstance(p, DTensor) for model in self.models.values() for p in model.parameters())

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return state dicts of the models, and the averages as "ema"; their tensors are the state's own."""
        averaged = {"ema": self.ema.state_dict()} if self.ema else {}
        return {name: dict(model.state_dict()) for name, model in self.models.items()} | averaged

    def moments(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Return the optimizers' tensors by parameter name; what has not been made yet is made."""
        return {
            key: cast(dict[str, Any], get_optimizer_state_dict(model, optimizer))["state"]
            for key, (model, optimizer) in self.optimizers.items()
        }

    def file_content(self, args: Namespace) -> dict[str, Any]:
        """Return the content of a file in the published format, as a copy in the host's memory."""
        optimizers = {key: optimizer.state_dict() for key, (_, optimizer) in self.optimizers.items()}
        content = tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), {**self.weights(), **optimizers})
        return content | {
            "steps": self.step,
            "args": args,
            "config": self.config,
            "trainer": {"samples_seen": self.samples_seen, "scaler": self.scaler.state_dict()},
        }

    def record(self, args: Namespace, dist: Distributed) -> dict[str, Any]:
        """Return what of the state is no tensor."""
        flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        return {
            "steps": self.step,
            "samples_seen": self.samples_seen,
            "scaler": self.scaler.state_dict(),
            "processes": dist.world_size,
            "args": flags,
            "config": self.config,
        }

    @staticmethod
    def read(path: Path, dist: Distributed, whole: bool = True) -> Checkpoint | ShardedCheckpoint:
        """Open a checkpoint and compare its checksums, of a folder each process some of the files.

        Without `whole` a file, which every process reads, is mapped and not compared. Raises ValueError for a damaged one.
        """
        if not (path / ".metadata").is_file():
            if whole and (path / RECORD_FILE).is_file():  # what else is there are weights alone
                raise ValueError(f"{path} is damaged (its .metadata is missing).")
            return read_checkpoint(path, mmap=not whole, merge=False)
        return open_folder(path, dist.rank, dist.world_size)

    def take(self, saved: Checkpoint | ShardedCheckpoint, global_batch: int) -> bool:
        """Take over everything the checkpoint has. False where it has weights alone: a new run that starts from them.

        global_batch: samples a step, for published files that do not say. Raises ValueError where it does not fit the models.
        """
        if isinstance(saved, ShardedCheckpoint):
            self._take_folder(saved)
            return True
        states: dict[str, Any] = {**saved.extra, "model": saved.model, "optimizer": saved.optimizer}
        for name, model in self.models.items():
            if states.get(name) is not None:
                own = model.state_dict()
                fill(own, own, states[name], saved.path)
        if self.ema:
            fill(self.ema.averages, self.ema.state_dict(), saved.ema or saved.model, saved.path)
        if any(states.get(key) is None for key in self.optimizers):
            return False
        for key, (_, optimizer) in self.optimizers.items():
            optimizer.load_state_dict(_spread(optimizer, states[key], saved.path))
        trainer = states.get("trainer") or {}
        self.step = saved.steps or 0
        batch = (saved.args or {}).get("global_batch_size", global_batch)
        self.samples_seen = trainer.get("samples_seen", self.step * batch)
        if trainer.get("scaler"):
            self.scaler.load_state_dict(trainer["scaler"])
        return True

    def _take_folder(self, saved: ShardedCheckpoint) -> None:
        entries: dict[str, Any] = SafeReader(saved.path).read_metadata().state_dict_metadata
        wanted: dict[str, Any] = self.weights() | self.moments()
        averaged = any(name.startswith("ema.") for name in entries)
        if not averaged:
            wanted.pop("ema", None)
        for name in self.models:
            shapes = {key.removeprefix(f"{name}."): e.size for key, e in entries.items() if key.startswith(f"{name}.")}
            require_fit(wanted[name], shapes, saved.path)
        load_shards(wanted, saved.path, alone=not torch_dist.is_initialized())
        for key, (model, optimizer) in self.optimizers.items():
            whole = get_optimizer_state_dict(model, optimizer)
            set_optimizer_state_dict(model, optimizer, {**whole, "state": wanted[key]})
        if self.ema and not averaged:
            self.ema.restart()
        self.step, self.samples_seen = saved.record["steps"], saved.record["samples_seen"]
        if saved.record["scaler"]:
            self.scaler.load_state_dict(saved.record["scaler"])


def fill(targets: dict[str, Tensor], all_: dict[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Copy what was found at `path` into `targets`, some of `all_`, which it has to fit; each process its shards."""
    require_fit(all_, {name: tensor.shape for name, tensor in found.items()}, path)
    for name, tensor in targets.items():
        copy_rows(tensor, found[name])


class Saver:
    """Writes checkpoints in the background, at most one at a time.

    A checkpoint that cannot be written is a warning, which says from the second time on what would be lost, and an error
    where it is the run's last: OSError that names it.
    """

    def __init__(self, state: TrainingState, run: Run, args: Namespace, dist: Distributed, log: RunLogger):
        self.state, self.run, self.args, self.dist, self.log = state, run, args, dist, log
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Beside training's own group: its messages must not mix with those of the steps.
        shared = state.sharded and dist.world_size > 1
        self._group = torch_dist.new_group(backend="gloo") if shared else None
        self._job: Future | None = None
        self.saved_step = -1
        self._written, self._failed = False, 0  # whether a store took the last checkpoint; how many none took in a row

    def save(self) -> None:
        """Copy the state and begin to write it; first waits for the one before. Every process calls it."""
        self.wait()
        self.saved_step = self.state.step
        if self.state.sharded:
            self._job = self._save_folder(f"{self.state.step:07d}")
        elif self.dist.is_main:
            content, name = self.state.file_content(self.args), f"{self.state.step:07d}.pt"
            self._job = self._thread.submit(self._into_stores, name, lambda path: save_checkpoint(path, content))

    def poll(self) -> None:
        """Tell of a checkpoint that has been written meanwhile, or could not be."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self, final: bool = False) -> None:
        """Wait until nothing is being written. With `final`, which every process calls together, raises OSError on all of
        them where it could not be written."""
        job, self._job = self._job, None
        failures = job.result() if job is not None else []
        for failure in failures:
            self.log.warning(f"{failure}" + ("" if final else "; training continues, the next checkpoint tries again"))
        if job is not None:
            self._failed, self._written = 0 if self._written else self._failed + 1, False
        if self._failed > 1 and failures and not final:
            last = self.run.checkpoints()[:1]
            lost = f"what was learned since {last[0] if last else 'the beginning'} is in memory alone"
            places = ", ".join(map(str, self.run.stores))
            self.log.warning(f"nothing could be saved {self._failed} times in a row: {lost}; free one of {places}")
        failure = self.dist.broadcast(failures[0] if failures else None) if final else None
        if failure:
            raise failure

    def finish(self) -> None:
        """Wait and let the thread go, whatever became of its last job: for a run that an error ends."""
        self._thread.shutdown(wait=True)

    def _save_folder(self, name: str) -> Future:
        """Begin to write a folder: every process its shards under a temporary name; the first process completes and renames it."""
        unfinished = self.run.stores[0] / f".{name}.tmp"
        record = self.state.record(self.args, self.dist)
        failure = None
        if self.dist.is_main:
            try:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            except OSError as error:
                failure = f"could not write {unfinished} ({error.strerror})"
        failure = self.dist.broadcast(failure)
        if failure:
            return self._thread.submit(lambda: [OSError(failure)] if self.dist.is_main else [])
        written = dcp.async_save(
            self.state.weights() | self.state.moments(),
            storage_writer=ChecksummedWriter(unfinished, self.dist.rank),
            process_group=cast(torch_dist.ProcessGroup | None, self._group),
        )
        return self._thread.submit(self._complete, cast(Future, written), unfinished, name, record)

    def _complete(self, written: Future, unfinished: Path, name: str, record: dict[str, Any]) -> list[OSError]:
        path = self.run.stores[0] / name
        try:
            written.result()  # all processes' shards: the first writes the table of contents when they are there
            if self.dist.is_main:
                write_json(unfinished / RECORD_FILE, record)
                (unfinished / "resume_step.txt").write_text(f"{record['steps']}\n")
                consolidate(unfinished)
                _rename_folder(unfinished, path)
        except (Exception, dcp.CheckpointException) as error:  # DCP wraps whatever befell any process
            if not self.dist.is_main:
                return []
            shutil.rmtree(unfinished, ignore_errors=True)
            return [OSError(f"could not write {path} ({first_failure(error)})")]
        return self._into_stores(name, lambda target: _copy_folder(path, target) if target != path else None)

    def _into_stores(self, name: str, write: Callable[[Path], None]) -> list[OSError]:
        """Write a checkpoint to every store, on the first process; return what could not be written."""
        failures = []
        for store in self.run.stores if self.dist.is_main else ():
            try:
                write(store / name)
            except OSError as error:
                failures.append(error)
                continue
            self._written = True
            self.log.info(f"saved {store / name}")
            if self.args.keep_last > 0:
                prune_checkpoints(store, self.args.keep_last)
        return failures


def _spread(optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """An optimizer's state from a file, its tensors cut as the parameters are; rates and decay are the run's own."""
    parameters = parameters_of([optimizer])
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    there, sizes = (
        [len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups)
    )
    if there != sizes:
        raise ValueError(f"{path}: its optimizer has groups of {there} tensors, this model's has {sizes}")
    state = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        state[number] = dict(saved["state"].get(number, {}))
        for key, value in state[number].items():
            if isinstance(value, Tensor) and value.dim() and isinstance(parameter, DTensor):
                state[number][key] = torch.empty_like(parameter, dtype=value.dtype)
                copy_rows(state[number][key], value)
    groups = [
        {**own, "params": there["params"]}
        for own, there in zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)
    ]
    return {"state": {number: entry for number, entry in state.items() if entry}, "param_groups": groups}


def _rename_folder(unfinished: Path, path: Path) -> None:
    """Give a complete folder its name; one that a run left there before it was set back is replaced."""
    sync_folder(unfinished)
    if path.exists():
        old = path.rename(path.with_name(f".{path.name}.removed.tmp"))
        shutil.rmtree(old, ignore_errors=True)
    unfinished.rename(path)
    sync_folder(path.parent)


def _copy_folder(source: Path, path: Path) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished)
        _rename_folder(unfinished, path)
    except OSError as error:
        raise OSError(f"could not write {path} ({first_failure(error)})") from error
