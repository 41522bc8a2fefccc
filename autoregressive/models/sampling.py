"""From logits to a token: guidance, temperature, top-k, top-p, and the draw.

    config = SamplingConfig(cfg_scale=2.0, top_k=2000)
    logits = guide(conditional, unconditional, config.cfg_scale)
    tokens = choose(logits, config, noise)                   # noise: one number in [0, 1) a row

The draw reads one uniform number per token off the cumulative distribution, so that a token depends on its own
number and its own row alone, whatever else is in the batch.
Top-p: arXiv 1904.09751. Guidance: 2207.12598.
"""

from dataclasses import dataclass
from math import isfinite, isnan

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen.

    cfg_scale: guidance scale; 1 or less is none. cfg_interval: the last guided decode step, -1 for all.
    temperature: 0 or more. top_k: 0 keeps all. top_p: in (0, 1], 1 keeps all. sample_logits: False takes the argmax.
    Raises ValueError for a value outside these.
    """

    cfg_scale: float = 1.0
    cfg_interval: float = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    sample_logits: bool = True

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1 (1 keeps every token), got {self.top_p}")
        if not (self.top_k >= 0 and isfinite(self.top_k) and int(self.top_k) == self.top_k):
            raise ValueError(f"--top-k must be a whole number, 0 (keep every token) or more, got {self.top_k}")
        if not (isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            raise ValueError(f"--cfg-scale must be 0 or more (1: no guidance), got {self.cfg_scale}")
        if isnan(self.cfg_interval):
            raise ValueError("--cfg-interval must be a decode step, or -1 to guide all of them, got nan")

    @property
    def guided(self) -> bool:
        """Whether unconditional rows are needed at all."""
        return self.cfg_scale > 1

    @property
    def operations(self) -> tuple[bool, int, bool]:
        """What is done to logits: whether a token is drawn at all, top-k, and whether top-p filters."""
        return self.sample_logits, int(self.top_k), self.top_p < 1

    @property
    def numbers(self) -> tuple[float, float, float]:
        """What the same operations may be done with: guidance scale, the temperature to divide by (above 0), top-p."""
        return self.cfg_scale, max(self.temperature, 1e-5), self.top_p

    def guides(self, step: int) -> bool:
        """Whether the decode step of this number is guided (see TokenLayout.steps)."""
        return self.guided and (self.cfg_interval < 0 or step <= self.cfg_interval)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """unconditional + (conditional - unconditional) * scale."""
    return unconditional + (conditional - unconditional) * scale


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float | Tensor | None = None) -> Tensor:
    """Sets what top-k, then top-p, leave out to -inf. (…, V) -> (…, V).

    top_k: 0 keeps all. top_p: None, or the number 1, keeps all.
    Top-p keeps the smallest set of most likely tokens whose mass reaches p, the one that crosses it included.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = torch.topk(logits, top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if isinstance(top_p, Tensor) or (top_p is not None and top_p < 1):
        ordered, places = logits.sort(dim=-1, descending=True, stable=True)
        reached = running_sum(ordered.softmax(dim=-1))[..., :-1] > top_p  # the mass before each token but the first
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


def draw(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `noise`. (…, V), (…) in [0, 1) -> int64 (…)."""
    # Summed in parallel, the distribution may rise by a rounding at a token that has no mass: such tokens are passed over.
    cumulative = running_sum(probabilities).masked_fill(probabilities == 0, 0)
    target = noise.unsqueeze(-1).to(cumulative.dtype) * cumulative.amax(dim=-1, keepdim=True)
    return (cumulative > target).int().argmax(dim=-1)


def choose(logits: Tensor, config: SamplingConfig, noise: Tensor, numbers: Tensor | None = None) -> Tensor:
    """Picks a token a row. logits: (…, V) float32; noise: (…) uniform in [0, 1). Returns int64 (…).

    numbers: float32 (3,) on the logits' device, read in place of config.numbers: a recorded step follows what it holds.
    """
    if not config.sample_logits:
        return logits.argmax(dim=-1)
    _, temperature, top_p = config.numbers if numbers is None else numbers.unbind()
    logits = filter_logits(logits / temperature, int(config.top_k), top_p if config.top_p < 1 else None)
    return draw(logits.softmax(dim=-1), noise)
