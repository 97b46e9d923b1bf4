"""JSON logs of the server's and the engine's processes, with one line per request; messages without
control characters and of bounded length, since clients choose parts of them."""

import asyncio
import functools
import json
import logging
import logging.config
import multiprocessing
import os
import re
import time
from typing import Any

from server.telemetry.record import Record, Times

# The same fields as in the engine's own JSON lines.
_FIELDS = "%(asctime)s %(levelname)s %(name)s %(processName)s %(process)d %(message)s"
_requests = logging.getLogger("saccade.request")
_json = json.JSONEncoder().encode  # escapes all control characters
# How long lines about requests wait for others, and how many do at most.
_WRITE_DELAY_S = 0.1
_MOST_WAITING = 64

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
            "formatters": {
                "json": {"()": "pythonjsonlogger.json.JsonFormatter", "fmt": _FIELDS},
                "lines": {"format": "%(message)s"},
            },
            "handlers": {
                "json": {"class": "logging.StreamHandler", "formatter": "json"},
                "lines": {"class": "logging.StreamHandler", "formatter": "lines"},
            },
            "root": {"handlers": ["json"], "level": "WARNING"},
            "loggers": {
                "saccade": {"handlers": ["json"], "level": "INFO", "propagate": False},
                _requests.name: {"handlers": ["lines"], "propagate": False},
            },
        }
    )


class RequestLog:
    """One line for each finished request, written a few at a time. While the server is busy, code
    and data of a line that is written by itself are in no cache of the processor: it takes about
    three times as long. Use it on the event loop, and `flush` it at the end."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Record, Times]] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, record: Record, times: Times) -> None:
        """Write the line of `record` soon."""
        self._waiting.append((record, times))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WRITE_DELAY_S, self.flush)
        elif len(self._waiting) >= _MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Write all lines that were added."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        if waiting and _requests.isEnabledFor(logging.INFO):
            lines = "\n".join(_line(record, times) for record, times in waiting)
            # Made here, since the factory of log records would bound all lines together.
            _requests.handle(
                logging.LogRecord(_requests.name, logging.INFO, __file__, 0, lines, None, None)
            )


def _line(record: Record, times: Times) -> str:
    """The line about a finished request, as JSON. Its times are in milliseconds."""
    first = record.time_to_first_token()
    line: dict[str, Any] = {
        "asctime": _asctime(record.epoch(times.end)),
        "levelname": "INFO",
        "name": _requests.name,
        "processName": multiprocessing.current_process().name,
        "process": os.getpid(),
        "message": f"{record.method} {record.path}",
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
    if record.prompts:
        line["images"] = record.images
        line["image_tokens"] = record.image_tokens
        line["prompt_tokens"] = record.prompt_tokens
        line["completion_tokens"] = record.completion_tokens
    if first is not None:
        line["time_to_first_token_ms"] = _ms(first)
    line["duration_ms"] = _ms(times.end - record.timeline.start)
    line["stages_ms"] = {stage.value: _ms(value) for stage, value in times.stages.items()}
    return _json({name: value for name, value in line.items() if value is not None})


def _asctime(epoch_ns: int) -> str:
    """The local time of a log line."""
    seconds, ns = divmod(epoch_ns, 10**9)
    return f"{_second(seconds)},{ns // 10**6:03d}"


@functools.lru_cache(4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
