"""Errors that several parts of the project raise and catch, and what an error says to a user."""

import re
from numbers import Integral
from reprlib import repr as shorten
from typing import Any

from utils.extras import explain

_LOST_PROCESS = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket timeout|timed out|remote process|nccl", re.I
)
_MEMORY = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)


class AgreedError(ValueError):
    """Raised by every process with the same words: the first one tells them, the others leave quietly."""


class NotFiniteError(ValueError):
    """Raised for images whose logits or pixels are NaN or infinite."""


def require_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError for anything but a whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {shorten(value)}: give a whole number, at least {least}")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on the host or on a device. Not every library raises an OutOfMemoryError."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or bool(_MEMORY.search(str(error)))


def is_lost_process(error: BaseException) -> bool:
    """Tell whether torch.distributed reports another process as gone."""
    return isinstance(error, RuntimeError) and bool(_LOST_PROCESS.search(str(error)))


def words_of(error: BaseException) -> str:
    """Return an error's message; of one raised in a loader process without the traceback that torch puts before it."""
    text = explain(error) if isinstance(error, ModuleNotFoundError) else str(error)
    if is_out_of_memory(error):
        first = (text.strip().splitlines() or ["no more is said"])[0]
        return f"out of memory ({first}): take fewer at once; in training --gradient-accumulation-steps splits a batch"
    if not text.startswith(f"Caught {type(error).__name__} in "):
        return text
    return text.rpartition(f"\n{type(error).__name__}: ")[2].strip()


def beginning(text: str, length: int = 60) -> str:
    """Return a text's beginning, for a message."""
    return text if len(text) <= length else text[: length - 1] + "…"
