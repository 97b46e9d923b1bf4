"""Chat completions about real pictures, over HTTP."""

import concurrent.futures
import random
from typing import Any

import httpx
import pytest

from tests import pictures
from tests.conftest import Origin
from tests.pictures import TOKEN_PIXELS, image_part, shape, text_part, user

WHAT = text_part("What is in the image?")
COLORS = ("red", "green", "blue", "black")
KINDS = ("circle", "square")


def ask(http: httpx.Client, *parts: dict[str, Any], **more: Any) -> httpx.Response:
    request = {"model": "saccade-tiny", "messages": user(*parts), "temperature": 0}
    return http.post("/v1/chat/completions", json={"max_tokens": 16, **request, **more})


def answer(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("color", COLORS)
def test_the_answer_names_the_color_and_shape(http: httpx.Client, color: str, kind: str) -> None:
    picture = pictures.encode(shape(color, kind))
    assert answer(ask(http, image_part(picture), WHAT)) == f"a {color} {kind}"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_image_format_is_decoded(http: httpx.Client, kind: str) -> None:
    assert (
        answer(ask(http, image_part(pictures.encode(shape("red"), kind)), WHAT)) == "a red circle"
    )


def test_a_large_jpeg_gets_the_right_answer(http: httpx.Client) -> None:
    picture = pictures.encode(shape("blue", "square", (4000, 3000)), "JPEG", quality=95)
    assert answer(ask(http, image_part(picture), WHAT)) == "a blue square"


def test_pictures_keep_their_order(http: httpx.Client) -> None:
    red, blue = (image_part(pictures.encode(shape(color))) for color in ("red", "blue"))
    second = text_part("What is in the second image?")
    assert answer(ask(http, red, blue, second)) == "a blue circle"
    assert answer(ask(http, blue, red, second)) == "a red circle"


def test_a_repeated_picture_gets_its_own_placeholders(http: httpx.Client) -> None:
    part = image_part(pictures.encode(shape("green", "circle", (200, 216))))
    first = ask(http, part, part, WHAT).json()
    again = ask(http, part, part, WHAT).json()
    assert first["choices"] == again["choices"]
    single = ask(http, part, WHAT).json()
    extra = first["usage"]["prompt_tokens"] - single["usage"]["prompt_tokens"]
    own = (200 // TOKEN_PIXELS) * (216 // TOKEN_PIXELS)
    assert extra > own  # the second picture has its own placeholders


def test_a_text_only_request_succeeds(http: httpx.Client) -> None:
    assert ask(http, text_part("hello")).status_code == 200


def test_concurrent_requests_get_answers_about_their_own_pictures(http: httpx.Client) -> None:
    scenes = [
        (color, kind, pictures.encode(shape(color, kind, (224 + 4 * i, 224))))
        for color in COLORS
        for kind in KINDS
        for i in range(3)
    ]
    asked = scenes * 3
    random.Random(0).shuffle(asked)
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        answers = threads.map(lambda scene: answer(ask(http, image_part(scene[2]), WHAT)), asked)
        for (color, kind, _), text in zip(asked, answers, strict=True):
            assert text == f"a {color} {kind}"


def test_a_picture_is_fetched_from_its_url(http: httpx.Client, origin: Origin) -> None:
    origin.files["/red.png"] = pictures.encode(shape("red"))
    part = {"type": "image_url", "image_url": {"url": f"{origin.url}/red.png"}}
    assert answer(ask(http, part, WHAT)) == "a red circle"
    assert origin.requests == ["/red.png"]


def test_a_uuid_stands_for_a_picture_that_was_sent_before(http: httpx.Client) -> None:
    picture = pictures.encode(shape("black", "square", (232, 224)))
    named = {"type": "image_url", "image_url": None, "uuid": "my-black-square"}
    refused = ask(http, named, WHAT)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("unknown_image", "messages[0].content[0].uuid")
    assert answer(ask(http, image_part(picture, uuid="my-black-square"), WHAT)) == "a black square"
    assert answer(ask(http, named, WHAT)) == "a black square"


def test_a_reused_uuid_does_not_bring_back_the_earlier_picture(http: httpx.Client) -> None:
    red, blue = (pictures.encode(shape(color, "circle", (240, 224))) for color in ("red", "blue"))
    assert answer(ask(http, image_part(red, uuid="one-name"), WHAT)) == "a red circle"
    assert answer(ask(http, image_part(blue, uuid="one-name"), WHAT)) == "a blue circle"
    assert answer(ask(http, image_part(red), WHAT)) == "a red circle"


BAD = {
    "no image": (b"not an image", 400, "unsupported_image_format"),
    "truncated": (pictures.encode(shape("red"), "JPEG")[:1500], 400, "invalid_image"),
    "thin": (pictures.encode(pictures.photo((2010, 10)), "JPEG"), 400, "image_aspect_ratio"),
    "html": (b"<html><body>404</body></html>", 400, "unsupported_image_format"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_invalid_picture_is_refused_with_its_param(http: httpx.Client, name: str) -> None:
    data, status, code = BAD[name]
    good = image_part(pictures.encode(shape("red")))
    response = ask(http, good, image_part(data), WHAT)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == "messages[0].content[1].image_url"
    assert answer(ask(http, good, WHAT)) == "a red circle"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,@@@", "invalid_image_url"),
        ("data:image/png,plain", "unsupported_image_format"),
        ("ftp://127.0.0.1/x.png", "invalid_image_url"),
        ("file:///etc/passwd", "image_url_blocked"),
        ("no url", "invalid_image_url"),
    ],
)
def test_an_invalid_url_is_refused_with_its_param(http: httpx.Client, url: str, code: str) -> None:
    response = ask(http, {"type": "image_url", "image_url": {"url": url}}, WHAT)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, code)
    assert error["param"] == "messages[0].content[0].image_url"
    assert "passwd" not in error["message"]


def test_a_url_that_returns_404_is_a_client_error(http: httpx.Client, origin: Origin) -> None:
    response = ask(
        http, {"type": "image_url", "image_url": {"url": f"{origin.url}/none.png"}}, WHAT
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "image_fetch_failed"
