"""The metrics of HTTP requests are those that the library makes for vLLM's server."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware

from server.http.http_metrics import HttpMetrics, replace_instrumentator

REQUESTS: list[tuple[str, str, bytes]] = [
    ("POST", "/chat", b"a body"),
    ("POST", "/chat", b"another body"),
    ("GET", "/chat", b""),  # 405
    ("GET", "/files/1", b""),
    ("GET", "/files/2", b""),
    ("GET", "/unknown", b""),
    ("GET", "/fails", b""),
    ("GET", "/stream", b""),
    ("GET", "/health", b""),
    ("HEAD", "/mounted/page", b""),
]


def made_app(registry: CollectorRegistry, **options: Any) -> FastAPI:
    app = FastAPI()

    @app.post("/chat")
    async def chat() -> Response:
        return PlainTextResponse("an answer", status_code=201)

    @app.get("/files/{number}")
    async def file(number: int) -> int:
        return number

    @app.get("/fails")
    async def fails() -> None:
        raise ZeroDivisionError

    @app.get("/stream")
    async def stream() -> Response:
        async def pieces() -> Any:
            yield b"1"
            yield b"2"

        return StreamingResponse(pieces())

    @app.get("/health")
    async def health() -> None:
        return None

    app.mount("/mounted", PlainTextResponse("page"))
    Instrumentator(registry=registry, excluded_handlers=["/health"]).add(
        *options.get("added", ())
    ).instrument(app)
    return app


def measured(replaced: bool) -> list[str]:
    """The samples after `REQUESTS`, without times."""
    registry = CollectorRegistry()
    app = made_app(registry)
    if replaced:
        replace_instrumentator(app)

    async def run() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for _ in range(2):  # the second time with what was kept of the first
                for method, path, body in REQUESTS:
                    await client.request(method, path, content=body)

    asyncio.run(run())
    lines = generate_latest(registry).decode().splitlines()
    times = ("_created", "http_request_duration_seconds_sum", "highr_seconds_sum")
    return sorted(line for line in lines if not any(word in line for word in times))


def test_the_metrics_equal_the_librarys() -> None:
    ours = measured(True)
    assert ours == measured(False)
    assert 'http_requests_total{handler="/chat",method="POST",status="2xx"} 4.0' in ours


def test_what_others_instrument_is_kept() -> None:
    app = made_app(CollectorRegistry(), added=[lambda info: None])
    replace_instrumentator(app)
    assert [each.cls for each in app.user_middleware] == [PrometheusInstrumentatorMiddleware]


@pytest.mark.parametrize("length", [b"", b"-1", b"many"])
def test_an_odd_length_counts_as_none(length: bytes) -> None:
    registry = CollectorRegistry()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def sent(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"content-length", length)]}
    metrics = HttpMetrics(
        app, registry=registry, latency_highr_buckets=(1,), latency_lowr_buckets=(1,)
    )
    asyncio.run(metrics(scope, None, sent))  # type: ignore[arg-type]
    assert registry.get_sample_value("http_request_size_bytes_sum", {"handler": "none"}) == 0
