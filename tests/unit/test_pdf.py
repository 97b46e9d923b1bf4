"""PDF files: usual ones, and those with damaged or contradictory trees, boxes or references."""

import math
import re

import numpy as np
import pypdfium2
import pytest

from server.errors import ClientError, ImageFrameMissing, InvalidFile, SaccadeError
from server.imaging import pdf
from tests import hostile_pdfs, media

ODD = hostile_pdfs.odd()
# Takes minutes: see the tests of the pool.
del ODD["form that draws itself"]


def _rendered(data: bytes) -> list[tuple[int, int]]:
    """Load the pages of `data` as the server does, and render them; returns the sizes in pixels."""
    sizes = []
    for image in media.prepare(media.chat(media.file_part(data))).shown():
        width, height = image.size
        shrink = max(1, max(image.size) // 500)
        size = max(1, width // shrink), max(1, height // shrink)
        picture = pdf.render(image.data, image.options.frame, size)
        assert np.asarray(picture).shape == (picture.height, picture.width, 3)
        sizes.append(image.size)
    return sizes


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_rendered_or_refused_with_a_clear_error(name: str) -> None:
    sizes, refusal = [(1, 1)], None
    try:
        sizes = _rendered(ODD[name])
    except ClientError as error:
        refusal = error
    assert sizes
    assert all(math.prod(size) <= media.LIMITS.image.max_pixels for size in sizes)
    if refusal is not None:
        assert refusal.param == "messages[0].content[0].file"
        assert re.match(r"the (PDF|file|image) ", refusal.message)


@pytest.mark.parametrize(
    "name",
    ["page tree loop", "page tree loop, many", "deep page tree", "kids of numbers", "count 2"],
)
def test_a_page_that_cannot_be_reached_means_a_damaged_file(name: str) -> None:
    with pytest.raises(InvalidFile, match="damaged"):
        _rendered(ODD[name])


def test_the_text_of_a_page_is_read_up_to_a_limit() -> None:
    data = media.lettered("Hamburgefonts")
    assert pdf.text(data, 0, 100) == "Hamburgefonts"
    assert pdf.text(data, 0, 6) == "Hambur"
    assert pdf.text(media.pdf((100, 100)), 0, 100) == ""
    with pytest.raises(ImageFrameMissing):
        pdf.text(data, 1, 100)
    with pytest.raises(InvalidFile, match="encrypted"):
        pdf.text(ODD["encrypted"], 0, 100)


def test_the_text_of_a_page_stands_before_its_picture() -> None:
    part = media.file_part(media.lettered("Hamburgefonts"), include_text=True)
    text, image = media.prepare(media.chat(part)).content()
    assert text == {"type": "text", "text": "Text of page 1:\nHamburgefonts\n"}
    assert image["type"] == "image_url"
    (alone,) = media.prepare(media.chat(media.file_part(media.lettered("Hamburgefonts")))).content()
    assert alone["type"] == "image_url"
    blank = media.file_part(media.pdf((100, 100), (100, 100)), include_text=True)
    assert len(media.prepare(media.chat(blank)).content()) == 2
    file = media.file_part(media.lettered("a"), include_text=True)["file"]
    body = {"input": [{"role": "user", "content": [{"type": "input_file", **file}]}]}
    content = media.prepare(body, "/v1/responses").document["input"][0]["content"]
    assert [each["type"] for each in content] == ["input_text", "input_image"]


def test_text_that_cannot_be_included_is_refused() -> None:
    wrong = media.file_part(media.lettered("a"), include_text=1)
    with pytest.raises(ClientError) as refusal:
        media.prepare(media.chat(wrong))
    assert refusal.value.param == "messages[0].content[0].file.include_text"
    image = media.file_part(media.gif(1), include_text=True)
    with pytest.raises(InvalidFile, match="no text layer"):
        media.prepare(media.chat(image))
    named = {"type": "image_url", "image_url": None, "uuid": "a", "include_text": True}
    with pytest.raises(ClientError, match="cannot have include_text") as refusal:
        media.prepare(media.chat(named))
    assert refusal.value.param == "messages[0].content[0].include_text"


def test_encrypted_files_are_refused_as_such() -> None:
    with pytest.raises(InvalidFile, match="encrypted"):
        _rendered(ODD["encrypted"])


@pytest.mark.parametrize("side", [b"1000000000", b"2147483648"])
def test_a_huge_page_is_rendered_within_the_limits(side: bytes) -> None:
    data = hostile_pdfs.page(
        b"/MediaBox [0 0 %s %s]" % (side, side), content=b"1 0 0 rg 0 0 %s %s re f" % (side, side)
    )
    ((width, height),) = _rendered(data)
    assert width == height == 10_000
    shown = np.asarray(pdf.render(data, 0, (50, 50)))
    assert shown.shape == (50, 50, 3)
    assert (shown[25, 25] == (255, 0, 0)).all()


def test_a_page_of_another_shape_than_asked_for_takes_bounded_memory() -> None:
    data = hostile_pdfs.page(b"/MediaBox [0 0 1 3000000]")
    shown = pdf.render(data, 0, (200, 160))
    assert shown.width * shown.height < 40_000_000


def test_a_page_cropped_to_nothing_is_white() -> None:
    data = hostile_pdfs.page(b"/MediaBox [0 0 100 80] /CropBox [200 200 300 300]")
    assert (np.asarray(pdf.render(data, 0, (20, 10))) == 255).all()


def test_pixels_are_those_of_pdfium() -> None:
    data = hostile_pdfs.page(content=b"0 .5 1 rg 3 3 31 22.5 re f 90 70 m 10 40 l 60 5 l s")
    with pypdfium2.PdfDocument(data) as document:
        expected = document[0].render(scale=2, rev_byteorder=True).to_pil().convert("RGB")
    assert np.array_equal(np.asarray(pdf.render(data, 0, (200, 160))), np.asarray(expected))


def test_a_missing_page_is_refused() -> None:
    with pytest.raises(SaccadeError, match="no page 2"):
        pdf.render(hostile_pdfs.page(), 1, (10, 10))
