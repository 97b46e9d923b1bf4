"""The shape of a model, for the planner: its class in vLLM is built without memory for weights."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError
from torch import nn
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from server.engine.token_allocator import patch_side
from server.engine.token_rules import measured_rule, token_rule
from server.engine.vllm_adapter import meta_model
from server.engine.vllm_adapter.kv_plan import KvPlan
from server.engine.vllm_adapter.levels import modality_of
from server.errors import CannotPlan
from server.imaging.tokens import TokenRule
from server.planner.shape import Attention, Encoder, Experts, Language, ModelShape

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# What vLLM uses on GPUs, where it chooses the size of a block.
_GPU_BLOCK = 16
# The side of a patch, in pixels, where a configuration does not tell.
_PATCH = 14
_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k")
# In Qwen2-VL, `hidden_size` is the width of what the encoder returns.
_WIDTHS = ("embed_dim", "hidden_size", "width")
_DEPTHS = ("num_hidden_layers", "depth", "layers", "num_layers")
_FEED_FORWARD = ("intermediate_size", "mlp_dim")


class PlannedModel(NamedTuple):
    """A model's shape. `make_rule` makes the rule of its image tokens: None if it takes no
    pictures; it needs the files of the model's processor, and raises `CannotPlan` without them."""

    shape: ModelShape
    make_rule: Callable[[], TokenRule | None]


def read(args: Namespace) -> PlannedModel:
    """Read the model that `args`, vLLM's arguments, name. Weights are not read, and need not be
    there.

    Raises:
        CannotPlan: vLLM cannot build this model here.
    """
    try:
        config = _config(args)
        model, specs = meta_model.build(config)
    except Exception as error:
        raise CannotPlan(f"vLLM cannot build this model here: {_reason(error)}") from error
    language_model = _language_model(model)
    inside = {id(module) for module in language_model.modules()} | {
        id(module) for module in model.modules() if isinstance(module, ParallelLMHead)
    }
    encoder = _encoder(model, inside, config) if config.model_config.is_multimodal_model else None
    shape = ModelShape(
        type(model).__name__,
        config.model_config.max_model_len,
        _language(model, inside, config, specs),
        encoder,
        KvPlan(config, specs),
    )
    return PlannedModel(shape, lambda: _token_rule(config.model_config))


def _config(args: Namespace) -> "VllmConfig":
    engine = AsyncEngineArgs.from_cli_args(args)
    # The planner divides by itself what GPUs share.
    engine.tensor_parallel_size = engine.pipeline_parallel_size = engine.data_parallel_size = 1
    engine.kv_cache_dtype = "auto"
    engine.block_size = engine.block_size or _GPU_BLOCK
    engine.enforce_eager = True
    config: VllmConfig = engine.create_engine_config()
    return config


def _token_rule(model: "ModelConfig") -> TokenRule | None:
    if not model.is_multimodal_model:
        return None
    try:
        processor = MULTIMODAL_REGISTRY.create_processor(model)
    except Exception as error:
        raise CannotPlan(f"vLLM cannot build the model's processor: {_reason(error)}") from error
    if modality_of(processor) not in processor.info.allowed_mm_limits:
        return None
    return token_rule(processor, {}) or measured_rule(processor, {})


def _language_model(model: Any) -> nn.Module:
    found = getattr(model, "get_language_model", None)
    return model if found is None else found()  # type: ignore[no-any-return]


def _reason(error: Exception) -> str:
    """On one line."""
    if isinstance(error, ValidationError):
        return "; ".join(each["msg"] for each in error.errors(include_url=False))
    return " ".join(f"{type(error).__name__}: {error}".split())


# ---------------------------------------------------------------------- the language model


def _language(
    model: nn.Module, inside: set[int], config: "VllmConfig", specs: dict[str, KVCacheSpec]
) -> Language:
    modules = [module for module in model.modules() if id(module) in inside]
    text, heads = config.model_config.hf_text_config, config.model_config
    dtype: Any = heads.dtype  # resolved, though its type allows names
    embeddings = [module for module in modules if isinstance(module, VocabParallelEmbedding)]
    tables = [table for table in embeddings if not isinstance(table, ParallelLMHead)]
    heads_of_output = [table for table in embeddings if isinstance(table, ParallelLMHead)]
    separate = bool(heads_of_output) and not getattr(text, "tie_word_embeddings", False)
    experts, active = _experts(model, inside, config.model_config)
    width = heads.get_num_attention_heads(config.parallel_config) * heads.get_head_size()
    output = heads_of_output or tables
    return Language(
        weight_bytes=_bytes(modules),
        unread_bytes=_bytes(tables) if separate else 0,
        macs_per_token=sum(_macs(module) for module in modules) + active,
        macs_per_output=sum(parameter.numel() for parameter in _parameters(output[:1])),
        attention=_attention(specs, width),
        hidden=heads.get_hidden_size(),
        intermediate=_number(text, ("moe_intermediate_size", *_FEED_FORWARD)),
        vocabulary=heads.get_vocab_size(),
        itemsize=dtype.itemsize,
        experts=experts,
    )


def _attention(specs: dict[str, KVCacheSpec], width: int) -> tuple[Attention, ...]:
    """The layers by their windows; those without a cache of their own share that of another."""
    windows: dict[int | None, int] = {}
    for spec in specs.values():
        if isinstance(spec, AttentionSpec):
            window = getattr(spec, "sliding_window", None)
            windows[window] = windows.get(window, 0) + 1
    return tuple(Attention(layers, width, window) for window, layers in windows.items())


def _experts(
    model: nn.Module, inside: set[int], config: "ModelConfig"
) -> tuple[Experts | None, int]:
    """The experts, and the multiplications of those that compute a token. (Of weights of 4 bits,
    which lie two in a byte, half are counted.)"""
    count = config.get_num_experts()
    chosen = _number(config.hf_text_config, _CHOSEN)
    if not count or not chosen:
        return None, 0
    found = [
        parameter
        for name, module in model.named_modules()
        if id(module) in inside and "experts" in name
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1 and parameter.shape[0] == count
    ]
    size = sum(parameter.numel() * parameter.element_size() for parameter in found)
    active = sum(parameter.numel() for parameter in found) * chosen // count
    return (Experts(size, count, chosen), active) if size else (None, 0)


# ---------------------------------------------------------------------- the vision encoder


def _encoder(model: nn.Module, inside: set[int], config: "VllmConfig") -> Encoder:
    joining = tuple(_connectors(model))
    modules = [(name, part) for name, part in model.named_modules() if id(part) not in inside]
    per_token = [part for name, part in modules if name.startswith(joining) or "merger" in name]
    of_tokens = {id(part) for part in per_token}
    vision = getattr(config.model_config.hf_config, "vision_config", None)
    return Encoder(
        weight_bytes=_bytes([part for _, part in modules]),
        macs_per_patch=sum(_macs(part) for _, part in modules if id(part) not in of_tokens),
        macs_per_token=sum(_macs(part) for part in per_token),
        patch=patch_side(vision) or _PATCH,
        attention=_encoder_attention(vision),
        hidden=_number(vision, _WIDTHS),
        intermediate=_number(vision, _FEED_FORWARD) or 4 * _number(vision, _WIDTHS),
    )


def _connectors(model: Any) -> Sequence[str]:
    """The names of the modules that join the encoder to the language model."""
    try:
        mapping = model.get_mm_mapping()
    except (AttributeError, NotImplementedError):
        return ()
    names = mapping.connector
    return [names] if isinstance(names, str) else list(names or ())


def _encoder_attention(vision: Any) -> tuple[Attention, ...]:
    """All layers see all patches, but for those that a configuration like Qwen2.5-VL's limits to
    windows."""
    width, depth = _number(vision, _WIDTHS), _number(vision, _DEPTHS)
    window = getattr(vision, "window_size", None)
    whole = getattr(vision, "fullatt_block_indexes", None)
    if not window or whole is None:
        return (Attention(depth, width),)
    inside = (window // (patch_side(vision) or _PATCH)) ** 2
    return (Attention(len(whole), width), Attention(depth - len(whole), width, inside))


# ---------------------------------------------------------------------- parts of modules


def _macs(module: nn.Module) -> int:
    """Multiplications of a layer's own weights for each of its inputs; of a quantized layer, by
    its sizes."""
    if isinstance(module, LinearBase):
        return int(module.input_size * module.output_size)
    if isinstance(module, nn.Linear) or "Conv" in type(module).__name__:
        weights = module.parameters(recurse=False)
        return sum(weight.numel() for weight in weights if weight.dim() > 1)
    return 0


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Each once, though modules may share them."""
    found = {id(each): each for part in modules for each in part.parameters(recurse=False)}
    return list(found.values())


def _bytes(modules: Sequence[nn.Module]) -> int:
    return sum(each.numel() * each.element_size() for each in _parameters(modules))


def _number(config: Any, names: Sequence[str]) -> int:
    """The first of these settings that is a number; 0 if none is."""
    for name in names:
        if isinstance(found := getattr(config, name, None), int):
            return found
    return 0
