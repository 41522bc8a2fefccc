"""The transformer against the published models' recorded figures: training step, RoPE table, greedy decoding."""

import numpy as np
import pytest
import torch

from autoregressive.models import decode_step
from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.layouts import Layout
from autoregressive.models.layouts.patches import with_patches
from autoregressive.models.sampling import filter_logits
from autoregressive.train.loss import TokenLoss
from tests.helpers import assert_close, golden_state, load_golden

MODELS = ["c2i", "t2i", "par4", "par16", "nar", "nar_t2i"]
NEIGHBOURS = ["nar", "nar_t2i"]  # recorded in raster order
RUNS = {"cfg1": {"cfg_scale": 1.0}, "cfg3": {"cfg_scale": 3.0}, "cfg3_interval4": {"cfg_scale": 3.0, "cfg_interval": 4}}


def build(name: str) -> tuple[Transformer, dict, dict]:
    arrays, meta = load_golden(name)
    args = dict(meta["model_args"])
    if args.pop("medusa_attention_num", 0):
        args["layout"] = {"name": "neighbours"}
    model = Transformer(ModelArgs(**args))
    state = golden_state(meta["state_dict"], meta["config"]["seed"], meta["config"]["gain"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == meta["state_dict"]
    model.load_state_dict(state, strict=True)
    return model.eval(), arrays, meta


def condition(arrays: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    if "labels" in arrays:
        return torch.from_numpy(arrays["labels"]), None
    return torch.from_numpy(arrays["caption"]), torch.from_numpy(arrays["caption_mask"])


@pytest.mark.parametrize("name", MODELS)
def test_training_step(name):
    model, arrays, _ = build(name)
    cond, prefix_mask = condition(arrays)
    codes = torch.from_numpy(arrays["codes"])
    tokens = codes[:, model.layout.order]
    logits = model(tokens[:, : -model.layout.step_tokens], cond, prefix_mask=prefix_mask)
    if name in NEIGHBOURS:
        logits = logits[:, model.layout.raster]
    assert_close(logits, arrays["train/logits"])
    valid = torch.from_numpy(arrays["valid"]) if "valid" in arrays else None
    loss = TokenLoss(model)(codes, cond, prefix_mask=prefix_mask, valid=valid)
    assert_close(loss.double(), arrays["train/loss"])
    loss.backward()
    gradients = {
        key.removeprefix("train/grad/"): value for key, value in arrays.items() if key.startswith("train/grad/")
    }
    assert len(gradients) >= 4
    for key, value in gradients.items():
        assert_close(model.get_parameter(key).grad, value)


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_training_step_with_patches(side):
    model, arrays, _ = build("npp")
    codes, labels = torch.from_numpy(arrays["codes"]), torch.from_numpy(arrays["labels"])
    layout = with_patches(model.layout, side)
    logits = model(codes[:, layout.order][:, : -layout.step_tokens], labels, layout=layout)
    assert_close(logits, arrays[f"p{side}/logits"])
    loss = TokenLoss(model)(codes, labels, layout=layout)
    assert_close(loss.double(), arrays[f"p{side}/loss"])
    loss.backward()
    assert_close(model.tok_embeddings.weight.grad, arrays[f"p{side}/grad/tok_embeddings.weight"])


@pytest.mark.parametrize("name", MODELS)
def test_rope_table(name):
    model, arrays, _ = build(name)
    assert_close(model.rope(torch.device("cpu")), in_rows_of(model.layout, arrays["rope"], name))


@pytest.mark.parametrize("name", ["par4", "par16", *NEIGHBOURS])
def test_order(name):
    model, arrays, _ = build(name)
    assert model.layout.order.tolist() == arrays["order"].tolist()
    assert model.layout.order[model.layout.raster].tolist() == list(range(model.layout.tokens))
    if name in NEIGHBOURS:
        assert model.layout.groups == tuple(arrays["groups"])


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_mask(name):
    model, arrays, _ = build(name)
    rows, prefix_mask = model.layout.rows, condition(arrays)[1]
    mask = model.attention_mask(rows, prefix_mask, torch.device("cpu"))
    expected = in_rows_of(model.layout, arrays["mask"].transpose(1, 2, 0), name)  # a row a row, then a column a row
    expected = in_rows_of(model.layout, expected.transpose(0, 1), name).permute(2, 1, 0)
    assert torch.equal(mask.expand(len(expected), 1, -1, -1)[:, 0], expected.bool())


def in_rows_of(layout: Layout, recorded: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    """Put what is recorded by rows, (rows, …), in the order of the layout's rows."""
    recorded = torch.as_tensor(recorded)
    if name not in NEIGHBOURS:
        return recorded
    return torch.cat([recorded[: layout.prefix], recorded[layout.prefix :][layout.order]])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding(name, run, monkeypatch):
    model, arrays, _ = build(name)
    cond, emb_masks = condition(arrays)
    calls = []
    draw_tokens = decode_step.draw_tokens

    def record(logits, *args):
        calls.append(logits)
        return draw_tokens(logits, *args)

    monkeypatch.setattr(decode_step, "draw_tokens", record)
    n = arrays["codes"].shape[1]
    codes = generate(model, cond, n, emb_masks=emb_masks, sample_logits=False, **RUNS[run])
    assert len(calls) == int(arrays[f"generate/{run}/calls"])
    expected = arrays.get(f"generate/{run}/raster_tokens", arrays[f"generate/{run}/tokens"])
    assert codes.tolist() == expected.tolist()
    done = 0
    for logits in calls:
        # unconditional rows stop being computed once no later step needs them: fewer rows than recorded
        assert_close(logits, arrays[f"generate/{run}/logits"][: len(logits), done : done + logits.shape[1]])
        done += logits.shape[1]
    assert done == n


def test_filter():
    arrays, _ = load_golden("c2i")
    logits = torch.from_numpy(arrays["filter/logits"])
    cases = [key.removeprefix("filter/") for key in arrays if key.startswith("filter/k")]
    assert len(cases) == 7
    for case in cases:
        k, p = case[1:].split("_p")
        kept = filter_logits(logits, int(k), float(p)).isfinite()
        assert np.array_equal(kept.numpy(), arrays[f"filter/{case}"]), case
