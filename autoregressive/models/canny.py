"""Edges of images by Canny's rule, as OpenCV draws them: `cv2.Canny(image, 100, 200)`, by which ControlAR was trained."""

import torch
import torch.nn.functional as F
from torch import Tensor

WEAK, STRONG = 100, 200
TAN_22 = 13573  # the tangent of 22.5 degrees in units of 2^-15, as OpenCV rounds it


def canny(images: Tensor) -> Tensor:
    """Draw the edges of images: uint8 (B, channels, H, W) -> uint8 (B, 1, H, W), 255 for edges and 0 elsewhere.

    An edge pixel's gradient is the largest across the edge and above WEAK, and such pixels lead to one above STRONG. The
    gradient is Sobel's, |dx| + |dy|, of the channel where it is largest.
    """
    height, width = images.shape[-2:]
    x = F.pad(images.float(), (1, 1, 1, 1), mode="replicate").int()

    def at(t: Tensor, down: int, right: int) -> Tensor:
        return t[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    across = at(x, -1, 1) + 2 * at(x, 0, 1) + at(x, 1, 1) - at(x, -1, -1) - 2 * at(x, 0, -1) - at(x, 1, -1)
    downwards = at(x, 1, -1) + 2 * at(x, 1, 0) + at(x, 1, 1) - at(x, -1, -1) - 2 * at(x, -1, 0) - at(x, -1, 1)
    size = across.abs() + downwards.abs()
    channel = size.argmax(1, keepdim=True)
    across, downwards, size = (t.gather(1, channel) for t in (across, downwards, size))

    beside = F.pad(size, (1, 1, 1, 1))
    flat, steep = across.abs() * TAN_22, downwards.abs() << 15
    is_across, is_down = steep < flat, steep > flat + (across.abs() << 16)
    falls = (across < 0) == (downwards < 0)
    one = torch.where(falls, at(beside, -1, -1), at(beside, -1, 1))
    other = torch.where(falls, at(beside, 1, 1), at(beside, 1, -1))
    peak = (size > one) & (size > other)
    peak = torch.where(is_down, (size > at(beside, -1, 0)) & (size >= at(beside, 1, 0)), peak)
    peak = torch.where(is_across, (size > at(beside, 0, -1)) & (size >= at(beside, 0, 1)), peak)
    peak &= size > WEAK

    edges = peak & (size > STRONG)
    while True:
        grown = F.max_pool2d(edges.float(), 3, stride=1, padding=1).bool() & peak
        if torch.equal(grown, edges):
            return edges.to(torch.uint8) * 255
        edges = grown
