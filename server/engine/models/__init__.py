"""Model families that vLLM has no class for, served through its public registries.

`register` names the classes; vLLM imports the one that a checkpoint asks for. Each module has the
processor of a family, and its model on top of parts of vLLM and transformers. Weights have the
names and shapes that transformers saves.
"""

_FAMILIES = {
    "Idefics2ForConditionalGeneration": "idefics2",
    "InstructBlipForConditionalGeneration": "instructblip",
}


def register() -> None:
    """Make the families known to vLLM in this process. A class that vLLM itself has is kept."""
    from vllm.model_executor.models import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture, module in _FAMILIES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{__name__}.{module}:{architecture}")
