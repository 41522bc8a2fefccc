"""Images through a tokenizer and back: the loop behind every reconstruction figure.

for originals, recons, codes in reconstruct(tokenizer, loader, device): ...
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from tokenizer.tokenizer_image.vq_model import VQModel
from utils.images import to_uint8


@torch.inference_mode()
def reconstruct(
    tokenizer: VQModel, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Encodes and decodes batches of (images (B, 3, H, W) in [-1, 1], labels).

    Yields originals and reconstructions, uint8 (B, H, W, 3), and codes, int64 (B, N) in raster order.
    """
    for images, _ in batches:
        quant, _, (_, _, indices) = tokenizer.encode(images.to(device))
        yield to_uint8(images), to_uint8(tokenizer.decode(quant)), indices.view(len(images), -1).cpu().numpy()
