"""Runs torchrun without the traceback that follows a script's own error line.

python3 scripts/torchrun.py --standalone --nproc_per_node=8 autoregressive/train/train_c2i.py --code-path codes

The wrappers call it. Flags and the exit code are torchrun's.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

# Loggers whose lines the processes or `main` say better.
TALKATIVE = ("elastic.multiprocessing.api", "elastic.agent.server.api", "run")


def main(words: list[str]) -> int:
    """Run torchrun; return its exit code."""
    for name in TALKATIVE:
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)
    try:
        run(parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: process {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        elif failure.exitcode > 1:  # 1: it has said why
            print(f"error: process {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"stopped by {signal.Signals(error.sigval).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
