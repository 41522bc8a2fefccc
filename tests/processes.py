"""Runs training scripts in processes forked from one that has imported everything, as fast as tests need them.

    python tests/processes.py PLAN.json

The plan is a list of lives, one after another: {"module", "args", "world", "kill_at" (a glob; the processes are killed
when it matches a folder or a file that is not empty, and do no more with files until then), "signal", "only" (the rank that gets it),
"watch" (a file that gets the samples read), "imports" (further modules to import once), "fails" (whether every process has to end with an error)}. A life that is not to be killed has to end well. Each forked process
joins its group through the environment, as under torchrun.
"""

import contextlib
import glob
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 200.0


def live(life: dict) -> None:
    """One run, to its end or to its killing."""
    from tests.helpers import free_port

    world, port = life.get("world", 1), free_port()
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            os._exit(run(life))
        children.append(child)
    killed = kill_when_due(life, children)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if life.get("fails"):
        codes = [code != 1 for code in codes]
    if not killed and any(codes):
        sys.exit(f"{life}: exit codes {codes}")
    print(f"life: {'killed' if killed else 'ended'}", flush=True)


def run(life: dict) -> int:
    """What a forked process does; its exit code."""
    module = importlib.import_module(life["module"])
    if "watch" in life:
        watch_samples(life["watch"])
    if "kill_at" in life and not {"signal", "only"} & life.keys():
        sys.addaudithook(lambda event, _: halt(event, life["kill_at"]))
    try:
        module.main(module.flags().parse_args(list(map(str, life["args"]))))
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


class SeenCodes:
    """A data set that writes down which samples are read of it."""

    def __init__(self, data, file):
        self.data, self.file = data, file

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __len__(self):
        return len(self.data)

    def __getitems__(self, indices):
        with open(self.file, "a") as f:
            f.write(json.dumps([int(os.environ.get("RANK", 0)), list(map(int, indices))]) + "\n")
        return [self.data[index] for index in indices]


def watch_samples(file: str) -> None:
    """Has the data set write down which samples are read of it, and by which process."""
    from autoregressive.train import class_data, text_data

    codes, pairs = class_data.codes_of, text_data.build_dataset
    class_data.codes_of = lambda args, **kwargs: SeenCodes(codes(args, **kwargs), file)
    text_data.build_dataset = lambda args, **kwargs: SeenCodes(pairs(args, **kwargs), file)


def due(pattern: str) -> bool:
    """Tell whether a life's moment has come."""
    for path in glob.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # renamed since
            if os.path.isdir(path) or os.path.getsize(path):
                return True
    return False


def halt(event: str, pattern: str) -> None:
    """Has a process wait to be killed, where it would open or rename a file after the moment: whoever looks late finds it there."""
    if event in ("open", "os.rename") and due(pattern):
        time.sleep(LIMIT)


def kill_when_due(life: dict, children: list[int]) -> bool:
    """Waits for the moment and kills, or for the end of a life that has none; whether it killed."""
    start, number = time.monotonic(), getattr(signal, life.get("signal", "SIGKILL"))
    if "kill_at" not in life:
        return False
    while time.monotonic() - start < LIMIT:
        if due(life["kill_at"]):
            for child in children if "only" not in life else [children[life["only"]]]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
            return number == signal.SIGKILL
        if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children):
            return False  # it ended before
        time.sleep(0.0005)
    raise TimeoutError(f"{life} was never due to be killed")


def main() -> None:
    sys.path.insert(0, str(ROOT))
    plan = json.loads(Path(sys.argv[1]).read_text())
    import torch

    torch.set_num_threads(1)
    # Once, and not in every process; the rest is in tests/forkserver.py.
    for name in (name for life in plan for name in [life["module"], *life.get("imports", ())]):
        importlib.import_module(name)
    for life in plan:
        live(life)


if __name__ == "__main__":
    main()
