"""What the process that starts replicas must know of their flags.

vLLM's parser takes seconds and hundreds of megabytes to import, so a child process asks it, and
only its findings stay.
"""

import multiprocessing
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from server.errors import CannotStart
from server.front_ends import FLAG as FRONT_ENDS
from server.replica import FLAG
from server.replicas.machine import gpu_groups
from server.settings import Settings

_STORE = "VLLM_ENABLE_RESPONSES_API_STORE"


@dataclass(frozen=True)
class Plan:
    """Attributes:
    gpus: those of each replica, or [] where the model runs on CPUs; `gpu_variable` names them.
    header_bytes: most bytes of the head of a request.
    """

    count: int
    host: str
    port: int
    root_path: str
    model: str
    gpu_variable: str
    drain_delay_s: float
    drain_timeout_s: int
    header_timeout_s: float
    header_bytes: int
    header_fields: int
    logs_json: bool
    gpus: list[list[str]] = field(default_factory=list)


def made(words: Sequence[str], count: int) -> Plan:
    """The plan for a command line of `serve`. Exits with status 2 if it is invalid.

    Raises:
        CannotStart: several replicas cannot be served like this.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(theirs, list(words), count), daemon=True)
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        process.join()
        sys.exit(process.exitcode or 1)
    process.join()
    if isinstance(found, str):
        raise CannotStart(found)
    assert isinstance(found, Plan)
    return found


def _tell(line: Connection, words: Sequence[str], count: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    from server.engine.arguments import parse

    args, settings = parse(words)
    try:
        line.send(_planned(args, settings, count))
    except CannotStart as error:
        line.send(str(error))


def _planned(args: Namespace, settings: Settings, count: int) -> Plan:
    from server.http.app import model_name
    from server.http.server import connection_limits

    if (why := _obstacle(args, settings, count)) is not None:
        raise CannotStart(f"{FLAG} {count}: {why}")
    variable, gpus = _gpus(args, count)
    limits = connection_limits(settings.connections)
    return Plan(
        count=count,
        host=args.host or "",
        port=args.port,
        root_path=(args.root_path or "").rstrip("/"),
        model=model_name(args),
        gpu_variable=variable,
        drain_delay_s=settings.http.drain_delay_s,
        drain_timeout_s=args.shutdown_timeout or settings.http.drain_timeout_s,
        header_timeout_s=limits.header_timeout_s,
        header_bytes=limits.header_bytes + limits.url_bytes,
        header_fields=limits.header_fields,
        logs_json=settings.observability.log_format == "json",
        gpus=gpus,
    )


def _obstacle(args: Namespace, settings: Settings, count: int) -> str | None:
    """Why several replicas cannot be served with these flags."""
    from vllm import envs

    if settings.replicas.replicas != count:
        return f"write the flag as {FLAG} {settings.replicas.replicas}"
    if args.api_server_count > 1:
        return f"{FRONT_ENDS} is not possible, since each replica has a front end of its own"
    if args.data_parallel_size > 1:
        return f"--data-parallel-size is not possible; {FLAG} takes its place"
    if args.nnodes > 1:
        return "--nnodes is not possible: all replicas are on this machine"
    if args.uds:
        return "--uds is not possible, only --host and --port"
    if args.ssl_keyfile or args.ssl_certfile:
        return "--ssl-keyfile is not possible: let a proxy before it do TLS"
    if envs.VLLM_ENABLE_RESPONSES_API_STORE:
        return f"{_STORE} is not possible: each replica would store its own responses"
    return None


def _gpus(args: Namespace, count: int) -> tuple[str, list[list[str]]]:
    """The variable that chooses GPUs, and those of each replica; none on CPUs."""
    from vllm.platforms import current_platform

    variable = current_platform.device_control_env_var
    if current_platform.is_cpu():
        return variable, []
    chosen = os.environ.get(variable)
    if chosen is None:
        gpus = [str(number) for number in range(current_platform.device_count())]
    else:
        gpus = [name.strip() for name in chosen.split(",") if name.strip()]
    each = args.tensor_parallel_size * args.pipeline_parallel_size
    return variable, gpu_groups(gpus, count, each)
