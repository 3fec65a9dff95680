"""Results into storage and models into RVM-Server, with keys, with presigned slots, and against gates."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker import http_session
from rvmcv_worker.config import (
    ServerSettings,
    Settings,
    StorageSettings,
    TimingSettings,
    WorkerSettings,
    load_credentials,
)
from rvmcv_worker.controller import Controller
from rvmcv_worker.errors import (
    ChecksumMismatchError,
    FencedError,
    JobCancelledError,
    UploadFailedError,
    UploadRejectedError,
    UrlForbiddenError,
    WorkerStoppedError,
)
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.object_store import PART_BYTES
from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.reference.settings import Gate
from rvmcv_worker.reference.settings import Settings as ReferenceSettings
from rvmcv_worker.storage import NoStorageError, Storage, Stored, UploadedModel
from rvmcv_worker.token_source import TokenSource
from rvmcv_worker.uploads import PROBE_JOB_ID
from tests.file_server import FileServer, drop, give, sha256_of, status
from tests.reference_talker import Talker

DATA = b"PK\x03\x04" + random.Random(3).randbytes(300_000)
SHA256 = sha256_of(DATA)
API = "/api/v1/cv"
POST = f"POST {API}/upload-model"
THERE = f"{API}/download-model/{SHA256}"
SLOTS = f"{API}/job-uploads"
CREATED = json.dumps(
    {"status": "success", "data": {"model_id": 7, "sha256_hash": SHA256, "file_size_mb": 0.3}}
)
Make = Callable[..., Storage]


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    wish = Interrupt()
    yield wish
    wish.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "best.pt"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[tuple[Storage, Controller]] = []

    def make(
        url: str, token: str = "a-token", keys: tuple[str, str] | None = None, **storage: Any
    ) -> Storage:
        folder = tmp_path / f"credentials{len(made)}"
        folder.mkdir()
        (folder / "token").write_text(token)
        for name, key in zip(("s3-access-key", "s3-secret-key"), keys or (), strict=False):
            (folder / name).write_text(key)
        settings = Settings(
            server=ServerSettings(url=url),
            worker=WorkerSettings(credentials_dir=folder, runtime_dir=folder / "run"),
            storage=StorageSettings(**storage),
            timing=TimingSettings(scale=0.001),
        )
        controller = Controller(settings, TokenSource(settings), "0b7e0c52-6a5e-4a8f-9f39-2f1f9f0a3c11")
        made.append((Storage(settings, load_credentials(settings), controller), controller))
        return made[-1][0]

    yield make
    for storage, controller in made:
        storage.close()
        controller.close()


@pytest.fixture
def own() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReferenceServer]:
    with ReferenceServer(tmp_path_factory.mktemp("reference")) as running:
        yield running


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReferenceServer]:
    settings = ReferenceSettings(as_today=True, gates=frozenset({Gate.MIMES}))
    with ReferenceServer(tmp_path_factory.mktemp("today"), settings=settings) as running:
        yield running


@dataclass(frozen=True)
class Held:
    """A training job that was claimed."""

    job_id: str
    row: int
    lease_token: str


def _claim(server: ReferenceServer) -> Held:
    talker = Talker(server, job_type="yolo11")
    job_id = talker.queue()
    found = next(job for job in talker.poll(slots=100) if job["job_id"] == job_id)
    return Held(job_id, found["id"], talker.take(job_id))


def _put(storage: Storage, file: Path, interrupt: Interrupt, job: Held, **changes: Any) -> Stored:
    fields = {"job_id": job.job_id, "attempt": 1, "lease_token": job.lease_token, "interrupt": interrupt}
    return storage.put_artifact(file, "best.pt", **{**fields, "patience_s": 0.0, **changes})


def _upload(storage: Storage, file: Path, interrupt: Interrupt, job: Held, **changes: Any) -> UploadedModel:
    fields: dict[str, Any] = {
        "model_name": "yolo11",
        "version": f"v{job.row}-a1",
        "metrics": {"mAP50": 0.9, "per_class": {"can": {"mAP50": 0.8}}},
        "training_job_id": job.row,
        "lease_token": job.lease_token,
        "sha256": sha256_of(file.read_bytes()),
        "stored": None,
        "interrupt": interrupt,
    }
    return storage.upload_model(file, **{**fields, **changes})


JOB = Held("job-1", 1, "lease-1")


# -- artifacts -----------------------------------------------------------------------------------


def _with_keys(make: Make, server: ReferenceServer, **storage: Any) -> Storage:
    keys = (server.s3_access_key, server.s3_secret_key)
    return make(server.url, server.worker_token, keys, **{"s3_endpoint": server.s3_endpoint, **storage})


@pytest.mark.parametrize("size_bytes", [0, 1000, PART_BYTES, 2 * PART_BYTES + 1])
def test_with_keys_of_our_own(
    make: Make, reference: ReferenceServer, tmp_path: Path, interrupt: Interrupt, size_bytes: int
) -> None:
    storage = _with_keys(make, reference)
    file = tmp_path / "a.bin"
    file.write_bytes(random.Random(4).randbytes(size_bytes))
    assert storage.can_store
    stored = _put(storage, file, interrupt, JOB)
    assert stored == Stored(
        "s3://models/cv/job-1/attempt-1/best.pt", size_bytes, sha256_of(file.read_bytes())
    )
    assert reference.read_object(stored.path) == file.read_bytes()
    assert _put(storage, file, interrupt, JOB) == stored


def test_into_presigned_slots(
    make: Make, reference: ReferenceServer, file: Path, interrupt: Interrupt
) -> None:
    storage = make(reference.url, reference.worker_token, plain_http_hosts=(reference.s3_endpoint[7:],))
    job = _claim(reference)
    assert storage.can_store
    assert storage.check()[0]
    stored = _put(storage, file, interrupt, job)
    assert stored.path.startswith("s3://artifacts/")
    assert f"{job.job_id}/attempt-1/best.pt" in stored.path
    assert reference.read_object(stored.path) == DATA
    file.write_bytes(b"")
    assert reference.read_object(_put(storage, file, interrupt, job).path) == b""


def test_a_known_sha256_is_declared_without_another_reading(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on(SLOTS, status(200, _slot(own, "/minio/x")))
    own.on("/minio/x", status(200))
    storage = make(own.url, plain_http_hosts=(own.place,))
    stored = _put(storage, file, interrupt, JOB, sha256="a" * 64)
    assert stored.sha256 == "a" * 64
    (asked,) = own.calls("POST")
    assert json.loads(asked.body)["files"][0]["sha256"] == "a" * 64


def test_an_upload_that_is_tried_again_has_the_hash_of_its_last_try(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on("/models/cv/job-1/attempt-1/best.pt", drop(), status(503), status(200, ETag='"e"'))
    stored = _put(make(own.url, keys=("a", "b"), s3_endpoint=own.url), file, interrupt, JOB)
    assert stored.sha256 == SHA256
    assert own.calls("PUT")[-1].body == DATA


def test_whether_there_is_storage_is_told_only_when_it_is_known(make: Make, own: FileServer) -> None:
    storage = make(own.url)
    steps = [  # answer, can store, known to lack storage
        (503, False, False),
        (404, False, True),
        (503, False, True),
        (422, True, False),
        (404, True, False),  # is not asked for any more
    ]
    own.on(SLOTS, *(status(code) for code, _, _ in steps))
    for _, can_store, lacking in steps:
        assert (storage.can_store, storage.lacking) == (can_store, lacking)
    assert len(own.seen) == 4


def test_a_slot_of_a_job_that_is_anothers_fences(
    make: Make, reference: ReferenceServer, file: Path, interrupt: Interrupt
) -> None:
    storage = make(reference.url, reference.worker_token)
    with pytest.raises(FencedError, match="unknown_job"):
        _put(storage, file, interrupt, JOB)


def test_a_slot_at_a_host_that_is_not_listed_is_not_used(
    make: Make, reference: ReferenceServer, file: Path, interrupt: Interrupt
) -> None:
    storage = make(reference.url, reference.worker_token)
    with pytest.raises(UrlForbiddenError, match=r"storage\.plain_http_hosts"):
        _put(storage, file, interrupt, _claim(reference))


def _slot(server: FileServer, path: str) -> bytes:
    return json.dumps({"uploads": {"best.pt": {"url": server.url + path, "path": "s3://models/x"}}}).encode()


def test_a_slot_gets_the_bytes_and_no_token(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on(SLOTS, status(200, _slot(own, "/minio/x?sig=1")))
    own.on("/minio/x", drop(), status(500), status(200))
    assert _put(make(own.url), file, interrupt, JOB).path == "s3://models/x"
    sent = own.calls("PUT")[-1]
    assert sent.body == DATA
    assert sent.headers["Content-Length"] == str(len(DATA))
    assert sent.headers.get("Authorization") is None
    asked = json.loads(own.calls("POST")[0].body)
    assert asked["files"] == [{"name": "best.pt", "size": len(DATA), "sha256": SHA256}]
    assert len(own.calls("POST")) == 3, "each try gets a slot that is fresh"


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (
            status(403, b"<Code>Expired</Code>"),
            UploadRejectedError,
            "best.pt .300004 bytes. was refused.*403",
        ),
        (status(503), UploadFailedError, "best.pt .300004 bytes. could not be stored.*503"),
        (status(302, Location="http://evil.test/"), UploadRejectedError, "redirects"),
    ],
)
def test_storage_that_does_not_take_it(
    make: Make,
    own: FileServer,
    file: Path,
    interrupt: Interrupt,
    answer: Any,
    error: type[Exception],
    says: str,
) -> None:
    own.on(SLOTS, status(200, _slot(own, "/minio/x")))
    own.on("/minio/x", answer)
    with pytest.raises(error, match=says):
        _put(make(own.url), file, interrupt, JOB)


def test_storage_that_is_away_is_waited_for(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on(SLOTS, *[status(503)] * 12, status(200, _slot(own, "/minio/x")))
    own.on("/minio/x", status(200))
    assert _put(make(own.url), file, interrupt, JOB, patience_s=600_000.0).path == "s3://models/x"


@pytest.mark.parametrize(("code", "known"), [(404, True), (401, True), (401, False)])
def test_a_proxy_that_answers_for_a_server_with_slots_ends_no_job(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt, code: int, known: bool
) -> None:
    storage = make(own.url)
    if known:
        own.on(SLOTS, status(422))
        assert storage.can_store
    own.on(SLOTS, *[status(code, b"<html>")] * 12, status(200, _slot(own, "/minio/x")))
    own.on("/minio/x", status(200))
    assert _put(storage, file, interrupt, JOB, patience_s=600_000.0).path == "s3://models/x"


def test_a_proxy_that_never_leaves_hands_the_job_back(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    storage = make(own.url)
    own.on(SLOTS, status(422), *[status(404, b"<html>")] * 100)
    assert storage.can_store
    with pytest.raises(UploadFailedError):
        _put(storage, file, interrupt, JOB, patience_s=0.0)


def test_a_slot_on_the_api_is_refused(make: Make, own: FileServer, file: Path, interrupt: Interrupt) -> None:
    own.on(SLOTS, status(200, _slot(own, f"{API}/worker-status")))
    with pytest.raises(UploadRejectedError, match="no presigned URL"):
        _put(make(own.url), file, interrupt, JOB)


def test_neither_keys_nor_slots(make: Make, own: FileServer, file: Path, interrupt: Interrupt) -> None:
    storage = make(own.url)
    assert not storage.can_store
    assert json.loads(own.seen[0].body)["job_id"] == PROBE_JOB_ID
    ok, sentence = storage.check()
    assert not ok
    assert "set storage.s3_endpoint" in sentence
    with pytest.raises(NoStorageError, match="no MinIO keys here, no job-uploads"):
        _put(storage, file, interrupt, JOB)


def test_wrong_keys_are_a_refusal(
    make: Make, reference: ReferenceServer, file: Path, interrupt: Interrupt
) -> None:
    storage = make(reference.url, keys=("someone", "else"), s3_endpoint=reference.s3_endpoint)
    with pytest.raises(UploadRejectedError, match=r"InvalidAccessKeyId.*s3-access-key"):
        _put(storage, file, interrupt, JOB)
    assert not storage.check()[0]


def test_a_bucket_that_is_not_there(
    make: Make, reference: ReferenceServer, file: Path, interrupt: Interrupt
) -> None:
    storage = _with_keys(make, reference, s3_bucket="nowhere")
    with pytest.raises(UploadRejectedError, match="NoSuchBucket"):
        _put(storage, file, interrupt, JOB)
    assert storage.check() == (
        False,
        f"{reference.s3_endpoint} has no bucket nowhere: create it, or set storage.s3_bucket",
    )


def test_an_endpoint_that_is_no_storage(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    storage = make(own.url, keys=("a", "b"), s3_endpoint=own.url)
    with pytest.raises(UploadRejectedError, match="is this really an S3 endpoint"):
        _put(storage, file, interrupt, JOB)
    own.on("/models/cv/doctor-probe", drop())
    ok, sentence = storage.check()
    assert not ok
    assert "check storage.s3_endpoint" in sentence


def test_an_upload_in_parts_that_is_interrupted_leaves_nothing(
    make: Make, own: FileServer, tmp_path: Path, interrupt: Interrupt
) -> None:
    begun = b"<InitiateMultipartUploadResult><Bucket>models</Bucket><Key>k</Key><UploadId>u</UploadId>"
    begun += b"</InitiateMultipartUploadResult>"

    def take_part_and_cancel(handler: Any) -> None:
        interrupt.request(StopReason.CANCELLED)
        status(200, ETag='"e"')(handler)

    path = "/models/cv/job-1/attempt-1/best.pt"
    own.on(f"POST {path}", status(200, begun, Content_Type="application/xml"))
    own.on(f"PUT {path}", take_part_and_cancel)
    own.on(f"DELETE {path}", status(204))
    file = tmp_path / "big.bin"
    file.write_bytes(bytes(3 * PART_BYTES))
    with pytest.raises(JobCancelledError):
        _put(make(own.url, keys=("a", "b"), s3_endpoint=own.url), file, interrupt, JOB)
    assert [seen.method for seen in own.seen] == ["POST", "PUT", "DELETE"]


def test_a_stalled_slot_is_cut_by_an_interrupt(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    def cancel_and_hold(handler: Any) -> None:
        interrupt.request(StopReason.CANCELLED)
        handler.hold()

    own.on(SLOTS, status(200, _slot(own, "/minio/x")))
    own.on("/minio/x", cancel_and_hold)
    with pytest.raises(JobCancelledError):
        _put(make(own.url), file, interrupt, JOB)
    assert not own.held_out, "it ended only when the server let go"


# -- models --------------------------------------------------------------------------------------


def test_a_model_is_uploaded_once(
    make: Make, reference: ReferenceServer, file: Path, interrupt: Interrupt
) -> None:
    storage = make(reference.url, reference.worker_token)
    job = _claim(reference)
    uploaded = _upload(storage, file, interrupt, job)
    row = next(model for model in reference.models() if model["version"] == f"v{job.row}-a1")
    assert (uploaded.model_id, uploaded.sha256_hash) == (row["id"], SHA256)
    assert uploaded.file_path is not None
    assert reference.read_object(uploaded.file_path) == DATA
    assert row["metrics"]["per_class"] == {"can": {"mAP50": 0.8}}
    again = _upload(storage, file, interrupt, job)
    assert (again.sha256_hash, again.model_id) == (SHA256, None)
    assert len([model for model in reference.models() if model["sha256_hash"] == SHA256]) == 1


def test_a_model_that_lies_in_storage_is_named_not_sent(
    make: Make, reference: ReferenceServer, file: Path, interrupt: Interrupt
) -> None:
    file.write_bytes(DATA + b"named")
    storage = _with_keys(make, reference)
    job = _claim(reference)
    stored = _put(storage, file, interrupt, job)
    uploaded = _upload(storage, file, interrupt, job, stored=stored)
    assert (uploaded.file_path, uploaded.sha256_hash) == (stored.path, stored.sha256)


def test_a_fenced_attempt_uploads_nothing(
    make: Make, reference: ReferenceServer, file: Path, interrupt: Interrupt
) -> None:
    file.write_bytes(DATA + b"fenced")
    job = _claim(reference)
    with pytest.raises(FencedError):
        _upload(make(reference.url, reference.worker_token), file, interrupt, job, lease_token="another")
    assert all(model["sha256_hash"] != sha256_of(file.read_bytes()) for model in reference.models())


def test_todays_gate_is_named(make: Make, today: ReferenceServer, file: Path, interrupt: Interrupt) -> None:
    with pytest.raises(UploadRejectedError, match=r"300004 bytes.*mimes:pt,onnx looks at the content"):
        _upload(make(today.url, today.worker_token), file, interrupt, _claim(today))


def test_todays_500_after_storing_is_no_second_upload(
    make: Make, today: ReferenceServer, file: Path, interrupt: Interrupt
) -> None:
    file.write_bytes(b"no zip" + DATA)
    storage = make(today.url, today.worker_token)
    job = _claim(today)
    assert _upload(storage, file, interrupt, job).model_id is not None
    assert _upload(storage, file, interrupt, job).model_id is None
    # Another training overwrites the stored bytes under the same version; the old hash is then a lie.
    other = file.with_name("other.pt")
    other.write_bytes(b"no zip either")
    with pytest.raises(UploadRejectedError, match="answered with 5xx 3 times"):
        _upload(storage, other, interrupt, job)
    with pytest.raises(UploadRejectedError, match="with other bytes"):
        _upload(storage, file, interrupt, job)


def test_an_answer_that_was_lost_is_looked_for(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on(THERE, status(404), give(DATA))
    own.on(POST, drop())
    assert _upload(make(own.url), file, interrupt, JOB) == UploadedModel(SHA256, 0.29)
    assert len(own.calls("POST")) == 1


def test_a_model_that_is_there_is_not_sent(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on(THERE, give(DATA))
    _upload(make(own.url), file, interrupt, JOB)
    assert own.calls("POST") == []


def test_only_a_404_means_that_it_is_not_there(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on(THERE, status(401), status(400), status(503), give(DATA))
    _upload(make(own.url), file, interrupt, JOB)
    assert own.calls("POST") == []


def test_the_bytes_count_not_the_header(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on(THERE, give(b"x" * len(DATA), promise=SHA256))
    with pytest.raises(UploadRejectedError, match="other bytes"):
        _upload(make(own.url), file, interrupt, JOB)
    assert own.calls("POST") == []


def test_three_server_errors_with_the_model_not_there(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on(POST, status(500))
    with pytest.raises(UploadRejectedError, match="answered with 5xx 3 times"):
        _upload(make(own.url), file, interrupt, JOB)
    assert len(own.calls("POST")) == 3
    assert len(own.calls("GET")) == 4


def test_the_file_is_sent_where_naming_it_breaks_the_server(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on(POST, status(500), status(500), status(201, CREATED.encode()))
    stored = Stored("s3://models/x", len(DATA), SHA256)
    assert _upload(make(own.url), file, interrupt, JOB, stored=stored).model_id == 7
    kinds = [seen.headers["Content-Type"].split(";")[0] for seen in own.calls("POST")]
    assert kinds == ["application/json", "application/json", "multipart/form-data"]


def test_a_server_that_is_away_costs_no_training(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on(THERE, *[status(503)] * 10, status(404))
    own.on(POST, *[status(404, b"<html>")] * 10, status(401), status(201, CREATED.encode()))
    assert _upload(make(own.url), file, interrupt, JOB).model_id == 7


def test_a_cancelled_job_stops_waiting(make: Make, own: FileServer, file: Path, interrupt: Interrupt) -> None:
    def cancel(handler: Any) -> None:
        interrupt.request(StopReason.CANCELLED)
        status(503, Retry_After=300)(handler)

    own.on(THERE, cancel)
    with pytest.raises(JobCancelledError):
        _upload(make(own.url), file, interrupt, JOB)


@pytest.mark.parametrize("held", ["GET", "POST by its path", "POST as a form"])
def test_a_server_that_takes_a_model_and_says_nothing_is_left_when_the_job_is_to_end(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt, held: str
) -> None:
    def stop_and_hold(handler: Any) -> None:
        interrupt.request(StopReason.WORKER_STOPPED, "a test")
        handler.hold()

    own.on(THERE, stop_and_hold if held == "GET" else status(404))
    own.on(POST, stop_and_hold)
    stored = Stored("s3://models/x", len(DATA), SHA256) if held == "POST by its path" else None
    with http_session.ended_by(interrupt), pytest.raises(WorkerStoppedError, match="a test"):
        _upload(make(own.url), file, interrupt, JOB, stored=stored)
    assert not own.held_out, "it ended only when the server let go"
    assert len(own.calls("POST")) == (held != "GET")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (status(413, b"<html>413 ... nginx/1.24"), r"300004 bytes.*bytes are too many for nginx"),
        (status(422, b'{"errors":{"version":["taken"]}}'), "taken"),
    ],
)
def test_a_refusal_is_final(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt, answer: Any, says: str
) -> None:
    own.on(POST, answer)
    with pytest.raises(UploadRejectedError, match=says):
        _upload(make(own.url), file, interrupt, JOB)
    assert len(own.calls("POST")) == 1


def test_a_server_that_wants_the_file_gets_it_and_is_remembered(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    required = b'{"message": "The model file field is required.", "errors": {"model_file": ["required"]}}'
    own.on(POST, status(422, required), status(201, CREATED.encode()))
    storage = make(own.url)
    stored = Stored("s3://models/x", len(DATA), SHA256)
    for _ in range(2):
        assert _upload(storage, file, interrupt, JOB, stored=stored).model_id == 7
    kinds = [seen.headers["Content-Type"].split(";")[0] for seen in own.calls("POST")]
    assert kinds == ["application/json", "multipart/form-data", "multipart/form-data"]
    named = json.loads(own.calls("POST")[0].body)
    assert (named["file_path"], named["sha256_hash"]) == ("s3://models/x", SHA256)


def test_a_server_that_stored_other_bytes(
    make: Make, own: FileServer, file: Path, interrupt: Interrupt
) -> None:
    own.on(POST, status(201, CREATED.replace(SHA256, "0" * 64).encode()))
    with pytest.raises(ChecksumMismatchError, match="changed on their way"):
        _upload(make(own.url), file, interrupt, JOB)
