"""Uploaded files: stored on the local disk for the group that sent them, until they are deleted or
expire."""

from server.ingest.files.disk import (
    UPLOAD_PURPOSES,
    Purpose,
    StoredFile,
    UploadPurpose,
    files_disabled,
)
from server.ingest.files.reader import FileReader
from server.ingest.files.store import FileStore, Quota

__all__ = [
    "UPLOAD_PURPOSES",
    "FileReader",
    "FileStore",
    "Purpose",
    "Quota",
    "StoredFile",
    "UploadPurpose",
    "files_disabled",
]
