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

from tests.families import (
    blip,
    deepseek,
    documents,
    gemma,
    idefics,
    internvl,
    literature,
    llava,
    mistral,
    omni,
    qwen,
    slices,
    tiles,
)
from tests.families.architectures import ARCHITECTURES
from tests.families.parts import Maker

__all__ = [
    "ARCHITECTURES",
    "ENGINE",
    "ENVIRONMENT",
    "FAMILIES",
    "FLAGS",
    "LITERATURE",
    "MEASURED",
    "NIGHTLY",
    "PREPROCESSED",
    "build",
    "import_stubs",
]

FAMILIES: dict[str, Maker] = {
    **qwen.FAMILIES,
    **llava.FAMILIES,
    **idefics.FAMILIES,
    **internvl.FAMILIES,
    **gemma.FAMILIES,
}
"""Each family's maker, which writes a checkpoint into an existing, empty folder."""

PREPROCESSED: dict[str, Maker] = {
    **qwen.PREPROCESSED,
    **mistral.PREPROCESSED,
    **blip.PREPROCESSED,
    **internvl.PREPROCESSED,
    **omni.PREPROCESSED,
    **documents.PREPROCESSED,
}
"""Families whose checkpoints have no weights: the engine has to draw them
(`--load-format dummy`). The server has a token rule for each."""

MEASURED: dict[str, Maker] = {
    **deepseek.MEASURED,
    **documents.MEASURED,
    **gemma.MEASURED,
    **internvl.MEASURED,
    **slices.MEASURED,
    **tiles.MEASURED,
}
"""The same, without a rule: their tokens are measured."""

ENGINE = [*FAMILIES, "pixtral_mistral", "qwen2_5_omni", "kimi_k25"]
"""Those that run through the engine in each run of the tests."""

NIGHTLY = [
    "mistral3",
    "internvl_chat",
    "skywork_r1v",
    "qianfan_ocr",
    "glm4v",
    "glm_ocr",
    "paddleocr_vl",
    "dots_ocr",
    "gemma4",
    "llama4",
    "aria",
    "granite4_vision",
    "qwen3_vl_moe",
    "step3_vl",
    "h2ovl",
    "exaone4_5",
]
"""Those that do so nightly. The engine has not run the others: some need settings of their language
models that are still missing, DeepSeek-VL2 the package timm."""

FLAGS: dict[str, list[str]] = {
    "internvl_chat": ["--trust-remote-code"],
    "skywork_r1v": ["--trust-remote-code"],
    "h2ovl": ["--trust-remote-code"],
    "dots_ocr": ["--trust-remote-code"],
    "pixtral_mistral": ["--config-format", "mistral", "--tokenizer-mode", "mistral"],
}
"""What the server needs to be told of a checkpoint."""


ENVIRONMENT = {"kimi_k25": {"VLLM_MLA_DISABLE": "1"}}
"""Variables that a checkpoint needs on a CPU: vLLM's latent attention there takes only heads of the
published size."""

LITERATURE: dict[str, Maker] = literature.LITERATURE
"""Systems of the literature, whose answers `tests/server/test_literature.py` compares with those of
transformers."""


def build(family: str, directory: Path) -> Path:
    """Return the checkpoint of `family` below `directory`; creates it if it does not exist.

    Safe to call from several processes at once: the folder appears complete or not at all.
    """
    target = directory / family
    if target.exists():
        return target
    make = {**FAMILIES, **PREPROCESSED, **MEASURED, **LITERATURE}[family]
    directory.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{family}-", dir=directory))
    try:
        make(scratch)
        scratch.chmod(0o755)
        os.rename(scratch, target)
    except OSError:
        if not target.exists():  # else another process was faster
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
