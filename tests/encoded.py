"""Image files of every supported format and mode."""

import pillow_heif
from PIL import Image

from tests import pictures


def files(photo: Image.Image) -> dict[str, bytes]:
    """`photo` by file format. vLLM's loader reads all but HEIF correctly."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(photo.size))
    few, many, grey = photo.quantize(13), photo.quantize(200), photo.convert("L")
    encode = pictures.encode
    return {
        **jpegs(photo),
        "png": encode(photo),
        "png turned": encode(photo, exif=exif),
        "png 1 bit": encode(photo.convert("1")),
        "png grey": encode(grey),
        "png grey alpha": encode(alpha.convert("LA")),
        "png grey transparent": encode(grey, transparency=120),
        "png alpha": encode(alpha),
        "png transparent": encode(photo, transparency=photo.getpixel((9, 9))),
        "png palette 2": encode(photo.quantize(2)),
        "png palette 4": encode(photo.quantize(4)),
        "png palette 13": encode(few),
        "png palette 200": encode(many),
        "png palette transparent": encode(many, transparency=bytes(range(0, 250, 5))),
        "png palette 13 transparent": encode(few, transparency=3),
        "png animated": encode(photo, save_all=True, append_images=[grey.convert("RGB")]),
        "webp": encode(photo, "WEBP"),
        "webp turned": encode(photo, "WEBP", exif=exif),
        "webp alpha": encode(alpha, "WEBP"),
        "webp lossless": encode(alpha, "WEBP", lossless=True),
        "webp animated": encode(photo, "WEBP", save_all=True, append_images=[alpha]),
        "gif": encode(photo, "GIF"),
        "gif transparent": encode(many, "GIF", transparency=7),
        "bmp": encode(photo, "BMP"),
        "bmp palette": encode(many, "BMP"),
        "tiff": encode(photo, "TIFF"),
        "tiff turned": encode(photo, "TIFF", exif=exif),
        "tiff lzw": encode(photo, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode(photo, "TIFF", compression="tiff_adobe_deflate"),
        "tiff packbits": encode(photo, "TIFF", compression="packbits"),
        "tiff jpeg": encode(photo, "TIFF", compression="jpeg"),
        "tiff fax": encode(photo.convert("1"), "TIFF", compression="group4"),
        "tiff alpha": encode(alpha, "TIFF"),
        "tiff cmyk": encode(photo.convert("CMYK"), "TIFF"),
        "tiff palette": encode(many, "TIFF"),
        "avif": encode(photo, "AVIF"),
        "avif alpha": encode(alpha, "AVIF"),
        "heif": heif(photo),
        "heif alpha": heif(alpha),
    }


def jpegs(photo: Image.Image) -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    encode, grey = pictures.encode, photo.convert("L")
    return {
        "jpeg": encode(photo, "JPEG", quality=90),
        "jpeg turned": encode(photo, "JPEG", quality=90, exif=exif),
        "jpeg 4:4:4": encode(photo, "JPEG", subsampling="4:4:4"),
        "jpeg 4:2:2": encode(photo, "JPEG", subsampling="4:2:2", quality=30),
        "jpeg rgb": encode(photo, "JPEG", keep_rgb=True),
        "jpeg cmyk": encode(photo.convert("CMYK"), "JPEG"),
        "jpeg grey": encode(grey, "JPEG"),
        "jpeg progressive": encode(photo, "JPEG", progressive=True),
        "jpeg restarts": encode(photo, "JPEG", restart_marker_blocks=7),
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
