"""Group relative policy optimisation (GRPO): the loss of images that the model drew, by their rewards in groups of one condition.

Of an image drawn with an advantage above 0 every token becomes likelier, of the others less likely; the distance from a frozen
reference is a penalty. DeepSeekMath (arXiv 2402.03300, section 4.1); of image tokens: AR-GRPO (2508.06924).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from autoregressive.models.layouts import Layout
from autoregressive.models.sampling import SamplingConfig, guide
from autoregressive.models.trunk import Conditions, Trunk
from autoregressive.train.lora import without_adapter
from autoregressive.train.objectives.chunked import chunked_values

# Distance of the log-probabilities from which on the penalty's gradient no longer grows: it is e^10 there.
KL_CAP = 10.0


@dataclass(frozen=True)
class PolicySettings:
    """Settings of the loss."""

    beta: float = 0.1  # weight of the distance from the reference
    temperature: float = 1.0  # of the draws
    scales: Sequence[float] | None = None  # guidance of each token in the layout's order, where it is in the policy
    # How far a token's probability may fall from that of the draw, and rise: with one update a draw, as in training here, it
    # has not moved.
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None  # upper bound of the ratio for images of negative advantage


def group_advantages(rewards: Tensor, group_size: int, scale: bool = True) -> Tensor:
    """Return each image's reward less its group's mean, by the group's standard deviation if `scale`. Groups are neighbours.

    rewards: (B,). Returns (B,); 0 in a group of equal rewards.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    centred = torch.where(groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True), centred, 0)
    return (centred / (groups.std(1, keepdim=True) + 1e-4) if scale else centred).flatten()


def policy_loss(
    log_probs: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, settings: PolicySettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return GRPO's loss, and what is logged of it.

    log_probs, old, reference: (B, N), of the tokens under the policy, the one that drew them, and the reference (None for no
    penalty). advantages: (B,).
    Returns the mean over all tokens, and `kl` (nats a token, of the policy from the reference) with `kl_max`, how many nats
    likelier the reference finds a token at most; `clipped_low`, `clipped_high`: shares of tokens whose ratio is out of bounds.
    """
    ratio, advantages = (log_probs - old.detach()).exp(), advantages[:, None]
    low, high = 1 - settings.epsilon_low, 1 + settings.epsilon_high
    bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    losses = -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages)
    figures = {
        "clipped_low": ((ratio < low) & (advantages < 0)).float().mean(),
        "clipped_high": ((ratio > high) & (advantages > 0)).float().mean(),
    }
    if reference is not None:
        gap = reference.detach() - log_probs
        near = gap.clamp(max=KL_CAP)
        kl = near.exp() * (1 + gap - near) - gap - 1
        losses = losses + settings.beta * kl
        figures |= {"kl": kl.mean(), "kl_max": gap.max()}
    return losses.mean(), {name: value.detach() for name, value in figures.items()}


def drawn_log_probs(
    model: Trunk,
    codes: Tensor,
    cond: Conditions,
    settings: PolicySettings,
    prefix_mask: Tensor | None = None,
    orders: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every token and the entropy of its distribution, each float32 (B, N) in the order of drawing.

    Differentiable, without all logits at once. codes: int64 (B, N) in raster order. cond, prefix_mask, orders: as Trunk.forward.
    """
    layout, batch = model.layout, len(codes)
    read = codes[:, model.layout_order(layout, codes.device)] if orders is None else codes.gather(1, orders)
    fed, drop = read[:, : -layout.step_tokens], torch.zeros(batch, dtype=torch.bool, device=codes.device)
    if settings.scales is not None:
        cond = {name: torch.cat([value, value]) for name, value in model.as_conditions(cond).items()}
        fed, drop = torch.cat([fed, fed]), torch.cat([drop, ~drop])
        prefix_mask = None if prefix_mask is None else torch.cat([prefix_mask, prefix_mask])
        orders = None if orders is None else torch.cat([orders, orders])
    hidden = model.hidden(fed, cond, orders=orders, drop=drop, prefix_mask=prefix_mask)
    if settings.scales is not None:  # logits are linear in the hidden states, and so is guidance in the logits
        scales = torch.tensor(settings.scales, device=codes.device)[:, None]
        hidden = guide(*hidden.float().chunk(2), scales)

    def log_prob_and_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        log_probs = (logits / settings.temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1, keepdim=True)
        return torch.cat([log_probs.gather(-1, targets), entropy], dim=1)

    weight, bias = model.projection()
    found = chunked_values(hidden.flatten(0, 1), weight, read.reshape(-1, 1), bias=bias, objective=log_prob_and_entropy)
    log_probs, entropy = found.view(batch, -1, 2).unbind(-1)
    return log_probs, entropy.detach()


def guidance_scales(layout: Layout, sampling: SamplingConfig) -> list[float] | None:
    """Return the guidance scale of each token in the layout's order, as it is drawn; None without guidance."""
    if not sampling.guided:
        return None
    steps = {place: step.number for step in layout.passes for place in range(step.outputs.start, step.outputs.stop)}
    return [
        scale if sampling.guides(steps[place]) else 1.0 for place, scale in enumerate(sampling.scales(layout.tokens))
    ]


class PolicyLoss(nn.Module):
    """Loss of drawn images. A module around policy and reference, so that sharding sees every pass.

    reference: frozen, of the model's shape; the model itself where it trains an adapter (LoRA), without which it is the
    reference; None where beta is 0.
    """

    def __init__(self, model: Trunk, reference: Trunk | None, settings: PolicySettings):
        super().__init__()
        self.model, self.settings = model, settings
        self.own = reference is model
        self.reference = None if reference is None or self.own else reference.requires_grad_(False)

    def forward(
        self,
        codes: Tensor,
        cond: Conditions,
        advantages: Tensor,
        *,
        prefix_mask: Tensor | None = None,
        orders: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and figures to log: those of `policy_loss`, `entropy` (nats a token), and with `drawn` `draw_gap`.

        codes: int64 (B, N) in raster order, drawn with the model's present weights. advantages: (B,).
        cond, prefix_mask, orders: as Trunk.forward takes them.
        drawn: (B, N), log-probabilities of the tokens as they were drawn, in the order of drawing. `draw_gap` is their mean
        distance from the policy's.
        """
        given = codes, cond, self.settings, prefix_mask, orders
        known = None
        with torch.no_grad(), without_adapter(self.model) if self.own else nullcontext():
            if self.own or self.reference is not None:
                known, _ = drawn_log_probs(self.model if self.own else self.reference, *given)
        log_probs, entropy = drawn_log_probs(self.model, *given)
        loss, figures = policy_loss(log_probs, log_probs.detach(), known, advantages, self.settings)
        for name in ("clipped_low", "clipped_high"):  # 0 with one update a draw
            del figures[name]
        figures["entropy"] = entropy.mean()
        if drawn is not None:
            figures["draw_gap"] = (log_probs.detach() - drawn).abs().mean()
        return loss, figures
