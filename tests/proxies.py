"""nginx and haproxy with the files of `deploy/`, and backends that record their requests."""

import contextlib
import os
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import trustme

from tests.services import program, running

DEPLOY = Path(__file__).parents[1] / "deploy"
BOTH = ("nginx", "haproxy")

# nginx's compiled-in defaults are system folders.
_NGINX = """
daemon off;
worker_processes 2;
error_log stderr;
pid nginx.pid;
events {}
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include saccade.conf;
}
"""


@dataclass
class Proxy:
    """A proxy on 127.0.0.1 that speaks TLS, and the file with its output.

    `metrics_url` is haproxy's own, empty for nginx.
    """

    port: int
    tls: ssl.SSLContext
    log: Path
    metrics_url: str = ""

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.tls, timeout=120)

    @contextlib.contextmanager
    def sent(self, request: bytes) -> Iterator[ssl.SSLSocket]:
        """A connection on which `request` was sent unmodified."""
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=60) as plain,
            self.tls.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            connection.sendall(request)
            yield connection

    def exchange(self, request: bytes, up_to: bytes = b"\r\n\r\n") -> bytes:
        """Send `request`; returns the response up to the bytes `up_to`, or to its end."""
        with self.sent(request) as connection:
            return received(connection, up_to)


def received(connection: ssl.SSLSocket, up_to: bytes) -> bytes:
    answer = b""
    while up_to not in answer and (data := connection.recv(65536)):
        answer += data
    return answer


@dataclass
class Backend:
    """A server that records its requests and answers `{}` when it `may_answer`.

    While it `streams`, it sends one event before it waits; while it `hangs_up`, nothing at all.
    """

    address: str = ""
    is_ready: bool = True
    hangs_up: bool = False
    streams: bool = False
    may_answer: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, Message]] = field(default_factory=list)


@contextlib.contextmanager
def backend() -> Iterator[Backend]:
    noted = Backend()
    noted.may_answer.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/ready":
                self._answer(200 if noted.is_ready else 503)
            else:
                self._note()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._note()

        def _note(self) -> None:
            noted.requests.append((self.path, self.headers))
            if noted.streams:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"d\r\ndata: first\n\n\r\n")
            noted.may_answer.wait()
            if noted.streams:
                self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            elif noted.hangs_up:
                self.close_connection = True
            else:
                self._answer(200)

        def _answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        noted.address = f"127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield noted
        finally:
            noted.may_answer.set()
            server.shutdown()


@contextlib.contextmanager
def proxy(kind: str, folder: Path, backends: Sequence[str]) -> Iterator[Proxy]:
    """nginx or haproxy in front of two `backends`, each HOST:PORT; `folder` is for its files."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    tls = ssl.create_default_context()
    authority.configure_trust(tls)
    prepare = {"nginx": _nginx, "haproxy": _haproxy}[kind]
    command, env, made = prepare(folder, backends, certificate, tls)
    with running(command, ready=_listens(made.port), env={**os.environ, **env}, log=made.log):
        yield made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


_Prepared = tuple[list[str | Path], dict[str, str], Proxy]


def _nginx(
    folder: Path, backends: Sequence[str], certificate: trustme.LeafCert, tls: ssl.SSLContext
) -> _Prepared:
    port = free_port()
    shutil.copytree(DEPLOY / "nginx", folder, dirs_exist_ok=True)
    (folder / "nginx.conf").write_text(_NGINX)
    own = folder / "saccade"
    own.joinpath("backends.conf").write_text("".join(f"server {at};\n" for at in backends))
    listen = own / "listen.conf"
    lines = listen.read_text().replace("listen [::]:443 ssl;", "")  # the machine may lack IPv6
    listen.write_text(lines.replace("listen 443", f"listen 127.0.0.1:{port}"))
    certificate.cert_chain_pems[0].write_to_path(own / "certificate.pem")
    certificate.private_key_pem.write_to_path(own / "key.pem")
    command = [program("nginx"), "-e", "stderr", "-p", folder, "-c", folder / "nginx.conf"]
    return command, {}, Proxy(port, tls, folder / "log")


def _haproxy(
    folder: Path, backends: Sequence[str], certificate: trustme.LeafCert, tls: ssl.SSLContext
) -> _Prepared:
    port, metrics_port = free_port(), free_port()
    pem = folder / "saccade.pem"
    certificate.private_key_and_cert_chain_pem.write_to_path(pem)
    env = {
        "LISTEN": f"127.0.0.1:{port}",
        "METRICS": f"127.0.0.1:{metrics_port}",
        "CERTIFICATE": str(pem),
        "INNER": f"unix@{folder}/inner",
        "BACKEND_1": backends[0],
        "BACKEND_2": backends[1],
    }
    command = [program("haproxy"), "-db", "-f", DEPLOY / "haproxy" / "haproxy.cfg"]
    metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
    return command, env, Proxy(port, tls, folder / "log", metrics_url)


def _listens(port: int) -> Callable[[], bool]:
    def ask() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True

    return ask
