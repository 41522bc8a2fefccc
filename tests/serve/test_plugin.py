"""Ends of what an engine starts: the same for vLLM's processes (test_vllm_server.py), here without vLLM."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT

# A parent that starts a child as vLLM does, by `spawn`; the child imports this module again, before it is given its work.
SCRIPT = """
import multiprocessing, os, sys, time
from autoregressive.serve.plugin import STARTED_BY, end_with_parent

if __name__ == "__mp_main__" and sys.argv[1] == "at once":
    end_with_parent()

def work():
    if sys.argv[1] == "later":
        end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(300)

if __name__ == "__main__":
    os.environ[STARTED_BY] = str(os.getpid())
    end_with_parent()  # of the parent itself nothing is expected
    multiprocessing.get_context("spawn").Process(target=work).start()
    time.sleep(300)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is of Linux")
@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("stopped", [False, True])
def test_process_of_an_engine_ends_with_its_parent(tmp_path, when, stopped):
    (tmp_path / "starts.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "starts.py", when]
    with subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        if stopped:
            os.kill(child, signal.SIGSTOP)
        parent.kill()
    until = time.monotonic() + 120
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return (
                file.read().rpartition(")")[2].split()[0] != "Z"
            )  # a child of nobody may wait for its end to be noted
    except FileNotFoundError:
        return False
