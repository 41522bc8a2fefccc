"""RAR: the published model's recorded figures, random orders in training and decoding, its recipe, its files."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from autoregressive.models import decode_step
from autoregressive.models.build import build_gpt, build_model
from autoregressive.models.generate import generate
from autoregressive.models.layouts import build_layout
from autoregressive.models.sampling import SamplingConfig
from autoregressive.models.slots import Slots, plan_for_slots
from autoregressive.models.trunk import ModelArgs
from autoregressive.pipeline import load_gpt
from autoregressive.train.loss import TokenLoss
from autoregressive.train.orders import AnnealedOrders
from tests.helpers import assert_close, golden_state, load_golden, randomize
from utils.training.optim import adamw, learning_rate

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LLAMA = {"dim": 48, "n_layer": 2, "n_head": 4, "multiple_of": 32, "vocab_size": 40, "num_classes": 5, "block_size": 16}
RAR = {**LLAMA, "trunk": "rar", "ffn_width": 96}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The golden, and its model loaded from a file in the published format."""
    arrays, meta = load_golden("rar")
    config = meta["config"]
    path = tmp_path_factory.mktemp("rar") / "rar_small.bin"
    torch.save(golden_state(meta["state_dict"], config["seed"], config["gain"], gains=config["gains"]), path)
    return load_gpt(path), {name: torch.from_numpy(array) for name, array in arrays.items()}, meta


@pytest.fixture
def calls(monkeypatch):
    """The raw logits of each pass."""
    found, draw_tokens = [], decode_step.draw_tokens
    monkeypatch.setattr(
        decode_step, "draw_tokens", lambda logits, *args: found.append(logits) or draw_tokens(logits, *args)
    )
    return found


def small(trunk: str, **more):
    model = build_model(ModelArgs(**{**(RAR if trunk == "rar" else LLAMA), **more}))
    return randomize(model, seed=5, gain=2.0)


def shuffled(samples: int, tokens: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tokens, generator=generator) for _ in range(samples)])


def test_published_file_gives_the_model_that_its_shapes_tell(published):
    model, arrays, meta = published
    config = meta["config"]
    assert {name: list(v.shape) for name, v in model.state_dict().items()} == meta["state_dict"]
    assert model.args.identity["model"] == {
        "trunk": "rar", "dim": config["dim"], "n_layer": config["n_layer"], "n_head": config["n_head"],
        "n_kv_head": config["n_head"], "ffn_dim": config["intermediate_size"], "vocab_size": config["vocab_size"],
    }  # fmt: skip
    assert model.args.conditions == {"label": {"num_classes": config["num_classes"]}}
    assert model.layout.is_raster and model.layout.grid_size == config["grid"]
    mask = model.layout.mask(27)
    assert torch.equal(torch.ones(27, 27).tril().bool() if mask is None else mask, arrays["mask"])


@pytest.mark.parametrize("run", ["raster", "random", "dropped"])
def test_training_step_is_the_published_one(published, run):
    model, arrays, _ = published
    model.requires_grad_(True).zero_grad()
    orders = None if run == "raster" else arrays["train/random/orders"]
    drop = torch.ones(3, dtype=torch.bool) if run == "dropped" else None
    codes, labels = arrays["codes"], arrays["labels"]
    tokens = codes if orders is None else codes.gather(1, orders)
    assert torch.equal(tokens, arrays[f"train/{run}/targets"])
    logits = model(tokens[:, :-1], labels, orders=orders, drop=drop)
    assert_close(logits, arrays[f"train/{run}/logits"][:, :-1], **CLOSE)
    loss = TokenLoss(model)(codes, labels, orders=orders, drop=drop)
    assert_close(loss.double(), arrays[f"train/{run}/loss"])
    loss.backward()
    gradients = {name.removeprefix(f"train/{run}/grad/"): v for name, v in arrays.items() if f"{run}/grad/" in name}
    assert len(gradients) == (0 if run == "dropped" else 10)
    for name, value in gradients.items():
        gradient = model.get_parameter(name).grad
        assert_close(gradient[:, : value.shape[1]] if name.endswith(("pos_embed", "embeddings")) else gradient, value)
    model.requires_grad_(False)


@pytest.mark.parametrize("module", ["blocks.0.norm1", "blocks.0.attn.q_norm", "blocks.1.attn.k_norm", "adaln_before_head.norm_final"])  # fmt: skip
def test_norm_of_small_inputs_is_the_published_one(published, module):
    model, arrays, _ = published
    assert_close(model.get_submodule(module)(arrays[f"probe/{module}/input"]), arrays[f"probe/{module}/output"])


@pytest.mark.parametrize(
    ("run", "settings"),
    [
        ("cfg0", {"cfg_scale": 0.0}),
        ("cfg3_constant", {"cfg_scale": 3.0, "cfg_schedule": "power-cosine", "cfg_power": 0.0}),
        ("cfg3_constant", {"cfg_scale": 3.0}),
        ("cfg16_pow2.75", {"cfg_scale": 16.0, "cfg_schedule": "power-cosine", "cfg_power": 2.75}),
        ("cfg4_pow1_temperature1.02", {"cfg_scale": 4.0, "cfg_schedule": "power-cosine", "temperature": 1.02}),
    ],
)
def test_greedy_decoding_is_the_published_one(published, run, settings, calls):
    model, arrays, _ = published
    drawn = generate(model, arrays["labels"], sample_logits=False, **settings)
    assert torch.equal(drawn, arrays[f"generate/{run}/tokens"])
    assert len(calls) == arrays[f"generate/{run}/calls"] == 25
    assert_close(torch.cat(calls, dim=1), arrays[f"generate/{run}/logits"], **CLOSE)
    if settings["cfg_scale"]:
        assert_close(torch.tensor(SamplingConfig(**settings).scales(25)), arrays[f"generate/{run}/scale"])


def test_greedy_decoding_in_given_orders_is_the_recorded_one(published, calls):
    model, arrays, _ = published
    orders = arrays["generate/orders_cfg0/orders"]
    drawn = generate(model, arrays["labels"], orders=orders, sample_logits=False)
    assert torch.equal(drawn, arrays["generate/orders_cfg0/raster_tokens"])
    assert torch.equal(drawn.gather(1, orders), arrays["generate/orders_cfg0/tokens"])
    assert_close(torch.cat(calls, dim=1), arrays["generate/orders_cfg0/logits"], **CLOSE)


@pytest.mark.parametrize("trunk", ["rar", "llama"])
def test_decoding_in_random_orders_equals_the_full_forward_pass(trunk, calls):
    model, orders = small(trunk, target_positions=True), shuffled(3)
    orders[1] = torch.arange(16)  # one of them in the layout's order
    labels, seen = torch.tensor([0, 3, 4]), []
    drawn = generate(model, labels, orders=orders, cfg_scale=2.0, on_step=lambda done, _: seen.append(done))
    assert seen == list(range(1, 17))
    tokens = drawn.gather(1, orders)
    nulls = torch.tensor([False] * 3 + [True] * 3)
    logits = model(tokens.repeat(2, 1)[:, :-1], labels.repeat(2), orders=orders.repeat(2, 1), drop=nulls)
    assert_close(torch.cat(calls, dim=1), logits, **CLOSE)


@pytest.mark.parametrize("more", [{}, {"ar_token_num": 4}], ids=["raster", "PAR-4"])
def test_text_model_in_random_orders_decodes_as_its_full_forward_pass(more, calls):
    text = {"model_type": "t2i", "cls_token_num": 3, "caption_dim": 6, "target_positions": True}
    model, orders = small("llama", **text, **more), shuffled(2)
    features = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))
    masks = torch.tensor([[1, 1, 1], [0, 1, 1]])
    drawn = generate(model, features, emb_masks=masks, orders=orders)
    tokens = drawn.gather(1, orders)[:, : -model.layout.step_tokens]
    logits = model(tokens, features, orders=orders, prefix_mask=masks)
    assert_close(torch.cat(calls, dim=1), logits, **CLOSE)
    loss = TokenLoss(model)(drawn, features, orders=orders, prefix_mask=masks)
    wanted = -logits.log_softmax(-1).gather(2, drawn.gather(1, orders)[..., None]).mean()
    assert_close(loss, wanted)


@pytest.mark.parametrize("trunk", ["rar", "llama"])
def test_known_tokens_stay_in_random_orders(trunk):
    model, orders = small(trunk, target_positions=True), shuffled(2)
    known = torch.full((2, 16), -1)
    known[0, 5], known[1, 9] = 7, 11
    drawn = generate(model, torch.tensor([1, 2]), orders=orders, known=known)
    assert drawn[0, 5] == 7 and drawn[1, 9] == 11


@pytest.mark.parametrize("trunk", ["rar", "llama"])
def test_orders_that_are_the_layouts_change_no_bit(trunk):
    model, labels, noise = small(trunk, target_positions=True), torch.tensor([1, 2]), shuffled(2)
    orders = torch.arange(16).repeat(2, 1)
    drawn = generate(model, labels, cfg_scale=3.0, noise=noise)
    assert torch.equal(generate(model, labels, cfg_scale=3.0, noise=noise, orders=orders), drawn)


def test_llama_trained_in_random_orders_is_a_plain_one_in_raster_order():
    model, plain = small("llama", target_positions=True), small("llama")
    state = model.state_dict()
    table = state.pop("target_embeddings.weight")
    plain.load_state_dict(state)
    codes, labels = torch.randint(40, (2, 16)), torch.tensor([1, 2])
    loss, expected = TokenLoss(model)(codes, labels), TokenLoss(plain)(codes, labels)
    assert torch.equal(loss, expected)
    loss.backward()
    assert table.any() and not model.target_embeddings.weight.grad.any(), "a gradient of zeros, which DDP waits for"
    assert torch.equal(generate(model, labels, noise=codes), generate(plain, labels, noise=codes))


def test_orders_for_a_model_of_one_order_are_refused():
    with pytest.raises(ValueError, match="knows the order of its layout 'raster' alone"):
        generate(small("llama"), torch.tensor([1]), orders=shuffled(1))
    for wrong in (torch.zeros(1, 16, dtype=torch.long), shuffled(2), shuffled(1).float()):
        with pytest.raises(ValueError, match=r"orders are whole numbers of shape \(1, 16\)"):
            generate(small("rar"), torch.tensor([1]), orders=wrong)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_rar_in_windows_and_slots_draws_what_one_step_a_pass_draws(window):
    model, labels = small("rar", dim=64, n_head=4), torch.tensor([1, 4, 0])
    noise = torch.randint(2**62, (3, 16), generator=torch.Generator().manual_seed(1))
    expected = generate(model, labels, noise=noise, cfg_scale=3.0, cfg_schedule="power-cosine", cfg_power=2.0)
    drawn = generate(
        model, labels, noise=noise, window=window, cfg_scale=3.0, cfg_schedule="power-cosine", cfg_power=2.0
    )
    assert torch.equal(drawn, expected)
    plan = plan_for_slots(model)
    assert plan is not None
    slots = Slots(model, 3, plan, window)
    config = SamplingConfig(cfg_scale=3.0, cfg_schedule="power-cosine", cfg_power=2.0)
    with slots.drawing():
        slots.admit([2], [config], [noise[0]], labels[:1])
        slots.take_pass()
        slots.admit([0, 1], [config, config], [*noise[1:]], labels[1:])
        while any(slots.done(slot) < 16 for slot in range(3)):
            slots.take_pass()
    assert torch.equal(torch.stack([slots.tokens(slot) for slot in (2, 0, 1)]), expected)


def test_guidance_of_rar_leads_away_from_another_class():
    model, noise = small("rar"), torch.randint(2**62, (2, 16), generator=torch.Generator().manual_seed(1))
    labels, none = torch.tensor([1, 2]), torch.tensor([5, 5])
    drawn = [
        generate(model, labels, noise=noise, cfg_scale=4.0, negative=n) for n in (None, none, torch.tensor([3, 0]))
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_guidance_schedules_by_hand():
    assert SamplingConfig(cfg_scale=5.0).scales(3) == [5.0] * 3
    assert SamplingConfig(cfg_scale=5.0, cfg_schedule="linear").scales(4) == [1, 2, 3, 4]
    half = SamplingConfig(cfg_scale=5.0, cfg_schedule="power-cosine").scales(2)
    assert half == pytest.approx([1, 3])
    for wrong in ({"cfg_schedule": "cosine"}, {"cfg_power": -1}, {"cfg_power": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", "-")):
            SamplingConfig(**wrong)


def test_guidance_schedule_of_a_llama_weighs_each_token_by_its_own_scale(calls):
    model, labels, noise = small("llama", ar_token_num=4), torch.tensor([1, 2]), shuffled(2)
    settings = {"cfg_scale": 6.0, "cfg_schedule": "linear"}
    drawn = generate(model, labels, noise=noise, sample_logits=False, **settings)
    raw = torch.cat(calls, dim=1)
    scales = torch.tensor(SamplingConfig(**settings).scales(16))[:, None]
    mixed = raw[2:] + (raw[:2] - raw[2:]) * scales
    assert torch.equal(drawn[:, model.layout.order], mixed.argmax(-1))


# Training


def test_annealed_orders_follow_the_published_ratio():
    arrays, _ = load_golden("rar")
    layout = build_layout({"name": "raster"}, 16, 2)
    schedule = AnnealedOrders(layout, 0, 125_000, 187_500)
    ratios = [schedule.random_ratio(int(step)) for step in arrays["schedule/step"]]
    np.testing.assert_allclose(ratios, arrays["schedule/random_ratio"], atol=1e-12)
    for step, share in ((0, 1.0), (156_250, 0.5), (187_500, 0.0)):
        _, orders = schedule(step, 0, slice(400), 400)
        random = 0 if orders is None else (orders != layout.order).any(1).float().mean()
        assert random == pytest.approx(share, abs=0.08)


def test_annealed_orders_are_the_same_however_a_batch_is_split():
    schedule = AnnealedOrders(build_layout({"name": "raster"}, 4), 3, 0, 100)
    _, whole = schedule(40, 0, slice(0, 12), 12)
    parts = [schedule(40, 0, slice(start, start + 3), 12)[1] for start in range(0, 12, 3)]
    raster = torch.arange(16).expand(3, -1)
    assert torch.equal(torch.cat([raster if part is None else part for part in parts]), whole)
    assert torch.equal(whole.sort(1).values, torch.arange(16).expand(12, -1))
    assert not torch.equal(schedule(41, 0, slice(0, 12), 12)[1], whole)


def test_annealed_orders_cover_all_permutations_evenly():
    schedule = AnnealedOrders(build_layout({"name": "raster"}, 2), 3, 1, 1)
    _, orders = schedule(0, 0, slice(0, 4800), 4800)
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 130 and counts.max() < 280


def test_learning_rate_and_decay_are_those_of_the_published_recipe():
    arrays, _ = load_golden("rar")
    args = Namespace(
        lr=4e-4, min_lr=1e-5, warmup_steps=62_500, warmup_from_zero=True, lr_schedule="cosine", weight_decay=0.03,
        beta1=0.9, beta2=0.96, lr_decay_start_epoch=0.0,
    )  # fmt: skip
    rates = [learning_rate(args, int(step), 250_000) for step in arrays["schedule/step"]]
    np.testing.assert_allclose(rates, arrays["schedule/lr"], rtol=1e-9, atol=1e-15)
    model = small("rar")
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = (
        {names[id(p)] for p in group["params"]} for group in adamw(model, args, model.decays).param_groups
    )
    assert {"cls_token", "lm_head.weight", "blocks.0.adaLN_modulation.1.weight", "blocks.1.attn.qkv.weight"} <= decayed
    assert {"embeddings.weight", "pos_embed", "target_aware_pos_embed", "timesteps_embeddings"} <= others
    assert {"adaln_before_head.adaLN_modulation.1.weight", "blocks.0.norm1.weight", "lm_head.bias"} <= others


def test_new_rar_begins_with_blocks_that_are_the_identity():
    model = build_model(ModelArgs(**RAR))
    x, condition = torch.randn(2, 3, 48), torch.randn(2, 3, 48)
    assert torch.equal(model.blocks[0](x, condition, None, True, None), x)
    assert not model.cls_token.any() and 0.015 < model.pos_embed.std() < 0.025


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("RAR-B", 260_923_648), ("RAR-L", 461_668_352), ("RAR-XL", 955_425_024), ("RAR-XXL", 1_498_520_704)],
)
def test_sizes_have_the_published_numbers_of_parameters(name, parameters):
    with torch.device("meta"):
        model = build_gpt(name, vocab_size=1024, block_size=256)
    assert model.num_parameters == parameters
    assert build_model_again(model) == model.args.identity


def build_model_again(model) -> dict:
    with torch.device("meta"):
        return build_model(ModelArgs.from_identity(model.args.identity)).args.identity


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model_type": "t2i"}, "a RAR is of classes"),
        ({"drop_path_rate": 0.1}, "no stochastic depth"),
        ({"n_kv_head": 2}, "as many kv heads as heads"),
        ({"ar_token_num": 4}, "'parallel' has special tokens, and the trunk 'rar' has none"),
        ({"layout": {"name": "neighbours"}}, "'neighbours' has tokens read by 2 heads"),
        ({"layout": {"name": "queried"}}, "'queried' has tokens read from queries"),
    ],
)
def test_rar_of_what_it_does_not_have_is_refused(more, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelArgs(**{**RAR, **more}))
