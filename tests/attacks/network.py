"""The network, and every other kind of socket."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

from tests.attacks.attack import attack


def _greeting(family: int, address: Any, kind: int = socket.SOCK_STREAM) -> str:
    with socket.socket(family, kind) as client:
        client.settimeout(2)
        client.connect(address)
        client.send(b"hello")
        return client.recv(100).decode()


@attack("connect to a port of this machine")
def _tcp(targets: dict[str, Any]) -> str:
    return _greeting(socket.AF_INET, ("127.0.0.1", targets["port"]))


@attack("connect to a port of this machine by IPv6", needs="IPv6")
def _tcp6(targets: dict[str, Any]) -> str:
    return _greeting(socket.AF_INET6, ("::1", targets["port6"]))


@attack("send a datagram to a port of this machine")
def _udp(targets: dict[str, Any]) -> str:
    return _greeting(socket.AF_INET, ("127.0.0.1", targets["udp_port"]), socket.SOCK_DGRAM)


@attack("find a route out of this machine", needs="a network")
def _route(_: dict[str, Any]) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # no packet is sent
        return f"from {probe.getsockname()[0]}"


@attack("see the machine's interfaces", needs="a network")
def _interfaces(_: dict[str, Any]) -> str:
    return " ".join(name for _, name in socket.if_nameindex() if name != "lo")


@attack("see the machine's connections")
def _connections(targets: dict[str, Any]) -> str:
    wanted = f":{targets['port']:04X} "
    return " ".join(line.strip() for line in Path("/proc/net/tcp").read_text().splitlines() if wanted in line)


@attack("talk to the daemon's unix socket")
def _unix(targets: dict[str, Any]) -> str:
    return _greeting(socket.AF_UNIX, targets["unix"])


@attack("find unix sockets in the file system")
def _unix_walk(targets: dict[str, Any]) -> str:
    found = []
    for top in ("/run", "/var/run", "/dev", str(Path(targets["unix"]).parent)):
        for directory, _, names in os.walk(top):
            found += [path for name in names if _is_socket(path := f"{directory}/{name}")]
    return " ".join(found)[:200]


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


@attack("talk to an abstract unix socket")
def _abstract(targets: dict[str, Any]) -> str:
    return _greeting(socket.AF_UNIX, f"\0{targets['abstract']}")


@attack("open a socket that leaves by the hypervisor (vsock)", needs="a kernel with vsock")
def _vsock(_: dict[str, Any]) -> str:
    with socket.socket(40, socket.SOCK_STREAM) as opened:
        return f"family {opened.family}"


@attack("open a socket of a rarer family", needs="a kernel with such a family")
def _families(_: dict[str, Any]) -> str:
    usual = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, 40}
    opened = []
    for family in set(range(1, 46)) - usual:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            try:
                socket.socket(family, kind).close()
            except OSError:
                continue
            opened.append(family)
            break
    return " ".join(map(str, opened))


@attack("open a raw socket", by="root")
def _raw(_: dict[str, Any]) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as opened:
        return f"family {opened.family}"
