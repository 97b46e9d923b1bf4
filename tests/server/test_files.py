"""The Files API: files are uploaded with OpenAI's SDK and used in requests of every dialect."""

import asyncio
import contextlib
import io
import json
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from openai.types import FileObject
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ClientError
from server.http import body, errors, files, images
from server.http.byte_budget import ByteBudget
from server.http.files import Field, read_form
from server.http.scope import set_record
from server.ingest.files import FileStore, Quota
from server.request.admission import Admission
from server.settings import HttpSettings
from server.telemetry.record import Record
from tests.admission import limits
from tests.conftest import Server
from tests.media import gif, media_loader, pdf, reader
from tests.pictures import encode, image_part, photo, shape, text_part, user
from tests.scrape import FRESH

MODEL = "saccade-tiny"
RED = encode(shape("red"))
LARGE = encode(photo((1600, 1200), 7), "JPEG", quality=88)
WHAT = text_part("What is in the image?")
ABSENT = "file-" + "0" * 32


@pytest.fixture
def upload(client: OpenAI) -> Iterator[Any]:
    """A function that uploads bytes and returns the file id. Files are deleted after the test."""
    made: list[str] = []

    def upload(data: bytes, name: str = "a.png", purpose: Any = "vision") -> str:
        file = client.files.create(file=(name, data), purpose=purpose)
        made.append(file.id)
        return file.id

    yield upload
    for file_id in made:
        with contextlib.suppress(openai.NotFoundError):
            client.files.delete(file_id)


# ---------------------------------------------------------------------- the routes, with the SDK


def test_a_file_lives_from_creation_to_deletion(client: OpenAI) -> None:
    made = client.files.create(file=("фото 猫.png", io.BytesIO(RED)), purpose="vision")
    assert set(made.to_dict()) == {
        "id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status",
        "status_details",
    }  # fmt: skip
    assert (made.object, made.bytes, made.purpose) == ("file", len(RED), "vision")
    assert (made.filename, made.status, made.expires_at) == ("фото 猫.png", "processed", None)
    assert client.files.retrieve(made.id) == made
    assert made in list(client.files.list())
    content = client.files.content(made.id)
    assert content.read() == RED
    assert content.response.headers["x-content-type-options"] == "nosniff"
    gone = client.files.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as refusal:
            ask(made.id)
        assert refusal.value.code == "file_not_found"


def test_the_file_list_is_paginated(client: OpenAI, upload: Any) -> None:
    made = [upload(encode(shape("red", size=(40 + i, 40))), f"{i}.png") for i in range(5)]
    other = upload(pdf((72, 72)), "a.pdf", "user_data")
    page = client.files.list(limit=2, purpose="vision", order="asc")
    assert len(page.data) == 2
    assert page.has_next_page()
    names = [file.id for file in client.files.list(limit=2, purpose="vision", order="asc")]
    assert [name for name in names if name in made] == made
    newest_first = [file.id for file in client.files.list(limit=4)]
    assert [name for name in newest_first if name in [*made, other]] == [other, *made[::-1]]
    assert [file.id for file in client.files.list(purpose="user_data")] == [other]


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [({"limit": 0}, 400, None), ({"limit": 10_001}, 400, None), ({"limit": "x"}, 400, None),
     ({"order": "up"}, 400, None), ({"after": ABSENT}, 404, "after")],
)  # fmt: skip
def test_invalid_list_parameters_are_refused(
    http: httpx.Client, query: dict[str, Any], status: int, param: str | None
) -> None:
    response = http.get("/v1/files", params=query)
    assert response.status_code == status
    assert param is None or response.json()["error"]["param"] == param


def test_expires_after_sets_the_expiry_time(client: OpenAI) -> None:
    file = client.files.create(
        file=("a.png", RED),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at == file.created_at + 3600
    client.files.delete(file.id)


@pytest.mark.parametrize(
    ("after", "param"),
    [
        ({"anchor": "created_at", "seconds": 3599}, "expires_after[seconds]"),
        ({"anchor": "created_at", "seconds": 2_592_001}, "expires_after[seconds]"),
        ({"anchor": "created_at", "seconds": "1e4"}, "expires_after[seconds]"),
        ({"anchor": "created_at"}, "expires_after[seconds]"),
        ({"anchor": "now", "seconds": 3600}, "expires_after[anchor]"),
        ({"seconds": 3600}, "expires_after[anchor]"),
    ],
)
def test_an_invalid_expiry_is_refused_with_its_param(
    client: OpenAI, after: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.files.create(file=("a.png", RED), purpose="vision", expires_after=after)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("data", "code", "status"),
    [
        (b"", "invalid_image", 400),
        (b"PK\3\4 a zip file", "unsupported_image_format", 400),
        (RED[:20], "invalid_image", 400),
        (b"%PDF-1.7 nothing", "invalid_file", 400),
        (encode(shape("red", size=(1000, 4))), "image_aspect_ratio", 400),
    ],
)
def test_an_unusable_file_is_refused_and_not_stored(
    client: OpenAI, http: httpx.Client, data: bytes, code: str, status: int
) -> None:
    before = http.get("/v1/files").json()
    with pytest.raises(openai.APIStatusError) as refusal:
        client.files.create(file=("a.png", data), purpose="vision")
    assert (refusal.value.code, refusal.value.status_code) == (code, status)
    assert refusal.value.param == "file"
    assert http.get("/v1/files").json() == before


def test_an_oversized_upload_is_refused_before_its_body_is_sent(server: Server) -> None:
    with contextlib.closing(HTTPConnection(server.url.removeprefix("http://"))) as connection:
        connection.putrequest("POST", "/v1/files")
        connection.putheader("Content-Type", KIND)
        connection.putheader("Content-Length", str((200 << 20) + files.MAX_OVERHEAD_BYTES + 1))
        connection.endheaders()
        response = connection.getresponse()
        assert response.status == 413
        assert json.load(response)["error"]["code"] == "request_too_large"


def test_a_file_over_the_limit_is_refused(http: httpx.Client) -> None:
    for data in (RED, pdf((72, 72))):
        over = {"file": ("a", data.ljust((50 << 20) + 1))}
        response = http.post("/v1/files", files=over, data={"purpose": "vision"})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "image_too_large"


FILE = ("a.png", RED)


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"files": {"file": FILE}}, "purpose"),
        ({"files": {"file": FILE}, "data": {"purpose": "batch_output"}}, "purpose"),
        ({"files": {"file": FILE}, "data": {"purpose": ""}}, "purpose"),
        ({"files": {"purpose": (None, "vision")}}, "file"),
        ({"files": [("file", FILE), ("file", FILE)], "data": {"purpose": "vision"}}, "file"),
        ({"json": {"file": "a", "purpose": "vision"}}, None),
        ({"content": b""}, None),
        ({"content": b"--b\r\n", "headers": {"Content-Type": "multipart/form-data"}}, None),
    ],
)
def test_an_invalid_form_is_refused_with_its_param(
    http: httpx.Client, sent: Any, param: str | None
) -> None:
    response = http.post("/v1/files", **sent)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


# ---------------------------------------------------------------------- in requests


def chat_parts(file_id: str) -> dict[str, dict[str, Any]]:
    return {
        "image_url": {"type": "image_url", "image_url": {"file_id": file_id}},
        "image_file": {"type": "image_file", "image_file": {"file_id": file_id}},
        "file": {"type": "file", "file": {"file_id": file_id}},
    }


def ask(http: httpx.Client, *content: dict[str, Any], **more: Any) -> dict[str, Any]:
    request = {"model": MODEL, "messages": user(*content), "max_tokens": 8, "temperature": 0}
    response = http.post("/v1/chat/completions", json=request | more)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("dialect", ["image_url", "image_file", "file"])
def test_chat_accepts_an_uploaded_image(http: httpx.Client, upload: Any, dialect: str) -> None:
    inline = ask(http, image_part(RED), WHAT)
    answer = ask(http, chat_parts(upload(RED))[dialect], WHAT)
    assert answer["choices"][0]["message"]["content"].startswith("a red circle")
    assert answer["usage"]["prompt_tokens"] == inline["usage"]["prompt_tokens"]


def test_an_uploaded_image_is_cached_for_later_and_inline_requests(
    http: httpx.Client, upload: Any
) -> None:
    part = chat_parts(upload(LARGE))["image_url"]
    ask(http, part, WHAT)
    again = ask(http, part, text_part("Again?"), include_image_details=True)
    inline = ask(http, image_part(LARGE), WHAT, include_image_details=True)
    assert again["image_details"][0]["cached"] != "none"
    assert inline["image_details"][0]["cached"] != "none"


@pytest.mark.parametrize("kind", ["input_image", "input_file"])
def test_responses_accept_an_uploaded_image(client: OpenAI, upload: Any, kind: str) -> None:
    part: dict[str, Any] = {"type": kind, "file_id": upload(RED)}
    if kind == "input_image":
        part |= {"detail": "auto", "image_url": None}
    question: Any = [
        {"role": "user", "content": [part, {"type": "input_text", "text": WHAT["text"]}]}
    ]
    answer = client.responses.create(
        model=MODEL, input=question, temperature=0, max_output_tokens=16
    )
    assert answer.output_text == "a red circle"


@pytest.mark.parametrize("kind", ["image", "document"])
def test_messages_accept_an_uploaded_image(server: Server, upload: Any, kind: str) -> None:
    content: Any = [{"type": kind, "source": {"type": "file", "file_id": upload(RED)}}, WHAT]
    with anthropic.Anthropic(base_url=server.url, api_key="none") as client:
        answer = client.messages.create(
            model=MODEL,
            max_tokens=16,
            messages=[{"role": "user", "content": content}],
            extra_body={"temperature": 0},
        )
    assert answer.content[0].text == "a red circle"  # type: ignore[union-attr]


def test_an_uploaded_pdf_becomes_one_image_per_page(http: httpx.Client, upload: Any) -> None:
    file_id = upload(pdf((300, 200), (100, 400), (200, 200)), "a.pdf", "user_data")
    part = chat_parts(file_id)["file"]
    shown = ask(http, part, WHAT, include_image_details=True)["image_details"]
    assert [(row["width"], row["height"]) for row in shown] == [(600, 400), (200, 800), (400, 400)]
    part["file"]["pages"] = "3"
    shown = ask(http, part, WHAT, include_image_details=True)["image_details"]
    assert [row["frame"] for row in shown] == [2]


def test_image_options_apply_to_uploaded_files(http: httpx.Client, upload: Any) -> None:
    def cost(part: dict[str, Any]) -> list[dict[str, Any]]:
        response = http.post("/v1/images/tokens", json={"messages": user(part)})
        assert response.status_code == 200, response.text
        rows: list[dict[str, Any]] = response.json()["data"]
        return rows

    large, moving = upload(LARGE, "a.jpg"), upload(gif(10), "a.gif")
    for options in ({}, {"max_tokens": 50}, {"detail": "low"}):
        inline = image_part(LARGE)
        inline["image_url"].update(options)
        for key in ("image_url", "image_file", "file"):
            part = chat_parts(large)[key]
            part[key].update(options)
            assert cost(part) == cost(inline)
            usage = ask(http, part, WHAT)["usage"]
            assert usage["prompt_tokens_details"]["image_tokens"] == cost(inline)[0]["tokens"]
    part = chat_parts(moving)["image_url"]
    part["image_url"]["frames"] = [7, 2]
    assert [row["frame"] for row in cost(part)] == [7, 2]


@pytest.mark.parametrize("gone", ["unknown", "deleted", "hostile"])
def test_a_missing_file_is_a_404_with_its_param(
    client: OpenAI, http: httpx.Client, upload: Any, gone: str
) -> None:
    file_id = {"unknown": ABSENT, "deleted": upload(RED), "hostile": "../../lock"}[gone]
    if gone == "deleted":
        client.files.delete(file_id)
    for key, part in chat_parts(file_id).items():
        for path in ("/v1/chat/completions", "/v1/images/tokens", "/tokenize"):
            document = {"model": MODEL, "messages": user(WHAT, part)}
            response = http.post(path, json=document)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (404, "file_not_found")
            assert error["param"] == f"messages[0].content[1].{key}"
    dialects: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/responses", {"type": "input_image", "file_id": file_id, "detail": "auto"},
         "input[0].content[0].file_id"),
        ("/v1/responses", {"type": "input_file", "file_id": file_id}, "input[0].content[0]"),
        ("/v1/messages", {"type": "image", "source": {"type": "file", "file_id": file_id}},
         "messages[0].content[0].source"),
        ("/v1/messages", {"type": "document", "source": {"type": "file", "file_id": file_id}},
         "messages[0].content[0].source"),
    ]  # fmt: skip
    for path, part, param in dialects:
        key = "input" if path == "/v1/responses" else "messages"
        document = {"model": MODEL, "max_tokens": 4, key: user(part)}
        response = http.post(path, json=document)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "file_not_found"), path
        assert error["param"] == param


@pytest.mark.parametrize("file_id", [5, None, [], {}, ""])
def test_an_invalid_file_id_is_refused(http: httpx.Client, file_id: Any) -> None:
    for part in chat_parts(file_id).values():
        document = {"model": MODEL, "messages": user(part)}
        assert http.post("/v1/chat/completions", json=document).status_code in (400, 404)


def test_pages_are_refused_for_an_image_and_a_pdf_is_accepted_as_one(
    http: httpx.Client, upload: Any
) -> None:
    paged = chat_parts(upload(RED))["file"]
    paged["file"]["pages"] = "1"
    response = http.post("/v1/chat/completions", json={"model": MODEL, "messages": user(paged)})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_file")
    document = chat_parts(upload(pdf((72, 72)), "a.pdf", "user_data"))["image_url"]
    answer = ask(http, document, WHAT)
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def test_metrics_count_stored_files(http: httpx.Client, upload: Any) -> None:
    upload(RED)
    metrics = http.get("/metrics", headers=FRESH).text
    lines = [line for line in metrics.splitlines() if line.startswith("saccade_file")]
    assert len(lines) == 2
    assert all(float(line.split()[1]) > 0 for line in lines)


# ---------------------------------------------------------------------- groups, and no files folder


class GroupOfHeader:
    """Sets the key group of a request from its header `group`, in place of the API key check."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            group = dict(scope["headers"]).get(b"group", b"").decode()
            set_record(scope, Record(key_group=group))
        await self._app(scope, receive, send)


@contextlib.asynccontextmanager
async def small_app(store: FileStore | None) -> AsyncIterator[httpx.AsyncClient]:
    """The file routes and their middleware, without an engine."""
    app = FastAPI()
    app.state.loader = media_loader(store)
    app.state.files = store
    app.state.max_batch_bytes = 50_000
    app.include_router(files.router)
    app.include_router(images.router)
    errors.add_error_handlers(app)
    app.add_middleware(
        body.BodyReader,
        settings=HttpSettings(),
        reader=reader(),
        loader=app.state.loader,
        retained=None,
        limits={files.PATH: 100_000},
        budget=ByteBudget(1 << 20, 1.0),
        parsed=(),
        admission=Admission(limits(wait_s=1.0)),
        admitted=(),
    )
    app.add_middleware(GroupOfHeader)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def send(client: httpx.AsyncClient, group: str) -> str:
    response = await client.post(
        "/v1/files", files={"file": FILE}, data={"purpose": "vision"}, headers={"group": group}
    )
    assert response.status_code == 200, response.text
    file_id: str = FileObject.model_validate(response.json()).id
    return file_id


def test_groups_do_not_see_each_others_files(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            FileStore(tmp_path, Quota(), Quota(max_files=1), None) as store,
            small_app(store) as client,
        ):
            owned = {group: await send(client, group) for group in ("a", "b")}
            over = await client.post(
                "/v1/files",
                files={"file": FILE},
                data={"purpose": "vision"},
                headers={"group": "a"},
            )
            assert (over.status_code, over.json()["error"]["code"]) == (413, "file_quota_exceeded")
            for group, other in (("a", "b"), ("b", "a"), ("", "a")):
                headers, foreign = {"group": group}, owned[other]
                listed = (await client.get("/v1/files", headers=headers)).json()["data"]
                assert [file["id"] for file in listed] == [
                    owned[name] for name in owned if name == group
                ]
                unknown = await client.get(f"/v1/files/{ABSENT}", headers=headers)
                asked = [
                    await client.get(f"/v1/files/{foreign}", headers=headers),
                    await client.get(f"/v1/files/{foreign}/content", headers=headers),
                    await client.delete(f"/v1/files/{foreign}", headers=headers),
                ]
                for answer in asked:
                    assert answer.status_code == 404
                    assert answer.json() == unknown.json()
                for name in ({"file_id": foreign}, {"file_id": foreign, "detail": "low"}):
                    part = {"type": "image_url", "image_url": name}
                    request = {"messages": user(part)}
                    shown = await client.post("/v1/images/tokens", json=request, headers=headers)
                    assert (shown.status_code, shown.json()["error"]["code"]) == (
                        404,
                        "file_not_found",
                    )

    asyncio.run(run())


def test_without_a_files_folder_the_error_names_the_flag() -> None:
    async def run() -> None:
        async with small_app(None) as client:
            answers = [
                await client.get("/v1/files"),
                await client.post("/v1/files", files={"file": FILE}, data={"purpose": "vision"}),
                await client.get(f"/v1/files/{ABSENT}"),
                await client.delete(f"/v1/files/{ABSENT}"),
                *[
                    await client.post("/v1/images/tokens", json={"messages": user(part)})
                    for part in chat_parts(ABSENT).values()
                ],
            ]
        for answer in answers:
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "files_disabled")
            assert "--files-dir" in error["message"]

    asyncio.run(run())


def test_an_endless_upload_is_cut_off(tmp_path: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100_000_000:
            sent += 10_000
            yield bytes(10_000)

    async def run() -> None:
        async with (
            FileStore(tmp_path, Quota(), Quota(), None) as store,
            small_app(store) as client,
        ):
            headers = {"Content-Type": "multipart/form-data; boundary=b"}
            answer = await client.post("/v1/files", content=endless(), headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                413,
                "request_too_large",
            )

    asyncio.run(run())
    assert sent <= 120_000


def test_the_input_of_a_batch_is_stored_unless_it_is_too_large_or_empty(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            FileStore(tmp_path, Quota(), Quota(), None) as store,
            small_app(store) as client,
        ):
            answers = [
                await client.post(
                    "/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch"}
                )
                for data in (b"{}\n", bytes(50_001), b" \n")
            ]
        made, large, empty = (answer.json() for answer in answers)
        assert (made["purpose"], made["bytes"]) == ("batch", 3)
        assert (large["error"]["code"], large["error"]["param"]) == ("batch_too_large", "file")
        assert (empty["error"]["code"], empty["error"]["param"]) == ("invalid_request", "file")

    asyncio.run(run())


# ---------------------------------------------------------------------- forms and parts

KIND = "multipart/form-data; boundary=b"


def form(*fields: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + field + b"\r\n" for field in fields) + end


def field(disposition: bytes, data: bytes) -> bytes:
    return b"Content-Disposition: form-data; " + disposition + b"\r\n\r\n" + data


def test_a_form_is_parsed_byte_for_byte() -> None:
    binary = b"\r\n--a\r\n--\r\n\0\xff--b\r\n-"
    found = read_form(
        KIND,
        form(
            field('name="file"; filename="ä \\"b\\".png"'.encode(), binary),
            field(b'name="purpose"', "é".encode()),
            field(b"name=empty", b""),
        ),
    )
    assert found["file"] == Field('ä "b".png', memoryview(binary))
    assert found["purpose"].text == "é"
    assert found["empty"].data == b""


@pytest.mark.parametrize("first", [b"--b", b"\r\n--b"])
@pytest.mark.parametrize("off", range(-8, 8))
def test_a_form_is_parsed_wherever_its_slices_end(
    monkeypatch: pytest.MonkeyPatch, first: bytes, off: int
) -> None:
    monkeypatch.setattr(files, "SLICE_BYTES", 100)
    text = form(
        field(b'name="a"', bytes(200 + off)),
        field(b'name="b"', b"\r\n--" * 60 + b"\r\n--bx\r\n--b-\r"),
        field(b'name="c"', b"\r\n" * 50),
    )
    found = read_form(KIND, first + text[3:] + b"epilogue")
    assert [bytes(each.data) for each in found.values()] == [
        bytes(200 + off),
        b"\r\n--" * 60 + b"\r\n--bx\r\n--b-\r",
        b"\r\n" * 50,
    ]


PIECES = st.sampled_from(
    [b"\r\n", b"--b", b"\r\n--b", b"\r\n--b--", b"--", b"-", b"\r", b"\n", b"b", b":", b" ", b"\0x"]
)
DATA = st.lists(PIECES, max_size=12).map(b"".join)


@given(st.lists(DATA, min_size=1, max_size=4))
def test_a_form_holds_the_same_for_a_library(data: list[bytes]) -> None:
    """A form is read as by python-multipart, if it is read at all."""
    body = form(*(field(b'name="%d"' % at, each) for at, each in enumerate(data)))
    try:
        found = read_form(KIND, body)
    except ClientError:
        assert any(b"\r\n--b" in b"\r\n" + each + b"\r\n" for each in data)
        return
    assert {name: bytes(each.data) for name, each in found.items()} == by_library(body)


def by_library(body: bytes) -> dict[str, bytes]:
    """The fields of a form as python-multipart reads them."""
    fields: dict[str, bytes] = {}
    head, value = b"", b""

    def begin() -> None:
        nonlocal head, value
        head = value = b""

    def on_head(data: bytes, start: int, end: int) -> None:
        nonlocal head
        head += data[start:end]

    def on_data(data: bytes, start: int, end: int) -> None:
        nonlocal value
        value += data[start:end]

    def end() -> None:
        name = parse_options_header(head)[1][b"name"].decode()
        fields.setdefault(name, value)

    parser = MultipartParser(
        b"b",
        {
            "on_part_begin": begin,
            "on_header_value": on_head,
            "on_part_data": on_data,
            "on_part_end": end,
        },
    )
    parser.write(body)
    return fields


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("", form(field(b'name="a"', b""))),
        ("text/plain; boundary=b", form(field(b'name="a"', b""))),
        ("multipart/form-data", form(field(b'name="a"', b""))),
        ("multipart/form-data; boundary=", form(field(b'name="a"', b""))),
        (f"multipart/form-data; boundary={'b' * 1000}", b"--" + b"b" * 1000 + b"--"),
        (KIND, b""),
        (KIND, b"\r\n" * 1000),
        (KIND, b"no form at all"),
        (KIND, form(field(b'name="a"', b"1"), end=b"")),
        (KIND, form(field(b'name="a"', b"1"), end=b"--b-")),
        (KIND, form(field(b'filename="a"', b"1"))),
        (KIND, form(b"No-Colon\r\n\r\ndata")),
        (KIND, form(b"data without headers")),
        (KIND, form(b"X: " + b"x" * 1_000_000 + b"\r\n\r\n")),
        (KIND, form(b"X: x\r\n" * 100_000 + b"\r\n")),
        (KIND, form(*[field(b'name="%d"' % i, b"") for i in range(40)])),
        (KIND, form(field(b'name="a"', b""), field(b'name="a"', b""))),
        (KIND, form(field(b'name="a"', b"1\r\n--b" + b" " * 1000 + b"\r\n"))),
        (KIND, b"--b\r\n--b--\r\n"),
        (KIND, b"--b\r\n\r\n--b--\r\n"),
    ],
)
def test_a_malformed_form_is_refused(kind: str, text: bytes) -> None:
    with pytest.raises(ClientError):
        read_form(kind, text)


def test_a_form_full_of_near_delimiters_is_refused_with_little_memory() -> None:
    body_of_delimiters = form(field(b'name="file"', b"\r\n--bx" * 1_000_000))
    tracemalloc.start()
    with pytest.raises(ClientError, match="fields"):
        read_form(KIND, body_of_delimiters)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
