"""Mutated files of every image format, and PDFs, decode or are refused with this project's errors.

`tests/fuzz/fuzz_decoders.py --what media` goes on from here.
"""

import pytest

from tests.fuzz import media_checks, media_mutations

SEED = 5


def test_an_input_depends_only_on_seed_and_index() -> None:
    inputs = [media_mutations.mutated(SEED, index) for index in range(50)]
    assert [media_mutations.mutated(SEED, index) for index in (49, 7)] == [inputs[49], inputs[7]]
    assert media_mutations.mutated(SEED + 1, 7) != inputs[7]
    assert len(set(inputs)) > 45


def test_the_files_before_mutation_decode() -> None:
    images = [data for data in media_mutations.seeds() if not data.startswith(b"%PDF")]
    assert all(map(media_checks.is_decoded, images))


@pytest.mark.parametrize("part", range(4))
def test_mutated_files_decode_or_raise_client_errors(part: int) -> None:
    inputs = [media_mutations.mutated(SEED, index) for index in range(part, 1000, 4)]
    decoded = sum(map(media_checks.is_decoded, inputs))
    assert 20 < decoded < 230
