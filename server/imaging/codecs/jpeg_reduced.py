"""Decodes baseline JPEG directly to 1/4 or 1/8 of its size, in half of libjpeg's time.

For a reduced picture, libjpeg spends nearly all of its time on DCT coefficients that the reduced
picture does not show. This decoder reads a block's DC and, for 2x2 samples, its four lowest AC
coefficients, or nine if subsampled chroma needs 4x4; it parses the rest only to find the end of the
block, with several Huffman symbols per table lookup. The coefficients are transformed at the
reduced size. The tests compare the results with libjpeg's: they are about as close to the filtered
whole picture, and closer for 4:2:2, for which libjpeg's chroma is coarse.

The decoder supports only the common case: 8-bit baseline or extended sequential Huffman coding,
greyscale or YCbCr, luma sampled once or twice as often as chroma, one scan. It also fails on damage
to the scan that libjpeg only warns about. The caller passes these files to libjpeg.

The loops are compiled by numba with bounds checks, which cost 3% of the time. In the few functions
in which they would cost much more, one check before the loop covers all of its indices: see
`_checks_ahead`. The code does not rely on the checks: bits are shifted down to the size of the
table that they index, a block's place comes from the header, and the reader's position is checked
after each MCU, while the data is padded by more bytes than an MCU takes. All loops are in this file
because numba's cache checks only whether the file of a cached function has changed, not the files
of the functions that it calls.
"""

import functools
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from PIL import Image

from server.imaging.codecs.jpeg_header import (
    USED_FACTORS,
    Component,
    JpegHeader,
    Unsupported,
    expect,
    parse,
)

log = logging.getLogger("saccade.images")

SCALES = (4, 8)

Bytes = npt.NDArray[np.uint8]
_Blocks = npt.NDArray[np.int16]
_Values = npt.NDArray[np.int32]
_Ints = npt.NDArray[np.int64]
_Symbols = npt.NDArray[np.uint16]
_Samples = npt.NDArray[np.float32]
_Bits = np.uint64
_Function = TypeVar("_Function", bound=Callable[..., Any])

# Conversions for compiled code, with types for mypy.
_int64 = cast("Callable[[Any], int]", np.int64)
_int16 = cast("Callable[[Any], int]", np.int16)

# Bits per table lookup, chosen so that the tables in use fit the first-level cache.
_WINDOW = 12
_TABLE = 1 << _WINDOW
_TO_WINDOW = _Bits(64 - _WINDOW)
_TO_SYMBOL = _Bits(64 - 16)
_ONE, _EIGHT = _Bits(1), _Bits(8)
_EACH_LOW, _EACH_HIGH = _Bits(0x0101010101010101), _Bits(0x8080808080808080)

# The number of coefficients to read, in zigzag order: for 2x2 samples per block, and for 4x4.
_FEW, _TEN = 5, USED_FACTORS
# The advance of the end of a block, and the flag for it in a skip entry.
_END, _END_FLAG = 64, 512
# The advance of a skip entry that one lookup cannot resolve.
_UNRESOLVED = 127
# More bytes than an MCU takes, which is 6 blocks of 64 symbols of 31 bits.
_PADDING = 2048


def _compiled(function: _Function, inline: bool = False, checked: bool = True) -> _Function:
    """Compile `function` to machine code, cached on disk if a folder is writable.

    If `checked`, an index outside its array raises IndexError. NUMBA_BOUNDSCHECK=1 in the
    environment, as in the tests and `tests/fuzz/fuzz_decoders.py`, checks every function.
    """
    options = {"nogil": True, "boundscheck": checked, "forceinline": inline}
    try:
        compiled: _Function = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache is writable
        compiled = numba.njit(**options)(function)
    return compiled


def _inlined(function: _Function) -> _Function:
    """Like `_compiled`, but inlined: calls would cost a seventh of the time."""
    return _compiled(function, inline=True)


def _checks_ahead(function: _Function) -> _Function:
    """Like `_inlined`, but without a check at each index, which would keep LLVM from using vectors
    or wide loads. `function` itself raises IndexError before an access outside its arrays."""
    return _compiled(function, inline=True, checked=False)


# ---------------------------------------------------------------------- tables


class _Tables(NamedTuple):
    """Lookup tables for two DC and two AC Huffman tables, consecutive in each array.

    `symbols` has DC 0, DC 1, AC 0, AC 1, indexed by the next 16 bits: code length << 8 | symbol, or
    0 if there is no symbol. The others are indexed by the next `_WINDOW` bits, and the lowest six
    bits of an entry are the number of bits used.
    `dc` and `ac`: one symbol, value << 16 | advance << 6; 0 if it is too long.
    `head`: all symbols that fit from position 1 on, as 12-bit values << 16 | position << 6.
    `skip`: all symbols that fit, advance << 6, with `_END_FLAG` if the block ends with them.
    """

    dc: _Values
    head: _Ints
    ac: _Values
    skip: _Symbols
    symbols: _Symbols


@_compiled
def _fill_symbols(counts: Bytes, values: Bytes, out: _Symbols) -> bool:
    """Fill the 65536 entries of a table given as in a file; False if its codes are invalid."""
    code, k = 0, 0
    for length in range(1, 17):
        count = _int64(counts[length - 1])
        if count and code + count >= 1 << length:  # also, no code may be all ones
            return False
        span = 1 << (16 - length)
        for _ in range(count):
            out[code * span : (code + 1) * span] = (length << 8) | values[k]
            code += 1
            k += 1
        code <<= 1
    return True


@_compiled
def _extended(bits: int, size: int) -> int:
    """The value that `size` extra bits stand for (ITU-T T.81, F.2.2.1)."""
    return bits - ((1 << size) - 1 if bits < (1 << size >> 1) else 0)


@_compiled
def _split(entry: int) -> tuple[int, int, int]:
    """Code length, run of zeros (that of a DC symbol is 0) and size of an entry of `symbols`."""
    entry = _int64(entry)
    return entry >> 8, (entry >> 4) & 15, entry & 15


@_compiled
def _fill_values(symbols: _Symbols, out: _Values) -> None:
    for window in range(_TABLE):
        length, run, size = _split(symbols[window << (16 - _WINDOW)])
        if length == 0 or length + size > _WINDOW or (size == 0 and 0 < run < 15):
            continue
        value = _extended((window >> (_WINDOW - length - size)) & ((1 << size) - 1), size)
        advance = _END if size == 0 and run == 0 else run + 1
        out[window] = (value << 16) | (advance << 6) | (length + size)


@_compiled
def _head_entry(symbols: _Symbols, bits: int) -> int:
    used, k, values = 0, 1, 0
    while used < _WINDOW and k < _FEW:
        rest = (bits << used) & 0xFFFF
        length, run, size = _split(symbols[rest])
        if length == 0 or length + size > _WINDOW - used or (size == 0 and 0 < run < 15):
            break
        used += length + size
        if size == 0 and run == 0:
            k = _END + 1
            break
        k += run + 1
        if k <= _FEW:
            value = _extended((rest >> (16 - length - size)) & ((1 << size) - 1), size)
            values |= (value & 0xFFF) << (16 + 12 * (k - 2))
    return values | k << 6 | used


@_compiled
def _skip_entry(symbols: _Symbols, bits: int) -> int:
    used, advance = 0, 0
    while used < _WINDOW:  # the last symbol's extra bits may be beyond the window
        length, run, size = _split(symbols[(bits << used) & 0xFFFF])
        if length == 0 or length > _WINDOW - used:
            break
        if size == 0 and run == 0:
            return (_END_FLAG | advance) << 6 | (used + length)
        if size == 0 and run < 15:
            break
        used += length + size
        advance += run + 1
    return (advance if used else _UNRESOLVED) << 6 | used


@_compiled
def _fill_ac(symbols: _Symbols, head: _Ints, skip: _Symbols) -> None:
    for window in range(_TABLE):
        head[window] = _head_entry(symbols, window << (16 - _WINDOW))
        skip[window] = _skip_entry(symbols, window << (16 - _WINDOW))


@functools.lru_cache(maxsize=4)  # 0.7 MB each; a camera uses one set for all pictures
def _lookups(huffman: tuple[tuple[int, bytes], ...]) -> _Tables:
    """Lookups for tables given as (class << 4 | number, counts and values).

    A table that is not in the file has no valid symbols, and no entries that neither use bits nor
    advance.
    """
    tables = _Tables(
        dc=np.zeros(2 * _TABLE, np.int32),
        head=np.full(2 * _TABLE, 1 << 6, np.int64),
        ac=np.zeros(2 * _TABLE, np.int32),
        skip=np.full(2 * _TABLE, _UNRESOLVED << 6, np.uint16),
        symbols=np.zeros(4 << 16, np.uint16),
    )
    for selector, table in huffman:
        is_ac, number = bool(selector >> 4), selector & 15
        place = slice(number * _TABLE, (number + 1) * _TABLE)
        symbols = tables.symbols[(2 * is_ac + number) << 16 :][: 1 << 16]
        codes = np.frombuffer(table, np.uint8)
        expect(_fill_symbols(codes[:16], codes[16:], symbols))
        _fill_values(symbols, (tables.ac if is_ac else tables.dc)[place])
        if is_ac:
            _fill_ac(symbols, tables.head[place], tables.skip[place])
    return tables


# ---------------------------------------------------------------------- bits


class _Reader(NamedTuple):
    """The unread data: the first `valid` bits of `bits`, then the bytes from `at` on."""

    at: _Bits
    bits: _Bits
    valid: _Bits


@_checks_ahead
def _word(data: Bytes, at: _Bits) -> _Bits:
    """Eight bytes as one number. As one expression, LLVM compiles it to one load."""
    if at + _EIGHT > _Bits(len(data)):
        raise IndexError
    return (
        (_Bits(data[at]) << _Bits(56))
        | (_Bits(data[at + _Bits(1)]) << _Bits(48))
        | (_Bits(data[at + _Bits(2)]) << _Bits(40))
        | (_Bits(data[at + _Bits(3)]) << _Bits(32))
        | (_Bits(data[at + _Bits(4)]) << _Bits(24))
        | (_Bits(data[at + _Bits(5)]) << _Bits(16))
        | (_Bits(data[at + _Bits(6)]) << _Bits(8))
        | _Bits(data[at + _Bits(7)])
    )


@_compiled
def _next_ff(data: Bytes, at: _Bits) -> _Bits:
    """The offset of the next byte 255, or the length of the data if there is none."""
    end = _Bits(len(data))
    while at + _EIGHT <= end:
        word = _word(data, at)
        if (~word - _EACH_LOW) & word & _EACH_HIGH:
            break
        at += _EIGHT
    while at < end and data[at] != 255:
        at += _ONE
    return at


@_checks_ahead
def _copy(data: Bytes, at: _Bits, out: Bytes, to: _Bits, size: _Bits) -> None:
    if at + size > _Bits(len(data)) or to + size > _Bits(len(out)):
        raise IndexError
    for i in range(size):
        out[to + i] = data[at + i]


@_compiled
def _unstuff(data: Bytes, out: Bytes, ends: _Ints) -> bool:
    """Copy the scan without stuffed zeros and markers, and write the end of each interval to
    `ends`.

    Returns False unless there are exactly `len(ends)` intervals, with restart markers in order
    between them and EOI behind the last one.
    """
    at, to, interval = _Bits(0), _Bits(0), 0
    while True:
        found = _next_ff(data, at)
        if found + _ONE >= _Bits(len(data)):
            return False
        marker = data[found + _ONE]
        size = found - at + _Bits(marker == 0)
        _copy(data, at, out, to, size)
        to += size
        at = found + _Bits(2)
        if marker == 0:
            continue
        ends[interval] = to
        interval += 1
        if interval == len(ends):
            return bool(marker == 0xD9)
        if marker != 0xD0 + ((interval - 1) & 7):
            return False


@_inlined
def _refilled(data: Bytes, reader: _Reader) -> _Reader:
    """The reader with at least 56 valid bits; bits beyond the valid ones are correct or 0."""
    at, bits, valid = reader
    bits |= _word(data, at) >> valid
    return _Reader(at + ((_Bits(63) - valid) >> _Bits(3)), bits, valid | _Bits(56))


@_inlined
def _dropped(reader: _Reader, used: _Bits) -> _Reader:
    return _Reader(reader.at, reader.bits << used, reader.valid - used)


@_compiled
def _ends_at(reader: _Reader, end: int) -> bool:
    """Whether the last used bit is in the byte before `end`."""
    return bool((reader.at * _EIGHT - reader.valid + _Bits(7)) >> _Bits(3) == _Bits(end))


# ---------------------------------------------------------------------- blocks


@_compiled
def _long_value(bits: _Bits, symbols: _Symbols, table: int) -> tuple[_Bits, int, int]:
    """Bits used (0: no valid symbol), advance and value of the next symbol of any length."""
    length, run, size = _split(symbols[(_Bits(table) << _Bits(16)) | (bits >> _TO_SYMBOL)])
    if length == 0 or (size == 0 and 0 < run < 15):
        return _Bits(0), 0, 0
    if size == 0:
        return _Bits(length), _END if run == 0 else run + 1, 0
    value = _int64((bits << _Bits(length)) >> _Bits(64 - size))
    return _Bits(length + size), run + 1, _extended(value, size)


@_inlined
def _value(
    bits: _Bits, lookup: _Values, number: int, symbols: _Symbols, table: int
) -> tuple[_Bits, int, int]:
    """Like `_long_value`, usually with one lookup."""
    entry = _int64(lookup[(_Bits(number) << _Bits(_WINDOW)) | (bits >> _TO_WINDOW)])
    if entry:
        return _Bits(entry & 63), (entry >> 6) & 127, entry >> 16
    return _long_value(bits, symbols, table)


@_inlined
def _read_few(
    data: Bytes, reader: _Reader, head: _Ints, number: int, out: _Blocks, row: int, x: int
) -> tuple[_Reader, int]:
    """Write the first AC coefficients of one lookup to `out`; returns the next position too."""
    reader = _refilled(data, reader)
    entry = _int64(head[(_Bits(number) << _Bits(_WINDOW)) | (reader.bits >> _TO_WINDOW)])
    out[row, 1, x] = entry << 36 >> 52
    out[row, 2, x] = entry << 24 >> 52
    out[row, 3, x] = entry << 12 >> 52
    out[row, 4, x] = entry >> 52
    return _dropped(reader, _Bits(entry & 63)), (entry >> 6) & 127


@_inlined
def _skip(
    data: Bytes, reader: _Reader, k: int, skip: _Symbols, symbols: _Symbols, number: int
) -> tuple[_Reader, bool]:
    """Skip from position `k` to the end of the block; False if the block is damaged."""
    table = _Bits(number) << _Bits(_WINDOW)
    while True:
        reader = _refilled(data, reader)
        entry = _int64(skip[table | (reader.bits >> _TO_WINDOW)])
        k += entry >> 6
        if k > 63:
            break
        reader = _dropped(reader, _Bits(entry & 63))
        entry = _int64(skip[table | (reader.bits >> _TO_WINDOW)])  # at least 29 bits are left
        k += entry >> 6
        if k > 63:
            break
        reader = _dropped(reader, _Bits(entry & 63))
    if k == 64 or _END_FLAG <= k <= _END_FLAG + 63:
        return _dropped(reader, _Bits(entry & 63)), True
    return _skip_singly(data, reader, k - (entry >> 6), symbols, number)


@_compiled
def _skip_singly(
    data: Bytes, reader: _Reader, k: int, symbols: _Symbols, number: int
) -> tuple[_Reader, bool]:
    """Like `_skip`, symbol by symbol: for lookups beyond the end of the block, and long codes."""
    while k < 64:
        reader = _refilled(data, reader)
        used, advance, _ = _long_value(reader.bits, symbols, 2 + number)
        if used == 0:
            return reader, False
        reader = _dropped(reader, used)
        if advance == _END:
            return reader, True
        k += advance
    return reader, k == 64


@_compiled
def _read_mcus(
    data: Bytes,
    reader: _Reader,
    tables: _Tables,
    layout: _Ints,
    columns: tuple[int, int, int],
    predicted: _Ints,
    out: _Blocks,
) -> tuple[_Reader, bool]:
    """Read the MCUs from `columns[0]` to `columns[1]`; False if one is damaged or ends beyond byte
    `columns[2]`."""
    dc, head, ac, skip, symbols = tables
    for column in range(columns[0], columns[1]):
        for b in range(len(layout)):
            row, step, offset, dc_number, ac_number, last = layout[b]
            x = column * step + offset
            reader = _refilled(data, reader)
            used, _, value = _value(reader.bits, dc, dc_number, symbols, dc_number)
            reader, k, ok = _dropped(reader, used), 1, bool(used > 0)
            predicted[row >> 1] += value
            out[row, 0, x] = predicted[row >> 1]
            if last:
                reader, k = _read_few(data, reader, head, ac_number, out, row, x)
            while k < last and ok:
                reader = _refilled(data, reader)
                used, advance, value = _value(reader.bits, ac, ac_number, symbols, 2 + ac_number)
                reader, k, ok = _dropped(reader, used), k + advance, bool(used > 0)
                if k <= last:
                    out[row, k - 1, x] = value
            if ok and k <= 64:
                reader, ok = _skip(data, reader, k, skip, symbols, ac_number)
            if not ok:
                return reader, False
        if reader.at > _Bits(columns[2]):
            return reader, False
    return reader, True


# ---------------------------------------------------------------------- samples

# The vertical frequencies of the coefficients, in zigzag order.
_DOWN = np.array([0, 0, 1, 2, 1, 0, 0, 1, 2, 3])


def _harmonics() -> _Samples:
    """The DCT's cosines by samples per block, frequency and sample: see `_HARMONIC`.

    Each one is the mean over the part of the block that the sample covers. A truncated DCT, without
    the mean, aliases more than libjpeg if pictures are not shrunk further.
    """
    cosine = np.cos(np.outer(np.arange(4), 2 * np.arange(8) + 1) * np.pi / 16)
    cosine[1:] *= np.sqrt(2)
    harmonics = np.zeros((5, 4, 4), np.float32)
    for n in (1, 2, 4):
        harmonics[n, :, :n] = cosine.reshape(4, n, 8 // n).mean(axis=2)
    return harmonics


_HARMONIC = _harmonics()


@_inlined
def _has(block: _Blocks, coefficients: int, columns: int) -> bool:
    return bool(block.shape[0] >= coefficients and block.shape[1] >= columns)


@_checks_ahead
def _fill_line_of_few(block: _Blocks, weights: _Samples, n: int, out: _Samples) -> None:
    """Compute one line of samples through a row of blocks, with `n` (1 or 2) samples per block."""
    if not (1 <= n <= 2 and len(weights) >= _FEW and _has(block, _FEW, len(out) // n)):
        raise IndexError
    near = _HARMONIC[n, 1, 0]
    for j in range(len(out) // n):
        even = np.float32(block[0, j]) * weights[0] + np.float32(block[2, j]) * weights[2]
        if n == 1:
            out[j] = even
        else:
            odd = np.float32(block[1, j]) * weights[1] + np.float32(block[4, j]) * weights[4]
            out[2 * j] = even + odd * near
            out[2 * j + 1] = even - odd * near


@_checks_ahead
def _fill_line_of_ten(block: _Blocks, weights: _Samples, n: int, out: _Samples) -> None:
    """Like `_fill_line_of_few`, with ten coefficients and for `n` of 2 or 4."""
    if not (2 <= n <= 4 and len(weights) >= _TEN and _has(block, _TEN, len(out) // n)):
        raise IndexError
    near, far = _HARMONIC[n, :, 0], _HARMONIC[n, :, 1]
    for j in range(len(out) // n):
        first = np.float32(block[0, j]) * weights[0] + np.float32(block[2, j]) * weights[2]
        first += np.float32(block[3, j]) * weights[3] + np.float32(block[9, j]) * weights[9]
        second = np.float32(block[1, j]) * weights[1] + np.float32(block[4, j]) * weights[4]
        second += np.float32(block[8, j]) * weights[8]
        third = np.float32(block[5, j]) * weights[5] + np.float32(block[7, j]) * weights[7]
        fourth = np.float32(block[6, j]) * weights[6]
        even, odd = first + third * near[2], second * near[1] + fourth * near[3]
        out[n * j] = even + odd
        out[n * j + n - 1] = even - odd
        if n == 4:
            even, odd = first + third * far[2], second * far[1] + fourth * far[3]
            out[4 * j + 1] = even + odd
            out[4 * j + 2] = even - odd


@_compiled
def _byte(sample: Any) -> Any:
    return np.uint8(min(max(sample, np.float32(0)), np.float32(255)))


@_checks_ahead
def _fill_rgb(luma: _Samples, blue: _Samples, red: _Samples, out: Bytes) -> None:
    """Convert YCbCr, centred on zero, to RGB by JFIF's formula (ITU-T T.871, 7)."""
    if min(len(luma), len(blue), len(red)) < len(out) // 3:
        raise IndexError
    for x in range(len(out) // 3):
        y = luma[x] + np.float32(128.5)
        out[3 * x] = _byte(y + np.float32(1.402) * red[x])
        out[3 * x + 1] = _byte(y - np.float32(0.344136) * blue[x] - np.float32(0.714136) * red[x])
        out[3 * x + 2] = _byte(y + np.float32(1.772) * blue[x])


@_checks_ahead
def _fill_grey(luma: _Samples, out: Bytes) -> None:
    if len(luma) < len(out):
        raise IndexError
    for x in range(len(out)):
        out[x] = _byte(luma[x] + np.float32(128.5))


@_compiled
def _fill_rows(
    blocks: _Blocks, planes: _Ints, scales: _Samples, mcu_row: int, lines: _Samples, out: Bytes
) -> None:
    """Compute the picture's lines for one row of MCUs."""
    per_mcu = planes[0, 1] * planes[0, 3]
    for i in range(min(per_mcu, len(out) - mcu_row * per_mcu)):
        for c in range(len(planes)):
            h, _, across, down = planes[c]
            block = blocks[2 * c + i // down]
            line = lines[c, : h * across * (block.shape[1] // 2)]
            weights = scales[c] * _HARMONIC[down][:, i % down][_DOWN]
            if max(across, down) < 4:
                _fill_line_of_few(block, weights, across, line)
            else:
                _fill_line_of_ten(block, weights, across, line)
        if len(planes) == 1:
            _fill_grey(lines[0], out[mcu_row * per_mcu + i])
        else:
            _fill_rgb(lines[0], lines[1], lines[2], out[mcu_row * per_mcu + i])


@_compiled
def _decode_scan(
    data: Bytes,
    ends: _Ints,
    tables: _Tables,
    layout: _Ints,
    planes: _Ints,
    scales: _Samples,
    mcus: tuple[int, int, int],
    out: Bytes,
) -> bool:
    """Decode unstuffed `data` into `out`. `mcus` are the MCUs per row, per column and per restart
    interval. Returns False if the data is damaged."""
    across, down, interval = mcus
    blocks = np.zeros((2 * len(planes), _TEN, 2 * across), np.int16)
    lines = np.empty((3, 4 * across), np.float32)
    predicted = np.zeros(len(planes), np.int64)
    reader = _Reader(_Bits(0), _Bits(0), _Bits(0))
    segment, left = 0, interval
    for row in range(down):
        blocks[:, _FEW:] = 0
        column = _int64(0)  # a literal has another type, for which numba would compile again
        while column < across:
            if left == 0:
                if not _ends_at(reader, ends[segment]):
                    return False
                reader = _Reader(_Bits(ends[segment]), _Bits(0), _Bits(0))
                predicted[:] = 0
                segment, left = segment + 1, interval
            stop = min(across, column + left)
            columns = (column, stop, ends[-1] + 8)
            reader, ok = _read_mcus(data, reader, tables, layout, columns, predicted, blocks)
            if not ok:
                return False
            left -= stop - column
            column = stop
        _fill_rows(blocks, planes, scales, row, lines, out)
    return _ends_at(reader, ends[-1])


# ---------------------------------------------------------------------- the picture


def decode(data: bytes, scale: int) -> Bytes | None:
    """Decode a JPEG at 1/`scale` of its size; None if the file or the scale is not supported.

    Returns uint8, RGB (height, width, 3) or grey (height, width), with sides divided by `scale` and
    rounded up, like libjpeg. EXIF orientation is not applied. Files with visible damage also return
    None, so the caller decodes those with libjpeg. The caller limits the size of the picture: a
    byte can encode four blocks, which are 256 pixels.
    """
    try:
        expect(scale in SCALES)
        return _decode(data, parse(data), scale)
    except Unsupported:
        return None


def _decode(data: bytes, header: JpegHeader, scale: int) -> Bytes:
    (width, height), components = header.size, header.components
    h, v = components[0].h, components[0].v
    across, down = -(-width // (8 * h)), -(-height // (8 * v))
    interval = header.interval or max(1, across * down)
    _check_plausible(header, across * down, interval, len(data))
    scan = np.frombuffer(data, np.uint8, offset=header.scan)
    ends = np.empty(-(-across * down // interval), np.int64)
    clean = np.empty(len(scan) + _PADDING, np.uint8)
    expect(_unstuff(scan, clean, ends))
    clean[ends[-1] : ends[-1] + _PADDING] = 0
    planes = np.array(
        [(c.h, c.v, 8 // scale * h // c.h, 8 // scale * v // c.v) for c in components], np.int64
    )
    scales = np.stack([header.quantisers[c.quantiser] for c in components]) / np.float32(8)
    channels = len(components)
    out = np.empty((-(-height // scale), -(-width // scale) * channels), np.uint8)
    layout, mcus = _layout(components, planes), (across, down, interval)
    tables = _lookups(header.huffman)
    expect(_decode_scan(clean, ends, tables, layout, planes, scales, mcus, out))
    return out.reshape(len(out), -1, channels) if channels > 1 else out


def _check_plausible(header: JpegHeader, mcus: int, interval: int, length: int) -> None:
    """Raise Unsupported, before memory is allocated, if the file is too short for its header."""
    blocks = mcus * sum(c.h * c.v for c in header.components)
    expect(0 < 2 * blocks <= 8 * length)  # a block has at least two symbols
    expect(3 * (mcus // interval) <= length)  # a restart interval has at least a byte and a marker
    expect(all(c.quantiser in header.quantisers for c in header.components))


def _layout(components: list[Component], planes: _Ints) -> _Ints:
    """The blocks of an MCU, in order: row of coefficients, columns per MCU, column in the MCU, the
    numbers of the two tables, the number of coefficients to read (0: only DC)."""
    wanted = {1: 0, 2: _FEW, 4: _TEN}
    return np.array(
        [
            (2 * i + y, c.h, x, *c.tables, wanted[max(planes[i, 2:])])
            for i, c in enumerate(components)
            for y in range(c.v)
            for x in range(c.h)
        ],
        np.int64,
    )


# ---------------------------------------------------------------------- the check

# The largest mean difference, of 255, from libjpeg's picture reduced afterwards, on smooth waves.
_LIKENESS = 3.0
# More than there are functions to compile.
_MOST_FAILURES_TO_CACHE = 100


def agrees_with_libjpeg() -> bool:
    """Whether small test pictures are like libjpeg's, in every sampling and scale.

    Call it once before workers are forked: it compiles or loads everything that `decode` needs.
    """
    for left in reversed(range(_MOST_FAILURES_TO_CACHE)):
        try:
            return all(_is_alike(file, scale) for file in _waves() for scale in SCALES)
        except Exception as error:  # from numba or LLVM; the server works without this decoder
            # On a full disk, numba compiles a function and then fails to cache it.
            if not isinstance(error, OSError) or not left:
                log.exception("failed to set up the reduced JPEG decoder; using libjpeg instead")
                break
    return False


def _is_alike(file: bytes, scale: int) -> bool:
    ours = decode(file, scale)
    whole = Image.open(io.BytesIO(file), formats=("JPEG",))
    theirs = np.asarray(whole.reduce(scale), np.float32)
    if ours is None or ours.shape != theirs.shape:
        return False
    return float(np.abs(ours - theirs).mean()) < _LIKENESS


def _waves() -> Iterator[bytes]:
    """JPEG files of a picture whose sides are not multiples of 8, in grey and in each sampling."""
    y, x = np.mgrid[:45, :67]
    waves = [127 + 90 * np.sin(x / a + y / b) for a, b in ((29, 17), (21, -25), (-36, 13))]
    image = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
    for mode, subsampling in (("L", 0), ("RGB", 0), ("RGB", 1), ("RGB", 2)):
        file = io.BytesIO()
        options = {"quality": 95, "subsampling": subsampling, "restart_marker_blocks": 5}
        image.convert(mode).save(file, "JPEG", **options)
        yield file.getvalue()
