"""Quantisers, one file each. Importing this package registers all of them (tokenizer/base.py:QUANTIZERS)."""

from tokenizer.tokenizer_image.quantizers import fsq, ibq, lfq, vq, vq_legacy, vq_restart

__all__ = ["fsq", "ibq", "lfq", "vq", "vq_legacy", "vq_restart"]
