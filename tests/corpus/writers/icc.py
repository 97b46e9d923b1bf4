"""ICC profiles of three primaries and a gamma."""

import struct
from collections.abc import Sequence

XYZ = tuple[float, float, float]

# Columns of the D50-adapted matrix from linear RGB to XYZ of Display P3.
P3: Sequence[XYZ] = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
_WHITE: XYZ = (0.9642, 1.0, 0.8249)


def profile(primaries: Sequence[XYZ] = P3, padding: int = 0) -> bytes:
    """A display profile, version 2.1; a private tag of `padding` bytes makes it large."""
    gamma = b"curv" + struct.pack(">IIHH", 0, 1, round(2.2 * 256), 0)
    text = b"text\0\0\0\0public domain\0\0\0"
    name = b"desc" + struct.pack(">II", 0, 4) + b"odd\0" + bytes(8 + 3 + 67)
    tags = {b"desc": name + bytes(-len(name) % 4), b"cprt": text, b"wtpt": _xyz(_WHITE)}
    tags |= {kind: _xyz(primary) for kind, primary in zip(_COLUMNS, primaries, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma)
    if padding:
        tags[b"ZZZZ"] = b"data" + bytes(padding)
    return _assembled(tags)


_COLUMNS = (b"rXYZ", b"gXYZ", b"bXYZ")


def _xyz(value: XYZ) -> bytes:
    return b"XYZ " + struct.pack(">Iiii", 0, *(round(part * 65536) for part in value))


def _assembled(tags: dict[bytes, bytes]) -> bytes:
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for kind, data in tags.items():
        table += kind + struct.pack(">II", at + len(body), len(data))
        body += data
    size = at + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    dates = struct.pack(">6H", 2024, 1, 1, 0, 0, 0)
    rest = b"acsp" + bytes(28) + struct.pack(">iii", *(round(part * 65536) for part in _WHITE))
    return (head + dates + rest).ljust(128, b"\0") + table + body
