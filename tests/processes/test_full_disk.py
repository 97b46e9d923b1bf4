"""Disks and /dev/shm that are full while the parts of a server work, and have room again."""

import asyncio
import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, UploadFile

from server.engine.vllm_adapter import cpu_waits, plugin
from server.http import errors, files
from server.http.body import BodyReader
from server.http.byte_budget import ByteBudget
from server.http.observe import Observed
from server.ingest.files import FileStore, Quota
from server.request.admission import Admission
from server.settings import HttpSettings, ImageSettings
from server.telemetry.record import Record
from server.workers.jobs import ProcessJob, encode_kwargs
from server.workers.pool import ImagePool
from server.workers.worker import WorkerSpec
from tests import pictures
from tests.admission import limits
from tests.forked import in_fork
from tests.media import media_loader, reader
from tests.scarce_files import no_free_files
from tests.small_disks import MIB, filled, mount, require_disks, small_disk

PICTURE = pictures.encode(pictures.photo((300, 200)))
OTHER = pictures.encode(pictures.photo((90, 70)))
LARGE = 300_000  # a command of the extractor
BLOCK = os.sysconf("SC_PAGE_SIZE")


def app_of(store: FileStore | None) -> Any:
    """The routes of files, and one with a form as vLLM's routes for audio have it, behind the
    layers that read bodies and shape errors."""
    app = FastAPI()
    app.include_router(files.router)

    @app.post("/v1/audio/transcriptions")
    async def transcribe(file: UploadFile) -> int:
        return len(await file.read())

    app.state.loader = loader = media_loader(store)
    app.state.files = store
    errors.add_error_handlers(app)
    app.add_middleware(
        BodyReader,
        settings=HttpSettings(),
        reader=reader(),
        loader=loader,
        retained=None,
        limits={},
        budget=ByteBudget(64 * MIB, 10),
        parsed=(),
        admission=Admission(limits()),
        admitted=(),
    )
    return Observed(app, server_timing=False, log_requests=False, traced=False)


@contextlib.asynccontextmanager
async def client(folder: Path | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app with files in `folder`."""
    async with contextlib.AsyncExitStack() as stack:
        store = None
        if folder is not None:
            store = await stack.enter_async_context(FileStore(folder, Quota(), Quota(), None))
        transport = httpx.ASGITransport(app_of(store), raise_app_exceptions=False)
        yield await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://test")
        )


async def upload(web: httpx.AsyncClient, data: bytes = PICTURE) -> httpx.Response:
    return await web.post("/v1/files", data={"purpose": "vision"}, files={"file": data})


def assert_no_room(answer: httpx.Response) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (507, "file_storage_failed")
    assert error["message"] == "the server's disk is full"  # and no library's text


def test_an_upload_to_a_full_disk_is_refused_until_there_is_room(tmp_path: Path) -> None:
    async def check(folder: Path) -> None:
        async with client(folder) as web:
            kept = (await upload(web)).json()["id"]
            with filled(folder):
                for _ in range(2):
                    assert_no_room(await upload(web, OTHER))
                listed = (await web.get("/v1/files")).json()["data"]
                assert [file["id"] for file in listed] == [kept]
                content = await web.get(f"/v1/files/{kept}/content")
                assert content.content == PICTURE
                assert (await web.delete(f"/v1/files/{kept}")).status_code == 200
            assert (await upload(web)).status_code == 200

    with small_disk(tmp_path) as folder:
        asyncio.run(check(folder))


def test_an_upload_whose_record_has_no_room_leaves_nothing(tmp_path: Path) -> None:
    async def check(folder: Path) -> None:
        async with client(folder) as web:
            await upload(web)  # makes the folders
            small = pictures.encode(pictures.photo((20, 20)))
            assert len(small) <= BLOCK
            with filled(folder, but=BLOCK):
                assert_no_room(await upload(web, small))
                assert shutil.disk_usage(folder).free == BLOCK
            assert (await upload(web, small)).status_code == 200

    with small_disk(tmp_path) as folder:
        asyncio.run(check(folder))


def test_a_form_that_has_no_room_for_its_file_is_no_bad_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starlette stores the larger files of a form in the temporary folder."""
    form = {"file": bytes(2 * MIB)}

    async def check(folder: Path) -> None:
        async with client() as web:
            with filled(folder):
                assert_no_room(await web.post("/v1/audio/transcriptions", files=form))
            answer = await web.post("/v1/audio/transcriptions", files=form)
            assert (answer.status_code, answer.json()) == (200, 2 * MIB)
            with no_free_files():
                answer = await web.post("/v1/audio/transcriptions", files=form)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            answer = await web.post("/v1/audio/transcriptions", files={"wrong": b""})
            assert answer.status_code == 400

    with small_disk(tmp_path) as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        asyncio.run(check(folder))


# ---------------------------------------------------------------------- shared memory


def test_workers_process_images_while_shared_memory_and_the_temporary_folder_are_full(
    tmp_path: Path,
) -> None:
    """Also new workers, in place of those that crash."""
    require_disks(tmp_path)

    async def check() -> list[int]:
        job = ProcessJob("PNG", (8, 6), kwargs=encode_kwargs({}))
        spec = WorkerSpec("tests.extractors:load", b"payload", sandbox="off")
        async with asyncio.timeout(120), ImagePool(spec, ImageSettings(image_workers=1)) as pool:
            commands = [f"large {LARGE}", f"die-once {tmp_path}/died", f"large {LARGE}"]
            files = [command.encode() + b"\n" + bytes(3 * MIB) for command in commands]
            found = [
                await pool.process(str(n), file, job, Record()) for n, file in enumerate(files)
            ]
            return [len(each.buffer) for each in found]

    def in_child() -> list[int]:
        shm, temporary = Path("/dev/shm"), tmp_path / "tmp"
        temporary.mkdir()
        mount({str(shm): BLOCK, str(temporary): BLOCK})
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        with filled(shm), filled(temporary):
            return asyncio.run(check())

    assert all(nbytes >= 3 * MIB for nbytes in in_fork(in_child))
    assert (tmp_path / "died").exists()


def test_the_note_of_image_work_needs_no_room_on_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is mapped memory: with a file on a full disk, the kernel would kill the server."""

    def in_child() -> list[float]:
        cpu_waits.ask()
        noted = Path(plugin.asked().image_work or "")
        with filled(folder):
            began = time.monotonic()
            cpu_waits.note_work()
            return [began, *struct.unpack_from("d", noted.read_bytes()), time.monotonic()]

    with small_disk(tmp_path) as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        times = in_fork(in_child)
    assert times == sorted(times)


# ---------------------------------------------------------------------- the log

START_AND_END = """
from server import cli
cli.Progress()("a stage of the start")
print("what a library prints")
cli._end(3)
"""


def test_a_command_keeps_its_exit_status_without_room_for_its_output(tmp_path: Path) -> None:
    with small_disk(tmp_path) as folder, filled(folder), (folder / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-c", START_AND_END],
            env=os.environ | {"PYTHONUNBUFFERED": ""},
            stdout=log,
            stderr=log,
            check=False,
            timeout=60,
        )
    assert done.returncode == 3


# ---------------------------------------------------------------------- caches of compiled code

COMPILE = """
import sys
from server.imaging.codecs import kernels
from server.imaging.codecs.jpeg_reduced import agrees_with_libjpeg
assert agrees_with_libjpeg()
"""


def test_decoders_are_compiled_though_the_disk_for_compiled_code_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path) as folder, filled(folder):
        done = subprocess.run(
            [sys.executable, "-c", COMPILE],
            env=os.environ | {"NUMBA_CACHE_DIR": str(folder)},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
