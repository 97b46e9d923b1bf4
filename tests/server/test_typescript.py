"""The TypeScript client and the examples for Node, against the real server and in Chromium."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route

from benchmarks import photos
from server.demo.samples import samples
from tests import node
from tests.browser import chromium, faults_of
from tests.conftest import Origin, Server
from tests.media import pdf
from tests.pictures import STORED_AS, encode, shape
from tests.scrape import ended_early, scrape

CLIENT, FOLDER = node.CLIENTS / "typescript", node.CLIENTS / "examples"
CHAT = "/v1/chat/completions"
ORIENTATION = 0x0112
RED = encode(shape("red"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files that the client's tests ask about."""
    photo = photos.photo(1600, 1200, seed=4)
    files = {name: data for sample in samples() for name, data in sample.files.items()}
    box = Image.open(io.BytesIO(files["red-circle.png"])).convert("RGB").resize((3200, 2400))
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 4), np.uint8)
    made = {
        "large.jpg": photos.photo(4000, 3000, seed=1),
        "photo.jpg": photo,
        "turned.jpg": turned(photo),
        "box.jpg": encode(box, "JPEG"),
        "red.png": RED,
        "red.gif": encode(shape("red"), "GIF"),
        "once.png": encode(shape("red", size=(237, 223))),
        "forgotten.png": encode(shape("blue", size=(239, 221))),
        "pages.pdf": pdf((320, 240), (320, 240)),
        "clear.png": encode(Image.fromarray(noise)),
        "clip.mp4": next(data for name, data in files.items() if name.endswith(".mp4")),
    }
    folder = tmp_path_factory.mktemp("pictures")
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return folder


def turned(photo: bytes) -> bytes:
    """The photo as a camera stores it that is held upright: EXIF tells to turn it."""
    pixels = STORED_AS[6](np.asarray(Image.open(io.BytesIO(photo)).transpose(Image.ROTATE_90)))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return encode(Image.fromarray(np.ascontiguousarray(pixels)), "JPEG", quality=88, exif=exif)


# ---------------------------------------------------------------------- Node


@pytest.mark.parametrize("file", ["client.test.ts", "format.test.ts"])
def test_the_tests_of_the_client_pass(file: str, server: Server, pictures: Path) -> None:
    environment = {"SACCADE_URL": server.url, "SACCADE_PICTURES": str(pictures)}
    test = node.built_client() / "test" / file
    output = node.run(["--test", "--test-reporter=tap", test], **environment)
    assert int(re.findall(r"^# pass (\d+)$", output, re.MULTILINE)[0]) > 3
    assert "\n# skipped 0\n" in output


def test_the_types_of_the_client_fit_its_tests() -> None:
    node.checked_types(node.built_client() / "tsconfig.test.json")


# ---------------------------------------------------------------------- examples

EXAMPLES = {
    "with_openai.mjs": r"a red circle\n\d+ \+ \d+ tokens\n",
    "with_anthropic.mjs": r"a red circle\n\d+ \+ \d+ tokens\n",
    "with_ai_sdk.mjs": r"a red circle\n\d+ \+ \d+ tokens\n",
    "with_saccade_client.mjs": (
        r"a red circle\n\d+ tokens of the picture\n320 x 240 pixels\n"
        r"the circle is at \d+, \d+, \d+, \d+\n"
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_for_node_prints_the_expected_text(name: str, server: Server) -> None:
    node.built_client()
    addresses = {"OPENAI_BASE_URL": f"{server.url}/v1", "ANTHROPIC_BASE_URL": server.url}
    assert re.fullmatch(EXAMPLES[name], node.run([FOLDER / name], **addresses))


def test_every_example_for_node_is_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.mjs")} == set(EXAMPLES)


# ---------------------------------------------------------------------- Chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The client as a bundler makes it for a page: the global `saccade`."""
    node.built_client()
    return node.bundle(CLIENT / "dist" / "index.js", "--format=iife", "--global-name=saccade")


@pytest.fixture
def site(browser: Browser, pictures: Path) -> Iterator[BrowserContext]:
    """A browser that finds an empty page and the pictures in the folder /site of any server."""
    context = browser.new_context()

    def answer(route: Route) -> None:
        path = pictures / route.request.url.rpartition("/")[2]
        if path.is_file():
            route.fulfill(path=path)
        else:
            route.fulfill(body="<!DOCTYPE html><title>page</title>", content_type="text/html")

    context.route("**/site/*", answer)
    yield context
    context.close()


def loaded(site: BrowserContext, origin: str, script: str, server: Server) -> Page:
    """A page of this origin with clients of the server."""
    page = site.new_page()
    page.goto(f"{origin}/site/page.html")
    page.add_script_tag(content=script)
    page.evaluate(
        """url => {
          window.client = new saccade.Client({baseURL: url});
          window.asItIs = new saccade.Client({baseURL: url, resize: false});
          window.file = async (name) => (await fetch(name)).blob();
        }""",
        f"{server.url}/v1",
    )
    return page


@pytest.fixture
def page(site: BrowserContext, script: str, server: Server) -> Iterator[Page]:
    """A page of the server's own origin."""
    page = loaded(site, server.url, script, server)
    faults = faults_of(page)
    yield page
    assert faults == []


@pytest.fixture
def sent(page: Page) -> list[Request]:
    """The requests with a body that the server gets."""
    seen: list[Request] = []

    def note(request: Request) -> None:
        if request.method == "POST":
            seen.append(request)

    page.on("request", note)
    return seen


def bytes_of(sent: list[Request]) -> int:
    return sum(len(request.post_data_buffer or b"") for request in sent)


ASK_BOTH = """async ({name, options, fields}) => {
  const found = [];
  for (const each of [client, asItIs]) {
    const photo = saccade.picture(await file(name), options);
    const {usage, images} = await each.ask("What is in the image?", photo, fields);
    found.push({usage, images});
  }
  return found;
}"""


@pytest.mark.parametrize("options", [{}, {"detail": "low"}, {"max_tokens": 100}])
def test_a_page_sends_a_fifth_of_a_photo_for_the_same_tokens(
    page: Page, sent: list[Request], options: dict[str, Any]
) -> None:
    asked = {"name": "large.jpg", "options": options, "fields": {"max_tokens": 4}}
    small, large = page.evaluate(ASK_BOTH, asked)
    assert 5 * bytes_of(sent[:-1]) <= bytes_of(sent[-1:])
    tokens = [each["usage"]["prompt_tokens_details"]["image_tokens"] for each in (small, large)]
    assert tokens[0] == tokens[1] > 0
    assert small["usage"]["prompt_tokens"] == large["usage"]["prompt_tokens"]
    for each in (small, large):
        (shown,) = each["images"]
        assert [shown["width"], shown["height"]] == [4000, 3000]
        assert shown["region"] == [0, 0, 4000, 3000]


def test_a_page_sends_what_the_picture_shows(page: Page, pictures: Path) -> None:
    """Upright, of the right colours, and without the patterns of a bad resize."""
    script = """async name => {
      const content = [saccade.picture(await file(name))];
      const [message] = await client.messages([{role: "user", content}]);
      return message.content[0].image_url.url;
    }"""
    large = Image.open(pictures / "turned.jpg")
    large = large.transpose(Image.ROTATE_270)
    kind, image = opened(page.evaluate(script, "turned.jpg"))
    assert kind == "image/jpeg"
    assert image.size < large.size == (1200, 1600)
    expected = large.resize(image.size, Image.Resampling.LANCZOS)
    off = np.asarray(image, np.float32) - np.asarray(expected, np.float32)
    assert np.sqrt(np.mean(off**2)) < 6  # without any smoothing: 9


def test_a_page_that_cannot_resize_a_picture_sends_it_as_it_is(
    page: Page, sent: list[Request], pictures: Path
) -> None:
    script = """async () => {
      OffscreenCanvas.prototype.convertToBlob = () => Promise.reject(new DOMException("too large"));
      const photo = await file("photo.jpg");
      return (await client.ask("What is in the image?", photo, {max_tokens: 1})).images[0].width;
    }"""
    assert page.evaluate(script) == 1600
    file = base64.b64encode((pictures / "photo.jpg").read_bytes()).decode()
    assert part_of(sent[-1])["image_url"]["url"] == f"data:image/jpeg;base64,{file}"


def test_a_page_keeps_what_is_lossless_and_transparent(page: Page, sent: list[Request]) -> None:
    script = """async () => {
      const {images} = await client.ask("What is in the image?", await file("clear.png"));
      return images[0].width;
    }"""
    assert page.evaluate(script) == 1200
    kind, image = opened(part_of(sent[-1])["image_url"]["url"])
    assert (kind, image.mode) == ("image/png", "RGBA")
    assert image.width < 1200


def part_of(request: Request) -> dict[str, Any]:
    part: dict[str, Any] = request.post_data_json["messages"][0]["content"][0]
    return part


def opened(url: str) -> tuple[str, Image.Image]:
    head, _, data = url.partition(";base64,")
    return head.removeprefix("data:"), Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_page_uploads_streams_and_names_what_it_sent(page: Page, sent: list[Request]) -> None:
    script = """async () => {
      const picture = new File([await file("red.png")], "red.png");
      const uploads = [await client.upload(picture), await client.upload(picture)];
      const stream = await client.stream("What is in the image?", uploads[0], {temperature: 0});
      const pieces = [];
      for await (const piece of stream) pieces.push(piece);
      await client.delete(uploads[0].file_id);
      const error = await client.ask("?", uploads[1]).catch((error) => error);
      const again = [];
      for (let n = 0; n < 2; n++)
        again.push((await client.ask("What is in the image?", picture, {temperature: 0})).text);
      return {ids: uploads.map((each) => each.file_id), pieces, answer: stream.answer.text,
              status: error.status, again};
    }"""
    found = page.evaluate(script)
    assert found["ids"][0] == found["ids"][1]
    assert "".join(found["pieces"]) == found["answer"] == "a red circle"
    assert found["status"] == 404
    assert found["again"] == ["a red circle"] * 2
    assert sum(request.url.endswith("/v1/files") for request in sent) == 1
    first, again = [part_of(request) for request in sent if request.url.endswith(CHAT)][-2:]
    assert first["uuid"] == again["uuid"]
    assert "url" in first["image_url"]
    assert again["image_url"] == {}


def test_the_server_ends_its_work_when_a_page_leaves_a_stream(
    page: Page, http: httpx.Client
) -> None:
    script = """async () => {
      const options = {max_tokens: 2000, extra_body: {min_tokens: 2000}};
      for await (const piece of await client.stream("?", [], options)) return piece;
    }"""
    before = scrape(http)
    assert page.evaluate(script)
    assert ended_early(http, before)


def test_a_page_draws_boxes_in_its_own_pixels(page: Page) -> None:
    script = """async () => {
      const picture = await file("box.jpg");
      const question = "Give the bounding box of the red circle.";
      const answer = await client.ask(question, picture, {temperature: 0});
      const [box] = answer.boxes();
      const canvas = await saccade.drawBoxes(picture, [{...box, label: "circle"}]);
      const pen = canvas.getContext("2d");
      const middle = (box.top + box.bottom) / 2;
      const at = (x, y) => [...pen.getImageData(Math.round(x), Math.round(y), 1, 1).data];
      return {size: [canvas.width, canvas.height], box, left: at(box.left, middle),
              outside: at(box.left / 2, middle)};
    }"""
    found = page.evaluate(script)
    assert found["size"] == [3200, 2400]
    box = found["box"]
    shares = [box["left"] / 3200, box["top"] / 2400, box["right"] / 3200, box["bottom"] / 2400]
    assert shares == pytest.approx([0.21, 0.22, 0.74, 0.76], abs=0.05)
    assert found["left"] == [0xE6, 0x19, 0x4B, 255]
    assert found["outside"] != found["left"]


def test_a_page_has_neither_files_nor_secrets(page: Page, server: Server) -> None:
    script = """async url => {
      const errors = [];
      await client.ask("?", "red.png").catch((error) => errors.push(error.name));
      try { new saccade.Client({baseURL: url, apiKey: "secret"}); }
      catch (error) { errors.push(error.message); }
      return errors;
    }"""
    first, second = page.evaluate(script, server.url)
    assert first == "UnusableMedia"
    assert "dangerouslyAllowBrowser" in second


def test_a_page_of_another_site_in_a_browser_without_hashes(
    browser: Browser, script: str, server: Server, origin: Origin
) -> None:
    """Browsers have no hashes where pages come without TLS, so pictures have no names there."""
    origin.files |= {"/site/page.html": b"<!DOCTYPE html><title>page</title>", "/site/red.png": RED}
    with browser.new_context() as context:
        page = loaded(context, origin.url, script, server)
        page.evaluate("Object.defineProperty(crypto, 'subtle', {value: undefined})")
        with page.expect_request(f"**{CHAT}") as asked:
            texts = page.evaluate(
                """async () => {
                  const red = await file("red.png");
                  const texts = [];
                  for (const given of [red, await client.upload(red)])
                    texts.push((await client.ask("What is in the image?", given)).text);
                  return texts;
                }"""
            )
        assert texts == ["a red circle"] * 2
        assert set(part_of(asked.value)) == {"type", "image_url"}
