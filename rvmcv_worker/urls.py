"""The one place that judges a URL from a job: what it names, and whether the operator allows it.

Three kinds are known: an object in storage (``s3://bucket/key``), a file on RVM-Server, and a file on
a listed host. Anything that two parsers could read differently is refused rather than interpreted.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from rvmcv_worker.config import Settings
from rvmcv_worker.errors import UrlForbiddenError

#: Presigned URLs are about 1 kB long.
MAX_URL_LENGTH = 4096
#: S3's own limit, in bytes of UTF-8.
MAX_KEY_BYTES = 1024
#: Where the token goes; a presigned URL never leads there.
API_PREFIX = "/api/v1/cv/"
_DEFAULT_PORTS = {"https": 443, "http": 80}
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]{0,252}[a-z0-9])?|\[[0-9a-f:.]{2,45}\]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class S3Url:
    """An object in the configured storage."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True)
class ServerPath:
    """A file on RVM-Server's own origin, with its query; the controller knows where the token may go."""

    path: str

    def __str__(self) -> str:
        return f"{self.path.partition('?')[0]} on RVM-Server"


@dataclass(frozen=True)
class HttpsUrl:
    """A file on an allowed host; never fetched with the token. Plain http where the operator allows it."""

    url: str
    scheme: str
    host: str  #: lower case; an IPv6 literal without brackets
    port: int
    #: Named in the configuration by itself, not by a pattern such as ``*.example.org``.
    exact: bool

    def __str__(self) -> str:
        """The URL without its query: that of a presigned URL is a secret."""
        return self.url.partition("?")[0]


JobUrl = S3Url | ServerPath | HttpsUrl


def classify(url: str, settings: Settings) -> JobUrl:
    """Say what `url` names; raises `UrlForbiddenError` naming the host and the key to change."""
    if not url or len(url) > MAX_URL_LENGTH:
        raise UrlForbiddenError(f"a URL of {len(url)} characters; it must have 1 to {MAX_URL_LENGTH}")
    if any(c < " " or c == "\x7f" or (c.isspace() and c != " ") for c in url) or url != url.strip():
        raise UrlForbiddenError(f"control characters or blanks in the URL {shown(url)}; remove them")
    if "\\" in url or "#" in url:
        raise UrlForbiddenError(f"a backslash or # in the URL {shown(url)}; encode or remove it")
    if url.lower().startswith("s3://"):
        return _s3(url, settings)
    if " " in url:
        raise UrlForbiddenError(f"blanks in the URL {shown(url)}; write %20")
    if not _SCHEME.match(url):
        return _server_path(url)
    return _https(url, settings)


def shown(url: str) -> str:
    """`url` for people and logs: without query and user part, escaped, cut."""
    bare = re.sub(r"(//)[^/@]*@", r"\1…@", url.partition("?")[0])
    return ascii(bare[:120] + ("…" if len(bare) > 120 else ""))


def without_token(target: JobUrl, settings: Settings) -> HttpsUrl | None:
    """Return where a presigned URL leads; None where that is no place for one (the API, ``s3://``)."""
    if isinstance(target, ServerPath) and not target.path.startswith(API_PREFIX):
        scheme, host, port = origin(settings.server.url)
        return HttpsUrl(f"{scheme}://{_entry(host, port)}{target.path}", scheme, host, port, exact=True)
    return target if isinstance(target, HttpsUrl) else None


def checked_addresses(target: HttpsUrl) -> tuple[str, ...]:
    """Resolve the host and return its addresses; raises `UrlForbiddenError` for one not to be reached.

    A host that the operator named may be private (storage in a Tailscale net has 100.64.0.0/10), one
    that only a pattern matches must be global. Link-local addresses, where clouds keep their metadata,
    are reached by a literal in the list only. Raises `OSError` when the name does not resolve.
    """
    found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    texts = tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
    if _is_literal(target.host):
        return texts
    for text in texts:
        address = _unwrapped(ipaddress.ip_address(text.partition("%")[0]))
        never = address.is_link_local or address.is_multicast or address.is_unspecified
        if never or not (target.exact or address.is_global):
            raise UrlForbiddenError(
                f"the host {target.host} resolves to {address}, which is not a public address; if that is"
                f" meant, put {address if never else target.host} itself into storage.allowed_hosts"
            )
    return texts


def _s3(url: str, settings: Settings) -> S3Url:
    bucket, _, key = url[len("s3://") :].partition("/")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise UrlForbiddenError(f"not a bucket's name in {shown(url)}; the form is s3://bucket/key")
    if "?" in key or len(key.encode("utf-8", "replace")) > MAX_KEY_BYTES or not key.isprintable():
        raise UrlForbiddenError(f"not an object's key in {shown(url)}; the form is s3://bucket/key")
    if any(part in {"", ".", ".."} for part in key.split("/")):
        raise UrlForbiddenError(f"the key in {shown(url)} has an empty, '.' or '..' part; name it in full")
    if settings.storage.s3_endpoint is None:
        raise UrlForbiddenError(
            f"{shown(url)} lies in object storage, and this worker has none; set storage.s3_endpoint"
        )
    return S3Url(bucket, key)


def _server_path(url: str) -> ServerPath:
    path = url if url.startswith("/") else f"/{url}"
    if path.startswith("//"):
        raise UrlForbiddenError(f"{shown(url)} is neither a path nor a URL with a scheme; write https://…")
    _check_path(path.partition("?")[0], url)
    return ServerPath(path)


def _https(url: str, settings: Settings) -> ServerPath | HttpsUrl:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UrlForbiddenError(f"{shown(url)} is not a URL: its host or port cannot be read") from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise UrlForbiddenError(
            f"the scheme {parts.scheme!r} of {shown(url)} is not allowed;"
            " use https://, s3:// or a path on RVM-Server"
        )
    if "@" in parts.netloc:
        raise UrlForbiddenError(f"a user part in the URL {shown(url)}; remove it")
    host = _host_of(parts, url)
    place = (parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme])
    _check_path(parts.path or "/", url)
    if place == origin(settings.server.url):
        return ServerPath((parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
    return HttpsUrl(url, *place, exact=_listed(*place, settings=settings))


def _host_of(parts: SplitResult, url: str) -> str:
    netloc = parts.netloc.lower()
    bare = netloc[: netloc.rindex(":")] if re.search(r":\d*$", netloc) else netloc
    if not _HOST.fullmatch(bare) or netloc.endswith(":"):
        raise UrlForbiddenError(f"{shown(url)} has no host that can be read; international names as xn--…")
    return bare.strip("[]")


def _check_path(path: str, url: str) -> None:
    """Refuse what a server could resolve to another path than the one that was judged."""
    for part in path.split("/"):
        plain = unquote(part)
        if (
            plain in {".", ".."}
            or "\\" in plain
            or "/" in plain
            or any(c < " " or c == "\x7f" for c in plain)
        ):
            raise UrlForbiddenError(
                f"the path of {shown(url)} has '..' or encoded separators; name it in full"
            )


def _listed(scheme: str, host: str, port: int, *, settings: Settings) -> bool:
    """Return whether the configuration names the host itself (True) or by a pattern (False)."""
    storage = settings.storage
    if storage.s3_endpoint and (scheme, host, port) == origin(storage.s3_endpoint):
        return True
    key = "storage.plain_http_hosts" if scheme == "http" else "storage.allowed_hosts"
    entries = storage.plain_http_hosts if scheme == "http" else storage.allowed_hosts
    default = _DEFAULT_PORTS[scheme]
    wanted = {_entry(host, port)} | ({_entry(host, None)} if port == default else set())
    lowered = {entry.lower() for entry in entries}
    if lowered & wanted:
        return True
    if not _is_literal(host):
        tails = {entry[1:] for entry in lowered if entry.startswith("*.")}
        if any(text.endswith(tail) and text != tail for tail in tails for text in wanted):
            return False
    name = _entry(host, None if port == default else port)
    raise UrlForbiddenError(f"the host {name} is not allowed for {scheme}; if it should be, add it to {key}")


def _entry(host: str, port: int | None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of a URL of the configuration."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS[parts.scheme]


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _unwrapped(address: Address) -> Address:
    """Return the IPv4 address inside an IPv6 one; `ipaddress` calls some of those global."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return inner or address
    return address
