"""Imports point one way, and modules below the engine import neither vLLM nor FastAPI."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

SERVER = Path(__file__).parents[2] / "server"
# From the top down; a package may import those below it.
LAYERS = (
    ("cli", "clean_start", "__main__"),
    ("run_batch", "plan"),
    ("app", "supervisor", "scale", "replicas"),
    ("parts",),
    ("upload_folder",),
    ("http",),
    ("batches",),
    ("engine",),
    ("planner",),
    ("ingest",),
    ("request",),
    ("workers",),
    ("imaging",),
    ("telemetry",),
    ("shares",),
    ("settings",),
    ("concurrency", "scratch", "front_ends", "replica"),
    ("early_flags",),
    ("errors",),
)
BELOW_THE_ENGINE = ("batches", "planner", "ingest", "request", "workers", "imaging", "telemetry")


@functools.cache
def modules() -> list[tuple[str, ast.Module]]:
    return list(parsed())


def parsed() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SERVER.rglob("*.py")):
        name = ".".join(path.relative_to(SERVER).with_suffix("").parts).removesuffix(".__init__")
        if not name.startswith("demo"):
            yield name, ast.parse(path.read_text())


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name: str) -> int | None:
    top = name.split(".")[0]
    return next((index for index, names in enumerate(LAYERS) if top in names), None)


def test_every_module_has_a_layer() -> None:
    assert [name for name, _ in modules() if layer(name) is None and name != "__init__"] == []


def test_imports_point_downward() -> None:
    upward = []
    for name, tree in modules():
        here = layer(name)
        for found in imported(tree):
            there = layer(found.removeprefix("server.")) if found.startswith("server.") else None
            if here is not None and there is not None and there < here:
                upward.append(f"{name} imports {found}")
    assert upward == []


def test_there_are_no_import_cycles() -> None:
    names = {name for name, _ in modules()}
    edges = {
        name: {found.removeprefix("server.") for found in at_import(tree)} & names - {name}
        for name, tree in modules()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in edges[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def at_import(tree: ast.Module) -> Iterator[str]:
    """Imports at module level, without those in functions and for type checking."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)


def test_lower_layers_import_neither_vllm_nor_fastapi() -> None:
    found = [
        f"{name} imports {module}"
        for name, tree in modules()
        for module in imported(tree)
        if name.split(".")[0] in BELOW_THE_ENGINE and module.split(".")[0] in ("vllm", "fastapi")
    ]
    assert found == []


def test_only_tests_in_the_vllm_folder_import_what_loads_slowly() -> None:
    """Otherwise several processes of `make test-fast` would spend time on these imports."""
    slow = ("vllm", "torch", "transformers", "openai", "anthropic")
    found = [
        f"{path.name} imports {module}"
        for path in sorted(Path(__file__).parent.glob("*.py"))
        for module in imported(ast.parse(path.read_text()))
        if module.split(".")[0] in slow
    ]
    assert found == []


def test_the_client_imports_nothing_of_the_server() -> None:
    client = SERVER.parent / "clients" / "python" / "saccade_client"
    found = [
        f"{path.name} imports {module}"
        for path in sorted(client.rglob("*.py"))
        for module in imported(ast.parse(path.read_text()))
        if module.split(".")[0] in ("server", "vllm", "torch")
    ]
    assert found == []
