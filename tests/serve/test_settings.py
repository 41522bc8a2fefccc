"""Settings of a request on their way to another process."""

import math

import pytest

from autoregressive.models.settings import SamplingConfig
from autoregressive.request import Request


def test_settings_of_a_request_come_back_from_plain_values():
    sampling = SamplingConfig(4, 7, 0.5, 20, 0.9, True)
    request = Request.from_settings(Request({"label": 3}, sampling=sampling, seed=5, index=2).settings())
    assert (request.sampling, request.seed, request.index) == (sampling, 5, 2)
    for nothing in (None, {}, {"other": "x"}):
        assert Request.from_settings(nothing).settings() == Request({}).settings()
    assert not Request.from_settings({"sample_logits": 0}).sampling.sample_logits


@pytest.mark.parametrize(
    "values, message",
    [
        ({"cfg_scale": math.inf}, "--cfg-scale"),
        ({"cfg_scale": 10**400}, "cfg_scale"),
        ({"cfg_scale": True}, "cfg_scale must be a number"),
        ({"cfg_scale": "4"}, "cfg_scale must be a number"),
        ({"temperature": [1.0]}, "temperature must be a number"),
        ({"top_k": math.nan}, "--top-k must be a whole number"),
        ({"top_k": 1.5}, "--top-k must be a whole number"),
        ({"top_p": -1}, "--top-p"),
        ({"seed": 2**63}, "seed must be a whole number"),
        ({"index": None}, "index must be a whole number"),
        ({"sample_logits": "perhaps"}, "sample_logits must be"),
    ],
)
def test_settings_out_of_range_raise_with_their_name(values, message):
    with pytest.raises(ValueError, match=message) as raised:
        Request.from_settings(values)
    assert "\n" not in str(raised.value)
