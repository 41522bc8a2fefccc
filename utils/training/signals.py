"""Early ends of a run: a signal, or another process that stops.

The processes of a run have to stop at the same step. `Agreement` tells each of them, one step later, what any of them had
to say; it costs a message of a few numbers beside the step and never waits for an accelerator.
"""

import mmap
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as torch_dist

from utils.distributed import Distributed

# What schedulers send ahead of the end of a job, a terminal that is closed, and Ctrl-C.
_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT")
# Seconds after which a further Ctrl-C is meant as one: a terminal's reaches a process directly and through torchrun.
AGAIN_AFTER = 2.0
# Seconds that a process has to end by itself once another is gone.
ALONE_FOR = 30.0


class StopSignals:
    """Takes note of the first signal instead of dying of it; a second Ctrl-C, seconds later, ends the process at once.

    Terminals, torchrun and schedulers signal the workers of a loader too, which were forked with this handler. They work
    on, since the loader makes their death an error of the run, and die of a signal once the run is over or gone.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._interrupted: float | None = None
        self._process = os.getpid()
        self._over = mmap.mmap(-1, 1)  # memory that forked processes share
        self._before: dict[signal.Signals, Callable | int | None] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._over[0] = 1
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            if self._over[0] or os.getppid() != self._process:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted >= AGAIN_AFTER:
                raise KeyboardInterrupt
            self._interrupted = now if self._interrupted is None else self._interrupted
        self.asked = self.asked or signal.Signals(number)


class Agreement:
    """Exchanges a few flags among the processes without waiting for the slowest within a step.

    Where a process is gone, `exchange` raises RuntimeError. A main thread that waits for its GPU, and the GPU for the lost
    process, never comes to that call: a thread beside it ends such a process after ALONE_FOR seconds.
    """

    def __init__(self, dist: Distributed):
        self.dist = dist
        self._flags: torch.Tensor | None = None
        self._work = None
        self._sent: queue.SimpleQueue[torch_dist.Work] = queue.SimpleQueue()
        if dist.world_size > 1 and dist.device.type == "cuda":
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Wait for each message; where one fails, let the main thread end the process, then end it."""
        try:
            while True:
                self._sent.get().wait()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200]
        time.sleep(ALONE_FOR)
        what = f"error: process {self.dist.rank} lost the others ({reason})"
        print(f"{what}; rerun with --resume", file=sys.stderr, flush=True)
        os._exit(1)

    def exchange(self, *flags: bool) -> tuple[bool, ...]:
        """Exchange flags once a step: every process gets the same answer, from what each said at the call before."""
        if self.dist.world_size == 1:
            return flags
        self.close()
        answer = tuple((self._flags > 0).tolist()) if self._flags is not None else (False,) * len(flags)
        self._flags = torch.tensor([float(flag) for flag in flags])
        self._work = torch_dist.all_reduce(self._flags, async_op=True)
        self._sent.put(self._work)
        return answer

    def close(self) -> None:
        """Wait for the last message, after which no process has one under way."""
        if self._work is not None:
            self._work.wait()
            self._work = None
