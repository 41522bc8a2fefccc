"""scripts/torchrun.py: how a group of processes ends is one line."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed.run

from tests import forkserver
from tests.helpers import ROOT

CHILD = """
import os, sys, time
how = sys.argv[1]
if how == "waits":
    open(os.environ["RANK"], "w").close()
if os.environ["RANK"] == "0" and how == "mistake":
    print("error: no such folder", file=sys.stderr)
    sys.exit(1)
if os.environ["RANK"] == "1" and how == "killed":
    os.kill(os.getpid(), 9)
time.sleep(0 if how == "well" else 600)
"""

SCRIPT = """
from utils import cli
from utils.cli import flag_parser, run_script

cli._AFTER_OTHERS = 100  # however late the first process comes, it ends the second one before that

def main(args):
    raise FileNotFoundError("no such folder")

run_script(main, flag_parser("A script."))
"""


def group_of(folder, how):
    """Return the command line of two processes that end as told."""
    (folder / "child.py").write_text(CHILD)
    return [sys.executable, str(ROOT / "scripts/torchrun.py"), "--standalone", "--nproc_per_node=2", "child.py", how]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("well", 0, ""),
        ("mistake", 1, "error: no such folder\n"),
        ("killed", 1, "error: process 1 was ended by SIGKILL\n"),
    ],
)
def test_the_end_of_a_group_is_one_line(tmp_path, how, code, said):
    done = forkserver.run(group_of(tmp_path, how), cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.stderr, done.returncode) == (said, code)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "said"), [(["--bad"], "unrecognized arguments: --bad"), ([], "no such folder")])
def test_plain_torchrun_ends_its_report_with_the_mistake(tmp_path, words, said):
    (tmp_path / "child.py").write_text(SCRIPT)
    launcher = [sys.executable, torch.distributed.run.__file__, "--standalone", "--nproc_per_node=2", "child.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = forkserver.run([*launcher, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count(f"error: {said}") == 1
    assert f"traceback : {said}" in done.stderr.splitlines()[-2]


@pytest.mark.slow
def test_a_signal_is_one_line(tmp_path):
    group = subprocess.Popen(group_of(tmp_path, "waits"), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "1").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    group.send_signal(signal.SIGTERM)
    assert group.communicate(timeout=120)[1] == "stopped by SIGTERM\n" and group.returncode == 1
