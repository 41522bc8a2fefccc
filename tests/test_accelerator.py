"""What an accelerator has to compute as a CPU does. Run where there is one; nothing here has a meaning without."""

import pytest
import torch

from autoregressive.models.generate import generate
from tests.autoregressive.test_goldens import MODELS, RUNS, build, condition
from utils.distributed import pick_device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", MODELS)
def test_recorded_greedy_tokens(name, run, compile):
    device = pick_device()
    if compile and device.type != "cuda":
        pytest.skip("the compiled step is for CUDA")
    model, arrays, _ = build(name)
    cond, emb_masks = condition(arrays)
    codes = generate(model.to(device), cond, emb_masks=emb_masks, sample_logits=False, compile=compile, **RUNS[run])
    expected = arrays.get(f"generate/{run}/raster_tokens", arrays[f"generate/{run}/tokens"])
    assert codes.tolist() == expected.tolist()


def test_bfloat16_stays_close_to_float32():
    device = pick_device()
    model, arrays, _ = build("c2i")
    tokens, labels = torch.from_numpy(arrays["codes"]), torch.from_numpy(arrays["labels"])
    exact = model(tokens[:, :-1], labels)
    rounded = model.to(device, torch.bfloat16)(tokens[:, :-1].to(device), labels.to(device)).cpu()
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
