"""Bit streams."""


def from_text(bits: str, pad: str = "1") -> bytes:
    """Bytes from text of "0" and "1", most significant first, padded with `pad`."""
    bits += pad * (-len(bits) % 8)
    return int(bits or "0", 2).to_bytes(len(bits) // 8)


def lsb_first(fields: list[tuple[int, int]]) -> bytes:
    """Concatenated (value, number of bits) fields, least significant bit first."""
    number = position = 0
    for value, width in fields:
        number |= value << position
        position += width
    return number.to_bytes(-(-position // 8), "little")
