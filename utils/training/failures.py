"""Failures that end a run early, raised by every process in the same words: what happened, and what it can go on from.

failures.require_finite_losses(); failures.require_data(batches.failure)
"""

from math import isfinite
from pathlib import Path

import torch
from torch.utils.data import Dataset

from utils.errors import AgreedError, is_lost_process, words_of
from utils.training.ema import local
from utils.training.finite import FiniteWatch, NotFinite
from utils.training.order import BatchOrder
from utils.training.state import Saver

SHOWN_SAMPLES = 64


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
        found = self.dist.gather(self.watch.first(wait=True))
        places = sorted((bad.step, bad.part is None, rank, bad) for rank, bad in enumerate(found) if bad)
        if places:
            _, _, rank, bad = places[0]
            raise AgreedError(f"{self._describe(rank, bad)} {self._advice()}")

    @torch.no_grad()
    def require_finite_weights(self) -> None:
        """Raise AgreedError where the weights are not finite."""
        weights = [local(p) for p in self.state.models["model"].parameters()]
        norm = torch.stack(torch._foreach_norm([p for p in weights if p.numel()])).norm()
        if not isfinite(float(self.dist.mean(norm))):
            raise AgreedError(
                f"the weights are no longer finite after step {self.state.step}, and were not saved. {self._advice()}"
            )

    def of_held_out(self, error: Exception) -> AgreedError:
        """Return what to raise where held-out figures cannot be had."""
        way_on = self._way_on(together=isinstance(error, AgreedError))
        return AgreedError(
            f"the held-out loss failed after step {self.state.step}: {words_of(error)}; mend the held-out data or leave it "
            f"out, {way_on}"
        )

    def lost_process(self, error: Exception) -> ConnectionError | None:
        """Return what to raise in place of torch.distributed's error on another process's end. Any process may call it."""
        if self.dist.world_size == 1 or not is_lost_process(error):
            return None
        reason = str(error).strip().splitlines()[0][:200]
        return ConnectionError(
            f"process {self.dist.rank} lost the others at step {self.state.step} ({reason}): one of them has ended, "
            f"see what it said itself; {self._way_on(together=False)}"
        )

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
        told = f"The last checkpoint is {last}." if last else "There is no checkpoint yet."
        return f"{told} Try a lower --lr, or --mixed-precision none"

    def _way_on(self, together: bool = True) -> str:
        last = self._last_checkpoint(together)
        return f"--resume goes on from {last}" if last else "there is no checkpoint yet"

    def _last_checkpoint(self, together: bool = True) -> Path | None:
        """together: every process calls it, and gets the first one's answer, which knows what has been written."""
        self.saver.wait()
        last = self.saver.run.checkpoints()[:1]
        last = self.dist.broadcast(last) if together else last
        return last[0] if last else None
