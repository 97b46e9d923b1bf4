"""`saccade demo [DIR] [--ask URL]`: writes sample pictures, and asks a server about them."""

import argparse
import base64
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

from server.demo.samples import Sample, samples
from server.demo.scoring import Answer

_QUESTIONS = "questions.md"
_RIGHT = 0.5  # the least score; for a box, how far it overlaps
_ANSWER_LIMIT_S = 120
_MAX_TOKENS = 64
_INTRODUCTION = """# Sample pictures for the demo model

Boxes are [left, top, right, bottom] in thousandths of the picture.

`saccade demo DIR --ask http://127.0.0.1:8000`, where DIR is this folder, asks a server all of it.
"""


def main(argv: list[str]) -> None:
    """Run the command; ends the process with status 1 if it fails, 2 on a wrong call."""
    options = _parse(argv)
    try:
        made = samples()
        write(made, options.folder)
        print(f"{options.folder} has the pictures, and their questions in {_QUESTIONS}")
        if options.ask:
            _show(made, options.ask)
    except (OSError, httpx.HTTPError) as error:
        print(f"saccade demo: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="saccade demo",
        description="Write sample pictures, and questions that the demo model answers.",
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
    """Write all files and the questions into a folder, which may have them already.

    Raises `FileExistsError`, and writes nothing, where the folder has anything else.
    """
    files = {name: data for sample in made for name, data in sample.files.items()}
    files[_QUESTIONS] = _listed(made).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        same = path.name in files and path.is_file() and path.read_bytes() == files[path.name]
        if not same:
            raise FileExistsError(f"{path} is not of this demo; name a new or empty folder")
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
    """A picture to be shown, a clip to be opened."""
    return f"{'!' if name.endswith('.png') else ''}[{name}]({name})"


def _title(sample: Sample) -> str:
    return ", ".join(sample.files)


def _show(made: list[Sample], url: str) -> None:
    """Ask everything and print the answers as they come; raises `httpx.HTTPError`."""
    answers = []
    with httpx.Client(base_url=url, timeout=_ANSWER_LIMIT_S) as client:
        for sample in made:
            print(f"\n{_title(sample)}")
            for answer in ask(client, sample):
                right = answer.score >= _RIGHT
                note = "" if answer.got == answer.expected else f"  (expected {answer.expected})"
                print(f"  {'right' if right else 'WRONG'}  {answer.question}  {answer.got}{note}")
                answers.append(right)
    print(f"\n{sum(answers)} of {len(answers)} right")


def ask(client: httpx.Client, sample: Sample) -> Iterator[Answer]:
    """The answers of a server to a sample's questions, one by one; raises `httpx.HTTPError`."""
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


def _part(name: str, data: bytes) -> dict[str, object]:
    """A PNG or AVI file as a part of a message."""
    kind, media = ("image", "image/png") if name.endswith(".png") else ("video", "video/x-msvideo")
    url = f"data:{media};base64,{base64.b64encode(data).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
