"""Image workers as processes that can do nothing but decode, and do that as without a sandbox."""

import asyncio
import ctypes
import ctypes.util
import errno
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from PIL import Image

from server.errors import CannotStart, ImageTooLarge
from server.settings import ImageSettings
from server.telemetry import metrics
from server.telemetry.record import Record
from server.workers import confinement, environment, landlock, preload, seccomp
from server.workers import pool as pools
from server.workers.jobs import ProcessJob
from server.workers.pool import ImagePool
from server.workers.worker import WorkerSpec
from tests import hostile_pdfs, intrusions, media, pictures
from tests.corpus.make import all_cases
from tests.forked import SharedForkserver, in_fork
from tests.fuzz import media_mutations
from tests.process_memory import memory_with

ROOT = Path(__file__).parents[2]
JOB = ProcessJob("PNG", (8, 6))
MIB = 1 << 20
SECRETS = {
    "VLLM_API_KEY": "sk-of-vllm-1d80",
    "HF_TOKEN": "hf_of-the-hub-92ac",
    "HUGGING_FACE_HUB_TOKEN": "hf_old-name-7f31",
    "SACCADE_ADMIN_KEY": "sk-of-admin-55e0",
    "SACCADE_EMBEDDING_CACHE_URL": "redis://user:redis-password-0c4b@cache:6379/0",
    "AWS_SECRET_ACCESS_KEY": "of-aws-e811",
    "HTTPS_PROXY": "http://user:proxy-password-3a9d@proxy:3128",
    "HF_ENDPOINT": "https://user:mirror-password-d2f7@mirror",
}
FLAG = "sk-of-a-flag-b6c8"
MARKS = [FLAG, *(value.split("@")[0].rsplit(":", 1)[-1] for value in SECRETS.values())]


def spec_of(mode: confinement.SandboxMode, memory_mb: int = 1024) -> WorkerSpec:
    return WorkerSpec("tests.extractors:load", b"payload", 5.0, memory_mb * MIB, mode)


def pool_of(mode: confinement.SandboxMode, memory_mb: int = 1024) -> ImagePool:
    return ImagePool(spec_of(mode, memory_mb), ImageSettings(image_workers=1))


@pytest.fixture(scope="module")
def forkserver() -> Iterator[SharedForkserver]:
    shared = SharedForkserver(spec_of("require"))
    yield shared
    shared.stop()


@pytest.fixture
def shared_forkserver(forkserver: SharedForkserver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool of this test, which requires the sandbox, starts no forkserver of its own."""
    monkeypatch.setattr(pools, "Forkserver", lambda spec: forkserver)
    forkserver.preload()


async def answered(pool: ImagePool, command: str) -> dict[str, Any]:
    features = await pool.process(command, command.encode(), JOB, Record())
    return features.arrays(lambda *described: described[:2])


async def found_by_intruder(mode: confinement.SandboxMode) -> set[str]:
    async with pool_of(mode) as pool:
        answer = await answered(pool, f"intrude {os.getpid()}")
    return set(filter(None, answer["found"].split(", ")))


# ---------------------------------------------------------------------- what code there can do


def test_code_in_a_worker_reaches_no_file_network_or_process(shared_forkserver: None) -> None:
    assert asyncio.run(found_by_intruder("require")) == set()


def test_the_attempts_of_an_intruder_succeed_without_a_sandbox() -> None:
    """Otherwise the test above would show nothing."""
    found = asyncio.run(found_by_intruder("off"))
    own = set(intrusions.FILES) - {"write to a directory of fonts"}
    expected = own | set(intrusions.NETWORK) | set(intrusions.PROCESSES)
    allowed_by_containers = {"io_uring", "kcmp", "pidfd_getfd", "TCP over IPv6"}
    assert found >= expected - allowed_by_containers


def test_a_worker_gets_no_descriptor_of_the_forkserver(shared_forkserver: None) -> None:
    async def test() -> None:
        async with pool_of("require") as pool:
            forkserver = psutil.Process(pool.worker_pids[0]).parent()
            assert forkserver is not None
            assert len(opened(forkserver.pid, "socket:")) >= 4
            (pid,) = pool.worker_pids
            assert len(opened(pid, "socket:")) == 1  # its connection to the server
            assert len(opened(pid, "pipe:")) == 1  # standard error
            assert set(opened(pid, "/")) <= {"/dev/null", f"/proc/{pid}/statm"}

    asyncio.run(test())


def opened(pid: int, kind: str) -> list[str]:
    """The open files of a process whose descriptions begin with `kind`."""
    links = map(os.readlink, Path(f"/proc/{pid}/fd").iterdir())
    return [link for link in links if link.startswith(kind) and "memfd:" not in link]


def test_a_worker_still_has_memory_threads_and_time(shared_forkserver: None) -> None:
    async def test() -> None:
        async with pool_of("require") as pool:
            assert (await answered(pool, "large 1000000"))["floats"] == ("float32", (2, 1_000_000))
            page = ProcessJob("PDF", (300, 200))  # a thread watches the time of a page
            await pool.process("page", hostile_pdfs.page(), page, Record())

    asyncio.run(test())


def test_a_worker_reads_the_text_of_a_page(shared_forkserver: None) -> None:
    async def test() -> None:
        async with pool_of("require") as pool:
            assert await pool.pdf_text(media.lettered("Hamburg"), 0, 100, Record()) == "Hamburg"
            assert await pool.pdf_text(media.pdf((20, 20)), 0, 100, Record()) == ""

    asyncio.run(test())


def test_a_worker_cannot_allocate_more_than_its_limit() -> None:
    async def test() -> None:
        async with pool_of("require", memory_mb=256) as pool:
            pids = pool.worker_pids
            with pytest.raises(ImageTooLarge):
                await answered(pool, f"large {64 * MIB}")
            await answered(pool, "large 1000")
            assert pool.worker_pids == pids

    asyncio.run(test())


def test_what_a_worker_writes_is_logged_on_bounded_lines(capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with pool_of("require") as pool:
            for number in range(20):
                await answered(pool, f"say {number}\x1b[31mred")

    asyncio.run(test())
    written = capfd.readouterr().err
    assert "output of an image worker: 0\\x1b[31mred" in written
    assert "\x1b" not in written
    assert len(written) < 40_000


# ---------------------------------------------------------------------- keys


def test_no_process_of_the_workers_contains_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--api-key", FLAG])

    async def test() -> None:
        async with pool_of("off") as pool:
            await answered(pool, "large 10")
            worker = psutil.Process(pool.worker_pids[0])
            forkserver = worker.parent()
            assert forkserver is not None
            assert "PATH" in forkserver.environ()
            for process in (worker, forkserver):
                assert not set(SECRETS) & set(process.environ())
                assert set(memory_with(process.pid, MARKS)) == set()

    asyncio.run(test())
    assert set(memory_with(os.getpid(), MARKS)) == set(MARKS)


@pytest.mark.parametrize("name", ["HF_TOKEN", "VLLM_API_KEY", "VLLM_S3_ACCESS_KEY", "AWS_REGION"])
def test_variables_with_secrets_and_unknown_ones_are_not_passed(name: str) -> None:
    assert name not in environment.without_secrets({name: "x"})


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "VLLM_CACHE_ROOT"])
def test_variables_that_libraries_need_are_passed(name: str) -> None:
    assert environment.without_secrets({name: "x"})[name] == "x"


# ---------------------------------------------------------------------- decoding


def files() -> dict[str, bytes]:
    """Files of all formats: small ones in every mode, damaged ones, and large ones, which other
    decoders read."""
    found = {f"seed {i}": data for i, data in enumerate(media_mutations.seeds())}
    found |= {case.name: data for case in all_cases() if len(data := case.make()) < 100_000}
    # With few details, because encoding those takes long.
    photo = pictures.photo((300, 240)).resize((3000, 2400), Image.Resampling.NEAREST)
    for kind, options in (("PNG", {}), ("WEBP", {"method": 0}), ("JPEG", {"progressive": True})):
        found[f"large {kind}"] = pictures.encode(photo, kind, **options)
    # A font that the file does not contain.
    found["fonts"] = hostile_pdfs.page(content=b"BT /F1 40 Tf 10 50 Td (Hamburgefonts) Tj ET")
    return found


def decoded(files: Iterable[bytes], *modes: confinement.SandboxMode) -> list[list[str]]:
    """The hashes of the pixels, or the errors, as found with each mode of the sandbox in a process
    that has only what the forkserver loads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.confined_decode", *modes],
        cwd=ROOT,
        input=msgspec.msgpack.encode(list(files)),
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    return [msgspec.json.decode(line, type=list[str]) for line in done.stdout.splitlines()]


def test_every_file_is_decoded_as_without_a_sandbox() -> None:
    given = files()
    within, without = decoded(given.values(), "require", "off")
    differing = [
        name for name, *pair in zip(given, within, without, strict=True) if len({*pair}) > 1
    ]
    assert differing == []
    assert sum(len(each) == 64 for each in within) > 400


# ---------------------------------------------------------------------- kernels


def _refusing(*calls: int) -> bytes:
    """A filter under which the kernel seems to lack the system calls `calls`."""
    filter_ = [seccomp._do(seccomp._LOAD, 0)]
    for call in calls:
        filter_ += [seccomp._do(seccomp._IF_EQUAL, call, 0, 1), seccomp._refuse(errno.ENOSYS)]
    return b"".join([*filter_, seccomp._do(seccomp._RETURN, seccomp._ALLOW)])


SECCOMP, LANDLOCK = seccomp._machine().seccomp, 444


def start_on_a_kernel_without(calls: tuple[int, ...], mode: confinement.SandboxMode) -> list[str]:
    """Start a pool, in a process of its own, and return what it logs and what confines it."""
    seccomp.forbid_new_privileges()
    seccomp.install(_refusing(*calls))
    output = io.StringIO()
    logging.basicConfig(stream=output, format="%(message)s", force=True)

    async def test() -> None:
        async with pool_of(mode) as pool:
            await answered(pool, "large 10")
            layers = ("seccomp", "landlock")
            values = {
                name: metrics.image_worker_sandbox.labels(name)._value.get() for name in layers
            }
            print(pool.confinement, values, file=output)

    try:
        asyncio.run(test())
    except CannotStart as error:
        print(error, file=output)
    return output.getvalue().splitlines()


def output_without(calls: tuple[int, ...], mode: confinement.SandboxMode) -> list[str]:
    lines: list[str] = in_fork(lambda: start_on_a_kernel_without(calls, mode))
    return lines


def test_without_landlock_workers_are_confined_by_seccomp_and_the_log_says_so() -> None:
    line, summary = output_without((LANDLOCK,), "auto")
    assert line == (
        "the sandbox of image workers is incomplete: the kernel refuses "
        "Landlock (Function not implemented); in force: seccomp"
    )
    assert summary == "seccomp {'seccomp': 1.0, 'landlock': 0.0}"


def test_without_seccomp_workers_are_confined_by_landlock_and_the_log_says_so() -> None:
    line, summary = output_without((SECCOMP,), "auto")
    assert "the kernel refuses seccomp (Function not implemented)" in line
    assert summary.startswith("Landlock (version ")


def test_a_required_sandbox_that_the_kernel_refuses_stops_the_start() -> None:
    lines = output_without((SECCOMP, LANDLOCK), "require")
    assert lines[-1] == (
        "--worker-sandbox require: the kernel refuses Landlock (Function not implemented) and "
        "seccomp (Function not implemented)"
    )


def test_without_landlock_no_file_can_be_opened() -> None:
    def opened() -> list[str]:
        seccomp.install(seccomp.program(opens_files=False))
        names = {"open /etc/passwd", "open its program", "create a file"}
        return [each for each in intrusions.not_prevented(os.getppid()) if each in names]

    def confined() -> list[str]:
        seccomp.forbid_new_privileges()
        return opened()

    assert in_fork(confined) == []


def test_the_numbers_of_system_calls_are_those_of_libseccomp() -> None:
    name = ctypes.util.find_library("seccomp")
    if name is None:
        pytest.skip("libseccomp is not installed")
    library = ctypes.CDLL(name)
    known = seccomp._CALLS | seccomp._OPENING
    for machine in seccomp._MACHINES.values():
        for call, numbers in known.items():
            number = library.seccomp_syscall_resolve_name_arch(machine.audit, call.encode())
            assert numbers[machine.column] == (number if number >= 0 else None), call


def test_the_kernel_of_these_tests_has_both_layers() -> None:
    assert landlock.version() > 0
    assert preload.sandbox_mode() == "auto"
