"""The controller against a real HTTP server that misbehaves as servers and proxies do."""

from __future__ import annotations

import contextlib
import email
import email.message
import email.utils
import gzip
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker import protocol
from rvmcv_worker.config import ServerSettings, Settings, WorkerSettings
from rvmcv_worker.controller import (
    Controller,
    ControllerError,
    NotFoundError,
    PollAbandonedError,
    ProtocolMissingError,
    RateLimitedError,
    RedirectRefusedError,
    RequestRejectedError,
    ServerUnavailableError,
    TokenRejectedError,
    TooLargeError,
)
from rvmcv_worker.errors import FencedError, UrlForbiddenError
from rvmcv_worker.token_source import Reading, TokenSource
from tests.certificates import self_signed

TOKEN = "canary-token-5d1c"
SIGNED = "https://minio.test/models/x?X-Amz-Signature=canary-signature"
INSTANCE = "0b7e0c52-6a5e-4a8f-9f39-2f1f9f0a3c11"
CLAIM = "7f5b1b0e-3f55-4b52-9d6e-0d9c6c1f0a77"
API = "/api/v1/cv"
GOOD_CLAIM = {"lease_token": "lease-1", "attempt": 1, "lease_s": 60, "report_interval_s": 2}
WAIT_S = 10.0


@dataclass
class Request:
    """What the server saw of one request."""

    method: str
    path: str
    headers: email.message.Message
    body: bytes
    client: tuple[str, int]


Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as the test's script says."""

    protocol_version = "HTTP/1.1"
    server: Server

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def do_GET(self) -> None:
        answers = self.server.script[self.path.split("?")[0]]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        length = 0 if answer in self.server.hasty else int(self.headers.get("Content-Length", 0))
        request = Request(self.command, self.path, self.headers, self.rfile.read(length), self.client_address)
        with self.server.seen_one:
            self.server.seen.append(request)
            self.server.seen_one.notify_all()
        answer(self)

    do_POST = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as its base has it
        """Say nothing."""


@dataclass(eq=False)
class Server(ThreadingHTTPServer):
    """A server with a script: path -> its answers, one after another; the last one stays."""

    script: dict[str, list[Answer]] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)
    hasty: set[Answer] = field(default_factory=set)  # those that do not wait for the request's body
    daemon_threads = True

    def __post_init__(self) -> None:
        self.seen_one = threading.Condition()
        self.sent_bytes = 0
        self.gone = threading.Event()  # the client has closed the connection of an endless answer
        self.release = threading.Event()  # lets a held answer go
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def on(self, path: str, *answers: Answer) -> None:
        self.script[path if path.startswith("/") else f"{API}/{path}"] = list(answers)

    def wait_for(self, count: int) -> None:
        with self.seen_one:
            assert self.seen_one.wait_for(lambda: len(self.seen) >= count, WAIT_S)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is what these tests are about."""


def says(status: int, body: bytes | str | dict[str, Any] = b"", **headers: str) -> Answer:
    """An answer with a length."""
    data = (
        json.dumps(body).encode()
        if isinstance(body, dict)
        else body
        if isinstance(body, bytes)
        else body.encode()
    )

    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if status != 204:
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def endless(
    piece: bytes,
    *,
    status: str = "200 OK",
    headers: str = "",
    pause_s: float = 0.0,
    limit_bytes: int = 1 << 40,
) -> Answer:
    """An answer that goes on until the client leaves or `limit_bytes` are sent."""

    def answer(handler: Handler) -> None:
        server = handler.server
        handler.wfile.write(f"HTTP/1.1 {status}\r\n{headers}".encode())
        try:
            while server.sent_bytes < limit_bytes and not server.release.wait(pause_s):
                handler.wfile.write(piece)
                server.sent_bytes += len(piece)
        except OSError:
            server.gone.set()
        handler.close_connection = True

    return answer


def held(handler: Handler) -> None:
    """No answer until the test releases it."""
    handler.server.release.wait(WAIT_S)
    says(204)(handler)


def truncated(handler: Handler) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{"lease_token": "le')
    handler.close_connection = True


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def elsewhere() -> Iterator[Server]:
    """Another host that must not hear of anything."""
    with serving() as running:
        yield running


Connect = Callable[..., Controller]


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    made: list[Controller] = []

    def connect(url: str, **server: Any) -> Controller:
        (tmp_path / "token").write_text(TOKEN)
        patience: dict[str, Any] = {"connect_timeout_s": 2.0, "read_timeout_s": 5.0, **server}
        settings = Settings(
            server=ServerSettings(url=url, **patience),
            worker=WorkerSettings(runtime_dir=tmp_path / "run", credentials_dir=tmp_path),
        )
        made.append(Controller(settings, TokenSource(settings), INSTANCE))
        return made[-1]

    yield connect
    for controller in made:
        controller.close()


@pytest.fixture
def controller(server: Server, connect: Connect) -> Controller:
    return connect(server.url)


def claim(controller: Controller) -> protocol.Claim:
    return controller.claim("job-1", CLAIM)


def poll(controller: Controller, wait_s: int = 0) -> Any:
    return controller.offer("train", slots=1, gpus_free=0, job_types=["yolo11", "sam2"], wait_s=wait_s)


def upload(controller: Controller, file: Path) -> protocol.UploadedModel:
    fields = protocol.ModelUpload(
        model_name="yolo11",
        version="job-1-a1",
        metrics={"mAP50": float("nan")},
        training_job_id=17,
        lease_token="l",
    )
    return controller.upload_model(fields, file)


def refused(call: Callable[[], object], expected: type[ControllerError]) -> str:
    """Return the message of the error that `call` must raise, which never holds a secret."""
    with pytest.raises(expected) as caught:
        call()
    assert type(caught.value) is expected
    message = str(caught.value)
    assert TOKEN not in message
    assert "canary" not in message
    return message


# -- answers that are as they should be ----------------------------------------------------------


def test_offer_asks_as_the_protocol_says(server: Server, controller: Controller) -> None:
    job = {
        "job_id": "job-1",
        "id": 17,
        "job_type": "yolo11",
        "priority": 0,
        "config": {"epochs": 1},
        "new": 1,
    }
    server.on("job-status", says(200, {"jobs": [job, {**job, "job_id": "../x"}, {"job_id": 5}, None]}))
    good, hostile, unnamed, empty = poll(controller).jobs
    assert (good.job_id, good.id, good.config) == ("job-1", 17, {"epochs": 1})
    assert (hostile.job_id, unnamed.job_id, empty.job_id) == ("../x", None, None)
    assert "job_id" in hostile.reason
    request = server.seen[0]
    assert request.path == (
        f"{API}/job-status?worker_id=vm102&instance_id={INSTANCE}&lane=train&slots=1&gpus_free=0"
        "&wait=0&job_types=yolo11%2Csam2&protocol=1"
    )
    assert request.headers["Authorization"] == f"Bearer {TOKEN}"
    assert request.headers["Accept"] == "application/json"
    assert request.headers["User-Agent"].startswith("rvmcv-worker/")


def test_offer_without_jobs(server: Server, controller: Controller) -> None:
    server.on("job-status", says(204), says(204, Retry_After="7"))
    assert poll(controller).retry_after_s is None
    assert (poll(controller).jobs, poll(controller).retry_after_s) == ((), 7.0)


def test_claim_progress_and_finish(server: Server, controller: Controller) -> None:
    server.on(
        "job-status",
        says(200, {**GOOD_CLAIM, "resume": {"sha256": "not one"}}),
        says(200, {"directive": "cancel"}),
        says(200, {"accepted": True}),
    )
    got = claim(controller)
    assert (got.lease_token, got.attempt, got.lease_s, got.resume) == ("lease-1", 1, 60, None)
    news = {"fraction": 0.5, "losses": {"box": float("nan")}, "epoch": -1, "unknown": 1, "message": "a\0b"}
    assert controller.progress("job-1", "lease-1", 1, news) is protocol.Directive.CANCEL
    controller.finish({"event": "finish", "job_id": "job-1", "result": {"loss": float("inf")}})
    bodies = [json.loads(request.body) for request in server.seen]
    assert bodies[0] == {
        "event": "claim",
        "job_id": "job-1",
        "worker_id": "vm102",
        "instance_id": INSTANCE,
        "claim_id": CLAIM,
        "status": "processing",
    }
    told = bodies[1]["progress"]
    assert told == {"fraction": 0.5, "losses": {"box": None}, "history": [], "message": "a\ufffdb"}
    assert bodies[2]["result"] == {"loss": None}


def test_calls_of_one_thread_share_a_connection(server: Server, controller: Controller) -> None:
    server.on("job-status", says(200, GOOD_CLAIM))
    for _ in range(3):
        claim(controller)
    assert len({request.client for request in server.seen}) == 1


def test_worker_status(server: Server, controller: Controller) -> None:
    server.on("worker-status", says(200, {"leases": {"job-1": "lost"}, "desired_state": "drain"}))
    status = protocol.WorkerStatus(
        worker_id="vm102",
        instance_id=INSTANCE,
        version="1",
        state=protocol.WorkerState.READY,
        claims=protocol.LaneClaims(train=True, infer=False, batch=False),
        uptime_s=1.0,
        sandbox="none",
    )
    answer = controller.worker_status(status)
    assert answer.leases == {"job-1": protocol.LeaseState.LOST}
    assert answer.desired_state is protocol.DesiredState.DRAIN
    assert answer.interval_s.idle == 10
    assert json.loads(server.seen[0].body)["state"] == "ready"


def test_uploads_and_dataset(server: Server, controller: Controller) -> None:
    server.on(
        "job-uploads", says(200, {"uploads": {"a.csv": {"url": SIGNED, "path": "s3://artifacts/a.csv"}}})
    )
    files = [protocol.UploadFile(name="a.csv", size=3, sha256="0" * 64)]
    assert controller.job_uploads("job-1", "l", files)["a.csv"].path == "s3://artifacts/a.csv"
    files.append(protocol.UploadFile(name="b.csv", size=3, sha256="0" * 64))
    assert "b.csv" in refused(lambda: controller.job_uploads("job-1", "l", files), ServerUnavailableError)
    data = {"dataset_id": 3, "name": "waste", "images_count": 9, "download_url": "/storage/x.zip"}
    server.on("datasets/3", says(200, {"status": "success", "data": data}))
    assert controller.dataset(3).download_url == "/storage/x.zip"


def test_model_is_uploaded_from_disk(server: Server, controller: Controller, tmp_path: Path) -> None:
    file = tmp_path / "best.pt"
    content = bytes(range(256)) * 1000
    file.write_bytes(content)
    data = {"model_id": 4, "sha256_hash": "a" * 64, "file_size_mb": 0.25, "file_path": "models/x.pt"}
    server.on("upload-model", says(201, {"status": "success", "data": data}))
    assert upload(controller, file).model_id == 4
    request = server.seen[0]
    head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
    form: dict[str, email.message.Message] = {}
    for part in email.message_from_bytes(head + request.body).walk():
        if name := part.get_param("name", header="content-disposition"):
            form[str(name)] = part
    assert form["model_file"].get_payload(decode=True) == content
    assert form["model_file"].get_filename() == "job-1-a1.pt"
    assert form["training_job_id"].get_payload() == "17"
    assert json.loads(str(form["metrics"].get_payload())) == {"mAP50": None}
    stored = protocol.StoredModelUpload(
        model_name="yolo11",
        version="v1-a1",
        metrics={},
        training_job_id=17,
        lease_token="l",
        file_path="s3://models/best.pt",
        sha256_hash="a" * 64,
    )
    controller.register_model(stored)
    assert json.loads(server.seen[1].body)["file_path"] == "s3://models/best.pt"


def test_courtesy_call(server: Server, controller: Controller) -> None:
    server.on("training-complete", says(200, "<html>thanks</html>"))
    controller.training_complete({"training_job_id": 17, "status": "success", "metrics": "{}"})
    assert json.loads(server.seen[0].body)["status"] == "success"


# -- answers that are not ------------------------------------------------------------------------

HTML = "<html><head><title>404 Not Found</title></head><body>nginx/1.22</body></html>"
LEAKY = (
    f'{{"message": "no", "url": "{SIGNED}", "header": "Authorization: Bearer {TOKEN}", "input": "{TOKEN}"}}'
)


@pytest.mark.parametrize(
    ("answer", "expected", "words"),
    [
        (says(200, HTML), ServerUnavailableError, "not JSON"),
        (says(200, "[]"), ServerUnavailableError, "object"),
        (says(200, "[" * 100_000), ServerUnavailableError, "nested"),
        (says(200, {"lease_token": "x", "attempt": "1", "lease_s": 60}), ServerUnavailableError, "attempt"),
        (says(204), ServerUnavailableError, "not JSON"),
        (says(200, gzip.compress(b"{}"), Content_Encoding="gzip"), ServerUnavailableError, "not JSON"),
        (truncated, ServerUnavailableError, "broke"),
        (says(401, LEAKY), TokenRejectedError, "token"),
        (says(403), TokenRejectedError, "token"),
        (says(404, HTML), ProtocolMissingError, "does not speak"),
        (says(404, {"reason": "because"}), ProtocolMissingError, "does not speak"),
        (says(409, HTML), ServerUnavailableError, "409"),
        (says(409, {"reason": ["taken"]}), ServerUnavailableError, "409"),
        (says(413, HTML.replace("404 Not Found", "413")), TooLargeError, "nginx"),
        (says(413, {"message": "The POST data is too large."}), TooLargeError, "post_max_size"),
        (says(413, {"message": "Over 200 MB"}), TooLargeError, "200 MB"),
        (says(400, LEAKY), RequestRejectedError, "no"),
        (says(422, "x" * 600), RequestRejectedError, "x" * 500),
        (says(429, Retry_After="12"), RateLimitedError, "429"),
        (says(500, LEAKY), ServerUnavailableError, "500"),
        (says(502, HTML), ServerUnavailableError, "502"),
        (says(405), ServerUnavailableError, "405"),
    ],
)
def test_answer_means_what_the_protocol_says(
    server: Server, controller: Controller, answer: Answer, expected: type[ControllerError], words: str
) -> None:
    server.on("job-status", answer, says(200, GOOD_CLAIM))
    message = refused(lambda: claim(controller), expected)
    assert words in message
    assert f"POST {API}/job-status" in message
    assert len(message) < 700
    assert claim(controller).attempt == 1, "the next call works"


@pytest.mark.parametrize("status", [404, 409])
@pytest.mark.parametrize("reason", ["taken", "cancelled", "finished", "ended", "unknown_job"])
def test_known_reason_fences(server: Server, controller: Controller, status: int, reason: str) -> None:
    server.on("job-status", says(status, {"reason": reason, "message": "no"}))
    with pytest.raises(FencedError) as caught:
        controller.progress("job-1", "l", 1, {})
    assert caught.value.reason == reason


def test_reason_does_not_fence_a_poll(server: Server, controller: Controller) -> None:
    server.on("job-status", says(404, {"reason": "unknown_job"}))
    refused(lambda: poll(controller), ProtocolMissingError)


def test_sizes_are_named_when_a_model_is_too_large(
    server: Server, controller: Controller, tmp_path: Path
) -> None:
    file = tmp_path / "best.pt"
    file.write_bytes(bytes(3_000_000))
    server.on("upload-model", says(413, HTML))
    message = refused(lambda: upload(controller, file), TooLargeError)
    assert "3000" in message
    assert "client_max_body_size" in message


def test_gate_that_closes_in_the_middle_of_an_upload_is_named(
    server: Server, controller: Controller, tmp_path: Path
) -> None:
    file = tmp_path / "best.pt"
    file.write_bytes(bytes(20_000_000))
    answer = says(413, HTML, Connection="close")
    server.hasty.add(answer)
    server.on("upload-model", answer)
    assert "nginx" in refused(lambda: upload(controller, file), TooLargeError)


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("The model file failed to upload.", "upload_max_filesize"),
        ("The model file field must be a file of type: pt, onnx.", "mimes"),
    ],
)
def test_gate_of_a_rejected_model_is_named(
    server: Server, controller: Controller, tmp_path: Path, text: str, gate: str
) -> None:
    file = tmp_path / "best.pt"
    file.write_bytes(b"x")
    server.on("upload-model", says(422, {"message": text}))
    assert gate in refused(lambda: upload(controller, file), RequestRejectedError)


@pytest.mark.parametrize(
    ("value", "expected_s"),
    [
        ("17", 17.0),
        ("99999", 300.0),
        ("Fri, 09 Jan 2026 19:31:30 GMT", 90.0),
        ("Fri, 09 Jan 2026 19:00:00 GMT", 0.0),
        ("Fri, 09 Jan 2027 19:00:00 GMT", 300.0),
        ("soon", None),
        ("-5", None),
        ("", None),
    ],
)
def test_retry_after(server: Server, controller: Controller, value: str, expected_s: float | None) -> None:
    def answer(handler: Handler) -> None:
        head = "HTTP/1.1 429 Slow\r\nDate: Fri, 09 Jan 2026 19:30:00 GMT\r\nContent-Length: 0\r\n"
        handler.wfile.write(f"{head}Retry-After: {value}\r\n\r\n".encode())

    server.on("job-status", answer)
    with pytest.raises(RateLimitedError) as caught:
        poll(controller)
    assert caught.value.retry_after_s == expected_s


# -- bodies without end --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers", ["Content-Length: 50000000\r\n\r\n", "\r\n"], ids=["length", "until-close"]
)
@pytest.mark.parametrize("status", ["200 OK", "302 Found", "500 No"])
def test_long_body_is_cut(server: Server, controller: Controller, headers: str, status: str) -> None:
    headers = f"Location: /x\r\n{headers}"
    server.on("job-status", endless(b"x" * 65536, status=status, headers=headers, limit_bytes=50_000_000))
    with pytest.raises(ServerUnavailableError):
        claim(controller)
    assert server.gone.wait(WAIT_S)
    assert server.sent_bytes < 30_000_000


@pytest.mark.parametrize(
    "headers",
    [
        "Content-Length: 5000000\r\n\r\n",
        "\r\n",
        "Transfer-Encoding: chunked\r\n\r\n",
        "X-Endless: ",
    ],
    ids=["length", "until-close", "chunk-size", "headers"],
)
def test_dripping_answer_is_cut_at_the_deadline(server: Server, connect: Connect, headers: str) -> None:
    controller = connect(server.url, connect_timeout_s=0.2, read_timeout_s=0.4)
    server.on("job-status", endless(b"1", headers=headers, pause_s=0.02), says(200, GOOD_CLAIM))
    assert "no whole answer" in refused(lambda: claim(controller), ServerUnavailableError)
    assert server.gone.wait(WAIT_S)
    assert claim(controller).attempt == 1


def test_silence_is_a_timeout_and_the_next_request_uses_a_fresh_connection(
    server: Server, connect: Connect
) -> None:
    controller = connect(server.url, read_timeout_s=0.2)
    server.on("job-status", says(200, GOOD_CLAIM), held, says(200, GOOD_CLAIM))
    claim(controller)
    assert "no whole answer within 0.2 s" in refused(lambda: claim(controller), ServerUnavailableError)
    claim(controller)
    before, during, after = (request.client for request in server.seen)
    assert before == during != after


def test_half_open_connection(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:  # connects, and nobody is there
        controller = connect(f"http://127.0.0.1:{listening.getsockname()[1]}", read_timeout_s=0.2)
        assert "no whole answer" in refused(lambda: claim(controller), ServerUnavailableError)


def test_connection_closed_between_two_requests(server: Server, controller: Controller) -> None:
    def last(handler: Handler) -> None:
        says(200, GOOD_CLAIM)(handler)
        handler.close_connection = True  # without having said so in a header

    server.on("job-status", last, says(200, GOOD_CLAIM))
    claim(controller)
    closed = server.seen[0].client
    with contextlib.suppress(ServerUnavailableError):  # unless the close was noticed before
        claim(controller)
    claim(controller)
    assert server.seen[-1].client != closed


def test_refused_connection(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    message = refused(lambda: claim(connect(f"http://127.0.0.1:{port}")), ServerUnavailableError)
    assert "Connection refused" in message


# -- who sees the token --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_elsewhere_is_refused(
    server: Server, elsewhere: Server, controller: Controller, status: int
) -> None:
    server.on("job-status", says(status, Location=f"{elsewhere.url}/login?token=canary"))
    assert "127.0.0.1" in refused(lambda: claim(controller), RedirectRefusedError)
    assert elsewhere.seen == []


def test_environment_changes_nothing(
    server: Server, elsewhere: Server, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login thief password thief\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, elsewhere.url)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    server.on("job-status", says(200, GOOD_CLAIM))
    claim(connect(server.url))
    assert server.seen[0].headers["Authorization"] == f"Bearer {TOKEN}"
    assert elsewhere.seen == []


def test_proxy_of_the_config_is_used(server: Server, connect: Connect) -> None:
    server.script["http://rvm.test/api/v1/cv/job-status"] = [says(200, GOOD_CLAIM)]
    assert claim(connect("http://rvm.test", proxy=server.url)).attempt == 1
    assert server.seen[0].headers["Host"] == "rvm.test"


def test_cookies_are_not_kept(server: Server, controller: Controller) -> None:
    server.on("job-status", says(200, GOOD_CLAIM, Set_Cookie="laravel_session=1; path=/"))
    claim(controller)
    claim(controller)
    assert server.seen[1].headers["Cookie"] is None


def test_renewed_token_is_used(server: Server, controller: Controller, tmp_path: Path) -> None:
    server.on("job-status", says(200, GOOD_CLAIM))
    token = controller._token
    assert str(token.reload()) == "the token was read again: the same"
    (tmp_path / "run" / "credentials").mkdir(parents=True)
    (tmp_path / "run" / "credentials" / "token").write_text("renewed\n")
    assert token.reload() == Reading(changed=True)
    (tmp_path / "run" / "credentials" / "token").write_text("")
    (tmp_path / "token").unlink()
    being_replaced = token.reload()
    assert not being_replaced.changed
    assert "empty" in str(being_replaced)
    claim(controller)
    assert server.seen[0].headers["Authorization"] == "Bearer renewed"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 with its key, in one file."""
    certificate, key = self_signed(tmp_path)
    file = tmp_path / "server.pem"
    file.write_bytes(key.read_bytes() + certificate.read_bytes())
    return file


def test_certificate_of_nobody_is_refused(server: Server, connect: Connect, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.on("job-status", says(200, GOOD_CLAIM), endless(b"1", headers="\r\n", pause_s=0.02))
    url = server.url.replace("http:", "https:")
    message = refused(lambda: claim(connect(url)), ServerUnavailableError)
    assert "self-signed certificate" in message.replace("self signed", "self-signed")
    assert "ca_file" in message
    assert server.seen == []
    controller = connect(url, ca_file=certificate, connect_timeout_s=0.3, read_timeout_s=0.4)
    assert claim(controller).attempt == 1
    refused(lambda: claim(controller), ServerUnavailableError)  # the deadline cuts TLS too
    assert server.gone.wait(WAIT_S)


# -- polls and stops -----------------------------------------------------------------------------


def test_held_poll_is_abandoned_and_the_rest_goes_on(server: Server, controller: Controller) -> None:
    server.on("job-status", held)
    server.on("datasets/1", says(200, {"data": {"download_url": "/x"}}))
    met: list[BaseException] = []

    def wait_for_jobs() -> None:
        try:
            poll(controller, wait_s=25)
        except ControllerError as error:
            met.append(error)

    thread = threading.Thread(target=wait_for_jobs)
    thread.start()
    server.wait_for(1)
    controller.abandon()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert [type(error) for error in met] == [PollAbandonedError]
    with pytest.raises(PollAbandonedError):
        poll(controller)
    assert controller.dataset(1).download_url == "/x"


# -- files ---------------------------------------------------------------------------------------


def test_file_is_streamed_and_resumed(server: Server, controller: Controller) -> None:
    path = controller.model_path("yolo11n.pt")
    assert path == f"{API}/download-model/yolo11n.pt"
    server.on(
        path,
        says(200, b"0123456789", X_SHA256_Hash="ab", ETag='"1"'),
        says(206, b"6789", Content_Range="bytes 6-9/10"),
    )
    with controller.open_stream(path) as stream:
        assert (b"".join(stream.chunks(3)), stream.offset, stream.size_bytes) == (b"0123456789", 0, 10)
        assert stream.headers["x-sha256-hash"] == "ab"
    with controller.open_stream(path, offset=6, if_range='"1"') as stream:
        assert (b"".join(stream.chunks()), stream.offset, stream.size_bytes) == (b"6789", 6, 10)
    assert server.seen[1].headers["Range"] == "bytes=6-"
    assert server.seen[1].headers["If-Range"] == '"1"'
    assert {request.headers["Authorization"] for request in server.seen} == {f"Bearer {TOKEN}"}


def test_redirect_of_a_model_is_told_and_not_followed(
    server: Server, elsewhere: Server, controller: Controller
) -> None:
    path = controller.model_path("a" * 64)
    server.on(path, says(302, Location=f"{elsewhere.url}/models/x?X-Amz-Signature=s"))
    with controller.open_stream(path) as stream:
        assert stream.location == f"{elsewhere.url}/models/x?X-Amz-Signature=s"
    server.on("/storage/x.zip", says(302, Location=elsewhere.url))
    with pytest.raises(RedirectRefusedError), controller.open_stream("/storage/x.zip"):
        pass
    assert elsewhere.seen == []


def test_token_stays_beneath_the_api(server: Server, elsewhere: Server, controller: Controller) -> None:
    server.on("/storage/x.zip", says(200, b"zip"))
    for url in ("/storage/x.zip", "storage/x.zip", f"{server.url}/storage/x.zip"):
        with controller.open_stream(url) as stream:
            assert b"".join(stream.chunks()) == b"zip"
    assert [request.headers["Authorization"] for request in server.seen] == [None] * 3
    for url in (
        f"{elsewhere.url}{API}/x",
        f"//{elsewhere.url[7:]}/x",
        f"http://user@127.0.0.1:{server.server_port}/x",
        f"{API}/%2e%2e/%2E%2e/admin",
        f"{API}/%252e%252e/admin",
        f"{API}/..\\admin",
        "file:///etc/passwd",
    ):
        with pytest.raises(UrlForbiddenError), controller.open_stream(url):
            pass
    assert len(server.seen) == 3
    assert elsewhere.seen == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (says(404, HTML), NotFoundError),
        (says(404, {"reason": "unknown_job"}), NotFoundError),
        (says(401), TokenRejectedError),
        (says(416), ServerUnavailableError),
        (says(206, b"x", Content_Range="words"), ServerUnavailableError),
        (says(200, b"x", Content_Encoding="gzip"), ServerUnavailableError),
        (truncated, ServerUnavailableError),
    ],
)
def test_file_that_is_not_to_be_had(
    server: Server, controller: Controller, answer: Answer, expected: type[ControllerError]
) -> None:
    server.on("download-model/x", answer)

    def fetch() -> None:
        with controller.open_stream(controller.model_path("x")) as stream:
            for _ in stream.chunks():
                pass

    refused(fetch, expected)


def test_stalled_transfer_is_cut_from_another_thread(server: Server, controller: Controller) -> None:
    server.on("download-model/x", endless(b"", headers="Content-Length: 10\r\n\r\n12345", pause_s=0.02))
    with controller.open_stream(controller.model_path("x")) as stream:
        chunks = stream.chunks(5)
        assert next(chunks) == b"12345"
        threading.Timer(0.05, stream.cut).start()
        with pytest.raises(PollAbandonedError):
            next(chunks)


def test_fault_of_the_reader_is_not_taken_for_one_of_the_server(
    server: Server, controller: Controller
) -> None:
    server.on("download-model/x", says(200, b"data"))
    with (
        pytest.raises(OSError, match="disk full"),
        controller.open_stream(controller.model_path("x")),
    ):
        raise OSError("disk full")


def test_many_threads(server: Server, controller: Controller) -> None:
    server.on("job-status", says(200, GOOD_CLAIM))
    got: list[Mapping[str, Any]] = []

    def work() -> None:
        got.extend(claim(controller).model_dump() for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(got) == 80
    assert len({request.client for request in server.seen}) == 8
