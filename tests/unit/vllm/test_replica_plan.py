"""Which command lines several replicas can be started with."""

import pytest

from server.engine.arguments import parse
from server.errors import CannotStart
from server.replicas import plan

REFUSED = {
    "--replicas 3": "write the flag as --replicas 3",
    "--replicas 2 --api-server-count 2": "--api-server-count is not possible",
    "--replicas 2 --data-parallel-size 2": "--replicas takes its place",
    "--replicas 2 --nnodes 2": "--nnodes is not possible",
    "--replicas 2 --uds /tmp/socket": "--uds is not possible",
    "--replicas 2 --ssl-keyfile a --ssl-certfile b": "--ssl-keyfile is not possible",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_possible_is_refused(words: str) -> None:
    args, settings = parse(words.split())
    with pytest.raises(CannotStart, match=REFUSED[words]):
        plan._planned(args, settings, 2)


def test_stored_responses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    args, settings = parse(["--replicas", "2"])
    with pytest.raises(CannotStart, match="VLLM_ENABLE_RESPONSES_API_STORE"):
        plan._planned(args, settings, 2)


def test_a_plan_has_what_the_flags_say() -> None:
    words = "--replicas 2 --host 10.0.0.1 --port 81 --root-path /a/ --drain-delay-s 2"
    args, settings = parse(words.split())
    found = plan._planned(args, settings, 2)
    assert (found.host, found.port, found.root_path) == ("10.0.0.1", 81, "/a")
    assert (found.drain_delay_s, found.gpus) == (2, [])
    assert found.model == "saccade-tiny"


@pytest.mark.parametrize(
    ("visible", "groups"),
    [(None, [["0", "1"], ["2", "3"]]), ("4,5,GPU-6,7,8", [["4", "5"], ["GPU-6", "7"]])],
)
def test_each_replica_gets_its_gpus(
    visible: str | None, groups: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import current_platform

    variable = current_platform.device_control_env_var
    monkeypatch.delenv(variable, raising=False)
    if visible is not None:
        monkeypatch.setenv(variable, visible)
    args, settings = parse(["--replicas", "2", "--tensor-parallel-size", "2"])
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(type(current_platform), "device_count", lambda *_: 4, raising=False)
    assert plan._planned(args, settings, 2).gpus == groups


@pytest.mark.parametrize("command", ["deploy", "run-batch -i a -o b"])
def test_other_commands_have_none(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *words = command.split()
    with pytest.raises(SystemExit):
        parse([*words, "--replicas", "2"], name)
    assert f"--replicas: `saccade {name}` has none" in capsys.readouterr().err
