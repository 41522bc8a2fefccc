"""Next-patch prediction: which patch size an epoch trains with, and the learning rate that starts anew with each.

Early epochs read and predict the image in patches, on a sequence that is patch_side² times shorter; the last stage is
plain raster training, and so is sampling. NPP (arXiv 2412.15321, section 3).
"""

from argparse import Namespace
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from autoregressive.models.layouts import Layout
from autoregressive.models.layouts.patches import with_patches
from autoregressive.train.orders import OrderSchedule


@dataclass(frozen=True)
class Stage:
    """Epochs from `start` up to `end`, which train with patches of `patch_side` x `patch_side` tokens."""

    start: float
    end: float
    patch_side: int


@dataclass(frozen=True)
class PatchSchedule:
    """The stages of a run, from the coarsest patches to single tokens.

    A stage whose epochs round to none is left out. Raises ValueError for a level that there is not, and where no epoch is
    left for single tokens; the flags have the ranges of the others.
    """

    epochs: int
    patch_level: int = 1  # stages; each halves the patch side, the last one's is 1
    epoch_rate: float = 0.5  # share of a stage's end at which the one before it ends; the last one ends at `epochs`
    warmup_epochs: float = 1  # this and the next three: the learning rate with --scheduler, see `learning_rate`
    decay_ratio: float = 0.2
    lr: float = 1e-4
    end_lr: float = 1e-5
    max_steps: int | None = None  # where the run ends before `epochs`: the stages are then shares of these steps
    steps_per_epoch: int = 1

    @classmethod
    def from_args(cls, args: Namespace) -> "PatchSchedule":
        """Return the schedule of --patch-level and the flags beside it."""
        names = ("epochs", "patch_level", "epoch_rate", "warmup_epochs", "decay_ratio", "lr", "end_lr")
        return cls(**{name: getattr(args, name) for name in names})

    def for_run(self, samples: int, args: Namespace) -> "PatchSchedule":
        """Return the schedule of a run on so many samples: where --max-steps ends it, stages are shares of these steps."""
        steps, run = max(samples // args.global_batch_size, 1), self
        if args.max_steps is not None and args.max_steps < args.epochs * steps:
            run = replace(self, max_steps=args.max_steps, steps_per_epoch=steps)
        if args.scheduler:
            run.check_scheduler()
        return run

    def __post_init__(self) -> None:
        if not 1 <= self.patch_level <= 4:
            raise ValueError(
                f"--patch-level goes from 1 (no patches) to 4 (patches of 8x8 first), got {self.patch_level}"
            )
        if not self.stages or self.stages[-1].patch_side > 1:
            raise ValueError(
                f"single tokens would get no epoch: with --epochs {self.epochs} --patch-level {self.patch_level} --epoch-rate "
                f"{self.epoch_rate} the stages end at epochs {self._ends}; choose more --epochs or a lower --epoch-rate"
            )

    @cached_property
    def _ends(self) -> list[float]:
        shares = [self.epoch_rate**later for later in range(self.patch_level - 1, -1, -1)]
        if self.max_steps is None:
            return [int(self.epochs * share) for share in shares]
        return [int(self.max_steps * share) / self.steps_per_epoch for share in shares]

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stages that have epochs, in the order of training."""
        sides = [2**later for later in range(self.patch_level - 1, -1, -1)]
        bounds = zip(pairwise([0, *self._ends]), sides, strict=True)
        return tuple(Stage(start, end, side) for (start, end), side in bounds if start < end)

    @property
    def skipped_sides(self) -> list[int]:
        """Patch sides that --patch-level asks for and that get no epoch, since there are too few."""
        return sorted({2**later for later in range(self.patch_level)} - {stage.patch_side for stage in self.stages})

    def check_grid(self, grid: int) -> None:
        """Raise ValueError where the first stage's patches do not divide a grid of grid x grid tokens (nor do later ones)."""
        side = self.stages[0].patch_side
        if grid % side:
            raise ValueError(
                f"--patch-level {self.patch_level} begins with patches of {side}x{side} tokens, which do not divide a grid "
                f"of {grid}x{grid}; choose a lower --patch-level or another --image-size"
            )

    def check_scheduler(self) -> None:
        """Raise ValueError for learning rates that make no sense with --scheduler."""
        if self.end_lr > self.lr:
            raise ValueError(f"--end-lr {self.end_lr} is above --lr {self.lr}: the rate cannot decay to it")
        shortest = min(self.stages, key=lambda stage: stage.end - stage.start)
        if self.warmup_epochs > shortest.end - shortest.start:
            raise ValueError(
                f"--warmup-epochs {self.warmup_epochs} is longer than the {shortest.end - shortest.start:.4g} epoch(s) with "
                f"patches of {shortest.patch_side}x{shortest.patch_side} tokens, which would never reach --lr"
            )

    def describe(self) -> str:
        """Return the stages in words, "patches of 2x2 tokens to epoch 150, single tokens to epoch 300"."""
        return ", ".join(
            (f"patches of {s.patch_side}x{s.patch_side} tokens" if s.patch_side > 1 else "single tokens")
            + f" to epoch {s.end:.6g}"
            for s in self.stages
        )

    def stage(self, epoch: float) -> Stage:
        """Return the stage of an epoch, from 0, or of a place in one; past the end, the last one."""
        return next((stage for stage in self.stages if epoch < stage.end), self.stages[-1])

    def patch_side(self, epoch: float) -> int:
        """Return the side of the patches that an epoch, or a place in one, trains with."""
        return self.stage(epoch).patch_side

    def side_at(self, step: int, epoch: int) -> int:
        """Return the side of the patches that a step, from 0, of an epoch trains with."""
        return self.patch_side(epoch if self.max_steps is None else step / self.steps_per_epoch)

    def layouts(self, layout: Layout) -> OrderSchedule:
        """Return each step's layout of patches of a raster model. Raises ValueError where patches do not fit its layout."""
        by_side = {stage.patch_side: with_patches(layout, stage.patch_side) for stage in self.stages}
        return lambda step, epoch, positions, global_batch: (by_side[self.side_at(step, epoch)], None)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate at an optimizer step, from 0, of steps_per_epoch in each epoch.

        Inside each stage: from 0 up to `lr` over warmup_epochs, constant, then down over the last decay_ratio of the
        stage towards `end_lr`, which the step after its last would have.
        """
        stage = self.stage(step / steps_per_epoch)
        done = step - stage.start * steps_per_epoch
        steps = (stage.end - stage.start) * steps_per_epoch
        warmup, decay = self.warmup_epochs * steps_per_epoch, self.decay_ratio * steps
        if done < warmup:
            return self.lr * (done / warmup)
        if done <= steps - decay or not decay:
            return self.lr
        return self.end_lr + (self.lr - self.end_lr) * max(steps - done, 0) / decay
