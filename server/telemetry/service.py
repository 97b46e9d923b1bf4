"""Reports of the server's state to systemd."""

import contextlib
import os
import socket

_VARIABLE = "NOTIFY_SOCKET"


def notify(state: str) -> None:
    """Tell systemd, if it asked for it (`Type=notify`; sd_notify(3))."""
    address = os.environ.get(_VARIABLE)
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    # A supervisor that no longer listens must not stop the server.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.sendto(state.encode(), address)
