"""What vLLM calls in each of its processes before it reads a model (entry point `vllm.general_plugins`).

With this project installed beside vLLM, `vllm.LLM(folder)` takes the folders that serve/convert.py writes.
"""

ARCHITECTURE = "AutoregressiveImageGPT"
PLUGIN = "autoregressive_image_gpt"  # as pyproject.toml names it


def register() -> None:
    """Tells vLLM of the architecture; the module itself is imported when a model of it is loaded."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "autoregressive.serve.model:ImageGPT")
