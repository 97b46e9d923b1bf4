"""Real servers whose disks or /dev/shm are full: at the start, and while they serve."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests import pictures
from tests.conftest import serving
from tests.small_disks import MIB, filled, require_disks, small_disk
from tests.starts import template

SHM = "/dev/shm"
DISK_BYTES = 64 * MIB


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ask(web: httpx.Client, *content: dict[str, Any], **more: Any) -> httpx.Response:
    body = {"model": "saccade-tiny", "messages": pictures.user(*content), "max_tokens": 8, **more}
    return web.post("/v1/chat/completions", json=body)


def upload(web: httpx.Client, data: bytes) -> httpx.Response:
    return web.post("/v1/files", data={"purpose": "vision"}, files={"file": data})


@contextlib.contextmanager
def without_room(log_file: Path) -> Iterator[None]:
    """No line can be written to the log meanwhile."""
    with filled(log_file.parent):
        with log_file.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:  # its last block is full, too
                file.write(b"\n")
        size = log_file.stat().st_size
        yield
        assert log_file.stat().st_size == size


def new_picture(seed: int) -> bytes:
    return pictures.encode(pictures.photo((160, 120), seed))


def test_a_start_with_too_little_shared_memory_ends_with_a_clear_message(tmp_path: Path) -> None:
    require_disks(tmp_path)
    disks = json.dumps({SHM: 64 * MIB})  # as in a container by default
    done = template().run("tests.small_disks:saccade", disks, "serve", "--port", "0")
    assert done.returncode == 1, done.stderr
    *_, last = done.stderr.splitlines()
    assert "cannot start: /dev/shm has" in last
    assert "enlarge it (docker --shm-size, shm_size, a memory volume)" in last
    assert "Traceback" not in done.stderr + done.stdout


def test_a_server_whose_disks_fill_up_goes_on_and_uses_them_again(tmp_path: Path) -> None:
    """The disks are that of the log, that of all its folders, and /dev/shm."""
    question = pictures.text_part("What is shown?")
    with tempfile.TemporaryDirectory() as home, small_disk(tmp_path) as log_disk:
        flags = (
            *("--files", "--files-dir", f"{home}/files"),
            *("--embedding-cache-dir", f"{home}/embeddings"),
        )
        disks = {SHM: 1024 * MIB, home: DISK_BYTES}
        log_file = log_disk / "log"
        started = serving(*flags, disks=disks, log_file=log_file, TMPDIR=home)
        with started as server, httpx.Client(base_url=server.url, timeout=60) as web:
            root = Path(f"/proc/{server.process.pid}/root")
            folder = root / home[1:]
            embeddings = folder / "embeddings"
            kept = upload(web, new_picture(0)).json()["id"]
            with filled(root / SHM[1:]), filled(folder), without_room(log_file):
                before = {child.pid for child in server.children()}
                uploaded = {"type": "image_url", "image_url": {"file_id": kept}}
                assert ask(web, uploaded, question).status_code == 200
                for seed in range(1, 6):
                    image = pictures.image_part(new_picture(seed))
                    assert ask(web, image, question).status_code == 200
                    refused = upload(web, new_picture(seed))
                    assert refused.status_code == 507
                    assert refused.json()["error"]["code"] == "file_storage_failed"
                assert "data: [DONE]" in ask(web, question, stream=True).text
                shape = {"type": "json_object"}
                assert ask(web, question, response_format=shape).status_code == 200
                assert web.get("/ready").status_code == 200
                assert web.get("/metrics").status_code == 200
                assert {child.pid for child in server.children()} == before
                for worker in server.image_workers():
                    worker.kill()
                assert ask(web, pictures.image_part(new_picture(6)), question).status_code == 200
            assert shutil.disk_usage(folder).free
            assert upload(web, new_picture(7)).status_code == 200
            saved = set(embeddings.rglob("*.safetensors"))
            seeds = iter(range(10, 1000))  # a cache whose disk has failed is tried again in a while

            def caches() -> bool:
                ask(web, pictures.image_part(new_picture(next(seeds))), question)
                return set(embeddings.rglob("*.safetensors")) > saved

            until(caches)
            web.get("/v1/files/after")
            until(lambda: any("/v1/files/after" in line for line in server.log))
            with without_room(log_file):
                assert server.stop() == 0
        assert "Traceback" not in "".join(server.log)
