"""Reads `multipart/form-data` (RFC 7578): forms with a file, whole and bounded."""

from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.errors import ClientError

# What a form may have beside its file, in bytes: boundaries, headers and the other fields.
MAX_OVERHEAD_BYTES = 64 * 1024
_MAX_FIELDS = 32


@dataclass(frozen=True)
class Field:
    """`filename` is the client's, "" if it gave none."""

    filename: str
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


def read_form(content_type: str, body: bytes) -> dict[str, Field]:
    """The fields of a form by name. Takes time and as much memory as `body`.

    Raises:
        ClientError: not a form, a damaged one, or one with too many fields.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise ClientError("the body must be multipart/form-data, with a boundary")
    # What the parser would go through byte by byte is left out, so that its steps are bounded.
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
    """What the parser finds in `body`: it is given the body at once, and tells positions."""

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
            raise ClientError("the form has a field twice", param=name.decode("utf-8", "replace"))

    def finish(self) -> None:
        self.finished = True


def _malformed() -> ClientError:
    return ClientError("the body is not valid multipart/form-data")
