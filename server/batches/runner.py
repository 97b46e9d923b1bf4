"""The life of each batch, in a task of its own:

    validating -> in_progress -> finalizing -> completed | expired
        |              |
      failed      cancelling -> cancelled

Each state is on the disk before anything is done in it, and each step can be done again: a server
that was killed goes on where its batches were.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, BinaryIO, Self

from server.batches.items import Asking, ItemLoop, fill
from server.batches.lines import LineLimits, Lines, Problem, scan
from server.batches.record import Batch, Status
from server.batches.results import ResultLog, Results, request_id
from server.batches.store import BatchStore
from server.concurrency import cancel
from server.errors import BatchNotCancellable, FileStorageFailed, ServerBusy, UnknownFile
from server.ingest.files.disk import new_id
from server.telemetry import metrics

log = logging.getLogger("saccade")

_STORAGE_PAUSE_S = 5.0
_ENDS = {
    "expired": {
        "code": "batch_expired",
        "message": "the request was not run before the completion window ended",
    },
    "cancelled": {
        "code": "batch_cancelled",
        "message": "the batch was cancelled before the request was answered",
    },
}
_STOPPABLE: frozenset[Status] = frozenset({"validating", "in_progress"})
_UNFINISHED: frozenset[Status] = _STOPPABLE | {"finalizing", "cancelling"}


@dataclass
class _Running:
    """A batch that this server works on, in the task `life`."""

    life: asyncio.Task[None]
    is_cancelled: asyncio.Event = field(default_factory=asyncio.Event)


class BatchRunner:
    """Works on the unfinished batches of `store` while its `async with` block is open."""

    def __init__(
        self,
        store: BatchStore,
        asking_for: Callable[[Batch], Asking],
        endpoints: Collection[str],
        limits: LineLimits,
    ) -> None:
        """`endpoints` are the paths that batches may ask, and `asking_for` gives the way to ask
        them for a batch."""
        self.store = store
        self.endpoints = endpoints
        self._asking_for = asking_for
        self._limits = limits
        self._running: dict[str, _Running] = {}

    async def __aenter__(self) -> Self:
        """Go on with the batches of the server before. Raises CannotStart."""
        for batch in await self.store.load():
            self._start(batch)
        metrics.batches.set_function(lambda: len(self._running))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for running in list(self._running.values()):
            await cancel(running.life)

    async def submit(self, group: str, input_file_id: str, window_s: int, **given: Any) -> Batch:
        """Create a batch and begin with it. Raises as `BatchStore.create` does."""
        batch = await self.store.create(group, input_file_id, window_s, **given)
        self._start(batch)
        return batch

    async def cancel(self, batch: Batch) -> Batch:
        """Stop the requests of a batch; those that have no answer yet get none.

        Raises:
            BatchNotCancellable: it is over, or its results are being written.
            FileStorageFailed
        """
        if batch.status == "cancelling":
            return batch
        batch = await self.store.change(batch, if_in=_STOPPABLE, status="cancelling")
        if batch.status != "cancelling":
            raise BatchNotCancellable(f"the batch is {batch.status}")
        if (running := self._running.get(batch.id)) is not None:
            running.is_cancelled.set()
        return batch

    def _start(self, batch: Batch) -> None:
        life = asyncio.create_task(self._live(batch))
        self._running[batch.id] = _Running(life)
        life.add_done_callback(lambda _: self._running.pop(batch.id))

    # ------------------------------------------------------------------ the life of a batch

    async def _live(self, batch: Batch) -> None:
        problems: list[Problem] = []
        while True:
            try:
                if problems:
                    await self._fail(batch, problems)
                else:
                    await self._work(batch)
                return
            except (FileStorageFailed, ServerBusy, OSError) as error:  # the disk may be full
                log.warning("batch %s waits: %s", batch.id, error)
                await asyncio.sleep(_STORAGE_PAUSE_S)
            except Exception:
                log.exception("batch %s failed", batch.id)
                if problems:
                    return
                problems = [Problem("internal_error", "internal error")]

    async def _work(self, batch: Batch) -> None:
        batch = self.store.get(batch.group, batch.id)
        if batch.is_over:
            await self.store.clean(batch)
            return
        try:
            file = await asyncio.to_thread(self.store.open_input, batch)
        except UnknownFile:
            await self._fail(batch, [Problem("input_lost", "the input file is lost")])
            return
        with file:
            lines = await self._validated(batch, file)
            if lines is None:
                return
            batch = self.store.get(batch.group, batch.id)
            results = Results(self.store.folder(batch), batch.id, len(lines))
            tally = _Tally(self.store, batch, results)
            try:
                await asyncio.to_thread(results.open)
                tally.update()
                if batch.status == "in_progress":
                    batch = await self._run(batch, lines, results, tally)
                await self._finalize(batch, lines, results, tally)
            finally:
                await results.settle()
                results.close()
                tally.close()

    async def _validated(self, batch: Batch, file: BinaryIO) -> Lines | None:
        """The lines of the input; None if the batch has failed because of them."""

        def wrong_url(url: str) -> str | None:
            if url == batch.endpoint:
                return None
            return f"url must be {batch.endpoint!r}, the endpoint of the batch"

        lines, problems = await asyncio.to_thread(scan, file, self._limits, wrong_url)
        if not problems and not batch.total and not self.store.has_quota(batch, len(lines)):
            message = "with this batch, your group would have too many unfinished requests"
            problems = [Problem("batch_quota_exceeded", message)]
        if problems:
            await self._fail(batch, problems)
            return None
        await self.store.change(batch, if_in={"validating"}, status="in_progress", total=len(lines))
        return lines

    async def _run(self, batch: Batch, lines: Lines, results: Results, tally: "_Tally") -> Batch:
        """Run the requests until all have results, or the batch is cancelled or expires."""
        loop = ItemLoop(
            lines,
            results,
            self._asking_for(batch),
            lambda number: request_id(batch.id, number),
            tally.update,
        )
        work = asyncio.create_task(loop.run())
        cancelled = asyncio.create_task(self._running[batch.id].is_cancelled.wait())
        try:
            left_s = max(0.0, batch.left_s(self.store.clock.time()))
            await asyncio.wait([work, cancelled], timeout=left_s, return_when="FIRST_COMPLETED")
            is_done = work.done()
        finally:
            cancelled.cancel()
            await cancel(work)
        ends_as = "completed" if is_done else "expired"
        return await self.store.change(
            batch, if_in={"in_progress"}, status="finalizing", ends_as=ends_as
        )

    async def _finalize(
        self, batch: Batch, lines: Lines, results: Results, tally: "_Tally"
    ) -> None:
        """Give all requests a result, and make files of the logs."""
        ends_as = "cancelled" if batch.status == "cancelling" else batch.ends_as
        await results.settle()
        if (error := _ENDS.get(ends_as)) is not None:
            await fill(lines, results, lambda number: request_id(batch.id, number), error)
            tally.update()
        batch = await self._store(batch, results)
        batch = await self.store.change(
            batch, if_in={"finalizing", "cancelling"}, status=ends_as, total=len(lines)
        )
        await self.store.clean(batch)

    async def _store(self, batch: Batch, results: Results) -> Batch:
        """Make files of the logs. The ids are on the disk before the files: a file is stored
        once."""
        ids = {
            "output_file_id": _id_for(results.answers, batch.output_file_id),
            "error_file_id": _id_for(results.errors, batch.error_file_id),
        }
        batch = await self.store.change(batch, if_in=_UNFINISHED, **ids)
        for log_, file_id, name in (
            (results.answers, batch.output_file_id, "output"),
            (results.errors, batch.error_file_id, "error"),
        ):
            if file_id is not None:
                await self.store.files.adopt(
                    *(batch.group, log_.path, f"{batch.id}_{name}.jsonl", file_id),
                    batch.output_lifetime_s,
                )
        return batch

    async def _fail(self, batch: Batch, problems: list[Problem]) -> None:
        """End a batch because of `problems`. It keeps the results that it has."""
        batch = self.store.get(batch.group, batch.id)
        if batch.total:
            results = Results(self.store.folder(batch), batch.id, batch.total)
            try:
                await asyncio.to_thread(results.open)
                self.store.count(batch, results)
                batch = await self._store(batch, results)
            finally:
                results.close()
        batch = await self.store.change(batch, if_in=_UNFINISHED, status="failed", errors=problems)
        await self.store.clean(batch)


def _id_for(results: ResultLog, given: str | None) -> str | None:
    if given is not None or not results.lines:
        return given
    return new_id()


class _Tally:
    """Counts the results of a batch in its record, in the metrics and for the quotas."""

    def __init__(self, store: BatchStore, batch: Batch, results: Results) -> None:
        self._store = store
        self._batch = batch
        self._results = results
        self._nbytes = 0

    def update(self) -> None:
        """There may be more results than before."""
        self._store.count(self._batch, self._results)
        self._log(self._results.nbytes)

    def close(self) -> None:
        """The logs are files by now, or are not worked on."""
        self._log(0)

    def _log(self, nbytes: int) -> None:
        self._store.files.log(self._batch.group, nbytes - self._nbytes)
        self._nbytes = nbytes
