"""`saccade deploy`: runs both tiers on Ray Serve until a signal, on a cluster that exists
(`RAY_ADDRESS`) or on one that it starts on this machine."""

import contextlib
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from server.concurrency import usable_cores, usable_memory
from server.engine.arguments import parse
from server.engine.vllm_adapter import plugin
from server.errors import CannotStart
from server.http.app import model_name
from server.scale.deployment import FRONT_SURGE, NAME, deployments
from server.scale.replicas import Replicas
from server.settings import GIB, Settings

_ADDRESS = "RAY_ADDRESS"
_STORE_SHARE_OF_MEMORY = 1 / 8
_MOST_STORE_BYTES = 8 * GIB
_DEFAULT_HOST = "0.0.0.0"  # noqa: S104 - as of vLLM's servers
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Report = Callable[[str], None]


def run(argv: Sequence[str], report: Report) -> int:
    """Serve until a signal; returns the exit status. Exits with status 2 if flags are invalid.

    Raises:
        CannotStart: Ray or the application does not start.
    """
    args, settings = parse(argv, "deploy")
    application = deployments(argv, args, settings)
    plugin.forget()  # what this process asked for would reach the replicas
    with _cluster(settings, report), _until_signal() as stopping:
        options = HTTPOptions(host=args.host or _DEFAULT_HOST, port=args.port)
        serve.start(http_options=options)
        report("starting fronts and engines")
        try:
            serve.run(application, name=NAME, route_prefix="/")
            report(_invitation(args))
            stopping.wait()
            report("stopping: running requests may finish")
            serve.delete(NAME)  # `shutdown` would end the proxies at once
        except RuntimeError as error:
            raise CannotStart(str(error)) from None
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
    return 0


@contextlib.contextmanager
def _cluster(settings: Settings, report: Report) -> Iterator[None]:
    """Connect to the cluster, or start one with what the replicas reserve."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get(_ADDRESS):
        report(f"connecting to Ray at {os.environ[_ADDRESS]}")
        ray.init(log_to_driver=False)
    else:
        report("starting Ray on this machine")
        os.environ.setdefault("RAY_worker_niceness", "0")  # its replicas are the server
        store = min(_MOST_STORE_BYTES, int(usable_memory() * _STORE_SHARE_OF_MEMORY))
        cpus = max(usable_cores(), _reserved_cpus(settings))
        ray.init(num_cpus=cpus, object_store_memory=store, include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


def _reserved_cpus(settings: Settings) -> int:
    """Of all replicas, and of those that an update starts in addition."""
    wanted, given = Replicas.of(settings.deploy), settings.deploy
    fronts, engines = wanted.most_fronts + FRONT_SURGE, wanted.most_engines + given.engine_surge
    return fronts * given.front_cpus + engines * given.engine_cpus


@contextlib.contextmanager
def _until_signal() -> Iterator[threading.Event]:
    """An event that a signal sets; a second signal interrupts."""
    stopping = threading.Event()

    def stop(*_: object) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    before = [(number, signal.signal(number, stop)) for number in _SIGNALS]
    try:
        yield stopping
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _invitation(args: Namespace) -> str:
    host = args.host or _DEFAULT_HOST
    host = "127.0.0.1" if host == _DEFAULT_HOST else host
    return f"ready: {model_name(args)} on http://{host}:{args.port}"
