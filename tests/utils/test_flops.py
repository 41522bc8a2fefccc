"""FLOPs of a training sample by hand and by the model's matrices; peaks of accelerators by name."""

from dataclasses import replace

import pytest
import torch

from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.layouts.patches import with_patches
from autoregressive.train.flops import training_flops_per_image
from utils.flops import find_accelerator, peak_flops

ARGS = ModelArgs(dim=64, n_layer=3, n_head=4, multiple_of=32, vocab_size=100, num_classes=10, block_size=64)
BLOCK = 64 * 192 + 64 * 64 + 3 * 64 * 192  # wqkv, wo, and three of hidden width 192


def by_hand(rows: int, outputs: int, captions: int = 0) -> float:
    products = 3 * BLOCK * rows + 100 * 64 * outputs + captions
    return 6 * products + 12 * 3 * 64 * rows**2


@pytest.mark.parametrize(
    ("args", "rows", "captions"),
    [
        (ARGS, 64, 0),  # the class and all tokens but the last
        (replace(ARGS, ar_token_num=4, spe_token_num=3), 1 + 60 + 3, 0),
        (replace(ARGS, model_type="t2i", cls_token_num=120), 120 + 63, (2048 * 64 + 64 * 64) * 120),
    ],
)
def test_a_sample_by_hand(args, rows, captions):
    assert training_flops_per_image(Transformer(args)) == by_hand(rows, 64, captions)


def test_patches_shorten_the_sequence():
    model = Transformer(ARGS)
    layout = with_patches(model.layout, 2)
    assert training_flops_per_image(model, layout) == by_hand(16, 16)


def test_second_exit_adds_a_block_and_a_head():
    rows, outputs = 1 + 63, 2 * 64
    products = 4 * BLOCK * rows + 100 * 64 * outputs
    args = replace(ARGS, layout={"name": "neighbours"})
    assert training_flops_per_image(Transformer(args)) == 6 * products + 12 * 4 * 64 * rows**2


def test_frozen_weights_have_no_gradient_of_their_own():
    model = Transformer(ARGS)
    trained = training_flops_per_image(model)
    model.layers.requires_grad_(False)
    assert training_flops_per_image(model) == trained - 2 * 3 * BLOCK * 64


def test_trunk_before_a_second_exit_that_alone_is_trained_has_no_backward_pass():
    rows, outputs, model = 64, 64, Transformer(replace(ARGS, layout={"name": "neighbours"}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.of_second_exit(name) is not None)
    products = (2 * 3 + 6) * BLOCK * rows + (2 + 6) * 100 * 64 * outputs
    assert training_flops_per_image(model) == products + (4 * 3 + 12) * 64 * rows**2


@pytest.mark.parametrize("patch_side", [1, 2])
def test_training_flops_are_those_of_the_matrices_the_model_multiplies(patch_side):
    model = Transformer(ARGS)
    layout = with_patches(model.layout, patch_side)
    products = []
    for module in model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, _, output: products.append(output.numel() * m.in_features))
    tokens = torch.zeros(2, 64 - layout.step_tokens, dtype=torch.long)
    logits = model(tokens, torch.zeros(2, dtype=torch.long), layout=layout)
    products.append(logits.numel() * ARGS.dim)
    attention = 12 * 3 * 64 * (64 // patch_side**2) ** 2
    assert training_flops_per_image(model, layout) == 6 * sum(products) / 2 + attention


@pytest.mark.parametrize(
    ("name", "known", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", 989e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", "A100", 312e12),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", 312e12),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti", 80e12),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 364e12),
        ("Tesla V100-SXM2-32GB", "V100 32GB", None),
    ],
)
def test_devices_are_known_by_name(name, known, bf16):
    found = find_accelerator(name)
    assert found.name == known and found.peak_flops("bf16") == bf16


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Voodoo2", "", "NVIDIA A2"]
)
def test_unknown_devices_are_not_guessed(name):
    assert find_accelerator(name) is None


def test_precisions():
    a100 = find_accelerator("A100")
    peaks = [a100.peak_flops(precision) for precision in ("none", "fp32", "tf32", "fp16", "bf16")]
    assert peaks == [19.5e12, 19.5e12, 156e12, 312e12, 312e12]
    assert peak_flops(torch.device("cpu"), "bf16") is None
