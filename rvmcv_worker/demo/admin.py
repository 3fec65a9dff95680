"""What an admin does at RVM-Server: bring files, queue work, fetch what came out."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests
from minio import Minio

from rvmcv_worker.reference.client import Client, ClientError
from rvmcv_worker.reference.state_file import State

_CHUNK_BYTES = 2**20
_TIMEOUTS_S = (5, 60)


class Admin:
    """Calls with the admin's token; errors are `ClientError`, `requests`' and MinIO's own."""

    def __init__(self, state: State) -> None:
        self._url = state.url
        self._token = state.admin_token
        self._client = Client(state.url, state.admin_token)
        store = urlsplit(state.s3_endpoint)
        self._store = Minio(
            store.netloc,
            access_key=state.s3_access_key,
            secret_key=state.s3_secret_key,
            secure=store.scheme == "https",
            region="us-east-1",
        )

    def queue_training(self, archive: Path, fields: dict[str, Any]) -> str:
        """Store the data set, queue a training on it and return the job's id."""
        self._store.fput_object("datasets", "demo/dataset.zip", str(archive))
        dataset = {
            "dataset_url": "s3://datasets/demo/dataset.zip",
            "dataset_sha256": _sha256_of_file(archive),
        }
        job_id: str = self._client.post("/api/v1/cv/train", {**fields, **dataset})["job_id"]
        return job_id

    def job(self, job_id: str) -> dict[str, Any]:
        """Return everything that is known of a job."""
        found: dict[str, Any] = self._client.get(f"/api/v1/cv/job/{quote(job_id, safe='')}")
        return found

    def cancel(self, job_id: str) -> None:
        """Ask for a job's end."""
        self._client.cancel(job_id)

    def activate(self, version: str) -> None:
        """Make a model the active one: inferences that name none get it."""
        row = self.model_row(version)
        if row is None:
            raise ClientError(f"RVM-Server has no model {version}")
        self._client.post(f"/api/v1/cv/models/{row['id']}/activate", None)

    def add_segmenter(self, checkpoint: Path, version: str) -> None:
        """Bring a SAM2 checkpoint."""
        path = f"demo/{version}.pt"
        self._store.fput_object("models", path, str(checkpoint))
        fields = {"model_name": "sam2", "version": version, "file_path": f"s3://models/{path}"}
        self._client.post("/api/v1/cv/upload-model", {**fields, "sha256_hash": _sha256_of_file(checkpoint)})

    def put_image(self, file: Path, key: str) -> str:
        """Store a picture and return its ``s3://`` path."""
        self._store.fput_object("datasets", f"demo/{key}", str(file))
        return f"s3://datasets/demo/{key}"

    def infer(self, fields: dict[str, Any], wait_s: float) -> dict[str, Any]:
        """Queue an inference; returns the answer, which after `wait_s` may have no result yet."""
        answer: dict[str, Any] = self._client.post(f"/api/v1/cv/inference?wait={wait_s:g}", fields)
        return answer

    def inference(self, job_id: str, wait_s: float) -> dict[str, Any]:
        """Look at an inference again, waiting as `infer` does."""
        path = f"/api/v1/cv/inference/{quote(job_id, safe='')}"
        answer: dict[str, Any] = self._client.get(f"{path}?wait={wait_s:g}")
        return answer

    def queue_batch(self, images: list[dict[str, Any]], fields: dict[str, Any]) -> str:
        """Queue a batch of ``{"id", "url"}`` and return its id."""
        batch_id: str = self._client.post("/api/v1/cv/batch-inference", {**fields, "images": images})[
            "batch_id"
        ]
        return batch_id

    def batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch with its shards, and its summary once it is over."""
        found: dict[str, Any] = self._client.get(f"/api/v1/cv/batch/{quote(batch_id, safe='')}")
        return found

    def sandbox(self) -> str:
        """Return what stands between the daemon and its children, as the daemon says."""
        workers = self._client.get("/api/v1/cv/workers")
        status = workers[0]["status"] if workers else None
        return str((status or {}).get("sandbox", "unknown"))

    def model_row(self, version: str) -> dict[str, Any] | None:
        """Return the row of ``ai_model_versions`` with this version."""
        rows: list[dict[str, Any]] = self._client.get("/api/v1/cv/models")
        return next((row for row in rows if row["version"] == version), None)

    def download_model(self, version: str, target: Path) -> str:
        """Fetch a model as RVM-Server gives it out and return the sha256 of what came."""
        digest = hashlib.sha256()
        with requests.Session() as session:
            # A .netrc must not change who gets the token.
            session.trust_env = False
            session.headers["Authorization"] = f"Bearer {self._token}"
            url = f"{self._url}/api/v1/cv/download-model/{quote(version, safe='')}"
            with session.get(url, stream=True, timeout=_TIMEOUTS_S) as answer, target.open("wb") as file:
                answer.raise_for_status()
                for chunk in answer.iter_content(_CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
        return digest.hexdigest()

    def fetch(self, path: str, target: Path) -> None:
        """Fetch what lies at an ``s3://`` path."""
        parts = urlsplit(path)
        self._store.fget_object(parts.netloc, parts.path.lstrip("/"), str(target))


def _sha256_of_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
