"""The wheel and the source archive contain what `saccade demo` and the playground need, without the
training code."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from server.demo.samples import samples

MODEL_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
}
# The extra demo-train and the largest dependencies cannot be imported.
DEMO_WITHOUT_EXTRAS = """
import sys
missing = ("font_amatic_sc", "font_caladea", "font_fredoka_one", "font_hanken_grotesk")
missing += ("font_manrope", "font_roboto", "font_source_sans_pro", "font_source_serif_pro")
missing += ("matplotlib", "skimage", "tqdm", "torch", "vllm")
sys.modules.update(dict.fromkeys(missing))
import server.demo.command
from server.cli import main
print(server.demo.command.__file__)
main(["demo", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A copy of the files that the build reads: building in the checkout would write into it."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(
        repository / "server", folder / "server", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", ".gitignore"):
        shutil.copy(repository / name, folder)
    return folder


@pytest.fixture(scope="module")
def built(source: Path) -> Path:
    """A folder with the built wheel and source archive."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", "dist"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return source / "dist"


def names(built: Path, archive: str, prefix: str = "server/demo/") -> set[str]:
    """The files of an archive in this folder."""
    if archive == "wheel":
        with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
            found = wheel.namelist()
    else:
        with tarfile.open(next(built.glob("*.tar.gz"))) as source:
            found = [name.partition("/")[2] for name in source.getnames()]
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


@pytest.mark.parametrize("archive", ["wheel", "sdist"])
def test_archives_contain_the_model_without_its_training_code(built: Path, archive: str) -> None:
    found = names(built, archive)
    assert found >= MODEL_FILES | {"card.md", "command.py", "samples.py"}
    assert not [name for name in found if name.startswith("training")]


@pytest.mark.parametrize("archive", ["wheel", "sdist"])
def test_archives_contain_the_playground(built: Path, archive: str, repository: Path) -> None:
    files = {path.name for path in (repository / "server" / "playground").iterdir()}
    assert names(built, archive, "server/playground/") == files
    assert "index.html" in files


def test_the_demo_command_runs_from_the_wheel_alone(built: Path, tmp_path: Path) -> None:
    """A process without the training code and the extras writes the same samples."""
    unpacked, folder = tmp_path / "unpacked", tmp_path / "new" / "demo"
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(unpacked)  # noqa: S202 - the wheel was built here
    done = subprocess.run(
        [sys.executable, "-c", DEMO_WITHOUT_EXTRAS, str(folder)],
        cwd=unpacked,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where, wrote = done.stdout.splitlines()
    assert Path(where) == unpacked / "server" / "demo" / "command.py"
    assert str(folder) in wrote
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    listed = written.pop("questions.md").decode()
    expected = samples()
    assert written == {name: data for sample in expected for name, data in sample.files.items()}
    for sample in expected:
        for name in sample.files:
            assert f"[{name}]({name})" in listed
        for question in sample.questions:
            assert f"| {question.text} | `{question.answer}` |" in listed
