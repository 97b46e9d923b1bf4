"""Videos and audio clips: files that reach a decoder, and the decoder's limits."""

import asyncio
import base64
import contextlib
import functools
import itertools
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from benchmarks import videos
from server.engine.clips import PREPARE, check_options, video_options
from server.errors import (
    ClientError,
    InvalidVideo,
    MediaProcessingFailed,
    MediaProcessingTimeout,
    ServerBusy,
    UnsupportedAudioFormat,
    UnsupportedVideoFormat,
    VideoTooLarge,
    WorkerLost,
)
from server.imaging.containers import audio_container, refuse_references, video_container
from server.imaging.video.pictures import pack
from server.ingest.video import ClipDecoder, VideoJob, VideoOptions
from server.settings import VideoSettings
from server.workers.forkserver import Forkserver
from server.workers.sandbox import (
    JobDied,
    JobRanOut,
    JobRefused,
    JobTimedOut,
    Output,
    Sandbox,
    SandboxLimits,
)
from tests import clips, encoded_videos, pictures
from tests.forked import FORKSERVER
from tests.fuzz import media_mutations

COMMANDED = "tests.clips:prepare"
MAX_PIXELS = 1_000_000
MIB = 1 << 20
SEED, MUTATED = 7, 60


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(240):
            await test()

    asyncio.run(bounded())


# ---------------------------------------------------------------------- containers


@pytest.mark.parametrize(
    ("data", "container"),
    [
        (clips.video(".mp4"), "mp4"),
        (clips.video(".mov", "png "), "mp4"),
        (clips.video(".mkv"), "matroska"),
        (clips.video(".webm", "VP80"), "matroska"),
    ],
)
def test_self_contained_video_containers_are_recognized(data: bytes, container: str) -> None:
    assert video_container(data) == container
    assert audio_container(data) == container


@pytest.mark.parametrize(
    "data",
    [
        b"",
        clips.SDP,
        clips.PLAYLIST,
        clips.CONCAT,
        b"RIFF\x10\0\0\0CDXA",
        clips.video(".avi", "MJPG"),
        clips.sound(),
        pictures.encode(pictures.shape("red")),
    ],
)
def test_other_files_are_refused_as_video(data: bytes) -> None:
    with pytest.raises(UnsupportedVideoFormat):
        video_container(data)


ID3 = b"ID3\4\0\0\0\0\1\0" + bytes(128)


@pytest.mark.parametrize(
    ("data", "container"),
    [
        (clips.sound(), "wav"),
        (b"fLaC\0\0\0\x22", "flac"),
        (b"OggS\0\2", "ogg"),
        (b"\xff\xfb\x90\x64", "mp3"),
        (ID3 + b"\xff\xfb\x90\x64", "mp3"),
        (ID3 + b"fLaC\0\0\0\x22", "flac"),
    ],
)
def test_audio_containers_are_recognized(data: bytes, container: str) -> None:
    assert audio_container(data) == container


@pytest.mark.parametrize("data", [b"", clips.SDP, clips.PLAYLIST, ID3 + clips.PLAYLIST, ID3])
def test_a_playlist_behind_an_id3_tag_is_refused_as_audio(data: bytes) -> None:
    """FFmpeg skips the tag before it guesses the format."""
    with pytest.raises(UnsupportedAudioFormat):
        audio_container(data)


@pytest.mark.parametrize(
    ("kind", "location"),
    [(b"url ", b"http://127.0.0.1:9/x.mp4\0"), (b"alis", bytes(160) + b"/etc/passwd")],
)
def test_an_mp4_file_that_refers_to_other_files_is_refused(kind: bytes, location: bytes) -> None:
    mp4 = clips.video(".mp4")
    refuse_references(mp4)
    refuse_references(clips.referring(mp4, kind, b"\0"))
    with pytest.raises(InvalidVideo, match="refers to other files"):
        refuse_references(clips.referring(mp4, kind, location))


# ---------------------------------------------------------------------- the sandbox


def sandbox(**limits: Any) -> Sandbox:
    given = {"processes": 1, "queue": 8, "timeout_s": 60.0, "max_memory_bytes": 256 * MIB}
    return Sandbox(SandboxLimits(**{**given, **limits}), FORKSERVER)


def test_a_job_returns_an_answer_and_arrays() -> None:
    async def test() -> None:
        output = await sandbox().run(COMMANDED, b"the job", b"echo")
        assert output.answer == b"the job"
        numbers, half, empty = output.arrays
        np.testing.assert_array_equal(numbers, np.arange(6, dtype=np.uint8).reshape(2, 3))
        assert (half.dtype, half.tolist(), empty.shape) == (np.float32, [0.5], (0, 4))

    run(test)


def test_a_job_can_open_neither_files_nor_sockets() -> None:
    async def test() -> None:
        assert await sandbox().run(COMMANDED, b"", b"open") == Output(b"", [])

    run(test)


def test_code_in_a_job_reaches_no_file_network_or_process() -> None:
    async def test() -> None:
        output = await sandbox().run(COMMANDED, b"", f"intrude {os.getpid()}".encode())
        assert output.answer == b""

    run(test)


def test_an_endless_job_is_killed() -> None:
    async def test() -> None:
        with pytest.raises(JobTimedOut):
            await sandbox(timeout_s=3).run(COMMANDED, b"", b"spin")
        assert decoders() == []

    run(test)


def _hlg(context: Any) -> None:
    context.colorspace, context.color_primaries, context.color_trc = 9, 9, 18


@pytest.mark.parametrize(
    "how",
    [
        {"options": {"crf": "45"}},
        {"codec": "hevc", "pixels": "yuv420p10le", "colors": _hlg, "options": {"crf": "45"}},
    ],
    ids=["H.264", "H.265 in HDR"],
)
def test_ten_minutes_of_4k_are_decoded_in_less_than_600_mb(how: dict[str, Any]) -> None:
    scene = encoded_videos.scene(4, (384, 216)).repeat(10, axis=1).repeat(10, axis=2)
    data = videos.repeated(encoded_videos.encode(scene, **how), 3750)

    async def test() -> None:
        decoding = sandbox(max_memory_bytes=600_000_000)
        output = await decoding.run("tests.clips:prepare_frames", b"", data)
        assert msgspec.msgpack.decode(output.answer) == pytest.approx(600, abs=1)
        assert output.arrays[0].shape == (4, 144, 256, 3)
        assert output.arrays[0].std() > 20

    run(test)


def test_a_job_that_dies_does_not_affect_later_jobs() -> None:
    async def test() -> None:
        jobs = sandbox()
        with pytest.raises(JobDied):
            await jobs.run(COMMANDED, b"", b"die")
        assert (await jobs.run(COMMANDED, b"next", b"echo")).answer == b"next"

    run(test)


UNUSED = VideoOptions("unused", 32, {}, {})


def commanded(forkserver: Forkserver = FORKSERVER, **settings: Any) -> ClipDecoder:
    """A decoder that executes the commands of `tests.clips`."""
    return ClipDecoder(COMMANDED, VideoSettings(**settings), MAX_PIXELS, forkserver)


def test_a_clip_whose_processes_are_killed_by_others_is_not_refused() -> None:
    async def test() -> None:
        decoder = commanded()
        work = asyncio.create_task(decoder.load_pictures(b"hang", UNUSED))
        for _ in range(2):
            while not (found := decoders()):
                assert not work.done()
                await asyncio.sleep(0.01)
            found[0].kill()
            found[0].wait()
        with pytest.raises(WorkerLost) as lost:
            await work
        assert lost.value.status == 503
        decoder.close()

    run(test)


def test_a_clip_whose_processes_are_stopped_by_others_is_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.workers.sandbox._START_TIMEOUT_S", 10)  # if one has not begun yet

    async def test() -> None:
        decoder = commanded(video_timeout_s=5)
        work = asyncio.create_task(decoder.load_pictures(b"hang", UNUSED))
        stopped: list[int] = []
        while not work.done():
            for found in decoders():
                if found.pid not in stopped:
                    found.suspend()
                    stopped.append(found.pid)
            await asyncio.sleep(0.01)
        with pytest.raises(WorkerLost):
            await work
        assert len(stopped) == 2
        assert decoders() == []
        decoder.close()

    run(test)


def test_a_clip_whose_forkserver_is_killed_is_decoded_by_another() -> None:
    forkserver = Forkserver(None)

    async def test() -> None:
        decoder = commanded(forkserver)
        work = asyncio.create_task(decoder.load_pictures(b"rest", UNUSED))
        while not (found := decoders()):
            assert not work.done()
            await asyncio.sleep(0.01)
        os.kill(found[0].ppid(), signal.SIGKILL)
        assert len((await work).frames) == 1
        os.kill(forkserver_pid(forkserver), signal.SIGKILL)  # while it is idle
        assert len((await decoder.load_pictures(b"rest", UNUSED)).frames) == 1
        decoder.close()

    try:
        run(test)
    finally:
        forkserver.close()


def test_a_clip_for_which_memory_ran_out_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel kills what takes most, which was not the clip if only its first process died."""
    kills = itertools.count()
    monkeypatch.setattr("server.workers.sandbox.out_of_memory_kills", lambda: next(kills))

    async def test(command: bytes, deaths: int) -> None:
        decoder = commanded()
        work = asyncio.create_task(decoder.load_pictures(command, UNUSED))
        for _ in range(deaths):
            while not (found := decoders()):
                assert not work.done()
                await asyncio.sleep(0.01)
            found[0].kill()
            found[0].wait()
        await work
        decoder.close()

    run(functools.partial(test, b"rest", 1))
    with pytest.raises(MediaProcessingFailed, match="memory"):
        run(functools.partial(test, b"hang", 2))


def test_the_memory_of_a_job_is_limited() -> None:
    async def test() -> None:
        jobs = sandbox(max_memory_bytes=128 * MIB)
        assert (await jobs.run(COMMANDED, b"", b"grow 32")).arrays[0].shape == (32 * MIB,)
        with pytest.raises(JobRefused) as refused:
            await jobs.run(COMMANDED, b"", b"grow 200")
        assert refused.value.code == "invalid_video"

    run(test)


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_a_clip_that_needs_more_memory_is_too_large_at_every_limit(codec: str) -> None:
    """Its 16 frames take 42 MiB, for which there may be room that was free before, but not in the
    result. Above that, memory runs out in the decoder, which may say that the file is damaged."""
    container = "webm" if codec == "vp9" else "mp4"
    scene = encoded_videos.scene(2, (320, 180)).repeat(4, axis=1).repeat(4, axis=2)
    data = encoded_videos.encode(scene.repeat(8, axis=0), codec, container)
    sampling = VideoOptions("vllm.multimodal.video:VideoBackend", 16, {}, {})
    job = msgspec.msgpack.encode(VideoJob(sampling, MAX_PIXELS))

    async def test() -> None:
        found = []
        for mib in (30, 43, 44, 45, 46, 47, 48, 50, 54, 60, 200):
            jobs = sandbox(max_memory_bytes=mib * MIB)
            try:
                found.append(len((await jobs.run(PREPARE, job, data)).arrays[0]))
            except JobRanOut:
                found.append(0)
        assert found == sorted(found)
        assert (found[0], found[-1]) == (0, 16)
        assert set(found) == {0, 16}

    run(test)


def test_a_job_is_killed_when_its_caller_is_cancelled() -> None:
    async def test() -> None:
        jobs = sandbox()
        work = asyncio.create_task(jobs.run(COMMANDED, b"", b"hang"))
        while not decoders():
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert (await jobs.run(COMMANDED, b"next", b"echo")).answer == b"next"
        assert decoders() == []

    run(test)


def forkserver_pid(forkserver: Forkserver) -> int:
    assert forkserver._process is not None
    return forkserver._process.pid


def decoders() -> list[psutil.Process]:
    """The processes of running jobs."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "VideoDecoder" in child.cmdline()[0]:
                found.append(child)
        except (psutil.Error, IndexError):
            continue
    return found


def test_a_job_takes_the_time_that_no_other_process_wants() -> None:
    async def test() -> None:
        jobs = sandbox()
        work = asyncio.create_task(jobs.run(COMMANDED, b"", b"spare"))
        while os.SCHED_IDLE not in {
            os.sched_getscheduler(thread.id)
            for decoder in decoders()
            for thread in threads(decoder)
        }:
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    run(test)


def test_jobs_that_could_use_all_cores_do_not_run_in_spare_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some processes always want time while they wait, so such jobs would hardly get on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    async def test() -> None:
        jobs = sandbox(processes=2)

        async def is_allowed() -> bytes:
            return (await jobs.run(COMMANDED, b"", b"allowed")).answer

        assert await is_allowed() == b"True"
        other = asyncio.create_task(jobs.run(COMMANDED, b"", b"hang"))
        while not decoders():
            await asyncio.sleep(0.01)
        assert await is_allowed() == b"False"
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        while await is_allowed() == b"False":  # until the end of the other is known
            await asyncio.sleep(0.01)

    run(test)


def threads(process: psutil.Process) -> list[Any]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.threads()
    return []


def test_jobs_beyond_the_queue_limit_are_refused_at_once() -> None:
    async def test() -> None:
        jobs = sandbox(queue=1)
        first = asyncio.create_task(jobs.run(COMMANDED, b"", b"hang"))
        await asyncio.sleep(0)
        second = asyncio.create_task(jobs.run(COMMANDED, b"", b"echo"))
        await asyncio.sleep(0)
        with pytest.raises(ServerBusy):
            await jobs.run(COMMANDED, b"", b"echo")
        first.cancel()
        assert (await second).answer == b""

    run(test)


# ---------------------------------------------------------------------- decoding


def decoder(**settings: Any) -> ClipDecoder:
    return ClipDecoder(PREPARE, VideoSettings(**settings), MAX_PIXELS, FORKSERVER)


def vllm_io(**options: Any) -> VideoMediaIO:
    return VideoMediaIO(ImageMediaIO(), **options)


VIDEOS = {
    "mp4": clips.video(".mp4"),
    "mkv": clips.video(".mkv"),
    "webm": clips.video(".webm", "VP90", frames=30, size=(160, 120), fps=30),
}


@pytest.mark.parametrize("loader", ["opencv", "opencv_dynamic", "qwen3_vl", "nemotron_vl"])
def test_frames_and_metadata_equal_vllms(loader: str) -> None:
    async def test() -> None:
        for data in VIDEOS.values():
            for asked in ({}, {"num_frames": 3}, {"num_frames": -1, "fps": 1}):
                io = vllm_io(video_backend=loader, **asked)
                frames, metadata = io.load_bytes(data).media
                ours = await decoder().load_video(data, video_options(io))
                np.testing.assert_array_equal(ours.frames, frames)
                assert ours.metadata == pytest.approx(metadata)

    run(test)


def test_frames_sent_as_pictures_equal_vllms() -> None:
    async def test() -> None:
        encoded = [pictures.encode(pictures.shape(color), "JPEG") for color in ("red", "blue")]
        text = ",".join(base64.b64encode(each).decode() for each in encoded)
        io = vllm_io(num_frames=8, fps=2, total_num_frames=20, frames_indices=[0, 10])
        theirs = io.load_base64("video/jpeg", text)
        ours = await decoder().load_pictures(pack(encoded), video_options(io))
        np.testing.assert_array_equal(ours.frames, theirs.media[0])
        assert ours.metadata == theirs.media[1]

    run(test)


def refusal(work: Callable[[ClipDecoder], Awaitable[Any]], **settings: Any) -> ClientError:
    caught: list[ClientError] = []

    async def test() -> None:
        with pytest.raises(ClientError) as refused:
            await work(decoder(**settings))
        caught.append(refused.value)

    run(test)
    return caught[0]


OPTIONS = video_options(vllm_io())


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (clips.SDP, UnsupportedVideoFormat),
        (VIDEOS["mp4"][:100], InvalidVideo),
        (VIDEOS["mkv"][:200], InvalidVideo),
        (b"\0\0\0\x18ftypisom" + clips.SDP, InvalidVideo),
        (clips.referring(VIDEOS["mp4"], b"url ", b"http://127.0.0.1:9/x\0"), InvalidVideo),
        (clips.video(".mkv", frames=1, size=(1280, 1024)), VideoTooLarge),
    ],
)
def test_invalid_videos_are_refused(data: bytes, error: type[ClientError]) -> None:
    assert type(refusal(lambda decoder: decoder.load_video(data, OPTIONS))) is error


def test_mutated_videos_are_decoded_or_refused() -> None:
    """Videos in every container, with changed bytes, each in a process of its own."""
    outcomes: list[str] = []
    limited = decoder(video_timeout_s=20)

    async def try_one(index: int) -> None:
        try:
            await limited.load_video(media_mutations.mutated_video(SEED, index), OPTIONS)
            outcomes.append("decoded")
        except ClientError as error:
            outcomes.append(error.code)

    async def test() -> None:
        for first in range(0, MUTATED, 4):
            await asyncio.gather(*map(try_one, range(first, first + 4)))

    run(test)
    assert min(outcomes.count("decoded"), outcomes.count("invalid_video")) > MUTATED // 10
    assert not {"media_processing_timeout", "media_processing_failed"} & set(outcomes)


def test_a_truncated_mp4_file_is_accepted_if_the_decoder_reads_it() -> None:
    async def test() -> None:
        video = await decoder().load_video(VIDEOS["mp4"][:-3], OPTIONS)
        assert len(video.frames) > 0

    run(test)


def test_the_error_for_a_damaged_mp4_file_is_the_decoders() -> None:
    damaged = b"\0\0\0\x10ftypisom\0\0\0\1"
    refuse_references(damaged)
    found = refusal(lambda decoder: decoder.load_video(damaged, OPTIONS))
    assert type(found) is InvalidVideo
    assert "refers" not in found.message


@pytest.mark.parametrize("files", [[], [b""], [clips.SDP], [b"\xff\xd8\xff"]])
def test_invalid_pictures_of_a_video_are_refused(files: list[bytes]) -> None:
    refused = refusal(lambda decoder: decoder.load_pictures(pack(files), OPTIONS))
    assert type(refused) is InvalidVideo


@functools.cache
def large_video() -> bytes:
    """Its frames take 108 MiB."""
    return clips.video(".mkv", frames=48, size=(1024, 768))


def test_frames_that_take_too_much_memory_are_refused() -> None:
    options = video_options(vllm_io(num_frames=-1))
    found = refusal(
        lambda decoder: decoder.load_video(large_video(), options), video_max_memory_mb=80
    )
    assert type(found) is VideoTooLarge


def test_a_decoder_that_takes_too_long_is_killed() -> None:
    options = video_options(vllm_io(num_frames=-1))
    found = refusal(lambda decoder: decoder.load_video(large_video(), options), video_timeout_s=0.1)
    assert type(found) is MediaProcessingTimeout


@pytest.mark.parametrize("loader", sorted(VIDEO_LOADER_REGISTRY.name2class))
def test_opencvs_ffmpeg_is_reached_by_no_loader(loader: str) -> None:
    """In the child, a use of it would end the process."""
    if VIDEO_LOADER_REGISTRY.backend_requires_gpu(loader):
        pytest.skip("needs a GPU, and is removed at start-up")

    async def test() -> None:
        job = VideoJob(video_options(vllm_io(video_backend=loader)), MAX_PIXELS)
        output = await sandbox(max_memory_bytes=1 << 30).run(
            "tests.clips:prepare_without_opencv", msgspec.msgpack.encode(job), VIDEOS["mp4"]
        )
        assert len(output.arrays[0]) > 0

    run(test)


@pytest.mark.parametrize("backend", ["opencv", "torchcodec"])
def test_the_requested_backend_makes_no_difference(backend: str) -> None:
    async def test() -> None:
        options = video_options(vllm_io(video_backend="opencv", backend=backend))
        ours = await decoder().load_video(VIDEOS["mp4"], options)
        assert len(ours.frames) == 8

    run(test)


def test_without_the_decoder_videos_are_refused_with_what_to_install() -> None:
    async def test() -> None:
        job = VideoJob(OPTIONS, MAX_PIXELS)
        with pytest.raises(JobRefused, match="pip install 'saccade\\[video\\]'"):
            await sandbox(max_memory_bytes=1 << 30).run(
                "tests.clips:prepare_without_av", msgspec.msgpack.encode(job), VIDEOS["mp4"]
            )

    run(test)


def test_a_decoder_process_that_cannot_start_is_reported() -> None:
    options = VideoOptions("server.no_such_module:Loader", 32, {}, {})
    found = refusal(lambda decoder: decoder.load_video(VIDEOS["mp4"], options))
    assert type(found) is MediaProcessingFailed


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_frames", 0),
        ("num_frames", -2),
        ("num_frames", 1 << 20),
        ("num_frames", "8"),
        ("num_frames", True),
        ("fps", -3),
        ("fps", float("nan")),
        ("fps", "2"),
        ("num_frames", 2049),
        ("max_frames", 2049),
        ("max_frames", 0),
        ("frame_recovery", 1),
        ("backend", "gstreamer"),
        ("device", "cuda"),
        ("video_backend", "no-such-loader"),
        ("frames_indices", [0, -1]),
        ("duration", -1),
    ],
)
def test_options_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ClientError) as refused:
        check_options({name: value}, 2048)
    assert refused.value.param == f"media_io_kwargs.video.{name}"
    assert "pydantic" not in refused.value.message


def _is_accepted(options: dict[str, Any]) -> bool:
    try:
        check_options(options, 2048)
    except ClientError:
        return False
    return True


def test_options_of_every_loader_are_accepted() -> None:
    loaders = [{"video_backend": name} for name in VIDEO_LOADER_REGISTRY.name2class]
    assert {"video_backend": "opencv"} in loaders
    examples: list[dict[str, Any]] = [
        {},
        {"num_frames": -1, "fps": 0.5, "max_duration": 300, "frame_recovery": True},
        {"num_frames": 8, "backend": "opencv", "frame_sample_mode": "fps"},
        {"overflow_strategy": None, "frames_indices": [0, 4], "total_num_frames": 9},
    ]
    assert [options for options in examples + loaders if not _is_accepted(options)] == []
