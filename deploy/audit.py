"""Asks a vulnerability service about all packages that the container images install.

    make audit                  says so if the service cannot be reached
    AUDIT=required make audit   fails then

`deploy/audit_exceptions.toml` has the known vulnerabilities that are accepted, each with its reason
and date. The exit status is 1 if another one is found, or if an exception is no longer needed.
"""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent
_REQUIREMENTS = ("requirements-cpu.txt", "requirements-gpu.txt")
_EXCEPTIONS = "audit_exceptions.toml"
_TIMEOUT_S = 300
_COMMAND = (
    *(sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"),
    *("--no-deps", "--disable-pip", "--timeout", "15"),
)


@dataclass(frozen=True)
class Report:
    """What the service knows: vulnerabilities as (package, ids), and the counts of packages."""

    found: frozenset[tuple[str, tuple[str, ...]]]
    known: int
    unknown: int


def main() -> int:
    """Print what was found; returns the exit status."""
    exceptions = accepted(_FOLDER / _EXCEPTIONS)
    report = read(_answer())
    if not report.known:
        print("audit: the vulnerability service cannot be reached, so nothing was checked")
        return int(os.environ.get("AUDIT") == "required")
    problems = problems_of(report, exceptions)
    print("\n".join(problems) or "audit: no vulnerability without an exception")
    print(f"audit: {report.known} packages were checked, the service knows {report.unknown} not")
    return int(bool(problems))


def accepted(path: Path) -> dict[str, str]:
    """The reasons for the vulnerabilities that are accepted, by their ids.

    Raises:
        KeyError: an exception has no `reason` or no `date`.
    """
    entries = tomllib.loads(path.read_text()).get("exception", [])
    return {each["id"]: f"{each['date']}: {each['reason']}" for each in entries}


def read(answer: str) -> Report:
    """The report in the output of pip-audit, which has none if the service does not answer."""
    try:
        packages: list[dict[str, Any]] = json.loads(answer)["dependencies"]
    except (ValueError, KeyError):
        packages = []
    checked = [package for package in packages if "skip_reason" not in package]
    found = {
        (package["name"], (each["id"], *each.get("aliases", ())))
        for package in checked
        for each in package.get("vulns", ())
    }
    return Report(frozenset(found), len(checked), len(packages) - len(checked))


def problems_of(report: Report, exceptions: dict[str, str]) -> list[str]:
    """Vulnerabilities without an exception, and exceptions without a vulnerability."""
    problems = [
        f"audit: {package} has {', '.join(ids)}"
        for package, ids in sorted(report.found)
        if not exceptions.keys() & set(ids)
    ]
    seen = {each for _, ids in report.found for each in ids}
    problems += [
        f"audit: {each} is an exception that is no longer needed"
        for each in sorted(exceptions.keys() - seen)
    ]
    return problems


def _answer() -> str:
    files = [part for name in _REQUIREMENTS for part in ("-r", str(_FOLDER / name))]
    try:
        done = subprocess.run(
            [*_COMMAND, *files], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
