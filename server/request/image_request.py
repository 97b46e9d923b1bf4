"""What the body of one request says about its images."""

from dataclasses import dataclass, field

from server.imaging.encoded import EncodedImage
from server.request.context import RequestContext


@dataclass(eq=False)
class ImageRequest(RequestContext):
    """`body` is the request without its long `payloads`, which stand in it as tokens.

    `parts` are (path, name) of each image or file part: where the client wrote it, and the URL or
    uuid by which the loader will be asked for it. `prepared` are images that were made while the
    body was read: pages of a file, frames of an animation.
    """

    body: bytes = b""
    payloads: dict[str, memoryview] = field(default_factory=dict)
    parts: list[tuple[str, str]] = field(default_factory=list)
    prepared: dict[str, EncodedImage] = field(default_factory=dict)

    def path_of(self, name: str) -> str | None:
        """Where the client wrote the part that is called `name`, or of which `name` is made:
        "messages[0].content[1].image_url"."""
        for path, own_name in self.parts:
            if own_name and name.endswith(own_name):
                return path
        return None
