"""An entry as it lies on a disk or in a store: a safetensors file with one tensor, `embedding`.

The metadata of the file names the entry's key and the BLAKE3 hash of its data. Whoever reads one
checks both and the tensor's type and shape: what is damaged, or is not what its name says, is not
used. Nothing is unpickled.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

_TENSOR = "embedding"
_LENGTH = struct.Struct("<Q")
LENGTH_BYTES = _LENGTH.size
# A header as `head` writes it has some 300 bytes.
MAX_HEADER_BYTES = 4096
MAX_HEAD_BYTES = LENGTH_BYTES + MAX_HEADER_BYTES

_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


class DamagedEntry(Exception):
    """The data is not the entry that was asked for."""


@dataclass(frozen=True, slots=True)
class Spec:
    """The tensor of an entry: `rows` embeddings of `width` numbers; `dtype` as safetensors has it
    ("F32")."""

    dtype: str
    rows: int
    width: int

    @property
    def nbytes(self) -> int:
        return _ITEM_BYTES[self.dtype] * self.rows * self.width


def checksum(data: Sequence[memoryview]) -> str:
    """The BLAKE3 hash of the pieces of an entry, in hexadecimal digits."""
    hasher = blake3()
    for piece in data:
        hasher.update(piece)
    return hasher.hexdigest()


def head(key: str, spec: Spec, digest: str) -> bytes:
    """What stands before the data: the length of the header and the header."""
    header = json.dumps(
        {
            "__metadata__": {"key": key, "blake3": digest},
            _TENSOR: {
                "dtype": spec.dtype,
                "shape": [spec.rows, spec.width],
                "data_offsets": [0, spec.nbytes],
            },
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    return _LENGTH.pack(len(header)) + header


def header_length(start: bytes | memoryview) -> int:
    """The length of the header, from the first bytes of an entry.

    Raises:
        DamagedEntry
    """
    if len(start) < LENGTH_BYTES:
        raise DamagedEntry("the entry is too short")
    (length,) = _LENGTH.unpack_from(start)
    if not 0 < length <= MAX_HEADER_BYTES:
        raise DamagedEntry("the header has no possible length")
    return int(length)


def check_head(header: bytes, key: str, spec: Spec) -> str:
    """The hash that the data must have, if `header` is that of the entry `key`.

    Raises:
        DamagedEntry
    """
    try:
        document = json.loads(header)
        metadata, tensor = document["__metadata__"], document[_TENSOR]
        found = metadata["key"], tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        digest = metadata["blake3"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedEntry("the header cannot be read") from None
    if found != (key, spec.dtype, [spec.rows, spec.width], [0, spec.nbytes]):
        raise DamagedEntry("the entry is another one")
    return str(digest)


def check_data(data: Sequence[memoryview], digest: str) -> None:
    """Raises DamagedEntry if `data` does not have the hash `digest`."""
    if checksum(data) != digest:
        raise DamagedEntry("the data is damaged")
