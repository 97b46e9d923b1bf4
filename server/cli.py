"""The command line: `saccade serve` and `saccade demo`. Imports are light until a command runs."""

import sys

from server import __version__

USAGE = """usage: saccade serve [MODEL] [flags]
       saccade demo [DIR] [--ask URL]
       saccade --version

Serve a vision-language model over the OpenAI API.

  saccade serve                      the embedded demo model, on CPU or GPU
  saccade serve Qwen/Qwen3-VL-8B     any model that vLLM serves, with any `vllm serve` flag
  saccade serve --help               Saccade's own flags, and how to list vLLM's
  saccade demo                       sample pictures with questions, in ./saccade-demo
  saccade demo --ask http://127.0.0.1:8000   and a running server's answers to them
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command; ends the process with status 2 on a wrong call."""
    arguments = sys.argv[1:] if argv is None else argv
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command in ("-V", "--version"):
        print(f"saccade {__version__}")
    elif command == "serve":
        from server.serve import serve

        serve(rest)
    elif command == "demo":
        from server.demo.command import main as demo

        demo(rest)
    else:
        print(f"saccade: unknown command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        raise SystemExit(2)
