"""Tiny checkpoints of vision-language model families, with random weights, made on the fly.

They let a test compare how two servers prepare the same picture: the image rules of each family
are the real ones (tile splitting, any-resolution grids, pixel limits), only scaled down to small
tiles, and the weights, though random, make the answer depend on the pixels. Nothing is
downloaded. A checkpoint has the layout of its family on the Hugging Face hub, and takes two to
four megabytes and a tenth of a second.

    model = build("qwen2_vl", Path("/tmp/models"))

Three families have quirks, also in vLLM:

* smolvlm needs the package `num2words`, although only for videos: put `import_stubs()` on the
  server's PYTHONPATH where it is not installed;
* paligemma takes at most one picture, and vLLM itself puts it before the prompt;
* gemma3 and paligemma should see all of a picture's tokens at once. vLLM's CPU attention does
  not, without a warning: its answers are repeatable, but differ from those of Transformers.
"""

import os
import shutil
import tempfile
from pathlib import Path

from tests.families import blip, gemma, idefics, internvl, llava, mistral, qwen
from tests.families.parts import Maker

FAMILIES: dict[str, Maker] = {
    **qwen.FAMILIES,
    **llava.FAMILIES,
    **idefics.FAMILIES,
    **internvl.FAMILIES,
    **gemma.FAMILIES,
}
"""Each family's maker, which writes a checkpoint into an existing, empty folder."""

PREPROCESSED: dict[str, Maker] = {
    **mistral.PREPROCESSED,
    **blip.PREPROCESSED,
    **internvl.PREPROCESSED,
}
"""Families whose checkpoints have no weights."""


def build(family: str, directory: Path) -> Path:
    """Return the checkpoint of `family` below `directory`; creates it if it does not exist.

    Safe to call from several processes at once: the folder appears complete or not at all.
    """
    target = directory / family
    if (target / "config.json").exists():
        return target
    make = {**FAMILIES, **PREPROCESSED}[family]
    directory.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{family}-", dir=directory))
    try:
        make(scratch)
        scratch.chmod(0o755)
        os.rename(scratch, target)
    except OSError:
        if not (target / "config.json").exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def import_stubs(directory: Path) -> Path:
    """Return a folder below `directory` for PYTHONPATH, with stand-ins for missing packages.

    So far one: `num2words`, without which SmolVLM's processor refuses to start.
    """
    stubs = directory / "import_stubs"
    stubs.mkdir(parents=True, exist_ok=True)
    (stubs / "num2words.py").write_text("def num2words(number):\n    return str(number)\n")
    return stubs
