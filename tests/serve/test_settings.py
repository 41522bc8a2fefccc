"""Settings of a request on their way to the engine."""

import math

import pytest
import torch

from autoregressive.models.sampling import SamplingConfig
from autoregressive.serve.engine import ImageRequest
from autoregressive.serve.settings import DrawSettings, to_extra_args
from utils.rng import image_noise


def test_there_and_back():
    request = ImageRequest(label=3, seed=5, cfg_scale=4, cfg_interval=7, temperature=0.5, top_k=20, top_p=0.9)
    settings = DrawSettings.read(to_extra_args(request, index=2))
    assert settings == DrawSettings(SamplingConfig(4, 7, 0.5, 20, 0.9, True), 5, 2)
    assert torch.equal(settings.noise(64), image_noise(5, [2], 64)[0])
    assert DrawSettings.read(None) == DrawSettings(SamplingConfig()) == DrawSettings.read({"other": "x"})
    assert not DrawSettings.read({"sample_logits": 0}).config.sample_logits


def test_the_last_guided_token():
    guided = [DrawSettings(SamplingConfig(2.0, cfg_interval=1)).guides(token) for token in range(5)]
    assert guided == [True, True, True, False, False]  # the first comes from the prefill, step 0 gives the second
    assert not DrawSettings(SamplingConfig(1.0)).guides(0)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"cfg_scale": math.inf}, "--cfg-scale"),
        ({"cfg_scale": 10**400}, "cfg_scale is out of range"),
        ({"cfg_scale": True}, "cfg_scale is a number"),
        ({"temperature": [1.0]}, "temperature is a number"),
        ({"top_k": math.nan}, "top_k is a whole number"),
        ({"top_p": -1}, "--top-p"),
        ({"seed": 2**63}, "seed is between"),
        ({"index": None}, "index is a number"),
        ({"sample_logits": "no"}, "sample_logits is true or false"),
    ],
)
def test_what_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DrawSettings.read(values)
