"""Preprocessing in the worker: `exact` and `fast`, for processors of several families."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.imaging.decode import warm_up
from server.workers.confinement import FONT_DIRECTORIES, confine
from server.workers.jobs import ProcessJob, encode_kwargs
from server.workers.worker import Array, Extractor
from tests import families, media, pictures
from tests.forked import in_fork

JOB = ProcessJob("JPEG", (3584, 2688))
LARGE = pictures.encode(pictures.photo((896, 672), 1).resize((3584, 2688)), "JPEG", quality=92)
# Families whose resize rule is known, so that JPEG is decoded at reduced scale.
REDUCED = ["qwen2_vl", "qwen2_5_vl", "llava", "llava_next", "idefics3", "gemma3", "paligemma"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def extractor(model: Path, *, fast: bool) -> Extractor:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from server.engine.extractor import worker_spec

    args = AsyncEngineArgs(model=str(model), dtype="float32", max_model_len=4096)
    config = args.create_model_config()
    return worker_spec(config, fast=fast, max_pixels=10_000_000).load()


@functools.cache
def pair(family: str, models: Path) -> tuple[Extractor, Extractor]:
    model = families.build(family, models)
    return extractor(model, fast=True), extractor(model, fast=False)


@pytest.mark.parametrize("family", REDUCED)
def test_fast_decodes_smaller_and_gives_similar_features(family: str, models: Path) -> None:
    fast, exact = pair(family, models)
    reduced, whole = fast.decode(LARGE, JOB), exact.decode(LARGE, JOB)
    assert whole.image.size == whole.size == reduced.size == (3584, 2688)
    assert reduced.image.width < whole.image.width
    ours, theirs = fast.features(reduced, JOB), exact.features(whole, JOB)
    assert ours.keys() == theirs.keys()
    for name in theirs.keys() - {"image_sizes"}:  # llava_next's: the size of its input
        near(ours[name], theirs[name])


def near(ours: Any, theirs: Any) -> None:
    assert isinstance(ours, Array)
    assert (ours.dtype, ours.data.shape) == (theirs.dtype, theirs.data.shape)
    difference = np.abs(ours.data.astype(np.float64) - theirs.data.astype(np.float64)).mean()
    spread = theirs.data.astype(np.float64).std()
    assert (
        difference <= 0.06 * spread
    )  # a different picture differs by about the standard deviation


@pytest.mark.parametrize("family", REDUCED)
def test_a_sandboxed_worker_returns_the_same_features(family: str, models: Path) -> None:
    warm_up()
    fast, _ = pair(family, models)
    pdf = media.pdf((200, 100))
    jobs = [
        (JOB, LARGE),
        (ProcessJob("JPEG", (3584, 2688), resize=(56, 56)), LARGE),
        (ProcessJob("PDF", (400, 200)), pdf),
        # Options that were not seen before the fork.
        (ProcessJob("PDF", (400, 200), kwargs=encode_kwargs({"max_pixels": 50_000})), pdf),
    ]

    def work() -> list[str]:
        return [hash_of(fast.features(fast.decode(data, job), job)) for job, data in jobs]

    def confined() -> list[str]:
        assert not confine("require", FONT_DIRECTORIES, fast.files).refused
        return work()

    assert in_fork(confined) == in_fork(work)


def hash_of(features: Any) -> str:
    """A hash of all arrays and values."""
    seen = hashlib.sha256()
    for name, value in sorted(features.items()):
        for part in value if isinstance(value, list) else [value]:
            seen.update(f"{name} {getattr(part, 'dtype', part)}".encode())
            if isinstance(part, Array):
                seen.update(np.ascontiguousarray(part.data).tobytes())
    return seen.hexdigest()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_fast_differs_from_exact_only_for_jpeg(kind: str, models: Path) -> None:
    fast, exact = pair("qwen2_vl", models)
    data = pictures.encode(pictures.photo((800, 600), 2), kind)
    job = ProcessJob(kind, (800, 600))
    ours = fast.features(fast.decode(data, job), job)
    theirs = exact.features(exact.decode(data, job), job)
    for name, value in theirs.items():
        mine = ours[name]
        assert isinstance(value, Array)
        assert isinstance(mine, Array)
        assert np.array_equal(mine.data, value.data)


def test_a_picture_that_the_processor_refuses_is_an_error(models: Path) -> None:
    fast, _ = pair("qwen2_vl", models)
    thin = pictures.encode(pictures.photo((2010, 10), 3), "JPEG")
    job = ProcessJob("JPEG", (2010, 10))
    with pytest.raises(ValueError):
        fast.features(fast.decode(thin, job), job)


def test_processor_options_apply_to_fast_and_exact(models: Path) -> None:
    fast, exact = pair("qwen2_vl", models)
    job = ProcessJob("JPEG", (3584, 2688), kwargs=encode_kwargs({"max_pixels": 200 * 200}))
    for extractor in (fast, exact):
        made = extractor.features(extractor.decode(LARGE, job), job)
        grid = made["image_grid_thw"]
        assert isinstance(grid, Array)
        assert int(grid.data.prod()) * 14 * 14 <= 200 * 200
