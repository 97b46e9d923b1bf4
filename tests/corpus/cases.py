"""Cases of the corpus, and the responses expected from the server."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

# The server's default limits; there are cases on both sides of each.
MAX_BYTES = 50 << 20
MAX_PIXELS = 100_000_000
MAX_SIDE = 32_768
MAX_ASPECT_RATIO = 200

Color = tuple[int, int, int]
Size = tuple[int, int]
# Top left, top right, bottom left, bottom right.
Corners = tuple[Color, Color, Color, Color]


@dataclass(frozen=True)
class Refusal:
    """An error response."""

    status: int
    code: str


@dataclass(frozen=True)
class Expectation:
    """The acceptable responses: an answer, or one of `refusals`.

    `corners` are the colours in the middle of the upright picture's quadrants, `size` its (width,
    height) in pixels; `tolerance` is per channel, of 255. `answer` is the embedded model's
    expected answer.
    """

    answered: bool = False
    refusals: tuple[Refusal, ...] = ()
    corners: Corners | None = None
    size: Size | None = None
    tolerance: int = 0
    answer: str | None = None

    def allows(self, status: int, code: str | None) -> bool:
        """Whether a response with this status and error code is acceptable."""
        if status == 200:
            return self.answered
        return any((status, code) == (one.status, one.code) for one in self.refusals)


_INVALID = Refusal(400, "invalid_image")
_UNSUPPORTED = Refusal(400, "unsupported_image_format")
_TOO_LARGE = Refusal(413, "image_too_large")
_TOO_THIN = Refusal(400, "image_aspect_ratio")

ACCEPTED = Expectation(answered=True)
INVALID = Expectation(refusals=(_INVALID,))
UNSUPPORTED = Expectation(refusals=(_UNSUPPORTED,))
TOO_LARGE = Expectation(refusals=(_TOO_LARGE,))
TOO_THIN = Expectation(refusals=(_TOO_THIN,))
# Broken in two ways: the server may report either.
INVALID_OR_TOO_LARGE = Expectation(refusals=(_INVALID, _TOO_LARGE))
# The file has the magic of an image, but of a kind that need not be supported.
INVALID_OR_UNSUPPORTED = Expectation(refusals=(_INVALID, _UNSUPPORTED))
# A PDF is not an image for the header reader, but the server opens it and finds no pages.
BROKEN_PDF = Expectation(refusals=(_UNSUPPORTED, Refusal(400, "invalid_file")))
# Whether it can be decoded depends on the library; it must not harm the server.
SURVIVES = Expectation(answered=True, refusals=(_INVALID, _UNSUPPORTED, _TOO_LARGE, _TOO_THIN))


def seen(corners: Corners, size: Size | None = None, tolerance: int = 24) -> Expectation:
    return Expectation(answered=True, corners=corners, size=size, tolerance=tolerance)


def solid(color: Color, size: Size | None = None, tolerance: int = 24) -> Expectation:
    return seen((color,) * 4, size, tolerance)


def named(answer: str) -> Expectation:
    return Expectation(answered=True, answer=answer)


@dataclass(frozen=True)
class Case:
    """One file: `name` is "family/case", `make` returns its bytes, `mime` its data URL's type."""

    name: str
    make: Callable[[], bytes] = field(repr=False)
    expected: Expectation
    mime: str = "image/png"

    @functools.cached_property
    def data(self) -> bytes:
        """The bytes of the file, the same each time; kept until `forget` is called."""
        return self.make()

    def forget(self) -> None:
        self.__dict__.pop("data", None)

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]
