"""Settings by which tokens are chosen, each declared once: flags, server bodies, records and the page are made from these fields."""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from math import cos, inf, isfinite, isnan, pi
from numbers import Real
from reprlib import repr as shorten
from typing import Any

from utils.errors import require_whole


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a setting: the value that changes nothing, and a line for flags and the server's schema.

    metadata: `least`, the smallest value that a flag takes; `served`, the range of a server's requests; `page`, the range and
        step on the page (a number box where there is no end, a list for a name); `switch`, the flag that turns a setting off
        that is on by default; `choices`, the values of a setting that is a name.
    """
    return field(default=default, metadata={"help": help, "least": -inf, **metadata})


@dataclass(frozen=True)
class SamplingConfig:
    """Settings by which tokens are chosen.

    sample_logits False, temperature 0, top_k 1 and top_p 0 each take the likeliest token, the first of equal ones.
    Raises ValueError for a value out of range.
    """

    cfg_scale: float = setting(1.0, "guidance scale, 1 or less for none", least=-1, served=(0, 100), page=(1, 20, 0.1))
    cfg_interval: float = setting(
        -1, "last guided decode step, -1 for all", least=-1, served=(-1, 1e6), page=(-1, None, None)
    )
    temperature: float = setting(
        1.0, "divides the logits, 0 for the likeliest token", least=0, served=(0, 100), page=(0, 2, 0.05)
    )
    top_k: int = setting(
        0, "keep the k most likely tokens, 0 or -1 for all", least=-1, served=(-1, 10**6), page=(0, None, 1)
    )
    top_p: float = setting(
        1.0,
        "keep the most likely tokens of this mass, 1 for all, 0 for the likeliest",
        least=0,
        served=(0, 1),
        page=(0, 1, 0.01),
    )
    sample_logits: bool = setting(True, "take the likeliest token, the first of equal ones", switch="greedy")
    draw: str = setting(
        "race1", "how noise picks a token: cdf repeats images of earlier editions", choices=("race1", "cdf")
    )
    cfg_schedule: str = setting(
        "constant",
        "guidance scale by token: from 1 at the first towards --cfg-scale, linear (LPD) or by a power and a cosine (RAR)",
        choices=("constant", "linear", "power-cosine"),
        page=(),
    )
    cfg_power: float = setting(
        1.0,
        "power of the power-cosine schedule: higher guides later, 0 all tokens alike",
        least=0,
        served=(0, 100),
        page=(0, 5, 0.05),
    )
    steps: int = setting(
        0, "decode steps of an LPD, whose groups are free, 0 for its own", least=0, served=(0, 10**6), page=(0, None, 1)
    )
    order: str = setting(
        "own", "of an image's tokens: the model's, or random, of models trained so", choices=("own", "random")
    )
    repulsion: int = setting(
        -1, "cells that tokens of one step keep apart in an LPD's order, -1 for its own", least=-1, served=(-1, 1000)
    )

    control_strength: float = setting(
        1.0,
        "how much control images, and other conditions of single tokens, count: 0 for not at all",
        least=0,
        served=(0, 100),
        page=(0, 2, 0.05),
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata.get("choices")
            if choices:
                if value not in choices:
                    flag = each.name.replace("_", "-")
                    raise ValueError(f"--{flag} must be {' or '.join(choices)}, got {shorten(value)}")
                continue
            is_number = isinstance(value, Real) and not (isinstance(value, bool) and each.type is not bool)
            if not is_number or (isinstance(value, int) and abs(int(value)) >= 2**63):
                raise ValueError(f"{each.name} must be a number, got {shorten(value)}")
        for name, least, allowed in (
            ("temperature", 0, "0 or more"),
            ("top_p", 0, "0 (the likeliest token) to 1 (every token)"),
            ("cfg_scale", -inf, "a number (1 or less: no guidance)"),
            ("cfg_power", 0, "0 or more"),
            ("control_strength", 0, "0 or more"),
        ):
            value = getattr(self, name)
            if not (isfinite(value) and value >= least):
                raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, got {value}")
        if not (isfinite(self.top_k) and int(self.top_k) == self.top_k):
            raise ValueError(f"--top-k must be a whole number (0 or -1: every token), got {self.top_k}")
        if isnan(self.cfg_interval):
            raise ValueError("--cfg-interval must be a decode step, or -1 to guide all of them, got nan")

    @classmethod
    def fields(cls) -> Mapping[str, Field]:
        """Return the declarations of the settings by name."""
        return {each.name: each for each in fields(cls)}

    @property
    def guided(self) -> bool:
        """Tell whether unconditional rows are needed at all."""
        return self.cfg_scale > 1

    @property
    def greedy(self) -> bool:
        """Tell whether the likeliest token is taken, whatever the noise."""
        return not self.sample_logits or self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    @property
    def operations(self) -> tuple[bool, int, bool, str]:
        """Return the operations on logits: greedy, top-k (0 where greedy), whether top-p filters, and the draw."""
        return (True, 0, False, "") if self.greedy else (False, int(self.top_k), self.top_p < 1, self.draw)

    @property
    def numbers(self) -> tuple[float, float]:
        """Return the numbers of these operations: the temperature to divide by (above 0), top-p."""
        return max(self.temperature, 1e-5), self.top_p

    def scales(self, tokens: int) -> list[float]:
        """Return the guidance scale of every token of an image, in the order in which they are drawn.

        With t = 0 … tokens - 1 and s = cfg_scale: linear 1 + (s - 1) t / tokens (LPD, arXiv 2507.01957); power-cosine
        1 + (s - 1) (1 - cos(pi (t / tokens)^cfg_power)) / 2 (RAR, arXiv 2411.00776). Both begin at 1 and do not reach s.
        """
        if self.cfg_schedule == "constant":
            return [self.cfg_scale] * tokens
        shares = [t / tokens for t in range(tokens)]
        if self.cfg_schedule == "power-cosine":
            shares = [(1 - cos(pi * share**self.cfg_power)) / 2 for share in shares]
        return [1 + (self.cfg_scale - 1) * share for share in shares]

    def check_particles(self, particles: Any) -> None:
        """Raise ValueError for particles that are no whole number from 1 on, or several with the draw cdf."""
        require_whole("particles", particles)
        if particles > 1 and self.draw != "race1":
            raise ValueError(f"--draw {self.draw} has noise for one particle: give --draw race1, or --particles 1")

    def guides(self, step: int) -> bool:
        """Tell whether the decode step of this number is guided (see Layout.step_number)."""
        return self.guided and (self.cfg_interval < 0 or step <= self.cfg_interval)
