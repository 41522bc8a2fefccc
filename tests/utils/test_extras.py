"""utils/extras.py: what is said where a package is absent, and which packages a command may lack."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from tests.autoregressive.test_sample_scripts import line
from tests.helpers import ROOT
from utils.cli import flag_parser, run_script
from utils.extras import NOT_FOR_SCRIPTS, PACKAGES, how_to_install, optional_imports

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
BASE = set(re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)) | {"PIL"}
# Optional parts that a message of their own names, and what comes with torch.
ALONE = {"torchao", "open_clip", "wandb", "vllm", "functorch"}
ROOMS = ("autoregressive", "tokenizer", "dataset", "language", "evaluations", "tools", "utils", "app")
# Runs a script as if only the packages of requirements.txt, and what these bring, were there.
BARE = """
import runpy, sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name.partition(".")[0] in {absent} else find(name, *where)
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def modules_imported() -> set[str]:
    """The modules of other projects that this project's files import, at their top or later."""
    found = set()
    for path in [path for room in ROOMS[:-1] for path in (ROOT / room).rglob("*.py")] + [ROOT / "app.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module)
    found = {name if name in PACKAGES else name.partition(".")[0] for name in found}
    return found - {*sys.stdlib_module_names, *ROOMS}


def test_imported_modules_belong_to_the_base_or_to_an_extra():
    missing = {
        module for module in modules_imported() - BASE - ALONE if not re.search(r"\[(\w+)\]\"$", how_to_install(module))
    }
    assert not missing


@pytest.mark.parametrize(
    "module, extra",
    [
        ("transformers", "text"),
        ("tensorflow", "eval"),
        ("sklearn", "quickstart"),
        ("fastapi", "serve"),
        ("diffusers", "baselines"),
    ],
)
def test_how_to_install_names_the_extra(module, extra):
    assert how_to_install(module).endswith(f'-e "{ROOT}[{extra}]"')


def test_dev_has_all_extras_but_the_environment_of_vllm():
    names = set(re.search(r"\[(.*)\]", EXTRAS["dev"][0])[1].split(","))
    assert names | {"text", "dev", "vllm"} == {*EXTRAS} and {*NOT_FOR_SCRIPTS} <= {*EXTRAS}


@pytest.mark.parametrize("wrapped", [False, True], ids=["script", "library"])
def test_absent_package_ends_a_script_with_one_line(wrapped, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["script"])

    def main(args):
        if not wrapped:
            import gradio
        with optional_imports():
            import gradio  # noqa: F401

    with pytest.raises(SystemExit):
        run_script(main, flag_parser("A script."))
    assert capsys.readouterr().err == f'error: gradio is not installed; python -m pip install -e "{ROOT}[demo]"\n'


def test_absent_package_in_a_loader_process_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)

    def main(args):
        raise ModuleNotFoundError(
            "Caught ModuleNotFoundError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "ModuleNotFoundError: No module named 'torchvision'\n"
        )

    with pytest.raises(SystemExit):
        run_script(main, flag_parser("A script."))
    assert capsys.readouterr().err == f'error: torchvision is not installed; python -m pip install -e "{ROOT}[train]"\n'


@pytest.mark.slow
def test_base_packages_draw_pictures_of_classes(small_files, tmp_path):
    absent = modules_imported() - BASE - {"functorch"}
    script = ROOT / "autoregressive/sample/sample_c2i.py"
    argv = [script, *line(small_files, "--output", tmp_path / "grid.png", "--device", "cpu")]
    code = BARE.format(absent=absent, argv=[str(word) for word in argv])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert (tmp_path / "grid.png").stat().st_size
