"""Uploaded files: stored on the local disk for the group that sent them, until they are deleted or
expire."""

from server.ingest.files.disk import PURPOSES, Purpose, StoredFile
from server.ingest.files.store import FileStore, Quota

__all__ = ["PURPOSES", "FileStore", "Purpose", "Quota", "StoredFile"]
