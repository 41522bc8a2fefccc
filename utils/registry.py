"""Registry of named implementations: layouts, conditions, tokenizers, quantisers, objectives."""

from collections.abc import Iterator
from typing import Generic, TypeVar

Kind = TypeVar("Kind")


class Registry(Generic[Kind]):
    """Implementations by name. kind: what they are called in an error, such as "layout"."""

    def __init__(self, kind: str):
        self.kind = kind
        self._known: dict[str, Kind] = {}

    def add(self, name: str, implementation: Kind) -> None:
        """Register an implementation. Raises ValueError where the name is taken."""
        if name in self._known:
            raise ValueError(f"the {self.kind} {name!r} is registered already; give this one another name")
        self._known[name] = implementation

    def __getitem__(self, name: str) -> Kind:
        """Return the implementation. Raises ValueError where the name is not registered."""
        if name not in self._known:
            known = ", ".join(self._known)
            raise ValueError(
                f"no {self.kind} is called {name!r}; known are {known}; --import FILE.py registers those of a file"
            )
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)
