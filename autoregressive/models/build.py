"""Models of every registered trunk."""

from autoregressive.models.sizes import GPT_SIZES
from autoregressive.models.trunk import TRUNKS, ModelArgs, Trunk


def build_model(args: ModelArgs) -> Trunk:
    """Build the model that the arguments describe. Raises ValueError where its trunk, layout or a condition is not registered."""
    return TRUNKS[args.trunk](args)


def build_gpt(name: str, **overrides) -> Trunk:
    """Build a model of a size in the table, with any field of ModelArgs overridden."""
    return build_model(ModelArgs(**GPT_SIZES[name].fields | overrides))
