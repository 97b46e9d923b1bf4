"""How many replicas of each tier there are, and what each of them gets."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from server.errors import CannotStart
from server.settings import DeploySettings, Settings


@dataclass(frozen=True)
class Replicas:
    """The fewest and the most replicas of each tier."""

    fronts: int
    most_fronts: int
    engines: int
    most_engines: int

    @classmethod
    def of(cls, given: DeploySettings) -> "Replicas":
        """Raises CannotStart if there may be fewer at most than at least."""
        replicas = cls(
            given.front_replicas,
            given.front_max_replicas or given.front_replicas,
            given.engine_replicas,
            given.engine_max_replicas or given.engine_replicas,
        )
        if replicas.most_fronts < replicas.fronts or replicas.most_engines < replicas.engines:
            raise CannotStart("the most replicas of a tier are fewer than the fewest")
        return replicas


def settings_of_front(settings: Settings) -> Settings:
    """`settings` with the defaults that a front has: image workers for its CPUs, and no uploaded
    files if there may be several fronts, none of which would know those of the others.

    Raises:
        CannotStart: files are asked for, and there may be several fronts.
    """
    changed: dict[str, Any] = {}
    if "image_workers" not in settings.images.model_fields_set:
        workers = {"image_workers": settings.deploy.front_cpus}
        changed["images"] = settings.images.model_copy(update=workers)
    if Replicas.of(settings.deploy).most_fronts > 1:
        if "files" in settings.files.model_fields_set and settings.files.files:
            raise CannotStart("--files: each front would have files of its own; use one front")
        changed["files"] = settings.files.model_copy(update={"files": False})
    return settings.model_copy(update=changed)


def engine_resources(args: Namespace, settings: Settings, *, is_cpu: bool) -> dict[str, Any]:
    """The resources of an engine, as options of its deployment: one GPU for each of vLLM's
    workers. They are in one process tree on one node, unless vLLM starts them by Ray."""
    cpus = settings.deploy.engine_cpus
    gpus = 0 if is_cpu else args.tensor_parallel_size * args.pipeline_parallel_size
    if not is_cpu and args.distributed_executor_backend == "ray":
        bundles = [{"CPU": cpus}, *({"GPU": 1} for _ in range(gpus))]
        return {
            "ray_actor_options": {"num_cpus": cpus},
            "placement_group_bundles": bundles,
            "placement_group_strategy": "PACK",
        }
    return {"ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus}}
