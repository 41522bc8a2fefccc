"""The meaning of float32 on a GPU: full float32 unless TF32 is asked for.

PyTorch lets cuDNN's convolutions round float32 to the 10 bits of TF32 by default, so that a tokenizer's codes and pixels would
depend on the card. Neither setting has an effect on a CPU or on half precision.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORDS = {
    "none": "none: float32 without TF32",
    "fp32": "fp32: float32 without TF32",
    "tf32": "tf32: float32 with products and convolutions in TF32",
}


def use_tf32(allowed: bool) -> None:
    """Set for the process whether float32 products and convolutions may round to TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    _convolve_in_tf32(allowed)


def _convolve_in_tf32(allowed: bool) -> None:
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = allowed
    for operation in (cudnn.conv, cudnn.rnn):  # decides over the line above where torch.backends.fp32_precision is set
        operation.fp32_precision = "tf32" if allowed else "ieee"


def add_up_in_one_order() -> None:
    """Have PyTorch take kernels whose sums do not depend on the order in which threads of a GPU arrive.

    Without, gradients of attention and of embeddings differ from run to run in their last bits. Where there is no such
    kernel PyTorch raises RuntimeError; asked for a warning instead, it takes attention's kernels with any order. To be
    called before the first product on the GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute without TF32 inside the block, then restore what the process allowed.

    The setting is the process's: threads that enter the block should share a process where `use_tf32(False)` was called.
    """
    cudnn: Any = torch.backends.cudnn
    convolutions = cudnn.conv.fp32_precision == "tf32"
    try:
        products = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through torch.backends.fp32_precision, of which the older name knows nothing
        products = "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    use_tf32(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        _convolve_in_tf32(convolutions)
