"""The playground in a real browser: what a new user does, sees and may do wrong."""

import base64
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import playwright
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect

from server.http.usage import detail, view_detail
from server.imaging.tokens import TokenRule
from server.imaging.tokens.views import FixedTokens
from server.request.context import ShownImage
from tests import families
from tests import pictures as drawn
from tests.browser import chromium, faults_of
from tests.conftest import Server, serving
from tests.media import pdf
from tests.pictures import encode, shape
from tests.server.conftest import A
from tests.unit import test_tokens

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 780}
ANSWERED = 60_000  # milliseconds
FIRST_LOAD_BYTES = 200_000
RED = encode(shape("red"))
NODE = Path(playwright.__file__).parent / "driver" / "node"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=20_000)  # instead of 5 s, for busy machines
    with chromium() as running:
        yield running


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport=DESKTOP)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: Server) -> Iterator[Page]:
    """The playground, which may break no policy and raise no exception."""
    page = context.new_page()
    faults = faults_of(page)
    page.goto(server.url)
    yield page
    assert faults == []


@pytest.fixture
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder for screenshots."""
    folder: Path = request.config.getoption("--screenshots") or tmp_path
    folder.mkdir(exist_ok=True)
    return folder


def choose_sample(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()
    expect(page.locator(".tray .tokens").first).to_contain_text("token")
    expect(page.locator(".cost")).to_have_attribute("aria-busy", "false")


def attach(page: Page, name: str, kind: str, data: bytes) -> None:
    attached = page.locator(".tray li")
    before = attached.count()
    files = page.locator("input[type=file]").first
    files.set_input_files({"name": name, "mimeType": kind, "buffer": data})
    expect(attached).to_have_count(before + 1)


def tokens_of(place: Locator) -> int:
    """The number of tokens that the page shows, once no other is being counted."""
    expect(place.page.locator(".cost")).to_have_attribute("aria-busy", "false")
    expect(place).to_contain_text("token")
    found = re.search(r"([\d,]+) tokens?", place.inner_text())
    assert found is not None
    return int(found[1].replace(",", ""))


def ask(page: Page, text: str) -> str:
    """The answer to a question, once it is complete."""
    before = page.locator(".turn").count()
    page.get_by_label("Question").fill(text)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").nth(before)
    expect(turn.locator(".actions")).to_be_visible(timeout=ANSWERED)
    return turn.locator(".words").inner_text()


# ---------------------------------------------------------------------- the files


def test_the_page_allows_no_script_style_or_asset_from_elsewhere(http: httpx.Client) -> None:
    response = http.get("/")
    policies = response.headers.get_list("content-security-policy")
    assert any("default-src 'none'; script-src 'self'; style-src 'self'" in it for it in policies)
    assert not any("unsafe" in policy for policy in policies)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"<style|style=|<script(?! type=\"module\" src=)", response.text)
    assert "://" not in response.text
    links = re.findall(r'(?:src|href)="(playground/[^"]+)"', response.text)
    assert len(links) > 4
    for link in links:
        assert http.get(f"/{link}").status_code == 200
    assert http.head("/").status_code == 200
    plain = http.get("/playground/style.css", headers={"Accept-Encoding": "identity"})
    assert plain.text == http.get("/playground/style.css").text
    assert http.get("/playground/nothing.js").status_code == 404
    missing = http.get("/playground/samples/nothing.png")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


def test_the_first_load_is_small_and_from_this_server_only(
    context: BrowserContext, server: Server
) -> None:
    page = context.new_page()
    page.goto(server.url, wait_until="networkidle")
    expect(page.locator(".samples img").first).to_be_visible()
    loaded = page.evaluate(
        "['navigation', 'resource'].flatMap((type) => performance.getEntriesByType(type))"
        ".map(({name, transferSize, responseStatus}) => [name, transferSize, responseStatus])"
    )
    assert len(loaded) > 8
    assert all(url.startswith(server.url) and status == 200 for url, _, status in loaded)
    assert sum(nbytes for _, nbytes, _ in loaded) < FIRST_LOAD_BYTES


# ---------------------------------------------------------------------- a new user


def test_a_new_user_asks_about_a_sample(page: Page) -> None:
    choose_sample(page, "red circle")
    cost = page.locator(".cost").inner_text()
    assert cost.startswith("49 tokens")
    assert ask(page, "What is in the image?") == "a red circle"
    facts = page.locator(".facts").inner_text()
    assert "49 of pictures" in facts  # what was said before
    assert {"Prefill", "Generate"} <= stages(page)
    assert ask(page, "What shape is it?") == "circle"
    expect(page.locator(".badge").last).to_have_text("embedding cached")


def test_the_stages_of_a_picture_that_the_server_does_not_know_include_its_encoding(
    page: Page,
) -> None:
    new = encode(Image.frombytes("RGB", (64, 64), os.urandom(3 * 64 * 64)))
    attach(page, "new.png", "image/png", new)
    ask(page, "What is in the image?")
    assert {"Encode", "Prefill", "Generate"} <= stages(page)
    expect(page.locator(".badge").last).to_have_text("not cached")


def stages(page: Page) -> set[str]:
    """Those of the answer, by the words of the legend."""
    return set(re.findall(r"[A-Z][a-z]+", page.locator(".legend").inner_text()))


def test_an_error_is_shown_kindly_and_can_be_retried(page: Page) -> None:
    attach(page, "broken.png", "image/png", RED[:200])
    expect(page.locator(".cost")).to_contain_text("token")  # its header is fine
    ask(page, "What is in the image?")
    error = page.get_by_role("alert")
    expect(error).to_contain_text("truncated")
    expect(error).to_contain_text("The file may be damaged")
    error.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_count(1)


def test_an_answer_can_be_stopped_and_asked_again(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.continue_(post_data=endless(route)))
    page.get_by_label("Question").fill("hello")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped.")).to_be_visible()
    page.unroute_all(behavior="wait")
    page.get_by_role("button", name="Again").click()
    expect(page.locator(".facts")).to_be_visible(timeout=ANSWERED)
    expect(page.get_by_text("Stopped.")).to_have_count(0)


def test_the_cost_under_a_cap_is_known_before_the_question_is_sent(page: Page) -> None:
    choose_sample(page, "three shapes")
    cost = page.locator(".cost")
    assert tokens_of(cost) == 140
    page.get_by_role("button", name="Detail and caps").click()
    page.get_by_label("Tokens per picture").fill("40")
    capped = tokens_of(cost)
    assert 20 < capped <= 40
    page.get_by_label("Tokens for all").fill("10")
    least = tokens_of(cost)
    assert least <= 10
    ask(page, "What is in the image?")
    assert f"{least} of pictures" in page.locator(".facts").inner_text()


def test_the_grid_is_what_the_encoder_sees(page: Page) -> None:
    choose_sample(page, "three shapes")
    sizes = page.locator(".sizes")
    expect(sizes).to_contain_text("448 × 320")
    expect(sizes).to_contain_text("14 × 10 tokens")
    expect(sizes).to_contain_text("2 × 2 patches")
    canvas = page.locator(".stage canvas")
    expect(canvas).to_have_attribute("aria-label", re.compile("a grid of 14 by 10 tokens"))
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + box["height"] / 2 + 3)
    expect(page.locator(".status")).to_have_text("row 6, column 8: token 78 of 140")
    canvas.focus()
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("0")


def test_boxes_are_drawn_on_the_picture(page: Page) -> None:
    choose_sample(page, "red circle")
    answer = ask(page, "Give the bounding box of the red circle.")
    shares = [int(number) / 1000 for number in re.findall(r"\d+", answer)]
    assert shares == pytest.approx([0.21, 0.22, 0.74, 0.76], abs=0.05)
    page.get_by_role("button", name="1 box on red-circle.png").click()
    canvas = page.locator(".stage canvas")
    expect(canvas).to_have_attribute("aria-label", re.compile("1 marked place"))
    left, top, right, bottom = page.evaluate(BOX_OF_ORANGE)
    # The picture is in the middle of the canvas, with a margin of 12 pixels.
    width, height = canvas.evaluate("canvas => [canvas.clientWidth, canvas.clientHeight]")
    side = min(width, height) - 24
    start = [(width - side) / 2, (height - side) / 2] * 2
    expected = [at + share * side for at, share in zip(start, shares, strict=True)]
    assert [left, top, right, bottom] == pytest.approx(expected, abs=4)


def test_boxes_of_an_answer_are_in_thousandths_or_pixels(page: Page) -> None:
    def place(*numbers: float, scale: float | str = 1000, label: str | None = None) -> Any:
        return {"numbers": numbers, "scale": scale, "label": label}

    script = "async given => (await import('/playground/boxes.js')).boxesOf(given)"
    given = [place(5, 5, 1, 1), place(3, 4), place(1, 2, 3, 4, scale=100, label="a")]
    given.append(place(9, 9, 2000, 10, scale="pixels"))
    found = [(each["box"], each["label"], each["unit"]) for each in page.evaluate(script, given)]
    assert found == [
        ([10, 20, 30, 40], "a", "thousandths"),
        ([9, 9, 2000, 10], "", "pixels"),
    ]


def test_a_box_is_mapped_to_the_original_by_what_was_shown(page: Page) -> None:
    script = "async args => (await import('/playground/boxes.js')).toOriginal(...args)"
    padded = {"region": [-50, 0, 550, 300]}
    assert page.evaluate(script, [[0, 0, 1000, 500], "thousandths", padded]) == [-50, 0, 550, 150]
    shrunk = {"region": [0, 0, 50, 50], "processed_width": 200, "processed_height": 100}
    assert page.evaluate(script, [[100, 0, 200, 10], "pixels", shrunk]) == [25, 0, 50, 5]


# The bounds of the pixels with the color of the first box.
BOX_OF_ORANGE = """() => {
  const canvas = document.querySelector(".stage canvas");
  const {width, height} = canvas;
  const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
  const bounds = [Infinity, Infinity, 0, 0];
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const at = 4 * (y * width + x);
    if (data[at] !== 255 || data[at + 1] !== 90 || data[at + 2] !== 54) continue;
    bounds[0] = Math.min(bounds[0], x); bounds[1] = Math.min(bounds[1], y);
    bounds[2] = Math.max(bounds[2], x); bounds[3] = Math.max(bounds[3], y);
  }
  return bounds;
}"""


def test_several_pictures_pages_and_clips(page: Page) -> None:
    choose_sample(page, "pair")
    expect(page.locator(".tray li")).to_have_count(2)
    assert ask(page, "Which image has a blue square?") == "the second"
    attach(page, "pages.pdf", "application/pdf", pdf(*[(320, 240)] * 3))
    cost = page.locator(".cost")
    all_pages = tokens_of(cost)
    expect(page.locator(".status")).to_have_text(re.compile("The server draws the pages"))
    expect(page.locator(".sizes")).to_contain_text("640 × 480")
    page.get_by_label("Pages of pages.pdf").fill("2")
    assert tokens_of(cost) * 3 == all_pages
    page.get_by_label("Pages of pages.pdf").fill("7")
    expect(cost).to_have_class(re.compile("bad"))
    page.get_by_role("button", name="Remove pages.pdf").click()
    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("button", name="motion").click()
    expect(page.locator(".tray")).to_contain_text(re.compile(r"\d+ tokens, \d+ frames"))
    assert ask(page, "In which direction does the circle move?") == "right"


# Gives a page a picture (in base64) as another program does.
SEND = """([base64, type, target]) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], `${type}.png`, {type: "image/png"}));
  const data = {dataTransfer: transfer, clipboardData: transfer};
  const init = {bubbles: true, cancelable: true, ...data};
  const event = type === "paste" ? new ClipboardEvent(type, init) : new DragEvent(type, init);
  document.querySelector(target).dispatchEvent(event);
}"""


def test_pictures_are_dropped_pasted_and_taken(page: Page) -> None:
    data = base64.b64encode(RED).decode()
    for type_, target in (("dragover", "#page-ask"), ("drop", "#page-ask"), ("paste", "body")):
        page.evaluate(SEND, [data, type_, target])
    expect(page.locator(".tray li")).to_have_count(2)
    page.context.grant_permissions(["camera"])
    page.get_by_role("button", name="Take a picture").click()
    page.get_by_role("button", name="Take the picture").click()
    expect(page.locator(".tray li")).to_have_count(3)
    assert tokens_of(page.locator(".tray li").last) > 49


def test_a_question_that_is_sent_at_once_has_the_picture(page: Page) -> None:
    page.get_by_label("Question").fill("What is in the image?")
    page.evaluate(
        f"args => {{ ({SEND})(args); document.querySelector('.composer').requestSubmit(); }}",
        [base64.b64encode(RED).decode(), "paste", "body"],
    )
    expect(page.locator(".turn .thumb")).to_have_count(1)
    expect(page.locator(".words")).to_have_text("a red circle", timeout=ANSWERED)


def test_the_sample_that_is_chosen_last_is_attached(page: Page) -> None:
    held: list[Route] = []
    first = "**/samples/red-circle.png"
    expect(page.locator(".samples img").first).to_be_visible()
    page.route(first, lambda route: held.append(route))
    page.get_by_role("button", name="red circle", exact=True).click()
    choose_sample(page, "bar chart")
    with page.expect_response(first):
        held[0].continue_()
    page.evaluate("fetch('playground/samples.json').then((found) => found.text())")
    assert page.locator(".tray .thumb").get_attribute("title") == "bar-chart.png"
    expect(page.locator(".tray li")).to_have_count(1)


# Counts the object URLs that a page has.
COUNT_URLS = """() => {
  window.urls = new Set();
  const [create, revoke] = [URL.createObjectURL, URL.revokeObjectURL];
  URL.createObjectURL = (blob) => { const url = create(blob); urls.add(url); return url; };
  URL.revokeObjectURL = (url) => { urls.delete(url); revoke(url); };
}"""


def test_pictures_that_are_gone_take_no_memory(page: Page) -> None:
    def has(count: int) -> None:
        assert page.evaluate("urls.size") == count

    page.evaluate(COUNT_URLS)
    attach(page, "one.png", "image/png", RED)
    attach(page, "two.png", "image/png", encode(shape("blue")))
    has(2)
    page.get_by_role("button", name="Remove one.png").click()
    has(1)
    ask(page, "What is in the image?")
    has(1)
    shown = page.locator(".turn .thumb img")
    shown.evaluate("img => Object.assign(new Image(), { src: img.src }).decode()")  # or it fails
    page.get_by_role("link", name="Explain").click()
    lesson = page.locator("#page-explain")
    expect(lesson.locator(".tok.many")).to_have_text("<|image_pad|> × 49")
    small = encode(shape("green", size=(140, 140)))
    lesson.locator("input[type=file]").set_input_files(
        {"name": "green.png", "mimeType": "image/png", "buffer": small}
    )
    expect(lesson.locator(".tok.many")).not_to_have_text("<|image_pad|> × 49")
    has(1)
    page.get_by_role("link", name="Ask").click()
    page.get_by_role("button", name="New conversation").click()
    has(0)
    choose_sample(page, "pair")
    has(2)


def test_an_answer_that_is_cut_off_is_an_error(page: Page) -> None:
    start = 'data: {"choices": [{"index": 0, "delta": {"content": "half of"}}]}\n\n'
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=start, content_type="text/event-stream"),
    )
    assert ask(page, "hello") == "half of"
    expect(page.get_by_role("alert")).to_contain_text("lost before the answer was complete")
    page.unroute_all(behavior="wait")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".facts")).to_be_visible(timeout=ANSWERED)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_the_code_of_a_request_answers_the_same(page: Page, tmp_path: Path) -> None:
    name = "red $& circle's.png"
    attach(page, name, "image/png", RED)
    (tmp_path / name).write_bytes(RED)
    answer = ask(page, "What's in the image?")
    page.get_by_role("button", name="Code", exact=True).click()
    code = page.locator(".code pre")
    curl = code.inner_text()
    done = subprocess.run(["bash", "-c", curl], cwd=tmp_path, capture_output=True, text=True)
    assert f'"content":"{answer}"' in done.stdout, done.stdout + done.stderr
    page.get_by_role("button", name="Python").click()
    script = tmp_path / "ask.py"
    script.write_text(code.inner_text())
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == answer, done.stderr
    page.get_by_role("button", name="JavaScript").click()
    module = tmp_path / "ask.mjs"
    module.write_text(code.inner_text())
    assert f'await dataUrl("{name}", "image/png")' in module.read_text()
    subprocess.run([NODE, "--check", module], check=True)


def test_it_works_with_the_keyboard_alone(page: Page) -> None:
    expect(page.get_by_label("Question")).to_be_focused()
    page.get_by_role("button", name="bar chart").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".cost")).to_contain_text("token")
    expect(page.get_by_label("Question")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".words")).to_have_text("a bar chart", timeout=ANSWERED)


# ---------------------------------------------------------------------- the other pages


def test_the_live_page_shows_what_the_server_did(page: Page) -> None:
    ask(page, "hello")
    attach(page, "broken.png", "image/png", RED[:200])
    ask(page, "What is in the image?")
    page.get_by_role("link", name="Live").click()
    expect(page.get_by_role("status")).to_contain_text("saccade-tiny on cpu, ready")
    expect(page.locator("#page-live")).to_contain_text("invalid_image")
    expect(page.get_by_role("meter", name="Image workers busy")).to_be_visible()
    expect(page.get_by_label("Time to first token", exact=True)).to_contain_text(
        re.compile(r"\d (ms|s)\n*median")
    )
    expect(page.locator("#page-live .legend")).to_contain_text("Generate")
    page.get_by_role("link", name="Ask").click()
    expect(page.locator(".turn")).to_have_count(2)  # the conversation is still there


def test_metrics_are_read_as_prometheus_does(page: Page) -> None:
    script = """async texts => {
      const {parse, total, by, quantile} = await import("/playground/metrics.js");
      const [old, now] = texts.map(parse);
      return [total(now, "y"), total(now, "y", {k: "c"}), [...by(now, "y", "l")],
              quantile(old, now, "x", 0.5), quantile(old, now, "x", 1), quantile(now, now, "x", 1)];
    }"""

    def text(*counts: int) -> str:
        buckets = zip(("1.0", "2.0", "+Inf"), counts, strict=True)
        lines = [f'x_bucket{{le="{le}"}} {count}.0' for le, count in buckets]
        return "\n".join(["# HELP x", *lines, 'y{k="a\\"b,}",l="1"} 2', 'y{k="c",l="1"} 3e0', ""])

    found = page.evaluate(script, [text(0, 0, 0), text(1, 3, 4)])
    assert found == [5, 3, [["1", 5]], 1.5, 2, None]


def test_the_lesson_is_about_ones_own_picture(page: Page) -> None:
    choose_sample(page, "three shapes")
    page.get_by_role("link", name="Explain").click()
    lesson = page.locator("#page-explain")
    expect(lesson.locator(".tok.many")).to_have_text("<|image_pad|> × 140")
    expect(lesson).to_contain_text("560 patches")
    slider = lesson.get_by_label("Cap on the picture's tokens")
    slider.fill("12")
    expect(lesson.locator(".plan")).to_contain_text("12 tokens (9 %)")
    lesson.locator("input[type=file]").set_input_files(
        {"name": "red.png", "mimeType": "image/png", "buffer": RED}
    )
    expect(lesson.locator(".tok.many")).to_have_text("<|image_pad|> × 49")


@pytest.mark.parametrize(
    ("rule", "sizes", "lesson"),
    [
        (test_tokens.INTERNVL, ["12 of 16 × 16 tokens", "Overview"], "cut into 12 tiles"),
        (
            test_tokens.LLAVA_NEXT,
            ["Joined tiles", "32 × 24 tokens", "24 × 24 tokens"],
            "2 tiles of 336 × 336",
        ),
        (test_tokens.PIXTRAL, ["28 × 21 tokens", "21 for tags"], "expanded to 609 places: 588"),
        (FixedTokens("blip-2", 32, 32, (224, 224)), ["32 tokens"], "32 learned queries"),
    ],
    ids=["tiles", "joined", "native", "resampler"],
)
def test_other_families_are_shown_as_their_rules_say(
    page: Page, pictures: Path, rule: TokenRule, sizes: list[str], lesson: str
) -> None:
    """The demo model is of one family; the rows of others are made of their own rules."""

    def answer(route: Route) -> None:
        rows = [
            row_of(rule, asked["width"], asked["height"])
            for asked in route.request.post_data_json["images"]
        ]
        usage = {name: sum(row[name] for row in rows) for name in ("tokens", "kv_bytes")}
        route.fulfill(json={"data": rows, "usage": {"image_tokens": usage["tokens"], **usage}})

    page.route("**/v1/images/tokens", answer)
    choose_sample(page, "three shapes")
    shown = page.locator(".sizes")
    for text in sizes:
        expect(shown).to_contain_text(text)
    name = rule.family
    page.screenshot(path=pictures / f"family-{name}.png")
    page.get_by_role("link", name="Explain").click()
    expect(page.locator("#page-explain")).to_contain_text(re.compile(lesson))
    page.screenshot(path=pictures / f"family-{name}-explain.png")


def test_a_picture_is_shown_as_the_server_of_another_family_sees_it(
    browser: Browser, tmp_path: Path, pictures: Path
) -> None:
    """InternVL cuts pictures into tiles. The model is tiny, and its answers mean nothing."""
    model = families.build("internvl", tmp_path)
    photo = encode(drawn.photo((400, 200), 1))
    with serving(str(model), "--max-model-len", "4096") as other:
        page = browser.new_page(viewport=DESKTOP)
        faults = faults_of(page)
        page.goto(other.url)
        attach(page, "photo.png", "image/png", photo)
        cost = tokens_of(page.locator(".cost"))
        asked = {"images": [{"width": 400, "height": 200}], "include_views": True}
        (row,) = httpx.post(f"{other.url}/v1/images/tokens", json=asked).json()["data"]
        tiles = [view for view in row["views"] if view["kind"] == "tile"]
        assert row["tokens"] == cost
        assert len(tiles) == 8
        columns, rows = tiles[0]["columns"], tiles[0]["rows"]
        sizes = page.locator(".sizes")
        expect(sizes).to_contain_text(f"8 of {columns} × {rows} tokens")
        page.get_by_role("button", name="Overview").click()
        canvas = page.locator(".stage canvas")
        expect(canvas).to_have_attribute("aria-label", re.compile(f"{columns} by {rows} tokens"))
        ask(page, "What is in the image?")
        assert f"{cost} of pictures" in page.locator(".facts").inner_text()
        page.get_by_role("link", name="Explain").click()
        lesson = page.locator("#page-explain")
        expect(lesson).to_contain_text("cut into 8 tiles")
        expect(lesson.locator(".tok.many")).to_contain_text(f"× {cost}")
        page.screenshot(path=pictures / "family-served.png")
        page.close()
    assert faults == []


def row_of(rule: TokenRule, width: int, height: int) -> dict[str, Any]:
    """What `/v1/images/tokens` says of a picture."""
    allocation = rule.allocate(width, height)
    shown = ShownImage((width, height), allocation.tokens, allocation.processed, allocation.region)
    views = list(map(view_detail, rule.views(width, height, allocation)))
    cost = {"prompt_tokens": allocation.prompt_tokens, "kv_bytes": allocation.prompt_tokens * 2048}
    return {"index": 0, **detail(shown), **cost, "patch_size": 14, "views": views}


def test_the_api_is_described_without_another_server(
    context: BrowserContext, server: Server
) -> None:
    page = context.new_page()
    faults = faults_of(page)
    page.goto(f"{server.url}/docs", wait_until="networkidle")
    expect(page.locator("#operations-tag-Conversations")).to_be_visible()
    loaded = page.evaluate("performance.getEntriesByType('resource').map(({name}) => name)")
    assert all(url.startswith((server.url, "data:")) for url in loaded)
    page.locator("[id$=image_tokens_v1_images_tokens_post] button").first.click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table")).to_contain_text("kv_bytes")
    assert faults == []


def test_the_examples_of_the_description_are_answered(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()
    asked = 0
    for path, operations in described["paths"].items():
        body = operations.get("post", {}).get("requestBody", {}).get("content", {})
        for example in body.get("application/json", {}).get("examples", {}).values():
            answer = http.post(path, json=example["value"])
            assert answer.status_code == 200, (path, answer.text)
            asked += 1
    assert asked > 8
    fields = described["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert "budget" in fields["max_image_tokens"]["description"]


# ---------------------------------------------------------------------- keys and flags


def test_the_page_asks_for_a_key_where_one_is_needed(
    context: BrowserContext, guarded: Server
) -> None:
    page = context.new_page()
    faults = faults_of(page)
    page.goto(guarded.url)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    dialog.get_by_label("Key").fill("wrong")
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_be_visible()
    dialog.get_by_label("Key").fill(A)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Model", exact=True)).to_have_value("saccade-tiny")
    choose_sample(page, "red circle")
    assert ask(page, "What is in the image?") == "a red circle"
    # This server does not report its stages, so the page shows what it sees itself.
    expect(page.locator(".legend")).to_contain_text("Until the first word")
    assert A not in page.context.storage_state()["origins"].__repr__()  # gone with the tab
    assert faults == []


def test_flags_turn_the_pages_off(tight: Server) -> None:
    for path in ("/", "/playground/main.js", "/playground/samples.json", "/docs", "/openapi.json"):
        answer = httpx.get(tight.url + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


# ---------------------------------------------------------------------- how it looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_is_accessible_and_fits(
    browser: Browser, server: Server, pictures: Path, scheme: Any, size: Any
) -> None:
    context = browser.new_context(
        viewport=size,
        color_scheme=scheme,
        device_scale_factor=2,
        reduced_motion="reduce",
        bypass_csp=True,  # for axe
    )
    page = context.new_page()
    name = f"{'phone' if size is PHONE else 'desktop'}-{scheme}"

    def check(what: str) -> None:
        found = Axe().run(page).response["violations"]
        serious = [
            (what, each["id"], [node["target"] for node in each["nodes"]])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
        assert serious == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), what
        page.screenshot(path=pictures / f"{name}-{what}.png")

    page.goto(server.url)
    expect(page.locator(".samples img").first).to_be_visible()
    page.wait_for_load_state("networkidle")
    check("start")
    choose_sample(page, "three shapes")
    page.get_by_role("button", name="Detail and caps").click()
    check("cost")
    page.get_by_role("button", name="Detail and caps").click()
    ask(page, "Give the bounding box of the blue circle.")
    page.mouse.move(0, 0)
    check("answer")
    page.locator(".question .thumb").click()
    check("picture")
    if size is PHONE:
        page.get_by_role("button", name="Close").click()
    page.get_by_role("link", name="Explain").click()
    expect(page.locator(".tok.many")).to_be_visible()
    check("explain")
    page.get_by_role("link", name="Live").click()
    expect(page.get_by_role("status")).to_contain_text("ready")
    check("live")
    context.close()


def endless(route: Any) -> dict[str, Any]:
    return {**route.request.post_data_json, "ignore_eos": True, "max_tokens": 3000}
