"""Weight-only quantization of a GPT that samples: matrices in int8 with a scale for each output, all else as it was.

    gpt = load_gpt("c2i_XL_384.pt", dtype=torch.bfloat16)
    quantize(gpt)                                            # in place; needs torchao

Each matrix is taken back to the activations' dtype where it is used, so that what is saved is memory. Embeddings, norms and
the caption's projection, which runs once an image, are left alone, and `model.tok_embeddings.weight.dtype` says which dtype
activations and caches have, as without.
"""

from torch import nn

from autoregressive.models.trunk import Trunk


def require_torchao() -> None:
    """Raises ValueError where torchao is missing, or too old for this torch."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--quantize int8 needs torchao ({error}): pip install torchao, or pip install --upgrade torchao where it is older "
            "than torch"
        ) from error


def quantize(gpt: Trunk, *, head: bool = False) -> Trunk:
    """Puts the matrices of the blocks into int8, one after another and in place; of the head too where asked for.

    Returns the model, which can no longer be trained or saved as a checkpoint. What each matrix took goes back as it is
    replaced; on a CPU the C library may keep it for the process's next tensors.
    Raises ValueError where torchao is missing.
    """
    require_torchao()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    inside = set(gpt.layers.modules())

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and (module in inside or (head and module is gpt.output))

    # It would change settings of the whole process: how torch.compile tunes, in older releases float32 products too.
    quantize_(gpt, Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=chosen)
    return gpt
