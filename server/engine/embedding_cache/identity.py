"""A name for everything that embeddings depend on besides the image: weights and configuration.

Entries that outlive the server are stored under this name, so that another model, other weights at
the same path, other processor options or another version of vLLM do not find them.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3
from huggingface_hub import snapshot_download
from vllm import __version__ as vllm_version
from vllm.config import ModelConfig, VllmConfig

# Increase it when the format or meaning of the stored data changes.
FORMAT = 1

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_CONFIGURATION = (
    "config.json",
    "params.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_NAME_LENGTH = 32


class UnknownWeights(Exception):
    """The weights are not in local files, so they cannot be identified."""


def namespace(config: VllmConfig) -> str:
    """The name, 32 hexadecimal digits, shared by engines whose embeddings are interchangeable.
    Reads all weights: about a second for a few GB in the page cache.

    Raises:
        UnknownWeights: the weights are not in local files.
    """
    model = config.model_config
    hasher = blake3(max_threads=blake3.AUTO)
    how = {
        "format": FORMAT,
        "vllm": vllm_version,
        "device": config.device_config.device_type,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "architectures": model.architectures,
        "config": _without_place(model.hf_config.to_dict()),
        "processor": _multimodal(model, "mm_processor_kwargs"),
        "attention": _multimodal(model, "mm_encoder_attn_dtype"),
        "parallel": config.parallel_config.tensor_parallel_size,
    }
    if rate := _multimodal(model, "video_pruning_rate"):
        how["pruning"] = (rate, str(_multimodal(model, "video_pruning_method")))
    hasher.update(json.dumps(how, sort_keys=True, default=str).encode())
    if config.load_config.load_format == "dummy":
        hasher.update(f"dummy weights of seed {model.seed}".encode())
        return hasher.hexdigest()[:_NAME_LENGTH]
    for path in _files(model, config.load_config.download_dir):
        hasher.update(f"{path.name} {path.stat().st_size}\n".encode())
        hasher.update_mmap(path)
    return hasher.hexdigest()[:_NAME_LENGTH]


def _without_place(config: object) -> object:
    """A configuration without the paths that it and its parts were read from."""
    if not isinstance(config, dict):
        return config
    return {name: _without_place(v) for name, v in config.items() if name != "_name_or_path"}


def _multimodal(model: ModelConfig, option: str) -> object:
    return getattr(model.multimodal_config, option, None)


def _files(model: ModelConfig, downloads: str | None) -> Iterator[Path]:
    """The files of weights, of the model's code and of the processor's configuration, in a fixed
    order."""
    place = Path(model.model)
    if place.is_file():
        yield place
        return
    if not place.is_dir():
        place = _snapshot(model, downloads)
    weights = sorted(path for pattern in _WEIGHTS for path in place.glob(pattern))
    if not weights:
        raise UnknownWeights(f"no weights were found in {place}")
    yield from weights
    yield from sorted(place.glob("*.py"))
    yield from (path for name in _CONFIGURATION if (path := place / name).is_file())


def _snapshot(model: ModelConfig, downloads: str | None) -> Path:
    name, revision = model.model, model.revision
    try:
        return Path(
            snapshot_download(name, revision=revision, cache_dir=downloads, local_files_only=True)
        )
    except Exception as error:
        raise UnknownWeights(f"{model.model} is not in the local model cache") from error
