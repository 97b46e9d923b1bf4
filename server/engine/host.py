"""The process that starts the engines of several front ends, and watches them."""

import os
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from vllm.v1.engine.utils import CoreEngineProcManager, EngineZmqAddresses, launch_core_engines
from vllm.v1.executor import Executor
from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

from server import front_ends
from server.engine import launch, vllm_http
from server.engine.vllm_adapter import cpu_waits, plugin, shared_segments
from server.errors import CannotStart
from server.front_ends import Link
from server.settings import Settings

_ENGINE_DIED = 1


def run(
    args: Namespace, settings: Settings, folder: Path, link: Link, report: Callable[[str], None]
) -> int:
    """Start the engines for `--api-server-count` front ends, whose sockets are in `folder`, and
    tell the supervisor over `link`; run until it says that they shall end. Returns the exit status,
    1 if an engine has died.

    Raises CannotStart.
    """
    count = args.api_server_count
    address, listening = vllm_http.setup_server(args, reuse_port=False)
    plugin.ask(
        die_with_parent=True,
        return_memory=True,
        quick_start=True,
        clients=count,
        encoder_runs=tuple(front_ends.encoder_address(folder, each) for each in range(count)),
    )
    report(f"reading the model {(args.served_model_name or [args.model])[0]}")
    prepared = launch.configured(args, settings, count)
    config = prepared.config
    launch.configure_embedding_cache(
        prepared, settings, [front_ends.control_address(folder, each) for each in range(count)]
    )
    report(f"starting the engine on {config.device_config.device_type}")
    log_stats = not prepared.engine_args.disable_log_stats
    addresses = EngineZmqAddresses(*front_ends.addresses(folder, count))
    alive, dead = os.pipe()  # made after the fork for the engine core, which has no copy of it
    try:
        with launch_core_engines(
            config,
            Executor.get_class(config),
            log_stats or bool(load_stat_logger_plugin_factories()),
            addresses,
        ) as started:
            coordinator, manager = started.coordinator, started.engine_manager
            message = {
                "address": address,
                "count": count,
                "stats": coordinator.get_stats_publish_address() if coordinator else None,
                "image_work": cpu_waits.path(),
                "stall_s": settings.http.engine_stall_timeout_s,
            }
            link.send(message, [listening.fileno(), alive])
            listening.close()
            os.close(alive)
    except RuntimeError:
        if (reason := shared_segments.reason()) is None:
            raise
        raise CannotStart(reason) from None
    assert isinstance(manager, CoreEngineProcManager)  # `configured` refuses Ray
    watching = threading.Thread(target=_watch, args=(manager, dead), daemon=True)
    watching.start()
    link.receive()  # that they shall end
    has_died = manager.failed_proc_name is not None
    timeout = config.shutdown_timeout
    manager.shutdown(timeout=timeout)
    if coordinator is not None:
        coordinator.shutdown(timeout=timeout)
    return _ENGINE_DIED if has_died else 0


def _watch(manager: CoreEngineProcManager, dead: int) -> None:
    """Tell the front ends when an engine has ended."""
    manager.monitor_engine_liveness()
    os.close(dead)
