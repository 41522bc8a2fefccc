"""Choice of a token by its logits: guidance, temperature, top-k, top-p, and the draw.

    config = SamplingConfig(cfg_scale=2.0, top_k=2000)
    logits = guide(conditional, unconditional, config.cfg_scale)
    tokens = choose(logits, config, keys)                    # keys: one int64 a row (utils/rng.py:image_noise)

The draw is a race: every code has an exponential number of its own, a function of the row's key and the code, and the
code with the least of number / probability wins. That is exact sampling; a token depends on its own key and its own row
alone, and a small change of the logits seldom changes it. The numbers' bits are the same on every device.
`draw: cdf` in the settings reads one uniform number off the cumulative distribution, as earlier editions did.
Top-p: arXiv 1904.09751. Guidance: 2207.12598.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autoregressive.models.settings import SamplingConfig
from utils.errors import NotFiniteError

# Type of the noise of each draw.
NOISE = {"race1": torch.int64, "cdf": torch.float32}
# Logits of a race that a CPU runs at once.
AT_ONCE_ON_CPU = 2**16


class NotFiniteLogits(NotFiniteError):
    """Images of a batch whose logits are NaN or infinite, while the others of the batch are whole.

    steps: by image, the first decode step (from 1) with such logits, None for none. tokens: of all images, int64 (B, N).
    dtype: in which the model was computed.
    """

    def __init__(self, steps: Sequence[int | None], tokens: Tensor, dtype: torch.dtype):
        self.steps, self.tokens, self.dtype = list(steps), tokens, dtype
        found = [step for step in steps if step is not None]
        count = f" of {len(found)} of {len(steps)} images" if len(steps) > 1 else ""
        precision, advice = _PRECISIONS.get(dtype, (str(dtype), "give --precision none"))
        super().__init__(f"the logits{count} are not finite from decode step {min(found)} on, in {precision}: {advice}")

    def of(self, images: slice) -> "NotFiniteLogits | None":
        """The same of a part of the batch; None where all of its images are whole."""
        steps = self.steps[images]
        return NotFiniteLogits(steps, self.tokens[images], self.dtype) if set(steps) != {None} else None


# What --precision calls a dtype, and what to do where its range or the weights are at fault.
_PRECISIONS = {
    torch.float16: ("fp16", "give --precision bf16 or none"),
    torch.bfloat16: ("bf16", "give --precision none, or other weights"),
    torch.float32: ("float32", "give other weights, or a smaller --cfg-scale"),
}


def spread(logits: Tensor) -> Tensor:
    """The largest logit of a row less the smallest, (…, V) -> (…): a finite number where all of them are finite."""
    return logits.amax(dim=-1) - logits.amin(dim=-1)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Return unconditional + (conditional - unconditional) * scale."""
    return unconditional + (conditional - unconditional) * scale


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float | Tensor | None = None) -> Tensor:
    """Sets what top-k, then top-p, leave out to -inf. (…, V) -> (…, V).

    top_k: 0 or less keeps all. top_p: None, or the number 1 or more, keeps all.
    Top-p keeps the smallest set of most likely tokens whose mass reaches p, the one that crosses it included.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = torch.topk(logits, top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if isinstance(top_p, Tensor) or (top_p is not None and top_p < 1):
        ordered, places = logits.sort(dim=-1, descending=True, stable=True)
        # The mass before each token but the first.
        reached = running_sum(ordered.softmax(dim=-1, dtype=torch.float32))[..., :-1] > top_p
        left_out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, places[..., 1:], reached)
        logits = logits.masked_fill(left_out, float("-inf"))
    return logits


def running_sum(x: Tensor) -> Tensor:
    """The sums of each row up to each place, (…, V): the same every time.

    CUDA sums a tensor of one row by another algorithm, whose order of additions changes from run to run.
    """
    if x.device.type == "cuda" and x.numel() == x.shape[-1]:
        return x.reshape(1, -1).expand(2, -1).cumsum(dim=-1)[:1].view_as(x)
    return x.cumsum(dim=-1)


def race_bits(keys: Tensor, codes: Tensor) -> Tensor:
    """Hash keys int64 (…) and codes (…, V) or (V,) to 32 bits each, int32 (…, V), by wrapping products and logical shifts."""
    low, high = keys.to(torch.int32)[..., None], (keys >> 32).to(torch.int32)[..., None]
    x = codes.to(torch.int32) * 0x3C6EF373 + low
    x ^= x >> 16 & 0xFFFF
    x *= 0x7FEB352D
    x ^= x >> 15 & 0x1FFFF
    x ^= high
    x *= 0x68BC21EB
    x ^= x >> 15 & 0x1FFFF
    x *= 0x7FEB352D
    x ^= x >> 16 & 0xFFFF
    return x


def exponential(bits: Tensor) -> Tensor:
    """Turn int32 bits into exponential numbers, float32, above 0 and finite. The small ones, which win, have all their digits."""
    u = ((bits >> 1 & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return -torch.log1p(-u.clamp(max=1 - 2.0**-24))


def race_noise(keys: Tensor, codes: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return what the race draws with: bits, int64 (…, V) in [0, 2**32), and exponential numbers, float32 (…, V).

    Args:
        keys: int64 (…), one for each token to draw.
        codes: how many there are, V; or whole numbers (V,) or (…, V), some of them.
    """
    bits = race_bits(keys, torch.arange(codes, device=keys.device) if isinstance(codes, int) else codes)
    return bits.long() & 0xFFFFFFFF, exponential(bits)


def race(logits: Tensor, keys: Tensor) -> Tensor:
    """Draw a token a row, the lowest of equal ones: float32 (…, V), int64 (…) -> int64 (…). Logits of -inf never win."""
    noise = exponential(race_bits(keys, torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)))
    return (logits - noise.log()).argmax(dim=-1)


def draw_race(logits: Tensor, keys: Tensor) -> Tensor:
    """Run `race`, on a CPU a few rows at a time: some thirty operations over what its caches hold.

    Several keys may share a row of logits, (…, 1, V).
    """
    rows = max(1, AT_ONCE_ON_CPU // logits.shape[-1])
    if logits.device.type != "cpu" or keys.numel() <= rows:
        return race(logits, keys)
    logits = logits.expand(*keys.shape, -1)
    parts = zip(logits.flatten(0, -2).split(rows), keys.flatten().split(rows), strict=True)
    return torch.cat([race(*part) for part in parts]).view(keys.shape)


def draw_cdf(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `noise`. (…, V), (…) in [0, 1) -> int64 (…)."""
    # Summed in parallel, the distribution may rise by a rounding at a token that has no mass: such tokens are passed over.
    cumulative = running_sum(probabilities.float()).masked_fill(probabilities == 0, 0)
    target = noise.unsqueeze(-1).float() * cumulative.amax(dim=-1, keepdim=True)
    return (cumulative > target).int().argmax(dim=-1)


def choose(
    logits: Tensor,
    config: SamplingConfig,
    noise: Tensor,
    numbers: Tensor | None = None,
    draw: Callable[[Tensor, Tensor], Tensor] = draw_race,
) -> Tensor:
    """Pick a token a row: logits (…, V) -> int64 (…).

    noise: (…), int64 keys for the draw "race1", uniform numbers in [0, 1) for "cdf".
    numbers: float32 (2,) or (…, 2) on the logits' device, read in place of config.numbers: a recorded step follows what it
    holds, and each row may have its own.
    draw: draw_race, or what the compiler made of `race`.
    """
    if config.greedy:
        return logits.argmax(dim=-1)
    temperature, top_p = config.numbers if numbers is None else numbers[..., None, :].unbind(-1)
    logits = logits.float() / temperature  # sums of half precision have too few steps for a codebook
    logits = filter_logits(logits, int(config.top_k), top_p if config.top_p < 1 else None)
    return draw(logits, noise) if config.draw == "race1" else draw_cdf(logits.softmax(dim=-1), noise)
