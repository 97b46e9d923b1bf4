"""`saccade demo [DIR] [--ask URL]`: writes sample pictures and asks a server about them."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from server.demo.media import image_part, video_part
from server.demo.samples import Sample, samples
from server.demo.scoring import Answer

_QUESTIONS = "questions.md"
_RIGHT = 0.5  # lowest score that counts as right; a box scores its overlap
_ANSWER_TIMEOUT_S = 120
_MAX_TOKENS = 64
_INTRODUCTION = """# Sample pictures for the demo model

Boxes are [left, top, right, bottom] in thousandths of the picture.

To ask a server all of these questions, where DIR is this folder:

    saccade demo DIR --ask http://127.0.0.1:8000
"""


def main(argv: list[str]) -> None:
    """Runs the command; exits with status 1 if it fails and 2 if its arguments are wrong."""
    options = _parse(argv)
    try:
        made = samples()
        write(made, options.folder)
        print(f"wrote the pictures and {_QUESTIONS} to {options.folder}")
        if options.ask:
            _show(made, options.ask)
    except (OSError, httpx.HTTPError) as error:
        print(f"saccade demo: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="saccade demo",
        description="Write sample pictures and questions that the demo model answers.",
    )
    parser.add_argument(
        "folder",
        metavar="DIR",
        nargs="?",
        type=Path,
        default=Path("saccade-demo"),
        help="a new or empty folder (default: saccade-demo)",
    )
    parser.add_argument("--ask", metavar="URL", help="ask this server all the questions")
    return parser.parse_args(argv)


def write(made: list[Sample], folder: Path) -> None:
    """Writes all files and the questions into a folder, which may already contain some of them.

    Raises `FileExistsError` and writes nothing if the folder contains anything else.
    """
    files = {name: data for sample in made for name, data in sample.files.items()}
    files[_QUESTIONS] = _listed(made).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        same = path.name in files and path.is_file() and path.read_bytes() == files[path.name]
        if not same:
            raise FileExistsError(f"{path} is not part of this demo; use a new or empty folder")
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _listed(made: list[Sample]) -> str:
    """The questions with their answers, as Markdown."""
    parts = [_INTRODUCTION]
    for sample in made:
        parts.append(f"## {_title(sample)}\n")
        parts.append(" ".join(map(_link, sample.files)) + "\n")
        rows = [f"| {it.text} | `{it.answer}` |" for it in sample.questions]
        parts.append("\n".join(["| Question | Answer |", "| --- | --- |", *rows, ""]))
    return "\n".join(parts)


def _link(name: str) -> str:
    """Markdown that shows a picture, or links to a clip."""
    return f"{'!' if name.endswith('.png') else ''}[{name}]({name})"


def _title(sample: Sample) -> str:
    return ", ".join(sample.files)


def _show(made: list[Sample], url: str) -> None:
    """Asks all questions and prints the answers as they arrive; raises `httpx.HTTPError`."""
    answers = []
    with httpx.Client(base_url=url, timeout=_ANSWER_TIMEOUT_S) as client:
        for sample in made:
            print(f"\n{_title(sample)}")
            for answer in ask(client, sample):
                right = answer.score >= _RIGHT
                note = "" if answer.got == answer.expected else f"  (expected {answer.expected})"
                print(f"  {'right' if right else 'WRONG'}  {answer.question}  {answer.got}{note}")
                answers.append(right)
    print(f"\n{sum(answers)} of {len(answers)} right")


def ask(client: httpx.Client, sample: Sample) -> Iterator[Answer]:
    """Asks a server a sample's questions one after another; raises `httpx.HTTPError`."""
    pictures = [_part(name, data) for name, data in sample.files.items()]
    for question in sample.questions:
        content = [*pictures, {"type": "text", "text": question.text}]
        body = {
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": _MAX_TOKENS,
        }
        response = client.post("/v1/chat/completions", json=body)
        if response.is_error:
            raise httpx.HTTPStatusError(response.text, request=response.request, response=response)
        got = response.json()["choices"][0]["message"]["content"] or ""
        yield Answer(question.task, question.text, question.answer, got)


def _part(name: str, data: bytes) -> dict[str, Any]:
    return image_part(data) if name.endswith(".png") else video_part(data)
