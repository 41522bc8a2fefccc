"""Choice among a line's captions: `--caption-key`.

caption_of(pairs, 7, "llava", truncated=True)      # 'A bee sits on a flower'
"""

from typing import Protocol

CAPTION_KEYS = ("blip", "llava", "llava_first")
"""The captions of a line, in the order of its `text`."""


class TextSource(Protocol):
    """Files of lines with texts: image-text pairs, or a file of prompts."""

    files: list[tuple[str, int]]

    def texts(self, index: int) -> list[str]: ...
    def where(self, index: int) -> str: ...
    def list_digest(self, k: int) -> str: ...


def caption_of(source: TextSource, index: int, key: str, truncated: bool) -> str:
    """Return a line's caption as it is written there; truncated: up to the first full stop.

    Raises ValueError where the line is damaged or has no caption of this key.
    """
    texts, place = source.texts(index), CAPTION_KEYS.index(key)
    if place >= len(texts):
        raise ValueError(f"{source.where(index)} has {len(texts)} texts, --caption-key {key} is number {place + 1}")
    return texts[place].split(".")[0] if truncated else texts[place]
