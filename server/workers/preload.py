"""What the forkserver loads once, for all workers that are forked from it."""

from server.imaging.decode import warm_up
from server.workers import confinement
from server.workers.confinement import SandboxMode
from server.workers.process import die_with_parent, import_uncollected, keep_imported
from server.workers.worker import Extractor, WorkerSpec

_loaded: tuple[WorkerSpec, Extractor] | None = None


def load(spec: WorkerSpec) -> None:
    """Load the libraries and the extractor of `spec`."""
    global _loaded
    die_with_parent()
    import_uncollected()
    warm_up()
    _loaded = spec, spec.load()
    confinement.prepare()
    keep_imported()


def loaded() -> tuple[WorkerSpec, Extractor]:
    """What `load` has loaded."""
    assert _loaded is not None
    return _loaded


def sandbox_mode() -> SandboxMode:
    """How the processes that are forked from this one confine themselves."""
    return "auto" if _loaded is None else _loaded[0].sandbox
