"""Connections of urllib3 that go to the address that was judged, while TLS and Host keep the name."""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable
from typing import Any, ClassVar

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError
from urllib3.util.connection import create_connection

#: Returns the addresses that scheme, host and port lead to; raises `AddressRefusedError`, `OSError`.
Reach = Callable[[str, str, int], tuple[str, ...]]


class CheckedConnection(HTTPConnection):
    """A connection to the addresses that its `reach` allows, tried in turn."""

    scheme: ClassVar[str] = "http"

    def __init__(self, *args: Any, reach: Reach, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reach = reach

    def _new_conn(self) -> socket.socket:
        addresses = self._reach(self.scheme, self.host, self.port)
        # Shared by all: a name with many dead addresses must not hold a thread many times as long.
        until_s = time.monotonic() + self.timeout if isinstance(self.timeout, (int, float)) else None
        failure: Exception = socket.gaierror(socket.EAI_NONAME, "the name has no address")
        for tried, address in enumerate(addresses):
            left_s = None if until_s is None else (until_s - time.monotonic()) / (len(addresses) - tried)
            try:
                return create_connection(
                    (address, self.port),
                    None if left_s is None else max(left_s, 0.001),
                    source_address=self.source_address,
                    socket_options=self.socket_options,
                )
            except TimeoutError:
                failure = ConnectTimeoutError(self, "no address of the host took the connection in time")
            except OSError as error:
                failure = error
        raise failure


class CheckedTlsConnection(CheckedConnection, HTTPSConnection):
    """The same by TLS; the certificate is that of the name."""

    scheme = "https"


class CheckedPool(HTTPConnectionPool):
    """Connections to one host."""

    ConnectionCls = CheckedConnection


class CheckedTlsPool(HTTPSConnectionPool):
    """The same by TLS."""

    ConnectionCls = CheckedTlsConnection


def pool_classes(
    reach: Reach,
    plain: type[HTTPConnectionPool] = CheckedPool,
    tls: type[HTTPSConnectionPool] = CheckedTlsPool,
) -> dict[str, Any]:
    """Return what a `PoolManager` makes its pools with; it hands `reach` on to each connection."""
    return {"http": functools.partial(plain, reach=reach), "https": functools.partial(tls, reach=reach)}
