"""Speaks the worker's side of the protocol to a reference server, one call at a time."""

from __future__ import annotations

import itertools
import uuid
from typing import Any

import requests
from sqlalchemy.orm import Session

from rvmcv_worker.reference.server import ReferenceServer
from tests.reference_process import ReferenceProcess


class FakeClock:
    """The database's clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self, _session: Session) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Talker:
    """A worker of its own name, with a job type of its own: tests on one server do not meet."""

    _numbers = itertools.count(1)

    def __init__(self, server: ReferenceServer | ReferenceProcess, job_type: str | None = None) -> None:
        number = next(self._numbers)
        self.server = server
        self.worker_id = f"worker{number}"
        self.instance_id = str(uuid.uuid4())
        self.job_type = job_type or f"type{number}"
        #: What its worker status says differently.
        self.status_fields: dict[str, Any] = {}
        self.http = requests.Session()
        self.http.headers.update(headers(server.worker_token))

    def queue(self, config: dict[str, Any] | None = None, **options: Any) -> str:
        return self.server.queue_training(config or {}, job_type=self.job_type, **options)

    def poll(self, *, wait: float = 0, slots: int = 1, **query: Any) -> list[dict[str, Any]]:
        fields = {
            "worker_id": self.worker_id,
            "instance_id": self.instance_id,
            "lane": "train",
            "slots": slots,
            "gpus_free": 1,
            "wait": wait,
            "job_types": self.job_type,
            "protocol": 1,
        }
        answer = self.http.get(self.url("job-status"), params={**fields, **query}, timeout=40)
        assert answer.status_code in (200, 204), answer.text
        return answer.json()["jobs"] if answer.status_code == 200 else []

    def claim(self, job_id: str, claim_id: str | None = None, **changes: Any) -> requests.Response:
        body = {
            "event": "claim",
            "job_id": job_id,
            "worker_id": self.worker_id,
            "instance_id": self.instance_id,
            "claim_id": claim_id or str(uuid.uuid4()),
            "status": "processing",
        }
        return self.post("job-status", {**body, **changes})

    def take(self, job_id: str) -> str:
        """Claim a job and return its lease token."""
        answer = self.claim(job_id)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["lease_token"])

    def progress(self, job_id: str, token: str, seq: int, **progress: Any) -> requests.Response:
        body = {"event": "progress", "job_id": job_id, "lease_token": token, "seq": seq}
        return self.post("job-status", {**body, "status": "processing", "progress": progress})

    def finish(
        self, job_id: str, token: str, status: str, finish_id: str | None = None, **fields: Any
    ) -> requests.Response:
        body = {
            "event": "finish",
            "job_id": job_id,
            "lease_token": token,
            "finish_id": finish_id or str(uuid.uuid4()),
            "status": status,
        }
        return self.post("job-status", {**body, **fields})

    def hand_back(self, job_id: str, token: str, code: str, **fields: Any) -> requests.Response:
        return self.finish(job_id, token, "queued", error={"code": code, "message": f"a {code}"}, **fields)

    def status(self, **leases: str) -> dict[str, Any]:
        body = {
            "worker_id": self.worker_id,
            "instance_id": self.instance_id,
            "version": "1.0.0",
            "state": "ready",
            "reasons": [],
            "claims": {"train": True, "infer": True, "batch": True},
            "uptime_s": 1,
            "sandbox": "bubblewrap",
            "gpus": [],
            "host": {},
            "jobs": {"running": 0, "completed": 0, "failed": 0, "cancelled": 0},
            "leases": [{"job_id": job, "lease_token": token} for job, token in leases.items()],
            **self.status_fields,
        }
        answer = self.post("worker-status", body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def restart(self) -> None:
        """Be a new daemon of the same name."""
        self.instance_id = str(uuid.uuid4())

    def post(self, path: str, body: Any) -> requests.Response:
        return self.http.post(self.url(path), json=body, timeout=40)

    def url(self, path: str) -> str:
        return f"{self.server.url}/api/v1/cv/{path}"


def headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", "Accept": "application/json"}
