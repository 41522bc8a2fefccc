"""The walls of CONTRIBUTING.md that a reader of imports can see."""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

ROOMS = ("autoregressive", "tokenizer", "dataset", "language", "evaluations", "tools", "utils")
# room: what its modules must not import
FORBIDDEN = {
    "utils": ("autoregressive", "tokenizer", "dataset", "language", "evaluations", "tools"),
    "dataset": ("autoregressive", "tokenizer", "language", "evaluations", "tools"),
    "autoregressive/models": (
        "autoregressive.train", "autoregressive.sample", "autoregressive.serve", "autoregressive.pipeline", "dataset",
        "tokenizer", "language", "evaluations", "tools", "utils",
    ),
    "autoregressive/pipeline.py": ("autoregressive.train", "autoregressive.sample", "autoregressive.serve", "dataset", "tools"),
    "autoregressive/train": ("autoregressive.sample", "autoregressive.serve", "tools"),
    "autoregressive/sample": ("autoregressive.train", "autoregressive.serve", "tools", "dataset"),
    "tokenizer": ("autoregressive", "language", "evaluations", "tools"),
    "tokenizer/tokenizer_image/vq_model.py": ("dataset", "utils"),
}  # fmt: skip


def modules(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.suffix else sorted(path.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("place", FORBIDDEN)
def test_arrows_point_one_way(place):
    assert modules(place)
    for path in modules(place):
        wrong = [name for name in imports(path) for wall in FORBIDDEN[place] if (name + ".").startswith(wall + ".")]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("room", ROOMS)
def test_modules_say_what_they_are_for(room):
    for path in sorted((ROOT / room).rglob("*.py")):
        source = path.read_text()
        if source.strip():
            assert ast.get_docstring(ast.parse(source)), f"{path.relative_to(ROOT)} has no docstring"


def test_torch_is_not_needed_for_help():
    for path in [
        *ROOT.glob("autoregressive/*/*.py"),
        *ROOT.glob("tokenizer/*/*.py"),
        *ROOT.glob("tools/*.py"),
    ]:
        tree = ast.parse(path.read_text())
        if not any(isinstance(node, ast.FunctionDef) and node.name == "flags" for node in tree.body):
            continue
        for node in tree.body:
            names = {a.name for a in node.names} if isinstance(node, ast.Import) else {getattr(node, "module", "")}
            assert not isinstance(node, ast.Import | ast.ImportFrom) or not names & {
                "torch",
                "torchvision",
                "transformers",
            }, path
