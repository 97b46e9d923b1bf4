"""How `make audit` judges what pip-audit reports."""

import json
from pathlib import Path

import pytest

from deploy import audit

ANSWER = json.dumps({
    "dependencies": [
        {
            "name": "pillow",
            "version": "1.0",
            "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["2.0"]}],
        },
        {"name": "numpy", "version": "1.0", "vulns": []},
        {"name": "torch", "skip_reason": "not found"},
    ],
    "fixes": [],
})  # fmt: skip


def test_a_vulnerability_without_an_exception_is_a_problem() -> None:
    report = audit.read(ANSWER)
    assert (report.known, report.unknown) == (2, 1)
    assert audit.problems_of(report, {}) == ["audit: pillow has PYSEC-1, CVE-2026-1"]


@pytest.mark.parametrize("name", ["PYSEC-1", "CVE-2026-1"])
def test_an_exception_may_have_any_name_of_the_vulnerability(name: str) -> None:
    assert audit.problems_of(audit.read(ANSWER), {name: "a reason"}) == []


def test_an_exception_that_is_no_longer_needed_is_a_problem() -> None:
    report = audit.read(ANSWER)
    (problem,) = audit.problems_of(report, {"PYSEC-1": "a reason", "PYSEC-2": "a reason"})
    assert "PYSEC-2" in problem


@pytest.mark.parametrize("answer", ["", "{}", "no network"])
def test_a_service_that_does_not_answer_knows_no_package(answer: str) -> None:
    assert audit.read(answer).known == 0


def test_every_exception_has_a_reason_and_a_date(repository: Path) -> None:
    audit.accepted(repository / "deploy" / "audit_exceptions.toml")


def test_an_exception_without_a_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "exceptions.toml").write_text('[[exception]]\nid = "PYSEC-1"\ndate = 2026-11-28\n')
    with pytest.raises(KeyError, match="reason"):
        audit.accepted(tmp_path / "exceptions.toml")
