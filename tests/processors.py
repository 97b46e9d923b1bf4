"""vLLM's processors of the tiny checkpoints in `tests.families`, without an engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import families


def created(family: str, directory: Path, options: Mapping[str, Any] | None = None) -> Any:
    """The processor of `family`, whose checkpoint is made below `directory`, under `options`
    (`--mm-processor-kwargs`)."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from server.engine.arguments import parse

    model = families.build(family, directory)
    flags = ["--dtype", "float32", "--max-model-len", "4096", *families.FLAGS.get(family, [])]
    args, _ = parse([str(model), *flags])
    args.mm_processor_kwargs = dict(options or {})
    config = AsyncEngineArgs.from_cli_args(args).create_model_config()
    return MULTIMODAL_REGISTRY.create_processor(config)
