"""The parts of the machine that replicas get: GPUs or cores."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from server.errors import CannotStart

_CPUS = Path("/sys/devices/system/cpu")


def gpu_groups(gpus: Sequence[str], count: int, each: int) -> list[list[str]]:
    """`each` GPUs for each of `count` replicas, neighbours together.

    Raises:
        CannotStart: there are fewer GPUs.
    """
    if len(gpus) < count * each:
        raise CannotStart(
            f"--replicas {count} with {each} GPUs each needs {count * each}, and there are "
            f"{len(gpus)}"
        )
    return [list(gpus[at * each : (at + 1) * each]) for at in range(count)]


def core_groups(cores: Sequence[int], count: int, root: Path = _CPUS) -> list[list[int]] | None:
    """The logical cores in `count` groups of about the same size. Those of a physical core are in
    one group, as far as possible, and so are those of a socket. None if a replica would have fewer
    than two."""
    if len(cores) < 2 * count:
        return None
    ordered = sorted(cores, key=lambda core: (*_place(core, root), core))
    bounds = [len(ordered) * at // count for at in range(count + 1)]
    return [ordered[begin:end] for begin, end in itertools.pairwise(bounds)]


def _place(core: int, root: Path) -> tuple[int, int]:
    """Its socket and physical core."""
    folder = root / f"cpu{core}" / "topology"
    try:
        package = int((folder / "physical_package_id").read_text())
        return package, int((folder / "core_id").read_text())
    except (OSError, ValueError):
        return 0, core
