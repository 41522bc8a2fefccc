"""Each request's guidance and draw, inside vLLM's engine (entry point `vllm.logits_processors`).

    SamplingParams(temperature=0, max_tokens=256, ignore_eos=True, detokenize=False,
                   extra_args={"cfg_scale": 4.0, "top_k": 2000, "seed": 0})

vLLM keeps its processors informed of which request is which row of a batch. The model (serve/model.py) asks here how
to mix the two streams of guidance; what vLLM then does to logits (bias, allowed tokens) comes after guidance, as it
should. `apply` draws the token itself, by models/sampling.py and the noise that ImagePipeline would use, and leaves only
that one finite, so that vLLM, which is told to be greedy, takes it. A token of logits that are not finite becomes the id
after the codes: an exception here would end the engine with all of its requests.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from autoregressive.models.sampling import SamplingConfig, choose, guide, spread
from autoregressive.request import Request
from autoregressive.serve.plugin import ARCHITECTURE
from utils.rng import image_noise


@dataclass(frozen=True)
class Drawing:
    """A request that runs: settings, noise (N,) and guidance scales, and vLLM's own list of its tokens so far, which grows."""

    sampling: SamplingConfig
    noise: Tensor
    scales: list[float]
    tokens: list[int]

    @property
    def guided(self) -> bool:
        """Tell whether the next token is guided: `cfg_interval` counts decode steps, of which the prefill is none."""
        return self.sampling.guides(len(self.tokens) - 1)

    @property
    def scale(self) -> float:
        """Return the guidance scale of the next token."""
        return self.scales[min(len(self.tokens), len(self.scales) - 1)]


class GuidedDraw(LogitsProcessor):
    """Mixes and draws, a row a request. Does nothing in an engine with another model."""

    current: "GuidedDraw | None" = None  # of this process's engine, for its model

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError for settings out of range; over HTTP that is a 400."""
        Request.from_settings(sampling_params.extra_args)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        config = vllm_config.model_config.hf_config
        self.active = ARCHITECTURE in (getattr(config, "architectures", None) or [])
        self.device = device
        self.rows: dict[int, Drawing] = {}
        if self.active:
            self.codes, self.image_tokens = config.codes, config.grid_size**2
            GuidedDraw.current = self

    def is_argmax_invariant(self) -> bool:
        """Return False for a served model: vLLM takes the argmax of what `apply` leaves."""
        return not self.active

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows the requests from row to row: removed, then added, then moved ones."""
        if batch_update is None or not self.active:
            return
        for row in batch_update.removed:
            self.rows.pop(row, None)
        for row, params, _, tokens in batch_update.added:
            request = Request.from_settings(params.extra_args)
            noise = image_noise(request.seed, [request.index], self.image_tokens, request.sampling.draw)[0]
            self.rows[row] = Drawing(request.sampling, noise, request.sampling.scales(self.image_tokens), tokens)
        for source, target, direction in batch_update.moved:
            moved, replaced = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = replaced

    def mix(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Guide the rows (B, V) whose settings and place in the image ask for it."""
        guided = [row for row, drawing in self.rows.items() if row < len(conditional) and drawing.guided]
        if not guided:
            return conditional
        scales = [self.rows[row].scale for row in guided]
        scales = torch.tensor(scales, dtype=torch.float32).to(self.device, non_blocking=True)
        rows = torch.tensor(guided).to(self.device, non_blocking=True)
        mixed = guide(conditional[rows], unconditional[rows], scales[:, None])
        return conditional.index_copy(0, rows, mixed)

    def apply(self, logits: Tensor) -> Tensor:
        """Leaves each row the token that is drawn. Float32 (B, vocab_size), the part past the codes never drawn."""
        alike = defaultdict(list)  # rows of equal settings are drawn at once
        for row, drawing in self.rows.items():
            if row < len(logits):
                alike[drawing.sampling].append(row)
        for config, members in alike.items():
            drawings = [self.rows[row] for row in members]
            noise = torch.stack([d.noise[min(len(d.tokens), self.image_tokens - 1)] for d in drawings])
            rows = torch.tensor(members).to(logits.device, non_blocking=True)
            codes = logits[rows, : self.codes]
            drawn = choose(codes, config, noise.to(logits.device, non_blocking=True))
            drawn = drawn.masked_fill(codes.amax(dim=-1).isnan(), self.codes)  # see mark_broken
            logits[rows] = float("-inf")
            logits[rows, drawn] = 0
        return logits


def mark_broken(logits: Tensor) -> Tensor:
    """Replace rows of logits (B, V) that are not finite by NaN, before vLLM rules tokens out by -inf."""
    return logits.masked_fill(~spread(logits).isfinite()[:, None], float("nan"))
