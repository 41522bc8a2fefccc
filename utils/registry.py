"""Registry of named implementations: layouts, conditions, tokenizers, quantisers, objectives; and files that add to it."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

Kind = TypeVar("Kind")
Implementation = TypeVar("Implementation", bound=Any)


class Registry(Generic[Kind]):
    """Implementations by name.

    kind: what they are called in an error, such as "layout". modules: of implementations by name, each imported when its
    name is first asked for.
    """

    def __init__(self, kind: str, modules: Mapping[str, str] | None = None):
        self.kind = kind
        self._modules = dict(modules or {})
        self._known: dict[str, Kind] = {}

    def register(self, name: str) -> Callable[[Implementation], Implementation]:
        """Return the decorator that registers an implementation under a name. It raises ValueError where the name is taken."""

        def register(implementation: Implementation) -> Implementation:
            if name in self._known or self._modules.get(name, implementation.__module__) != implementation.__module__:
                raise ValueError(f"the {self.kind} {name!r} is registered already; give this one another name")
            self._known[name] = implementation
            return implementation

        return register

    def __getitem__(self, name: str) -> Kind:
        """Return the implementation. Raises ValueError where the name is not registered."""
        if name not in self._known and name in self._modules:
            importlib.import_module(self._modules[name])
        if name not in self._known:
            what = f"no {self.kind} is called {name!r}; known are {', '.join(self)}"
            raise ValueError(f"{what}; --import FILE.py registers those of a file")
        return self._known[name]

    def build(self, name: str, /, *args: Any, **settings: Any) -> Any:
        """Call the implementation. Raises ValueError where it is not registered, or takes no such settings."""
        kind: Any = self[name]
        try:
            inspect.signature(kind).bind(*args, **settings)
        except TypeError as error:
            known = ", ".join(inspect.signature(kind).parameters)
            raise ValueError(f"the {self.kind} {name!r} {error}; it takes {known}") from error
        return kind(*args, **settings)

    def __contains__(self, name: object) -> bool:
        return name in {*self}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._modules, *self._known]))


# Files that --import has run, as they were named.
IMPORTED: list[str] = []


def import_file(path: str | Path) -> None:
    """Run a Python file for what it registers, once. Raises FileNotFoundError, ValueError for what is no .py file."""
    file = Path(path).resolve()
    if file.suffix != ".py":
        raise ValueError(f"--import takes a Python file, got {path}")
    if not file.is_file():
        raise FileNotFoundError(f"--import {path}: there is no such file")
    name = f"imported_{file.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file):
        return
    if loaded is not None:
        raise ValueError(f"--import {path} and {loaded.__file__} have the same name; rename one of them")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    IMPORTED.append(str(path))
