"""Confines a process to what decoding needs, before it gets the first byte of a client.

From then on it has the descriptors that it holds, its memory, and threads. It can open neither
files nor sockets, execute nothing, and neither see, trace nor signal another process. See
`docs/security.md` for what each layer does.
"""

import contextlib
import os
import resource
from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from server.workers import landlock, seccomp

SandboxMode: TypeAlias = Literal["auto", "require", "off"]

# Where PDFium looks for the fonts that a PDF does not contain.
FONT_DIRECTORIES = (
    "/usr/share/fonts",
    "/usr/share/X11/fonts/Type1",
    "/usr/share/X11/fonts/TTF",
    "/usr/local/share/fonts",
)


class Confinement(msgspec.Struct, frozen=True):
    """What confines a process. `landlock` is the version of the kernel's interface, or 0.
    `refused` says which layers the kernel has refused, and why."""

    seccomp: bool = False
    landlock: int = 0
    refused: list[str] = []

    def __str__(self) -> str:
        layers = ["seccomp"] if self.seccomp else []
        if self.landlock:
            layers.append(f"Landlock (version {self.landlock})")
        return " and ".join(layers) or "nothing"

    def suffices(self, mode: SandboxMode) -> bool:
        """Whether a process may decode files with this confinement."""
        return mode != "require" or not self.refused


def prepare() -> None:
    """Do before a fork what its confinement would otherwise do in each process."""
    with contextlib.suppress(OSError):
        for opens_files in (False, True):
            seccomp.program(opens_files=opens_files)


def confine(
    mode: SandboxMode,
    directories: Sequence[str] = (),
    files: Sequence[str] = (),
    *,
    needs_files: bool = False,
) -> Confinement:
    """Confine this process for ever, as far as the kernel can.

    `files` and all below `directories` can still be read, if Landlock is there to forbid all
    others. Without Landlock, no file can be opened, or with `needs_files` all can be read.

    Call it while this process has only one thread: Landlock applies to the calling one.
    """
    if mode == "off":
        return Confinement()
    refused: list[str] = []
    version, has_filter = 0, False
    try:
        seccomp.forbid_new_privileges()
        version = landlock.restrict([*directories, *files], set(map(os.path.dirname, files)))
    except OSError as error:
        effect = "; files can be read, because this model needs its own" if needs_files else ""
        refused.append(f"Landlock ({error.strerror}{effect})")
    try:
        opens_files = needs_files or (version > 0 and bool(directories or files))
        seccomp.install(seccomp.program(opens_files=opens_files))
        has_filter = True
    except OSError as error:
        refused.append(f"seccomp ({error.strerror})")
    return Confinement(has_filter, version, refused)


def lower_limit(which: int, value: int) -> None:
    """Lower a limit of this process to `value`, unless it is lower already. It cannot be raised
    again."""
    _, hard = resource.getrlimit(which)
    if hard == resource.RLIM_INFINITY or hard > value:
        resource.setrlimit(which, (value, value))
