"""Fingerprints of tokenizers: they say whose codes some codes are.

    tokenizer_fingerprint(tokenizer)      # 32 hexadecimal digits

Codes are decided by the encoder, quant_conv, the codebook and its norm: a decoder that was fine-tuned alone speaks the
same codes. utils/origin.py compares fingerprints.
"""

import hashlib

from torch import Tensor

from tokenizer.tokenizer_image.vq_model import VQModel

_DECISIVE = ("encoder.", "quant_conv.", "quantize.embedding.")


def tokenizer_fingerprint(tokenizer: VQModel) -> str:
    """Return 32 digits that are equal for tokenizers of equal codes.

    The first 16 are those that the first edition recorded, of the codebook and the first layer alone, so that its
    records can be compared too.
    """
    first = hashlib.sha256(_bytes(tokenizer.quantize.embedding.weight))
    first.update(_bytes(tokenizer.encoder.conv_in.weight))
    whole = hashlib.sha256(f"codebook_l2_norm={tokenizer.config.codebook_l2_norm}".encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if name.startswith(_DECISIVE):
            whole.update(name.encode())
            whole.update(_bytes(tensor))
    return first.hexdigest()[:16] + whole.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().float().cpu().contiguous().numpy()).cast("B")
