"""A vLLM plugin that switches admission off: no request needs a permit, waits or is refused.

With it, a benchmark shows what admission costs. With this folder on PYTHONPATH, vLLM finds the
plugin as it finds the stub encoder.
"""

from typing import Any


def register() -> None:
    """Patch the body reader; called by vLLM, possibly more than once in a process."""
    from server.http.body import BodyReader

    reader: Any = BodyReader
    if hasattr(reader, "without_admission"):
        return
    init = reader.__init__

    def without_admission(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "admitted": ()})

    reader.without_admission = True
    reader.__init__ = without_admission
