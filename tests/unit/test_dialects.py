"""The dialect tables: where requests contain media, their options, and what is left unchanged."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from server.errors import ClientError, InvalidFile, InvalidImageUrl
from server.imaging.encoded import ImageOptions
from server.imaging.sampling import SamplingOptions
from server.request.media import Inline, MediaRef, Pictures, Remote, SentBefore, Uploaded
from tests.media import CHAT, EMBEDDINGS, LIMITS, chat, read

URL = "https://example.com/a.png"
ID = "file-" + "0" * 32
MESSAGES, RESPONSES, TOKENS = "/v1/messages", "/v1/responses", "/v1/images/tokens"


def only(part: dict[str, Any], path: str = CHAT) -> MediaRef:
    key = "input" if path == RESPONSES else "messages"
    (ref,) = read({key: [{"role": "user", "content": [part]}]}, path).context.media
    return ref


def refused(part: Any, path: str = CHAT, role: str = "user", **more: Any) -> ClientError:
    key = "input" if path == RESPONSES else "messages"
    with pytest.raises(ClientError) as refusal:
        read({key: [{"role": role, "content": [part]}]}, path, **more)
    return refusal.value


SOURCES = [
    (CHAT, {"type": "image_url", "image_url": {"url": URL}}, "image_url", Remote(URL)),
    (CHAT, {"type": "image_url", "image_url": URL}, "image_url", Remote(URL)),
    (CHAT, {"type": "image_url", "image_url": f" {URL}\n"}, "image_url", Remote(URL)),
    (CHAT, {"image_url": {"url": URL}}, "image_url", Remote(URL)),
    (CHAT, {"type": None, "image_url": URL}, "image_url", Remote(URL)),
    (CHAT, {"type": "input_image", "image_url": URL}, "image_url", Remote(URL)),
    (CHAT, {"type": "image_url", "image_url": {"file_id": ID}}, "image_url", Uploaded(ID)),
    (CHAT, {"type": "image_file", "image_file": {"file_id": ID}}, "image_file", Uploaded(ID)),
    (CHAT, {"type": "file", "file": {"file_data": "AA=="}}, "file", Inline("AA==")),
    (CHAT, {"type": "file", "file": {"file_id": ID}}, "file", Uploaded(ID)),
    (CHAT, {"type": "video_url", "video_url": {"url": URL}}, "video_url", Remote(URL)),
    (CHAT, {"type": "video_url", "video_url": URL}, "video_url", Remote(URL)),
    (CHAT, {"type": "video_url", "video_url": {"file_id": ID}}, "video_url", Uploaded(ID)),
    (CHAT, {"type": "input_video", "video_url": URL}, "video_url", Remote(URL)),
    (CHAT, {"type": "input_video", "input_video": {"data": "AA==", "format": "mp4"}},
     "input_video", Inline("AA==")),
    (CHAT, {"type": "input_video", "file_id": ID}, "", Uploaded(ID)),
    (CHAT, {"type": "video", "video": URL}, "video", Remote(URL)),
    (CHAT, {"video": [URL, {"url": URL}, {"type": "image", "image": URL}, {"file_id": ID}]},
     "video", Pictures((Remote(URL), Remote(URL), Remote(URL), Uploaded(ID)))),
    (CHAT, {"type": "file", "file": {"file_data": "AA==", "filename": "a.MP4"}}, "file",
     Inline("AA==")),
    (RESPONSES, {"type": "input_video", "video_url": URL}, "video_url", Remote(URL)),
    (RESPONSES, {"type": "input_file", "file_url": URL, "filename": "a.webm"}, "", Remote(URL)),
    (MESSAGES, {"type": "video", "source": {"type": "url", "url": URL}}, "source", Remote(URL)),
    (CHAT, {"type": "audio_url", "audio_url": {"url": URL}}, "audio_url", Remote(URL)),
    (CHAT, {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
     "input_audio", Inline("AA==")),
    (RESPONSES, {"type": "input_image", "image_url": URL}, "image_url", Remote(URL)),
    (RESPONSES, {"type": "input_image", "file_id": ID}, "file_id", Uploaded(ID)),
    (RESPONSES, {"type": "input_file", "file_url": URL}, "", Remote(URL)),
    (RESPONSES, {"type": "input_file", "file_data": "AA=="}, "", Inline("AA==")),
    (MESSAGES, {"type": "image", "source": {"type": "url", "url": URL}}, "source", Remote(URL)),
    (MESSAGES, {"type": "image", "source": {"type": "base64", "data": "AA=="}}, "source",
     Inline("AA==")),
    (MESSAGES, {"type": "image", "source": {"type": "file", "file_id": ID}}, "source",
     Uploaded(ID)),
    (MESSAGES, {"type": "document", "source": {"type": "base64", "data": "AA=="}}, "source",
     Inline("AA==")),
]  # fmt: skip


@pytest.mark.parametrize(("route", "part", "key", "source"), SOURCES)
def test_a_media_part_is_found_in_its_dialects_place(
    route: str, part: dict[str, Any], key: str, source: object
) -> None:
    ref = only(copy.deepcopy(part), route)
    assert ref.source == source
    root = "input" if route == RESPONSES else "messages"
    assert ref.path == f"{root}[0].content[0]" + (f".{key}" if key else "")


@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES])
def test_token_counting_accepts_the_parts_of_every_dialect(route: str) -> None:
    for _, part, _, source in (case for case in SOURCES if case[0] == route):
        key = "input" if route == RESPONSES else "messages"
        (ref,) = read({key: [{"role": "user", "content": [part]}]}, TOKENS).context.media
        assert ref.source == source


def test_lookalikes_outside_of_content_are_not_media() -> None:
    schema = {"type": "object", "properties": {"image_url": {"type": "string"}}}
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"u": URL})}}
    document = chat({"type": "text", "text": URL}) | {
        "tools": [{"type": "function", "function": {"parameters": schema}, "image_url": URL}],
        "metadata": {"image": {"type": "image_url", "image_url": URL, "frames": 3}},
        "chat_template_kwargs": {"parts": [{"type": "image_url", "image_url": URL}]},
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}],
    }
    document["messages"].append({"role": "assistant", "content": None, "tool_calls": [call]})
    found = read(document)
    assert found.context.media == []
    assert found.rewritten() == found.body


def test_arguments_of_anthropic_tools_are_not_read() -> None:
    """Neither URLs in them nor keys that look like the server's options."""
    given = {"image_url": URL, "detail": "full", "frames": 3, "type": "image", "source": None}
    block = {"type": "tool_use", "id": "t", "name": "f", "input": given}
    body = {"messages": [{"role": "assistant", "content": [block]}]}
    found = read(body, MESSAGES)
    assert found.context.media == []
    assert json.loads(found.rewritten()) == body


@pytest.mark.parametrize("kind", ["function_call_output", "custom_tool_call_output"])
def test_responses_tool_output_may_contain_images(kind: str) -> None:
    output = [{"type": "input_image", "image_url": URL}]
    body = {"input": [{"type": kind, "call_id": "c", "output": output}]}
    (ref,) = read(body, RESPONSES).context.media
    assert ref.path == "input[0].output[0].image_url"


def test_anthropic_tool_results_may_contain_images() -> None:
    image = {"type": "image", "source": {"type": "url", "url": URL}}
    block = {"type": "tool_result", "tool_use_id": "t", "content": [image]}
    (ref,) = read({"messages": [{"role": "user", "content": [block]}]}, MESSAGES).context.media
    assert ref.path == "messages[0].content[0].content[0].source"


@pytest.mark.parametrize(
    ("route", "key"),
    [("/v1/embeddings", "input"), ("/score", "data_1"), ("/rerank", "documents"),
     ("/v2/embed", "inputs"), ("/pooling", "messages")],
)  # fmt: skip
def test_pooling_routes_take_media_parts_in_their_inputs(route: str, key: str) -> None:
    part = {"type": "image_url", "image_url": {"url": URL}}
    (ref,) = read({key: [{"content": [part]}]}, route).context.media
    assert ref.path == f"{key}[0].content[0].image_url"


def test_bare_urls_in_cohere_requests_are_media() -> None:
    (ref,) = read({"images": [URL]}, "/v2/embed").context.media
    assert (ref.path, ref.source) == ("images[0]", Remote(URL))


def test_batches_of_conversations_are_read() -> None:
    part = {"type": "image_url", "image_url": {"url": URL}}
    batch = [[{"role": "user", "content": [part]}]] * 2
    media = read({"messages": batch}, "/v1/chat/completions/batch").context.media
    assert [ref.path for ref in media] == [
        "messages[0][0].content[0].image_url",
        "messages[1][0].content[0].image_url",
    ]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_pil", "image_pil": "http://127.0.0.1/"},
        {"type": "image_pil", "image_pil": "http://127.0.0.1/", "uuid": "U"},
        {"image_pil": "http://127.0.0.1/"},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "audio_embeds", "audio_embeds": "AAAA", "uuid": "U"},
        {"type": "prompt_embeds", "data": "AAAA"},
        {"type": "hologram", "hologram": URL},
        {"type": "image", "source": {"type": "url", "url": URL}},
        {"type": None},
        {"type": 5},
        {"type": ["image_url"]},
        {},
    ],
)
def test_the_error_for_an_unknown_part_names_its_type(part: dict[str, Any]) -> None:
    assert refused(part).param == "messages[0].content[0].type"


def test_embedding_parts_are_accepted_if_the_server_allows_them() -> None:
    part = {"type": "image_embeds", "image_embeds": "AAAA"}
    body = chat(part)
    assert read(body, embeddings=EMBEDDINGS).context.media == []
    assert refused({"type": "audio_embeds"}, embeddings=EMBEDDINGS).param is not None


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": ""}, "uuid": "U"}, "image_url"),
        ({"type": "image_url", "image_url": {"url": 5}, "uuid": "U"}, "image_url"),
        ({"type": "image_url", "image_url": 5}, "image_url"),
        ({"type": "image_url", "image_url": {"url": "ftp://a/b"}}, "image_url"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "image_url"),
        ({"type": "image_url", "image_url": {"url": f"saccade-file:{ID}"}}, "image_url"),
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": {"url": URL}, "uuid": 5}, "uuid"),
        ({"type": "image_url", "image_url": {"url": URL}, "uuid": "u" * 1025}, "uuid"),
        ({"type": "image_file", "image_file": {"file_id": 5}}, "image_file"),
        ({"type": "video_url", "video_url": {"url": None}}, "video_url"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "input_audio.data"),
        ({"type": "file", "file": {"filename": "a.pdf"}}, "file"),
        ({"type": "file"}, "file"),
    ],
)
def test_the_error_for_an_invalid_value_names_it(part: dict[str, Any], param: str) -> None:
    assert refused(part).param == f"messages[0].content[0].{param}"


@pytest.mark.parametrize("source", [None, "x", {}, {"type": "base64", "data": ""}, {"type": "url"}])
def test_an_anthropic_image_without_a_source_is_refused(source: object) -> None:
    refusal = refused({"type": "image", "source": source}, MESSAGES)
    assert (refusal.param or "").startswith("messages[0].content[0].source")


@pytest.mark.parametrize("kind", ["image", "document"])
def test_media_in_an_anthropic_system_prompt_are_refused(kind: str) -> None:
    block = {"type": kind, "source": {"type": "base64", "data": "AA=="}}
    assert refused(block, MESSAGES, role="system").param == "messages[0].content[0]"
    with pytest.raises(ClientError) as refusal:
        read({"system": [block], "messages": []}, MESSAGES)
    assert refusal.value.param == "system[0]"


def test_a_content_part_that_is_not_an_object_is_refused() -> None:
    assert refused(5).param == "messages[0].content[0]"
    assert read(chat("a text")).context.media == []  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_media_of_a_kind_that_the_model_does_not_take_are_refused(kind: str) -> None:
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": URL}}
    refusal = refused(part, limits=None)
    assert f"no {kind} input" in refusal.message
    assert refusal.param == f"messages[0].content[0].{kind}_url"


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize("beside_url", [True, False])
def test_options_are_read_beside_the_url_and_from_the_part(beside_url: bool) -> None:
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": URL}}
    (part["image_url"] if beside_url else part).update(detail="low", max_tokens=64)
    assert only(part).options == ImageOptions("low", 64)


@pytest.mark.parametrize("detail", ["auto", None])
@pytest.mark.parametrize(
    ("route", "part"), [(r, p) for r, p, k, _ in SOURCES if k != "input_audio"]
)
def test_missing_detail_is_auto(route: str, part: dict[str, Any], detail: str | None) -> None:
    assert only({**copy.deepcopy(part), "detail": detail}, route).options == ImageOptions()


def test_original_detail_and_unknown_keys_are_accepted() -> None:
    part = {"type": "image_url", "image_url": {"url": URL, "detail": "original", "new": 1}}
    assert only({**part, "prompt_cache_breakpoint": True, "more": {}}).options.detail == "high"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("detail", "medium"), ("detail", 3), ("max_tokens", 0), ("max_tokens", True),
        ("max_tokens", "64"), ("max_tokens", 1.5), ("frames", -1), ("frames", []),
        ("frames", [1, "2"]), ("frames", [-1]), ("frames", True), ("frames", [False]),
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_option_names_it(option: str, value: object) -> None:
    refusal = refused({"type": "image_url", "image_url": {"url": URL, option: value}})
    assert refusal.param == f"messages[0].content[0].image_url.{option}"
    for more in ({"image_url": URL}, {"image_url": {"url": URL}}, {"uuid": "U"}):
        refusal = refused({"type": "image_url", option: value, **more})
        assert refusal.param == f"messages[0].content[0].{option}"
    refusal = refused({"type": "image_url", "uuid": "U", "image_url": {option: value}})
    assert refusal.param == f"messages[0].content[0].image_url.{option}"


@pytest.mark.parametrize(
    ("pages", "wanted"),
    [("1", (0,)), ("1-3,7", (0, 1, 2, 6)), ("2, 1", (1, 0)), ([3, "5-6"], (2, 4, 5)), (4, (3,))],
)
def test_pages_are_counted_from_one(pages: object, wanted: tuple[int, ...]) -> None:
    ref = only({"type": "file", "file": {"file_data": "AA==", "pages": pages}})
    assert ref.frames == wanted


@pytest.mark.parametrize(
    "pages", ["0", "3-1", "a", "1-", "-2", "", "1,,2", "1-99999,1-99999", "²", "9" * 9, {}, True]
)
def test_the_error_for_invalid_pages_names_them(pages: object) -> None:
    refusal = refused({"type": "file", "file": {"file_data": "AA==", "pages": pages}})
    assert refusal.param == "messages[0].content[0].file.pages"


def test_a_part_with_only_a_uuid_may_have_options() -> None:
    ref = only({"type": "image_url", "image_url": None, "uuid": "U", "max_tokens": 5})
    assert (ref.source, ref.uuid, ref.options) == (SentBefore(), "U", ImageOptions(max_tokens=5))
    assert only({"type": "image_url", "uuid": "x"}).source == SentBefore()


def test_frames_and_pages_of_a_part_with_a_uuid_are_refused() -> None:
    part = {"type": "image_url", "image_url": {"url": URL, "frames": 2}, "uuid": "U"}
    assert "uuid" in refused(part).message
    part = {"type": "file", "file": {"file_data": "AA=="}, "pages": "1", "uuid": "U"}
    assert refused(part).param == "messages[0].content[0].pages"


def test_the_error_for_a_file_without_data_says_so() -> None:
    refusal = refused({"type": "file", "file": {"filename": "a.pdf"}})
    assert isinstance(refusal, InvalidFile)
    assert "no file_data" in refusal.message


def test_the_error_for_an_empty_url_with_a_uuid_is_about_the_url() -> None:
    refusal = refused({"type": "image_url", "image_url": {"url": " "}, "uuid": "U"})
    assert isinstance(refusal, InvalidImageUrl)
    assert "empty" in refusal.message


VIDEO = {"type": "video_url", "video_url": {"url": URL}}
VIDEOS = [
    (CHAT, VIDEO),
    (CHAT, {"type": "video", "video": [URL]}),
    (CHAT, {"type": "input_video", "input_video": {"data": "AA=="}}),
    (CHAT, {"type": "file", "file": {"file_data": "data:video/mp4;base64,AA=="}}),
    (CHAT, {"type": "file", "file": {"file_id": ID, "format": "video/mp4"}}),
    (RESPONSES, {"type": "input_file", "file_data": "AA==", "filename": "a.mov"}),
    (MESSAGES, {"type": "document",
                "source": {"type": "base64", "media_type": "video/mp4", "data": "AA=="}}),
]  # fmt: skip


@pytest.mark.parametrize(("route", "part"), VIDEOS)
def test_every_video_is_refused_where_the_model_takes_none(
    route: str, part: dict[str, Any]
) -> None:
    refusal = refused(part, route, limits=replace(LIMITS, max_clips={}))
    assert refusal.message == "this model takes no video input"
    assert (refusal.param or "").startswith(("messages[0].content[0]", "input[0].content[0]"))


@pytest.mark.parametrize("name", ["num_frames", "max_frames"])
def test_the_frames_of_a_video_are_limited(name: str) -> None:
    most = LIMITS.max_shown_frames
    assert only({**VIDEO, name: most}).kind == "video"
    assert f"at most {most} frames" in refused({**VIDEO, name: most + 1}).message
    assert "pictures" in refused({"type": "video", "video": [URL] * (most + 1)}).message


def test_options_of_a_video_are_read_beside_the_url_and_from_the_part() -> None:
    beside = {"url": URL, "fps": 0.5, "start": 1, "max_tokens": 99}
    found = only({"type": "video_url", "video_url": beside, "start": 9, "end": 2.5})
    assert found.sampling == SamplingOptions(fps=0.5, start_s=1, end_s=2.5, max_tokens=99)
    assert only({**VIDEO, "num_frames": 7}).sampling == SamplingOptions(num_frames=7)
    assert only({**VIDEO, "max_frames": 7}).sampling == SamplingOptions(max_frames=7)
    assert only(VIDEO).sampling == SamplingOptions()


@pytest.mark.parametrize(
    "options",
    [
        {"fps": 0}, {"fps": -1}, {"fps": True}, {"fps": "2"}, {"fps": 1001}, {"num_frames": 0},
        {"num_frames": 2.0}, {"max_frames": -1}, {"max_frames": 1 << 17}, {"start": -1},
        {"end": 0}, {"end": "1"}, {"max_tokens": 0},
        {"start": 2, "end": 2}, {"fps": 2, "num_frames": 4}, {"num_frames": 4, "max_frames": 4},
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_option_of_a_video_names_it(options: dict[str, Any]) -> None:
    refusal = refused({**VIDEO, **options})
    assert refusal.param == f"messages[0].content[0].{list(options)[-1]}"


def test_options_of_a_video_do_not_reach_the_chat_template() -> None:
    found = read(chat({**VIDEO, "fps": 2, "start": 1, "note": "x"}))
    found.context.bind("handle", found.context.media[0])
    (part,) = json.loads(found.rewritten())["messages"][0]["content"]
    assert part.keys() == {"type", "video_url", "note"}
