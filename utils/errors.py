"""Errors that end a run on all of its processes."""


class AgreedError(ValueError):
    """Raised by every process with the same words: the first one tells them, the others leave quietly."""
