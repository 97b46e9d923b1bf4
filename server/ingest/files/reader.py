"""The stored files as another process sees them, which neither adds nor removes any."""

import time
from pathlib import Path

from server.ingest.clock import Clock
from server.ingest.files.disk import FileDisk, StoredFile, group_name, read_whole, unknown_file


class FileReader:
    """Reads what the `FileStore` of another process on this machine has below `root`. Each call
    reads the disk."""

    def __init__(self, root: Path, clock: Clock = time, marker: Path | None = None) -> None:
        """`marker`: a file that exists while the other process has its store."""
        self._marker = marker
        self._disk = FileDisk(root)
        self._clock = clock

    @property
    def is_on(self) -> bool:
        """Whether the other process has its store."""
        return self._marker is None or self._marker.exists()

    def get(self, group: str, file_id: str) -> StoredFile:
        """Raises UnknownFile: never known to `group`, deleted or expired."""
        file = self._disk.find_record(group_name(group), file_id)
        left_s = file.left_s(self._clock.time()) if file is not None else None
        if file is None or (left_s is not None and left_s <= 0):
            raise unknown_file()
        return file

    def read(self, group: str, file_id: str, max_bytes: int) -> bytes:
        """Read the content of a file. Blocks.

        Raises:
            UnknownFile, FileStorageFailed
            ImageTooLarge: the file has more than `max_bytes`.
        """
        file = self.get(group, file_id)
        return read_whole(file, self._disk.open_blob(group_name(group), file), max_bytes)
