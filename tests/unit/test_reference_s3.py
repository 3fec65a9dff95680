"""The embedded store refuses what S3 would refuse, and takes what MinIO's client sends."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
import urllib3
from minio import Minio
from minio.error import S3Error

from rvmcv_worker.reference.embedded_s3 import EmbeddedS3
from rvmcv_worker.reference.storage import ObjectMissingError, Storage

MULTIPART_BYTES = 12 * 2**20


class Later:
    """The server's clock, ahead of the client's by `by_s`."""

    by_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.by_s


@pytest.fixture(scope="module")
def clock() -> Later:
    return Later()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, clock: Later) -> Iterator[EmbeddedS3]:
    running = EmbeddedS3(tmp_path_factory.mktemp("s3"), clock=clock)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def storage(store: EmbeddedS3) -> Iterator[Storage]:
    client = Storage(store.endpoint, store.access_key, store.secret_key)
    yield client
    client.close()


@pytest.fixture
def minio(store: EmbeddedS3) -> Iterator[Minio]:
    pool = urllib3.PoolManager()
    yield client_of(store, store.access_key, store.secret_key, pool)
    pool.clear()


def client_of(store: EmbeddedS3, access_key: str, secret_key: str, pool: urllib3.PoolManager) -> Minio:
    host = urlsplit(store.endpoint).netloc
    return Minio(
        host, access_key=access_key, secret_key=secret_key, secure=False, region="us-east-1", http_client=pool
    )


@pytest.mark.parametrize("key", ["a.txt", "deep/er/a b+ü%.txt", "t_1/attempt-1/best.pt"])
def test_object_comes_back_under_any_key(storage: Storage, key: str) -> None:
    path = storage.put("datasets", key, io.BytesIO(b"bytes"), 5)
    assert b"".join(storage.read(path)) == b"bytes"
    assert b"".join(storage.read(path, 3)) == b"es"
    assert storage.examine(path).sha256 == hashlib.sha256(b"bytes").hexdigest()


def test_missing_object_and_bad_path(storage: Storage) -> None:
    for path in ("s3://datasets/none", "s3://nobucket/x", "https://x/y", "s3://datasets"):
        with pytest.raises(ObjectMissingError):
            storage.examine(path)


def test_multipart_upload(storage: Storage, minio: Minio) -> None:
    data = bytes(range(256)) * (MULTIPART_BYTES // 256)
    minio.put_object("models", "large", io.BytesIO(data), len(data), part_size=5 * 2**20)
    assert storage.examine("s3://models/large").sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("access_key", "secret_key", "code"),
    [("wrong", None, "InvalidAccessKeyId"), (None, "wrong", "SignatureDoesNotMatch")],
)
def test_wrong_key_is_refused(
    store: EmbeddedS3, storage: Storage, access_key: str | None, secret_key: str | None, code: str
) -> None:
    storage.put("models", "guarded", io.BytesIO(b"x"), 1)
    pool = urllib3.PoolManager()
    client = client_of(store, access_key or store.access_key, secret_key or store.secret_key, pool)
    with pytest.raises(S3Error) as refused:
        client.get_object("models", "guarded")
    assert refused.value.code == code
    with pytest.raises(S3Error):
        client.put_object("models", "guarded", io.BytesIO(b"y"), 1)
    assert b"".join(storage.read("s3://models/guarded")) == b"x"
    pool.clear()


def test_unsigned_request_is_refused(store: EmbeddedS3, storage: Storage) -> None:
    storage.put("models", "unsigned", io.BytesIO(b"x"), 1)
    assert requests.get(f"{store.endpoint}/models/unsigned", timeout=10).status_code == 403
    assert requests.put(f"{store.endpoint}/models/unsigned", data=b"y", timeout=10).status_code == 403


def test_request_of_another_time_is_refused(storage: Storage, clock: Later) -> None:
    clock.by_s = 16 * 60
    try:
        with pytest.raises(S3Error) as refused:
            storage.put("models", "late", io.BytesIO(b"x"), 1)
    finally:
        clock.by_s = 0
    assert refused.value.code == "RequestTimeTooSkewed"


def test_presigned_urls_work_until_they_expire(storage: Storage, minio: Minio, clock: Later) -> None:
    put = storage.presigned_put("artifacts", "p/attempt-1/x", 60)
    assert requests.put(put, data=b"abc", timeout=10).status_code == 200
    get = minio.presigned_get_object("artifacts", "p/attempt-1/x", expires=timedelta(seconds=60))
    assert requests.get(get, timeout=10).content == b"abc"
    assert requests.get(get, headers={"Range": "bytes=1-1"}, timeout=10).content == b"b"
    clock.by_s = 61
    try:
        for answer in (requests.get(get, timeout=10), requests.put(put, data=b"later", timeout=10)):
            assert (answer.status_code, "Request has expired" in answer.text) == (403, True)
    finally:
        clock.by_s = 0
    assert requests.get(get, timeout=10).content == b"abc"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("X-Amz-Expires=60", "X-Amz-Expires=6000"),
        ("/one?", "/two?"),
        ("X-Amz-Signature=", "X-Amz-Signature=0"),
        ("X-Amz-Date=", "X-Amz-Datum="),
        ("X-Amz-SignedHeaders=host", "X-Amz-SignedHeaders="),
        ("%2Fs3%2F", "%2Fsns%2F"),
    ],
)
def test_altered_presigned_url_is_refused(storage: Storage, old: str, new: str) -> None:
    storage.put("artifacts", "one", io.BytesIO(b"1"), 1)
    storage.put("artifacts", "two", io.BytesIO(b"2"), 1)
    url = storage.presigned_get("s3://artifacts/one", 60)
    assert old in url
    assert requests.get(url, timeout=10).status_code == 200
    assert requests.get(url.replace(old, new), timeout=10).status_code == 403


def test_presigned_get_cannot_put(storage: Storage) -> None:
    storage.put("artifacts", "one", io.BytesIO(b"1"), 1)
    url = storage.presigned_get("s3://artifacts/one", 60)
    assert requests.put(url, data=b"2", timeout=10).status_code == 403


def test_objects_outlive_a_restart_and_deleted_ones_do_not(tmp_path: Path) -> None:
    first = EmbeddedS3(tmp_path)
    storage = Storage(first.endpoint, first.access_key, first.secret_key)
    storage.put("models", "kept/ü", io.BytesIO(b"kept"), 4)
    storage.put("models", "gone", io.BytesIO(b"gone"), 4)
    pool = urllib3.PoolManager()
    client_of(first, first.access_key, first.secret_key, pool).remove_object("models", "gone")
    pool.clear()
    storage.close()
    first.stop()
    second = EmbeddedS3(tmp_path, access_key=first.access_key, secret_key=first.secret_key)
    storage = Storage(second.endpoint, second.access_key, second.secret_key)
    assert b"".join(storage.read("s3://models/kept/ü")) == b"kept"
    with pytest.raises(ObjectMissingError):
        storage.examine("s3://models/gone")
    storage.close()
    second.stop()
