"""The Dockerfile, without building it; `make image-check` builds it."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from docker.utils import exclude_paths
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.replay.build import REPOSITORY, Builder, Stage, stages

TARGETS = ("gpu", "cpu")
# Instructions for the running container, unlike those that build the image.
OF_THE_CONTAINER = {"ENV", "WORKDIR", "VOLUME", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK"}
OF_THE_CONTAINER |= {"ENTRYPOINT", "LABEL"}


@pytest.fixture(scope="module")
def dockerfile() -> dict[str, Stage]:
    return stages(REPOSITORY / "Dockerfile")


def values(stage: Stage, instruction: str) -> list[str]:
    return [value for name, value in stage.instructions if name == instruction]


def test_hadolint_reports_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run([hadolint, REPOSITORY / "Dockerfile"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_a_container_has_a_user_a_stop_signal_and_a_health_check(
    dockerfile: dict[str, Stage], target: str
) -> None:
    stage = dockerfile[target]
    user = values(stage, "USER")[-1]
    assert all(number.isdigit() and int(number) > 0 for number in user.split(":"))
    assert values(stage, "STOPSIGNAL") == ["SIGTERM"]
    (health,) = values(stage, "HEALTHCHECK")
    assert "/health" in health
    (volume,) = values(stage, "VOLUME")
    (environment,) = values(stage, "ENV")
    caches = dict(part.split("=", 1) for part in environment.split())
    for name in ("HOME", "HF_HOME", "NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path(caches[name]).is_relative_to(volume)


@pytest.mark.parametrize("target", TARGETS)
def test_a_container_keeps_connections_alive_and_sends_no_usage_data(
    dockerfile: dict[str, Stage], target: str
) -> None:
    (environment,) = values(dockerfile[target], "ENV")
    set_to = dict(part.split("=", 1) for part in environment.split())
    assert int(set_to["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 60  # longer than cloud load balancers do
    assert set_to["VLLM_NO_USAGE_STATS"] == "1"


def test_the_python_version_of_the_cpu_target_matches_its_lock(
    dockerfile: dict[str, Stage],
) -> None:
    lock = (REPOSITORY / "deploy" / "lock.sh").read_text()
    (version,) = re.findall(r"--extra cpu --python-version ([\d.]+)", lock)
    for stage in ("wheel", "cpu-dependencies", "cpu"):
        assert dockerfile[stage].base == f"python:{version}-slim-bookworm"


def test_both_targets_have_the_same_runtime_instructions(dockerfile: dict[str, Stage]) -> None:
    gpu, cpu = (
        [step for step in dockerfile[target].instructions if step[0] in OF_THE_CONTAINER]
        for target in TARGETS
    )
    assert gpu == cpu


def test_the_gpu_target_is_based_on_the_pinned_vllm(dockerfile: dict[str, Stage]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (pinned,) = project["optional-dependencies"]["gpu"]
    assert dockerfile["gpu"].base == "vllm/vllm-openai:v" + pinned.partition("==")[2]
    assert dockerfile["gpu-dependencies"].base == dockerfile["gpu"].base


def test_every_copied_file_is_in_the_build_context(dockerfile: dict[str, Stage]) -> None:
    patterns = (REPOSITORY / ".dockerignore").read_text().splitlines()
    context = exclude_paths(str(REPOSITORY), [line for line in patterns if line[:1] != "#"])
    copied = [
        source
        for stage in dockerfile.values()
        for value in values(stage, "COPY")
        if not value.startswith("--from=")
        for source in value.split()[:-1]
    ]
    assert copied
    assert [source for source in copied if source not in context] == []
    needed = {source.split("/")[0] for source in copied} | {"Dockerfile", ".dockerignore"}
    assert {path.split("/")[0] for path in context} == needed
    assert [path for path in context if "__pycache__" in path] == []


def test_the_source_is_copied_after_the_dependencies(dockerfile: dict[str, Stage]) -> None:
    for target in TARGETS:
        assert values(dockerfile[f"{target}-dependencies"], "COPY")
        assert not any(
            "server" in value for _, value in dockerfile[f"{target}-dependencies"].instructions
        )
        assert "from=wheel" in values(dockerfile[target], "RUN")[-1]


def locked(target: str) -> dict[str, list[str]]:
    """The hashes of each requirement of a lock file; pip checks all hashes if any is given."""
    text = (REPOSITORY / f"deploy/requirements-{target}.txt").read_text()
    lines = text.replace("\\\n", "").splitlines()
    words = [line.split() for line in lines if not line.startswith("#")]
    return {requirement: hashes for requirement, *hashes in words}


@pytest.mark.parametrize("target", TARGETS)
def test_every_dependency_is_pinned_by_hashes(target: str) -> None:
    for pin, hashes in locked(target).items():
        assert hashes, pin
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), pin


@pytest.mark.parametrize("target", TARGETS)
def test_the_bill_of_materials_lists_the_pinned_packages(target: str) -> None:
    cyclonedx = Path(sys.executable).with_name("cyclonedx-py")
    lock = REPOSITORY / f"deploy/requirements-{target}.txt"
    done = subprocess.run([cyclonedx, "requirements", lock], capture_output=True, check=True)
    listed = {
        f"{part['name']}=={part['version']}" for part in json.loads(done.stdout)["components"]
    }
    assert listed == set(locked(target))


@pytest.mark.parametrize("target", TARGETS)
def test_every_dependency_is_pinned_to_a_version(target: str) -> None:
    pins = locked(target)
    assert all(str(Requirement(pin).specifier).startswith("==") for pin in pins)
    names = {canonicalize_name(Requirement(pin).name) for pin in pins}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    asked = {canonicalize_name(Requirement(part).name) for part in project["dependencies"]}
    assert asked - {"saccade-client"} <= names  # else: make lock


def test_replaying_copies_what_the_dockerfile_copies(tmp_path: Path) -> None:
    """The folder that `make image-check` makes is like the build context."""
    (tmp_path / "base").mkdir()
    Builder(tmp_path, []).prepare()
    context = tmp_path / "context"
    assert (context / "server" / "demo" / "model.safetensors").is_file()
    assert (context / "clients" / "python" / "pyproject.toml").is_file()
    assert not (context / "tests").exists()
