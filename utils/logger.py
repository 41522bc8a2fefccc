"""Lines on the terminal, with their times, from the first process."""

import logging
import sys


def console_logger(name: str = "run", main: bool = True) -> logging.Logger:
    """Return a logger that prints times and messages; on processes other than the first it prints warnings only."""
    logger = logging.getLogger(name)
    logger.propagate = False
    logger.setLevel(logging.INFO if main else logging.WARNING)
    if not logger.handlers:
        handler = _StandardOutput()
        handler.setFormatter(Lines())
        logger.addHandler(handler)
    return logger


class Lines(logging.Formatter):
    """Times and messages, in which bytes of file names that are not UTF-8 are escaped: every stream can write them."""

    def __init__(self):
        super().__init__("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).encode("utf-8", "backslashreplace").decode()


class _StandardOutput(logging.StreamHandler):
    """Writes to sys.stdout as it is at each line, which a caller may have redirected since the logger was made."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)
