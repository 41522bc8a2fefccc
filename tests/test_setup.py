"""scripts/setup.sh and scripts/serve.sh: what they say where nothing is installed yet. The tests' own start is their use."""

import os
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.mark.parametrize(
    "words, environment, message",
    [
        (["tests"], {}, "'tests' is nothing to set up; there are text, train,"),
        (["train", "serve"], {}, "serve is an environment of its own"),
        (["serve"], {"SERVE_DEVICE": "tpu"}, "SERVE_DEVICE is 'tpu'; it is gpu or cpu"),
        (["serve"], {"SERVE_DEVICE": "cpu", "PYTHON": "false"}, "Python 3.11 or newer is needed; 'false' is"),
    ],
)
def test_mistakes(words, environment, message):
    done = run("setup.sh", *words, **environment)
    assert done.returncode in (1, 2) and message in done.stderr


def test_help_of_the_server_installs_nothing(tmp_path):
    done = run("serve.sh", "--help", PYTHON="python3")
    assert done.returncode == 0 and "--max-queue" in done.stdout and "installing" not in done.stdout


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "constraints").glob("*.txt")))
def test_constraints_pin_versions_within_the_ranges_and_name_no_build(name):
    pins = [Requirement(line) for line in (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert "torch" in versions and all(str(pin.specifier).startswith("==") for pin in pins)
    assert not [name for name, version in versions.items() if "+" in version or name.startswith(("nvidia", "cuda"))]
    for requirement in map(Requirement, required(name)):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), requirement


def required(name: str) -> list[str]:
    """Return the lines of requirements.txt and of the extras of pyproject.toml that the environment may have."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    return lines + [line for extra in extras if name != "main" or extra != "vllm" for line in extras[extra]]
