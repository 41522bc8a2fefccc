"""The walls of CONTRIBUTING.md that a reader of imports can see."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, scripts

ROOMS = ("autoregressive", "tokenizer", "dataset", "language", "evaluations", "tools", "utils")
OTHERS = ("benchmarks", "examples", "app.py")
# room: what its modules must not import
FORBIDDEN = {
    "utils": ("autoregressive", "tokenizer", "dataset", "language", "evaluations", "tools", "benchmarks", "app", "tests"),
    "dataset": ("autoregressive", "tokenizer", "language", "evaluations", "tools"),
    "autoregressive/models": (
        "autoregressive.train", "autoregressive.sample", "autoregressive.serve", "autoregressive.pipeline", "dataset",
        "tokenizer", "language", "evaluations", "tools", "utils",
    ),
    "autoregressive/pipeline.py": ("autoregressive.train", "autoregressive.sample", "autoregressive.serve", "dataset", "tools"),
    "autoregressive/train": ("autoregressive.sample", "autoregressive.serve", "tools"),
    "autoregressive/sample": ("autoregressive.train", "autoregressive.serve", "tools", "dataset"),
    "tokenizer": ("autoregressive", "language", "evaluations", "tools"),
    "tokenizer/base.py": ("dataset", "utils"), "tokenizer/tokenizer_image/vq_model.py": ("dataset", "utils"),
    "tokenizer/tokenizer_image/quantizers": ("dataset", "utils"),
}  # fmt: skip
ALLOWED = {"utils.precision", "utils.errors", "utils.registry", "utils.rng"}  # no file, no flag
# Prints what comes with each module's `flags()` that --help is not to wait for.
HELP = """
import importlib, sys
HEAVY = {"torch", "torchvision", "torchao", "transformers", "diffusers", "tensorflow", "numpy", "scipy", "sklearn", "PIL",
         "matplotlib", "gradio", "fastapi", "vllm"}
for name in sys.argv[1:]:
    before = HEAVY & {*sys.modules}
    importlib.import_module(name).flags().format_help()
    print(name, ", ".join(sorted((HEAVY & {*sys.modules}) - before)), sep=": ")
"""


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
        wrong = [
            name for name in imports(path) - ALLOWED for wall in FORBIDDEN[place] if (name + ".").startswith(wall + ".")
        ]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


# Recipes: files beside the scripts and utils/cli.py that declare flags, which several scripts share.
RECIPES = (
    "autoregressive/sample/flags.py", "autoregressive/train/flags.py", "benchmarks/gpu_parts.py", "dataset/flags.py", "evaluations/report.py", "examples",
    "tokenizer/reconstruction_flags.py", "tools/steps.py", "utils/training/flags.py",
)  # fmt: skip
# Modules whose imports of scripts are still to be moved.
PENDING = ("app.py",)
PARSING = {
    "ArgumentParser",
    "ArgumentTypeError",
    "BooleanOptionalAction",
    "add_argument",
    "add_argument_group",
    "flag_parser",
}
# Names of published weights, and the files that know some.
PUBLISHED = re.compile(
    r"(encoder|decoder|quantize|(post_)?quant_conv|layers\.\d+|(spe_)?tok_embeddings|cls_embedding)\..+"
)
ADAPTERS = (
    "language/t5.py",
    "autoregressive/released.py",
    "autoregressive/systems.py",
    "tokenizer/released.py",
    "tokenizer/other_families.py",
    "tokenizer/base.py",
)


def sources() -> dict[Path, ast.Module]:
    """Every module outside the tests, by its path from the root."""
    found = {
        path.relative_to(ROOT): ast.parse(path.read_text()) for place in (*ROOMS, *OTHERS) for path in modules(place)
    }
    assert len(found) > 100
    return found


def test_nothing_imports_a_script():
    known = {*scripts()}
    for path, tree in sources().items():
        named = {
            f"{node.module}.{a.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names
        }
        names = named | imports(ROOT / path)
        assert str(path) in PENDING or not names & known, f"{path} imports {sorted(names & known)}"


def test_scripts_and_recipes_alone_declare_flags():
    allowed = {"utils/cli.py", *(name.replace(".", "/") + ".py" for name in scripts())}
    for path, tree in sources().items():
        names = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(tree)}
        if str(path) not in allowed and not str(path).startswith(RECIPES):
            assert not names & PARSING, f"{path} knows argparse: {sorted(names & PARSING)}"


def test_adapters_alone_know_published_names_of_weights():
    for path, tree in sources().items():
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        wrong = sorted(text for text in texts if PUBLISHED.fullmatch(text))
        assert str(path) in ADAPTERS or not wrong, f"{path} knows {wrong}"


def test_seams_are_asked_by_their_base_alone():
    """Decode loop, trainer, server and data do not know which trunks, layouts, conditions and quantisers there are."""
    kinds = (
        "autoregressive.models.gpt",
        "autoregressive.models.rar",
        "autoregressive.models.lpd",
        "autoregressive.models.layouts.",
        "autoregressive.models.conditions.",
        "tokenizer.tokenizer_image.quantizers.",
    )
    places = (
        "autoregressive/models/generate.py",
        "autoregressive/models/decode_step.py",
        "autoregressive/serve/native.py",
        "autoregressive/serve/server.py",
        "autoregressive/serve/body.py",
        "utils",
        "dataset",
    )
    for path in (path for place in places for path in modules(place)):
        wrong = [name for name in imports(path) if name.startswith(kinds) and not name.endswith(".base")]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


# What others import of tokenizer/, besides its scripts, and what of a tokenizer they never touch.
DOORS = ("base", "load", "released", "codecs", "reconstruction", "tokenizer_image.sizes", "tokenizer_image.hub", "tokenizer_image.vq_model.VQ_models")  # fmt: skip
INSIDES = {"quantize", "quant_conv", "post_quant_conv", "decode_code", "get_codebook_entry", "codebook_used"}


def test_nobody_looks_inside_a_tokenizer():
    """Others know `to_codes`, `to_pixels` and what else tokenizer/base.py says."""
    known = {f"tokenizer.{door}" for door in DOORS} | {*scripts()}
    for path, tree in sources().items():
        wrong = set()
        for node in ast.walk(tree) if path.parts[0] != "tokenizer" else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokenizer":
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                wrong |= set() if node.module in known else names - known
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") != "args":
                wrong |= {node.attr} & INSIDES
        assert not wrong, f"{path} looks inside a tokenizer: {sorted(wrong)}"


@pytest.mark.parametrize("room", ROOMS)
def test_modules_say_what_they_are_for(room):
    for path in sorted((ROOT / room).rglob("*.py")):
        source = path.read_text()
        if source.strip():
            assert ast.get_docstring(ast.parse(source)), f"{path.relative_to(ROOT)} has no docstring"


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_begin_with_a_verb_or_a_noun(room):
    wrong = {"What", "Whether", "Which", "Of", "That", "Those", "How", "Where", "As", "By"}
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or "-"
                assert text.split()[0] not in wrong, f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"


def test_help_needs_nothing_heavy():
    """All scripts in one process: what comes with a script is its own, or that of what it imports."""
    names = scripts()
    assert {"app", "autoregressive.sample.sample_c2i", "benchmarks.sampling", "tools.convert_codes"} <= {*names}
    command = [sys.executable, "-c", HELP, *names]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name}: " for name in names]
