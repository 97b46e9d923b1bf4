"""Observability of a request: id, Server-Timing header and comment, metrics, log line, trace."""

import contextlib
import json
import math
import re
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from openai import OpenAI
from PIL import Image

from server.telemetry.stages import Stage
from tests import otlp, pictures
from tests.conftest import Origin, Server
from tests.otlp import Receiver, Span
from tests.pictures import image_part, text_part, user
from tests.scrape import ended_early, rises, scrape, value, wait_for
from tests.server.conftest import A

PATH = "/v1/chat/completions"
WHAT = text_part("What is in the image?")
# Options for long answers. SOME: longer than the delay of the encoder's report. LONG: so long that
# the client's own time is negligible.
SOME = {"max_tokens": 64, "ignore_eos": True}
LONG = {"max_tokens": 400, "ignore_eos": True}
ATTEMPTS = 5  # at a measurement that a busy machine can only lengthen
IMAGE_STAGES = [
    Stage.UPLOAD,
    Stage.ADMISSION,
    Stage.FETCH,
    Stage.DECODE,
    Stage.PREPROCESS,
    Stage.RENDER,
    Stage.ENGINE_QUEUE,
    Stage.ENCODE,
    Stage.PREFILL,
    Stage.FIRST_TOKEN,
    Stage.GENERATE,
    Stage.RESPOND,
]

_seed = iter(range(1000))


def noise(size: tuple[int, int] = (256, 192)) -> bytes:
    """An encoded picture that no other test sends."""
    pixels = np.random.default_rng(9_000 + next(_seed)).integers(0, 256, (*size[::-1], 3), np.uint8)
    return pictures.encode(Image.fromarray(pixels))


def body(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    request = {"model": "saccade-tiny", "messages": user(*parts), "temperature": 0}
    return {"max_tokens": 8, **request, **more}


def prepared(
    client: httpx.Client, content: dict[str, Any], headers: dict[str, str] | None = None
) -> httpx.Request:
    """A request with its JSON already written, which would otherwise count as server time."""
    return client.build_request("POST", PATH, json=content, headers=headers)


def timings(text: str) -> dict[str, float]:
    """Parse a `Server-Timing` value: {metric: milliseconds}."""
    found = dict(re.fullmatch(r"(\w+);dur=([\d.]+)", part).groups() for part in text.split(", "))
    return {name: float(number) for name, number in found.items()}


# ---------------------------------------------------------------------- ids


def test_a_request_id_header_is_used_and_returned(http: httpx.Client) -> None:
    answer = http.post(PATH, json=body(WHAT), headers={"X-Request-Id": "order-66:a/b"})
    assert answer.headers["x-request-id"] == "order-66:a/b"
    assert answer.json()["id"] == "chatcmpl-order-66:a/b"


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "né", 'a"b', "{}"])
def test_an_invalid_request_id_is_replaced(http: httpx.Client, given: str) -> None:
    answer = http.post(PATH, json=body(WHAT), headers={"X-Request-Id": given.encode()})
    name = answer.headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", name)
    assert answer.json()["id"] == f"chatcmpl-{name}"


def test_two_request_ids_are_refused(http: httpx.Client) -> None:
    for first, name in (("one", "one"), ("two words", "[0-9a-f]{32}")):
        headers = [("X-Request-Id", first), ("X-Request-Id", "other")]
        answer = http.post(PATH, json=body(WHAT), headers=headers)
        assert answer.status_code == 400
        (given,) = answer.headers.get_list("x-request-id")
        assert re.fullmatch(name, given)


def test_log_lines_cannot_be_forged_and_are_bounded(server: Server, http: httpx.Client) -> None:
    forged = "INFO: forged line"
    http.post(PATH, json={**body(WHAT), "model": f"m\n{forged}"})
    http.post(f"/v1/x%0A{forged}?token=sk-secret", content=b"{}")
    http.get("/v1/" + "x" * 5000)
    refused = http.post(PATH, json={**body(WHAT), "model": "m" * 10_000})
    assert refused.json()["error"]["param"] == "model"
    http.get("/v1/after")
    deadline = time.monotonic() + 20
    while not any("/v1/after" in line for line in server.log) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [line for line in server.log if forged in line]
    assert not [line for line in server.log if line.startswith(forged)]
    assert not [line for line in server.log if "sk-secret" in line or len(line) > 5000]


def test_errors_and_other_routes_return_a_request_id(http: httpx.Client) -> None:
    ids = {
        http.get("/v1/models").headers["x-request-id"],
        http.get("/nowhere").headers["x-request-id"],
        http.post(PATH, content=b"{").headers["x-request-id"],
        http.post(PATH, json=body(image_part(b"no image"))).headers["x-request-id"],
    }
    assert len(ids) == 4


# ---------------------------------------------------------------------- Server-Timing


def test_server_timing_reports_every_stage_of_a_picture(http: httpx.Client) -> None:
    http.post(PATH, json=body(image_part(noise()), WHAT))  # connect
    shares = []
    while len(shares) < ATTEMPTS and max(shares, default=0) < 0.95:
        request = prepared(http, body(image_part(noise((1600, 1200))), WHAT, **LONG))
        started = time.perf_counter()
        answer = http.send(request)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        found = timings(answer.headers["server-timing"])
        total = found.pop("total")
        assert [name for name in found if name != Stage.IMAGE_QUEUE] == IMAGE_STAGES
        assert sum(found.values()) == pytest.approx(total, abs=0.1 * len(found))
        assert total <= elapsed_ms
        shares.append(sum(found.values()) / elapsed_ms)
    assert max(shares) >= 0.95


def test_a_cached_picture_skips_its_image_stages(http: httpx.Client) -> None:
    request = body(image_part(noise()), WHAT, **SOME)
    first, again = (http.post(PATH, json=request) for _ in range(2))
    skipped = {"decode", "preprocess", "encode"}
    assert skipped <= timings(first.headers["server-timing"]).keys()
    assert not skipped & timings(again.headers["server-timing"]).keys()


def test_server_timing_reports_the_fetch(http: httpx.Client, origin: Origin) -> None:
    origin.files["/slow.png"], origin.delay_s["/slow.png"] = noise(), 0.3
    part = {"type": "image_url", "image_url": {"url": f"{origin.url}/slow.png"}}
    found = timings(http.post(PATH, json=body(part, WHAT)).headers["server-timing"])
    assert found["fetch"] >= 300


def test_routes_without_the_engine_send_server_timing(http: httpx.Client) -> None:
    answer = http.post("/v1/images/tokens", json={"images": [{"width": 100, "height": 100}]})
    assert answer.status_code == 200
    assert timings(answer.headers["server-timing"]).keys() == {
        "upload", "admission", "render", "total",
    }  # fmt: skip


def test_a_stream_ends_with_a_server_timing_comment(http: httpx.Client) -> None:
    request = body(image_part(noise()), WHAT, stream=True, **SOME)
    with http.stream("POST", PATH, json=request) as answer:
        assert "server-timing" not in answer.headers
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-2] == "data: [DONE]"
    assert lines[-1].startswith(": server-timing ")
    found = timings(lines[-1].removeprefix(": server-timing "))
    assert {"encode", "generate", "total"} <= found.keys()


def test_the_official_client_ignores_the_timing_comment(client: OpenAI) -> None:
    messages: Any = user(image_part(noise()), WHAT)
    stream = client.chat.completions.create(
        model="saccade-tiny", messages=messages, max_tokens=8, stream=True
    )
    pieces = [chunk for chunk in stream if chunk.choices]
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    messages_stream = client.responses.create(
        model="saccade-tiny", input="Hello", max_output_tokens=8, stream=True
    )
    assert [event.type for event in messages_stream][-1] == "response.completed"


# ---------------------------------------------------------------------- metrics


def test_metrics_measure_every_stage_of_a_request(http: httpx.Client) -> None:
    before = scrape(http)
    data = noise((300, 200))
    request = body(image_part(data), image_part(noise((300, 200))), WHAT, **SOME)
    usage = http.post(PATH, json=request).json()["usage"]
    now = rises(http, before, "saccade_requests_total", outcome="answered")

    def rise(name: str, **labels: str) -> float:
        return value(now, name, **labels) - value(before, name, **labels)

    for stage in IMAGE_STAGES:
        assert rise("saccade_request_stage_seconds_count", stage=stage) == 1, stage
    for name in ("image_bytes", "image_pixels", "image_decode_seconds", "image_preprocess_seconds",
                 "image_queue_wait_seconds"):  # fmt: skip
        assert rise(f"saccade_{name}_count") == 2, name
    assert rise("saccade_image_pixels_sum") == 2 * 300 * 200
    assert rise("saccade_image_bytes_sum") == pytest.approx(2 * len(data), rel=0.01)
    assert rise("saccade_image_fetch_seconds_count", source="data") == 2
    tokens = usage["prompt_tokens_details"]["image_tokens"]
    assert rise("saccade_image_tokens_sum", cap="none") == tokens
    total = rise("saccade_request_seconds_sum", images="true")
    first = rise("saccade_time_to_first_token_seconds_sum", images="true")
    stages = {stage: rise("saccade_request_stage_seconds_sum", stage=stage) for stage in Stage}
    assert sum(stages.values()) == pytest.approx(total)
    after = stages[Stage.GENERATE] + stages[Stage.RESPOND]
    assert total - after == pytest.approx(first)
    assert value(now, "saccade_requests_in_flight") == 0


@pytest.mark.parametrize(
    ("cap", "more", "options"),
    [
        ("none", {"max_image_tokens": 1000}, {}),
        ("request", {"max_image_tokens": 60}, {}),
        ("image", {}, {"max_tokens": 60}),
        ("image", {"max_image_tokens": 100}, {"max_tokens": 60}),
        ("request", {"max_image_tokens": 60}, {"max_tokens": 90}),
    ],
)
def test_image_tokens_are_counted_under_the_cap_that_applied(
    http: httpx.Client, cap: str, more: dict[str, int], options: dict[str, int]
) -> None:
    part = image_part(noise((400, 400)))
    part["image_url"] |= options
    before = scrape(http)
    assert http.post(PATH, json=body(part, WHAT, **more)).status_code == 200
    now = rises(http, before, "saccade_image_tokens_count", cap=cap)
    for other in {"none", "server", "request", "image"} - {cap}:
        name = "saccade_image_tokens_count"
        assert value(now, name, cap=other) == value(before, name, cap=other)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (body(image_part(b"no image"), WHAT), "unsupported_image_format"),
        (body(WHAT, model="unknown"), "not_found"),
        (body(WHAT, max_tokens=-1), "invalid_request"),
    ],
)
def test_refusals_are_counted_by_error_code(
    http: httpx.Client, content: dict[str, Any], code: str
) -> None:
    before = scrape(http)
    assert http.post(PATH, json=content).json()["error"]["code"] == code
    now = rises(http, before, "saccade_refusals_total", code=code)
    assert value(now, "saccade_requests_total", outcome="refused") > value(
        before, "saccade_requests_total", outcome="refused"
    )


@contextlib.contextmanager
def _disconnected(server: Server, sent: bytes, until: bytes = b"") -> Iterator[None]:
    """Send `sent`, read up to `until`, and close the connection while the engine is suspended."""
    host = urlsplit(server.url)
    with socket.create_connection((host.hostname, host.port)) as connection:
        connection.sendall(sent)
        read = b""
        while until not in read:
            data = connection.recv(4096)
            assert data, read
            read += data
        with server.engine_held():
            connection.close()
            yield


def _post(content: dict[str, Any]) -> bytes:
    data = json.dumps(content).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def test_a_client_that_leaves_during_upload_is_counted_there(
    server: Server, http: httpx.Client
) -> None:
    before = scrape(http)
    with _disconnected(server, _post(body(WHAT))[:-10]):
        now = rises(http, before, "saccade_cancellations_total", stage="upload")
    name = "saccade_requests_total"
    assert value(now, name, outcome="cancelled") == value(before, name, outcome="cancelled") + 1


def test_a_client_that_leaves_during_a_fetch_is_counted_there(
    server: Server, http: httpx.Client, origin: Origin
) -> None:
    origin.files["/never.png"], origin.delay_s["/never.png"] = noise(), 5
    part = {"type": "image_url", "image_url": {"url": f"{origin.url}/never.png"}}
    before = scrape(http)
    host = urlsplit(server.url)
    with socket.create_connection((host.hostname, host.port)) as connection:
        connection.sendall(_post(body(part, WHAT)))
        while "/never.png" not in origin.requests:
            time.sleep(0.01)
    rises(http, before, "saccade_cancellations_total", stage="fetch")


def test_a_client_that_leaves_during_a_stream_is_counted_there(
    server: Server, http: httpx.Client
) -> None:
    request = _post(body(text_part("Hello"), stream=True, **{**LONG, "max_tokens": 3000}))
    noticed = False
    while not noticed:  # on a slow machine, the answer may end first
        before = scrape(http)
        with _disconnected(server, request, until=b"data: "):
            noticed = ended_early(http, before)
    wait_for(http, lambda now: value(now, "saccade_requests_in_flight") == 0)


def test_metrics_describe_the_server(server: Server, http: httpx.Client) -> None:
    now = scrape(http)
    assert value(now, "saccade_ready") == 1
    assert value(now, "saccade_devices") == 1
    assert value(now, "saccade_image_workers") == 2
    assert value(now, "saccade_image_workers_up") == 2
    assert value(now, "saccade_image_queue_limit") == 1024
    (labels,) = [dict(labels) for name, labels in now if name == "saccade_build_info"]
    assert labels["model"] == "saccade-tiny"
    assert labels["vllm"] == http.get("/version").json()["version"]
    assert value(now, "saccade_features_bytes") >= 0


def test_metrics_have_the_formats_of_prometheus(http: httpx.Client) -> None:
    asked = {"Accept": "application/openmetrics-text; version=1.0.0", "Accept-Encoding": "gzip"}
    plain = http.get("/metrics", headers=asked)
    assert plain.headers["content-type"].startswith("text/plain; version=1.0.0")
    assert http.post("/metrics").status_code == 405
    for path in ("/metrics/", "/metricsfoo"):
        found = http.get(path, headers=asked).raise_for_status()
        assert found.headers["content-type"].startswith("application/openmetrics-text")
        assert found.headers["content-encoding"] == "gzip"
        assert "saccade_ready 1.0" in found.text
        assert found.text.endswith("# EOF\n")
    (sample,) = http.get("/metrics/", params={"name[]": "saccade_ready"}).text.split("\n")[2:-1]
    assert sample == "saccade_ready 1.0"
    assert "get" in http.get("/openapi.json").json()["paths"]["/metrics"]


def test_worker_deaths_and_restarts_are_counted(server: Server, http: httpx.Client) -> None:
    before = scrape(http)
    server.image_workers()[0].kill()
    rises(http, before, "saccade_image_worker_deaths_total")
    rises(http, before, "saccade_image_worker_restarts_total")
    wait_for(http, lambda now: value(now, "saccade_image_workers_up") == 2)


# ---------------------------------------------------------------------- logs and traces


@contextlib.contextmanager
def _authorized(server: Server) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {A}"}
    with httpx.Client(base_url=server.url, timeout=60, headers=headers) as client:
        yield client


def _line(server: Server, request_id: str) -> dict[str, Any]:
    """The log line of a request."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for text in server.log:
            if f'"request_id": "{request_id}"' in text:
                line: dict[str, Any] = json.loads(text)
                return line
        time.sleep(0.05)
    raise AssertionError(f"no line about {request_id}")


def test_every_log_line_is_json(guarded: Server) -> None:
    with _authorized(guarded) as client:
        client.post(PATH, json=body(WHAT), headers={"X-Request-Id": "every-line"})
    _line(guarded, "every-line")
    # A library may print plain text while it is imported.
    ours = [text for text in list(guarded.log) if not text.startswith("Triton is installed")]
    messages = [json.loads(text)["message"] for text in ours]
    assert messages[0] == "reading the model saccade-tiny"
    assert any(message.startswith("ready: ") for message in messages)


def test_a_request_is_logged_as_one_line(guarded: Server) -> None:
    with _authorized(guarded) as client:
        request = body(image_part(noise()), WHAT)
        answer = client.post(PATH, json=request, headers={"X-Request-Id": "one-line"})
        assert "server-timing" not in answer.headers  # turned off
    line, usage = _line(guarded, "one-line"), answer.json()["usage"]
    assert sum('"one-line"' in text for text in guarded.log) == 1
    assert line["name"] == "saccade.request"
    assert line["message"] == "POST /v1/chat/completions"
    assert line["status"] == 200
    assert line["outcome"] == "answered"
    assert line["key_group"] == "team-a"
    assert line["model"] == "saccade-tiny"
    assert line["response_id"] == answer.json()["id"]
    assert line["images"] == 1
    assert line["image_tokens"] == usage["prompt_tokens_details"]["image_tokens"]
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["completion_tokens"] == usage["completion_tokens"]
    assert line["finish_reason"] == answer.json()["choices"][0]["finish_reason"]
    assert 0 < line["time_to_first_token_ms"] < line["duration_ms"]
    assert sum(line["stages_ms"].values()) == pytest.approx(line["duration_ms"], abs=0.2)
    assert A not in "".join(guarded.log)


def test_metrics_are_complete_despite_prometheus_multiproc_dir(guarded: Server) -> None:
    with _authorized(guarded) as client:
        client.post(PATH, json=body(image_part(noise()), WHAT))
        name = "saccade_embedding_cache_misses_total"  # reported by the engine from time to time
        now = wait_for(client, lambda now: value(now, name, tier="host") >= 1)
    assert value(now, "saccade_ready") == 1
    assert value(now, "saccade_image_workers_up") == 2
    assert value(now, "saccade_image_decode_seconds_count") >= 1
    assert not [labels for _, labels in now if "pid" in dict(labels)]


@pytest.mark.parametrize(
    ("path", "request_body"),
    [
        (
            "/v1/completions",
            {
                "prompt": ["one", "two"],
                "n": 2,
                "temperature": 1,
                "max_tokens": 4,
                "ignore_eos": True,
            },
        ),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 16}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}),
    ],
)
def test_the_log_line_matches_the_answer(
    guarded: Server, path: str, request_body: dict[str, Any]
) -> None:
    name = path.replace("/", "-")
    with _authorized(guarded) as client:
        content = {"model": "saccade-tiny", **request_body}
        answer = client.post(path, json=content, headers={"X-Request-Id": name}).json()
    line, usage = _line(guarded, name), answer["usage"]
    assert line["response_id"] == answer["id"]
    assert line["prompt_tokens"] == usage.get("prompt_tokens", usage.get("input_tokens"))
    assert line["completion_tokens"] == usage.get("completion_tokens", usage.get("output_tokens"))


def test_a_stop_string_is_logged_as_finish_reason_stop(guarded: Server) -> None:
    with _authorized(guarded) as client:
        picture = image_part(pictures.encode(pictures.shape("red")))
        content = body(picture, WHAT, stop=["red"])
        answer = client.post(PATH, json=content, headers={"X-Request-Id": "stop-string"}).json()
    assert answer["choices"][0]["stop_reason"] == "red"
    assert _line(guarded, "stop-string")["finish_reason"] == "stop"


def test_refused_requests_are_logged_and_probes_are_not(guarded: Server) -> None:
    with _authorized(guarded) as client:
        client.post(PATH, json=body(image_part(b"no")), headers={"X-Request-Id": "refused-1"})
        client.get("/health", headers={"X-Request-Id": "probe-1"})
        httpx.post(f"{guarded.url}{PATH}", json={}, headers={"X-Request-Id": "refused-2"})
        client.get("/v1/models", headers={"X-Request-Id": "models-1"})
    line = _line(guarded, "refused-1")
    assert (line["status"], line["outcome"]) == (400, "refused")
    assert line["error_code"] == "unsupported_image_format"
    line = _line(guarded, "refused-2")
    assert (line["status"], line["error_code"]) == (401, "invalid_api_key")
    assert "key_group" not in line
    assert _line(guarded, "models-1")["path"] == "/v1/models"
    assert "probe-1" not in "".join(guarded.log)


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


def _trace(receiver: Receiver, trace_id: str) -> tuple[Span, list[Span]]:
    """The request's span in a trace and all spans of the trace, once the engine's has arrived."""

    def is_whole(spans: list[Span]) -> bool:
        names = {span.name for span in spans if span.trace_id == trace_id}
        return {"llm_request", f"POST {PATH}"} <= names

    spans = [span for span in receiver.wait_for(is_whole) if span.trace_id == trace_id]
    (root,) = [span for span in spans if span.name == f"POST {PATH}"]
    return root, spans


def test_a_picture_request_is_traced_through_every_stage(
    guarded: Server, receiver: Receiver
) -> None:
    with _authorized(guarded) as client:
        client.post(PATH, json=body(image_part(noise()), WHAT))
        elapsed = math.inf
        for attempt in range(ATTEMPTS):
            trace_id = f"{TRACE[:-1]}{attempt}"
            name = f"traced-{attempt}"
            headers = {"traceparent": f"00-{trace_id}-{PARENT}-01", "X-Request-Id": name}
            asked = body(image_part(noise((1600, 1200))), WHAT, **LONG)
            request = prepared(client, asked, headers)
            started = time.perf_counter()
            answer = client.send(request)
            elapsed = time.perf_counter() - started
            root, spans = _trace(receiver, trace_id)
            if root.seconds >= 0.95 * elapsed:
                break
    assert (root.parent_id, root.kind, root.scope) == (PARENT, "SERVER", "saccade")
    assert root.resource["service.name"] == "saccade"
    stages = [span for span in otlp.children(spans, root) if span.scope == "saccade"]
    names = [span.name for span in stages if span.name != Stage.IMAGE_QUEUE]
    assert sorted(set(names), key=names.index) == [
        "upload", "admission", "fetch", "render", "decode", "preprocess", "engine_queue", "prefill",
        "encode", "first_token", "generate", "respond",
    ]  # fmt: skip
    assert sum(span.seconds for span in stages) == pytest.approx(root.seconds, rel=1e-3)
    assert sum(span.seconds for span in stages) == pytest.approx(elapsed, rel=0.05)
    assert stages[0].start_ns == root.start_ns
    assert abs(stages[-1].end_ns - root.end_ns) < 1000
    attributes, usage = root.attributes, answer.json()["usage"]
    assert attributes["http.response.status_code"] == 200
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "saccade-tiny"
    assert attributes["gen_ai.response.id"] == answer.json()["id"]
    assert attributes["gen_ai.response.model"] == "saccade-tiny"
    assert attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert attributes["saccade.images"] == 1
    assert attributes["saccade.key_group"] == "team-a"
    (engine,) = [span for span in spans if span.name == "llm_request"]
    assert engine.parent_id == root.span_id
    assert _line(guarded, name)["trace_id"] == trace_id


def test_each_picture_of_a_request_has_its_own_spans(guarded: Server, receiver: Receiver) -> None:
    with _authorized(guarded) as client:
        request = body(image_part(noise()), image_part(noise()), WHAT)
        client.post(PATH, json=request, headers={"X-Request-Id": "two-pictures"})
    root, spans = _trace(receiver, _line(guarded, "two-pictures")["trace_id"])
    assert root.parent_id == ""
    names = [span.name for span in otlp.children(spans, root)]
    assert names.count("image fetch") == 2
    assert names.count("image preprocess") == 2


def test_an_unsampled_trace_is_not_exported(guarded: Server, receiver: Receiver) -> None:
    trace_id = "1" * 32
    with _authorized(guarded) as client:
        headers = {"traceparent": f"00-{trace_id}-{PARENT}-00", "X-Request-Id": "unsampled"}
        assert client.post(PATH, json=body(WHAT), headers=headers).status_code == 200
        client.post(PATH, json=body(WHAT), headers={"X-Request-Id": "sampled"})
    _trace(receiver, _line(guarded, "sampled")["trace_id"])
    assert _line(guarded, "unsampled")["trace_id"] == trace_id
    assert not [span for span in receiver.spans if span.trace_id == trace_id]


def test_a_refused_request_is_traced_with_its_error_code(
    guarded: Server, receiver: Receiver
) -> None:
    with _authorized(guarded) as client:
        client.post(PATH, json=body(image_part(b"no")), headers={"X-Request-Id": "no-image"})
    trace_id = _line(guarded, "no-image")["trace_id"]
    spans = receiver.wait_for(
        lambda found: any(s.trace_id == trace_id and s.kind == "SERVER" for s in found)
    )
    (root,) = [s for s in spans if s.trace_id == trace_id and s.kind == "SERVER"]
    assert root.attributes["error.type"] == "unsupported_image_format"
    assert root.status == "UNSET"  # a client error does not fail the server's span
