"""Which addresses a name may lead to."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from rvmcv_worker.addresses import MAX_ADDRESSES, AddressRefusedError, checked
from rvmcv_worker.config import ServerSettings, Settings, StorageSettings
from rvmcv_worker.urls import addresses

PUBLIC = "93.184.216.34"


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """No name server of ours can be asked in a test: the resolver's answer is given."""

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        families = [ipaddress.ip_address(text.partition("%")[0]).version for text in answers]
        kinds = [socket.AF_INET if version == 4 else socket.AF_INET6 for version in families]
        return [
            (kind, socket.SOCK_STREAM, 6, "", (text, port)) for kind, text in zip(kinds, answers, strict=True)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "127.0.0.1",
        "100.64.0.9",
        "192.168.1.1",
        "198.18.0.1",
        "240.0.0.1",
        "::1",
        "fd00::1",
        "fec0::1",
        "::a00:1",
        "::ffff:10.0.0.1",
        "::ffff:100.64.0.9",
        "64:ff9b::a00:1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::a00:1",
        "64:ff9b:1:5db8:d8:2200::",
        "2002:a00:1::",
        "2002:6440:9::",
        "2001:0:5db8:d822::f5ff:fffe",
        "2001:db8::7",
    ],
)
def test_only_a_host_named_by_itself_may_be_private(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    resolving(monkeypatch, PUBLIC, address)
    assert checked("images.test", 443, may_be_private=True) == (PUBLIC, address)
    with pytest.raises(AddressRefusedError, match=r"not a public address.*put a\.cdn\.test itself"):
        checked("a.cdn.test", 443, may_be_private=False)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "fe80::1%eth0",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a9fe:a9fe",
        "64:ff9b:1:a9fe:a9:fe00::",
        "2002:a9fe:a9fe::",
        "0.0.0.0",
        "224.0.0.1",
        "ff0e::1",
        "::",
    ],
)
def test_no_name_leads_to_the_metadata_of_a_cloud(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    resolving(monkeypatch, address)
    with pytest.raises(AddressRefusedError, match=r"not a public address.*itself in the configuration"):
        checked("images.test", 443, may_be_private=True)
    resolving(monkeypatch, address, "10.0.0.1")
    assert checked("images.test", 443, may_be_private=True) == ("10.0.0.1",)
    resolving(monkeypatch, PUBLIC, address)
    with pytest.raises(AddressRefusedError, match=r"not a public address.*itself in the configuration"):
        checked("a.cdn.test", 443, may_be_private=False)


@pytest.mark.parametrize(
    "address",
    [PUBLIC, "2606:2800:220:1::1", "64:ff9b::5db8:d822", "2002:5db8:d822::", "::ffff:93.184.216.34"],
)
def test_a_public_address_is_reached_by_pattern(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    resolving(monkeypatch, address, address)
    assert checked("a.cdn.test", 443, may_be_private=False) == (address,)


def test_a_name_of_a_thousand_addresses_is_tried_at_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, *(f"93.184.{n // 250}.{n % 250 + 1}" for n in range(1000)))
    assert len(checked("a.cdn.test", 443, may_be_private=False)) == MAX_ADDRESSES


def test_a_literal_is_reached_where_it_was_listed() -> None:
    assert checked("169.254.10.10", 443, may_be_private=True) == ("169.254.10.10",)


def test_what_is_no_name_does_not_resolve() -> None:
    with pytest.raises(OSError, match="not the name of a host"):
        checked("a" * 64 + ".test", 443, may_be_private=True)


@pytest.mark.parametrize(
    ("place", "may"),
    [
        (("https", "rvm-server.test", 443), True),
        (("https", "rvm-server.test", 444), False),
        (("http", "minio.test", 9000), True),
        (("https", "minio.test", 9000), False),
        (("https", "images.test", 443), True),
        (("http", "images.test", 80), False),
        (("http", "plain.test", 80), True),
        (("https", "a.cdn.test", 443), False),
        (("https", "unheard-of.test", 443), False),
    ],
)
def test_the_configuration_says_who_may_be_private(
    monkeypatch: pytest.MonkeyPatch, place: tuple[str, str, int], may: bool
) -> None:
    settings = Settings(
        server=ServerSettings(url="https://rvm-server.test"),
        storage=StorageSettings(
            s3_endpoint="http://minio.test:9000",
            allowed_hosts=("Images.test", "*.cdn.test"),
            plain_http_hosts=("plain.test",),
        ),
    )
    resolving(monkeypatch, "10.0.0.1")
    if may:
        assert addresses(*place, settings=settings) == ("10.0.0.1",)
    else:
        with pytest.raises(AddressRefusedError):
            addresses(*place, settings=settings)
