"""How many loader processes a run gets."""

import os

from utils.distributed import Distributed


def loader_workers(asked: int, dist: Distributed) -> int:
    """`asked`, but no more than this process's share of the processors it may use; 0 loads in the process itself."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = processors // max(dist.local_world_size, 1)
    return max(0, min(asked, share))
