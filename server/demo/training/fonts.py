"""The fonts of the demo model's pictures.

They come from the packages of the extra ``demo-train`` and from Pillow. Some families are held
out: only the evaluation draws with them.
"""

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from PIL import ImageFont

from server.demo.drawing import embedded_font

CHARACTERS = string.ascii_letters + string.digits + " !#$%&'()*+,-./:;=?@[]"
"""Characters that every face draws; Computer Modern has other glyphs in the rest of ASCII."""

_AILERON = "Aileron"

# family: (package, patterns of its files). Hairline weights, variable fonts and a face's second
# file format are excluded; so is cmti10, which draws a pound sign for the dollar.
_WEIGHTS = "-[!ETV]*"  # not -ExtraLight, -Thin, -VariableFont
_TRAINING = {
    "Amatic SC": ("font_amatic_sc", ("AmaticSC-Bold.ttf",)),
    "Computer Modern": ("matplotlib", ("cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf")),
    "DejaVu Sans": ("matplotlib", ("DejaVuSans.ttf", "DejaVuSans-*.ttf")),
    "DejaVu Sans Mono": ("matplotlib", ("DejaVuSansMono.ttf", "DejaVuSansMono-*.ttf")),
    "DejaVu Serif": ("matplotlib", ("DejaVuSerif.ttf", "DejaVuSerif-*.ttf")),
    "Fredoka One": ("font_fredoka_one", ("FredokaOne-Regular.ttf",)),
    "Roboto": ("font_roboto", (f"Roboto{_WEIGHTS}.ttf",)),
    "STIX General": ("matplotlib", ("STIXGeneral*.ttf",)),
    "Source Sans Pro": ("font_source_sans_pro", (f"SourceSansPro{_WEIGHTS}.ttf",)),
    "Source Serif Pro": ("font_source_serif_pro", (f"SourceSerifPro{_WEIGHTS}.ttf",)),
}
_HELD_OUT = {
    "Caladea": ("font_caladea", ("Caladea-*.ttf",)),
    "Hanken Grotesk": ("font_hanken_grotesk", (f"HankenGrotesk{_WEIGHTS}.otf",)),
    "Manrope": ("font_manrope", ("Manrope-ExtraBold.ttf", f"Manrope{_WEIGHTS}.ttf")),
}
_FOLDERS = {"matplotlib": "mpl-data/fonts/ttf"}


@dataclass(frozen=True, slots=True)
class Face:
    """One face of a family, such as Roboto's bold italic; the font inside Pillow has no path."""

    family: str
    path: Path | None

    def load(self, size: int) -> ImageFont.FreeTypeFont:
        """The face at ``size`` pixels per em."""
        return _load(self, size)


def font(rng: random.Random, size: int, *, held_out: bool) -> ImageFont.FreeTypeFont:
    """A random face at ``size`` pixels per em: each family is equally likely, then each face.

    Raises ModuleNotFoundError if a font package is missing.
    """
    families = faces(held_out=held_out)
    return rng.choice(families[rng.choice(list(families))]).load(size)


@cache
def faces(*, held_out: bool) -> Mapping[str, tuple[Face, ...]]:
    """The faces of each family, in the same order on every machine.

    Raises ModuleNotFoundError if a font package is missing.
    """
    found = {
        family: tuple(Face(family, path) for path in _files(package, patterns))
        for family, (package, patterns) in (_HELD_OUT if held_out else _TRAINING).items()
    }
    if not held_out:
        found[_AILERON] = (Face(_AILERON, None),)
    return MappingProxyType(found)


def _files(package: str, patterns: tuple[str, ...]) -> list[Path]:
    # The package is not imported, because several need setuptools for that.
    spec = find_spec(package)
    roots = (spec and spec.submodule_search_locations) or ()
    paths = {
        path
        for root in roots
        for pattern in patterns
        for path in (Path(root) / _FOLDERS.get(package, "files")).glob(pattern)
    }
    if not paths:
        raise ModuleNotFoundError(
            f'no fonts in the package {package}; run: pip install -e ".[demo-train]"',
            name=package,
        )
    return sorted(paths, key=lambda path: path.name)


@lru_cache(maxsize=600)
def _load(face: Face, size: int) -> ImageFont.FreeTypeFont:
    if face.path:
        # The basic layout is the same wherever Pillow runs; Raqm is an optional part of it.
        return ImageFont.truetype(face.path, size, layout_engine=ImageFont.Layout.BASIC)
    return embedded_font(size)
