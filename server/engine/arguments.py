"""The command line of `saccade serve`: vLLM's flags and Saccade's."""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.engine.vllm_adapter import cpu_waits, plugin

plugin.make_torchvision_importable()  # vLLM imports torchvision while its parser is made

from vllm.config.logging import LoggingConfig  # noqa: E402
from vllm.entrypoints.launchers.cli_args import (  # noqa: E402
    make_arg_parser,
    validate_parsed_serve_args,
)
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup  # noqa: E402
from vllm.logger import configure_logging_from_args  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

from server import front_ends  # noqa: E402
from server import settings as config  # noqa: E402
from server.settings import DeploySettings, Settings  # noqa: E402
from server.telemetry import log  # noqa: E402

DEMO_MODEL = Path(__file__).parents[1] / "demo"
DEMO_NAME = "saccade-tiny"

# Defaults on a CPU, for flags that the user has not set: {flag: (attribute, value)}.
_CPU_DEFAULTS: dict[str, tuple[str, object]] = {
    "--enforce-eager": ("enforce_eager", True),
    "--dtype": ("dtype", "float32"),
    "--max-num-seqs": ("max_num_seqs", 32),
    "--mm-processor-cache-gb": ("mm_processor_cache_gb", 1.0),
}
_CPU_KV_CACHE_GIB = "1"
_CPU_MAX_MODEL_LEN = 8192
# The most answers to one request (`n`), as in OpenAI's API.
_MAX_CHOICES = "128"
_FILES = {"run-batch": "-i FILE -o FILE "}
# Flags for several of vLLM's API processes, or for none.
_UNSUPPORTED = {
    "headless": "--headless",
    "grpc": "--grpc",
    "data_parallel_multi_port_external_lb": "--data-parallel-multi-port-external-lb",
}


_DESCRIPTIONS = {
    "serve": "Serve MODEL (default: the embedded demo model) over the OpenAI API.",
    "deploy": "Serve MODEL (default: the embedded demo model) on Ray Serve.",
    "run-batch": "Answer the requests in a file with MODEL (default: the embedded demo model).",
    "plan": "Tell what MODEL costs on a GPU, from its configuration alone.",
}
# The command whose flags MODEL takes.
_FLAGS_OF = {"serve": "serve", "deploy": "serve", "run-batch": "run-batch", "plan": "serve"}


def parse(
    argv: Sequence[str], command: str = "serve", add_flags: Callable[[Any], None] | None = None
) -> tuple[Namespace, Settings]:
    """Parse the command line of a command into vLLM's arguments and Saccade's settings. Exits with
    status 2 if they are invalid. `add_flags` adds the command's own to a parser."""
    parser = FlexibleArgumentParser(  # type: ignore[no-untyped-call]
        prog=f"saccade {command}",
        usage=f"saccade {command} {_FILES.get(command, '')}[MODEL] [flags]",
        description=f"{_DESCRIPTIONS[command]} Takes every flag of `vllm {_FLAGS_OF[command]}`; "
        "list them with --help=all, or a section with --help=ModelConfig.",
    )
    make_arg_parser(parser)
    if command == "run-batch":
        _add_batch_flags(parser)
    if add_flags:
        add_flags(parser)
    parser.set_defaults(model=None)
    config.add_flags(parser)
    args = parser.parse_args(list(argv))
    try:
        settings = config.from_flags(args)
    except ValueError as error:
        parser.error(str(error))
    if args.otlp_traces_endpoint and args.disable_log_stats:
        parser.error(
            "--otlp-traces-endpoint needs the statistics that --disable-log-stats switches off"
        )
    for attribute, flag in _UNSUPPORTED.items():
        if getattr(args, attribute, None):
            parser.error(f"{flag} is not supported: Saccade serves HTTP, from one machine")
    args.api_server_count = _front_ends(parser, args, command)
    if command != "deploy" and settings.deploy != DeploySettings():
        parser.error(f"`saccade {command}` has no fronts and engines, but `saccade deploy`")
    if command != "serve" and settings.replicas.replicas > 1:
        parser.error(f"--replicas: `saccade {command}` has none, but `saccade serve`")
    if settings.observability.log_format == "json":
        given = getattr(args, "logging_config", None) or LoggingConfig()
        args.logging_config = replace(given, formatter="json")
        args.use_tqdm_on_load = False
        if getattr(args, "log_config_file", None) or given.pylogging_config_file:
            parser.error("--log-format json: logging is configured by a file already")
        log.use_json()
        plugin.ask(json_logs=True)
    cli_env_setup()  # type: ignore[no-untyped-call]
    configure_logging_from_args(args)
    # Each takes the event loop some time; vLLM allows 16384.
    os.environ.setdefault("VLLM_MAX_N_SEQUENCES", _MAX_CHOICES)
    _choose_model(args)
    if current_platform.is_cpu() and command != "plan":
        _fit_to_cpu(args, _flags_in(argv))
    try:
        validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return args, settings


def _front_ends(parser: Any, args: Namespace, command: str) -> int:
    """How many front ends there are: one by default."""
    count: int = 1 if args.api_server_count is None else args.api_server_count
    if not 1 <= count <= front_ends.MOST:
        parser.error(f"{front_ends.FLAG} must be 1 to {front_ends.MOST}")
    if count > 1 and command != "serve":
        parser.error(f"{front_ends.FLAG}: `saccade {command}` has one process")
    return count


def _add_batch_flags(parser: Any) -> None:
    """Add the flags that `vllm run-batch` has besides those of the engine."""
    flags = parser.add_argument_group("Batch", "The requests and their results.")
    flags.add_argument(
        "-i",
        "--input-file",
        required=True,
        help="JSON lines with the requests: a path, or an http(s) URL to GET.",
    )
    flags.add_argument(
        "-o",
        "--output-file",
        required=True,
        help="Where to write the results: a path, or an http(s) URL to PUT.",
    )
    flags.add_argument(
        "--output-tmp-dir",
        help="Folder for the results until they are sent to a URL (default: a temporary one).",
    )
    flags.add_argument(
        "--enable-metrics",
        action="store_true",
        help="Serve Prometheus metrics on --host and --port.",
    )
    flags.add_argument("--url", help="Deprecated: the same as --host.")


def _choose_model(args: Namespace) -> None:
    args.model = args.model_tag or args.model
    if args.model is None:
        args.model = str(DEMO_MODEL)
        args.served_model_name = args.served_model_name or [DEMO_NAME]
        # If whitespace is allowed in JSON, so small a model may write it without end.
        args.structured_outputs_config.backend = "xgrammar"
        args.structured_outputs_config.disable_any_whitespace = True
    args.enable_prompt_tokens_details = True  # usage details, to which image tokens are added


def _fit_to_cpu(args: Namespace, given: set[str]) -> None:
    """Set small defaults without compilation for flags that the user has not set."""
    cpu_waits.ask()
    for flag, (attribute, value) in _CPU_DEFAULTS.items():
        if flag not in given:
            setattr(args, attribute, value)
    if "--kv-cache-memory-bytes" not in given:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_KV_CACHE_GIB)
    if "--max-model-len" not in given:
        args.max_model_len = _short_enough(args)


def _short_enough(args: Namespace) -> int:
    """The model's maximum length, limited to what fits the small KV cache."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    model = AsyncEngineArgs.from_cli_args(args).create_model_config()
    return min(int(model.max_model_len), _CPU_MAX_MODEL_LEN)


def _flags_in(argv: Sequence[str]) -> set[str]:
    """The long flags of a command line, spelled with dashes; `--no-x` counts as `--x`."""
    flags = {word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")}
    if "--config" in flags:  # a file may set any flag, so no default applies
        flags |= set(_CPU_DEFAULTS) | {"--max-model-len"}
    return flags | {flag.replace("--no-", "--", 1) for flag in flags}
