"""`saccade serve --replicas N`."""

import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from server.errors import CannotStart
from server.replica import USAGE_BYTES, Replica
from server.replicas import haproxy, plan
from server.replicas.child import Child
from server.replicas.fleet import Fleet
from server.replicas.machine import core_groups
from server.replicas.plan import Plan
from server.replicas.together import PROBES
from server.scratch import Scratch
from server.telemetry.log import use_json

_BACKLOG = 2048
# Names of sockets have at most 107 bytes, those in the folder up to 11.
_MOST_PATH_BYTES = 90
_UNLOGGED = "--disable-access-log-for-endpoints"
_ANYWHERE = "0.0.0.0"  # noqa: S104 - as of vLLM's servers

Report = Callable[[str], None]


def run(words: Sequence[str], count: int, report: Report, log_json: Callable[[], None]) -> int:
    """Serve until a signal; returns the exit status. Exits with status 2 if flags are invalid.

    Raises:
        CannotStart: haproxy is missing, or a replica does not start.
    """
    program = haproxy.program()
    found = plan.made(words, count)
    if found.logs_json:
        use_json()
        log_json()
    environment = {"TMPDIR": tempfile.gettempdir()}
    scratch = Scratch()
    folder = scratch.path / "replicas"
    if len(os.fsencode(folder)) > _MOST_PATH_BYTES:
        raise CannotStart(f"the name of {folder} is too long for sockets; set TMPDIR")
    folder.mkdir(mode=0o700)
    with _listening(found) as listening:
        return asyncio.run(_serve(found, words, program, folder, listening, environment, report))


async def _serve(
    found: Plan,
    words: Sequence[str],
    program: str,
    folder: Path,
    listening: socket.socket,
    environment: Mapping[str, str],
    report: Report,
) -> int:
    usage = os.memfd_create("saccade-usage")  # open as long as this process lives, for the replicas
    os.ftruncate(usage, USAGE_BYTES)
    cores = core_groups(sorted(os.sched_getaffinity(0)), found.count) if not found.gpus else None
    replicas = [
        Replica(index, found.count, folder, Path(f"/proc/{os.getpid()}/fd/{usage}"), bool(cores))
        for index in range(found.count)
    ]
    configuration = folder / "haproxy.cfg"
    configuration.write_text(haproxy.configuration(found, folder, listening.fileno()))

    def start_replica(replica: Replica) -> Child:
        env = {**os.environ, **environment, **replica.variable(), **_devices(found, replica)}
        env["FORWARDED_ALLOW_IPS"] = "*"  # haproxy decides whom to believe
        for name in ("NOTIFY_SOCKET", "SACCADE_REPLICAS"):
            env.pop(name, None)
        own = ["--replicas", "1", "--uds", str(replica.socket()), "--drain-delay-s", "0"]
        if not any(word.replace("_", "-").startswith(_UNLOGGED) for word in words):
            own += [_UNLOGGED, ",".join(PROBES)]  # haproxy asks each second
        command = [sys.executable, "-m", "server", "serve", *words, *own]
        return Child(command, env=env, cores=cores[replica.index] if cores else ())

    def start_proxy() -> Child:
        command = [program, "-db", "-q", "-f", str(configuration)]
        return Child(command, files=[listening.fileno()])

    report(f"starting {found.count} replicas")
    fleet = Fleet(found, replicas, start_replica, start_proxy, report)
    host, port = listening.getsockname()[:2]
    shown_host = "127.0.0.1" if host in (_ANYWHERE, "::") else host
    address = f"[{shown_host}]" if ":" in shown_host else shown_host
    return await fleet.run(listening, f"ready: {found.model} on http://{address}:{port}")


def _listening(found: Plan) -> socket.socket:
    """The socket for clients, which outlives haproxy."""
    family = socket.AF_INET6 if ":" in found.host else socket.AF_INET
    return socket.create_server(
        (found.host or _ANYWHERE, found.port), family=family, backlog=_BACKLOG
    )


def _devices(found: Plan, replica: Replica) -> dict[str, str]:
    """The variables of a replica: its GPUs; or on CPUs, how its threads share the cores."""
    if found.gpus:
        return {found.gpu_variable: ",".join(found.gpus[replica.index])}
    if replica.has_cores:
        return {}
    # All replicas would bind their threads to the same cores.
    threads = max(1, len(os.sched_getaffinity(0)) // found.count)
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return {name: os.environ.get(name, value) for name, value in defaults.items()}
