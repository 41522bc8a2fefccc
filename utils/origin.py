"""Config of a GPT's file (`Checkpoint.config`): the record of what its weights are and belong to, and its comparison.

    {"version": 2, "model": {…}, "layout": {…}, "conditions": {…}, "tokenizer": fingerprint, "classes": [names by label],
     "codes": [identity of each code folder], "text_encoder": fingerprint, "imports": [files that --import ran]}

Every entry may be absent: published files have none, files of the first edition lack them. What one side lacks is not
compared.
"""

from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any

from utils.registry import IMPORTED

VERSION = 2


def origin(**entries: Any) -> dict[str, Any]:
    """Return a record of the entries that are known (not None), and of the files that --import has run."""
    imports = {"imports": list(IMPORTED)} if IMPORTED else {}
    return {"version": VERSION, **{name: value for name, value in entries.items() if value is not None}, **imports}


def same_tokenizer(one: str | None, other: str | None) -> bool:
    """Compare two fingerprints as far as both go: the first edition recorded 16 digits. Unknown ones agree with all."""
    digits = min(len(one or ""), len(other or ""))
    return (one or "")[:digits] == (other or "")[:digits]


def require_encoder(config: Mapping[str, Any], encoder: str | None, name: str) -> None:
    """Raise ValueError where a GPT records that it was trained with another text encoder. name: whose `encoder` is."""
    trained = config.get("text_encoder")
    if None not in (trained, encoder) and trained != encoder:
        raise ValueError(
            f"the GPT was trained with text encoder {trained}, {name} is of {encoder}: give the one it was trained with"
        )


def require_same(
    one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str], names: tuple[str, str], remedy: str
) -> list[str]:
    """Compare two records. names: of what they are records of. Returns the keys that one of them alone has.

    Raises ValueError with both values of what differs, and the remedy.
    """
    both = [key for key in keys if one.get(key) is not None and other.get(key) is not None]
    wrong = [words for key in both if (words := _difference(key, one[key], other[key]))]
    if wrong:
        raise ValueError(f"{names[0]} and {names[1]} do not belong together: {'; '.join(wrong)}: {remedy}")
    return [key for key in keys if (one.get(key) is None) != (other.get(key) is None)]


def listed_classes(classes: Sequence[str]) -> str:
    """Return class names with their labels, for a line of the log."""
    listed = [f"{label} {name}" for label, name in enumerate(classes)]
    return ", ".join(listed if len(listed) <= 20 else [*listed[:19], "…", listed[-1]])


def _difference(key: str, one: Any, other: Any) -> str | None:
    if key == "tokenizer":
        return None if same_tokenizer(one, other) else f"tokenizer {one} and {other}"
    if one == other:
        return None
    if key == "classes":
        return _different_classes(one, other)
    if key == "codes":
        return _different_codes(one, other)
    return f"{key.replace('_', ' ')} {short(one)} and {short(other)}"


def _different_classes(one: Sequence[str], other: Sequence[str]) -> str:
    for label, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return f"class {label} is {short(a)} and {short(b)} ({len(one)} and {len(other)} classes)"
    return f"{len(one)} classes and {len(other)}"


def _different_codes(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str | None:
    if len(one) != len(other):
        return f"codes of {len(one)} folders and of {len(other)}"
    found = [_difference(f"codes' {key}", a[key], b[key]) for a, b in zip(one, other) for key in a if key in b]
    return "; ".join(filter(None, found)) or None
