"""The mutations of `tests/fuzz/jpeg_mutations.py` are repeatable; most pass the header reader."""

import functools

import pytest

from server.errors import ClientError
from server.imaging.codecs import jpeg_header, jpeg_reduced
from server.imaging.decode import DecodeOptions, decode
from tests.fuzz.jpeg_mutations import join, mutated, seeds, split

SEED = 3


@functools.cache
def inputs() -> list[bytes]:
    return [mutated(SEED, index) for index in range(400)]


def _is_parsed(data: bytes) -> bool:
    try:
        jpeg_header.parse(data)
    except jpeg_header.Unsupported:
        return False
    return True


def _is_decoded(data: bytes) -> bool:
    try:
        decode(data, DecodeOptions(max_pixels=1_000_000), lambda width, height: (9, 7))
    except ClientError:
        return False
    return True


def test_an_input_depends_only_on_seed_and_index() -> None:
    assert [mutated(SEED, index) for index in (399, 7)] == [inputs()[399], inputs()[7]]
    assert mutated(SEED + 1, 7) != inputs()[7]
    assert len(set(inputs())) > 380


def test_splitting_and_joining_a_file_leaves_it_unchanged() -> None:
    photos = seeds()[-48:]  # those that are not deliberately odd
    assert [join(split(data)) for data in photos] == list(photos)


def test_many_inputs_get_past_the_header() -> None:
    assert sum(map(_is_parsed, inputs())) > 40


@pytest.mark.parametrize("part", range(4))
def test_mutated_files_decode_or_raise_client_errors(part: int) -> None:
    chosen = inputs()[part::4]
    for data in chosen:
        for scale in jpeg_reduced.SCALES:
            jpeg_reduced.decode(data, scale)
    assert 0 < sum(map(_is_decoded, chosen)) < len(chosen)
