"""Requests drawn from the server's own OpenAPI schema, and valid requests of every route with one
or two wrong places: an answer or a clear refusal, never a 5xx, a hang or the text of a library.

    pytest tests/server/test_fuzz_routes.py --fuzz-examples 20000
"""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests import answers
from tests.conftest import Server
from tests.fuzz import json_mutations

# A drawn request may ask for as many tokens as the model has; it need not get them.
LIMITED = {"X-Request-Timeout": "5"}
WAIT_S = 60
DEFAULT_EXAMPLES = 150
# Routes that change the server for the tests that follow.
CHANGING = ("/scale_elastic_ep",)
# A route that the embedded model does not serve.
OF_OTHER_MODELS = ("/v1/systemone",)
# Drawing a body of this route takes ten times as long as for others; its parts are those of chats.
SLOW_TO_DRAW = ("/v1/chat/completions/batch",)


@pytest.fixture
def examples(request: pytest.FixtureRequest) -> int:
    wanted: int = request.config.getoption("--fuzz-examples")
    return wanted


def drawn(
    strategy: st.SearchStrategy[Any], send: Callable[[Any], None], count: int, repeatable: bool
) -> None:
    """Call `send` with `count` values of `strategy`."""
    run = given(strategy)(send)
    phases = (Phase.generate, *(() if repeatable else (Phase.shrink,)))
    settings(
        max_examples=count,
        database=None,
        derandomize=repeatable,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )(run)()


@pytest.mark.parametrize("path", json_mutations.REQUESTS)
def test_a_request_with_a_wrong_place_is_answered_or_refused(
    http: httpx.Client, examples: int, path: str
) -> None:
    headers = {**LIMITED, "Content-Type": "application/json"}

    def send(body: bytes) -> None:
        answer = http.post(path, content=body, headers=headers, timeout=WAIT_S)
        answers.check(path, answer.status_code, answer.text)

    repeatable = examples == DEFAULT_EXAMPLES
    drawn(json_mutations.bodies(path), send, examples // 3, repeatable)
    assert http.get("/ready").status_code == 200


@pytest.mark.parametrize("path", json_mutations.REQUESTS)
def test_the_requests_before_mutation_are_answered(http: httpx.Client, path: str) -> None:
    body = {"model": "saccade-tiny", **json_mutations.REQUESTS[path]}
    answer = http.post(path, json=body, timeout=WAIT_S)
    assert answer.status_code == (501 if path in OF_OTHER_MODELS else 200), answer.text


def test_requests_of_the_openapi_schema_are_answered_or_refused(
    server: Server, http: httpx.Client, examples: int
) -> None:
    schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    tried, found = 0, []
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in CHANGING:
            continue
        count = examples // (75 if operation.path in SLOW_TO_DRAW else 25)

        def send(case: Any) -> None:
            answer = case.call(base_url=server.url, headers=LIMITED, timeout=WAIT_S)
            answers.check(case.path, answer.status_code, answer.text)

        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            tried += 1
            try:
                strategy = operation.as_strategy(generation_mode=mode)
                drawn(strategy, send, count, examples == DEFAULT_EXAMPLES)
            except Unsatisfiable:
                tried -= 1  # nothing of this operation can be wrong
            except AssertionError as error:
                found.append(f"{operation.method} {operation.path}: {error}")
    assert not found, "\n".join(found)
    assert tried > 30
    assert http.get("/ready").status_code == 200
