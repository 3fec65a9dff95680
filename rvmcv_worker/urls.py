"""The one place that judges a URL from a job: what it names, and whether the operator allows it.

Three kinds are known: an object in storage (``s3://bucket/key``), a file on RVM-Server, and a file on
a listed host. Anything that two parsers could read differently is refused rather than interpreted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from rvmcv_worker.addresses import checked, is_literal
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
#: The list of `[storage]` that allows a scheme.
_LISTS = {"https": "allowed_hosts", "http": "plain_http_hosts"}


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
        return HttpsUrl(f"{scheme}://{_entry(host, port)}{target.path}", scheme, host, port)
    return target if isinstance(target, HttpsUrl) else None


def addresses(scheme: str, host: str, port: int, *, settings: Settings) -> tuple[str, ...]:
    """Return the addresses that a file on another host may come from; raises `AddressRefusedError`.

    A host that the operator named may be private, one that only a pattern matches must be global.
    """
    named = (scheme, host, port) == origin(settings.server.url) or _is_named(scheme, host, port, settings)
    return checked(host, port, may_be_private=named)


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
        port = 0
    if port == 0:
        raise UrlForbiddenError(f"{shown(url)} is not a URL: its host or port cannot be read")
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
    if not (_is_named(*place, settings) or _is_in_pattern(*place, settings)):
        name = _entry(host, None if place[2] == _DEFAULT_PORTS[parts.scheme] else place[2])
        raise UrlForbiddenError(
            f"the host {name} is not allowed for {parts.scheme}; if it should be, add it to"
            f" storage.{_LISTS[parts.scheme]}"
        )
    return HttpsUrl(url, *place)


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


def _is_named(scheme: str, host: str, port: int, settings: Settings) -> bool:
    """Tell whether the configuration names the host itself."""
    endpoint = settings.storage.s3_endpoint
    if endpoint and (scheme, host, port) == origin(endpoint):
        return True
    return not _entries(scheme, settings).isdisjoint(_forms(scheme, host, port))


def _is_in_pattern(scheme: str, host: str, port: int, settings: Settings) -> bool:
    """Tell whether the configuration has a pattern such as ``*.example.org`` that the host matches."""
    if is_literal(host):
        return False
    tails = {entry[1:] for entry in _entries(scheme, settings) if entry.startswith("*.")}
    forms = _forms(scheme, host, port)
    return any(form.endswith(tail) and form != tail for tail in tails for form in forms)


def _entries(scheme: str, settings: Settings) -> set[str]:
    return {entry.lower() for entry in getattr(settings.storage, _LISTS[scheme])}


def _forms(scheme: str, host: str, port: int) -> set[str]:
    """Return how an entry may write the host."""
    return {_entry(host, port)} | ({_entry(host, None)} if port == _DEFAULT_PORTS[scheme] else set())


def _entry(host: str, port: int | None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of a URL of the configuration."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS[parts.scheme]
