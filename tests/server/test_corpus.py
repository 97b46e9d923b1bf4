"""Hostile and odd files sent to the real server: each is answered correctly or refused with its
param, and the server loses no worker and leaks no memory."""

import concurrent.futures
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from server.imaging.decode import DecodeOptions, decode
from tests.conftest import Server
from tests.corpus.cases import Case, Expectation
from tests.corpus.make import all_cases
from tests.pictures import data_url, text_part, user

CASES = all_cases()
DECODED = [case for case in CASES if case.expected.corners is not None]
PART = "messages[0].content[0].image_url"
# Concurrent requests: twice the number of image workers, so that both stay busy.
_CONCURRENCY = 4
# A worker is stopped after 30 s, with its own error. A longer wait means a hang elsewhere.
_LONGEST_S = 40
_MEBIBYTE = 1 << 20
# The engine's arenas are full after this many passes; from then on its memory is stable.
_WARM_PASSES = 3
_MEASURED_PASSES = 2
_GROWTH_BYTES = 64 * _MEBIBYTE
# Memory that one picture may take, and that a worker may keep afterwards. 100 megapixels with
# transparency are 400 MB, again as much during conversion, and again during resizing.
_PEAK_BYTES = 1536 * _MEBIBYTE
_KEPT_BYTES = 512 * _MEBIBYTE
# Never shown to a client: paths, traces, names of modules, libraries and exceptions.
_LEAKS = re.compile(
    r"traceback|file \"|\.py\b|/\w+/|\b0x[0-9a-f]{5,}\b|\w+(error|exception)\b|object at|\bb'"
    r"|\b(pil|pillow|vips|libvips|libjpeg|libpng|libtiff|libwebp|libheif|libavif|zlib|numpy)\b|[\r\n]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """The response to a case, and how long it took."""

    status: int
    body: dict[str, Any]
    seconds: float

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.body.get("error", {})
        return error

    @property
    def text(self) -> str:
        text: str = self.body["choices"][0]["message"]["content"]
        return text


def send(http: httpx.Client, case: Case) -> Answer:
    image = {"type": "image_url", "image_url": {"url": data_url(case.data, case.mime)}}
    request = {
        "model": "saccade-tiny",
        "messages": user(image, text_part("What is in the image?")),
        "temperature": 0,
        "max_tokens": 16 if case.expected.answer else 1,
    }
    started = time.monotonic()
    response = http.post("/v1/chat/completions", json=request)
    return Answer(response.status_code, response.json(), time.monotonic() - started)


def send_all(http: httpx.Client) -> dict[str, Answer]:
    with concurrent.futures.ThreadPoolExecutor(_CONCURRENCY) as threads:
        answers = threads.map(lambda case: send(http, case), CASES)
        return dict(zip((case.name for case in CASES), answers, strict=True))


@dataclass
class Watch:
    """The server, with its state before the first pass: resident bytes of each worker by pid, and
    the number of log lines."""

    server: Server
    workers: dict[int, int]
    log_lines: int

    def new_log(self) -> str:
        return "".join(self.server.log[self.log_lines :])


def resident_bytes(server: Server) -> int:
    """Memory of the server and all its children, each shared page counted once."""
    processes = [psutil.Process(server.process.pid), *server.children()]
    pages: list[int] = [process.memory_full_info().pss for process in processes]
    return sum(pages)


def peak_bytes(process: psutil.Process) -> int:
    """Peak resident memory of a process, including shared pages."""
    with open(f"/proc/{process.pid}/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def watch(server: Server) -> Watch:
    workers = {worker.pid: worker.memory_info().rss for worker in server.image_workers()}
    assert workers
    return Watch(server, workers, len(server.log))


@pytest.fixture(scope="module")
def answers(watch: Watch, http: httpx.Client) -> Iterator[dict[str, Answer]]:
    """The answer to every case, sent a few at a time."""
    yield send_all(http)
    for case in CASES:
        case.forget()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_file_is_answered_or_refused_with_its_param(
    case: Case, answers: dict[str, Answer]
) -> None:
    answer = answers[case.name]
    assert case.expected.allows(answer.status, answer.error.get("code")), answer
    if answer.status == 200:
        assert case.expected.answer in (None, answer.text)
        return
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == PART
    message = answer.error["message"]
    assert 10 < len(message) < 300
    assert not _LEAKS.search(message), message


@pytest.mark.parametrize("case", DECODED, ids=lambda case: case.name)
def test_each_picture_is_decoded_upright_with_its_colors(case: Case) -> None:
    """Compares pixels, because the embedded model was not trained on such pictures."""
    image = decode(case.data, DecodeOptions()).image
    assert image.mode == "RGB"
    width, height = image.size
    assert case.expected.size in (None, (width, height))
    middles = [(x, y) for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]
    seen = [image.getpixel(middle) for middle in middles]
    assert deviation(seen, case.expected) <= case.expected.tolerance, seen


def deviation(seen: list[Any], expected: Expectation) -> int:
    """The largest difference in any channel."""
    assert expected.corners is not None
    pairs = zip(seen, expected.corners, strict=True)
    return max(abs(a - b) for got, right in pairs for a, b in zip(got, right, strict=True))


def test_no_file_hangs_the_server(answers: dict[str, Answer]) -> None:
    slow = {name: answer.seconds for name, answer in answers.items() if answer.seconds > _LONGEST_S}
    assert not slow


def test_no_file_kills_a_worker(
    watch: Watch, answers: dict[str, Answer], http: httpx.Client
) -> None:
    assert answers
    assert {worker.pid for worker in watch.server.image_workers()} == watch.workers.keys()
    assert http.get("/health").status_code == 200
    assert http.get("/ready").status_code == 200
    assert "Traceback" not in watch.new_log()


def test_workers_release_the_memory_of_large_pictures(
    watch: Watch, answers: dict[str, Answer]
) -> None:
    assert answers
    workers = [(one, watch.workers[one.pid]) for one in watch.server.image_workers()]
    peaks = [peak_bytes(one) - before for one, before in workers]
    kept = [one.memory_info().rss - before for one, before in workers]
    assert max(peaks) < _PEAK_BYTES
    assert max(kept) < _KEPT_BYTES


def test_repeated_passes_do_not_grow_memory(
    watch: Watch, answers: dict[str, Answer], http: httpx.Client
) -> None:
    """Once allocators and caches are warm, another pass needs no more memory; a leak would show
    in every pass."""
    for _ in range(_WARM_PASSES - 1):
        send_all(http)
    grown = []
    for _ in range(_MEASURED_PASSES):
        before = resident_bytes(watch.server)
        again = send_all(http)
        grown.append(resident_bytes(watch.server) - before)
        changed = {name for name, answer in again.items() if answer.status != answers[name].status}
        assert not changed
    assert min(grown) < _GROWTH_BYTES
