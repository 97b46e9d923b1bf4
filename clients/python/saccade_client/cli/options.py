"""Options that commands share, the client they describe, and how failures end a command."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from saccade_client.client import Client
    from saccade_client.media import Media

# Exit statuses, besides 0 and 130 for Ctrl-C.
REFUSED, MISUSED, UNREACHABLE = 1, 2, 3

Url = Annotated[
    str,
    typer.Option("--url", envvar="OPENAI_BASE_URL", help="The API's address.", show_default=True),
]
Key = Annotated[
    str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="The server's API key.")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="The model (default: the server's first).")
]
Timeout = Annotated[float, typer.Option(min=0.001, help="Longest time for an answer, in seconds.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DetailOption = Annotated[
    Literal["auto", "low", "high", "trim", "salient"] | None,
    typer.Option("--detail", help="How much of each picture the model sees."),
]
ImageTokens = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of each picture (Saccade only).")
]
Resize = Annotated[
    bool,
    typer.Option(help="Send pictures as small as the model sees them (Saccade only)."),
]
DEFAULT_TIMEOUT_S = 600.0
_RETRIES = 2  # somebody waits


@contextlib.contextmanager
def connected(
    url: str, key: str | None, files: Sequence[str] = (), **settings: Any
) -> "Iterator[Client]":
    """A client that asks about `files`. Its errors end the command with a message and a status."""
    from saccade_client.client import Client

    with reported(url, files), Client(url, key, **{"retries": _RETRIES, **settings}) as client:
        yield client


@contextlib.contextmanager
def reported(url: str, files: Sequence[str] = ()) -> Iterator[None]:
    """Ends the command with a message and a status if the client of this server fails."""
    from saccade_client import errors

    if not url.startswith(("http://", "https://")):
        fail(f"--url must begin with http:// or https://, unlike {url!r}", MISUSED)
    try:
        yield
    except (errors.UnusableMedia, errors.OutputLocked) as error:
        fail(str(error), MISUSED)
    except (errors.ConnectionLost, errors.TimedOut, errors.DeadlineExceeded) as error:
        fail(str(error), UNREACHABLE)
    except errors.ConnectionFailed as error:
        fail(f"{error} (at {url}; --url names another one)", UNREACHABLE)
    except errors.SaccadeError as error:
        fail(f"{error}{_hint(error, url, files)}", REFUSED)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise typer.Exit(130) from None


def _hint(error: Exception, url: str, files: Sequence[str]) -> str:
    """What a person can do about an error, or which of several files it is about."""
    from saccade_client import errors

    if isinstance(error, errors.NotAuthorized):
        return "; --api-key or OPENAI_API_KEY gives the key"
    if isinstance(error, errors.NotFound) and not url.rstrip("/").endswith("/v1"):
        return f"; the address of an API ends with /v1, unlike {url}"
    param = getattr(error, "param", None) or ""
    place = re.match(r"messages\[\d+\]\.content\[(\d+)\]", param)
    if place and len(files) > 1 and int(place[1]) < len(files):
        return f": {files[int(place[1])]}"
    return ""


def as_text(text: str) -> str:
    """The text, or the end of the command if it was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        fail("the question is not UTF-8", MISUSED)
    return text


def fail(message: str, status: int) -> NoReturn:
    """End the command with a message on standard error."""
    print(f"saccade: {message}", file=sys.stderr)
    raise typer.Exit(status)


def opened(
    name: str, detail: Any = None, max_tokens: int | None = None, pages: str | None = None
) -> "Media":
    """The picture, PDF or video of an argument: a path, a URL, or `-` for standard input. Options
    that its kind does not have are ignored."""
    from saccade_client import media

    source: str | bytes = name
    if name == "-" and not (source := sys.stdin.buffer.read()):
        fail("standard input is empty", MISUSED)
    made = media.media(source)
    if isinstance(made, media.Picture):
        return media.picture(made, detail=detail, max_tokens=max_tokens)
    if isinstance(made, media.Document):
        return media.Document(made.data, pages, name=made.name)
    return made


def print_json(document: Mapping[str, Any] | list[Any]) -> None:
    """Print a line of JSON."""
    print(json.dumps(document, ensure_ascii=False), flush=True)
