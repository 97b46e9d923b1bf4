"""vLLM's internals are as the server needs them; a failure names what an upgrade changed."""

import ast
import re
from pathlib import Path

import pytest

from tests.contracts_next import report
from tests.vllm_contracts import CONTRACTS, SERVER, Contract, Source, installed

DOCS = Path(__file__).parents[2] / "docs" / "vllm.md"


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.id)
def test_vllm_keeps_the_contract(contract: Contract) -> None:
    broken = installed().broken(contract)
    assert broken is None, f"{broken}. The table in docs/vllm.md lists what depends on it."


def test_every_name_that_the_server_imports_from_vllm_exists() -> None:
    assert list(installed().missing_imports()) == []


def test_the_documentation_lists_every_contract() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(contract.id for contract in CONTRACTS)
    assert all(len(row.strip("|").split("|")) == 3 and row.count("|  |") == 0 for row in rows)


PRIVATE = re.compile(r"^_[a-z]")
# Objects of the server and of other libraries whose private names are used elsewhere.
OWNERS = frozenset(("self", "cls", "hf_processor", "image", "os", "loop", "super()"))


def test_only_the_adapter_uses_private_names_of_vllm() -> None:
    """Modules of the engine, apart from the adapter, use no private name of an object that is not
    their own."""
    found = []
    for path in sorted((SERVER / "engine").rglob("*.py")):
        if "vllm_adapter" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute) or not PRIVATE.match(node.attr):
                continue
            owner = ast.unparse(node.value)
            if owner.split(".")[0] not in OWNERS:
                found.append(f"{path.relative_to(SERVER)}: {owner}.{node.attr}")
    assert found == []


OLD = """
import os
from other import Thing
class Base:
    def kept(self, a): ...
    def __init__(self):
        self.state = {}
class Engine(Base):
    limit: int = 3
    async def send(self, request): await self.core.send(request)
"""
CHANGES = [
    (Contract("m", "Engine.send", ("self", "request")), "", ""),
    (Contract("m", "Engine.kept", ("self", "a")), "", ""),
    (Contract("m", "Engine.state"), "", ""),
    (Contract("m", "Engine.limit"), "", ""),
    (Contract("m", "Thing"), "", ""),
    (Contract("gone", "Engine"), "", "vllm.gone does not exist any more (needed for Engine)"),
    (Contract("m", "Engine.sent"), "", "vllm.m has no Engine.sent any more"),
    (Contract("m", "Engine.state"), "self.state = {}|pass", "vllm.m has no Engine.state any more"),
    (
        Contract("m", "Engine.send", ("self", "request")),
        "send(self, request)|send(self, message)",
        "m.Engine.send takes (self, message) and no longer (self, request)",
    ),
    (
        Contract("m", "Engine.send", ("self", "request")),
        "send(self, request)|send(self, request, place)",
        "m.Engine.send needs place as well",
    ),
    (
        Contract("m", "Engine.send", ("self", "request")),
        "send(self, request)|send(self, request, *, place)",
        "m.Engine.send needs place as well",
    ),
    (
        Contract("m", "Engine.send", ("self", "request")),
        "send(self, request)|send(self, request, place=1, *, other=2)",
        "",
    ),
    (Contract("m", "Engine.send", calls=("self.core.send(request)",)), "", ""),
    (
        Contract("m", "Engine.send", calls=("self.core.send(request)",)),
        "self.core.send|self.queue.put",
        "m.Engine.send does not contain `self.core.send(request)` any more",
    ),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_broken_contract_is_described_in_a_sentence(tmp_path: Path, number: int) -> None:
    contract, change, sentence = CHANGES[number]
    old, _, new = change.partition("|")
    (tmp_path / "m.py").write_text(OLD.replace(old, new) if change else OLD)
    assert (Source(tmp_path).broken(contract) or "") == sentence


def test_a_report_names_the_missing_imports(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    found = report(Source(tmp_path))
    assert len(found) > len(CONTRACTS)
    where = "server/engine/launch.py imports AsyncLLM from vllm.v1.engine.async_llm"
    assert f"{where}, which has none any more" in found
