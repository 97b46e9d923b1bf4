"""Several servers as one: which of them gets a request (`routing`), and the two tiers on Ray Serve:

Ray Serve's proxy -> front: HTTP, admission, images (CPUs)
                  -> router -> engine (GPUs)
"""

import shlex
from typing import Any


def app(args: dict[str, str]) -> Any:
    """The application for `serve run server.scale:app flags="..."`, with the flags of
    `saccade deploy`."""
    from server.scale.deployment import application

    return application(shlex.split(args.get("flags", "")))
