"""`saccade models` and `saccade tokens`."""

from collections.abc import Sequence
from typing import Annotated

import typer

from saccade_client import DEFAULT_URL
from saccade_client.cli import options
from saccade_client.cli.options import DEFAULT_TIMEOUT_S

_WIDEST = 1000


def models(
    url: options.Url = DEFAULT_URL,
    api_key: options.Key = None,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
    json: options.Json = False,
) -> None:
    """List the server's models."""
    with options.connected(url, api_key, timeout_s=timeout) as client:
        found = client.models()
    if json:
        options.print_json([model.model_dump(mode="json") for model in found])
        return
    rows = [(model.id, model.owned_by or "", str(model.max_model_len or "")) for model in found]
    _print(("model", "owner", "tokens"), rows, right=("tokens",))


def tokens(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Pictures and PDFs; - is standard input.")
    ],
    url: options.Url = DEFAULT_URL,
    api_key: options.Key = None,
    detail: options.DetailOption = None,
    image_tokens: options.ImageTokens = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of all pictures together.")
    ] = None,
    pages: Annotated[str | None, typer.Option(help='Pages of a PDF, such as "1-3,7".')] = None,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
    json: options.Json = False,
) -> None:
    """Show what pictures cost, without asking the model (Saccade only)."""
    with options.connected(url, api_key, files, timeout_s=timeout) as client:
        media = [options.opened(name, detail, image_tokens, pages) for name in files]
        costs = client.costs(*media, max_image_tokens=budget)
    total = sum(cost.tokens for cost in costs)
    if json:
        rows = [cost.model_dump(mode="json") for cost in costs]
        options.print_json({"images": rows, "tokens": total})
        return
    names = files if len(files) == len(costs) else ["" for _ in costs]  # a PDF is several
    _print(
        ("picture", "size", "as seen", "tokens", "KV cache"),
        [
            (
                name,
                f"{cost.width}x{cost.height}",
                f"{cost.processed_width}x{cost.processed_height}" if cost.processed_width else "",
                str(cost.tokens),
                f"{cost.kv_bytes / 2**20:.1f} MiB",
            )
            for name, cost in zip(names, costs, strict=True)
        ]
        + ([("all", "", "", str(total), "")] if len(costs) > 1 else []),
        right=("tokens", "KV cache"),
    )


def _print(names: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[str, ...]) -> None:
    """Print a table; in a pipe, lines with tabs and without a heading."""
    import sys

    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    table: Table = Table(box=None)
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    whole = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    console.width = max(console.width, whole)  # in a narrow terminal, lines wrap: no figure is cut
    console.print(table)
