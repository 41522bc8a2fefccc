"""Drafts of a smaller model: windows (plans.py) that another GPT of the same codes fills."""

from dataclasses import replace

from torch import Tensor

from autoregressive.models import decode_step
from autoregressive.models.decode_step import DecodeState
from autoregressive.models.kv_cache import StaticCache
from autoregressive.models.plans import Plan
from autoregressive.models.trunk import Trunk


def check_draft_model(draft: Trunk, model: Trunk) -> None:
    """Raise ValueError where a model cannot draft for another one."""
    for name, own, needed in (
        ("codes", draft.args.vocab_size, model.args.vocab_size),
        ("the tokenizer", draft.file_config.get("tokenizer"), model.file_config.get("tokenizer")),
        ("the layout", *({**each.layout.config, "tokens": each.layout.tokens} for each in (draft, model))),
        ("the conditions", draft.args.conditions, model.args.conditions),
    ):
        if own != needed and None not in (own, needed):
            raise ValueError(
                f"the draft model has {name} {own}, the model {needed}: give a smaller GPT trained on the same codes"
            )


class ModelDrafts:
    """Drafts of a smaller model, drawn one step a pass from each image's cursor to its window's end with the tokens' own noise.

    Both models race with the same exponential numbers, so that tokens are equal where the probabilities are near. Rows of
    drafts that were right need no second pass; where one was wrong, no later row is of use.
    """

    def __init__(
        self,
        model: Trunk,
        plan: Plan,
        cache: StaticCache,
        embedded: tuple[Tensor, Tensor | None],
        noise: Tensor,
        masks: Tensor | None,
        known: Tensor | None,
        orders: Tensor | None,
    ):
        conditions, added = embedded
        self.model, self.plan, steps = model, plan, plan.layout.steps
        self.state = DecodeState(model, plan.layout, cache, len(noise))
        self.state.begin(plan, noise, masks, known, added, None, orders)
        cache.lay_out(cache.rows)
        decode_step.prefill(model, conditions, self.state, masks)
        self.rows = max(len(step.rows) for step in steps)
        self.outputs = max(step.outputs.stop - step.outputs.start for step in steps)

    def redraw(self, state: DecodeState, least: int, most: int) -> None:
        """Write drafts for all tokens of `state` that its next pass computes; the slowest image is at the step `least`."""
        plan, own = self.plan, self.state
        assert plan.window
        latest = plan.end - 1 if plan.static else most
        ahead = max(plan.window.limits[step] - step for step in range(least, min(latest, plan.end - 1) + 1))
        own.tokens.copy_(state.tokens)
        for i in range(min(ahead, plan.end - least)):
            own.cursor.copy_((state.cursor + i).clamp(max=len(own.steps.first) - 1))
            kind = plan.kind(min(least + i, plan.end - 1), most + i)
            if plan.side_by_side:
                own.cache.lay_out(kind.length)
            kind = replace(kind, rows=self.rows, outputs=self.outputs, window=False)
            decode_step.take_pass(self.model, own, kind, decode_step.decode_rows)
        state.tokens.copy_(own.tokens)
