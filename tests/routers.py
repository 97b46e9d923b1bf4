"""Routers in front of two servers: the proxies of `deploy/`, and the recipes of docs/scale.md."""

import contextlib
import os
import re
import shlex
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.proxies import BOTH, free_port, proxy
from tests.services import running

RECIPES = ("vllm-router", "smg")
ALL = (*BOTH, *RECIPES)
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
# An environment of its own, with deploy/routers/requirements.txt: `make routers`.
PROGRAMS = Path(sys.prefix) / "routers" / "bin"


@dataclass
class Router:
    """A router; `tls` is True where it speaks plain HTTP."""

    url: str
    tls: ssl.SSLContext | bool

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.tls, timeout=120)


@contextlib.contextmanager
def router(kind: str, folder: Path, urls: Sequence[str]) -> Iterator[Router]:
    """A router in front of two servers, which it uses; `folder` is for its files."""
    if kind in BOTH:
        addresses = [url.removeprefix("http://") for url in urls]
        with proxy(kind, folder, addresses) as made:
            yield Router(made.url, made.tls)
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = _recipe(kind, urls, port)
    with running(command, ready=_serves(url), env=dict(os.environ), log=folder / "log"):
        yield Router(url, True)


def _recipe(kind: str, urls: Sequence[str], port: int) -> list[str | Path]:
    """The command of docs/scale.md, with these servers and this port."""
    if not PROGRAMS.is_dir():
        miss = pytest.fail if os.environ.get("SERVICES") == "required" else pytest.skip
        miss("the routers are not installed: run `make routers`")
    (text,) = re.findall(rf"<!-- {kind} -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shown = re.findall(r"http://[0-9.]+:8000", text)
    for address, url in zip(shown, urls, strict=True):
        text = text.replace(address, url)
    text = text.replace("0.0.0.0 --port 8080", f"127.0.0.1 --port {port}")
    name, *words = shlex.split(text.replace("\\\n", " "))
    metrics = ("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()))
    return [PROGRAMS / name, *words, *metrics]


def _serves(url: str) -> Callable[[], bool]:
    """Whether the router has found its servers."""

    def ask() -> bool:
        body = {"model": "saccade-tiny", "prompt": "Hello", "max_tokens": 1}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=5).status_code == 200

    return ask
