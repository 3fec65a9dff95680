"""Rows 4 to 7 and 23 of the fault list: where the worker connects, whom it believes, how much it reads.

Each defence stands beside the attack that works without it, in plain `requests` or `urllib3`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

import rvmcv_worker
from rvmcv_worker import object_store, protocol
from rvmcv_worker.config import (
    ServerSettings,
    Settings,
    StorageSettings,
    TimingSettings,
    WorkerSettings,
    load_credentials,
)
from rvmcv_worker.controller import Controller, ServerUnavailableError
from rvmcv_worker.errors import (
    DatasetUnavailableError,
    JobError,
    ModelUnavailableError,
    UrlForbiddenError,
)
from rvmcv_worker.interrupt import Interrupt
from rvmcv_worker.storage import Storage
from rvmcv_worker.token_source import TokenSource
from rvmcv_worker.transfer import MAX_TRIES
from rvmcv_worker.urls import classify
from tests.file_server import Answer, FileServer, Handler, give, status

TOKEN = "canary-token-9a44"
SECRET = b"what only this machine may read"
#: A public address at which nothing of ours answers.
PUBLIC = "203.1.113.7"
METADATA = "169.254.169.254"


class Names:
    """A name server that answers as scripted, the last answer for ever; addresses are what they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self._really = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)

    def _getaddrinfo(self, host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in self.answers:
            ipaddress.ip_address(host)  # a test asks no real name server
            return self._really(host, *args, **kwargs)
        self.asked.append(host)
        answers = self.answers[host]
        address = answers.pop(0) if len(answers) > 1 else answers[0]
        return self._really(address, *args, **kwargs)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


def _running() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def files() -> Iterator[FileServer]:
    yield from _running()


@pytest.fixture
def elsewhere() -> Iterator[FileServer]:
    yield from _running()


@pytest.fixture
def own() -> Iterator[FileServer]:
    yield from _running()


@dataclass
class Worker:
    """What of a worker talks to others."""

    settings: Settings
    controller: Controller
    storage: Storage
    dest: Path
    interrupt: Interrupt

    def fetch(self, url: str) -> bytes:
        self.storage.fetch(url, self.dest, max_bytes=10_000_000, sha256=None, interrupt=self.interrupt)
        return self.dest.read_bytes()

    def fetch_model(self, name: str) -> bytes:
        self.storage.fetch_model(name, self.dest, max_bytes=10_000_000, sha256=None, interrupt=self.interrupt)
        return self.dest.read_bytes()

    def claim(self) -> protocol.Claim:
        return self.controller.claim("job-1", "7f5b1b0e-3f55-4b52-9d6e-0d9c6c1f0a77")


Make = Callable[..., Worker]


@pytest.fixture
def make(tmp_path: Path, own: FileServer) -> Iterator[Make]:
    made: list[Worker] = []

    def make(*, server: dict[str, Any] | None = None, **storage: Any) -> Worker:
        (tmp_path / "token").write_text(TOKEN)
        (tmp_path / "s3-access-key").write_text("access")
        (tmp_path / "s3-secret-key").write_text("canary-s3-secret")
        quick = {"url": own.url, "connect_timeout_s": 0.1, "read_timeout_s": 0.2}
        settings = Settings(
            server=ServerSettings(**{**quick, **(server or {})}),
            worker=WorkerSettings(credentials_dir=tmp_path, runtime_dir=tmp_path / "run"),
            storage=StorageSettings(**storage),
            timing=TimingSettings(scale=0.001),
        )
        controller = Controller(settings, TokenSource(settings), "0b7e0c52-6a5e-4a8f-9f39-2f1f9f0a3c11")
        store = Storage(settings, load_credentials(settings), controller)
        made.append(Worker(settings, controller, store, tmp_path / "in.zip", Interrupt()))
        return made[-1]

    yield make
    for worker in made:
        worker.storage.close()
        worker.controller.close()
        worker.interrupt.close()


# -- row 23: where a job's URL may lead ----------------------------------------------------------


def test_row_23_a_name_that_turns_private_after_the_check_gets_past_a_plain_client(
    names: Names, files: FileServer
) -> None:
    """The attack: whoever resolves twice checks one address and connects to another."""
    url = f"http://a.cdn.test:{files.server_port}/secret"
    files.on("/secret", give(SECRET))
    names.answers["a.cdn.test"] = [PUBLIC, "127.0.0.1"]
    (checked,) = {entry[4][0] for entry in socket.getaddrinfo("a.cdn.test", files.server_port)}
    assert ipaddress.ip_address(checked).is_global
    assert requests.get(url, timeout=5).content == SECRET


def test_row_23_a_name_that_turns_private_after_the_check_is_never_connected_to(
    names: Names, files: FileServer, make: Make
) -> None:
    url = f"http://a.cdn.test:{files.server_port}/secret"
    files.on("/secret", give(SECRET))
    worker = make(plain_http_hosts=(f"*.cdn.test:{files.server_port}",))
    names.answers["a.cdn.test"] = [PUBLIC, "127.0.0.1"]
    with pytest.raises(UrlForbiddenError, match=r"a\.cdn\.test resolves to 127\.0\.0\.1"):
        worker.fetch(url)
    assert names.asked == ["a.cdn.test"] * 2, "one try at the public address, and one that was refused"
    assert files.seen == []
    assert not worker.dest.exists()


@pytest.mark.parametrize("way", ["file", "rvm-server", "s3"])
def test_row_23_what_was_checked_is_what_is_connected_to(
    names: Names, files: FileServer, make: Make, way: str
) -> None:
    place = f"http://host.test:{files.server_port}"
    names.answers["host.test"] = ["127.0.0.1", "127.0.0.66"]  # the second would be refused: nobody listens
    settings: dict[str, Any] = {
        "file": {"plain_http_hosts": (f"host.test:{files.server_port}",)},
        "rvm-server": {"server": {"url": place}},
        "s3": {"s3_endpoint": place},
    }[way]
    files.on("/datasets/a", give(SECRET))
    url = {"file": f"{place}/datasets/a", "rvm-server": "/datasets/a", "s3": "s3://datasets/a"}[way]
    assert make(**settings).fetch(url) == SECRET
    assert names.asked == ["host.test"]
    assert [seen.headers["Host"] for seen in files.seen] == [f"host.test:{files.server_port}"]


@pytest.mark.parametrize("way", ["file", "rvm-server", "s3"])
def test_row_23_even_the_operators_own_names_never_lead_to_a_clouds_metadata(
    names: Names, make: Make, way: str
) -> None:
    names.answers["host.test"] = [METADATA]
    settings: dict[str, Any] = {
        "file": {"plain_http_hosts": ("host.test",)},
        "rvm-server": {"server": {"url": "http://host.test"}},
        "s3": {"s3_endpoint": "http://host.test"},
    }[way]
    url = {"file": "http://host.test/a", "rvm-server": "/a", "s3": "s3://datasets/a"}[way]
    worker = make(**settings)
    with pytest.raises(JobError, match=f"resolves to {METADATA}") as caught:
        worker.fetch(url)
    assert isinstance(caught.value, UrlForbiddenError if way == "file" else DatasetUnavailableError)
    if way == "s3":
        works, sentence = worker.storage.check()
        assert (works, METADATA in sentence) == (False, True)
    if way == "rvm-server":
        with pytest.raises(ServerUnavailableError, match="resolves to"):
            worker.claim()


def test_row_23_one_bad_address_among_good_ones_refuses_the_name(
    monkeypatch: pytest.MonkeyPatch, files: FileServer, make: Make
) -> None:
    def both(_host: str, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, port)) for text in (PUBLIC, "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    worker = make(plain_http_hosts=(f"*.cdn.test:{files.server_port}",))
    with pytest.raises(UrlForbiddenError, match="resolves to"):
        worker.fetch(f"http://a.cdn.test:{files.server_port}/secret")
    assert files.seen == []


def test_dead_addresses_share_the_time_for_connecting(monkeypatch: pytest.MonkeyPatch, make: Make) -> None:
    full = socket.create_server(("", 0), backlog=0)
    port = full.getsockname()[1]
    waiting = [socket.socket() for _ in range(4)]
    try:
        for client in waiting:  # its queue is full now: further connections hang
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        many = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", port)) for n in range(1, 9)]
        really = socket.getaddrinfo
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *a, **k: many if host == "host.test" else really(host, *a, **k),
        )
        worker = make(plain_http_hosts=(f"host.test:{port}",))
        started_s = time.monotonic()
        with pytest.raises(DatasetUnavailableError, match="no connection within the time"):
            worker.fetch(f"http://host.test:{port}/a")
        assert time.monotonic() - started_s < MAX_TRIES * 0.15 + 2, "not eight times as long"
    finally:
        for client in waiting:
            client.close()
        full.close()


# -- row 4: answers without end ------------------------------------------------------------------


def _header_after_header(handler: Handler) -> None:
    """Each line comes in time, and the last one never does."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.release.wait(0.02):
        handler.wfile.write(b"X-Nothing: x\r\n")
    handler.close_connection = True


def _continue_after_continue(handler: Handler) -> None:
    while not handler.server.release.wait(0.02):
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    handler.close_connection = True


def _dripping_error(handler: Handler) -> None:
    handler.start(403, Content_Length=1_000_000, Content_Type="application/xml")
    while not handler.server.release.wait(0.05):
        handler.wfile.write(b" ")
    handler.close_connection = True


def _endless_error(handler: Handler) -> None:
    handler.send_response(500)
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not handler.server.release.is_set():  # until the client closes the connection
        handler.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")


def test_row_04_a_plain_client_waits_for_headers_as_long_as_they_come(files: FileServer) -> None:
    """The attack: time-outs count from byte to byte."""
    url = files.on("/a", _header_after_header)
    started_s = time.monotonic()
    with pytest.raises(requests.RequestException):  # http.client has enough of the hundredth header
        requests.get(url, timeout=0.25)
    assert time.monotonic() - started_s > 1.5


@pytest.mark.parametrize(
    ("way", "answer"),
    [
        ("file", _header_after_header),
        ("file", _continue_after_continue),
        ("file", _dripping_error),
        ("rvm-server", _header_after_header),
        ("rvm-server", _dripping_error),
        ("model", _continue_after_continue),
    ],
)
def test_row_04_headers_and_errors_that_never_end_are_cut_at_the_deadline(
    files: FileServer, own: FileServer, make: Make, way: str, answer: Answer
) -> None:
    worker = make(plain_http_hosts=(files.place,))
    own.on("/a", answer)
    own.on("/api/v1/cv/download-model/n", answer)
    url = {"file": files.on("/a", answer), "rvm-server": "/a"}.get(way)
    started_s = time.monotonic()
    with pytest.raises((DatasetUnavailableError, ModelUnavailableError)):
        worker.fetch(url) if url else worker.fetch_model("n")
    assert time.monotonic() - started_s < MAX_TRIES * 0.4 + 2


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (_endless_error, "connection broke|over"),
        (status(403, b"<html>no</html>", Content_Type="text/html"), "403.*really an S3 endpoint"),
        (status(403, b"<Error><Code>", Content_Type="application/xml"), "not XML.*really an S3 endpoint"),
        (status(403, b"\xff\xfe\x00", Content_Type="application/xml"), "not XML.*really an S3 endpoint"),
        (status(307, Location="http://127.0.0.1:9/a"), "307|redirect"),
    ],
    ids=["endless", "html", "cut", "rubbish", "redirect"],
)
def test_row_04_an_s3_that_answers_nonsense_is_unavailable(
    files: FileServer, make: Make, answer: Answer, says: str
) -> None:
    files.on("/datasets/a", answer)
    with pytest.raises(DatasetUnavailableError, match=says):
        make(s3_endpoint=files.url).fetch("s3://datasets/a")


def test_row_04_an_answer_of_s3_that_drips_for_ever_is_cut(
    files: FileServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_ANSWER_LIMIT_S", 0.3)
    files.on("/models/cv/doctor-probe", _dripping_error)
    works, sentence = make(s3_endpoint=files.url).storage.check()
    assert (works, "no whole answer" in sentence) == (False, True), sentence


def test_row_04_entities_of_an_s3_error_do_not_grow(files: FileServer, make: Make) -> None:
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    bomb = f'<!DOCTYPE x [<!ENTITY e0 "ha">{levels}]><Error><Code>&e9;</Code></Error>'.encode()
    files.on("/models/cv/doctor-probe", status(403, bomb, Content_Type="application/xml"))
    works, sentence = make(s3_endpoint=files.url).storage.check()
    assert (works, "not XML" in sentence) == (False, True)


# -- row 5: who sees the token -------------------------------------------------------------------


def test_row_05_a_plain_client_follows_a_redirect(files: FileServer, elsewhere: FileServer) -> None:
    """The attack: a header other than `Authorization` goes along, and so does the request itself."""
    url = files.on("/a", status(302, Location=elsewhere.url + "/b"))
    requests.get(url, headers={"X-Token": TOKEN}, timeout=5)
    assert [seen.headers["X-Token"] for seen in elsewhere.seen] == [TOKEN]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("way", ["claim", "file", "rvm-server", "s3"])
def test_row_05_no_redirect_is_followed(
    files: FileServer, own: FileServer, elsewhere: FileServer, make: Make, way: str, code: int
) -> None:
    redirect = status(code, Location=elsewhere.url + "/b", Content_Type="application/xml")
    worker = make(plain_http_hosts=(files.place, elsewhere.place), s3_endpoint=files.url)
    for server in (own, files):
        for path in ("/api/v1/cv/job-status", "/datasets/a"):
            server.on(path, redirect)
    url = {"file": f"{files.url}/datasets/a", "rvm-server": "/datasets/a", "s3": "s3://datasets/a"}.get(way)
    with pytest.raises((ServerUnavailableError, DatasetUnavailableError)):
        worker.fetch(url) if url else worker.claim()
    assert elsewhere.seen == []
    assert own.seen + files.seen


def test_row_05_the_one_redirect_that_is_followed_takes_no_secret_along(
    own: FileServer, elsewhere: FileServer, make: Make
) -> None:
    own.on("/api/v1/cv/download-model/n", status(302, Location=elsewhere.url + "/n.pt?sig=1"))
    elsewhere.on("/n.pt", give(SECRET))
    assert make(plain_http_hosts=(elsewhere.place,)).fetch_model("n") == SECRET
    (seen,) = elsewhere.seen
    assert TOKEN in str(own.seen[0].headers)
    assert TOKEN not in str(seen.headers)
    assert not {name.lower() for name in seen.headers} & {"authorization", "cookie", "referer"}


@pytest.mark.parametrize("location", ["http://[", "//[::1", "http://a:b/", "\\\\x", "", "http://\xe9/"])
def test_row_05_a_redirect_to_what_is_no_url_is_refused(own: FileServer, make: Make, location: str) -> None:
    for path in ("download-model/n", "job-status"):
        own.on(f"/api/v1/cv/{path}", status(302, Location=location))
    worker = make()
    with pytest.raises((UrlForbiddenError, ModelUnavailableError)):
        worker.fetch_model("n")
    with pytest.raises(ServerUnavailableError, match="redirects to"):
        worker.claim()


# -- row 6: the environment ----------------------------------------------------------------------


def _vouch(monkeypatch: pytest.MonkeyPatch, certificate: Path) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, str(certificate))


def test_row_06_the_environment_makes_a_plain_client_trust_anybody(
    files: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack."""
    _vouch(monkeypatch, files.speak_tls(tmp_path))
    assert requests.get(files.on("/a", give(SECRET)), timeout=5).content == SECRET


@pytest.mark.parametrize("way", ["claim", "file", "rvm-server", "s3"])
def test_row_06_neither_certificates_nor_proxies_nor_netrc_of_the_environment_count(
    files: FileServer,
    elsewhere: FileServer,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    certificate = files.speak_tls(tmp_path)
    _vouch(monkeypatch, certificate)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, elsewhere.url)
        monkeypatch.setenv(name.lower(), elsewhere.url)
    files.on("/datasets/a", give(SECRET))
    worker = make(server={"url": files.url}, allowed_hosts=(files.place,), s3_endpoint=files.url)
    url = {"file": f"{files.url}/datasets/a", "rvm-server": "/datasets/a", "s3": "s3://datasets/a"}.get(way)
    with pytest.raises((ServerUnavailableError, DatasetUnavailableError), match="certificate refused"):
        worker.fetch(url) if url else worker.claim()
    assert files.seen == elsewhere.seen == []
    # Named in the configuration, the same certificate is as good as any.
    server = {"url": files.url, "ca_file": certificate}
    named = make(server=server, allowed_hosts=(files.place,), s3_endpoint=files.url)
    if url:
        assert named.fetch(url) == SECRET
        assert "Basic" not in str(files.seen[-1].headers)
    assert elsewhere.seen == []


# -- row 7: certificates -------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["claim", "file", "rvm-server", "s3"])
@pytest.mark.parametrize("fault", ["expired", "other name", None])
def test_row_07_a_certificate_is_that_of_the_name_although_the_address_was_chosen(
    names: Names, files: FileServer, make: Make, tmp_path: Path, way: str, fault: str | None
) -> None:
    host = None if fault == "other name" else "host.test"
    certificate = files.speak_tls(tmp_path, expired=fault == "expired", host=host)
    names.answers["host.test"] = ["127.0.0.1"]
    place = f"https://host.test:{files.server_port}"
    worker = make(
        server={"url": place, "ca_file": certificate},
        allowed_hosts=(f"host.test:{files.server_port}",),
        s3_endpoint=place if way == "s3" else None,
    )
    claim = b'{"lease_token": "t", "attempt": 1, "lease_s": 60}'
    files.on("/api/v1/cv/job-status", status(200, claim))
    files.on("/datasets/a", give(SECRET))
    url = {"file": f"{place}/datasets/a", "rvm-server": "/datasets/a", "s3": "s3://datasets/a"}.get(way)
    if fault:
        with pytest.raises((ServerUnavailableError, DatasetUnavailableError), match="certificate refused"):
            worker.fetch(url) if url else worker.claim()
        assert files.seen == []
    else:
        assert (worker.fetch(url) == SECRET) if url else worker.claim().attempt == 1
        assert files.seen[0].headers["Host"] == f"host.test:{files.server_port}"
    assert set(files.asked_for) == {"host.test"}


def test_row_07_no_line_of_ours_turns_verification_off() -> None:
    off = re.compile(
        r"verify\s*=\s*(False|0|None)|CERT_NONE|CERT_OPTIONAL|check_hostname\s*=|assert_hostname\s*="
        r"|_create_unverified|cert_check\s*=|insecure",
        re.IGNORECASE,
    )
    sources = sorted(Path(rvmcv_worker.__file__).parent.rglob("*.py"))
    assert len(sources) > 100
    found = [
        f"{source.name}: {line.strip()}"
        for source in sources
        for line in source.read_text().splitlines()
        if off.search(line)
    ]
    assert found == []
    assert off.search("requests.get(url, verify = False)")


def test_a_port_of_nought_is_no_way_past_the_list(make: Make) -> None:
    """The default port for one parser, port 0 for another."""
    with pytest.raises(UrlForbiddenError, match="port"):
        classify("https://images.test:0/a", make(allowed_hosts=("images.test",)).settings)
