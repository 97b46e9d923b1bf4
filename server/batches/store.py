"""The records of all batches, on the disk beside the files of their groups:

<folder of the group>/batches/<id>.json      the record
<folder of the group>/batches/<id>.output    the results until the batch is over (`results`)
<folder of the group>/batches/<id>.errors
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from server.batches.record import Batch, Status, new_id
from server.batches.results import Results
from server.errors import (
    BatchQuotaExceeded,
    CannotStart,
    SaccadeError,
    UnknownBatch,
    UnknownFile,
)
from server.ingest.clock import Clock
from server.ingest.files import FileStore
from server.ingest.files.disk import translated

log = logging.getLogger("saccade")

# Finished batches of a group that are remembered; the oldest are forgotten first.
_REMEMBERED = 1000
_MAX_RECORD_BYTES = 1 << 20
_LOGS = (".output", ".errors")
_RECORDS = msgspec.json.Decoder(Batch)


class BatchStore:
    """Records by group and id, oldest first."""

    def __init__(
        self, files: FileStore, group_count: int, group_items: int, clock: Clock = time
    ) -> None:
        """A group has at most `group_count` unfinished batches, with `group_items` requests."""
        self.files = files
        self.clock = clock
        self._group_count = group_count
        self._group_items = group_items
        self._groups: dict[str, dict[str, Batch]] = {}
        self._changing = asyncio.Lock()

    async def load(self) -> list[Batch]:
        """Read all records; returns those of unfinished batches. Ignores damaged records.

        Raises:
            CannotStart: a folder cannot be read.
        """
        try:
            found = await self.files.run(self._read)
        except OSError as error:
            raise CannotStart(f"the folder of batches cannot be read: {error.strerror}") from None
        for batch in sorted(found, key=lambda batch: (batch.created_ns, batch.id)):
            self._groups.setdefault(batch.group, {})[batch.id] = batch
        unfinished = self.unfinished()
        await self.files.drop_inputs({batch.input_id for batch in unfinished})
        return unfinished

    def _read(self) -> list[Batch]:
        found = []
        for path in itertools.chain(*(folder.glob("*.json") for folder in self.files.folders())):
            try:
                with path.open("rb") as file:
                    batch = _RECORDS.decode(file.read(_MAX_RECORD_BYTES))
                if path != self._path(batch):
                    raise ValueError("it is that of another batch")
                if batch.is_over:
                    self._remove(batch, _LOGS)
                found.append(batch)
            except (OSError, ValueError, SaccadeError) as error:  # ValueError is also msgspec's
                log.warning("ignoring the batch %s: %s", path, error)
        return found

    # ------------------------------------------------------------------ reading

    def get(self, group: str, batch_id: str) -> Batch:
        """Raises UnknownBatch: never known to `group`, or forgotten."""
        batch = self._groups.get(group, {}).get(batch_id)
        if batch is None:
            raise UnknownBatch("there is no such batch")
        return batch

    def listed(self, group: str, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """At most `limit` batches, the newest first, behind the batch `after`; and whether there
        are more. Raises UnknownBatch."""
        newest = reversed(self._groups.get(group, {}).values())
        if after is not None:
            self.get(group, after)
            newest = itertools.dropwhile(lambda batch: batch.id != after, newest)
            next(newest, None)
        page = list(itertools.islice(newest, limit + 1))
        return page[:limit], len(page) > limit

    def unfinished(self, group: str | None = None) -> list[Batch]:
        """The unfinished batches of one group, or of all."""
        groups = self._groups.values() if group is None else [self._groups.get(group, {})]
        return [batch for of_group in groups for batch in of_group.values() if not batch.is_over]

    def open_input(self, batch: Batch) -> BinaryIO:
        """Blocks. Raises UnknownFile, FileStorageFailed."""
        return self.files.open(batch.group, batch.input_id)[1]

    def folder(self, batch: Batch) -> Path:
        """Where the results of a batch are until it is over."""
        return self.files.folder(batch.group)

    # ------------------------------------------------------------------ changing

    async def create(self, group: str, input_file_id: str, window_s: int, **given: Any) -> Batch:
        """Create a batch that expires in `window_s` seconds, with the other attributes `given`.

        Raises:
            BatchQuotaExceeded, UnknownFile, FileQuotaExceeded, FileStorageFailed
        """
        async with self._changing:
            if len(self.unfinished(group)) >= self._group_count:
                raise BatchQuotaExceeded(
                    f"your group has {self._group_count} unfinished batches, which is the limit"
                )
            await self._forget(group)
            kept = await self.files.keep_input(group, input_file_id)
            now = self.clock.time()
            batch = Batch(
                id=new_id(),
                group=group,
                input_file_id=input_file_id,
                input_id=kept.id,
                created_ns=int(now * 1e9),
                expires_at=int(now) + window_s,
                **given,
            )
            try:
                await self._write(batch)
            except BaseException:
                await self.files.delete(group, kept.id)
                raise
            self._groups.setdefault(group, {})[batch.id] = batch
            return batch

    def has_quota(self, batch: Batch, items: int) -> bool:
        """Whether the group of `batch` may have so many requests more."""
        others = (each.total for each in self.unfinished(batch.group) if each.id != batch.id)
        return sum(others) + items <= self._group_items

    def count(self, batch: Batch, results: Results) -> None:
        """Note how many requests have a result, and their tokens, which the logs say too."""
        answers, models = results.answers, results.answers.models
        self._keep(
            msgspec.structs.replace(
                self.get(batch.group, batch.id),
                completed=answers.lines,
                failed=results.errors.lines,
                usage=answers.usage,
                model=next(iter(models)) if len(models) == 1 else None,
            )
        )

    async def change(self, batch: Batch, *, if_in: Collection[Status], **changes: Any) -> Batch:
        """Change the record, durably, unless its status is none of `if_in`; a new status gets its
        time. Returns the record as it is then. Raises FileStorageFailed."""
        async with self._changing:
            batch = self.get(batch.group, batch.id)
            if batch.status not in if_in:
                return batch
            status = changes.get("status", batch.status)
            if status != batch.status:
                changes["times"] = {**batch.times, status: int(self.clock.time())}
            await self._write(msgspec.structs.replace(batch, **changes))
            # The counts may have changed meanwhile.
            batch = msgspec.structs.replace(self.get(batch.group, batch.id), **changes)
            self._keep(batch)
            return batch

    async def clean(self, batch: Batch) -> None:
        """Remove the input and the logs of a batch that is over; its results are files by now.
        Raises FileStorageFailed."""
        await self.files.run(self._remove, batch, _LOGS)
        with contextlib.suppress(UnknownFile):
            await self.files.delete(batch.group, batch.input_id)

    async def _forget(self, group: str) -> None:
        over = [batch for batch in self._groups.get(group, {}).values() if batch.is_over]
        for batch in over[: max(0, len(over) - _REMEMBERED)]:
            await self.files.run(self._remove, batch, (".json",))
            del self._groups[group][batch.id]

    def _keep(self, batch: Batch) -> None:
        self._groups[batch.group][batch.id] = batch

    async def _write(self, batch: Batch) -> None:
        await self.files.run(self.files.write, self._path(batch), msgspec.json.encode(batch))

    def _path(self, batch: Batch) -> Path:
        return self.folder(batch) / f"{batch.id}.json"

    def _remove(self, batch: Batch, suffixes: tuple[str, ...]) -> None:
        for suffix in suffixes:
            with translated():
                (self.folder(batch) / f"{batch.id}{suffix}").unlink(missing_ok=True)
