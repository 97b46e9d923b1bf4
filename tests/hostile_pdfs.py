"""Small PDF files that are damaged, contradictory, or take a renderer long."""

import struct
import zlib
from collections.abc import Mapping

_HEADER = b"%PDF-1.7\n"
_CATALOG = b"<< /Type /Catalog /Pages 2 0 R >>"


def build(objects: Mapping[int, bytes], trailer: bytes = b"", size: int | None = None) -> bytes:
    """A PDF file of `objects`, by their numbers, with a cross-reference table; object 1 is the
    catalog. `trailer` has more entries, and `size` replaces the number of objects."""
    body = bytearray(_HEADER)
    places = {}
    for number, content in objects.items():
        places[number] = len(body)
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start, count = len(body), max(objects) + 1
    body += b"xref\n0 %d\n0000000000 65535 f \n" % count
    for number in range(1, count):
        free = b"0000000000 65535 f \n"
        body += b"%010d 00000 n \n" % places[number] if number in places else free
    body += b"trailer\n<< /Size %d /Root 1 0 R %s >>\n" % (size or count, trailer)
    return bytes(body + b"startxref\n%d\n%%%%EOF\n" % start)


def stream(content: bytes, entries: bytes = b"") -> bytes:
    """A stream object."""
    packed = zlib.compress(content)
    return b"<< /Length %d /Filter /FlateDecode %s >>\nstream\n%s\nendstream" % (
        len(packed),
        entries,
        packed,
    )


def page(
    entries: bytes = b"/MediaBox [0 0 100 80]", *, content: bytes = b"", **more: bytes
) -> bytes:
    """A PDF of one page with `entries`. `content` draws it; `more` are further objects, by
    "o" and their number from 5 on."""
    objects = {
        1: _CATALOG,
        2: b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        3: b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R %s >>" % entries,
        4: stream(content),
    }
    return build(objects | {int(name[1:]): value for name, value in more.items()})


def tree(root: bytes, *others: bytes) -> bytes:
    """A PDF with the page tree `root` (object 2) and `others` (objects from 3 on)."""
    return build({1: _CATALOG, 2: root} | dict(enumerate(others, 3)))


# ---------------------------------------------------------------------- long to render

_BOX = b"/MediaBox [0 0 612 792]"


def nested_forms(levels: int = 6, fan: int = 10) -> bytes:
    """Each form draws the next one `fan` times."""
    first = b"/MediaBox [0 0 612 792] /Resources << /XObject << /F 5 0 R >> >>"
    calls = b"/F Do " * fan
    objects = {}
    for level in range(levels):
        resources = b"/Resources << /XObject << /F %d 0 R >> >>" % (6 + level)
        last = level == levels - 1
        objects[f"o{5 + level}"] = stream(
            b"0 0 1 rg 10 10 100 100 re f" if last else calls,
            b"/Type /XObject /Subtype /Form /BBox [0 0 612 792] " + (b"" if last else resources),
        )
    return page(first, content=calls, **objects)


def tiny_tiles(step: bytes = b".001") -> bytes:
    """A page filled with a tiling pattern of tiny steps."""
    pattern = stream(
        b"1 0 0 rg 0 0 1 1 re f",
        b"/Type /Pattern /PatternType 1 /PaintType 1 /TilingType 1 /BBox [0 0 5 5] "
        b"/XStep %s /YStep %s /Resources << >>" % (step, step),
    )
    entries = _BOX + b" /Resources << /Pattern << /P 5 0 R >> >>"
    return page(entries, content=b"/Pattern cs /P scn 0 0 612 792 re f", o5=pattern)


def many_paths(count: int = 1_000_000) -> bytes:
    """A page with `count` filled rectangles."""
    return page(_BOX, content=b"0 0 600 700 re f\n" * count)


def many_segments(count: int = 2_000_000) -> bytes:
    """A page with one path of `count` curves."""
    return page(_BOX, content=b"0 0 m " + b"600 700 0 700 600 0 c\n" * count + b"f*")


def many_shadings(count: int = 100_000) -> bytes:
    """A page painted `count` times with a shading."""
    shading = (
        b"<< /ShadingType 3 /ColorSpace /DeviceRGB /Coords [300 300 0 300 300 600] "
        b"/Extend [true true] /Function << /FunctionType 2 /Domain [0 1] /C0 [1 0 0] "
        b"/C1 [0 0 1] /N 1.3 >> >>"
    )
    entries = _BOX + b" /Resources << /Shading << /S 5 0 R >> >>"
    return page(entries, content=b"/S sh\n" * count, o5=shading)


def transparent_groups(count: int = 20_000) -> bytes:
    """A page with `count` transparency groups, each as large as the page."""
    group = stream(
        b"0 0 612 792 re f",
        b"/Type /XObject /Subtype /Form /BBox [0 0 612 792] /Group << /S /Transparency /I true >>",
    )
    state = b"<< /Type /ExtGState /ca .5 /BM /Luminosity >>"
    entries = _BOX + b" /Resources << /XObject << /F 5 0 R >> /ExtGState << /G 6 0 R >> >>"
    return page(entries, content=b"/G gs\n" + b"/F Do\n" * count, o5=group, o6=state)


def large_picture(side: int = 30_000, times: int = 1) -> bytes:
    """A page with a picture of `side` x `side` pixels, drawn `times` times."""
    packed = _repeated(0, 3 * side * side)
    picture = (
        b"<< /Type /XObject /Subtype /Image /Width %d /Height %d /BitsPerComponent 8 "
        b"/ColorSpace /DeviceRGB /Filter /FlateDecode /Length %d >>\nstream\n%s\nendstream"
    ) % (side, side, len(packed), packed)
    entries = _BOX + b" /Resources << /XObject << /I 5 0 R >> >>"
    content = b"q 600 0 0 700 0 0 cm /I Do Q\n" * times
    return page(entries, content=content, o5=picture)


def packed_content(nbytes: int = 2_000_000_000) -> bytes:
    """A page whose content unpacks to `nbytes` blanks."""
    twice = zlib.compress(_repeated(ord(" "), nbytes), 9)
    content = b"<< /Length %d /Filter [/FlateDecode /FlateDecode] >>\nstream\n%s\nendstream" % (
        len(twice),
        twice,
    )
    return build(
        {
            1: _CATALOG,
            2: b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            3: b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /MediaBox [0 0 100 80] >>",
            4: content,
        }
    )


SLOW = {
    "nested forms": nested_forms,
    "fan of ten levels": lambda: nested_forms(9),
    "tiny tiles": tiny_tiles,
    "many paths": many_paths,
    "one long path": many_segments,
    "many shadings": many_shadings,
    "transparent groups": transparent_groups,
    "large picture": large_picture,
    "large picture, often": lambda: large_picture(5000, 2000),
    "packed content": packed_content,
}

# ---------------------------------------------------------------------- contradictory

_KID = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 80] >>"


def _boxes() -> dict[str, bytes]:
    """Pages with odd boxes, by name."""
    values = (
        *(b"0 0 1000000000 1000000000", b"0 0 2147483648 2147483648", b"0 0 1e9 1e9"),
        *(b"0 0 -100 -80", b"100 80 0 0", b"0 0 0 0", b"0 0 100 0", b"0 0 .0001 .0001"),
        *(b"0 0 nan nan", b"0 0 inf inf", b"0 0 99999999999999999999999 1", b"0 0 100", b""),
        *(b"-2147483648 -2147483648 2147483647 2147483647", b"(a) (b) (c) (d)", b"0 0 5 0 R 80"),
        *(b"1e38 1e38 2e38 2e38", b"-3e38 -3e38 3e38 3e38", b"0 0 100 1e-40", b"0 0 1 3000000"),
    )
    found = {f"MediaBox {value.decode()}": b"/MediaBox [%s]" % value for value in values}
    for name in (b"CropBox", b"BleedBox", b"TrimBox", b"ArtBox"):
        for value in (b"200 200 300 300", b"0 0 1e9 1e9", b"50 40 50 40", b"null"):
            text = f"{name.decode()} {value.decode()}"
            found[text] = b"/MediaBox [0 0 100 80] /%s [%s]" % (name, value)
    for rotate in (b"45", b"90", b"-90", b"2147483647", b"-2147483648", b"1e30", b"(x)", b"3 0 R"):
        found[f"Rotate {rotate.decode()}"] = b"/MediaBox [0 0 100 80] /Rotate " + rotate
    for unit in (b"0", b"-1", b"1e30", b"75000", b"nan"):
        found[f"UserUnit {unit.decode()}"] = b"/MediaBox [0 0 100 80] /UserUnit " + unit
    found["no box"] = b""
    found["box that is not an array"] = b"/MediaBox /A4"
    found["box in a loop"] = b"/MediaBox 3 0 R"
    return {name: page(entries) for name, entries in found.items()}


def _trees() -> dict[str, bytes]:
    """Odd page trees, by name."""
    deep = [
        b"<< /Type /Pages /Parent %d 0 R /Kids [%d 0 R] /Count 1 >>" % (number - 1, number + 1)
        for number in range(3, 3003)
    ]
    root = b"<< /Type /Pages /Kids [3 0 R] /Count %s >>"
    return {
        "page tree loop": tree(b"<< /Type /Pages /Kids [2 0 R] /Count 1 >>"),
        "page tree loop of two": tree(root % b"1", b"<< /Type /Pages /Kids [2 0 R] /Count 1 >>"),
        "page tree loop, many": tree(b"<< /Type /Pages /Kids [2 0 R 2 0 R 2 0 R] /Count 1000 >>"),
        "page tree loop of parents": tree(root % b"1", b"<< /Type /Page /Parent 3 0 R >>"),
        "deep page tree": tree(root % b"1", *deep, _KID),
        "deep page tree without end": tree(root % b"1", *deep),
        "fan of page trees": tree(
            b"<< /Type /Pages /Count 1000000000 /Kids [%s] >>" % (b"3 0 R " * 1000),
            *(
                b"<< /Type /Pages /Count 1000000 /Kids [%s] >>" % (b"%d 0 R " % n * 1000)
                for n in range(4, 8)
            ),
            _KID,
        ),
        **{
            f"count {count.decode()}": tree(root % count, _KID)
            for count in (
                b"0",
                b"-1",
                b"2",
                b"2147483647",
                b"2147483648",
                b"4294967297",
                b"1e9",
                b"1048576",
                b"(x)",
                b"3 0 R",
                b"9 0 R",
            )
        },
        "kids of one page twice": tree(b"<< /Type /Pages /Kids [3 0 R 3 0 R] /Count 2 >>", _KID),
        "kids that are not an array": tree(b"<< /Type /Pages /Kids 3 0 R /Count 1 >>", _KID),
        "kids that are missing": tree(b"<< /Type /Pages /Kids [9 0 R] /Count 1 >>", _KID),
        "kids of numbers": tree(b"<< /Type /Pages /Kids [1 2 3] /Count 3 >>", _KID),
        "kid without type": tree(root % b"1", b"<< /Parent 2 0 R /MediaBox [0 0 100 80] >>"),
        "kid that is the catalog": tree(b"<< /Type /Pages /Kids [1 0 R] /Count 1 >>", _KID),
        "no pages": build({1: b"<< /Type /Catalog >>"}),
        "pages that are a number": build({1: b"<< /Type /Catalog /Pages 7 >>"}),
        "catalog that is a number": build({1: b"7"}),
    }


def _references() -> dict[str, bytes]:
    """Odd cross-references, trailers and streams, by name."""
    good = page(content=b"0 0 50 40 re f")
    start = good.rindex(b"startxref")
    kids = {1: _CATALOG, 2: b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>", 3: _KID}
    loop = good[:start] + b"startxref\n"
    encrypt = b"/Encrypt << /Filter /Standard /V 2 /R 3 /Length 128 /P -4 /O <%s> /U <%s> >>" % (
        b"41" * 32,
        b"42" * 32,
    )
    box = b"/MediaBox [0 0 100 80] /Contents %s"
    return {
        "cross-references that are their own predecessors": build(kids, b"/Prev 9"),
        "predecessor in a loop": good.replace(
            b"/Root 1 0 R", b"/Root 1 0 R /Prev %d" % good.index(b"xref")
        ),
        "predecessor beyond the end": build(kids, b"/Prev 99999999999"),
        "start of cross-references at 0": loop + b"0\n%%EOF\n",
        "start of cross-references beyond the end": loop + b"99999999999\n%%EOF\n",
        "size of 2**31": build(kids, size=2**31),
        "size of 1": build(kids, size=1),
        "size of 4194304": build(kids, size=4_194_304),
        "root in a loop": build({1: b"1 0 R"}),
        "objects in a loop": build({1: b"2 0 R", 2: b"1 0 R"}),
        "encrypted": build(kids, encrypt + b" /ID [<00> <00>]"),
        "encryption in a loop": build(kids, b"/Encrypt 4 0 R"),
        "encryption of unknown kind": build(kids, b"/Encrypt << /Filter /Foo /V 99 >>"),
        "contents in a loop": page(b"/MediaBox [0 0 100 80]").replace(
            b"/Contents 4 0 R", b"/Contents 3 0 R"
        ),
        "contents that are missing": page(box % b"99 0 R").replace(b"/Contents 4 0 R ", b""),
        "contents of an array in a loop": page(box % b"5 0 R", o5=b"[5 0 R 5 0 R]").replace(
            b"/Contents 4 0 R ", b""
        ),
        "length in a loop": build(
            kids
            | {
                3: b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /MediaBox [0 0 9 9] >>",
                4: b"<< /Length 4 0 R >>\nstream\n0 0 5 5 re f\nendstream",
            }
        ),
        "length of 2**31": build(
            kids
            | {
                3: b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /MediaBox [0 0 9 9] >>",
                4: b"<< /Length 2147483648 >>\nstream\n0 0 5 5 re f\nendstream",
            }
        ),
        "many filters": build(
            kids
            | {
                3: b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /MediaBox [0 0 9 9] >>",
                4: b"<< /Length 12 /Filter [%s] >>\nstream\n0 0 5 5 re f\nendstream"
                % (b"/FlateDecode " * 1000),
            }
        ),
        "form that draws itself": page(
            b"/MediaBox [0 0 100 80] /Resources << /XObject << /F 5 0 R >> >>",
            content=b"/F Do",
            o5=stream(
                b"/F Do /F Do",
                b"/Type /XObject /Subtype /Form /BBox [0 0 9 9] "
                b"/Resources << /XObject << /F 5 0 R >> >>",
            ),
        ),
        "deep arrays": page(b"/MediaBox [0 0 100 80] /X " + b"[" * 100_000),
        "deep dictionaries": page(b"/MediaBox [0 0 100 80] /X " + b"<< /A " * 100_000),
        "deep states": page(content=b"q " * 1_000_000),
        "deep arrays in the content": page(content=b"[" * 1_000_000),
        "object stream in itself": build(
            kids | {4: stream(b"4 0 << >>", b"/Type /ObjStm /N 1 /First 4 /Extends 4 0 R")}
        ),
        "object stream of 2**31 objects": build(
            kids | {4: stream(b"4 0 << >>", b"/Type /ObjStm /N 2147483647 /First 4")}
        ),
        "form fields in a loop": build(
            kids
            | {
                1: b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] >> >>",
                4: b"<< /FT /Tx /T (a) /Kids [4 0 R] /Parent 4 0 R >>",
            }
        ),
        "name tree in a loop": build(
            kids
            | {
                1: b"<< /Type /Catalog /Pages 2 0 R /Names << /JavaScript 4 0 R >> "
                b"/AcroForm << /Fields [] >> >>",
                4: b"<< /Kids [4 0 R] /Limits [(a) (b)] >>",
            }
        ),
        "only a header": _HEADER,
        "only a trailer": _HEADER + b"trailer << /Root 1 0 R >>",
        "truncated": good[: len(good) // 2],
        "header at the end": b" " * 1000 + good,
        "no end": good[:start],
        "binary": _HEADER + bytes(range(256)) * 10,
    }


def odd() -> dict[str, bytes]:
    """Damaged and contradictory files, by name."""
    return _boxes() | _trees() | _references()


def _repeated(value: int, count: int) -> bytes:
    """A zlib stream of `count` bytes of `value`.

    It repeats one deflated block, because to compress gigabytes would take seconds.
    """
    block = bytes([value]) * (1 << 20)
    deflate = zlib.compressobj(9, wbits=-15)
    whole, rest = divmod(count, len(block))
    repeated = deflate.compress(block) + deflate.flush(zlib.Z_FULL_FLUSH)
    end = deflate.compress(block[:rest]) + deflate.flush()
    # Adler-32: the sum of the bytes after 1, and the sum of these sums.
    low = (1 + count * value) % 65521
    high = (count + value * count * (count + 1) // 2) % 65521
    return b"\x78\xda" + repeated * whole + end + struct.pack(">HH", high, low)
