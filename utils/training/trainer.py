"""The one training loop: data order, precision, accumulation, clipping, EMA, logs, checkpoints, resume.

    job = Job("GPT-B", models={"model": model}, phases=[phase], dataset=dataset)
    Trainer(args, plan, job).fit()

A script builds a model, a data set and a loss, and hands them over. A job with one optimizer has one `Phase`; the
tokenizer's has two, generator and discriminator, which the loop goes through in turn on the same batch.

Every random number is a function of the seed, the process and the step, and the data order is one of the seed, the
epoch and the batch: a run that was stopped and resumed takes the very steps it would have taken.
"""

import signal
from argparse import Namespace
from collections.abc import Iterator, Sized
from contextlib import ExitStack, closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from utils.errors import AgreedError, words_of
from utils.flops import peak_flops
from utils.loading import ReadAhead, batches_of, loader_workers
from utils.precision import WORDS
from utils.rng import item_seed
from utils.training.ema import EMA, warmed_up
from utils.training.failures import Failures, FiniteWatch
from utils.training.job import Job, Micro, Phase
from utils.training.meter import Means, Meter, format_means, format_seconds, format_window
from utils.training.optim import learning_rate
from utils.training.order import BatchOrder, fit_batch
from utils.training.parallel import Parallel, parameters_of
from utils.training.resume import open_run_together, resume, start_from
from utils.training.run_log import RunLogger
from utils.training.signals import Agreement, StopSignals
from utils.training.state import Saver, TrainingState


class Trainer:
    """Runs a job's phases over its data until the epochs or --max-steps are done.

    args: the flags of `add_training_flags`. plan: how the modules of the phases were parallelized.
    """

    def __init__(self, args: Namespace, plan: Parallel, job: Job):
        self.args, self.plan, self.job, self.dist = args, plan, job, plan.dist
        self.models, self.phases, self.dataset, dist = job.models, job.phases, job.dataset, plan.dist
        size, parts = len(cast(Sized, job.dataset)), args.gradient_accumulation_steps
        notes = fit_batch(args, size, dist.world_size)
        batch = args.global_batch_size
        self.order = BatchOrder(size, batch, parts, dist.rank, dist.world_size, args.global_seed)
        self.ema = EMA(job.models["model"], args.ema_decay) if args.ema else None
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=args.mixed_precision == "fp16")
        optimizers = {phase.key: (job.models[phase.model], phase.optimizer) for phase in job.phases}
        self.state = TrainingState(job.models, optimizers, self.ema, self.scaler, job.config)
        self.meter = Meter(dist, batch, job.tokens, peak_flops(dist.device, args.mixed_precision))
        self.means, self.watch, self.agreement = Means(), FiniteWatch(), Agreement(dist)
        self._rehearsed: set[str] = set()

        self.run, resumed = open_run_together(args, job.name, dist, plan.sharded)
        project = None if args.no_wandb else args.wandb_project
        self.log = RunLogger(self.run.folder, dist.is_main, project, vars(args))
        for line in notes:
            self.log.info(line)
        self.saver = Saver(self.state, self.run, args, dist, self.log)
        self.failures = Failures(self.saver, self.order, job.dataset, self.watch)
        self._begin(resumed)

    def _begin(self, resumed: bool) -> None:
        """Take over the state that the run resumes from, and count the steps it has left."""
        args, initial = self.args, self.job.initial
        if not resumed and initial is None and self.run.earlier:
            self.log.info(f"a run before this one stands at {self.run.earlier}; --resume would continue it")
        resumed = resumed and resume(self.state, self.run, args, self.dist, self.log)
        continued = not resumed and initial is not None and start_from(initial, self.state, args, self.log)
        self.saver.saved_step = self.step
        end = self.step + max(args.epochs * self.order.batches_per_epoch - self._batches_done, 0)
        self.total_steps = min(end, args.max_steps or end)
        if continued and self.step >= self.total_steps:
            asked = f"--max-steps {args.max_steps}" if args.max_steps else f"--epochs {args.epochs}"
            done = f"{initial.path} has done {self.step} steps, all that {asked} asks for with this data"
            raise AgreedError(f"{done}: give more of them, or --finetune to begin at step 0 with its weights")

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def _batches_done(self) -> int:
        return self.state.samples_seen // self.args.global_batch_size

    def fit(self) -> Path | None:
        """Train to the end, or until a signal asks to stop; return the last checkpoint's path (None on processes but the first).

        Raises AgreedError where a loss is not finite, data cannot be read or the held-out loss fails, ConnectionError where
        another process is gone, OSError where the last checkpoint cannot be written, KeyboardInterrupt after Ctrl-C. The
        state is saved before, unless a loss has spoilt it, and log.txt has the error.
        """
        with closing(self.log), StopSignals() as signals:
            try:
                self._fit(signals)
            except Exception as error:
                told = self.failures.lost_process(error) or error
                self.log.record(f"ended at step {self.step} by {type(told).__name__}: {words_of(told)}")
                if told is error:
                    raise
                raise told from error
            finally:
                self.saver.finish()
            if signals.asked == signal.SIGINT:
                raise KeyboardInterrupt
        checkpoints = self.run.checkpoints()
        return checkpoints[0] if self.dist.is_main and checkpoints else None

    def _fit(self, signals: StopSignals) -> None:
        self._log_start()
        for model in self.models.values():
            model.train()
        self.meter.start_window()
        batches = ReadAhead(self._batches())
        if any(self.dist.gather(batches.failure is not None)):
            self.failures.require_data(batches.failure)
        for batch in batches:
            self._train_step(batch)
            if self._agree_to_stop(signals, batches):
                return
            if self.step % self.args.log_every == 0 or self.step == self.total_steps:
                self._log_window()
            if self.step < self.total_steps:
                self._evaluate_and_save()
            self.saver.poll()
        if self.saver.saved_step < self.step:
            self._evaluate_and_save(final=True)
        skipped = set().union(*self.dist.gather(getattr(self.dataset, "skipped_indices", [])))
        if skipped:
            self.log.warning(f"{len(skipped)} unreadable files were skipped")
        self.agreement.close()
        self.log.info("done")

    def _batches(self) -> Iterator[list[Any]]:
        """Yield this process's micro-batches of each remaining step."""
        workers = loader_workers(self.args.num_workers, self.dist)
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.order,
            num_workers=workers,
            collate_fn=self.job.collate,
            pin_memory=self.dist.device.type == "cuda",
            prefetch_factor=4 if workers else None,
            persistent_workers=workers > 0,
        )
        batch, end = self._batches_done, self._batches_done + self.total_steps - self.step
        while batch < end:
            epoch, first = divmod(batch, self.order.batches_per_epoch)
            self.order.start_at(epoch, first)
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            micros = batches_of(loader)
            while batch < end:
                with self.meter.timing("waiting"):
                    group = list(islice(micros, self.args.gradient_accumulation_steps))
                if not group:
                    break
                batch += 1
                yield group

    # A step

    def _train_step(self, batch: list[Any]) -> None:
        """Take a step of every phase that is active, on the same micro-batches."""
        torch.manual_seed(item_seed(self.args.global_seed, self.dist.rank, self.step))
        batch = tree_map_only(Tensor, lambda t: t.to(self.dist.device, non_blocking=True), batch)
        if self.job.prepare:
            batch = self.job.prepare(batch, self.step)
        epoch = self._batches_done // self.order.batches_per_epoch
        places = [
            Micro(self.step, epoch, number, self.order.positions(number), self.args.global_batch_size)
            for number in range(len(batch))
        ]
        watched: list[tuple[str, int | None, Tensor]] = []
        for phase in self.phases:
            if phase.active(self.step):
                watched += self._optimize(phase, list(zip(batch, places, strict=True)))
        self.scaler.update()
        if self.ema:
            self.ema.update(None if self.args.ema_warmup is False else warmed_up(self.ema.decay, self.step))
        self.watch.add(self.step, watched)
        self.meter.count_step(self.job.flops(self.step, epoch) if self.job.flops else None)
        self.state.step += 1
        self.state.samples_seen += self.args.global_batch_size

    def _optimize(self, phase: Phase, batch: list[tuple[Any, Micro]]) -> list[tuple[str, int | None, Tensor]]:
        """Take one optimizer's step; return the values that have to be finite, as `FiniteWatch.add` takes them."""
        rate = self._learning_rate()
        for group in phase.optimizer.param_groups:
            group["lr"] = rate
        if phase.key not in self._rehearsed:
            self._rehearsed.add(phase.key)
            self.plan.rehearse(lambda: self._backward(phase, *batch[0], parts=1), self.models.values())
        phase.optimizer.zero_grad(set_to_none=True)
        watched: list[tuple[str, int | None, Tensor]] = []
        for number, (micro, place) in enumerate(batch):
            with self.plan.last_only(phase.module, last=number == len(batch) - 1):
                loss, logs = self._backward(phase, micro, place, parts=len(batch))
            watched.append(("loss", number, loss.detach()))
            self.means.add(logs)
        self.scaler.unscale_(phase.optimizer)
        parameters = parameters_of([phase.optimizer])
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # over all shards
        if self.args.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        if self.scaler.is_enabled():  # which skips steps that float16 cannot hold: they have no norm to speak of
            norm = torch.where(torch.isfinite(norm), norm, 0)
        else:
            watched.append(("gradient norm", None, norm))
        self.means.add({f"grad_norm{phase.key.removeprefix('optimizer')}": norm})
        self.scaler.step(phase.optimizer)
        return watched

    def _backward(self, phase: Phase, micro: Any, place: Micro, parts: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Add a micro-batch's gradients, 1 / parts of the step's; return its loss and what is logged of it."""
        with self.meter.timing("working"), self._autocast():
            loss, logs = phase.loss(micro, place)
        self.scaler.scale(loss / parts).backward()
        return loss, logs

    def _autocast(self) -> torch.autocast:
        """Return the context of training's mixed precision."""
        dtype = self.plan.autocast_dtype
        return torch.autocast(self.dist.device.type, dtype, enabled=dtype is not None)

    def _learning_rate(self) -> float:
        if self.job.rate:
            return self.job.rate(self._batches_done, self.order.batches_per_epoch)
        return learning_rate(self.args, self.step, self.total_steps, self.order.batches_per_epoch)

    # Logs

    def _log_start(self) -> None:
        args, log = self.args, self.log
        parameters = sum(p.numel() for p in self.models["model"].parameters())
        log.info(
            f"{self.run.folder}: {parameters:,} parameters, {self.order.size:,} samples, "
            f"{self.order.batches_per_epoch} steps an epoch, {self.total_steps} steps, {self.dist.world_size} process(es) "
            f"on {self.dist.device} ({self.plan.strategy}, {WORDS.get(self.plan.precision, self.plan.precision)})"
        )
        if not self.job.rate and args.warmup_steps >= self.total_steps:
            log.warning(
                f"--warmup-steps {args.warmup_steps} is no shorter than the run: --lr is not reached before its end"
            )
        if self.ema:
            how = "fixed" if args.ema_warmup is False else "at most, (1 + step) / (10 + step) before"
            shown = "held-out figures and pictures are theirs"
            log.info(f"averaged weights (--ema): decay {self.ema.decay} {how}; {shown}")
        if self.step >= self.total_steps:
            log.info(f"nothing left to do: step {self.step} of {self.total_steps}")

    def _log_window(self) -> None:
        """Write down the means and rates since the last time."""
        values, rates = self.means.close(self.dist), self.meter.close_window()
        lr, pace = self.phases[0].optimizer.param_groups[0]["lr"], rates["steps_per_second"]
        loss, rest = format_means(values)
        self.log.progress(
            f"(step={self.step:07d}) Train Loss: {loss}, Train Steps/Sec: {pace:.2f}, {self._progress(pace)}, {rest}lr: {lr:.3g}, "
            + format_window(rates),
            last=self.step == self.total_steps,
        )
        self.log.scalars(self.step, {**values, "lr": lr, **rates})
        if self.meter.slowest:
            self.log.info(self.meter.slowest)
        self.failures.require_finite_losses()

    def _progress(self, steps_per_second: float) -> str:
        """Return in words where the run stands: steps, epoch, time left at the last window's pace."""
        done, left, epoch = self._batches_done, self.total_steps - self.step, self.order.batches_per_epoch
        words = f"step {self.step:,} of {self.total_steps:,}, epoch {-(-done // epoch)} of {-(-(done + left) // epoch)}"
        return words + (f", {format_seconds(left / steps_per_second)} left" if left else "")

    # Checkpoints, figures, pictures

    @torch.no_grad()
    def _evaluate_and_save(self, final: bool = False) -> None:
        """Make what is due at this step: a checkpoint, then figures and pictures; none of a model that a loss has spoilt."""
        checkpoint = final or self.step % self.args.ckpt_every == 0
        every = self.args.sample_every or self.args.ckpt_every
        pictures = self.job.sample is not None and (final or self.step % every == 0)
        if not (checkpoint or pictures):
            return
        with self.meter.timing("paused"), ExitStack() as stack:
            self._save_if_sound(wait=final) if checkpoint else self.failures.require_finite()
            figures = self.job.validate is not None and checkpoint
            if not (pictures or figures):
                return
            # Blocks are compiled for training: other shapes and the decode loop would compile each of them many times over.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self.ema.applied() if self.ema else nullcontext())
            stack.enter_context(self.plan.gathered(self.phases[0].module))
            model = self.models["model"]
            stack.callback(model.train)
            model.eval()
            if figures:
                self._measure(model)
            # With shards on every process: passes that one alone made would put it out of step with the others' exchanges.
            if pictures and (self.dist.is_main or self.plan.sharded):
                self._draw(model)

    def _save_if_sound(self, wait: bool) -> None:
        """Begin to save the state, unless it is not finite. wait: until it is on the disk."""
        self.failures.require_finite()
        if self.saver.saved_step < self.step:
            self.saver.save()
        if wait:
            self.saver.wait(final=True)

    def _measure(self, model: nn.Module) -> None:
        """Log the held-out figures. Raises AgreedError on every process where they cannot be had."""
        try:
            with self._autocast():
                values = cast(Any, self.job.validate)(model)
        except (ValueError, OSError) as error:
            raise self.failures.of_held_out(error) from error
        of = " of the averaged weights (--ema)" if self.ema else ""
        self.log.info(f"(step={self.step:07d}) " + ", ".join(f"{k}: {v:.4f}" for k, v in values.items()) + of)
        self.log.scalars(self.step, values)

    def _draw(self, model: nn.Module) -> None:
        """Log pictures; where they cannot be drawn, a warning in their place."""
        try:
            for name, image in cast(Any, self.job.sample)(model).items():
                self.log.image(self.step, name, image)
        except Exception as error:
            self.log.warning(f"(step={self.step:07d}) no pictures: {words_of(error)} ({type(error).__name__})")

    # Ends before the end

    def _agree_to_stop(self, signals: StopSignals, batches: ReadAhead) -> bool:
        """Save the state where a process was asked to stop or has no further data; return whether a signal ends the run.

        Raises AgreedError where a loss was not finite, and where data is missing, once the state is saved.
        """
        stop, broken, starved = self.agreement.exchange(
            signals.asked is not None, self.watch.first(wait=False) is not None, batches.failure is not None
        )
        if broken:
            self.failures.require_finite_losses()
        if not (stop or starved) or self.step >= self.total_steps:
            return False
        self._save_if_sound(wait=True)
        self.agreement.close()
        if starved:
            self.failures.require_data(batches.failure)
        asked = next((name for name in self.dist.gather(signals.asked and signals.asked.name) if name), "a signal")
        self.log.info(f"stopped by {asked} after step {self.step} of {self.total_steps}; --resume continues from there")
        return True
