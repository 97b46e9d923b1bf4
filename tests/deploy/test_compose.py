"""The Compose file against its schema, and the services' configuration in the real services."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.settings import PREFIX, Settings, leaves
from tests.redis_server import RedisServer, redis_server
from tests.services import program, running

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus" / "prometheus.yml"
SERVERS = ("server-cpu", "server-gpu")
KIB = 1024
TARGETS_TIMEOUT_S = 60


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return dict(compose["services"])


def obeys_schema(path: Path) -> bool:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*command, path], capture_output=True).returncode == 0


def test_the_compose_file_obeys_its_schema(tmp_path: Path) -> None:
    assert obeys_schema(DEPLOY / "compose.yaml")
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DEPLOY / "compose.yaml").read_text().replace("stop_grace_period", "grace"))
    assert not obeys_schema(wrong)


def test_every_service_is_restricted_and_has_a_health_check(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["restart"] == "unless-stopped", name
        assert "healthcheck" in service or name in SERVERS, name  # theirs are in the Dockerfile


def test_ports_are_bound_to_loopback_by_default(services: dict[str, Any]) -> None:
    for name, service in services.items():
        bound = "${BIND:-127.0.0.1}:" if name in SERVERS else "127.0.0.1:"
        for port in service.get("ports", []):
            assert port.startswith(bound), f"{name}: {port}"


@pytest.mark.parametrize("name", SERVERS)
def test_the_api_key_variable_is_passed_to_the_server(services: dict[str, Any], name: str) -> None:
    """Compose reads a variable without a value from its own environment."""
    environment = services[name]["environment"]
    assert {"HF_TOKEN": None, "VLLM_API_KEY": None}.items() <= environment.items()


def test_a_key_file_is_mounted_as_documented(tmp_path: Path) -> None:
    page = (DEPLOY.parent / "docs" / "deploy.md").read_text()
    (shown,) = re.findall(r"```yaml\n(# keys\.yaml.*?)```", page, re.DOTALL)
    added = tmp_path / "keys.yaml"
    added.write_text(shown)
    assert obeys_schema(added)
    compose = yaml.safe_load(shown)
    (name,) = compose["services"]
    assert name in SERVERS
    service = compose["services"][name]
    assert set(service["environment"]) <= {PREFIX + leaf.upper() for _, leaf, _ in leaves()}
    assert service["secrets"] == list(compose["secrets"])
    mounted = f"/run/secrets/{service['secrets'][0]}"
    assert service["environment"]["SACCADE_API_KEYS_FILE"] == mounted


def test_every_mounted_file_exists(services: dict[str, Any]) -> None:
    mounted = [volume for each in services.values() for volume in each.get("volumes", [])]
    paths = [volume.split(":")[0] for volume in mounted if volume.startswith(".")]
    assert paths
    assert [path for path in paths if not (DEPLOY / path).exists()] == []


@pytest.mark.parametrize("name", SERVERS)
def test_a_profile_starts_one_server_with_the_cache(services: dict[str, Any], name: str) -> None:
    service = services[name]
    assert [f"server-{profile}" for profile in service["profiles"]] == [name]
    assert service["build"]["target"] == name.removeprefix("server-")
    assert service["environment"]["SACCADE_EMBEDDING_CACHE_URL"].startswith("redis://redis:")
    assert "server" in service["networks"]["default"]["aliases"]  # the name that Prometheus scrapes
    grace_s = int(service["stop_grace_period"].removesuffix("s"))
    http = Settings().http
    assert grace_s > http.drain_delay_s + http.drain_timeout_s


def test_grafana_is_provisioned_with_dashboard_and_data_source(services: dict[str, Any]) -> None:
    grafana = DEPLOY / "grafana"
    mounted = {
        target: DEPLOY / source
        for source, target, _ in (volume.split(":") for volume in services["grafana"]["volumes"])
    }
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert json.loads(mounted[home].read_text())["panels"]
    providers = yaml.safe_load((grafana / "provisioning/dashboards/saccade.yml").read_text())
    assert providers["providers"][0]["options"]["path"] == str(Path(home).parent)
    sources = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yml").read_text())
    (source,) = sources["datasources"]
    assert (source["uid"], source["type"], source["isDefault"]) == ("prometheus",) * 2 + (True,)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Prometheus with the Compose file's unmodified configuration."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        program("prometheus"),
        f"--config.file={PROMETHEUS}",
        f"--storage.tsdb.path={tmp_path_factory.mktemp('metrics')}",
        f"--web.listen-address={address}",
    ]
    with (
        httpx.Client(base_url=f"http://{address}", timeout=30) as client,
        running(command, ready=lambda: client.get("/-/ready").is_success),
    ):
        yield client


def test_promtool_accepts_the_configuration() -> None:
    checked = subprocess.run(
        [program("promtool"), "check", "config", PROMETHEUS], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert "SUCCESS" in checked.stdout


def test_prometheus_scrapes_the_server(prometheus: httpx.Client, services: dict[str, Any]) -> None:
    deadline = time.monotonic() + TARGETS_TIMEOUT_S
    while not (targets := prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]):
        assert time.monotonic() < deadline  # targets appear some seconds after it is ready
        time.sleep(0.1)
    addresses = [
        (target["scrapePool"], target["discoveredLabels"]["__address__"]) for target in targets
    ]
    assert addresses == [("saccade", "server:8000")]
    for name in SERVERS:
        assert services[name]["ports"][0].endswith(":8000")


def test_prometheus_loads_the_alerts(prometheus: httpx.Client) -> None:
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    loaded = {rule["name"] for group in groups for rule in group["rules"]}
    written = yaml.safe_load((PROMETHEUS.parent / "alerts.yml").read_text())["groups"]
    assert written
    assert loaded == {
        rule.get("alert") or rule["record"] for group in written for rule in group["rules"]
    }


@pytest.fixture
def redis(tmp_path: Path, services: dict[str, Any]) -> Iterator[RedisServer]:
    """Redis with the Compose file's configuration, which overrides flags that persist data."""
    command = services["redis"]["command"]
    volume = services["redis"]["volumes"][0].split(":")
    assert command == ["redis-server", volume[1]]
    keeping = ("--save", "1 1", "--appendonly", "yes", "--dir", str(tmp_path))
    with redis_server(*keeping, "--include", str(DEPLOY / volume[0])) as server:
        yield server


def test_redis_persists_nothing_to_disk(redis: RedisServer, tmp_path: Path) -> None:
    with redis.client() as client:
        assert client.config_get("save") == {"save": ""}
        client.set("image", b"0" * KIB)
        client.shutdown()  # Redis would save if it had save points
    assert list(tmp_path.iterdir()) == []


def test_redis_evicts_old_entries_when_full(redis: RedisServer) -> None:
    with redis.client() as client:
        client.config_set("maxmemory", 8 << 20)
        for number in range(64):
            client.set(f"image {number}", b"0" * 512 * KIB)
        assert client.get("image 63")
        assert client.info("stats")["evicted_keys"] > 0
        assert client.dbsize() < 64
