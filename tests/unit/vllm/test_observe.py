"""The outermost application: outcomes, traces and failures of requests."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.v1.engine import FinishReason

from server.engine.arguments import parse
from server.engine.vllm_adapter.outcomes import Outcomes
from server.http.observe import Observed
from server.http.scope import record_of
from server.request.context import RequestContext
from server.telemetry import metrics, tracing
from server.telemetry.record import Record
from server.telemetry.stages import Stage

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
EVENTS = [(b"content-type", b"text/event-stream")]


def serve(
    app: ASGIApp,
    sent: list[Message] | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> Record:
    """The record of one request that `app` answers."""
    kept: list[Record] = []

    async def keeping(scope: Scope, receive: Receive, send: Send) -> None:
        kept.append(record_of(scope))
        await app(scope, receive, send)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if sent is not None:
            sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": headers}
    observed = Observed(keeping, server_timing=True, log_requests=False, traced=False)
    asyncio.run(observed(scope, receive, send))
    return kept[0]


def answering(status: int, *bodies: bytes, ends: bool = True, headers: Any = EVENTS) -> ASGIApp:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for body in bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if not ends:
            raise RuntimeError("cut off")
        await send({"type": "http.response.body", "body": b""})

    return app


def count(outcome: str) -> float:
    value: float = metrics.requests.labels(outcome)._value.get()
    return value


def test_a_truncated_stream_counts_as_failed_and_ends_with_an_error() -> None:
    failed, answered = count("failed"), count("answered")
    sent: list[Message] = []
    serve(answering(200, b"data: 1\n\n", ends=False), sent)
    assert (count("failed"), count("answered")) == (failed + 1, answered)
    assert sent[-1]["body"].startswith(b'data: {"error": {"message": "internal error"')
    assert b"\n\ndata: [DONE]\n\n" in sent[-1]["body"]


@pytest.mark.parametrize(
    "error", [b'data: {"error":{"message":"x"}}\n\n', b"event: error\ndata: {}\n\n"]
)
def test_a_stream_with_an_error_event_counts_as_failed(error: bytes) -> None:
    record = serve(answering(200, b"data: 1\n\n", error))
    assert (record.outcome, record.error_code) == ("failed", "internal_error")


def test_a_disconnect_after_the_answer_counts_as_answered() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answering(200)(scope, receive, send)
        await receive()

    assert serve(app).outcome == "answered"


def test_a_disconnect_before_the_answer_counts_as_cancelled() -> None:
    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        await receive()

    record = serve(app)
    assert (record.outcome, record.left_in) == ("cancelled", Stage.UPLOAD)


@pytest.mark.parametrize(
    ("value", "trace_id"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        (f"00-{TRACE}-00f067aa0ba902b7-00", TRACE),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        ("nonsense", None),
    ],
)
def test_the_trace_id_is_recorded_even_if_tracing_is_off(value: str, trace_id: str | None) -> None:
    headers = [(b"traceparent", value.encode())]
    assert serve(answering(200), headers=headers).trace_id == trace_id
    assert serve(answering(200)).trace_id is None


def test_several_tracestate_headers_are_joined() -> None:
    headers = [(b"tracestate", b"a=1"), (b"x", b"y"), (b"tracestate", b"b=2")]
    assert tracing._context_headers({"headers": headers}) == {"tracestate": "a=1,b=2"}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_engine_traces_requests_that_are_sampled(share: float) -> None:
    provider = TracerProvider(sampler=TraceIdRatioBased(share))
    spans: Any = tracing.Tracing.__new__(tracing.Tracing)
    spans._tracer = provider.get_tracer("test")
    context = RequestContext(Record())
    scope = spans.start(context.record, {"type": "http", "headers": [(b"x", b"y")]})
    named = [name for name, _ in scope["headers"]]
    assert named == ([b"x", b"traceparent"] if share else [b"x"])
    assert context.record.trace_id is not None

    outcomes, traced = Outcomes(), []
    outcomes._contexts["r"] = context
    for request_id in ("r", "of nobody"):
        outcomes._trace(lambda output, *_: traced.append(output.request_id), Output(request_id, []))  # type: ignore[arg-type]
    assert traced == (["r"] if share else []) + ["of nobody"]


@dataclass
class Output:
    """The engine's output for one step of a request."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    ec_transfer_params: None = None


def test_generation_ends_with_the_last_choice() -> None:
    outcomes, record = Outcomes(), Record()
    context = RequestContext(record)
    record.timeline.begin(Stage.ENGINE_QUEUE, record.timeline.start)
    for name in ("1", "2"):
        outcomes._contexts[name] = context
        record.under_way.add(name)

    states = {name: SimpleNamespace(stats=None) for name in ("1", "2")}

    def drop_states(outputs: list[Output]) -> None:
        for output in outputs:
            del states[output.request_id]

    def step(name: str) -> None:
        outputs: Any = [Output(name, [7], FinishReason.STOP)]
        outcomes._process(drop_states, states, outputs)

    step("1")
    assert not record.timeline.began(Stage.RESPOND)
    step("2")
    assert record.timeline.began(Stage.RESPOND)
    assert record.completion_tokens == 2


def test_a_compressed_stream_is_not_inspected() -> None:
    sent: list[Message] = []
    serve(answering(200, b"\x1f\x8b", headers=[*EVENTS, (b"content-encoding", b"gzip")]), sent)
    assert [message.get("body", b"") for message in sent[1:]] == [b"\x1f\x8b", b""]


def test_an_error_while_recording_does_not_fail_the_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.http.observe._measure", lambda *_: 1 / 0)
    sent: list[Message] = []
    with caplog.at_level(logging.ERROR, "saccade"):
        serve(answering(200, b"data: 1\n\n"), sent)
    assert len(sent) == 3
    assert "ZeroDivisionError" in caplog.text


def test_an_error_while_following_outputs_does_not_stop_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outcomes, context = Outcomes(), RequestContext(Record())
    outcomes._contexts["1"] = context
    outputs: Any = [Output("1", [7])]
    with caplog.at_level(logging.ERROR, "saccade"):
        result = outcomes._process(lambda outputs: "result", {"1": object()}, outputs)
    assert result == "result"
    assert "AttributeError" in caplog.text


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--log-format", "json", "--log-config-file", "x.json"], "configured by a file"),
        (["--otlp-traces-endpoint", "http://x", "--disable-log-stats"], "--disable-log-stats"),
    ],
)
def test_incompatible_flags_are_refused(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(flags)
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_few_of_many_requests_begin_in_an_iteration_of_the_event_loop() -> None:
    begun = 0

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        nonlocal begun
        begun += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    async def sent(_: Message) -> None:
        pass

    async def run() -> None:
        observed = Observed(app, server_timing=True, log_requests=False, traced=False)
        scope = {"type": "http", "path": "/v1/x", "headers": []}

        async def ask(method: str) -> None:
            await observed({**scope, "method": method}, nothing, sent)

        async with asyncio.TaskGroup() as requests:
            for _ in range(100):
                requests.create_task(ask("POST"))
            most = 0
            for _ in range(20):
                before = begun
                await asyncio.sleep(0)
                most = max(most, begun - before)
            assert most <= 8 < begun == 100
            for _ in range(100):
                requests.create_task(ask("POST"))
            before = begun
            await asyncio.sleep(0)
            await ask("GET")  # such as a probe: it does not wait for the others
            assert begun - before < 20

    asyncio.run(run())
    assert begun == 201
