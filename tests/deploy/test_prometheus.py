"""Alerts and dashboard, checked with a real Prometheus that scrapes the real server."""

import concurrent.futures
import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests import promtool
from tests.conftest import Origin, Server
from tests.pictures import data_url, encode, image_part, photo, shape, text_part, user
from tests.scrape import FRESH
from tests.services import program, running

REPOSITORY = Path(__file__).parents[2]
RULES = REPOSITORY / "deploy" / "prometheus"
GRAFANA = REPOSITORY / "deploy" / "grafana"
RUNBOOK = REPOSITORY / "docs" / "runbook.md"
PATIENCE_S = 120
CLIENTS = 2  # concurrent, while Prometheus scrapes
WHAT = text_part("What is in the image?")


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def panels() -> list[dict[str, Any]]:
    """All panels, including those in collapsed rows, without the rows."""
    dashboard = json.loads((GRAFANA / "saccade.json").read_text())
    every = [each for panel in dashboard["panels"] for each in (panel, *panel.get("panels", ()))]
    return [panel for panel in every if panel["type"] != "row"]


def names(query: str) -> set[str]:
    """The metrics that a query reads, except recorded ones."""
    return set(re.findall(r"\b(?:saccade_|vllm:|process_)[a-z0-9_:]+", query))


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("command", ["check", "test"])
def test_alert_rules_pass_their_promtool_tests(command: str) -> None:
    file = {"check": "alerts.yml", "test": "alerts_test.yml"}[command]
    done = subprocess.run(
        [program("promtool"), command, "rules", file], cwd=RULES, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_documented() -> None:
    tests = (RULES / "alerts_test.yml").read_text()
    headings = re.findall(r"^## (\w+)$", RUNBOOK.read_text(), re.M)
    assert headings == sorted(set(headings))
    assert {alert["alert"] for alert in alerts()} == set(headings)
    for alert in alerts():
        name, severity = alert["alert"], alert["labels"]["severity"]
        assert re.search(rf'labels: .*alertname="{name}".* severity="{severity}"', tests), name
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def test_the_dashboard_equals_its_generators_output() -> None:
    command = [sys.executable, str(GRAFANA / "build.py")]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (GRAFANA / "saccade.json").read_text() == written


def test_every_panel_has_a_description() -> None:
    for panel in panels():
        assert panel["description"], panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["type"] in ("table", "heatmap") or panel["fieldConfig"]["defaults"]["unit"]
    titles = [(panel["type"], panel["title"]) for panel in panels()]
    assert len(titles) == len(set(titles))


def query_of(kind: str, title: str) -> str:
    """The query of a panel for all servers over two hours."""
    (panel,) = (p for p in panels() if (p["type"], p["title"]) == (kind, title))
    query: str = panel["targets"][0]["expr"]
    variables = {"$__range": "2h", "$price": "3", "$instance": ".*", "$model_name": ".*"}
    for variable, value in variables.items():
        query = query.replace(variable, value)
    return query


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("GPU seconds of an image", 4 * 7200 / 2400),
        ("Cost of 1000 images", 1000 * 3 * 4 * 2 / 2400),
        ("Cost of 1M tokens", 1e6 * 3 * 4 * 2 / 480_000),
    ],
)
def test_replaced_servers_count_towards_cost_while_they_ran(
    title: str, expected: float, tmp_path: Path
) -> None:
    """Four GPUs for two hours, first in one pod, then in another."""
    series = {
        'saccade_devices{instance="a"}': "4x119 stale",
        'saccade_devices{instance="b"}': "_x120 4x120",
        'saccade_image_tokens_count{instance="c"}': "0+10x240",
        'vllm:prompt_tokens_total{instance="c"}': "0+1500x240",
        'vllm:generation_tokens_total{instance="c"}': "0+500x240",
    }
    (value,) = promtool.values(query_of("stat", title), series, tmp_path, at="2h")
    assert value == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "title",
    [
        panel["title"]
        for panel in panels()
        if panel["type"] == "stat" and "/" in str(panel["targets"])
    ],
)
def test_shares_without_traffic_have_no_value(title: str, tmp_path: Path) -> None:
    query = query_of("stat", title).replace("$__rate_interval", "5m").replace("$ttft", "2.5")
    labels = '{instance="a", model_name="m", outcome="failed", cap="none", le="2.5"}'
    series = {f"{name}{labels}": "0x240" for name in names(query)}
    assert promtool.values(query, series, tmp_path, at="2h") == []


# ---------------------------------------------------------------------- the server's metrics


def test_metrics_pass_promtools_check(http: httpx.Client) -> None:
    lines = http.get("/metrics", headers=FRESH).text.splitlines()
    ours = [line for line in lines if re.match(r"(# (HELP|TYPE) )?saccade_", line)]
    assert len(ours) > 100
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input="\n".join(ours) + "\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A running Prometheus, queried over HTTP."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=f"{url}/api/v1", timeout=60)

    def ask(self, query: str) -> list[float]:
        """The values of an instant query.

        Raises:
            AssertionError: the query is wrong.
        """
        answer = self.client.post("/query", data={"query": query}).json()
        assert answer["status"] == "success", f"{query}: {answer['error']}"
        return [float(sample["value"][1]) for sample in answer["data"]["result"]]

    def values(self, label: str, series: str | None = None) -> list[str]:
        """All values of a label."""
        match = {"match[]": series} if series else {}
        found: list[str] = self.client.get(f"/label/{label}/values", params=match).json()["data"]
        return found


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[Prometheus]:
    """Configured as in deploy/prometheus, except for the server's address and the interval."""
    config = yaml.safe_load((RULES / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = config["global"]["evaluation_interval"] = "1s"
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "saccade")
    job.pop("scrape_interval", None)
    job["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    for rules in config["rule_files"]:
        shutil.copy(RULES / rules, tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        program("prometheus"),
        f"--config.file={file}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address={address}",
    ]

    def ready() -> bool:
        return httpx.get(f"http://{address}/-/ready").status_code == 200

    with running(command, ready=ready):
        asked = Prometheus(f"http://{address}")
        with asked.client:
            wait_for(lambda: asked.ask('up{job="saccade"}') == [1], "the first scrape")
            yield asked


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def traffic(server: Server, http: httpx.Client, origin: Origin) -> None:
    """One request of each kind that the dashboard distinguishes."""

    def ask(*parts: dict[str, Any], status: int = 200, **more: Any) -> None:
        body = {"model": server.model, "max_tokens": 8, "messages": user(*parts), **more}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == status, answer.text

    red, large = encode(shape("red")), encode(photo((900, 700), time.time_ns() % 2**32), "JPEG")
    origin.files["/blue.png"] = encode(shape("blue"))
    document = encode(shape("green"), "PDF")
    ask(text_part("Hello"))
    ask(image_part(red), WHAT)
    ask(image_part(red), WHAT)
    ask(image_part(large), WHAT, max_image_tokens=100)
    ask({"type": "image_url", "image_url": {"url": f"{origin.url}/blue.png"}}, WHAT)
    ask({"type": "image_url", "image_url": {"url": f"{origin.url}/gone.png"}}, WHAT, status=400)
    ask(image_part(red[:100]), WHAT, status=400)
    file = {"filename": "a.pdf", "file_data": data_url(document, "application/pdf")}
    ask({"type": "file", "file": file}, WHAT)
    endless = {
        "model": server.model,
        "messages": user(image_part(red), WHAT),
        "stream": True,
        "ignore_eos": True,
        "max_tokens": 3000,
    }
    with http.stream("POST", "/v1/chat/completions", json=endless) as answer:
        next(answer.iter_lines())


@contextlib.contextmanager
def under_load(server: Server) -> Iterator[None]:
    """Clients send requests with new pictures during the block."""
    ended = threading.Event()

    def load(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            turn = 0
            while not ended.is_set():
                picture = encode(photo((320, 240), hash((number, turn)) % 2**32), "JPEG")
                body = {"model": server.model, "max_tokens": 8}
                body["messages"] = user(image_part(picture), WHAT)
                answer = client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                turn += 1

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as threads:
        loads = [threads.submit(load, number) for number in range(CLIENTS)]
        try:
            yield
        finally:
            ended.set()
        for each in loads:
            each.result()


def filled(query: str, known: dict[str, str]) -> str:
    """A query with its variables replaced."""
    for variable, value in known.items():
        query = query.replace(f"${variable}", value)
    assert "$" not in query, query
    return query


def missing(prometheus: Prometheus, known: dict[str, str]) -> list[str]:
    """The dashboard's queries without a value."""
    lacking = []
    for panel in panels():
        for target in panel["targets"]:
            query = filled(target["expr"], known)
            if all(map(math.isnan, prometheus.ask(query))):
                lacking.append(f"{panel['title']}: {query}")
    return lacking


def test_every_query_of_dashboard_and_alerts_has_a_value(
    prometheus: Prometheus, server: Server, http: httpx.Client, origin: Origin
) -> None:
    # Series of the embedding cache appear with its first entries, and rates with the next ones.
    traffic(server, http, origin)
    wait_for(lambda: prometheus.ask("saccade_embedding_cache_seconds_count"), "the first entries")
    traffic(server, http, origin)
    known = {
        "__rate_interval": "5m",
        "__range": "5m",
        "instance": server.url.removeprefix("http://"),
        "model_name": server.model,
    }
    variables = json.loads((GRAFANA / "saccade.json").read_text())["templating"]["list"]
    for variable in variables:
        if variable["type"] == "textbox":
            known[variable["name"]] = variable["query"]
        elif variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert found, variable
            series = found[1].replace("$model_name", server.model)
            choice = known.setdefault(variable["name"], variable["current"]["value"])
            assert choice in prometheus.values(found[2], series), variable["name"]
    lacking: list[str] = []

    def complete() -> bool:
        lacking[:] = missing(prometheus, known)
        return not lacking

    try:
        with under_load(server):
            wait_for(complete, "queries without data")
            scrapes = 'count_over_time(up{job="saccade"}[5m])'
            before = prometheus.ask(scrapes)[0]
            wait_for(lambda: prometheus.ask(scrapes)[0] >= before + 5, "scrapes under load")
    except AssertionError:
        pytest.fail("\n".join(lacking) or "no scrapes under load", pytrace=False)
    assert prometheus.ask('min_over_time(up{job="saccade"}[5m])') == [1], "every scrape succeeded"
    for annotation in json.loads((GRAFANA / "saccade.json").read_text())["annotations"]["list"]:
        if "expr" in annotation:
            prometheus.ask(filled(annotation["expr"], known))

    scraped = set(prometheus.values("__name__"))
    for alert in alerts():
        assert names(alert["expr"]) <= scraped, alert["alert"]
        prometheus.ask(alert["expr"])
    states = prometheus.client.get("/rules").json()["data"]["groups"]
    rules = [rule for group in states for rule in group["rules"]]
    assert len(rules) >= len(alerts())
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, rules


def test_metrics_that_routers_read_exist(http: httpx.Client) -> None:
    """llm-d's endpoint picker chooses by these (deploy/kubernetes/overlays/llm-d)."""
    families = text_string_to_metric_families(http.get("/metrics", headers=FRESH).text)
    found = {sample.name: sample for family in families for sample in family.samples}
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        assert found[f"vllm:{name}"].value >= 0
    assert {"block_size", "num_gpu_blocks"} <= found["vllm:cache_config_info"].labels.keys()
