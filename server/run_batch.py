"""`saccade run-batch`: answers the requests in a file, without a server.

    input file -> lines -> the whole app, without a port -> logs of results -> output file

The logs are in a folder beside the output file. If the command is interrupted or killed, and runs
again, it goes on with them.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

import aiohttp
from blake3 import blake3
from prometheus_client import start_http_server

from saccade_client.errors import OutputLocked
from saccade_client.lock import locked
from server.batches.items import Answer, ItemLoop
from server.batches.lines import Item, LineLimits, Lines, scan
from server.batches.results import Results, request_id
from server.concurrency import cancel
from server.engine import vllm_http
from server.errors import CannotStart
from server.http.app import ADMITTED, Parts, build_app, inner_client, observed
from server.http.batches import InnerClient
from server.http.keys import KeyRing
from server.parts import running
from server.request.admission import Admission, Turn
from server.settings import FileSettings, Settings
from server.upload_folder import Report

_URLS = ("http://", "https://")
_CHUNK_BYTES = 1 << 20
_REPORT_S = 5.0
_ENGINE_CHECK_S = 1.0
_INTERRUPTED = 130
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=300)
_SEND_ATTEMPTS = 5
_SEND_PAUSE_S = 5.0


async def run(args: Namespace, settings: Settings, report: Report) -> int:
    """Answer all requests; returns the exit status. Raises CannotStart."""
    args.host = args.url or args.host
    with tempfile.TemporaryDirectory(dir=args.output_tmp_dir) as folder:
        input_path = await _fetched(args.input_file, Path(folder) / "input")
        sent = args.output_file.startswith(_URLS)
        output = Path(folder) / "output" if sent else Path(args.output_file)
        with input_path.open("rb") as file:
            lines = _checked(file, settings, args.input_file)
            batch_id = f"batch_{_digest(file)[:32]}"
            output.parent.mkdir(exist_ok=True, parents=True)
            try:
                with locked(output):
                    status = await _answered(args, settings, report, lines, batch_id, output)
            except OutputLocked as error:
                raise CannotStart(str(error)) from None
        if sent and status == 0:
            try:
                await _send(output, args.output_file)
            except CannotStart:
                kept = shutil.move(output, f"{batch_id}.jsonl")
                report(f"the results are in {kept}")
                raise
    if status == 0:
        report(f"wrote {len(lines)} results to {args.output_file}")
    return status


def _checked(file: BinaryIO, settings: Settings, name: str) -> Lines:
    """The lines of the input. Raises CannotStart if any is wrong."""

    def wrong_url(url: str) -> str | None:
        return None if url in ADMITTED else "url is not a path that takes requests for the model"

    limits = LineLimits(settings.batches.batch_items, settings.batches.batch_line_bytes)
    lines, problems = scan(file, limits, wrong_url)
    if problems:
        shown = "\n".join(
            f"  line {each.line}: {each.message}" if each.line else f"  {each.message}"
            for each in problems
        )
        raise CannotStart(f"{name} is invalid:\n{shown}")
    return lines


def _digest(file: BinaryIO) -> str:
    hashed = blake3()
    file.seek(0)
    while chunk := file.read(_CHUNK_BYTES):
        hashed.update(chunk)
    return hashed.hexdigest()


async def _answered(
    args: Namespace,
    settings: Settings,
    report: Report,
    lines: Lines,
    batch_id: str,
    output: Path,
) -> int:
    """Answer the requests and write the output file, which is locked; returns the exit status."""
    logs = output.with_name(output.name + ".partial")
    logs.mkdir(exist_ok=True)
    results = Results(logs, batch_id, len(lines))
    results.open()
    try:
        if done := results.answers.lines + results.errors.lines:
            report(f"{done} of {len(lines)} requests have been answered before")
        status = 0
        if done < len(lines):
            status = await _run(args, settings, report, lines, results, batch_id)
    finally:
        await results.settle()
        results.close()
    if status == 0:
        partial = logs / "output"
        with partial.open("wb") as file:
            file.writelines(results.in_order())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(output)
        shutil.rmtree(logs)
    return status


async def _run(
    args: Namespace,
    settings: Settings,
    report: Report,
    lines: Lines,
    results: Results,
    batch_id: str,
) -> int:
    if settings.files.files_dir is None:  # the folder in the user's cache is a server's
        settings = settings.model_copy(update={"files": FileSettings(files=False)})
    async with running(args, settings, report) as parts:
        if args.enable_metrics:
            registry = vllm_http.get_prometheus_registry()
            start_http_server(args.port, args.host or "0.0.0.0", registry)  # noqa: S104
        app = await build_app(args, settings, parts, KeyRing(None, [], None))
        outer = observed(app, args, settings)
        client = inner_client(outer, args, settings, parts)
        loop = ItemLoop(
            lines,
            results,
            _Asking(client, parts.admission),
            lambda number: request_id(batch_id, number),
            lambda: None,
        )
        try:
            async with _progress(report, results, len(lines)):
                return await _until_over(asyncio.create_task(loop.run()), parts)
        finally:
            outer.flush()


async def _until_over(work: asyncio.Task[None], parts: Parts) -> int:
    """Wait for the requests, a signal, or the engine's death; returns the exit status."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    waiting = asyncio.create_task(stopped.wait())
    try:
        while not (work.done() or stopped.is_set() or parts.engine.errored):
            await asyncio.wait(
                [work, waiting], timeout=_ENGINE_CHECK_S, return_when=asyncio.FIRST_COMPLETED
            )
        is_done = work.done()
    finally:
        waiting.cancel()
        await cancel(work)
    return 0 if is_done else _INTERRUPTED if stopped.is_set() else 1


class _Asking:
    """Asks with the rights of who runs the command."""

    def __init__(self, client: InnerClient, admission: Admission) -> None:
        self._client = client
        self._admission = admission

    async def turn(self) -> Turn:
        """Wait until the next request may run."""
        return await self._admission.background_turn("")

    async def ask(self, item: Item, request_id: str, turn: Any) -> Answer:
        """Answer a request."""
        return await self._client.ask(item, request_id, "", turn)


@contextlib.asynccontextmanager
async def _progress(report: Report, results: Results, total: int) -> AsyncIterator[None]:
    """Report how many requests are answered, every few seconds and at the end."""
    began, before = time.monotonic(), results.answers.lines + results.errors.lines

    def tell() -> None:
        done, failed = results.answers.lines + results.errors.lines, results.errors.lines
        rate = (done - before) / (time.monotonic() - began)
        report(f"{done} of {total} requests answered, {failed} with an error; {rate:.1f} per s")

    async def repeat() -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            tell()

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        await cancel(task)
        tell()


# ---------------------------------------------------------------------- files at URLs


async def _fetched(given: str, path: Path) -> Path:
    """The input file; downloaded to `path` if it is a URL. Raises CannotStart, OSError."""
    if not given.startswith(_URLS):
        return Path(given)
    try:
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session, session.get(given) as answer:
            answer.raise_for_status()
            with path.open("wb") as file:
                async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
                    file.write(chunk)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise CannotStart(f"failed to download {given}: {error}") from None
    return path


async def _send(path: Path, url: str) -> None:
    """Raises CannotStart if several attempts have failed."""
    for attempt in range(_SEND_ATTEMPTS):
        await asyncio.sleep(_SEND_PAUSE_S * attempt)
        try:
            async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
                with path.open("rb") as file:
                    async with session.put(url, data=file) as answer:
                        answer.raise_for_status()
                        return
        except (aiohttp.ClientError, TimeoutError) as error:
            failure = error
    raise CannotStart(f"failed to send the results to {url}: {failure}")
