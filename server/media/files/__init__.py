"""Uploaded files: kept on the local disk for the group that sent them, until deleted or expired."""

from server.media.files.record import PURPOSES, Purpose, StoredFile
from server.media.files.store import FileStore, Quota

__all__ = ["PURPOSES", "FileStore", "Purpose", "Quota", "StoredFile"]
