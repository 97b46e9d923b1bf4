"""Client for Saccade and other OpenAI-compatible vision-language servers.

from saccade_client import Client

with Client("http://127.0.0.1:8000/v1") as client:
    print(client.ask("What is in the picture?", "photo.jpg").text)
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade_client.answers import (
        Answer,
        Chunk,
        Grounded,
        ImageCost,
        ModelCard,
        ShownImage,
        Usage,
    )
    from saccade_client.boxes import Box, Point, draw
    from saccade_client.client import AsyncClient, Client
    from saccade_client.core import Conversation
    from saccade_client.errors import ApiError, SaccadeError
    from saccade_client.media import Document, Picture, Video, pdf, picture, video

try:
    __version__ = version("saccade-client")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

DEFAULT_URL = "http://127.0.0.1:8000/v1"

# Imported when they are first used: the command line starts without most of them.
_MODULES = {
    "answers": ("Answer", "Chunk", "Grounded", "ImageCost", "ModelCard", "ShownImage", "Usage"),
    "boxes": ("Box", "Point", "draw"),
    "client": ("AsyncClient", "Client"),
    "core": ("Conversation",),
    "errors": ("ApiError", "SaccadeError"),
    "media": ("Document", "Picture", "Video", "pdf", "picture", "video"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DEFAULT_URL",
    "Answer",
    "ApiError",
    "AsyncClient",
    "Box",
    "Chunk",
    "Client",
    "Conversation",
    "Document",
    "Grounded",
    "ImageCost",
    "ModelCard",
    "Picture",
    "Point",
    "SaccadeError",
    "ShownImage",
    "Usage",
    "Video",
    "draw",
    "pdf",
    "picture",
    "video",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
