"""Plugin that vLLM calls in each of its processes before it reads a model (entry point `vllm.general_plugins`).

vLLM is given the folder vllm_model/ as its model, the checkpoint's config in its place, and the load format PLUGIN.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading

ARCHITECTURE = "AutoregressiveImageGPT"
PLUGIN = "autoregressive_image_gpt"  # as pyproject.toml names it
STARTED_BY = "AUTOREGRESSIVE_ENGINE_STARTED_BY"  # in the environment of an engine's processes: who started it
_PR_SET_PDEATHSIG = 1  # of Linux, <sys/prctl.h>


def register() -> None:
    """Tells vLLM of the architecture and the load format; from now on a process of an engine ends with its parent."""
    end_with_parent()
    from vllm import ModelRegistry

    import autoregressive.serve.loader  # noqa: F401 - registers the load format

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "autoregressive.serve.model:ImageGPT")


def end_with_parent() -> None:
    """Has a process that an engine started be killed when its parent ends, however that ends: memory must not stay taken."""
    if os.environ.get(STARTED_BY) in (None, str(os.getpid())):
        return
    parent = multiprocessing.parent_process()  # None as long as the main module is imported again
    if sys.platform == "linux":  # the kernel does it, even to a process that is stopped
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent and os.getppid() != parent.pid:
            os._exit(1)
    elif parent:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
