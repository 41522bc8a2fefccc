"""Failures that end a run early, raised by every process in the same words: what happened, and what it can resume from."""

from collections import deque
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.errors import AgreedError, is_lost_process, words_of
from utils.training.ema import local
from utils.training.order import BatchOrder
from utils.training.state import Saver

SHOWN_SAMPLES = 64


@dataclass(frozen=True)
class NotFinite:
    """Place of a value that is not finite: the optimizer step, the part of the batch (None: all of it), what it was."""

    step: int
    part: int | None
    name: str
    value: float


class FiniteWatch:
    """Values travel to the host beside the computation and are looked at once they are there."""

    def __init__(self) -> None:
        self._pending: deque[tuple[int, list[tuple[str, int | None]], Tensor, torch.cuda.Event | None]] = deque()
        self._found: NotFinite | None = None

    def add(self, step: int, values: list[tuple[str, int | None, Tensor]]) -> None:
        """Take note of scalars of a step: (name, part of the batch, value). A step may have none."""
        if not values:
            return
        numbers, event = torch.stack([value.detach().float() for *_, value in values]), None
        if numbers.is_cuda:
            numbers = torch.empty(len(numbers), pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, [(name, part) for name, part, _ in values], numbers, event))

    def first(self, wait: bool) -> NotFinite | None:
        """Return the first value that is not finite among those that have arrived, or with `wait` among all."""
        while self._pending and self._found is None:
            step, names, numbers, event = self._pending[0]
            # An accelerator without events would be waited for.
            if not (wait or (event.query() if event else numbers.device.type == "cpu")):
                break
            if event:
                event.synchronize()
            self._pending.popleft()
            found = zip(names, numbers.tolist(), strict=True)
            bad = (NotFinite(step, part, name, value) for (name, part), value in found if not isfinite(value))
            self._found = next(bad, None)
        return self._found


class Failures:
    """Watch over failures of a run. Every process calls its methods together, but where they say otherwise."""

    def __init__(self, saver: Saver, order: BatchOrder, dataset: Dataset, watch: FiniteWatch):
        self.saver, self.order, self.dataset, self.watch = saver, order, dataset, watch
        self.args, self.dist, self.state = saver.args, saver.dist, saver.state

    def require_data(self, failure: Exception | None) -> None:
        """Raise AgreedError where a process could not read its data; a mistake in code as it is."""
        if failure is not None and not isinstance(failure, ValueError | OSError | MemoryError):
            raise failure
        reasons = self.dist.gather(None if failure is None else words_of(failure) or type(failure).__name__)
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
        where = f" by process {rank}" if self.dist.world_size > 1 else ""
        raise AgreedError(f"no more data could be read{where} after step {self.state.step}: {reason}; {self._way_on()}")

    def require_finite_losses(self) -> None:
        """Raise AgreedError where a process had a loss that is not finite."""
        found = enumerate(self.dist.gather(self.watch.first(wait=True)))
        places = sorted((bad.step, bad.part is None, rank, bad) for rank, bad in found if bad)
        if places:
            _, _, rank, bad = places[0]
            raise AgreedError(f"{self._describe(rank, bad)} {self._advice()}")

    @torch.no_grad()
    def require_finite(self) -> None:
        """Raise AgreedError where a loss or the weights are not finite."""
        self.require_finite_losses()
        weights = [local(p) for p in self.state.models["model"].parameters()]
        norm = torch.stack(torch._foreach_norm([p for p in weights if p.numel()])).norm()
        if not isfinite(float(self.dist.mean(norm))):
            raise AgreedError(
                f"the weights are no longer finite after step {self.state.step}, and were not saved. {self._advice()}"
            )

    def of_held_out(self, error: Exception) -> AgreedError:
        """Return what to raise where held-out figures cannot be had."""
        way_on = self._way_on(together=isinstance(error, AgreedError))
        what = f"the held-out loss failed after step {self.state.step}"
        return AgreedError(f"{what}: {words_of(error)}; mend the held-out data or leave it out, {way_on}")

    def lost_process(self, error: Exception) -> ConnectionError | None:
        """Return what to raise in place of torch.distributed's error on another process's end. Any process may call it."""
        if self.dist.world_size == 1 or not is_lost_process(error):
            return None
        reason = str(error).strip().splitlines()[0][:200]
        what = f"process {self.dist.rank} lost the others at step {self.state.step} ({reason}): one of them has ended"
        return ConnectionError(f"{what}, see what it said itself; {self._way_on(together=False)}")

    def _describe(self, rank: int, bad: NotFinite) -> str:
        batches = self.state.samples_seen // self.args.global_batch_size - (self.state.step - bad.step)
        epoch, batch = divmod(batches, self.order.batches_per_epoch)
        samples = self.order.samples(epoch, batch, None if bad.part is None else rank, bad.part)
        if hasattr(self.dataset, "sample_numbers"):  # as other tools count them
            samples = self.dataset.sample_numbers(samples)
        listed = ", ".join(map(str, samples[:SHOWN_SAMPLES])) + (", …" if len(samples) > SHOWN_SAMPLES else "")
        parts = self.args.gradient_accumulation_steps
        part = f", part {bad.part + 1} of {parts} of its batch" if bad.part is not None and parts > 1 else ""
        where = f" on process {rank}{part}" if bad.part is not None else ""
        return (
            f"the {bad.name} became {bad.value} at step {bad.step + 1}{where}; it is no longer finite, and nothing of it "
            f"was saved. Samples there: {listed}."
        )

    def _advice(self) -> str:
        last = self._last_checkpoint()
        saved = f"The last checkpoint is {last}." if last else "There is no checkpoint yet."
        return f"{saved} Try a lower --lr, or --mixed-precision none"

    def _way_on(self, together: bool = True) -> str:
        last = self._last_checkpoint(together)
        return f"--resume continues from {last}" if last else "there is no checkpoint yet"

    def _last_checkpoint(self, together: bool = True) -> Path | None:
        """Return the last checkpoint. together: every process calls it and gets the answer of the first, which writes."""
        self.saver.wait()
        last = next(iter(self.saver.run.checkpoints()), None)
        return self.dist.broadcast(last) if together else last
