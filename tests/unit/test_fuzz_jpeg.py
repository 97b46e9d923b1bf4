"""The mutations of `tests/fuzz/fuzz_jpeg.py` are repeatable, and most pass the header reader."""

import pytest

from server.errors import ClientError
from server.imaging.codecs import jpeg_header, jpeg_reduced
from server.imaging.decode import DecodeOptions, decode
from tests.fuzz.jpeg_mutations import join, mutated, seeds, split

SEED = 3
INPUTS = [mutated(SEED, index) for index in range(400)]


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
    assert [mutated(SEED, index) for index in (399, 7)] == [INPUTS[399], INPUTS[7]]
    assert mutated(SEED + 1, 7) != INPUTS[7]
    assert len(set(INPUTS)) > 380


def test_splitting_and_joining_a_file_leaves_it_unchanged() -> None:
    photos = seeds()[-48:]  # those that are not deliberately odd
    assert [join(split(data)) for data in photos] == list(photos)


def test_many_inputs_get_past_the_header() -> None:
    assert sum(map(_is_parsed, INPUTS)) > 40


@pytest.mark.parametrize("part", range(4))
def test_mutated_files_decode_or_raise_client_errors(part: int) -> None:
    inputs = INPUTS[part::4]
    for data in inputs:
        for scale in jpeg_reduced.SCALES:
            jpeg_reduced.decode(data, scale)
    assert 0 < sum(map(_is_decoded, inputs)) < len(inputs)
