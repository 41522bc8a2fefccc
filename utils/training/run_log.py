"""Log of a run: lines on the terminal and in log.txt, scalars and pictures for tensorboard, and metrics.jsonl."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from utils.images import save_png
from utils.logger import Lines, console_logger

# Of quick steps the terminal shows a line in so many seconds; log.txt and metrics.jsonl have all.
SECONDS_A_LINE = 5.0


class _LogFile(logging.FileHandler):
    """The file log.txt. A line that cannot be written is one short line on the terminal, once."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._told = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._told:
            print(f"could not write to {self.baseFilename} ({sys.exc_info()[1]}); training continues", file=sys.stderr)
        self._told = True


class RunLogger:
    """Writes to a run's folder from the first process; says nothing on the others."""

    def __init__(self, folder: Path, main: bool = True, wandb_project: str | None = None, config: dict | None = None):
        self.folder, self.main, self.wandb, self.printed = folder, main, None, -SECONDS_A_LINE
        self.logger = console_logger(main=main)
        self.loggers = [self.logger, console_logger("dataset", main)]  # which images could not be read is logged there
        if not main:
            return
        self.board = _tensorboard_writer(folder / "tensorboard")
        self.file = _LogFile(folder / "log.txt")
        self.file.setFormatter(Lines())
        for logger in self.loggers:
            logger.addHandler(self.file)
        self.metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 - open as long as the run
        if wandb_project:
            self._start_wandb(wandb_project, config)

    def _start_wandb(self, project: str, config: dict | None) -> None:
        """Weights & Biases is a second place for the figures; if it is not at hand, the run continues without it."""
        try:
            import wandb

            self.wandb = wandb.init(project=project, dir=str(self.folder), name=self.folder.name, config=config)
            self.wandb_image = wandb.Image
        except Exception as error:
            reason = "pip install wandb" if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            self.info(f"not logging to the wandb project {project} ({reason}); --no-wandb leaves it out")

    def info(self, message: str) -> None:
        self.logger.info(message)

    def warning(self, message: str) -> None:
        self.logger.warning(message)

    def progress(self, message: str, last: bool) -> None:
        """Write a line to log.txt, and to the terminal if no such line was printed in the last few seconds or it is the last."""
        now = time.monotonic()
        if last or now - self.printed >= SECONDS_A_LINE:
            self.printed = now
            self.info(message)
        else:
            self.record(message)

    def record(self, message: str) -> None:
        """Write a line to log.txt alone, where the terminal has it from somewhere else."""
        if self.main:
            self.file.emit(logging.makeLogRecord({"msg": message, "levelno": logging.ERROR, "levelname": "ERROR"}))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record numbers of a step."""
        if not self.main:
            return
        with self._outliving_a_full_disk():
            self.metrics.write(json.dumps({"step": step, **values}) + "\n")
        with self._outliving_a_full_disk():
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Record a picture of a step, in tensorboard and as `{name}/{step:07d}.png`. image: uint8 (H, W, 3)."""
        if not self.main:
            return
        with self._outliving_a_full_disk():
            self.board.add_image(name, image, step, dataformats="HWC")
            save_png(image, self.folder / name / f"{step:07d}.png")
        if self.wandb:
            self.wandb.log({name: self.wandb_image(image)}, step=step)

    def close(self) -> None:
        """Flush and close the files."""
        if self.main:
            for file in (self.metrics, self.board):
                with self._outliving_a_full_disk():
                    file.close()
            for logger in self.loggers:
                logger.removeHandler(self.file)
            self.file.close()
        if self.wandb:
            self.wandb.finish()

    @contextmanager
    def _outliving_a_full_disk(self) -> Iterator[None]:
        """Turn an error of the disk into a warning: a figure that cannot be recorded is no reason to stop a run."""
        try:
            yield
        except OSError as error:
            self.warning(f"could not write to the run's records ({error}); training continues")


def _tensorboard_writer(folder: Path):
    # tensorboard reads files through TensorFlow where that is installed, which takes seconds to import and gains nothing here
    if "tensorflow" not in sys.modules:
        sys.modules.setdefault("tensorboard.compat.notf", type(sys)("tensorboard.compat.notf"))
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
