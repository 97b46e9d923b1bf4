"""OpenAI's `/v1/files`: images and PDFs that are uploaded once and used in many requests, and the
inputs of batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.concurrency import in_thread
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
        await _check_content(file.data, purpose, raw_request)
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


async def _check_content(data: bytes, purpose: UploadPurpose, raw_request: Request) -> None:
    """Raises ClientError if nothing can be done with the file. The lines of a batch are checked
    when it is created."""
    if purpose == "batch":
        most = raw_request.app.state.max_batch_bytes
        if len(data) > most:
            raise BatchTooLarge(f"the file has {len(data)} bytes, the limit is {most} bytes")
        if not data or data.isspace():  # `strip` would copy it
            raise ClientError("the file is empty")
        return
    loader: MediaLoader | None = raw_request.app.state.loader
    if loader is None:
        raise ClientError("this model takes no images and no files")
    await loader.check_upload(data, context_of(raw_request.scope))


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
    """A field of a form. `filename` is the client's; "" if it gave none."""

    filename: str
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


def read_form(content_type: str, body: bytes) -> dict[str, Field]:
    """Parse the fields of a form, by name. Takes time and as much memory as `body`.

    Raises:
        ClientError: the body is not a form, is damaged, or has too many fields.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise ClientError("the body must be multipart/form-data, with a boundary")
    # Input that the parser would read byte by byte is refused, so that its steps are bounded.
    delimiter = b"\r\n--" + boundary
    if body.count(delimiter) > _MAX_FIELDS:
        raise ClientError(f"the form has more than {_MAX_FIELDS} fields")
    if delimiter + b" " in body or delimiter + b"\t" in body:
        raise _malformed()
    reader = _Reader(body)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": reader.begin,
                "on_header_field": reader.header_name,
                "on_header_value": reader.header_value,
                "on_header_end": reader.header_end,
                "on_part_data": reader.data,
                "on_part_end": reader.end,
                "on_end": reader.finish,
            },
        )
        parser.write(body)
    except FormParserError:
        raise _malformed() from None
    if not reader.finished:
        raise _malformed()
    return reader.fields


class _Reader:
    """Collects the fields of `body`: the parser gets the body at once and reports positions."""

    def __init__(self, body: bytes) -> None:
        self.fields: dict[str, Field] = {}
        self.finished = False
        self._view = memoryview(body)
        self.begin()

    def begin(self) -> None:
        self._name = self._value = b""
        self._disposition = b""
        self._data: list[memoryview] = []

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def data(self, _: bytes, start: int, end: int) -> None:
        self._data.append(self._view[start:end])

    def end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name, filename = options.get(b"name"), options.get(b"filename", b"")
        if name is None:
            raise _malformed()
        field = Field(filename.decode("utf-8", "replace"), b"".join(self._data))
        if self.fields.setdefault(name.decode("utf-8", "replace"), field) is not field:
            raise ClientError(
                "the form has a duplicate field", param=name.decode("utf-8", "replace")
            )

    def finish(self) -> None:
        self.finished = True


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
