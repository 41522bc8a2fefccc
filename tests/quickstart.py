"""scripts/quickstart.sh with another folder and few steps."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests import forkserver
from tests.helpers import ROOT


def small_recipe(folder: Path, *replacements: tuple[str, str, int]) -> tuple[Path, Callable[..., str]]:
    """Writes it to `folder`: the folder it leaves things in, and a function that runs it with words of the command line.

    replacements: more of (pattern, replacement, how many times it must be found).
    """
    recipe = (ROOT / "scripts" / "quickstart.sh").read_text()
    out = folder / "quickstart"
    for before, after, times in (
        (r'cd "\$\(dirname "\$0"\)/\.\."', f'cd "{ROOT}"', 1),
        (r"out=quickstart left=quickstart", f'out="{out}" left="{out}"', 1),
        (r"bash scripts/setup.sh quickstart [^\n]*\nsource .venv/bin/activate\n", "", 1),
        (r"--max-steps \d+", "--max-steps 2", 4),
        (r"--num-fid-samples \d+", "--num-fid-samples 20", 2),
        (r"--ten-crop --crop-range 1.1 ", "", 1),
        *replacements,
    ):
        recipe, replaced = re.subn(before, after, recipe)
        assert replaced == times, before
    script = folder / "quickstart.sh"
    script.write_text(recipe)
    environment = {**os.environ, "PATH": f"{forkserver.shim()}{os.pathsep}{os.environ['PATH']}"}

    def run(*words):
        done = subprocess.run(
            ["bash", str(script), *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return out, run
