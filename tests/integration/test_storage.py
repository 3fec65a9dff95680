"""Fetching by a job's URL, against servers that cut, lie, change, redirect, refuse and crawl."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rvmcv_worker.config import (
    Credentials,
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
    DatasetInvalidError,
    DatasetUnavailableError,
    ImageInvalidError,
    ImageUnavailableError,
    JobCancelledError,
    JobError,
    ModelInvalidError,
    ModelUnavailableError,
    UrlForbiddenError,
)
from rvmcv_worker.interrupt import Interrupt, StopReason
from rvmcv_worker.reference.server import ReferenceServer
from rvmcv_worker.storage import Fetched, Storage
from rvmcv_worker.token_source import TokenSource
from tests.file_server import FileServer, crawl, drop, endless, give, sha256_of, status

TOKEN = "canary-token-7f21"
DATA = random.Random(1).randbytes(600_000)
OTHER = random.Random(2).randbytes(600_000)
MODEL_PATH = "/api/v1/cv/download-model"


@dataclass
class Worker:
    """Storage as a worker has it, whose RVM-Server is `own` and whose allowed host is `files`."""

    storage: Storage
    dest: Path
    interrupt: Interrupt
    own: FileServer
    files: FileServer
    steps: list[tuple[int, int | None]] = field(default_factory=list)

    def fetch(self, url: str, **changes: Any) -> Fetched:
        options: dict[str, Any] = {"max_bytes": 10_000_000, "sha256": None, "interrupt": self.interrupt}
        options |= {"on_bytes": lambda done, total: self.steps.append((done, total))}
        return self.storage.fetch(url, self.dest, **(options | changes))

    def fetch_model(self, wanted: str, **changes: Any) -> Fetched:
        options: dict[str, Any] = {"max_bytes": 10_000_000, "sha256": None, "interrupt": self.interrupt}
        return self.storage.fetch_model(wanted, self.dest, **(options | changes))


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    wish = Interrupt()
    yield wish
    wish.close()


@pytest.fixture
def files() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def own() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def make(
    tmp_path: Path, interrupt: Interrupt, own: FileServer, files: FileServer
) -> Iterator[Callable[..., Worker]]:
    made: list[tuple[Storage, Controller]] = []

    def make(*, read_timeout_s: float = 30.0, ca_file: Path | None = None, **storage: Any) -> Worker:
        (tmp_path / "token").write_text(TOKEN)
        settings = Settings(
            server=ServerSettings(url=own.url, read_timeout_s=read_timeout_s, ca_file=ca_file),
            worker=WorkerSettings(credentials_dir=tmp_path, runtime_dir=tmp_path / "run"),
            storage=StorageSettings(**{"plain_http_hosts": (files.place,), **storage}),
            timing=TimingSettings(scale=0.001),
        )
        token = TokenSource(settings)
        controller = Controller(settings, token, "0b7e0c52-6a5e-4a8f-9f39-2f1f9f0a3c11")
        made.append((Storage(settings, load_credentials(settings), controller), controller))
        return Worker(made[-1][0], tmp_path / "in.zip", interrupt, own, files)

    yield make
    for storage, controller in made:
        storage.close()
        controller.close()


@pytest.fixture
def worker(make: Callable[..., Worker]) -> Worker:
    return make()


def test_a_file_arrives_whole_and_private(worker: Worker) -> None:
    fetched = worker.fetch(worker.files.on("/a.zip", give(DATA)), sha256=sha256_of(DATA).upper())
    assert fetched == Fetched(worker.dest, len(DATA), sha256_of(DATA))
    assert worker.dest.read_bytes() == DATA
    assert worker.dest.stat().st_mode & 0o777 == 0o600
    assert worker.steps[-1] == (len(DATA), len(DATA))
    assert [done for done, _ in worker.steps] == sorted({done for done, _ in worker.steps})


def test_an_empty_file_is_a_file(worker: Worker) -> None:
    assert worker.fetch(worker.files.on("/a", give(b""))).size_bytes == 0
    assert worker.dest.read_bytes() == b""


def test_the_token_goes_to_the_api_alone(worker: Worker) -> None:
    worker.files.on("/a.zip", give(DATA))
    for path in ("/api/v1/cv/datasets/3/file", "/storage/3.zip"):
        worker.own.on(path, give(DATA))
    urls = [
        worker.files.url + "/a.zip",
        "/api/v1/cv/datasets/3/file",
        "storage/3.zip",
        worker.own.url + "/storage/3.zip",
    ]
    for url in urls:
        assert worker.fetch(url).sha256 == sha256_of(DATA)
        worker.dest.unlink()
    sent = [seen.headers.get("Authorization") for seen in worker.files.seen + worker.own.seen]
    assert sent == [None, f"Bearer {TOKEN}", None, None]
    assert {seen.headers.get("Accept-Encoding") for seen in worker.files.seen + worker.own.seen} == {
        "identity"
    }


@pytest.mark.parametrize("place", ["https", "server", "s3"])
def test_a_cut_is_resumed_where_it_was(
    make: Callable[..., Worker], files: FileServer, own: FileServer, place: str
) -> None:
    worker = make(s3_endpoint=files.url)
    host = own if place == "server" else files
    script = [give(DATA, etag='"v1"', cut_after=200_000), drop(), give(DATA, etag='"v1"')]
    host.on("/api/v1/cv/file" if place == "server" else "/datasets/a.zip", *script)
    url = {"https": files.url + "/datasets/a.zip", "server": "/api/v1/cv/file", "s3": "s3://datasets/a.zip"}[
        place
    ]
    assert worker.fetch(url).sha256 == sha256_of(DATA)
    first, second, third = host.calls()
    assert first.headers.get("Range") is None
    assert second.headers["Range"] == third.headers["Range"]
    assert 0 < int(third.headers["Range"].removeprefix("bytes=").removesuffix("-")) <= 200_000
    assert third.headers.get("If-Range") == (None if place == "s3" else '"v1"')


@pytest.mark.parametrize("place", ["https", "s3"])
def test_a_changed_file_is_not_glued_to_the_old_one(
    make: Callable[..., Worker], files: FileServer, place: str
) -> None:
    worker = make(s3_endpoint=files.url)
    files.on("/datasets/a.zip", give(DATA, etag='"v1"', cut_after=200_000), give(OTHER, etag='"v2"'))
    url = files.url + "/datasets/a.zip" if place == "https" else "s3://datasets/a.zip"
    assert worker.fetch(url).sha256 == sha256_of(OTHER)


def test_a_server_that_ignores_if_range_does_not_mix_two_files_either(worker: Worker) -> None:
    def newer_rest(handler: Any) -> None:
        del handler.headers["If-Range"]
        give(OTHER, etag='"v2"')(handler)

    url = worker.files.on("/a.zip", give(DATA, etag='"v1"', cut_after=200_000), newer_rest)
    assert worker.fetch(url).sha256 == sha256_of(OTHER)


def test_without_an_etag_a_cut_file_is_resumed_only_if_its_hash_will_be_checked(worker: Worker) -> None:
    url = worker.files.on("/a.zip", give(DATA, cut_after=200_000), give(DATA))
    worker.fetch(url)
    assert [seen.headers.get("Range") for seen in worker.files.calls()] == [None, None]
    worker.dest.unlink()
    worker.files.on("/a.zip", give(DATA, cut_after=200_000), give(DATA))
    worker.fetch(url, sha256=sha256_of(DATA))
    assert worker.files.calls()[-1].headers["Range"].startswith("bytes=")


def test_a_server_without_ranges_begins_again(worker: Worker) -> None:
    url = worker.files.on(
        "/a.zip", give(DATA, etag='"v1"', cut_after=200_000), give(DATA, etag='"v1"', ranges=False)
    )
    assert worker.fetch(url).sha256 == sha256_of(DATA)


def test_a_file_that_became_shorter_begins_again(worker: Worker) -> None:
    short = DATA[:100_000]
    url = worker.files.on("/a.zip", give(DATA, cut_after=200_000), give(short))
    assert worker.fetch(url, sha256=sha256_of(short)).size_bytes == len(short)


def test_a_length_that_is_a_lie_ends_as_unavailable(worker: Worker) -> None:
    url = worker.files.on("/a.zip", give(DATA, claim_bytes=len(DATA) + 5, ranges=False))
    with pytest.raises(
        DatasetUnavailableError, match=f"{worker.files.place}/a.zip.*check the data set's URL"
    ):
        worker.fetch(url)
    assert not worker.dest.exists()


def test_a_truncated_file_is_seen_by_its_hash(worker: Worker) -> None:
    url = worker.files.on("/a.zip", give(DATA[:1000]))
    with pytest.raises(
        ChecksumMismatchError, match=f"1000 bytes came with sha256 {sha256_of(DATA[:1000])}, twice"
    ):
        worker.fetch(url, sha256=sha256_of(DATA))
    assert len(worker.files.calls()) == 2
    assert not worker.dest.exists()


def test_wrong_bytes_once_are_fetched_again(worker: Worker) -> None:
    url = worker.files.on("/a.zip", give(OTHER), give(DATA))
    assert worker.fetch(url, sha256=sha256_of(DATA)).sha256 == sha256_of(DATA)
    assert worker.dest.read_bytes() == DATA


@pytest.mark.parametrize("answer", [give(DATA), endless()], ids=["announced", "endless"])
def test_over_the_cap_is_the_jobs_fault(worker: Worker, answer: Any) -> None:
    url = worker.files.on("/a.zip", answer)
    with pytest.raises(
        DatasetInvalidError, match=r"(has 600000|more than 500000) bytes; .* at most 500000; "
    ):
        worker.fetch(url, max_bytes=500_000)
    assert len(worker.files.calls()) == 1
    assert not worker.dest.exists()


def test_each_kind_of_file_has_its_own_errors(worker: Worker) -> None:
    url = worker.files.on("/a.jpg", give(DATA))
    with pytest.raises(ImageInvalidError):
        worker.fetch(url, max_bytes=5, unavailable=ImageUnavailableError)
    with pytest.raises(ImageUnavailableError, match="there is no such file"):
        worker.fetch(worker.files.url + "/none", unavailable=ImageUnavailableError)
    with pytest.raises(ModelInvalidError):
        worker.fetch(url, max_bytes=5, unavailable=ModelUnavailableError)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (status(404), "404: there is no such file"),
        (status(403, b"<Error><Code>AccessDenied</Code></Error>"), "403: access is denied"),
        (status(302, Location="http://evil.test/a"), "302: redirects are not followed"),
        (status(400, b"no\x1b[31m way"), "400: no.*way"),
    ],
)
def test_a_refusal_is_not_tried_for_long(worker: Worker, answer: Any, says: str) -> None:
    with pytest.raises(DatasetUnavailableError, match=says) as caught:
        worker.fetch(worker.files.on("/a.zip", answer) + "?X-Amz-Signature=canary")
    assert len(worker.files.calls()) == 3
    assert "canary" not in caught.value.message
    assert "\x1b" not in caught.value.message
    assert caught.value.handed_back


def test_a_refusal_of_rvm_server_is_told_alike(worker: Worker) -> None:
    with pytest.raises(DatasetUnavailableError, match=r"404.*check the data set's URL"):
        worker.fetch("/api/v1/cv/datasets/9/file")
    assert len(worker.own.calls()) == 3


def test_a_server_in_trouble_is_tried_again(worker: Worker) -> None:
    url = worker.files.on("/a.zip", status(503), status(500), drop(), status(429), give(DATA))
    assert worker.fetch(url).sha256 == sha256_of(DATA)


def test_a_server_that_stays_away_is_unavailable(worker: Worker) -> None:
    with pytest.raises(DatasetUnavailableError, match="HTTP 503"):
        worker.fetch(worker.files.on("/a.zip", status(503)))
    assert len(worker.files.calls()) == 6


def test_what_comes_compressed_is_not_taken(worker: Worker) -> None:
    with pytest.raises(DatasetUnavailableError, match="compressed"):
        worker.fetch(worker.files.on("/a.zip", give(DATA, encoding="gzip")))


def test_a_crawling_server_does_not_hold_a_job(make: Callable[..., Worker], files: FileServer) -> None:
    worker = make(read_timeout_s=0.1)
    with pytest.raises(DatasetUnavailableError, match="slower than 1024 bytes a second"):
        worker.fetch(files.on("/a.zip", crawl(1_000_000)))


@pytest.mark.parametrize("place", ["https", "server", "s3"])
def test_an_interrupt_ends_a_stalled_transfer(
    make: Callable[..., Worker], files: FileServer, own: FileServer, place: str
) -> None:
    worker = make(s3_endpoint=files.url)
    host = own if place == "server" else files
    host.on(
        "/api/v1/cv/file" if place == "server" else "/datasets/a.zip",
        give(DATA, cut_after=200_000, then_hold=True),
    )
    url = {"https": files.url + "/datasets/a.zip", "server": "/api/v1/cv/file", "s3": "s3://datasets/a.zip"}[
        place
    ]
    began = threading.Event()

    def cancel() -> None:
        assert began.wait(10)
        worker.interrupt.request(StopReason.CANCELLED)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(JobCancelledError):
        worker.fetch(url, on_bytes=lambda done, _: began.set() if done > 190_000 else None)
    canceller.join()
    assert not host.held_out, "it ended only when the server let go"
    assert not worker.dest.exists()


def test_an_interrupt_ends_the_wait_between_two_tries(worker: Worker) -> None:
    def refuse(handler: Any) -> None:
        worker.interrupt.request(StopReason.CANCELLED)
        status(503, Retry_After=300)(handler)

    with pytest.raises(JobCancelledError):
        worker.fetch(worker.files.on("/a.zip", refuse))
    assert len(worker.files.calls()) == 1


def test_nothing_that_lies_there_is_overwritten(worker: Worker) -> None:
    worker.dest.symlink_to("/etc/hostname")
    with pytest.raises(FileExistsError):
        worker.fetch(worker.files.on("/a.zip", give(DATA)))
    assert worker.files.seen == []


def test_a_forbidden_host_is_not_asked(make: Callable[..., Worker], files: FileServer) -> None:
    worker = make(plain_http_hosts=())
    with pytest.raises(UrlForbiddenError, match=rf"{files.place} is not allowed.*storage\.plain_http_hosts"):
        worker.fetch(files.on("/a.zip", give(DATA)))
    assert files.seen == []


def test_neither_netrc_nor_proxy_of_the_environment_counts(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    worker.fetch(worker.files.on("/a.zip", give(DATA)))
    assert worker.files.seen[0].headers.get("Authorization") is None


@pytest.mark.parametrize("scheme", ["https", "s3"])
def test_a_certificate_that_nobody_knows_is_refused(
    make: Callable[..., Worker], files: FileServer, tmp_path: Path, scheme: str
) -> None:
    certificate = files.speak_tls(tmp_path)
    url = files.on("/datasets/a.zip", give(DATA)) if scheme == "https" else "s3://datasets/a.zip"
    files.on("/datasets/a.zip", give(DATA))
    places = {"s3_endpoint": files.url, "allowed_hosts": (files.place,)}
    with pytest.raises(DatasetUnavailableError, match=r"refused.*\[server\] ca_file"):
        make(**places).fetch(url)
    assert files.seen == []
    assert make(ca_file=certificate, **places).fetch(url).sha256 == sha256_of(DATA)


def test_a_model_is_what_its_hash_says(worker: Worker) -> None:
    worker.own.on(f"{MODEL_PATH}/yolo11n.pt", give(DATA, promise=sha256_of(DATA)))
    assert worker.fetch_model("yolo11n.pt").sha256 == sha256_of(DATA)


@pytest.mark.parametrize("wanted", ["yolo11n.pt", sha256_of(DATA)])
def test_a_model_with_other_bytes_than_promised_is_refused(worker: Worker, wanted: str) -> None:
    worker.own.on(f"{MODEL_PATH}/{wanted}", give(OTHER, promise=sha256_of(DATA)))
    with pytest.raises(ChecksumMismatchError, match=f"not {sha256_of(DATA)}"):
        worker.fetch_model(wanted)
    assert not worker.dest.exists()


def test_a_hash_that_was_asked_for_outweighs_the_header(worker: Worker) -> None:
    worker.own.on(f"{MODEL_PATH}/{sha256_of(DATA)}", give(DATA, promise=sha256_of(OTHER)))
    assert worker.fetch_model(sha256_of(DATA)).sha256 == sha256_of(DATA)


def test_a_missing_model_says_what_to_do(worker: Worker) -> None:
    with pytest.raises(ModelUnavailableError, match=r"404.*upload the model to RVM-Server"):
        worker.fetch_model("yolo11n.pt")


def test_one_redirect_of_download_model_is_followed_without_the_token(worker: Worker) -> None:
    target = worker.files.on(
        "/models/n.pt", give(DATA, cut_after=200_000, etag='"v1"'), give(DATA, etag='"v1"')
    )
    worker.own.on(f"{MODEL_PATH}/n", status(302, Location=target + "?sig=1", X_SHA256_Hash=sha256_of(DATA)))
    assert worker.fetch_model("n").sha256 == sha256_of(DATA)
    assert [seen.headers.get("Authorization") for seen in worker.files.seen] == [None, None]


def test_a_second_redirect_is_not_followed(worker: Worker) -> None:
    target = worker.files.on("/models/n.pt", status(302, Location=worker.files.url + "/other"))
    worker.own.on(f"{MODEL_PATH}/n", status(302, Location=target))
    with pytest.raises(ModelUnavailableError, match="redirects are not followed"):
        worker.fetch_model("n")


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("http://evil.test/n.pt", "evil.test"),
        ("/api/v1/cv/datasets/1/file", "storage only"),
        ("s3://models/n.pt", "s3"),
    ],
)
def test_a_redirect_elsewhere_is_refused(worker: Worker, location: str, says: str) -> None:
    worker.own.on(f"{MODEL_PATH}/n", status(302, Location=location))
    with pytest.raises(UrlForbiddenError, match=says):
        worker.fetch_model("n")
    assert len(worker.own.seen) == 1


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReferenceServer]:
    with ReferenceServer(tmp_path_factory.mktemp("reference")) as running:
        yield running


@pytest.fixture
def at_reference(reference: ReferenceServer, tmp_path: Path) -> Iterator[Storage]:
    yield from _storage_at(reference, tmp_path, reference.s3_secret_key)


def _storage_at(reference: ReferenceServer, folder: Path, secret_key: str) -> Iterator[Storage]:
    settings = Settings(
        server=ServerSettings(url=reference.url),
        worker=WorkerSettings(credentials_dir=folder, runtime_dir=folder / "run"),
        storage=StorageSettings(s3_endpoint=reference.s3_endpoint),
        timing=TimingSettings(scale=0.001),
    )
    (folder / "token").write_text(reference.worker_token)
    (folder / "s3-access-key").write_text(reference.s3_access_key)
    (folder / "s3-secret-key").write_text(secret_key)
    controller = Controller(settings, TokenSource(settings), "0b7e0c52-6a5e-4a8f-9f39-2f1f9f0a3c11")
    credentials: Credentials = load_credentials(settings)
    storage = Storage(settings, credentials, controller)
    yield storage
    storage.close()
    controller.close()


def _fetch(storage: Storage, url: str, folder: Path, interrupt: Interrupt) -> Fetched:
    return storage.fetch(url, folder / "in.zip", max_bytes=10_000_000, sha256=None, interrupt=interrupt)


def test_an_object_comes_from_storage(
    reference: ReferenceServer, at_reference: Storage, tmp_path: Path, interrupt: Interrupt
) -> None:
    (tmp_path / "a.zip").write_bytes(DATA)
    url = reference.put_object("datasets", "a b/ä.zip", tmp_path / "a.zip")
    assert _fetch(at_reference, url, tmp_path, interrupt).sha256 == sha256_of(DATA)
    assert at_reference.check() == (
        True,
        f"bucket models at {reference.s3_endpoint} takes what this worker's keys put",
    )


@pytest.mark.parametrize(
    ("url", "says"), [("s3://datasets/none.zip", "NoSuchKey"), ("s3://no-such-bucket/a", "NoSuchBucket")]
)
def test_an_object_that_is_not_there(
    at_reference: Storage, tmp_path: Path, interrupt: Interrupt, url: str, says: str
) -> None:
    with pytest.raises(DatasetUnavailableError, match=says):
        _fetch(at_reference, url, tmp_path, interrupt)


def test_wrong_keys_say_which_files_to_check(
    reference: ReferenceServer, tmp_path: Path, interrupt: Interrupt
) -> None:
    for storage in _storage_at(reference, tmp_path, "wrong"):
        with pytest.raises(
            JobError, match=r"SignatureDoesNotMatch.*check the files s3-access-key and s3-secret-key"
        ):
            _fetch(storage, "s3://datasets/a.zip", tmp_path, interrupt)
        ok, sentence = storage.check()
        assert not ok
        assert "s3-secret-key" in sentence


def test_a_data_set_and_a_model_come_from_the_server(
    reference: ReferenceServer, at_reference: Storage, tmp_path: Path, interrupt: Interrupt
) -> None:
    (tmp_path / "a.zip").write_bytes(DATA)
    dataset_id = reference.add_dataset(tmp_path / "a.zip", name="a")
    url = f"/api/v1/cv/datasets/{dataset_id}/download"
    assert _fetch(at_reference, url, tmp_path, interrupt).sha256 == sha256_of(DATA)
    reference.add_model(tmp_path / "a.zip", model_name="yolo11", version="base-1")
    fetched = at_reference.fetch_model(
        sha256_of(DATA), tmp_path / "m.pt", max_bytes=1_000_000, sha256=None, interrupt=interrupt
    )
    assert fetched.size_bytes == len(DATA)
    assert at_reference.promised_model_sha256("base-1") == sha256_of(DATA)
    assert at_reference.promised_model_sha256("base-2") is None
