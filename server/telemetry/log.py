"""JSON logs of the server's and the engine's processes, with one line per request."""

import logging
import logging.config
from typing import Any

from server.telemetry.record import Record, Times

# The same fields as in the engine's own JSON lines.
_FIELDS = "%(asctime)s %(levelname)s %(name)s %(processName)s %(process)d %(message)s"
_requests = logging.getLogger("saccade.request")


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
