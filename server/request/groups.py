"""Groups of API keys. Work is shared inside a group only.

Whatever is cached under a name or a hash takes the group into its key. What is made of a group
follows from its name alone, so that restarts and replicas share work.
"""

import json

from blake3 import blake3

# Groups that no file of keys can name: admins, and requests to open paths without a key.
ADMIN = "_admin"
ANONYMOUS = "_anonymous"

_TAG_BYTES = 16


def prefixed(name: str, group: str) -> str:
    """`name`, of an image or another item, as `group` has it; itself without groups.

    A name that begins with the group's tag is taken to be prefixed already. No other group can
    arrive at a name with this tag, whatever names it makes up.
    """
    if not group:
        return name
    tag = f"{blake3(group.encode()).hexdigest(length=_TAG_BYTES)}-"
    return name if name.startswith(tag) else tag + name


def salted(given: str | None, group: str) -> str | None:
    """The salt of cached prompts for `group` and the salt that a client has `given`."""
    if not group:
        return given
    return blake3(json.dumps([group, given]).encode()).hexdigest()
