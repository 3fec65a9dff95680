"""Which addresses a name may lead to. What is judged here is what is connected to: nothing resolves twice.

A name server that answers a public address first and 127.0.0.1 afterwards (DNS rebinding) gets nowhere
so: connections (`checked_connections`) go to the addresses that `checked` returned.
"""

from __future__ import annotations

import errno
import ipaddress
import socket

#: Addresses of one name that are tried; more of them only lengthen a failure.
MAX_ADDRESSES = 8
#: Whoever holds one of these decides where packets to it go on to: the IPv4 address is somewhere inside.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class AddressRefusedError(OSError):
    """A name leads to an address that it may not lead to; the message says what to do."""

    def __init__(self, host: str, address: str, todo: str) -> None:
        super().__init__(
            errno.EACCES,
            f"the host {host} resolves to {address}, which is not a public address; if that is meant, {todo}",
        )


def checked(host: str, port: int, *, may_be_private: bool) -> tuple[str, ...]:
    """Resolve `host` and return its addresses; raises `AddressRefusedError` when one of them is forbidden.

    One bad address among good ones refuses the name: that is no set-up that somebody meant. With
    `may_be_private` (storage in a Tailscale net has 100.64.0.0/10) an address need not be global; link-local
    ones, where clouds keep their metadata, are reached by a literal only. Beside others they are left out
    then: LLMNR, mDNS and a machine's own name give them too. Raises `OSError` when the name does not resolve.
    """
    if is_literal(host):
        return (host,)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label of more than 63 characters
        raise socket.gaierror(socket.EAI_NONAME, "not the name of a host") from None
    reached: list[str] = []
    refusal: AddressRefusedError | None = None
    for text in dict.fromkeys(str(entry[4][0]) for entry in found):
        address = ipaddress.ip_address(text.partition("%")[0])
        inner = _embedded(address)
        shown = f"{address} ({' or '.join(map(str, inner))})" if inner else str(address)
        if _is_special(address) or any(item.is_link_local for item in inner):
            refusal = AddressRefusedError(host, shown, f"name {address} itself in the configuration")
        elif may_be_private or _is_global(address, inner):
            reached.append(text)
        else:
            refusal = AddressRefusedError(host, shown, f"put {host} itself into storage.allowed_hosts")
        if refusal and not may_be_private:
            raise refusal
    if refusal and not reached:
        raise refusal
    return tuple(reached[:MAX_ADDRESSES])


def named_addresses(_scheme: str, host: str, port: int) -> tuple[str, ...]:
    """Return the addresses of a host that the operator named by itself: RVM-Server, its proxy, storage."""
    return checked(host, port, may_be_private=True)


def is_literal(host: str) -> bool:
    """Tell whether `host` is an address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_special(address: Address) -> bool:
    """Link-local, multicast, unspecified: no name of a server leads there."""
    return address.is_link_local or address.is_multicast or address.is_unspecified


def _is_global(address: Address, inner: tuple[ipaddress.IPv4Address, ...]) -> bool:
    """`ipaddress` calls fec0::/10, ::/96 and every form with an IPv4 address inside global."""
    if inner:
        return address not in _LOCAL_NAT64 and all(item.is_global for item in inner)
    return address.is_global and (address.version == 4 or address in _GLOBAL_UNICAST)


def _embedded(address: Address) -> tuple[ipaddress.IPv4Address, ...]:
    """Return the IPv4 addresses that packets to an IPv6 one may end up at."""
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    number = int(address)
    last = ipaddress.IPv4Address(number & 0xFFFFFFFF)
    if address.ipv4_mapped or address in _NAT64:
        return (last,)
    if address in _LOCAL_NAT64:  # RFC 6052: behind a /96 the last bits, behind a /48 around the "u" octet
        around = ipaddress.IPv4Address((number >> 64 & 0xFFFF) << 16 | number >> 40 & 0xFFFF)
        return (last, around)
    if address.sixtofour:
        return (address.sixtofour,)
    return address.teredo or ()
