"""Image files of every supported format and mode."""

import functools
from collections.abc import Callable, Iterator, Mapping

import pillow_heif
from PIL import Image

from tests import pictures


class Files(Mapping[str, bytes]):
    """Files by name. Each is encoded when it is first used: encoding all takes a second."""

    def __init__(self, makers: Mapping[str, Callable[[], bytes]]) -> None:
        self._makers = dict(makers)
        self._files: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        if name not in self._files:
            self._files[name] = self._makers[name]()
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def files(photo: Image.Image) -> Files:
    """`photo` by file format. vLLM's loader reads all but HEIF correctly."""
    return Files(_makers(photo))


def jpegs(photo: Image.Image) -> Files:
    """`photo` as JPEG files of several kinds."""
    return Files(_jpeg_makers(photo))


def _makers(photo: Image.Image) -> dict[str, Callable[[], bytes]]:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(photo.size))
    grey = photo.convert("L")
    few, many = (functools.cache(functools.partial(photo.quantize, n)) for n in (13, 200))
    encode = pictures.encode
    return {
        **_jpeg_makers(photo),
        "png": lambda: encode(photo),
        "png turned": lambda: encode(photo, exif=exif),
        "png 1 bit": lambda: encode(photo.convert("1")),
        "png grey": lambda: encode(grey),
        "png grey alpha": lambda: encode(alpha.convert("LA")),
        "png grey transparent": lambda: encode(grey, transparency=120),
        "png alpha": lambda: encode(alpha),
        "png transparent": lambda: encode(photo, transparency=photo.getpixel((9, 9))),
        "png palette 2": lambda: encode(photo.quantize(2)),
        "png palette 4": lambda: encode(photo.quantize(4)),
        "png palette 13": lambda: encode(few()),
        "png palette 200": lambda: encode(many()),
        "png palette transparent": lambda: encode(many(), transparency=bytes(range(0, 250, 5))),
        "png palette 13 transparent": lambda: encode(few(), transparency=3),
        "png animated": lambda: encode(photo, save_all=True, append_images=[grey.convert("RGB")]),
        "webp": lambda: encode(photo, "WEBP"),
        "webp turned": lambda: encode(photo, "WEBP", exif=exif),
        "webp alpha": lambda: encode(alpha, "WEBP"),
        "webp lossless": lambda: encode(alpha, "WEBP", lossless=True),
        "webp animated": lambda: encode(photo, "WEBP", save_all=True, append_images=[alpha]),
        "gif": lambda: encode(photo, "GIF"),
        "gif transparent": lambda: encode(many(), "GIF", transparency=7),
        "bmp": lambda: encode(photo, "BMP"),
        "bmp palette": lambda: encode(many(), "BMP"),
        "tiff": lambda: encode(photo, "TIFF"),
        "tiff turned": lambda: encode(photo, "TIFF", exif=exif),
        "tiff lzw": lambda: encode(photo, "TIFF", compression="tiff_lzw"),
        "tiff deflate": lambda: encode(photo, "TIFF", compression="tiff_adobe_deflate"),
        "tiff packbits": lambda: encode(photo, "TIFF", compression="packbits"),
        "tiff jpeg": lambda: encode(photo, "TIFF", compression="jpeg"),
        "tiff fax": lambda: encode(photo.convert("1"), "TIFF", compression="group4"),
        "tiff alpha": lambda: encode(alpha, "TIFF"),
        "tiff cmyk": lambda: encode(photo.convert("CMYK"), "TIFF"),
        "tiff palette": lambda: encode(many(), "TIFF"),
        "avif": lambda: encode(photo, "AVIF"),
        "avif alpha": lambda: encode(alpha, "AVIF"),
        "heif": lambda: heif(photo),
        "heif alpha": lambda: heif(alpha),
    }


def _jpeg_makers(photo: Image.Image) -> dict[str, Callable[[], bytes]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    encode, grey = pictures.encode, photo.convert("L")
    return {
        "jpeg": lambda: encode(photo, "JPEG", quality=90),
        "jpeg turned": lambda: encode(photo, "JPEG", quality=90, exif=exif),
        "jpeg 4:4:4": lambda: encode(photo, "JPEG", subsampling="4:4:4"),
        "jpeg 4:2:2": lambda: encode(photo, "JPEG", subsampling="4:2:2", quality=30),
        "jpeg rgb": lambda: encode(photo, "JPEG", keep_rgb=True),
        "jpeg cmyk": lambda: encode(photo.convert("CMYK"), "JPEG"),
        "jpeg grey": lambda: encode(grey, "JPEG"),
        "jpeg progressive": lambda: encode(photo, "JPEG", progressive=True),
        "jpeg restarts": lambda: encode(photo, "JPEG", restart_marker_blocks=7),
    }


def heif(image: Image.Image, **options: object) -> bytes:
    pillow_heif.register_heif_opener()  # only for `save`; the server registers its own
    return pictures.encode(image, "HEIF", quality=90, chroma=444, **options)


def turned(stored: Image.Image, kind: str, orientation: int) -> bytes:
    """A file of `kind` that contains `stored` with the EXIF `orientation`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "HEIF":
        return heif(stored, exif=exif.tobytes())
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    return pictures.encode(stored, kind, exif=exif, **options)
