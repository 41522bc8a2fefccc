"""Errors that several parts of the project raise and catch."""


class AgreedError(ValueError):
    """Raised by every process with the same words: the first one tells them, the others leave quietly."""


class NotFiniteError(ValueError):
    """What a network computed for some images is NaN or infinite."""
