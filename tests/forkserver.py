"""Runs scripts in processes forked from one that has imported torch, since each start of Python would import it for seconds.

done = run([sys.executable, "autoregressive/sample/sample_c2i.py", "--labels", "3"], env=…)
environment["PATH"] = f"{shim()}:{environment['PATH']}"      # python3 of shell scripts goes the same way

python tests/forkserver.py SOCKET                            # the server, started by the first of these
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What takes long to import and the scripts import in `main`: for all of them, and for those whose names have a word.
NEEDED = (
    "torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard", "dataset.build", "autoregressive.pipeline",
    "autoregressive.train.class_data", "autoregressive.train.text_data", "utils.training.trainer",
)  # fmt: skip
TEXT = ("transformers.models.t5.modeling_t5", "transformers.models.auto.tokenization_auto", "sentencepiece")
NEEDED_BY = {
    "t2i": TEXT, "t5": TEXT, "text_encoder": TEXT, "draw_training": ("matplotlib.pyplot",),
    "digit": ("matplotlib.pyplot", "sklearn.datasets", "sklearn.neural_network", "sklearn.svm"),
}  # fmt: skip
# A python3 that has the server run a script, and is Python itself for anything else.
SHIM = """#!{python} -S
import json, os, socket, sys
words = [word for word in sys.argv[1:] if word != "-u"]
if not words or not words[0].endswith(".py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps({{"argv": words, "cwd": os.getcwd(), "env": dict(os.environ)}}).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(asked)
    sys.exit(int(server.recv(16) or 1))
"""


def serve(address: str) -> None:
    """Fork a process for each script that is asked for."""
    sys.path.insert(0, str(ROOT))
    sys.modules.setdefault("tensorboard.compat.notf", type(sys)("tensorboard.compat.notf"))  # as utils/logger.py has it
    for name in NEEDED:
        importlib.import_module(name)
    from tests.helpers import ready_to_fork

    ready_to_fork()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.made")
        listener.listen()
        os.rename(f"{address}.made", address)  # whoever sees it can connect
        while True:
            client, _ = listener.accept()
            size, streams, *_ = socket.recv_fds(client, 8, 3)
            asked = json.loads(b"".join(iter(functools.partial(receive, client, [int.from_bytes(size, "big")]), b"")))
            for name in (name for word, names in NEEDED_BY.items() if word in asked["argv"][0] for name in names):
                importlib.import_module(name)
            if not os.fork():
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(client, streams, asked)
            for stream in streams:
                os.close(stream)
            client.close()


def answer(client: socket.socket, streams: list[int], asked: dict) -> None:
    """Run one script in a child, and tell the client its exit code."""
    script = os.fork()
    if not script:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        sys.argv = asked["argv"]
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    for stream in streams:
        os.close(stream)
    code = os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])
    client.sendall(str(code).encode())
    os._exit(0)


def receive(client: socket.socket, left: list[int]) -> bytes:
    """Return the next bytes of a message of which left[0] are to come."""
    part = client.recv(left[0]) if left[0] else b""
    left[0] -= len(part)
    return part


@functools.cache
def shim() -> Path:
    """Return a folder with a python3 whose scripts the server runs."""
    folder = Path(tempfile.mkdtemp(prefix="forkserver"))
    address = str(folder / "socket")
    server = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.DEVNULL)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    while not os.path.exists(address):
        assert server.poll() is None, "the server of forked scripts has ended"
        time.sleep(0.05)
    for name in ("python3", "python"):
        file = folder / name
        file.write_text(SHIM.format(python=sys.executable, address=address))
        file.chmod(0o755)
    return folder


def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
    """Run a command of Python as subprocess.run does, by the server."""
    return subprocess.run([str(shim() / "python3"), *command[1:]], **options)


if __name__ == "__main__":
    serve(sys.argv[1])
