"""API keys: the key file, the check of a request's key, and groups."""

import argparse
import asyncio
import base64
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Request
from starlette.types import Receive, Scope, Send
from vllm import entrypoints

from server import settings as config
from server.engine.vllm_http import ADMIN_PATHS, add_vllm_middleware, api_keys
from server.errors import CannotStart
from server.http import errors, key_file
from server.http.app import ADMITTED
from server.http.keys import ApiKeys, KeyRing, key_ring, keys_for_vllm, require_admin
from server.http.observe import Observed
from server.http.scope import group_of, record_of, set_record
from server.request.groups import ADMIN as ADMIN_GROUP
from server.request.limits import Limits, Quota
from server.settings import AccessSettings
from server.telemetry.record import Record

A, B, ADMIN = "sk-secret-of-a", "sk-secret-of-b", "sk-secret-of-admin"


def hashed(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    document = {"groups": {"team-a": [A], "team-b": [hashed(B)]}, "admin": [ADMIN]}
    return write(tmp_path / "keys.json", document)


# ---------------------------------------------------------------------- the file


def test_plain_and_hashed_keys_are_accepted(path: Path) -> None:
    table, _ = key_file.read(path)
    assert table.groups == {key_file.digest(A): "team-a", key_file.digest(B): "team-b"}
    assert table.admins == {key_file.digest(ADMIN)}
    assert A not in repr(table)


def test_limits_of_groups_and_keys_are_read() -> None:
    table = key_file.parse(
        json.dumps(
            {
                "groups": {
                    "a": {"keys": [A, {"key": B, "concurrency": 4}], "share": 0.5, "priority": -3},
                    "b": [{"key": ADMIN, "tokens_per_minute": 100}],
                }
            }
        ).encode()
    )
    of_group = Quota("group:a", Limits(share=0.5, priority=-3))
    of_b = Quota(f"key:{key_file.digest(B).hex()}", Limits(concurrency=4))
    of_admin = Quota(f"key:{key_file.digest(ADMIN).hex()}", Limits(tokens_per_minute=100))
    assert table.quotas == {
        key_file.digest(A): (of_group,),
        key_file.digest(B): (of_group, of_b),
        key_file.digest(ADMIN): (of_admin,),
    }


BAD: list[tuple[Any, str]] = [
    ('{"groups": {"a": ["sk-secret"]}', "not JSON: line 1"),
    ("[" * 100_000, "not JSON"),
    ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "not JSON"),
    (["sk-secret"], "must be an object"),
    ({"sk-secret": "team-a"}, "must be an object"),
    ({"groups": ["sk-secret"]}, '"groups" must be an object'),
    ({"groups": {"sk-secret": "team-a"}}, "group 1 must have a list"),
    ({"groups": {"sk secret!": [A]}}, "the name of group 1"),
    ({"groups": {"_admin": ["sk-secret"]}}, "the name of group 1"),
    ({"groups": {"": ["sk-secret"]}}, "the name of group 1"),
    ({"groups": {"a": ["sk-x", 7]}}, "key 2 of group 1"),
    ({"groups": {"a": ["sk secret"]}}, "key 1 of group 1"),
    ({"groups": {"a": ["sk-secret\n"]}}, "key 1 of group 1"),
    ({"groups": {"a": [""]}}, "key 1 of group 1"),
    ({"groups": {"a": ["sk-sécret"]}}, "key 1 of group 1"),
    ({"groups": {"a": ["sha256:secret"]}}, "64 hexadecimal digits"),
    ({"groups": {"a": ["sk-secret"], "b": ["sk-secret"]}}, "key 1 of group 2 is in another group"),
    ({"groups": {"a": ["sk-secret"], "b": [hashed("sk-secret")]}}, "is in another group"),
    ({"groups": {"a": ["sk-secret"]}, "admin": ["sk-secret"]}, "key 1 of admin is in a group"),
    ('{"groups": {"a": ["sk-secret"], "a": ["sk-x"]}}', "has a duplicate name"),
    ({"groups": {}}, "no keys"),
    ({"groups": {"a": []}, "admin": []}, "no keys"),
    (
        {"groups": {"a": {"keys": [A], "requests_per_minute": 0}}},
        "group 1 has invalid limits: requests",
    ),
    (
        {"groups": {"a": {"keys": [A], "concurrency": True}}},
        "invalid limits: concurrency",
    ),
    ({"groups": {"a": {"keys": [A], "sk-secret": 1}}}, "invalid limits: unknown names"),
    ({"groups": {"a": {"keys": [A], "scopes": ["root"]}}}, "invalid limits: scopes"),
    ({"groups": {"a": {"share": 2}}}, "group 1 must have a list"),
    ({"groups": {"a": [{"key": A, "share": 2}]}}, "key 1 of group 1 has invalid limits"),
    ({"groups": {"a": [{"concurrency": 2}]}}, "key 1 of group 1 must be a string"),
    ({"admin": [{"key": A, "concurrency": 2}]}, "key 1 of admin has limits"),
    (" " * (1 << 20) + "{}", "more than 1048576 bytes"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_an_invalid_file_prevents_the_start_and_the_error_shows_no_key(
    tmp_path: Path, number: int
) -> None:
    document, message = BAD[number]
    path = write(tmp_path / "keys.json", document)
    with pytest.raises(CannotStart, match=re.escape(message)) as caught:
        KeyRing(path, (), None)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)
    assert hashed("sk-secret") not in str(caught.value)


def test_a_key_file_that_is_not_a_regular_file_prevents_the_start(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="No such file"):
        KeyRing(tmp_path / "none.json", (), None)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CannotStart, match="not a regular file"):
        KeyRing(tmp_path / "pipe", (), None)


def test_a_key_from_a_flag_must_not_be_in_a_group(path: Path) -> None:
    for keys, admin in (([A], None), ([], A), (["sk-x"], "sk-x"), ([ADMIN], None)):
        with pytest.raises(CannotStart, match="in two groups, or is an admin key"):
            KeyRing(path, keys, admin)
    with pytest.raises(CannotStart, match="--admin-key is empty"):
        KeyRing(None, (), " ")


# ---------------------------------------------------------------------- the key ring


async def group_in(ring: KeyRing, key: str) -> str | None:
    grant = await ring.grant_of(key)
    return grant.group if grant is not None else None


def found_group(ring: KeyRing, key: str) -> str | None:
    ring._check_at = 0  # a second later
    return asyncio.run(group_in(ring, key))


def test_keys_from_flags_and_the_file_are_both_accepted(path: Path) -> None:
    ring = KeyRing(path, ["sk-flag"], "sk-root")
    assert found_group(ring, "sk-flag") == "default"
    assert found_group(ring, A) == "team-a"
    assert found_group(ring, hashed(B)) is None  # the hash of a key is not a valid key
    assert found_group(ring, "sk-root") == found_group(ring, ADMIN) == ADMIN_GROUP
    write(path, {"groups": {"team-c": [A]}})
    assert found_group(ring, A) == "team-c"
    assert found_group(ring, B) is None
    assert found_group(ring, "sk-flag") == "default"
    assert found_group(ring, "sk-root") == ADMIN_GROUP


def test_an_invalid_new_version_keeps_the_old_keys(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(path, (), None)
    path.write_text('{"groups": {"team-a": ["sk-other-secret"')
    assert found_group(ring, A) == "team-a"
    assert found_group(ring, A) == "team-a"
    (record,) = caplog.records  # once per version
    assert record.levelno == logging.ERROR
    assert "not JSON" in record.getMessage()
    assert "secret" not in caplog.text
    path.unlink()
    assert found_group(ring, A) == "team-a"
    assert found_group(ring, A) == "team-a"
    assert len(caplog.records) == 2
    assert "No such file" in caplog.records[1].getMessage()
    write(path, {"groups": {"team-b": [B]}})
    assert found_group(ring, A) is None
    assert found_group(ring, B) == "team-b"


def test_a_link_to_another_file_is_a_new_version(tmp_path: Path) -> None:
    """Kubernetes replaces secrets in this way."""
    for name, key in (("one", A), ("two", B)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "keys.json", {"groups": {"team": [key]}})
    (tmp_path / "now").symlink_to("one")
    ring = KeyRing(tmp_path / "now" / "keys.json", (), None)
    assert found_group(ring, B) is None
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", tmp_path / "now")
    assert found_group(ring, B) == "team"
    assert found_group(ring, A) is None


def test_the_file_is_checked_once_a_second(path: Path) -> None:
    ring = KeyRing(path, (), None)

    async def test() -> None:
        assert await group_in(ring, A) == "team-a"
        write(path, {"groups": {"team-c": [A]}})
        assert await group_in(ring, A) == "team-a"
        ring._check_at = 0
        assert await group_in(ring, A) == "team-c"

    asyncio.run(test())


def test_scopes_of_a_key_replace_those_of_its_group() -> None:
    table = key_file.parse(
        json.dumps(
            {"groups": {"a": {"keys": [A, {"key": B, "scopes": []}], "scopes": ["ingest"]}}}
        ).encode()
    )
    assert table.scopes == {key_file.digest(A): {"ingest"}, key_file.digest(B): frozenset()}


# ---------------------------------------------------------------------- the check of a request


def app_with(ring: KeyRing, root_path: str = "", *, guard_all: bool = False) -> FastAPI:
    app = FastAPI(root_path=root_path)
    app.state.key_ring = ring
    errors.add_error_handlers(app)

    async def group(request: Request) -> str:
        return group_of(request.scope)

    for path in ("/v1/group", "/group", "/inference/v1/group", "/health"):
        app.add_api_route(path, group, methods=["GET", "OPTIONS"])

    async def priority(request: Request) -> str:
        return request.headers.get("X-Vllm-Priority", "none")

    app.add_api_route("/v1/priority", priority, methods=["POST"])
    for path in ("/v1/files", "/v1/files/file-1", "/v1/chat", "/sleep"):
        app.add_api_route(path, group, methods=["GET", "POST", "OPTIONS"])
    app.add_api_route("/v1/admin", group, dependencies=[Depends(require_admin)])
    if ring.has_groups or guard_all:
        app.add_middleware(
            ApiKeys,
            ring=ring,
            guarded=("",) if guard_all else ("/v1", "/inference"),
            priority_header=b"x-vllm-priority",
            reserved=["/sleep"],
        )
    return app


def ask(app: FastAPI, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    async def test() -> httpx.Response:
        observed = Observed(
            app, root_path=app.root_path, server_timing=False, log_requests=False, traced=False
        )
        transport = httpx.ASGITransport(observed)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(test())


@pytest.mark.parametrize(
    ("authorization", "group"),
    [(f"Bearer {A}", "team-a"), (f"bearer {B}", "team-b"), (f"BEARER {ADMIN}", "_admin")],
)
def test_a_request_is_in_the_group_of_its_key(path: Path, authorization: str, group: str) -> None:
    app = app_with(KeyRing(path, (), None))
    for route in ("/v1/group", "/inference/v1/group", "/group"):
        assert ask(app, route, Authorization=authorization).json() == group


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {A}"},
        {"Authorization": A},
        {"Authorization": f"Bearer  {A}"},
        {"Authorization": f"Bearer {A}x"},
        {"Authorization": f"Bearer {hashed(B)}"},
        {"Authorization": "Bearer sk-\xe9"},
    ],
)
def test_guarded_paths_are_refused_without_a_known_key(path: Path, headers: dict[str, str]) -> None:
    app = app_with(KeyRing(path, (), None))
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    for route in ("/v1/group", "/v1/nothing", "/inference/v1/group"):
        response = ask(app, route, **raw)  # type: ignore[arg-type]
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert A not in response.text
    assert ask(app, "/group", **raw).json() == "_anonymous"  # type: ignore[arg-type]
    assert ask(app, "/group", "POST", **raw).status_code == 401  # type: ignore[arg-type]
    assert ask(app, "/v1/group", "OPTIONS", **raw).json() == "_anonymous"  # type: ignore[arg-type]


@pytest.mark.parametrize("file", [True, False])
def test_all_routes_but_probes_can_be_guarded(path: Path, file: bool) -> None:
    write(path, {"groups": {"team-a": [A]}})
    ring = KeyRing(path, (), ADMIN) if file else KeyRing(None, [A], ADMIN)
    app = app_with(ring, guard_all=True)
    for route in ("/group", "/v1/group", "/docs", "/openapi.json"):
        assert ask(app, route).status_code == 401
        assert ask(app, route, Authorization=f"Bearer {B}").status_code == 401
        for key in (A, ADMIN):
            assert ask(app, route, Authorization=f"Bearer {key}").status_code == 200
    assert ask(app, "/group", Authorization=f"Bearer {A}").json() == ("team-a" if file else "")
    assert ask(app, "/health").status_code == 200


def test_a_browser_may_send_the_key_as_a_password_to_read(path: Path) -> None:
    write(path, {"groups": {"team-a": [A]}})
    app = app_with(KeyRing(path, (), None), guard_all=True)
    asked = ask(app, "/group", Accept="text/html,*/*")
    assert asked.status_code == 401
    assert asked.headers["WWW-Authenticate"].startswith("Basic realm=")
    assert ask(app, "/group", Accept="*/*").headers["WWW-Authenticate"] == "Bearer"
    typed = f"Basic {base64.b64encode(f'me:{A}'.encode()).decode()}"
    assert ask(app, "/group", Authorization=typed).json() == "team-a"
    assert ask(app, "/group", "POST", Authorization=typed).status_code == 401  # may be forged
    for wrong in (f"Basic {base64.b64encode(A.encode()).decode()}", "Basic !", "Basic"):
        assert ask(app, "/group", Authorization=wrong).status_code == 401


def test_a_server_without_keys_cannot_guard_its_routes() -> None:
    access = AccessSettings(keys_for_all_routes=True)
    with pytest.raises(CannotStart, match="needs --api-key"):
        key_ring(access, [], keeps_responses=False)
    assert key_ring(access, [A], keeps_responses=False).has_keys


def test_paths_are_guarded_below_the_root_path(path: Path) -> None:
    app = app_with(KeyRing(path, (), None), root_path="/api")
    assert ask(app, "/api/v1/group").status_code == 401
    assert ask(app, "/v1/group").status_code == 401
    assert ask(app, "/api/v1/group", Authorization=f"Bearer {A}").json() == "team-a"


def test_the_body_of_a_request_without_a_key_is_not_read(path: Path) -> None:
    read: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        read.append("app")

    async def receive() -> Any:
        read.append("body")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    for kind in ("http", "websocket"):
        scope = {"type": kind, "path": "/v1/x", "headers": []}
        set_record(scope, Record())
        asyncio.run(ApiKeys(app, KeyRing(path, (), None), ("/v1",))(scope, receive, send))
        assert sent[-2]["status"] == 401
    assert read == []


@pytest.mark.parametrize("file", [True, False])
@pytest.mark.parametrize("admin_key", ["sk-root", None])
def test_admin_routes_require_the_admin_key(path: Path, file: bool, admin_key: str | None) -> None:
    write(path, {"groups": {"team-a": [A]}})
    app = app_with(KeyRing(path if file else None, (), admin_key))
    refused = ask(app, "/v1/admin", Authorization=f"Bearer {A}")
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "admin_key_required"
    assert ("--admin-key" in refused.text) == (admin_key is None)
    assert ask(app, "/v1/admin").status_code == (401 if file else 403)
    if admin_key:
        answer = ask(app, "/v1/admin", Authorization=f"Bearer {admin_key}")
        assert (answer.status_code, answer.json()) == (200, ADMIN_GROUP if file else "")


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        ([], None),  # without a check
        (["--admin-key", ADMIN], None),
        (["--api-keys-file", "keys.json"], None),  # checked here, not by vLLM
        (["--api-keys-file", "keys.json", "--admin-key", ADMIN], None),
        (["--api-key"], {A}),
        (["--api-key", "--admin-key", ADMIN], {A, ADMIN}),
        (["--api-key", "--api-keys-file", "keys.json"], None),
        (["--api-key", "--keys-for-all-routes"], None),  # also takes keys that a browser sends
    ],
)
def test_vllm_checks_the_keys_that_are_not_checked_here(
    flags: list[str], known: set[str] | None
) -> None:
    """Its own keys and, if there are any, the admin key."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--api-key", action="store_const", const=[A])
    config.add_flags(parser)
    parsed = parser.parse_args(flags)
    cors = {"allowed_origins": [], "allowed_methods": ["*"], "allowed_headers": ["*"]}
    args = argparse.Namespace(
        **cors,
        api_key=parsed.api_key,
        allow_credentials=False,
        enable_request_id_headers=False,
        middleware=[],
    )
    keys = keys_for_vllm(config.from_flags(parsed).access, api_keys(args))
    app = FastAPI()
    app.add_api_route("/v1/x", lambda: "in")
    engine: Any = SimpleNamespace(get_supported_tasks=lambda: asyncio.sleep(0, ()))
    asyncio.run(add_vllm_middleware(app, args, engine, keys))
    for key in (None, A, B, ADMIN):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        expected = 200 if known is None or key in known else 401
        assert ask(app, "/v1/x", **headers).status_code == expected


def test_the_admin_key_is_not_shown() -> None:
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    settings = config.from_flags(parser.parse_args(["--admin-key", ADMIN]))
    assert settings.access.admin_key is not None
    assert settings.access.admin_key.get_secret_value() == ADMIN
    assert ADMIN not in repr(settings)
    empty = config.from_flags(parser.parse_args(["--admin-key", ""]))
    with pytest.raises(CannotStart, match="--admin-key is empty"):
        key_ring(empty.access, (), keeps_responses=False)
    with pytest.raises(ValueError, match="image_workers") as caught:
        config.from_flags(parser.parse_args(["--admin-key", ADMIN, "--image-workers", "no"]))
    assert ADMIN not in str(caught.value)


def test_groups_with_a_shared_response_store_prevent_the_start(path: Path) -> None:
    access = AccessSettings(api_keys_file=path)
    assert key_ring(access, (), keeps_responses=False).has_groups
    with pytest.raises(CannotStart, match="VLLM_ENABLE_RESPONSES_API_STORE"):
        key_ring(access, (), keeps_responses=True)
    assert not key_ring(AccessSettings(), (), keeps_responses=True).has_groups


def test_a_websocket_is_in_the_group_of_its_key(path: Path) -> None:
    """It has no record, but vLLM's caches must still be separate for each group."""
    groups = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        groups.append(record_of(scope).key_group)

    scope = {
        "type": "websocket",
        "path": "/v1/realtime",
        "headers": [(b"authorization", f"Bearer {A}".encode())],
    }
    silent: Any = None
    asyncio.run(ApiKeys(app, KeyRing(path, (), None), ("/v1",))(scope, silent, silent))
    assert groups == ["team-a"]


# ---------------------------------------------------------------------- scopes and limits


SCOPES = [
    # scopes, method, path, status
    (["inference"], "POST", "/v1/chat", 200),
    (["inference"], "POST", "/v1/files", 403),
    (["inference"], "GET", "/v1/files/file-1", 403),
    (["ingest"], "POST", "/v1/files", 200),
    (["ingest"], "POST", "/v1/chat", 403),
    (["ingest"], "GET", "/v1/group", 200),
    ([], "POST", "/v1/chat", 403),
    (["inference", "ingest"], "POST", "/v1/files", 200),
    (None, "POST", "/v1/files", 200),
]


@pytest.mark.parametrize(("scopes", "method", "route", "status"), SCOPES)
def test_scopes_restrict_what_a_key_may_do(
    tmp_path: Path, scopes: list[str] | None, method: str, route: str, status: int
) -> None:
    file = write(
        tmp_path / "keys.json", {"groups": {"a": {"keys": [{"key": A, "scopes": scopes}]}}}
    )
    answer = ask(app_with(KeyRing(file, (), None)), route, method, Authorization=f"Bearer {A}")
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "scope_missing"


def test_routes_that_change_the_server_need_an_admin_key(path: Path) -> None:
    app = app_with(KeyRing(path, (), None))
    refused = ask(app, "/sleep", "POST", Authorization=f"Bearer {A}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_key_required")
    assert ask(app, "/sleep", "POST", Authorization=f"Bearer {ADMIN}").status_code == 200


def test_a_request_has_the_priority_of_its_key_whatever_it_asks_for(tmp_path: Path) -> None:
    document = {"groups": {"a": {"keys": [A, {"key": B, "priority": 7}], "priority": 5}}}
    app = app_with(KeyRing(write(tmp_path / "keys.json", document | {"admin": [ADMIN]}), (), None))
    for key, priority in ((A, "5"), (B, "7"), (ADMIN, "-9")):
        headers = {"Authorization": f"Bearer {key}", "X-Vllm-Priority": "-9"}
        assert ask(app, "/v1/priority", "POST", **headers).json() == priority


# Routes of vLLM for every key that need no permit: they take no time, or pass on what others did.
FREE = {
    "/detokenize",
    "/is_scaling_elastic_ep",
    "/ping",
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
    "/v1/responses/{response_id}/cancel",
}


def test_every_route_of_vllm_needs_a_permit_or_an_admin_key_or_is_free() -> None:
    folder = Path(entrypoints.__file__).parent
    found = {
        path
        for file in folder.rglob("*.py")
        for path in re.findall(r"\.(?:post|put|delete)\(\s*\"(/[^\"]*)\"", file.read_text())
    }
    assert len(found) > 50
    assert found - FREE - ADMIN_PATHS - set(ADMITTED) == set()
