"""How many loader processes a run gets."""

import os

from utils.distributed import Distributed


def loader_workers(asked: int, dist: Distributed) -> int:
    """`asked`, but no more than this process's share of the machine's processors; 0 loads in the process itself."""
    share = (os.cpu_count() or 1) // max(dist.local_world_size, 1)
    return max(0, min(asked, share))
