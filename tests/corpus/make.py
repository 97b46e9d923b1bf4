"""All cases of the corpus, and writing them to files."""

import dataclasses
import functools
import json
from pathlib import Path

from tests.corpus import (
    bmp_cases,
    damage,
    foreign_cases,
    gif_cases,
    grid_cases,
    heif_cases,
    jpeg_cases,
    metadata_cases,
    png_cases,
    sizes,
    tiff_cases,
    webp_cases,
)
from tests.corpus.cases import Case

_MODULES = (
    foreign_cases,
    sizes,
    damage,
    metadata_cases,
    jpeg_cases,
    png_cases,
    webp_cases,
    gif_cases,
    tiff_cases,
    bmp_cases,
    heif_cases,
    grid_cases,
)


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every case, in a fixed order; each generates its bytes on request.

    Raises:
        ValueError: two cases have the same name.
    """
    cases = tuple(case for module in _MODULES for case in module.cases())
    names = [case.name for case in cases]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"cases of one name: {', '.join(doubles)}")
    return cases


def write(folder: Path) -> int:
    """Write every file, and `expectations.json`; returns the number of files."""
    expectations = {}
    for case in all_cases():
        path = folder / case.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.make())
        expectations[case.name] = {"mime": case.mime, **dataclasses.asdict(case.expected)}
    text = json.dumps(expectations, indent=1) + "\n"
    (folder / "expectations.json").write_text(text)
    return len(expectations)
