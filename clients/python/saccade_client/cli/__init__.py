"""The command line. Each command imports what it needs when it runs: `--help` takes 0.2 s."""

import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from saccade_client import __version__
from saccade_client.cli.ask import ask, chat
from saccade_client.cli.batch import batch
from saccade_client.cli.lists import models, tokens
from saccade_client.cli.top import top

_COMMANDS = (ask, chat, batch, tokens, models, top)
# For the commands of another program, which reads their arguments itself.
_UNREAD = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def main() -> None:
    """The command `saccade-client`."""
    run("saccade-client", __version__)


def run(
    name: str,
    version: str,
    others: Mapping[str, str] | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Run the command `name`, and exit: with status 2 if `arguments` (default: the process's) are
    wrong, 1 if the command failed.

    `others` are commands that help and completion also show, with their descriptions; the caller
    runs them itself.
    """
    commands = app(f"{name} {version}")
    for other, description in (others or {}).items():
        commands.command(other, help=description, context_settings=_UNREAD)(_elsewhere)
    try:
        commands(arguments, prog_name=name)
    except OSError as error:  # the disk with the output is full
        print(f"saccade: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


def app(version: str) -> typer.Typer:
    """The commands of the client. `version` is what `--version` prints."""
    commands = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(asked: bool) -> None:
        if asked:
            print(version)
            raise typer.Exit

    @commands.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option(
                "--version", "-V", callback=show_version, is_eager=True, help="Show the version."
            ),
        ] = False,
    ) -> None:
        """Ask vision-language models about pictures."""

    for command in _COMMANDS:
        commands.command()(command)
    return commands


def _elsewhere() -> None:
    raise AssertionError("the caller of run() runs this command")
