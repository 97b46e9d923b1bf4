"""`saccade batch`."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saccade_client import DEFAULT_URL
from saccade_client.cli import options
from saccade_client.cli.options import DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    from saccade_client.batch import Result

_RETRIES = 8


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="JSON lines; - is standard input.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Results; - is standard output.")],
    url: options.Url = DEFAULT_URL,
    api_key: options.Key = None,
    model: options.Model = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, help="Requests at a time.")
    ] = 16,
    resize: options.Resize = True,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Answer many requests from a file, and go on where an interrupted run has stopped.

    A line is one of OpenAI's Batch API, {"custom_id": "1", "body": {"messages": [...]}}, or
    {"question": "...", "files": ["a.jpg"]}, with paths relative to IN. Results keep the order.
    Run it again to try failed requests again.
    Exits with 1 if a request failed, 2 if the input is wrong, 3 if the server cannot be reached.
    """
    with options.reported(url):
        import asyncio

        from saccade_client import batch as batches
        from saccade_client.client import AsyncClient

        async def run(
            lines: Iterable[str], progress: "Callable[[Result | None], None]"
        ) -> batches.Summary:
            async with AsyncClient(
                url, api_key, model=model, resize=resize, timeout_s=timeout, retries=_RETRIES
            ) as client:
                folder = Path() if str(source) == "-" else source.parent
                if str(output) != "-":
                    return await batches.run(
                        *(client, lines, output),
                        concurrency=concurrency, folder=folder, progress=progress,
                    )  # fmt: skip
                failed = 0
                requests = batches.read(lines, folder)
                async for result in batches.in_order(client, requests, concurrency):
                    options.print_json(result.line())
                    failed += result.error is not None
                return batches.Summary(failed, 0)

        if not output.parent.is_dir():
            options.fail(f"{output.parent} is not a folder", options.MISUSED)
        try:
            with _lines(source) as (lines, count), _progress(count) as progress:
                failed, changed = asyncio.run(run(lines, progress))
        except batches.InvalidLine as error:
            options.fail(str(error), options.MISUSED)
        except UnicodeDecodeError as error:
            options.fail(f"the input is not UTF-8: {error}", options.MISUSED)
        except OSError as error:
            options.fail(f"{error.filename}: {error.strerror}", options.MISUSED)
    if changed:
        print(f"saccade: asked again because the line has changed: {changed}", file=sys.stderr)
    if failed:
        options.fail(f"{failed} requests failed; run it again to repeat them", options.REFUSED)


@contextlib.contextmanager
def _lines(source: Path) -> Iterator[tuple[Iterable[str], int | None]]:
    """The lines of the input, and how many there are, if that can be known."""
    if str(source) == "-":
        yield sys.stdin, None
        return
    with source.open(encoding="utf-8-sig") as file:
        count = sum(bool(line.strip()) for line in file)
        file.seek(0)
        yield file, count


@contextlib.contextmanager
def _progress(count: int | None) -> "Iterator[Callable[[Result | None], None]]":
    """A bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda result: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        TextColumn("{task.fields[failed]} failed"),
    )
    failed = 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=count, failed=0)

        def advance(result: "Result | None") -> None:
            nonlocal failed
            failed += result is not None and result.error is not None
            bar.update(task, advance=1, failed=failed)

        yield advance
