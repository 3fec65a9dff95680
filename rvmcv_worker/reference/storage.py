"""Objects in S3, by their ``s3://bucket/key`` paths."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import S3Error

BUCKETS = ("datasets", "models", "artifacts")
CHUNK_BYTES = 2**20


class ObjectMissingError(Exception):
    """Nothing lies at this path."""


@dataclass(frozen=True)
class StoredObject:
    """What was found out by reading an object."""

    sha256: str
    size_bytes: int


class Storage:
    """The embedded store, or any MinIO."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str) -> None:
        self.endpoint = endpoint
        self.access_key = access_key
        self.secret_key = secret_key
        parts = urlsplit(endpoint)
        self._pool = urllib3.PoolManager(maxsize=16, timeout=urllib3.Timeout(connect=5, read=60))
        self._client = Minio(
            parts.netloc,
            access_key=access_key,
            secret_key=secret_key,
            secure=parts.scheme == "https",
            region="us-east-1",
            http_client=self._pool,
        )
        for bucket in BUCKETS:
            if not self._client.bucket_exists(bucket):
                self._client.make_bucket(bucket)

    def put(self, bucket: str, key: str, source: BinaryIO, size_bytes: int) -> str:
        """Store an object and return its path."""
        self._client.put_object(bucket, key, source, size_bytes)
        return f"s3://{bucket}/{key}"

    def put_file(self, bucket: str, key: str, file: Path) -> str:
        """Store a file and return its path."""
        with file.open("rb") as source:
            return self.put(bucket, key, source, file.stat().st_size)

    def put_by_hash(self, folder: str, file: Path) -> str:
        """Store a file of the server's own where `path_by_hash` finds it, and return its sha256."""
        digest = hashlib.sha256()
        with file.open("rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
        self.put_file("artifacts", f"{folder}/{digest.hexdigest()}", file)
        return digest.hexdigest()

    @staticmethod
    def path_by_hash(folder: str, sha256: str) -> str:
        """Return where `put_by_hash` stored a file."""
        return f"s3://artifacts/{folder}/{sha256}"

    def size_bytes(self, path: str) -> int:
        """Return an object's size; raises `ObjectMissingError`."""
        bucket, key = _split(path)
        try:
            return int(self._client.stat_object(bucket, key).size or 0)
        except S3Error as error:
            raise ObjectMissingError(f"{path}: {error.code}") from None

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Yield an object's bytes from `start` on; raises `ObjectMissingError` before the first."""
        bucket, key = _split(path)
        try:
            answer = self._client.get_object(bucket, key, offset=start)
        except S3Error as error:
            raise ObjectMissingError(f"{path}: {error.code}") from None
        try:
            yield from answer.stream(CHUNK_BYTES)
        finally:
            answer.close()
            answer.release_conn()

    def examine(self, path: str) -> StoredObject:
        """Read an object to its end and return its hash and size; raises `ObjectMissingError`."""
        digest, size_bytes = hashlib.sha256(), 0
        for chunk in self.read(path):
            digest.update(chunk)
            size_bytes += len(chunk)
        return StoredObject(digest.hexdigest(), size_bytes)

    def presigned_get(self, path: str, valid_s: float) -> str:
        """Return a URL that anyone can GET for so long."""
        return self._client.presigned_get_object(*_split(path), expires=timedelta(seconds=valid_s))

    def presigned_put(self, bucket: str, key: str, valid_s: float) -> str:
        """Return a URL that anyone can PUT to for so long."""
        return self._client.presigned_put_object(bucket, key, expires=timedelta(seconds=valid_s))

    def close(self) -> None:
        """Close every connection."""
        self._pool.clear()


def _split(path: str) -> tuple[str, str]:
    parts = urlsplit(path)
    if parts.scheme != "s3" or not parts.netloc or len(parts.path) < 2:
        raise ObjectMissingError(f"{path}: not of the form s3://bucket/key")
    return parts.netloc, path.split("/", 3)[3]
