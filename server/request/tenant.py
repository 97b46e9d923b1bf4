"""The group of API keys on whose behalf a task works. Work is shared inside a group only.

The check of keys (`http/keys.py`) enters the group; whatever is cached under a name or a hash takes
it into its key. What is made of a group follows from its name alone, so that restarts and replicas
share work.
"""

import json
from contextvars import ContextVar

from blake3 import blake3

# Groups that no file of keys can name: admins, and requests to open paths without a key.
ADMIN = "_admin"
ANONYMOUS = "_anonymous"

_TAG_BYTES = 16

_group: ContextVar[str] = ContextVar("saccade_group", default="")


def enter(group: str) -> None:
    """Make `group` the one that the current task works for."""
    _group.set(group)


def group() -> str:
    """The group that the current task works for; "" where keys are in no groups."""
    return _group.get()


def own(name: str) -> str:
    """`name`, of an image or another item, as the current group has it; itself without groups.

    What begins with the group's tag is taken for a name of the group already. No other group can
    come to a name with this tag, whatever names it makes up.
    """
    if not (current := group()):
        return name
    tag = f"{blake3(current.encode()).hexdigest(length=_TAG_BYTES)}-"
    return name if name.startswith(tag) else tag + name


def salt(given: str | None) -> str | None:
    """The salt of cached prompts for the current group and the salt that a client has `given`."""
    if not (current := group()):
        return given
    return blake3(json.dumps([current, given]).encode()).hexdigest()
