"""The application on Ray Serve: two deployments, and the options of each."""

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from vllm.platforms import current_platform

from server.engine.arguments import parse
from server.errors import CannotStart
from server.scale import scaling
from server.scale.engine import Engine
from server.scale.front import Front
from server.scale.replicas import Replicas, engine_resources, settings_of_front
from server.settings import DeploySettings, Settings

NAME = "saccade"
# Admission refuses what is too much; Ray Serve would only let it wait.
_MOST_AT_A_FRONT = 100_000
# Requests above an engine's places, so that its next batch is full in time.
_SPARE_SHARE = 8
# An update starts a new front before it ends an old one.
FRONT_SURGE = 1
_FRONTS = f"{scaling.__name__}:{scaling.fronts.__name__}"
# Replicas are scaled by means over so many seconds.
_LOOK_BACK_S = 10.0
_HEALTH_PERIOD_S = 5.0
_HEALTH_TIMEOUT_S = 30.0
# Variables that replicas on other nodes must have, too.
_PREFIXES = ("SACCADE_", "VLLM_", "HF_", "TRANSFORMERS_", "OTEL_")


def application(argv: Sequence[str]) -> Any:
    """The application for `serve.run`, by the flags of `saccade deploy`. Exits with status 2 if
    they are invalid.

    Raises:
        CannotStart: a flag is not possible on Ray Serve.
    """
    args, settings = parse(argv, "deploy")
    return deployments(argv, args, settings)


def deployments(argv: Sequence[str], args: Namespace, settings: Settings) -> Any:
    """The same, of parsed flags."""
    environment = _environment()
    _check(args)
    settings_of_front(settings)  # raises
    wanted = Replicas.of(settings.deploy)
    words = list(argv)
    places = args.max_num_seqs or 256
    in_engine = places + max(1, places // _SPARE_SHARE)
    runtime = {"env_vars": environment}
    resources = engine_resources(args, settings, is_cpu=current_platform.is_cpu())
    resources["ray_actor_options"]["runtime_env"] = runtime
    deployment: Any = serve.deployment
    router: Any = "server.scale.router.ImageAffinityRouter"
    engines = deployment(
        Engine,
        name="Engine",
        max_ongoing_requests=in_engine,
        request_router_config=RequestRouterConfig(request_router_class=router),
        max_surge_percent=_surge(settings.deploy.engine_surge, wanted.engines),
        **resources,
        **_common(settings),
        **_count(wanted.engines, wanted.most_engines, places, settings.deploy),
    ).bind(words)
    share = -(-places * wanted.most_engines // wanted.most_fronts)
    ingress: Any = serve.ingress()(Front)
    return deployment(
        ingress,
        name="Front",
        max_ongoing_requests=_MOST_AT_A_FRONT,
        ray_actor_options={"num_cpus": settings.deploy.front_cpus, "runtime_env": runtime},
        max_surge_percent=_surge(FRONT_SURGE, wanted.fronts),
        **_common(settings),
        **_count(wanted.fronts, wanted.most_fronts, share, settings.deploy, policy=_FRONTS),
    ).bind(words, engines)


def _check(args: Namespace) -> None:
    """Raises CannotStart for flags of a server that listens itself."""
    for name in ("uds", "ssl_keyfile", "ssl_certfile"):
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            raise CannotStart(f"{flag} is not possible on Ray Serve, whose proxy listens")


def _common(settings: Settings) -> dict[str, Any]:
    return {
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": float(settings.http.drain_timeout_s),
        "graceful_shutdown_wait_loop_s": 0.5,
    }


def _count(
    fewest: int, most: int, target: int, deploy: DeploySettings, policy: str | None = None
) -> dict[str, Any]:
    """`target`: the requests in progress at which a replica is busy; `policy`: by what else it is
    scaled."""
    if most == fewest:
        return {"num_replicas": fewest}
    options: dict[str, Any] = {
        "min_replicas": fewest,
        "max_replicas": most,
        "target_ongoing_requests": target,
        "upscale_delay_s": deploy.scale_up_delay_s,
        "downscale_delay_s": deploy.scale_down_delay_s,
        "look_back_period_s": _LOOK_BACK_S,
    }
    if policy is not None:
        make: Any = AutoscalingPolicy
        options["policy"] = make(policy_function=policy)
    return {"autoscaling_config": AutoscalingConfig(**options)}


def _surge(replicas: int, of: int) -> int:
    """The percentage of `of` that Ray Serve, which rounds up, takes for `replicas`."""
    return min(100, max(1, 100 * replicas // of)) if replicas else 0


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
