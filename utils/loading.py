"""Loader processes: how many a run gets, and how their death reaches the run."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from utils.distributed import Distributed

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

_CAUSES = {signal.SIGKILL: "most often because memory ran out", signal.SIGBUS: "/dev/shm is full"}


class LoaderKilled(ChildProcessError):
    """Raised where a loader process is gone: killed by the system, or ended by a library's crash."""


def loader_workers(asked: int, dist: Distributed) -> int:
    """Return `asked`, but no more than this process's share of the processors it may use; 0 loads in the process itself."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # srun --cpus-per-task gives each task processors of its own.
    own = "SLURM_CPUS_PER_TASK" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS") == str(dist.world_size)
    share = processors if own else processors // max(dist.local_world_size, 1)
    return max(0, min(asked, share))


def load(
    dataset: Any,
    batches: Sequence[Sequence[int]],
    workers: int,
    collate: Callable[[list[Any]], Any],
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Yield what `collate` makes of the items of each batch of indices, once. Raises LoaderKilled as batches_of does."""
    from torch.utils.data import DataLoader

    workers = min(workers, len(batches))
    options: dict[str, Any] = {"num_workers": workers, "collate_fn": collate, "pin_memory": pin_memory}
    return batches_of(DataLoader(dataset, batch_sampler=[list(batch) for batch in batches], **options))


def batches_of(loader: "DataLoader") -> Iterator[Any]:
    """Yield a loader's batches. Raises LoaderKilled where a batch is asked for that a dead loader process had to read.

    torch tells of a death by a signal handler that raises in the middle of whatever the run does at that moment, a step
    or the writing of a file. That handler is removed; the loader itself finds a dead process within seconds.
    """
    batches = iter(())
    try:
        batches = iter(loader)
        _remove_torch_handler()
        yield from batches
    except Exception as error:
        # iter(loader) itself raises where a persistent process died between two epochs.
        begun = getattr(loader, "_iterator", None) or batches
        workers = {worker.sentinel: worker for worker in getattr(begun, "_workers", ())}
        # The connection to a process breaks before the process is gone; one whose item raised lives on.
        of_an_item = " in DataLoader worker process" in str(error)
        ended = [workers[sentinel] for sentinel in wait(workers, timeout=1 if workers and not of_an_item else 0)]
        for worker in ended:
            worker.join()
        codes = [worker.exitcode for worker in ended if worker.exitcode]
        if not codes:
            raise
        ending = _ending(codes[0])
        raise LoaderKilled(
            f"a loader process {ending}; rerun with fewer --num-workers, finished work is kept"
        ) from error


def _ending(code: int) -> str:
    if code > 0:
        return f"ended with code {code}"
    killer = signal.Signals(-code)
    cause = _CAUSES.get(killer)
    return f"was killed by {killer.name}" + (f" ({cause})" if cause else "")


def _remove_torch_handler() -> None:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return  # where torch sets none
    if getattr(signal.getsignal(signal.SIGCHLD), "__module__", "").startswith("torch.utils.data"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class ReadAhead:
    """Batches, each given while the two after it are at hand or known not to come.

    failure: what ended reading; the batches before it are given all the same. Processes that work in step tell each other
    of a failure after a step and hear of it one step later: the process that fails still has that step's batch.
    """

    def __init__(self, batches: Iterable[Any]):
        self.failure: Exception | None = None
        self._batches, self._ready = iter(batches), deque()
        self._read(2)

    def _read(self, count: int) -> None:
        try:
            if self.failure is None:
                self._ready.extend(islice(self._batches, count))
        except Exception as error:
            self.failure = error

    def __iter__(self) -> Iterator[Any]:
        while self._ready:
            batch = self._ready.popleft()
            self._read(1)
            yield batch
