"""Tells systemd how the server is doing, if it asked for it (`Type=notify`; sd_notify(3))."""

import contextlib
import os
import socket


def ready() -> None:
    """Requests can be served."""
    _send("READY=1")


def stopping() -> None:
    """The server drains, and ends then."""
    _send("STOPPING=1")


def _send(state: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    # Nobody may be listening any more, which is no reason to fail.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.sendto(state.encode(), address)
