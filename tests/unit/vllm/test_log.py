"""Messages in the logs of vLLM and of the server are single lines of bounded length."""

import io
import logging
from collections.abc import Iterator

import pytest
from vllm.logger import init_logger

from server.telemetry.log import bound_messages, bounded


@pytest.fixture
def bounded_logs() -> Iterator[None]:
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
