"""OpenAI's `/v1/files`: images and PDFs that are uploaded once and used in many requests, and the
inputs of batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from python_multipart.multipart import parse_options_header

from server.concurrency import SLICE_BYTES, in_thread, slices
from server.errors import BatchTooLarge, ClientError, UnknownFile
from server.http.scope import context_of, group_of
from server.ingest.files import (
    UPLOAD_PURPOSES,
    FileStore,
    StoredFile,
    UploadPurpose,
    files_disabled,
)
from server.ingest.load import MediaLoader

PATH = "/v1/files"
_CHUNK_BYTES = 256 * 1024
_MAX_LISTED = 10_000
# OpenAI's bounds: an hour and 30 days.
MIN_LIFETIME_S, MAX_LIFETIME_S = 3600, 30 * 24 * 3600
# Most bytes of a form besides its file: boundaries, headers and the other fields.
MAX_OVERHEAD_BYTES = 64 * 1024
_MAX_BOUNDARY_BYTES = 256  # RFC 2046 allows 70
_MAX_PART_HEAD_BYTES = 8 * 1024
_MAX_FIELDS = 32

router = APIRouter()


@router.post(PATH)
async def create_file(raw_request: Request) -> JSONResponse:
    """Store a file; the form has `file`, `purpose` and optionally `expires_after`. The purpose of
    an image or a PDF is `vision` or `user_data`, that of JSON lines `batch`."""
    store = _store(raw_request)
    content_type = raw_request.headers.get("content-type", "")
    body = (await raw_request.receive())[
        "body"
    ]  # the whole body, not copied: the body reader has read it
    form = await in_thread(read_form, content_type, body)
    file, purpose, lifetime_s = _required(form, "file"), _purpose(form), _lifetime_s(form)
    try:
        if purpose == "batch":
            await _check_batch(file.data, raw_request.app.state.max_batch_bytes)
        else:
            await _check_media(file.data, raw_request)
    except ClientError as error:
        error.param = "file"
        raise
    stored = await store.put(
        group_of(raw_request.scope), file.data, file.filename, purpose, lifetime_s
    )
    return JSONResponse(_shown(stored))


@router.get(PATH)
def list_files(
    raw_request: Request,
    purpose: str | None = None,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
    limit: Annotated[int, Query(ge=1, le=_MAX_LISTED)] = _MAX_LISTED,
) -> JSONResponse:
    """List the files of the caller's group by time; `after` is the last id of the previous page."""
    store = _store(raw_request)
    try:
        files, has_more = store.listed(
            group_of(raw_request.scope), purpose=purpose, after=after, order=order, limit=limit
        )
    except UnknownFile as error:
        error.param = "after"
        raise
    return JSONResponse(
        {
            "object": "list",
            "data": [_shown(file) for file in files],
            "first_id": files[0].id if files else None,
            "last_id": files[-1].id if files else None,
            "has_more": has_more,
        }
    )


@router.get(PATH + "/{file_id}")
async def retrieve_file(file_id: str, raw_request: Request) -> JSONResponse:
    """Return the metadata of a file."""
    return JSONResponse(_shown(_store(raw_request).get(group_of(raw_request.scope), file_id)))


@router.get(PATH + "/{file_id}/content")
async def file_content(file_id: str, raw_request: Request) -> StreamingResponse:
    """Return the content of a file as a download: browsers must not render untrusted bytes."""
    file, content = await in_thread(_store(raw_request).open, group_of(raw_request.scope), file_id)
    headers = {
        "Content-Length": str(file.size),
        "Content-Disposition": f"attachment; filename*=utf-8''{quote(file.filename, safe='')}",
    }
    return StreamingResponse(
        _chunks(content), media_type="application/octet-stream", headers=headers
    )


@router.delete(PATH + "/{file_id}")
async def delete_file(file_id: str, raw_request: Request) -> JSONResponse:
    """Delete a file; later requests that name it are refused."""
    await _store(raw_request).delete(group_of(raw_request.scope), file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


async def _check_batch(data: memoryview, max_bytes: int) -> None:
    """Raises ClientError if `data` cannot be the input of a batch, whose lines are checked when it
    is created."""
    if len(data) > max_bytes:
        raise BatchTooLarge(f"the file has {len(data)} bytes, the limit is {max_bytes} bytes")
    if await in_thread(_is_blank, data):
        raise ClientError("the file is empty")


async def _check_media(data: memoryview, raw_request: Request) -> None:
    """Raises ClientError if `data` is no image or PDF that requests may use."""
    loader: MediaLoader | None = raw_request.app.state.loader
    if loader is None:
        raise ClientError("this model takes no images and no files")
    await loader.check_upload(data, context_of(raw_request.scope))


def _is_blank(data: memoryview) -> bool:
    return all(piece.isspace() for piece in slices(data))


def _store(raw_request: Request) -> FileStore:
    """Raises FilesDisabled."""
    store: FileStore | None = raw_request.app.state.files
    if store is None:
        raise files_disabled()
    return store


def _shown(file: StoredFile) -> dict[str, Any]:
    """OpenAI's File object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _chunks(content: BinaryIO) -> Iterator[bytes]:
    with content:
        while chunk := content.read(_CHUNK_BYTES):
            yield chunk


# ---------------------------------------------------------------------- the form (RFC 7578)


@dataclass(frozen=True)
class Field:
    """A field of a form. `filename` is the client's; "" if it gave none. `data` is a part of the
    form's body."""

    filename: str
    data: memoryview

    @property
    def text(self) -> str:
        return bytes(self.data).decode("utf-8", "replace")


def read_form(content_type: str, body: bytes) -> dict[str, Field]:
    """Parse the fields of a form, by name. Takes time, but no memory, that grows with `body`.

    Raises:
        ClientError: the body is not a form, is damaged, or has too many fields.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= _MAX_BOUNDARY_BYTES:
        raise ClientError("the body must be multipart/form-data, with a boundary")
    view, fields = memoryview(body), dict[str, Field]()
    for start, end in _parts(body, b"\r\n--" + boundary):
        data_start = body.find(b"\r\n\r\n", start, min(end, start + _MAX_PART_HEAD_BYTES)) + 4
        if data_start < 4:
            raise _malformed()
        name, filename = _names(body[start : data_start - 4])
        if name in fields:
            raise ClientError("the form has a duplicate field", param=name)
        fields[name] = Field(filename, view[data_start:end])
    return fields


def _parts(body: bytes, delimiter: bytes) -> list[tuple[int, int]]:
    """Where each part of a form is, from its headers on. Raises ClientError."""
    parts, start = list[tuple[int, int]](), -1
    at = 0 if body.startswith(delimiter) else -2  # the first one may lack its line break
    if not body.startswith(delimiter[-at:]):
        raise _malformed()
    for _ in range(_MAX_FIELDS + 1):
        after = at + len(delimiter)
        mark = body[after : after + 2]
        if mark in (b"\r\n", b"--"):
            if start >= 0:
                parts.append((start, at))
            if mark == b"--":
                return parts
            start = after = after + 2
        elif start < 0 or mark[:1].isspace():  # or else it is data that looks like a delimiter
            raise _malformed()
        if (at := _find(body, delimiter, after)) < 0:
            raise _malformed()
    raise ClientError(f"the form has more than {_MAX_FIELDS} fields")


def _find(body: bytes, delimiter: bytes, start: int) -> int:
    """As `bytes.find`, but in slices: no other thread runs while it searches."""
    while start < len(body):
        end = start + SLICE_BYTES
        if (at := body.find(delimiter, start, end + len(delimiter) - 1)) >= 0:
            return at
        start = end
    return -1


def _names(head: bytes) -> tuple[str, str]:
    """The names of a field and of its file from the headers of its part. Raises ClientError."""
    for line in head.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if not colon:
            raise _malformed()
        if name.lower() == b"content-disposition":
            _, options = parse_options_header(value.strip())
            if (given := options.get(b"name")) is not None:
                filename = options.get(b"filename", b"")
                return given.decode("utf-8", "replace"), filename.decode("utf-8", "replace")
    raise _malformed()


def _malformed() -> ClientError:
    return ClientError("the body is not valid multipart/form-data")


def _required(form: dict[str, Field], name: str) -> Field:
    if name not in form:
        raise ClientError(f"the form has no field {name!r}", param=name)
    return form[name]


def _purpose(form: dict[str, Field]) -> UploadPurpose:
    given = _required(form, "purpose").text
    for purpose in UPLOAD_PURPOSES:
        if purpose == given:
            return purpose
    raise ClientError("purpose must be 'vision', 'user_data' or 'batch'", param="purpose")


def _lifetime_s(form: dict[str, Field]) -> int | None:
    """The requested lifetime of the file in seconds; None if the form has none."""
    names = "expires_after[anchor]", "expires_after[seconds]"
    if not any(name in form for name in names):
        return None
    anchor, seconds = (_required(form, name).text for name in names)
    if anchor != "created_at":
        raise ClientError("expires_after[anchor] must be 'created_at'", param=names[0])
    is_number = seconds.isascii() and seconds.isdigit() and len(seconds) <= 9
    if not is_number or not MIN_LIFETIME_S <= int(seconds) <= MAX_LIFETIME_S:
        raise ClientError(
            f"expires_after[seconds] must be {MIN_LIFETIME_S} to {MAX_LIFETIME_S}",
            param=names[1],
        )
    return int(seconds)
