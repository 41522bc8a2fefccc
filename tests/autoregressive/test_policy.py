"""GRPO's loss against the recorded run, and its properties."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from autoregressive.models.build import build_gpt
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.sampling import SamplingConfig, draw_race, guide
from autoregressive.train.draws import Classes, Studio
from autoregressive.train.loss import token_log_probs
from autoregressive.train.policy import (
    KL_CAP,
    PolicyLoss,
    PolicySettings,
    drawn_log_probs,
    group_advantages,
    guidance_scales,
    policy_loss,
)
from tests.helpers import assert_close, golden_state, load_golden, randomize
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.distributed import Distributed
from utils.rng import image_noise
from utils.training.parallel import Parallel

GROUP = 4


def recorded():
    """The recorded arrays, settings of each case, and policy, reference and the policy that drew."""
    arrays, meta = load_golden("grpo")
    config, models = meta["config"], []
    for seed in (config["seed"], meta["reference_seed"], meta["old_seed"]):
        model = Transformer(ModelArgs(**meta["model_args"]))
        model.load_state_dict(golden_state(meta["state_dict"], seed, config["gain"]))
        models.append(model.eval())
    policy, reference, old = models
    with torch.no_grad():
        for own, other in zip(old.parameters(), policy.parameters(), strict=True):
            own.copy_(other + config["old_mix"] * (own - other))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, config, (policy, reference, old)


def settings_of(case):
    scale = case.get("cfg_scale")
    return PolicySettings(
        beta=case["beta"],
        temperature=case.get("temperature", 1.0),
        scales=[scale] * 16 if scale else None,
        epsilon_high=case.get("epsilon_high", 0.2),
        delta=case.get("delta"),
    )


@pytest.mark.parametrize("name", ["on_policy", "on_policy_guided", "off_policy", "no_kl_dr", "delta"])
def test_policy_loss_of_a_case_is_the_recorded_one(name):
    arrays, config, (policy, reference, old) = recorded()
    case, codes, labels = config["cases"][name], arrays["codes"].long(), arrays["labels"].long()
    settings = settings_of(case)
    total = (arrays["rewards"] * torch.tensor(config["reward_weights"])).nansum(1)
    advantages = group_advantages(total.float(), GROUP, case.get("scale_rewards", True))
    assert_close(advantages, arrays[f"{name}/advantages"])
    assert not advantages[:GROUP].any()

    log_probs, entropy = drawn_log_probs(policy, codes, labels, settings)
    known, _ = drawn_log_probs(reference, codes, labels, settings)
    before, _ = drawn_log_probs(old, codes, labels, settings)
    for found, key in ((log_probs, "logps"), (known, "ref_logps"), (before, "old_logps")):
        assert_close(found, arrays[f"{name}/{key}"])
    before = before if case["off_policy"] else log_probs
    loss, figures = policy_loss(log_probs, before, known if settings.beta else None, advantages, settings)
    assert_close(loss, arrays[f"{name}/loss"])
    if settings.beta:
        assert_close(figures["kl"], arrays[f"{name}/kl"])
    for side in ("low", "high"):
        assert_close(figures[f"clipped_{side}"], arrays[f"{name}/clip_ratio/{side}_mean"])
    loss.backward()
    gradients = [key for key in arrays if key.startswith(f"{name}/grad/")]
    assert gradients
    for key in gradients:
        assert_close(policy.get_parameter(key.removeprefix(f"{name}/grad/")).grad, arrays[key])
    assert 0 < entropy.mean() < np.log(64)
    if not case["off_policy"]:
        assert_close(PolicyLoss(policy, reference, settings)(codes, labels, advantages)[0], arrays[f"{name}/loss"])


def test_advantages_sum_to_zero_in_a_group_and_vanish_where_rewards_are_equal():
    rewards = torch.tensor([1.0, 2.0, 4.0, 0.3, 0.3, 0.3])
    advantages = group_advantages(rewards, 3)
    assert_close(advantages.view(2, 3).sum(1), torch.zeros(2))
    assert advantages[3:].tolist() == [0, 0, 0]
    assert_close(group_advantages(torch.tensor([3.0, 1.0]), 2), torch.tensor([2**-0.5, -(2**-0.5)]), atol=1e-4)


def test_policy_loss_of_equal_rewards_is_the_penalty_alone():
    generator = torch.manual_seed(0)
    log_probs, known = -torch.rand(4, 6, generator=generator), -torch.rand(4, 6, generator=generator)
    loss, figures = policy_loss(log_probs, log_probs, known, torch.zeros(4), PolicySettings(beta=0.3))
    assert_close(loss, 0.3 * figures["kl"])


def test_penalty_of_a_token_that_left_the_reference_has_a_bounded_gradient():
    log_probs = torch.tensor([[-2.0, -KL_CAP - 2, -80.0]], requires_grad=True)
    loss, figures = policy_loss(
        log_probs, log_probs, torch.full((1, 3), -2.0), torch.zeros(1), PolicySettings(beta=1.0)
    )
    loss.backward()
    assert_close(log_probs.grad * 3, torch.tensor([[0.0, 1, 1]]) * (1 - np.exp(KL_CAP)), atol=1e-4)
    assert figures["kl_max"] == 78


KINDS = {
    "raster": ("GPT-XS", {}),
    "PAR": ("GPT-XS", {"ar_token_num": 4}),
    "NAR": ("GPT-XS", {"layout": {"name": "neighbours"}}),
    "RAR": ("RAR-XS", {}),
    "LPD": ("LPD-XS", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_of_a_layout_are_those_of_training_and_guided_ones_of_the_mixed_logits(kind):
    size, more = KINDS[kind]
    model = randomize(build_gpt(size, vocab_size=32, block_size=16, num_classes=3, **more), 1)
    codes, labels = torch.randint(32, (4, 16), generator=torch.manual_seed(0)), torch.tensor([0, 1, 2, 1])
    orders = torch.stack([torch.randperm(16) for _ in range(4)]) if model.any_order else None
    order = model.layout.order.expand(4, -1) if orders is None else orders
    given, keep = {"orders": orders}, torch.zeros(4, dtype=torch.bool)
    plain, _ = drawn_log_probs(model, codes, labels, PolicySettings(), **given)
    assert_close(plain, token_log_probs(model, codes, labels, **given).gather(1, order), atol=1e-4)
    scales = guidance_scales(model.layout, SamplingConfig(cfg_scale=3.0, cfg_interval=4, cfg_schedule="linear"))
    assert scales[0] == 1 and max(scales) > 1 and scales[-1] == 1
    guided, _ = drawn_log_probs(model, codes, labels, PolicySettings(scales=scales, temperature=0.7), **given)
    tokens = codes.gather(1, order)[:, : -model.layout.step_tokens]
    own, none = (model(tokens, labels, drop=drop, **given) for drop in (keep, ~keep))
    mixed = (none + (own - none) * torch.tensor(scales)[:, None]) / 0.7
    expected = mixed.log_softmax(-1).gather(-1, codes.gather(1, order)[..., None]).squeeze(-1)
    assert_close(guided, expected, atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 100.0])
def test_policy_of_two_tokens_goes_to_its_optimum_and_a_large_penalty_holds_it(beta):
    """The reward counts code 0: without the penalty its probability rises to 1 step by step."""
    args = ModelArgs(
        16, 1, 1, vocab_size=4, block_size=4, num_classes=1, token_dropout_p=0, resid_dropout_p=0, ffn_dropout_p=0
    )
    policy, reference = (randomize(Transformer(args), 1) for _ in range(2))
    module = PolicyLoss(policy, reference if beta else None, PolicySettings(beta=beta))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    every = torch.cartesian_prod(*[torch.arange(4)] * 4)  # all images, each weighted by its probability
    labels, seen = torch.zeros(len(every), dtype=torch.long), []
    for _ in range(50):
        with torch.no_grad():
            weights = drawn_log_probs(policy, every, labels, PolicySettings())[0].sum(1).exp()
        rewards = (every == 0).float().sum(1)
        seen.append(float((weights * rewards).sum()) / 4)
        advantages = weights * (rewards - (weights * rewards).sum()) * len(every)
        optimizer.zero_grad()
        module(every, labels, advantages)[0].backward()
        if beta:
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e-3)
        optimizer.step()
    if beta:
        assert max(abs(value - seen[0]) for value in seen) < 0.01
    else:
        assert all(later > before for before, later in pairwise(seen)) and seen[-1] > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_images_drawn_are_those_that_the_losss_distribution_draws(kind):
    """The same noise picks the same codes of the logits of a whole forward pass, in the order in which they were drawn."""
    size, more = KINDS[kind]
    model = randomize(build_gpt(size, vocab_size=64, block_size=16, num_classes=3, **more), 1)
    tokenizer = randomize(VQ_models["VQ-4"](codebook_size=64), 2)
    plan, sampling = Parallel(Distributed(torch.device("cpu"))), SamplingConfig(cfg_scale=2.0)
    studio = Studio(model, model, tokenizer, plan, sampling)
    items, numbers = [0, 1, 2, 0], range(5, 9)
    drawn = studio.draw(Classes(["a", "b", "c"]), items, 3, numbers)
    assert drawn.pixels.shape == (4, 16, 16, 3) and drawn.cond["label"].tolist() == items
    order = model.layout.order.expand(4, -1) if drawn.orders is None else drawn.orders
    tokens = drawn.codes.gather(1, order)
    read, given = tokens[:, : -model.layout.step_tokens], {"orders": drawn.orders}
    with torch.no_grad():
        own, none = (model(read, drawn.cond, drop=torch.full((4,), drop), **given) for drop in (False, True))
    scales = torch.tensor(guidance_scales(model.layout, sampling))[:, None]
    assert torch.equal(draw_race(guide(own, none, scales), image_noise(3, numbers, 16)), tokens)
    settings = [PolicySettings(scales=each) for each in (scales.flatten().tolist(), None)]
    asked = {"prefix_mask": drawn.prefix_mask, "orders": drawn.orders, "drawn": drawn.log_probs}
    gaps = [
        PolicyLoss(model, None, one)(drawn.codes, drawn.cond, torch.zeros(4), **asked)[1]["draw_gap"]
        for one in settings
    ]
    assert gaps[0] < 1e-5 and gaps[1] > 0.01
    assert (drawn.orders is not None) == model.layout.own_orders
