"""Evaluates the demo model through the server, on pictures and questions not used in training.

    python -m server.demo.training.evaluate [--samples N] [--tasks a,b] [--output FILE.json]

Starts the server with the embedded model or another checkpoint, or asks a running server. The exit
status is 1 if a score is below its bar.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import httpx

from server.demo.training import report
from server.demo.training.asking import Asker, served_model
from server.demo.training.examples import TASKS

_SEED = 20261120
_DRAWERS = 2  # processes that draw pictures
_START_LIMIT_S = 600
_STOP_LIMIT_S = 30
_ANSWER_LIMIT_S = 600


def main(argv: list[str] | None = None) -> int:
    """Run the evaluation; returns the exit status."""
    options = _parse(argv)
    card = report.CARD.read_text() if options.card else ""
    if options.card:
        report.split_card(card)  # fails early if the card has no place for the table
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(_serving(options.model))
        outcomes = asyncio.run(_evaluate(url, options))
    for outcome in outcomes:
        if outcome.task == "read":
            for length, (score, count) in report.by_length(outcome).items():
                print(f"read, {length} characters: {score:.3f} of {count}")
    if options.output:
        found = report.result(
            outcomes,
            model=options.url or str(options.model or "embedded"),
            seed=options.seed,
            samples=options.samples,
        )
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.card:
        report.CARD.write_text(report.filled_card(card, outcomes))
    missed = [outcome.task for outcome in outcomes if not outcome.passed]
    print(f"missed: {', '.join(missed)}" if missed else "all scores reach their bars")
    return 1 if missed else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    served = parser.add_mutually_exclusive_group()
    served.add_argument("--url", help="a running server, http://HOST:PORT")
    served.add_argument("--model", type=Path, help="a checkpoint (default: the embedded model)")
    parser.add_argument("--tasks", type=_tasks, default=TASKS, help="comma-separated")
    parser.add_argument("--samples", type=_positive, default=300, help="questions per task")
    parser.add_argument("--seed", type=int, default=_SEED)
    parser.add_argument("--concurrency", type=_positive, default=32, help="concurrent questions")
    parser.add_argument("--output", type=Path, help="JSON file for scores and wrong answers")
    parser.add_argument("--card", action="store_true", help="write the scores into the model card")
    return parser.parse_args(argv)


def _tasks(text: str) -> tuple[str, ...]:
    tasks = tuple(text.split(","))
    if unknown := set(tasks) - set(TASKS):
        raise argparse.ArgumentTypeError(f"unknown task: {', '.join(sorted(unknown))}")
    return tasks


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


async def _evaluate(url: str, options: argparse.Namespace) -> list[report.Outcome]:
    """Asks task by task and prints each row of the table when it is known."""
    print(report.row(report.HEADER), flush=True)
    outcomes = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_DRAWERS, mp_context=spawn) as pool:
        async with httpx.AsyncClient(base_url=url, timeout=_ANSWER_LIMIT_S) as client:
            asker = Asker(client, await served_model(client), pool, options.concurrency)
            for task in options.tasks:
                answers = await asker.answers(options.seed, task, options.samples)
                outcomes.append(report.Outcome(task, answers))
                print(report.row(report.cells(outcomes[-1])), flush=True)
    return outcomes


@contextlib.contextmanager
def _serving(model: Path | None) -> Iterator[str]:
    """Starts the server on a free port, yields its URL, and stops it."""
    chosen = [str(model)] if model else []
    flags = ["--host", "127.0.0.1", "--port", "0", "--mm-processor-cache-gb", "1"]
    command = [sys.executable, "-m", "server", "serve", *chosen, *flags]
    with tempfile.NamedTemporaryFile() as log:
        # S603: nobody else chooses the command.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603
        try:
            yield _await_ready(process, Path(log.name))
        finally:
            process.terminate()
            try:
                process.wait(_STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """The URL of the ready server; raises `RuntimeError` with the end of its log if it fails."""
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        if match := re.search(r"ready: .* on (http://\S+)", log.read_text()):
            return match[1]
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")


if __name__ == "__main__":
    raise SystemExit(main())
