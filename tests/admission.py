"""Limits of admission for tests."""

from server.request.admission import AdmissionLimits
from server.request.budgets import Resource

UNLIMITED = dict.fromkeys(Resource, 1 << 60)


def limits(
    running: int = 100,
    waiting: int = 100,
    wait_s: float = 1000.0,
    in_engine: int = 100,
    totals: dict[Resource, int] = UNLIMITED,
    engine_requests: int | None = None,
    group_share: float = 1.0,
    background: int = 100,
) -> AdmissionLimits:
    """Limits that are not reached, but for those that are given."""
    return AdmissionLimits(
        running, waiting, wait_s, in_engine, background, totals, engine_requests, group_share
    )
