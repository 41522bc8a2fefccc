"""The one training loop: data order, mixed precision, accumulation, clipping, EMA, logs, checkpoints, resume.

    trainer = Trainer(args, dist, run_name="GPT-B", models={"model": model}, phases=[phase], dataset=dataset)
    trainer.fit()

A script builds a model, a data set and a loss, and hands them over. A job with one optimizer has one `Phase`; the
tokenizer's has two, generator and discriminator, which the loop goes through in turn on the same batch.

Every random number is a function of the seed, the process and the step, and the data order is one of the seed, the
epoch and the batch: a run that was stopped and resumed takes the very steps it would have taken.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.checkpoint import Checkpoint, load_into, prune_checkpoints, read_checkpoint, save_checkpoint
from utils.data_order import BatchOrder
from utils.distributed import Distributed
from utils.ema import EMA
from utils.loading import loader_workers
from utils.logger import RunLogger
from utils.rng import item_seed
from utils.runs import open_run

AUTOCAST = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Micro:
    """Where a micro-batch stands: the optimizer step, its number in the step, and its places in the global batch."""

    step: int
    number: int
    positions: slice
    global_batch: int


@dataclass
class Phase:
    """One optimizer's part of a step.

    key: its optimizer's name in checkpoint files. module: what the loss calls (parallelized). loss: takes the batch on
    the device and its `Micro`, returns the loss and scalars to log. active: whether it takes part in a step at all.
    """

    key: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any, Micro], tuple[Tensor, dict[str, Tensor]]]
    active: Callable[[int], bool] = lambda step: True


def adamw(model: nn.Module, args: Namespace) -> torch.optim.AdamW:
    """AdamW that decays tensors with two or more dimensions only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cuda", "cpu") for p in parameters)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=fused)


def learning_rate(args: Namespace, step: int, total: int) -> float:
    """The rate at a step (from 0): linear warm-up over --warmup-steps, then constant, or a cosine that ends at 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.lr_schedule == "cosine":
        done = (step - args.warmup_steps) / max(total - args.warmup_steps, 1)
        return args.lr * 0.5 * (1 + cos(pi * min(done, 1)))
    return args.lr


class Trainer:
    """Runs the phases over the data set until the epochs or --max-steps are done.

    models: what is saved, by its name in checkpoint files; "model" is the one that EMA follows.
    sample: called at --ckpt-every with the step, on the first process: returns pictures by name, uint8 (H, W, 3).
    validate: called at --ckpt-every on every process with the model: returns figures by name.
    """

    def __init__(
        self,
        args: Namespace,
        dist: Distributed,
        *,
        run_name: str,
        models: dict[str, nn.Module],
        phases: list[Phase],
        dataset: Dataset,
        initial: Checkpoint | None = None,
        validate: Callable[[nn.Module], dict[str, float]] | None = None,
        sample: Callable[[nn.Module], dict[str, Any]] | None = None,
    ):
        self.args, self.dist, self.models, self.phases, self.dataset = args, dist, models, phases, dataset
        self.validate, self.sample = validate, sample
        self.ema = EMA(models["model"], args.ema_decay) if args.ema else None
        self.order = BatchOrder(
            len(dataset),
            args.global_batch_size,
            args.gradient_accumulation_steps,
            dist.rank,
            dist.world_size,
            args.global_seed,
        )
        self.autocast_dtype = AUTOCAST[args.mixed_precision]
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=args.mixed_precision == "fp16")
        self.step = self.saved_step = 0
        self.samples_seen = 0

        self.run, resumed = dist.broadcast(open_run(args, run_name) if dist.is_main else None)
        project = None if args.no_wandb else args.wandb_project
        self.log = RunLogger(self.run.folder, dist.is_main, project, vars(args))
        if not (resumed and self._resume()) and initial is not None:
            self._restore(initial)
            self.log.info(f"starting from {initial.path}" + (f", step {self.step}" if self.step else ""))
        ahead = args.epochs * self.order.batches_per_epoch - self.samples_seen // args.global_batch_size
        self.total_steps = min(self.step + max(ahead, 0), args.max_steps or float("inf"))

    def fit(self) -> Path | None:
        """Trains to the end and returns the last checkpoint's path (None on processes other than the first)."""
        with closing(self.log):
            self._fit()
        checkpoints = self.run.checkpoints()
        return checkpoints[0] if self.dist.is_main and checkpoints else None

    def _fit(self) -> None:
        parameters = sum(p.numel() for p in self.models["model"].parameters())
        self.log.info(
            f"{self.run.folder}: {parameters:,} parameters, {len(self.dataset):,} samples, "
            f"{self.order.batches_per_epoch} steps an epoch, {self.total_steps} steps, {self.dist.world_size} process(es) "
            f"on {self.dist.device}"
        )
        if self.step >= self.total_steps:
            self.log.info(f"nothing left to do: step {self.step} of {self.total_steps}")
        for model in self.models.values():
            model.train()
        self._start_window()
        for batch in self._batches():
            self._train_step(batch)
            if self.step % self.args.log_every == 0 or self.step == self.total_steps:
                self._log_window()
            if self.step % self.args.ckpt_every == 0 and self.step < self.total_steps:
                self._evaluate_and_save(final=False)
        if self.saved_step < self.step:
            self._evaluate_and_save(final=True)
        skipped = set().union(*self.dist.gather(getattr(self.dataset, "skipped_indices", [])))
        if skipped:
            self.log.warning(f"{len(skipped)} unreadable files were skipped")
        self.log.info("done")

    def _batches(self) -> Iterator[list[Any]]:
        """This process's micro-batches of each remaining step."""
        workers = loader_workers(self.args.num_workers, self.dist)
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.order,
            num_workers=workers,
            pin_memory=self.dist.device.type == "cuda",
            prefetch_factor=4 if workers else None,
            persistent_workers=workers > 0,
        )
        while self.step < self.total_steps:
            epoch, batch = divmod(self.samples_seen // self.args.global_batch_size, self.order.batches_per_epoch)
            self.order.start_at(epoch, batch)
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            micros = iter(loader)
            while self.step < self.total_steps:
                group = list(islice(micros, self.args.gradient_accumulation_steps))
                if not group:
                    break
                yield group

    def _train_step(self, batch: list[Any]) -> None:
        rate = learning_rate(self.args, self.step, self.total_steps)
        torch.manual_seed(item_seed(self.args.global_seed, self.dist.rank, self.step))
        device = self.dist.device
        batch = [_to_device(micro, device) for micro in batch]
        for phase in self.phases:
            if not phase.active(self.step):
                continue
            for group in phase.optimizer.param_groups:
                group["lr"] = rate
            phase.optimizer.zero_grad(set_to_none=True)
            for number, micro in enumerate(batch):
                place = Micro(self.step, number, self.order.positions(number), self.args.global_batch_size)
                with ExitStack() as stack:
                    if number < len(batch) - 1 and hasattr(phase.module, "no_sync"):
                        stack.enter_context(phase.module.no_sync())
                    with torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                        loss, logs = phase.loss(micro, place)
                    self.scaler.scale(loss / len(batch)).backward()
                for name, value in logs.items():
                    total, count = self.sums.get(name, (0, 0))
                    self.sums[name] = total + value.detach().float(), count + 1
            self.scaler.unscale_(phase.optimizer)
            if self.args.max_grad_norm:
                parameters = [p for group in phase.optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
            self.scaler.step(phase.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update(self.models["model"])
        self.step += 1
        self.samples_seen += self.args.global_batch_size
        self.window += 1

    def _start_window(self) -> None:
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self.window, self.window_start = 0, time.perf_counter()

    def _log_window(self) -> None:
        if not self.window:
            return
        values = self._window_means()
        rate = self.window / (time.perf_counter() - self.window_start)
        shown = ", ".join(f"{name}: {value:.4f}" for name, value in values.items())
        self.log.info(f"(step={self.step:07d}) {shown}, steps/sec: {rate:.2f}")
        lr = self.phases[0].optimizer.param_groups[0]["lr"]
        self.log.scalars(self.step, {**values, "lr": lr, "steps_per_second": rate})
        self._require_finite(values)
        self._start_window()

    def _window_means(self) -> dict[str, float]:
        """The means of what the losses told since the last log line, each over the steps it took part in."""
        names = sorted(self.sums)
        means = [total / count for total, count in map(self.sums.get, names)]
        return dict(zip(names, self.dist.mean(torch.stack(means)).tolist(), strict=True)) if names else {}

    def _require_finite(self, values: dict[str, float]) -> None:
        if not all(map(isfinite, values.values())):
            shown = ", ".join(f"{name}: {value:.4f}" for name, value in values.items())
            last = self.run.checkpoints()[:1]
            raise ValueError(
                f"the loss is no longer finite ({shown}) before step {self.step}; "
                f"the last checkpoint is {last[0] if last else 'none'}. Try a lower --lr, or --mixed-precision none"
            )

    @torch.no_grad()
    def _evaluate_and_save(self, final: bool) -> None:
        """Pictures, figures and a checkpoint of this step; none of a model that a loss has spoilt."""
        norms = torch.stack(torch._foreach_norm(list(self.models["model"].parameters())))
        self._require_finite({**self._window_means(), "norm_of_weights": float(self.dist.mean(norms.norm()))})
        model = self.ema.module if self.ema else self.models["model"]
        training = model.training
        model.eval()
        if self.validate:
            values = self.validate(model)
            self.log.info(f"(step={self.step:07d}) " + ", ".join(f"{k}: {v:.4f}" for k, v in values.items()))
            self.log.scalars(self.step, values)
        if self.sample and self.dist.is_main:
            for name, image in self.sample(model).items():
                self.log.image(self.step, name, image)
        model.train(training)
        self._save(final)

    def _save(self, final: bool) -> None:
        if self.dist.is_main:
            failure = None
            state: dict[str, Any] = {name: model.state_dict() for name, model in self.models.items()}
            if self.ema:
                state["ema"] = self.ema.module.state_dict()
            state |= {phase.key: phase.optimizer.state_dict() for phase in self.phases}
            state |= {"steps": self.step, "args": self.args}
            state["trainer"] = {"samples_seen": self.samples_seen, "scaler": self.scaler.state_dict()}
            for store in self.run.stores:
                path = store / f"{self.step:07d}.pt"
                try:
                    save_checkpoint(path, state)
                except OSError as error:
                    failure = error
                    again = min(self.step + self.args.ckpt_every, self.total_steps)
                    then = "" if final else f"; training goes on, the next try is at step {again}"
                    self.log.warning(f"{error}{then}")
                else:
                    self.log.info(f"saved {path}")
                    if self.args.keep_last > 0:
                        prune_checkpoints(store, self.args.keep_last)
            if final and failure:
                raise failure
        self.saved_step = self.step
        self.dist.barrier()

    def _resume(self) -> bool:
        """Goes on from the run's newest readable checkpoint; False where the run was stopped before its first.

        Raises ValueError where it has checkpoints and none can be read.
        """
        found = self.run.checkpoints()
        for path in found:
            try:
                checkpoint = read_checkpoint(path, mmap=False)
            except ValueError as error:
                self.log.warning(f"{error} Trying the checkpoint before it.")
                continue
            self._restore(checkpoint)
            self.log.info(f"resuming {self.run.folder} at step {self.step} from {path}")
            return True
        if found:
            raise ValueError(f"no checkpoint of {self.run.folder} can be read; to start anew, leave out --resume")
        self.log.info(f"{self.run.folder} has no checkpoint yet: starting at its beginning")
        return False

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Takes over everything the file has: weights, and where present optimizer, EMA, step and place in the data."""
        states = {**checkpoint.extra, "model": checkpoint.model, "optimizer": checkpoint.optimizer}
        for name, model in self.models.items():
            if states.get(name) is not None:
                load_into(model, states[name], checkpoint.path)
        if self.ema:
            load_into(self.ema.module, checkpoint.ema or checkpoint.model, checkpoint.path)
        if any(states.get(phase.key) is None for phase in self.phases):
            return  # weights alone: a new run that starts from them
        for phase in self.phases:
            phase.optimizer.load_state_dict(states[phase.key])
        self.step = self.saved_step = checkpoint.steps or 0
        trainer = states.get("trainer") or {}
        self.samples_seen = trainer.get("samples_seen", self.step * self.args.global_batch_size)
        if trainer.get("scaler"):
            self.scaler.load_state_dict(trainer["scaler"])


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list | tuple):
        return [_to_device(item, device) for item in value]
    return value
