"""Fingerprints of tokenizers: equal for equal codes, and comparable with those of the first edition."""

import hashlib

import pytest
import torch

from tests.helpers import randomize
from tokenizer.load import load_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.origin import same_tokenizer


def tokenizer(seed=0, **more):
    return randomize(VQ_models["VQ-4"](codebook_size=64, **more), seed=seed)


@pytest.mark.parametrize(
    "name", ["encoder.conv_in.weight", "encoder.conv_out.bias", "quant_conv.weight", "quantize.embedding.weight"]
)
def test_fingerprint_changed_weight_of_the_encoder_differs(name):
    changed = tokenizer()
    with torch.no_grad():
        changed.get_parameter(name).view(-1)[0] += 1e-3
    assert changed.fingerprint() != tokenizer().fingerprint()


def test_fingerprint_other_norm_of_the_codebook_differs():
    assert tokenizer(codebook_l2_norm=False).fingerprint() != tokenizer().fingerprint()


def test_fingerprint_fine_tuned_decoder_is_the_same():
    """It decodes the same codes."""
    changed = tokenizer().decode_in_bfloat16()
    with torch.no_grad():
        changed.decoder.conv_out.weight += 1
        changed.post_quant_conv.weight += 1
    changed.encoder.to(memory_format=torch.channels_last)
    assert changed.fingerprint() == tokenizer().fingerprint()


def test_fingerprint_of_the_first_edition_is_compared():
    model = tokenizer()
    first = hashlib.sha256(model.quantize.embedding.weight.numpy(force=True).tobytes())
    first.update(model.encoder.conv_in.weight.numpy(force=True).tobytes())
    recorded = first.hexdigest()[:16]
    assert same_tokenizer(recorded, model.fingerprint())
    assert not same_tokenizer(recorded, tokenizer(seed=1).fingerprint())
    assert same_tokenizer(None, recorded) and same_tokenizer(recorded, recorded)


@pytest.mark.slow
@pytest.mark.parametrize("use_ema", [False, True])
def test_load_tokenizer_fingerprint_chooses_the_weights(tmp_path, use_ema):
    """Codes of the raw weights are decoded by them, also where --use-ema is meant for the GPT, and the other way round."""
    raw, averaged = tokenizer(1), tokenizer(2)
    torch.save({"model": raw.state_dict(), "ema": averaged.state_dict()}, tmp_path / "vq.pt")
    for meant in (raw, averaged):
        wanted = meant.fingerprint()
        loaded = load_tokenizer(tmp_path / "vq.pt", use_ema=use_ema, fingerprint=wanted)
        assert loaded.fingerprint() == wanted
    other = tokenizer(3).fingerprint()
    chosen = (averaged if use_ema else raw).fingerprint()
    with pytest.raises(
        ValueError, match=f"vq.pt is the tokenizer {chosen}, and the codes are of the tokenizer {other}"
    ):
        load_tokenizer(tmp_path / "vq.pt", use_ema=use_ema, fingerprint=other)
