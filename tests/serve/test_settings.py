"""Settings of a request on their way to the engine."""

import math

import pytest
import torch

from autoregressive.models.sampling import SamplingConfig
from autoregressive.serve.engine import ImageRequest
from autoregressive.serve.settings import DrawSettings
from utils.rng import image_noise


def test_draw_settings_of_a_request_are_its_own():
    request = ImageRequest(label=3, seed=5, cfg_scale=4, cfg_interval=7, temperature=0.5, top_k=20, top_p=0.9)
    settings = DrawSettings.read({**request.sampling, "seed": 5, "index": 2})
    assert settings.config == SamplingConfig(4, 7, 0.5, 20, 0.9, True)
    assert torch.equal(settings.noise(64), image_noise(5, [2], 64)[0])
    assert DrawSettings.read(None) == DrawSettings() == DrawSettings.read({"other": "x"})
    assert not DrawSettings.read({"sample_logits": 0}).sample_logits


def test_guided_tokens_end_with_the_interval():
    guided = [DrawSettings(2.0, cfg_interval=1).guides_token(token) for token in range(5)]
    assert guided == [True, True, True, False, False]  # the first comes from the prefill, step 0 gives the second
    assert not DrawSettings(1.0).guides_token(0)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"cfg_scale": math.inf}, "--cfg-scale"),
        ({"cfg_scale": 10**400}, "cfg_scale"),
        ({"cfg_scale": True}, "cfg_scale: .*number"),
        ({"cfg_scale": "4"}, "cfg_scale: .*number"),
        ({"temperature": [1.0]}, "temperature: .*number"),
        ({"top_k": math.nan}, "top_k: .*integer"),
        ({"top_k": 1.5}, "top_k: .*integer"),
        ({"top_p": -1}, "--top-p"),
        ({"seed": 2**63}, "seed: "),
        ({"index": None}, "index: .*integer"),
        ({"sample_logits": "perhaps"}, "sample_logits: "),
    ],
)
def test_draw_settings_out_of_range_raise_with_their_name(values, message):
    with pytest.raises(ValueError, match=message) as raised:
        DrawSettings.read(values)
    assert "\n" not in str(raised.value)
