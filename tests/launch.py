"""Runs a script in several processes forked from one that has imported torch: as under torchrun, for one start of Python.

    python tests/launch.py PROCESSES SCRIPT.py FLAGS...

The first process that fails ends the others, and the launcher with code 1.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(processes: int, script: str, flags: list[str]) -> int:
    """Return the exit code, 0 where every process ended well."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers import free_port

    port, left = free_port(), set()
    for rank in range(processes):
        child = os.fork()
        if not child:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {key: str(value) for key, value in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.argv = [script, *flags]
            runpy.run_path(script, run_name="__main__")
            sys.exit()
        left.add(child)
    failed = False
    while left:
        child, status = os.wait()
        left.remove(child)
        if status and not failed:
            failed = True
            for other in left:
                os.kill(other, signal.SIGTERM)
    return int(failed)


if __name__ == "__main__":
    code = main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    sys.exit(code)
