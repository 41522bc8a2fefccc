"""Quantisers, one file each; tokenizer/base.py:QUANTIZERS has their names."""
