"""vLLM's HTTP routes, serving classes and middleware, as Saccade's app uses them."""

import importlib.util
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from vllm import __version__ as vllm_version
from vllm import envs
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
)
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.base.serving import PRIORITY_HEADER
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.routers import register_api_routers
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.launchers.utils.server_utils import (
    get_uvicorn_log_config,
    lifespan,
)
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.system_utils import set_ulimit
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry

from server.engine.vllm_adapter import messages_stream, text_stream
from server.request.context import RequestContext, entered
from server.telemetry.record import Record

__all__ = [
    "ADMIN_PATHS",
    "GUARDED_PREFIX",
    "AnthropicCountTokensRequest",
    "AnthropicMessagesRequest",
    "AnthropicMessagesResponse",
    "AnthropicServingMessages",
    "AsyncLLM",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "EngineDeadError",
    "ErrorResponse",
    "OpenAIServingChat",
    "OpenAIServingResponses",
    "ResponsesRequest",
    "ResponsesResponse",
    "add_vllm_middleware",
    "add_vllm_routes",
    "api_keys",
    "get_prometheus_registry",
    "get_uvicorn_log_config",
    "init_app_state",
    "join_server",
    "lifespan",
    "load_aware_call",
    "metrics_header",
    "paths_that_keep_bodies",
    "priority_header",
    "refresh_certificates",
    "setup_server",
    "stays_up_without_engine",
    "swagger_ui",
    "validate_json_request",
    "vllm_version",
    "with_cancellation",
    "with_sse_keep_alive",
]


# Routes by which a client changes the server for all others. They take no work for the model.
ADMIN_PATHS = frozenset(
    {
        "/abort_requests",
        "/collective_rpc",
        "/fault_tolerance/apply",
        "/finish_weight_update",
        "/init_weight_transfer_engine",
        "/pause",
        "/release_kv_cache_memory",
        "/reset_encoder_cache",
        "/reset_mm_cache",
        "/reset_prefix_cache",
        "/resume",
        "/scale_elastic_ep",
        "/shutdown_weight_transfer_engine",
        "/sleep",
        "/start_draft_weight_update",
        "/start_profile",
        "/start_weight_update",
        "/stop_profile",
        "/update_weight_version",
        "/update_weights",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/wake_up",
        "/weight_checker",
    }
)


def refresh_certificates(config: uvicorn.Config, args: Namespace) -> SSLCertRefresher:
    """Load the TLS files of `config`, and reload them when they change, until the returned
    refresher is stopped."""
    config.load()
    assert config.ssl is not None
    return SSLCertRefresher(
        ssl_context=config.ssl,
        key_path=args.ssl_keyfile,
        cert_path=args.ssl_certfile,
        ca_path=args.ssl_ca_certs,
    )


def paths_that_keep_bodies() -> frozenset[str]:
    """The paths of routes that store requests for later turns, so payloads must stay in them."""
    return frozenset({"/v1/responses"} if envs.VLLM_ENABLE_RESPONSES_API_STORE else ())


def swagger_ui() -> Path | None:
    """The folder with the files of Swagger UI that vLLM ships; None if it has none."""
    package = importlib.util.find_spec("vllm.entrypoints.serve.instrumentator")
    if package is None or package.origin is None:
        return None
    folder = Path(package.origin).parent / "static"
    return folder if (folder / "swagger-ui-bundle.js").is_file() else None


def stays_up_without_engine() -> bool:
    """Whether vLLM's setting makes the server outlive a dead engine."""
    return bool(envs.VLLM_KEEP_ALIVE_ON_ENGINE_DEATH)


async def add_vllm_routes(app: FastAPI, args: Namespace, engine: AsyncLLM) -> None:
    """Add vLLM's routes after those of `app`, and build their serving classes."""
    tasks = await engine.get_supported_tasks()
    register_api_routers(args, app, tasks, engine.model_config)
    attach_endpoint_plugins(app, tasks)
    init_exception_handler(app)
    messages_stream.install()
    text_stream.install(
        {
            OpenAIServingChat: text_stream.TextStream,
            AnthropicServingMessages: messages_stream.MessagesStream,
        }
    )
    _read_plainly(ChatCompletionRequest)
    with entered(RequestContext(Record())):  # the warm-up renders without a client
        await init_app_state(engine, app.state, args, tasks)


def join_server(args: Namespace) -> None:
    """What `setup_server` does besides making the socket, for a process that is given one."""
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    set_ulimit()


def _read_plainly(model: type[BaseModel]) -> None:
    """Let deprecated fields of `model` be read like others. vLLM itself reads them, from each
    request, and pydantic would prepare a warning each time, which is ignored."""
    for name, field in model.model_fields.items():
        if field.deprecated and name in vars(model):
            delattr(model, name)


def api_keys(args: Namespace) -> list[str]:
    """The keys of vLLM's flag `--api-key`, or else of its environment variable."""
    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


def priority_header(engine: AsyncLLM) -> bytes | None:
    """The header, in lower case, by which routes take the priority of a request; None if the engine
    serves requests in the order in which they come."""
    if engine.vllm_config.scheduler_config.policy != "priority":
        return None
    return PRIORITY_HEADER.lower().encode()


async def add_vllm_middleware(
    app: FastAPI, args: Namespace, engine: AsyncLLM, keys: Sequence[str]
) -> None:
    """Add vLLM's CORS, request ids and `--middleware`, and its check for one of `keys`, if there
    are any."""
    given = Namespace(**{**vars(args), "api_key": list(keys) or [""]})
    init_entrypoints_middleware(given, app, await engine.get_supported_tasks())
