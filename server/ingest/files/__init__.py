"""Uploaded files: kept on the local disk for the group that sent them, until deleted or expired."""

from server.ingest.files.disk import PURPOSES, Purpose, StoredFile
from server.ingest.files.store import FileStore, Quota

__all__ = ["PURPOSES", "FileStore", "Purpose", "Quota", "StoredFile"]
