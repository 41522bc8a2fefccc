"""The names of a model's classes, and the class that a name or a number stands for: one rule for page, server and scripts.

names = class_names(1000)                        # ImageNet's
find_class("Cardigan", names), find_class("cardigan", names)        # 264 (the dog), 474 (the garment)
"""

import difflib
import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from utils.errors import beginning

_IMAGENET = Path(__file__).resolve().parent / "serve" / "imagenet_classes.json"


@cache
def imagenet_names() -> tuple[str, ...]:
    """Return torchvision's names of ImageNet's classes, by number."""
    return tuple(json.loads(_IMAGENET.read_text(encoding="utf-8"))["names"])


def class_names(num_classes: int, file: str | Path | None = None, recorded: Sequence[str] | None = None) -> list[str]:
    """Return the names of a model's classes, by label.

    They are the lines of `file`; else those that the model's checkpoint has `recorded`, and behind them numbers; ImageNet's
    where there are a thousand without names or with WordNet's numbers (n01440764).
    Raises FileNotFoundError, and ValueError for a file with another number of lines.
    """
    if file is not None:
        names = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(names) != num_classes:
            raise ValueError(f"{file} has {len(names)} names, one a line, and the model {num_classes} classes")
        return names
    recorded = list(recorded or [])
    if num_classes == 1000 and (
        not recorded or (len(recorded) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in recorded))
    ):
        return list(imagenet_names())
    return recorded[:num_classes] + [str(label) for label in range(len(recorded), num_classes)]


def class_choice(label: int, name: str) -> str:
    """Return how a class is listed: "207: golden retriever"."""
    return name if name == str(label) else f"{label}: {name}"


def find_class(asked: str | int | None, names: Sequence[str]) -> int:
    """Return the label that a name, a number, or a choice of a list ("207: golden retriever") stands for.

    A name's exact spelling comes first. Then a number, unless classes are called by other numbers than their own; then a
    name without regard to case, spaces and underscores, where it is one class's alone.

    Raises ValueError that names classes that are near, or among which it cannot choose.
    """
    text = "" if asked is None else " ".join(str(asked).split())
    if not text:
        raise ValueError("no class is chosen: type a name or a number, and choose one of the list")
    is_label = isinstance(asked, int)
    exact = [i for i, name in enumerate(names) if not is_label and text in (name, class_choice(i, name))]
    if exact:
        return _only(exact, text, names)
    renumbered = any(name.isdecimal() and name != str(label) for label, name in enumerate(names))
    if is_label or (not renumbered and re.fullmatch(r"[+-]?[0-9]{1,19}", text)):
        if not 0 <= int(text) < len(names):
            raise ValueError(f"class {int(text)} is out of range: the model has classes 0 to {len(names) - 1}")
        return int(text)
    alike = [i for i, name in enumerate(names) if _folded(text) in (_folded(name), _folded(class_choice(i, name)))]
    if alike:
        return _only(alike, text, names)
    folded = _folded(text)
    near = [i for i, name in enumerate(names) if len(text) > 1 and folded in _folded(name)]
    near = near or [names.index(name) for name in difflib.get_close_matches(text[:60], names, n=3, cutoff=0.6)]
    near = near or [i for i, name in enumerate(names) if f" {_folded(name)} " in f" {folded[:200]} "]
    if re.fullmatch(r"[0-9]{1,9}", text) and int(text) < len(names):  # perhaps a label is meant
        near = [int(text), *(label for label in near if label != int(text))]
    close = [class_choice(label, names[label]) for label in near[:5]]
    own = any(name != str(label) for label, name in enumerate(names)) and tuple(names) != imagenet_names()
    if own and not close:
        close = [class_choice(label, name) for label, name in enumerate(names[:5])]
        hint = f"; the model's classes are {', '.join(close)}{', …' if len(names) > len(close) else ''}"
    else:
        hint = f"; close to it: {', '.join(close)}" if close else f"; the model has classes 0 to {len(names) - 1}"
    raise ValueError(f"no class is called {beginning(text)!r}{hint}")


_SPACES = str.maketrans("_-", "  ")


def _folded(name: str) -> str:
    # Composed: folders copied from a Mac have their accents apart.
    return unicodedata.normalize("NFC", " ".join(name.translate(_SPACES).split()).casefold())


def _only(labels: list[int], text: str, names: Sequence[str]) -> int:
    if len(labels) > 1:
        listed = " and ".join(class_choice(label, names[label]) for label in labels)
        raise ValueError(f"{beginning(text)!r} names the classes {listed}: give the exact spelling or the number")
    return labels[0]
