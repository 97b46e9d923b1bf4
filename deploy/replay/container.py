"""Runs an image that `build` built the way Docker would, and tests it."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.replay.build import ISOLATED, REPOSITORY, Image, assigned, run, within

NAMELESS_USER = "54321"
START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 60

ASK = """
import base64, http.client, json, sys
part = "data:image/png;base64," + base64.b64encode(sys.stdin.buffer.read()).decode()
content = [{"type": "image_url", "image_url": {"url": part}},
           {"type": "text", "text": "What is in the image?"}]
body = {"model": "saccade-tiny", "temperature": 0,
        "messages": [{"role": "user", "content": content}]}
connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=120)
connection.request("POST", "/v1/chat/completions", json.dumps(body),
                   {"Content-Type": "application/json"})
answer = json.load(connection.getresponse())
print(answer["choices"][0]["message"]["content"] if "choices" in answer else answer)
"""


@contextmanager
def container(image: Image, shm_bytes: int) -> Iterator[subprocess.Popen[bytes]]:
    """The entry point as process 1 of its own namespaces; yields their `unshare` outside."""
    script = ["ip link set lo up", "mount --bind . .", 'cd "$PWD"']
    for number, volume in enumerate(image.volumes):
        new = image.root.parent / f"volume-{number}"
        shutil.rmtree(new, ignore_errors=True)
        run("cp", "-a", within(image.root, volume), new)  # Docker copies content and mode
        script.append(f"mount --bind {new} .{volume}")
    script += [
        "mount -o remount,bind,ro .",
        "mount -t proc proc proc",
        "mount --rbind /sys sys",
        "mount -t tmpfs -o mode=1777,nosuid,nodev,noexec tmpfs tmp",
        "mount -t tmpfs -o mode=0755 tmpfs dev",
        "mkdir dev/shm",
        f"mount -t tmpfs -o mode=1777,nosuid,nodev,noexec,size={shm_bytes} shm dev/shm",
    ]
    for device in ("null", "zero", "full", "random", "urandom"):
        script += [f"touch dev/{device}", f"mount --bind /dev/{device} dev/{device}"]
    script.append("exec " + shlex.join(as_nobody(image, ".", image.entry_point)))
    process = subprocess.Popen(
        [*ISOLATED, "--net", "--ipc", "sh", "-ec", "\n".join(script)], cwd=image.root
    )
    try:
        while process.poll() is None and not children(process):
            time.sleep(0.01)
        yield process
    finally:
        process.kill()  # --kill-child also ends everything inside
        process.wait()


def as_nobody(image: Image, root: str, command: list[str]) -> list[str]:
    """`command` with the image's environment and folder, as a nameless, unprivileged user."""
    user = ["setpriv", f"--reuid={NAMELESS_USER}", f"--regid={NAMELESS_USER}", "--clear-groups"]
    powerless = ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
    shell = ["sh", "-c", f'cd {shlex.quote(image.folder)} && exec "$@"', "sh"]
    environment = ["env", "-i", *assigned(image.environment)]
    return ["chroot", root, *user, *powerless, *environment, *shell, *command]


def children(process: subprocess.Popen[bytes]) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in listed.split()]


def inside(image: Image, container: subprocess.Popen[bytes], *command: str) -> list[str]:
    """`command` as `docker exec` runs it."""
    enter = ["nsenter", f"--target={children(container)[0]}", "--all"]
    return [*enter, *as_nobody(image, str(image.root), list(command))]


def check(image: Image, shm_bytes: int) -> None:
    """Start the container, have it answer a picture, and stop it.

    Raises:
        SystemExit: it did something else; the message says what.
    """
    with container(image, shm_bytes) as process:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_healthy(image, process):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the container did not become healthy")
            time.sleep(2)
        picture = (REPOSITORY / "clients" / "examples" / "red_circle.png").read_bytes()
        asked = inside(image, process, "python", "-c", ASK)
        answer = subprocess.run(asked, input=picture, stdout=subprocess.PIPE, check=True).stdout
        print(f"healthy; the answer is {answer.decode().strip()!r}", flush=True)
        if answer.decode().strip() != "a red circle":
            raise SystemExit("that is wrong")
        run(*inside(image, process, "ls", "-l", "/dev/shm"))
        os.kill(children(process)[0], signal.Signals[image.stop_signal])
        if (status := process.wait(STOP_TIMEOUT_S)) != 0:
            raise SystemExit(f"it ended with status {status}")
        print("stopped with status 0")


def is_healthy(image: Image, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        return False
    health = inside(image, process, *image.health)
    return subprocess.run(health, stderr=subprocess.DEVNULL).returncode == 0
