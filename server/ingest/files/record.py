"""What is known of a stored file beside its bytes."""

import secrets
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from server.errors import UnknownFile

Purpose = Literal["vision", "user_data"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

_MAX_FILENAME_CHARS = 255
_NS_PER_S = 1_000_000_000


class StoredFile(msgspec.Struct, frozen=True):
    """`size` is in bytes, `digest` that of the content, and `expires_at` in seconds since 1970, as
    is `created_at`; None is never. `filename` is the client's and names nothing on the disk."""

    id: Annotated[str, Meta(pattern=r"\Afile-[0-9a-f]{32}\Z")]
    digest: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    size: Annotated[int, Meta(ge=1)]
    filename: str
    purpose: Purpose
    created_ns: Annotated[int, Meta(ge=0)]
    expires_at: int | None

    @property
    def created_at(self) -> int:
        return self.created_ns // _NS_PER_S

    def is_expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


def new_file(
    digest: str, size: int, filename: str, purpose: Purpose, now: float, lifetime_s: int | None
) -> StoredFile:
    """A record with an id that nobody can guess. `now` is in seconds since 1970."""
    return StoredFile(
        id=f"file-{secrets.token_hex(16)}",
        digest=digest,
        size=size,
        filename=_base_name(filename),
        purpose=purpose,
        created_ns=int(now * _NS_PER_S),
        expires_at=None if lifetime_s is None else int(now) + lifetime_s,
    )


def unknown_file() -> UnknownFile:
    """The one answer for what never was, what is gone, and what is another group's."""
    return UnknownFile("there is no such file; it may have been deleted or have expired")


def _base_name(filename: str) -> str:
    """The last component of `filename`, without what terminals and headers would obey."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(filter(str.isprintable, name))[:_MAX_FILENAME_CHARS] or "file"
