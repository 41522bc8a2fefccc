"""Cost of a window of steps: rates, waiting for data, memory, and which process was slowest."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

from utils.distributed import Distributed

# A process whose own work takes this much longer than the median is named.
SLOW = 1.5


class Meter:
    """Adds up a window's times on every process; nothing here waits for an accelerator but the end of a window.

    samples: a step's, over all processes. tokens: a sample's, None where samples have none. peak: FLOP/s of this
    process's device in the precision of training, None where unknown. `flops` (a sample's, model FLOPs) may change.
    """

    def __init__(self, dist: Distributed, samples: int, tokens: int | None, peak: float | None):
        self.dist, self.samples, self.tokens, self.peak = dist, samples, tokens, peak
        self.slowest: str | None = None
        self.start_window()

    def start_window(self) -> None:
        """Forget what was counted."""
        self.steps, self.flops = 0, 0.0
        self.seconds = {"waiting": 0.0, "paused": 0.0, "working": 0.0}
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.start = time.perf_counter()

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Time a block: "waiting" for data; "paused", which does not count (evaluation, what of a checkpoint is not written
        in the background); "working", the forward pass, which waits for no other process's gradients."""
        if kind == "working" and self.dist.device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            start = time.perf_counter()
            yield
            self.seconds[kind] += time.perf_counter() - start

    def count_step(self, flops_per_sample: float | None) -> None:
        """Count one more step, of so many model FLOPs a sample."""
        self.steps += 1
        self.flops += self.samples * (flops_per_sample or 0.0)

    def close_window(self) -> dict[str, float]:
        """Return the window's figures, the same on every process, and begin a new window.

        steps, images and tokens a second; mfu (share of the devices' peak) where both are known; the longest wait for
        data of any process as a share of the time; the largest peak memory of a process in GiB. `slowest` names a process
        whose own work took much longer than the others'.
        """
        if self._events:
            torch.cuda.synchronize(self.dist.device)
            self.seconds["working"] = sum(first.elapsed_time(last) for first, last in self._events) / 1000
        seconds = max(time.perf_counter() - self.start - self.seconds["paused"], 1e-9)
        waited = self.seconds["waiting"]
        mine = (waited, waited + self.seconds["working"], _peak_memory(self.dist.device))
        waited, own, memory = zip(*self.dist.gather(mine), strict=True)
        images = self.steps * self.samples / seconds
        values = {"steps_per_second": self.steps / seconds, "images_per_second": images}
        if self.tokens:
            values["tokens_per_second"] = images * self.tokens
        if self.peak and self.flops:
            values["mfu"] = self.flops / seconds / (self.peak * self.dist.world_size)
        values["data_wait"] = min(max(waited) / seconds, 1.0)
        values["peak_memory_gib"] = max(memory)
        worst, typical = max(own), median(own)
        self.slowest = None
        if worst > SLOW * typical and worst - typical > 0.1 * seconds:
            rank = own.index(worst)
            cause = "waiting for its data" if waited[rank] > worst / 2 else "its forward passes"
            self.slowest = (
                f"process {rank} is slow: {worst / self.steps:.3f} s a step for itself ({cause}), "
                f"the median is {typical / self.steps:.3f} s"
            )
        self.start_window()
        return values


class Means:
    """Means of what losses log over a window, each over the steps and micro-batches that it took part in."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, logs: dict[str, Tensor]) -> None:
        """Add scalars."""
        for name, value in logs.items():
            total, count = self._sums.get(name, (0, 0))
            self._sums[name] = total + value.detach().float(), count + 1

    def close(self, dist: Distributed) -> dict[str, float]:
        """Return the means over all processes by name, norms last, and begin a new window."""
        names = sorted(self._sums, key=lambda name: ("norm" in name, name))
        means = [self._sums[name][0] / self._sums[name][1] for name in names]
        self._sums = {}
        return dict(zip(names, dist.mean(torch.stack(means)).tolist(), strict=True)) if names else {}


def _peak_memory(device: torch.device) -> float:
    """GiB at most since the last call on CUDA, of the process since its start elsewhere."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak / 2**30


def format_means(values: dict[str, float]) -> tuple[str, str]:
    """Return the loss for a log line, and the other means that follow it. A loss that is switched off is 0 throughout."""
    loss = next(name for name in ("loss", "generator_loss", *values) if name in values)
    shown = {k: v for k, v in values.items() if k != loss and (v or not k.endswith(("_loss", "adversarial_weight")))}
    return f"{values[loss]:.4f}", "".join(f"{name}: {value:.4f}, " for name, value in shown.items())


def format_window(values: dict[str, float]) -> str:
    """Format the figures of a window for a log line, after its steps per second."""
    forms = {
        "images_per_second": "images/sec: {:,.0f}",
        "tokens_per_second": "tokens/sec: {:,.0f}",
        "mfu": "mfu: {:.1%}",
        "data_wait": "data wait: {:.0%}",
        "peak_memory_gib": "memory: {:.2f} GiB",
    }
    return ", ".join(form.format(values[name]) for name, form in forms.items() if name in values)


def format_seconds(seconds: float) -> str:
    """Format a duration in its two largest units: 41 h 12 min, 3 min 05 s, 12 s."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
