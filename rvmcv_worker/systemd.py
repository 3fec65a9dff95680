"""The notifications that systemd asks of a `Type=notify` service; silent when systemd is not there."""

from __future__ import annotations

import os
import socket

from loguru import logger

#: Longest that one notification may take, in seconds: the main loop sends them.
_PATIENCE_S = 0.5


def notify(*lines: str) -> None:
    """Send lines such as ``READY=1`` or ``STATUS=…`` to the service manager.

    One that it does not take is dropped: the next tick brings another, and whether a silence is the worker's
    end is systemd's to say.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(_PATIENCE_S)
            sock.connect(address)
            sock.sendall("\n".join(lines).encode())
    except OSError as error:
        logger.debug("systemd did not take {}: {}", lines[0], error)


class Feeder:
    """Feeds the watchdog at each tick, and tells what `systemctl status` shows when that is another line."""

    def __init__(self) -> None:
        self._told = ""

    def feed(self, status: str, *lines: str) -> None:
        """Send `lines` and ``WATCHDOG=1``, and `status` where it is news."""
        news = (f"STATUS={status}",) if status != self._told else ()
        self._told = status
        notify(*lines, "WATCHDOG=1", *news)
