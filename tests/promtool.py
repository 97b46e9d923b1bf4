"""Prometheus queries, evaluated by promtool over synthetic series."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import yaml

from tests.services import program


def values(query: str, series: Mapping[str, str], scratch: Path, *, at: str) -> list[float]:
    """The values of `query` at the time `at` after the beginning of the series, such as 90m.

    `series` are selectors and values in promtool's notation, a value every 30 s.

    Raises:
        AssertionError: the query is wrong; the message is promtool's.
    """
    # promtool only compares values: an expected series that is absent makes it print the real ones.
    test = {"expr": query, "eval_time": at, "exp_samples": [{"labels": "none", "value": 0}]}
    inputs = [{"series": name, "values": row} for name, row in series.items()]
    tests = [{"interval": "30s", "input_series": inputs, "promql_expr_test": [test]}]
    file = scratch / "query.yml"
    file.write_text(yaml.safe_dump({"tests": tests}))
    command = [program("promtool"), "test", "rules", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    got = re.search(r"^ *got: *(.*)$", said, re.M)
    assert got, said
    return [float(value) for value in re.findall(r"[}] (-?[\d.]+E[-+]\d+|NaN|[-+]Inf)", got[1])]
