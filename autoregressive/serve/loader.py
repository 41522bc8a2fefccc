"""Loader of this project's checkpoints for vLLM: from the file itself, without a copy on the disk. Needs vLLM."""

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from autoregressive.serve.convert import engine_weights, open_gpt
from autoregressive.serve.plugin import PLUGIN


@register_model_loader(PLUGIN)
class CheckpointLoader(BaseModelLoader):
    """Reads weights, memory-mapped, into vLLM's parameters."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Do nothing: the file is here."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fills the model's parameters, or this process's part of them."""
        model.load_weights(engine_weights(open_gpt(**model_config.hf_config.checkpoint)).items())
