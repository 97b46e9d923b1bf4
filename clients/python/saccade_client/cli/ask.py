"""`saccade ask` and `saccade chat`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade_client import DEFAULT_URL
from saccade_client.cli import options
from saccade_client.cli.options import DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    from saccade_client.answers import Answer
    from saccade_client.client import Client
    from saccade_client.core import Conversation
    from saccade_client.media import Media

MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens of the answer.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="0: always the likeliest token.")]
System = Annotated[str | None, typer.Option(help="The system prompt.")]
_CHAT_HELP = "/image FILE adds a picture, PDF or video, /clear starts anew, /quit or Ctrl-D ends"


def ask(
    *,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE",
            help="Pictures, PDFs and videos: paths, URLs, or - for standard input.",
        ),
    ] = None,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.")],
    url: options.Url = DEFAULT_URL,
    api_key: options.Key = None,
    model: options.Model = None,
    detail: options.DetailOption = None,
    image_tokens: options.ImageTokens = None,
    pages: Annotated[str | None, typer.Option(help='Pages of a PDF, such as "1-3,7".')] = None,
    paste: Annotated[bool, typer.Option("--paste", help="Add the clipboard's picture.")] = False,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    system: System = None,
    boxes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the answer's boxes on the first picture."),
    ] = None,
    box_scale: Annotated[
        float,
        typer.Option(min=0, help="Range of the model's coordinates; 0: pixels that it sees."),
    ] = 1000,
    usage: Annotated[bool, typer.Option("--usage", help="Print tokens and time as well.")] = False,
    resize: options.Resize = True,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
    json: options.Json = False,
) -> None:
    """Ask about pictures, PDFs and videos.

    Exits with 1 if the server refuses, 2 if the command is wrong, 3 if it cannot be reached.
    """
    if os.path.isfile(question):
        options.fail(f"the question is missing: {question} is a file", options.MISUSED)
    options.as_text(question)
    settings: dict[str, Any] = {"model": model, "resize": resize, "timeout_s": timeout}
    with options.connected(url, api_key, files or (), **settings) as client:
        from saccade_client.core import Conversation

        media = [options.opened(name, detail, image_tokens, pages) for name in files or ()]
        if paste:
            media.append(_pasted())
        said = Conversation(system)
        more = {"max_tokens": max_tokens, "temperature": temperature}
        if json:
            answer = client.ask(question, *media, conversation=said, **more)
            options.print_json(answer.model_dump(mode="json", by_alias=True))
        else:
            answer = _printed(client, question, media, said, more)
        if usage:
            print(_usage(answer), file=sys.stderr)
        if boxes is not None:
            _draw(answer, media, boxes, box_scale or None)


def chat(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="Pictures, PDFs and videos to talk about."),
    ] = None,
    url: options.Url = DEFAULT_URL,
    api_key: options.Key = None,
    model: options.Model = None,
    detail: options.DetailOption = None,
    image_tokens: options.ImageTokens = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    system: System = None,
    resize: options.Resize = True,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Talk about pictures. Each line of standard input is a question."""
    is_terminal = sys.stdin.isatty()
    with options.connected(url, api_key, model=model, resize=resize, timeout_s=timeout) as client:
        from saccade_client.core import Conversation
        from saccade_client.errors import SaccadeError

        said = Conversation(system)
        media = [options.opened(name, detail, image_tokens) for name in files or ()]
        more = {"max_tokens": max_tokens, "temperature": temperature}
        if is_terminal:
            import readline  # noqa: F401 - gives input() a history

            print(_CHAT_HELP, file=sys.stderr)
        while (line := _line(is_terminal)) is not None and line != "/quit":
            try:
                if line.startswith("/image "):
                    media.append(options.opened(line[7:].strip(), detail, image_tokens))
                elif line == "/clear":
                    said, media = Conversation(system), []
                elif line.startswith("/"):
                    print(_CHAT_HELP, file=sys.stderr)
                elif line:
                    _printed(client, line, media, said, more)
                    media = []
            except SaccadeError as error:
                if not is_terminal:
                    raise
                print(f"saccade: {error}", file=sys.stderr)
            except KeyboardInterrupt:  # stops the answer
                print(file=sys.stderr)


def _line(is_terminal: bool) -> str | None:
    """The next line of standard input; None at its end."""
    try:
        return options.as_text(input("> " if is_terminal else "").strip())
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""


def _printed(
    client: "Client",
    question: str,
    media: "list[Media]",
    said: "Conversation",
    more: dict[str, Any],
) -> "Answer":
    """The answer, printed as it arrives."""
    with client.stream(question, *media, conversation=said, **more) as stream:
        for piece in stream:
            print(piece, end="", flush=True)
    print(flush=True)
    return stream.answer


def _pasted() -> "Media":
    """The picture in the clipboard."""
    from PIL import Image, ImageGrab

    from saccade_client.media import Picture

    try:
        found = ImageGrab.grabclipboard()
    except (OSError, NotImplementedError) as error:
        options.fail(f"cannot read the clipboard: {error}", options.MISUSED)
    if isinstance(found, list) and found:
        return options.opened(found[0])
    if not isinstance(found, Image.Image):
        options.fail("the clipboard has no picture", options.MISUSED)
    return Picture(found)


def _usage(answer: "Answer") -> str:
    used = answer.usage
    if used is None:
        return "the server reports no usage"
    pictures = f", {used.image_tokens} of pictures" if used.image_tokens else ""
    return f"{used.prompt_tokens} tokens in{pictures}; {used.completion_tokens} out"


def _draw(answer: "Answer", media: "list[Media]", path: Path, scale: float | None) -> None:
    from saccade_client.boxes import draw
    from saccade_client.media import Picture

    picture = next((medium for medium in media if isinstance(medium, Picture)), None)
    if picture is None or not answer.images:
        options.fail("--boxes needs a picture", options.MISUSED)
    found = answer.boxes(scale)
    try:
        draw(picture, found).save(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        options.fail(f"cannot write {path}: {reason}", options.MISUSED)
    print(f"{len(found)} boxes in {path}", file=sys.stderr)
