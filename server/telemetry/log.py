"""JSON logs of the server's and the engine's processes, with one line per request; messages without
control characters and of bounded length, since clients choose parts of them."""

import logging
import logging.config
import re
from typing import Any

from server.telemetry.record import Record, Times

# The same fields as in the engine's own JSON lines.
_FIELDS = "%(asctime)s %(levelname)s %(name)s %(processName)s %(process)d %(message)s"
_requests = logging.getLogger("saccade.request")


_MAX_MESSAGE_CHARS = 4096
_MAX_PATH_CHARS = 200
# What a terminal or a reader of lines could take for the end of a line, or for a command: control
# characters, and those that change the direction of text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def bounded(text: str, most: int) -> str:
    """The first `most` characters of `text`, on one line, with its control characters escaped."""
    if len(text) > most:
        text = f"{text[:most]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class _BoundedRecord(logging.LogRecord):
    """A log record whose message is one line of bounded length."""

    def getMessage(self) -> str:
        return bounded(super().getMessage(), _MAX_MESSAGE_CHARS)


class _AccessFilter(logging.Filter):
    """Bounds the path in uvicorn's access log, and drops the query, which may contain secrets."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple) and len(record.args) == 5:
            client, method, path, *rest = record.args
            path = bounded(str(path).partition("?")[0], _MAX_PATH_CHARS)
            record.args = (client, method, path, *rest)
        return True


_access_filter = _AccessFilter()


def bound_access_log() -> None:
    """Bound the lines of uvicorn's access log. Call it when uvicorn has configured its logs."""
    logging.getLogger("uvicorn.access").addFilter(_access_filter)


def bound_messages() -> None:
    """From now on, bound every message of every logger of this process."""
    before = logging.getLogRecordFactory()  # vLLM's, whose formatters need what it adds

    def bounded_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        if type(record) is logging.LogRecord:
            record.__class__ = _BoundedRecord
        return record

    logging.setLogRecordFactory(bounded_record)


def use_json() -> None:
    """Write the logs of this process as JSON. vLLM configures its own loggers and uvicorn's."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": "pythonjsonlogger.json.JsonFormatter", "fmt": _FIELDS}},
            "handlers": {"json": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"handlers": ["json"], "level": "WARNING"},
            "loggers": {"saccade": {"handlers": ["json"], "level": "INFO", "propagate": False}},
        }
    )


def write(record: Record, times: Times) -> None:
    """Log one line about a finished request. Its times are in milliseconds."""
    first = record.time_to_first_token()
    found: dict[str, Any] = {
        "request_id": record.id,
        "trace_id": record.trace_id,
        "method": record.method,
        "path": record.path,
        "client": record.client,
        "status": record.status,
        "outcome": record.outcome,
        "error_code": record.error_code,
        "cancelled_in": record.left_in,
        "key_group": record.key_group,
        "model": record.model,
        "response_id": record.response_id,
        "finish_reason": record.finish_reason,
    }
    line = {name: value for name, value in found.items() if value is not None}
    if record.prompts:
        line["images"] = record.images
        line["image_tokens"] = record.image_tokens
        line["prompt_tokens"] = record.prompt_tokens
        line["completion_tokens"] = record.completion_tokens
    if first is not None:
        line["time_to_first_token_ms"] = _ms(first)
    line["duration_ms"] = _ms(times.end - record.timeline.start)
    line["stages_ms"] = {stage.value: _ms(value) for stage, value in times.stages.items()}
    _requests.info("%s %s", record.method, record.path, extra=line)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
