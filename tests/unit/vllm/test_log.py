"""Messages in the logs of vLLM and of the server are single lines of bounded length."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging_if_needed, init_logger

from server.telemetry.log import RequestLog, bound_messages, bounded
from server.telemetry.record import Record, Times


@pytest.fixture
def bounded_logs() -> Iterator[None]:
    configure_logging_if_needed(LoggingConfig())
    before = logging.getLogRecordFactory()
    bound_messages()
    yield
    logging.setLogRecordFactory(before)


@pytest.mark.usefixtures("bounded_logs")
@pytest.mark.parametrize("name", ["vllm.entrypoints.serving", "saccade.api"])
def test_a_message_is_one_line_of_bounded_length(name: str) -> None:
    logger = init_logger(name)
    handler = logging.StreamHandler(io.StringIO())
    formatting = logging.getLogger("vllm").handlers[0]  # pytest adds others
    handler.setFormatter(formatting.formatter)  # vLLM's, which needs fields of its own
    logger.addHandler(handler)
    try:
        logger.error("model %s", "a\nERROR forged\x1b[2J\u202e" + "x" * 10_000_000)
    finally:
        logger.removeHandler(handler)
    line = handler.stream.getvalue()
    assert line.count("\n") == 1
    assert "model a\\nERROR forged\\x1b[2J\\u202exxx" in line
    assert len(line) < 5000


@pytest.mark.parametrize("text", ["", "plain", "Bäume, 木, 🌳", "\xa0 no break", "[%s] {}"])
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert bounded(text, 100) == text


@pytest.mark.usefixtures("bounded_logs")
def test_lines_about_requests_are_written_together() -> None:
    logger, handler = logging.getLogger("saccade.request"), logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    text = handler.stream.getvalue

    async def run() -> None:
        requests = RequestLog()
        for number in range(130):
            record = Record(id=str(number), method="POST", path="/v1/\n\u2028\u202e" + "x" * 200)
            requests.add(record, Times.of(record.timeline, record.timeline.start + 0.25))
        written = text().count("\n")
        assert 0 < written < 130
        while text().count("\n") == written:
            await asyncio.sleep(0.01)

    try:
        asyncio.run(asyncio.wait_for(run(), 60))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    lines = text().splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == list(map(str, range(130)))
    assert json.loads(lines[0])["duration_ms"] == 250.0
    assert "status" not in json.loads(lines[0])
